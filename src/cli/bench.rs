//! `wasi-uring bench`: the same guest on both backends, native programs and the bare ring that do the
//! same, alternating, as ratios.

use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::thread::available_parallelism;

use tokio::runtime::{Builder, Runtime};
use wasmtime::error::Context;

use crate::args::{BenchArgs, RuntimeArg};
use crate::measure::idle::{self, Idleness};
use crate::measure::{BENCHES, Backend, Bench, Contender, Contest, Work, contend, flood};
use crate::report::{Report, tables};
use crate::{Failure, doctor, progress_bar, say};

/// Benches that are no contest in speed.
const FLOOD: &str = "flood";
const IDLE: &str = "idle";

pub(crate) fn bench(args: &BenchArgs) -> Result<ExitCode, Failure> {
    let names: Vec<_> = BENCHES.iter().map(|bench| bench.name).chain([FLOOD, IDLE]).collect();
    if let Some(unknown) = args.names.iter().find(|name| !names.contains(&name.as_str())) {
        let error =
            wasmtime::format_err!("no bench is named {unknown}; there are {}", names.join(", "));
        return Err(Failure::usage(error));
    }
    let (threads, mut runtime) = match args.runtime {
        RuntimeArg::PerCore => (NonZeroUsize::MIN, Builder::new_current_thread()),
        RuntimeArg::MultiThread => {
            (available_parallelism().unwrap_or(NonZeroUsize::MIN), Builder::new_multi_thread())
        }
        RuntimeArg::TokioUring => {
            let error = wasmtime::format_err!("bench runs on per-core or multi-thread");
            return Err(Failure::usage(error));
        }
    };
    let runtime = runtime.worker_threads(threads.get()).enable_all().build();
    let runtime = runtime.context("cannot start a runtime").map_err(Failure::run)?;
    check_outputs(args).map_err(Failure::usage)?;

    let mut report = Report::new(args.rounds.get());
    let measured = measure(args, runtime, threads, &mut report);
    report.is_complete = measured.is_ok();
    // What was measured before something failed is kept; and nothing is no reason to forget what
    // another run has left there.
    let kept = if report.is_empty() { Ok(()) } else { keep(args, &report) };
    measured.map_err(Failure::run)?;
    kept.map_err(Failure::run)?;
    if args.rounds == NonZeroUsize::MIN {
        say("one round has no spread: with more --rounds you see what to believe");
    } else if report.is_noisy() {
        say("this machine was busy: where the spread is large, measure again with more --rounds");
    }
    Ok(ExitCode::SUCCESS)
}

/// Measures what is asked for, and prints a table of each kind as soon as it is there.
fn measure(
    args: &BenchArgs,
    runtime: Runtime,
    threads: NonZeroUsize,
    report: &mut Report,
) -> wasmtime::Result<()> {
    let wanted = |name: &str| args.names.is_empty() || args.names.iter().any(|n| n == name);
    let contest = Contest::new(args.recycle.limits(), threads)?;
    let benches: Vec<_> = BENCHES.iter().filter(|bench| wanted(bench.name)).collect();
    if !benches.is_empty() {
        let measured = contests(args, &contest, &runtime, &benches, report);
        tables::contests(&report.rows);
        measured?;
    }
    drop(runtime);
    if wanted(FLOOD) {
        let measured = floods(args, &contest, report);
        tables::floods(&report.floods);
        measured?;
    }
    if wanted(IDLE) {
        let measured = idles(args, report);
        tables::idles(&report.idles);
        measured?;
    }
    Ok(())
}

/// Before minutes are spent on results that nobody could keep.
fn check_outputs(args: &BenchArgs) -> wasmtime::Result<()> {
    if let Some(file) = &args.json {
        std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(file)
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    if let Some(dir) = &args.plot {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    Ok(())
}

/// A file has what there is so far, whatever ends this; a pipe has it all at the end.
fn keep_so_far(args: &BenchArgs, report: &Report) -> wasmtime::Result<()> {
    match &args.json {
        Some(file) if file.is_file() => report.write_json(file),
        Some(_) | None => Ok(()),
    }
}

fn keep(args: &BenchArgs, report: &Report) -> wasmtime::Result<()> {
    if let Some(file) = &args.json {
        report.write_json(file)?;
    }
    if let Some(dir) = &args.plot {
        let drawn = report.plot(dir)?;
        if drawn.is_empty() {
            say("drew nothing: of what was measured there are no pictures");
        }
        for file in drawn {
            say(format_args!("drew {}", file.display()));
        }
    }
    Ok(())
}

/// Speed, bench by bench.
fn contests(
    args: &BenchArgs,
    contest: &Contest,
    runtime: &Runtime,
    benches: &[&'static Bench],
    report: &mut Report,
) -> wasmtime::Result<()> {
    let contenders: Vec<_> = Contender::ALL
        .into_iter()
        .filter(|contender| contender.wasi().is_none_or(|wasi| args.wasi.contains(&wasi)))
        .collect();
    let rows = benches.len() * args.guests.len();
    let progress = progress_bar(rows * (args.rounds.get() + 1) * contenders.len());
    for bench in benches {
        for guests in &args.guests {
            let work = Work::round(bench, guests.get());
            let step = || progress.inc(1);
            let row = contend(contest, runtime, &contenders, work, args.rounds.get(), step);
            report.rows.push(row?);
            keep_so_far(args, report)?;
        }
    }
    Ok(())
}

/// Latency of many sockets while another is flooded.
fn floods(args: &BenchArgs, contest: &Contest, report: &mut Report) -> wasmtime::Result<()> {
    let rounds = args.rounds.get();
    let sockets = args.sockets.map_or(flood::SOCKETS_DEFAULT, NonZeroUsize::get).max(2);
    let progress = progress_bar(flood::STEPS * rounds * Backend::ALL.len() * args.wasi.len());
    for wasi in &args.wasi {
        let figures = flood::measure(contest, *wasi, sockets, rounds, &|| progress.inc(1));
        report.floods.extend(figures?);
        keep_so_far(args, report)?;
    }
    Ok(())
}

/// Memory of sockets at rest.
fn idles(args: &BenchArgs, report: &mut Report) -> wasmtime::Result<()> {
    let wanted = args.sockets.map_or(idle::SOCKETS_DEFAULT, NonZeroUsize::get).max(2);
    let sockets = doctor::within_open_files(wanted);
    let rounds = args.rounds.get();
    let kinds = Backend::ALL.len() * Idleness::ALL.len() * args.wasi.len();
    let progress = progress_bar(rounds * kinds);
    let command = std::env::current_exe()?;
    for wasi in &args.wasi {
        let idle = idle::measure(&command, *wasi, sockets, rounds, || progress.inc(1));
        report.idles.extend(idle?);
        keep_so_far(args, report)?;
    }
    Ok(())
}
