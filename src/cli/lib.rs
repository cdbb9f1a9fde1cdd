//! The command `wasi-uring`: runs guests on either backend, and measures both.

mod args;
mod bench;
mod benches;
mod demo;
mod doctor;
mod ending;
mod host;
pub mod measure;
mod open_files;
mod report;
mod run;
mod seccomp;
mod serve;
mod services;
mod terminal;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};
use terminal::{Failure, say};

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into()),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        // With stderr closed, saying so would panic.
        .log_internal_errors(false)
        .without_time()
        .init();
    run_command(std::env::args_os().collect())
}

fn run_command(args: Vec<OsString>) -> ExitCode {
    let ended = match Cli::parse_from(args).command {
        Command::Run(args) => run::run(&args),
        Command::Serve(args) => serve::serve(&args),
        Command::Demo(args) => demo::demo(&args),
        Command::Bench(args) => bench::bench(&args),
        Command::Report(args) => report::report(&args),
        Command::Crowd(args) => measure::density::print_outcome(&args),
        Command::Native(service) => services::run(&service),
        Command::Doctor(args) => match &args.seccomp {
            Some(default) => seccomp::profile(default),
            None => Ok(doctor::doctor(&args)),
        },
    };
    match ended {
        Ok(code) => code,
        Err(Failure::Run(error)) => complain(&error, 1),
        Err(Failure::Usage(error)) => complain(&error, 2),
    }
}

fn complain(error: &wasmtime::Error, code: u8) -> ExitCode {
    say(format_args!("error: {error:#}"));
    ExitCode::from(code)
}
