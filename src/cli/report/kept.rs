//! `wasi-uring report`: tables and pictures of results that were measured before.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use wasmtime::error::Context;
use wasmtime::format_err;

use super::plot::Picture;
use super::{Report, markdown, replace};
use crate::args::ReportArgs;
use crate::terminal::{Failure, say};

/// The JSON files that `scripts/bench` leaves in a directory.
pub(super) struct Kept {
    /// Every bench of speed.
    pub(super) results: Report,
    /// Some of them, on a multi-thread runtime.
    pub(super) multi_thread: Report,
    /// Some of them, at many numbers of guests.
    pub(super) guests: Report,
    /// What is not speed.
    pub(super) others: Report,
    /// Many sockets in one process.
    pub(super) density: Report,
}

impl Kept {
    fn read(dir: &Path) -> wasmtime::Result<Self> {
        let read = |name| Report::read_json(&dir.join(name).with_extension("json"));
        Ok(Self {
            results: read("results")?,
            multi_thread: read("multi-thread")?,
            guests: read("guests")?,
            others: read("others")?,
            density: read("density")?,
        })
    }
}

/// Of the directory that the command line names.
pub(crate) fn report(args: &ReportArgs) -> Result<ExitCode, Failure> {
    let kept = Kept::read(&args.dir).map_err(Failure::usage)?;
    let readme = match &args.readme {
        None => None,
        Some(readme) => {
            let text = with_headline(readme, &args.dir, &kept.results).map_err(Failure::usage)?;
            Some((readme, text))
        }
    };
    let mut written = write_report(&args.dir, &kept).map_err(Failure::run)?;
    if let Some((readme, text)) = readme {
        replace(readme, &text).map_err(Failure::run)?;
        written.push(readme.clone());
    }
    for file in written {
        say(format_args!("wrote {}", file.display()));
    }
    Ok(ExitCode::SUCCESS)
}

fn write_report(dir: &Path, kept: &Kept) -> wasmtime::Result<Vec<PathBuf>> {
    let tables = dir.join("README.md");
    replace(&tables, &markdown::document(kept))?;
    let mut written = vec![tables];
    written.extend(kept.results.draw(&Picture::OF_FEW_GUESTS, dir)?);
    written.extend(kept.guests.draw(&[Picture::Guests], dir)?);
    written.extend(kept.density.draw_buffers(dir)?);
    Ok(written)
}

/// A document with these results between its marks.
fn with_headline(readme: &Path, dir: &Path, results: &Report) -> wasmtime::Result<String> {
    let text = fs::read_to_string(readme);
    let text = text.with_context(|| format!("cannot read {}", readme.display()))?;
    let from = readme.parent().unwrap_or(Path::new(""));
    let all = dir.strip_prefix(from).unwrap_or(dir).join(OsStr::new("README.md"));
    let headline = markdown::headline(results, &all.to_string_lossy());
    markdown::replace_marked(&text, &headline).ok_or_else(|| {
        let (begin, end) = (markdown::BEGIN, markdown::END);
        format_err!("{} has no {begin} … {end}", readme.display())
    })
}
