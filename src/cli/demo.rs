//! `wasi-uring demo`.
use super::{DemoArgs, Failure};
use std::process::ExitCode;
pub(crate) fn demo(_: &DemoArgs) -> Result<ExitCode, Failure> {
    todo!()
}
