//! `wasi-uring bench`: the same guest on both backends, native programs and the bare ring that do the
//! same, alternating, as ratios.

use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::thread::available_parallelism;

use tokio::runtime::{Builder, Runtime};
use wasmtime::error::Context;

use crate::args::{BenchArgs, RuntimeArg};
use crate::benches::{self, DENSITY, FLOOD, IDLE, NEIGHBOUR};
use crate::measure::idle::{self, Idleness};
use crate::measure::{
    BENCHES, Backend, Bench, Harness, Implementation, Work, compare, density, flood, neighbour,
};
use crate::open_files;
use crate::report::{Report, density as density_report, tables};
use crate::terminal::{Failure, print, progress_bar, say};

pub(crate) fn bench(args: &BenchArgs) -> Result<ExitCode, Failure> {
    if args.list {
        for (name, kind, what) in benches::all() {
            print(format_args!("{name}\t{kind}\t{what}"));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let names: Vec<_> = benches::all().map(|(name, ..)| name).collect();
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
    report.complete = measured.is_ok();
    // What was measured before something failed is written; but an empty report does not replace
    // the file of another run.
    let written = if report.is_empty() { Ok(()) } else { write(args, &report) };
    measured.map_err(Failure::run)?;
    written.map_err(Failure::run)?;
    if args.rounds == NonZeroUsize::MIN {
        say("one round has no spread: with more --rounds there is one");
    } else if report.noisy {
        say("this machine was busy: where the spread is large, measure again with more --rounds");
    }
    Ok(ExitCode::SUCCESS)
}

/// Measures the benches named, and prints a table of each kind as soon as it is there.
fn measure(
    args: &BenchArgs,
    runtime: Runtime,
    threads: NonZeroUsize,
    report: &mut Report,
) -> wasmtime::Result<()> {
    let wanted = |name: &str| args.names.is_empty() || args.names.iter().any(|n| n == name);
    let harness = Harness::new(args.recycle.limits(), threads)?;
    let benches: Vec<_> = BENCHES.iter().filter(|bench| wanted(bench.name)).collect();
    if !benches.is_empty() {
        let measured = speed(args, &harness, &runtime, &benches, report);
        tables::speed(report);
        measured?;
    }
    drop(runtime);
    if wanted(FLOOD.name) {
        let measured = floods(args, &harness, report);
        tables::floods(report);
        measured?;
    }
    if wanted(NEIGHBOUR.name) {
        let measured = neighbours(args, &harness, report);
        tables::neighbours(report);
        measured?;
    }
    if wanted(IDLE.name) {
        let measured = idle_memory(args, report);
        tables::idle(report);
        measured?;
    }
    if wanted(DENSITY.name) {
        drop(harness);
        let measured = crowds(args, report);
        density_report::print_tables(report);
        measured?;
    }
    Ok(())
}

/// Before minutes are spent on results that cannot be written.
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

/// A file has what there is so far, however this ends; a pipe has it all at the end.
fn write_so_far(args: &BenchArgs, report: &Report) -> wasmtime::Result<()> {
    match &args.json {
        Some(file) if file.is_file() => report.write_json(file),
        Some(_) | None => Ok(()),
    }
}

fn write(args: &BenchArgs, report: &Report) -> wasmtime::Result<()> {
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
fn speed(
    args: &BenchArgs,
    harness: &Harness,
    runtime: &Runtime,
    benches: &[&'static Bench],
    report: &mut Report,
) -> wasmtime::Result<()> {
    let implementations: Vec<_> = Implementation::ALL
        .into_iter()
        .filter(|implementation| implementation.wasi().is_none_or(|wasi| args.wasi.contains(&wasi)))
        .collect();
    let rows = benches.len() * args.guests.len();
    let progress = progress_bar(rows * (args.rounds.get() + 1) * implementations.len());
    for bench in benches {
        for guests in &args.guests {
            let work = Work::round(bench, guests.get());
            let step = || progress.inc(1);
            let row = compare(harness, runtime, &implementations, work, args.rounds.get(), step);
            report.add_speed(&row?);
            write_so_far(args, report)?;
        }
    }
    Ok(())
}

/// Latency of many sockets while another is flooded.
fn floods(args: &BenchArgs, harness: &Harness, report: &mut Report) -> wasmtime::Result<()> {
    let rounds = args.rounds.get();
    let sockets = args.sockets.map_or(flood::SOCKETS_DEFAULT, NonZeroUsize::get).max(2);
    let progress = progress_bar(flood::STEPS * rounds * Backend::ALL.len() * args.wasi.len());
    for wasi in &args.wasi {
        let figures = flood::measure(harness, *wasi, sockets, rounds, &|| progress.inc(1));
        figures?.iter().for_each(|figures| report.add_flood(figures));
        write_so_far(args, report)?;
    }
    Ok(())
}

/// Latency of many sockets while a guest on the same runtime computes.
fn neighbours(args: &BenchArgs, harness: &Harness, report: &mut Report) -> wasmtime::Result<()> {
    let rounds = args.rounds.get();
    let sockets = args.sockets.map_or(neighbour::SOCKETS_DEFAULT, NonZeroUsize::get);
    let progress = progress_bar(neighbour::STEPS * rounds * Backend::ALL.len() * args.wasi.len());
    for wasi in &args.wasi {
        let figures = neighbour::measure(harness, *wasi, sockets, rounds, &|| progress.inc(1));
        figures?.iter().for_each(|figures| report.add_neighbour(figures));
        write_so_far(args, report)?;
    }
    Ok(())
}

/// Memory of sockets at rest.
fn idle_memory(args: &BenchArgs, report: &mut Report) -> wasmtime::Result<()> {
    let wanted = args.sockets.map_or(idle::SOCKETS_DEFAULT, NonZeroUsize::get).max(2);
    let sockets = open_files::within_limit(wanted);
    let rounds = args.rounds.get();
    let kinds = Backend::ALL.len() * Idleness::ALL.len() * args.wasi.len();
    let progress = progress_bar(rounds * kinds);
    let command = std::env::current_exe()?;
    for wasi in &args.wasi {
        let idle = idle::measure(&command, *wasi, sockets, rounds, || progress.inc(1));
        idle?.iter().for_each(|idle| report.add_idle(idle));
        write_so_far(args, report)?;
    }
    Ok(())
}

/// Many sockets in one process, and how many buffers they need.
fn crowds(args: &BenchArgs, report: &mut Report) -> wasmtime::Result<()> {
    let rounds = args.rounds.get();
    let sockets = args.sockets.map_or(density::SOCKETS_DEFAULT, NonZeroUsize::get).max(2);
    let command = std::env::current_exe()?;
    for wasi in &args.wasi {
        let (crowds, sweep) = (density::crowds(*wasi, sockets), density::sweep(*wasi, sockets));
        let progress = progress_bar((crowds.len() + sweep.len()) * rounds);
        let step = || progress.inc(1);
        let measured = density::measure(&command, crowds, rounds, step)?;
        for figures in &measured {
            report.add_crowd(figures);
        }
        write_so_far(args, report)?;
        let measured = density::measure(&command, sweep, rounds, step)?;
        for figures in &measured {
            report.add_sweep(figures);
        }
        write_so_far(args, report)?;
    }
    Ok(())
}
