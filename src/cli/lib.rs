//! The command `wasi-uring`: runs guests on either backend, and measures both.

mod args;
mod bench;
mod demo;
mod doctor;
mod host;
pub mod measure;
mod report;
mod run;

use std::ffi::OsString;
use std::fmt::Display;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use indicatif::{ProgressBar, ProgressStyle};

use args::{Cli, Command};

/// How a command ends if it does not end well.
#[derive(Debug)]
pub(crate) enum Failure {
    /// A guest failed or trapped, or a measurement could not be made: exit code 1.
    Run(wasmtime::Error),
    /// What was asked for cannot be done: exit code 2, as for clap's own errors.
    Usage(wasmtime::Error),
}

impl From<Failure> for wasmtime::Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Run(error) | Failure::Usage(error) => error,
        }
    }
}

impl Failure {
    pub(crate) fn usage(error: impl Into<wasmtime::Error>) -> Self {
        Self::Usage(error.into())
    }

    pub(crate) fn run(error: impl Into<wasmtime::Error>) -> Self {
        Self::Run(error.into())
    }
}

/// Does what the command line asks for.
pub fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into()),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        // It would say so on the stderr that is gone, and panic.
        .log_internal_errors(false)
        .without_time()
        .init();
    run_command(std::env::args_os().collect())
}

fn run_command(args: Vec<OsString>) -> ExitCode {
    let ended = match Cli::parse_from(args).command {
        Command::Run(args) => run::run(&args),
        Command::Demo(args) => demo::demo(&args),
        Command::Bench(args) => bench::bench(&args),
        Command::Doctor(args) => Ok(doctor::doctor(&args)),
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

/// A line on stderr, which may be gone.
pub(crate) fn say(message: impl Display) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "wasi-uring: {message}");
}

/// A line on stdout, which may be gone: a closed pipe is no failure.
pub(crate) fn print(message: impl Display) {
    use std::io::Write;
    let _ = writeln!(std::io::stdout(), "{message}");
}

pub(crate) fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_FULL_CONDENSED).set_header(header);
    table
}

/// Of so many steps.
pub(crate) fn progress_bar(steps: usize) -> ProgressBar {
    let progress = ProgressBar::new(steps as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} rounds, {eta} to go") {
        progress.set_style(style);
    }
    progress.enable_steady_tick(Duration::from_millis(200));
    progress
}
