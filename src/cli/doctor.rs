//! `wasi-uring doctor`.
use super::{DoctorArgs, Failure};
use std::process::ExitCode;
pub(crate) fn doctor(_: &DoctorArgs) -> Result<ExitCode, Failure> {
    todo!()
}
/// Raises the soft open-files limit to the hard one; the limit then.
pub(crate) fn raise_nofile() -> u64 {
    rlimit::increase_nofile_limit(u64::MAX).unwrap_or(1024)
}
