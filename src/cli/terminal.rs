//! What a user sees: lines, tables, progress, and how a command ends.

use std::fmt::Display;
use std::io::Write;
use std::time::Duration;

use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use indicatif::{ProgressBar, ProgressStyle};

/// How a command ends if it does not end well.
#[derive(Debug)]
pub(crate) enum Failure {
    /// A guest failed or trapped, or a measurement could not be made: exit code 1.
    Run(wasmtime::Error),
    /// The command line cannot be followed: exit code 2, as for clap's own errors.
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

/// A line on stderr, which may be closed.
pub(crate) fn say(message: impl Display) {
    let _ = writeln!(std::io::stderr(), "wasi-uring: {message}");
}

/// A line on stdout, which may be closed: a closed pipe is no failure.
pub(crate) fn print(message: impl Display) {
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
