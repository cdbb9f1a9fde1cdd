//! The `wasi-uring` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    wasi_uring_cli::main()
}
