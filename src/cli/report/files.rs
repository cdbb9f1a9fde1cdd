//! The files that `wasi-uring report` reads and writes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use wasmtime::error::Context;
use wasmtime::format_err;

use super::plot::Picture;
use super::services::Services;
use super::{Report, markdown};
use crate::args::ReportArgs;
use crate::terminal::{Failure, say};

/// Replaces a file at once, so that no half of one is left; anything else is written to.
pub(super) fn replace(file: &Path, text: &str) -> wasmtime::Result<()> {
    let write = || {
        if !file.is_file() {
            return fs::write(file, text);
        }
        let mut beside = file.as_os_str().to_owned();
        beside.push(".part");
        fs::write(&beside, text)?;
        fs::rename(&beside, file)
    };
    write().with_context(|| format!("cannot write {}", file.display()))
}

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

/// `wasi-uring report`: tables and pictures of results that were measured before.
pub(crate) fn report(args: &ReportArgs) -> Result<ExitCode, Failure> {
    let dir = &args.dir;
    let kept = if args.services { None } else { Some(Kept::read(dir).map_err(Failure::usage)?) };
    // Those who measure the benches alone have none.
    let services = if args.services || Services::file(dir).exists() {
        Some(Services::read(dir).map_err(Failure::usage)?)
    } else {
        None
    };
    let readme = match &args.readme {
        None => None,
        Some(readme) => {
            let text = with_headlines(readme, dir, kept.as_ref(), services.as_ref());
            Some((readme, text.map_err(Failure::usage)?))
        }
    };
    let mut written = Vec::new();
    if let Some(kept) = &kept {
        written.extend(write_benches(dir, kept).map_err(Failure::run)?);
    }
    if let Some(services) = &services {
        written.extend(services.write(dir).map_err(Failure::run)?);
    }
    if let Some((readme, text)) = readme {
        replace(readme, &text).map_err(Failure::run)?;
        written.push(readme.clone());
    }
    for file in written {
        say(format_args!("wrote {}", file.display()));
    }
    Ok(ExitCode::SUCCESS)
}

fn write_benches(dir: &Path, kept: &Kept) -> wasmtime::Result<Vec<PathBuf>> {
    let tables = dir.join("README.md");
    replace(&tables, &markdown::document(kept))?;
    let mut written = vec![tables];
    written.extend(kept.results.draw(&Picture::OF_FEW_GUESTS, dir)?);
    written.extend(kept.guests.draw(&[Picture::Guests], dir)?);
    written.extend(kept.density.draw_buffers(dir)?);
    Ok(written)
}

/// A document with these results between its marks.
fn with_headlines(
    readme: &Path,
    dir: &Path,
    kept: Option<&Kept>,
    services: Option<&Services>,
) -> wasmtime::Result<String> {
    let text = fs::read_to_string(readme);
    let mut text = text.with_context(|| format!("cannot read {}", readme.display()))?;
    let from = readme.parent().unwrap_or(Path::new(""));
    let beside = |file: &str| {
        let file = dir.strip_prefix(from).unwrap_or(dir).join(file);
        file.to_string_lossy().into_owned()
    };
    let benches = kept.map(|kept| markdown::headline(&kept.results, &beside("README.md")));
    let services = services.map(|services| services.headline(&beside("services.md")));
    for (mark, headline) in [("bench", benches), ("services", services)] {
        let Some(headline) = headline else { continue };
        text = markdown::replace_marked(&text, mark, &headline).ok_or_else(|| {
            format_err!("{} has no <!-- {mark} --> … <!-- /{mark} -->", readme.display())
        })?;
    }
    Ok(text)
}
