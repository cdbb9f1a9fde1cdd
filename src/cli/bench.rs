//! `wasi-uring bench`: the same guest on both backends, native programs and the bare ring that do the
//! same, alternating, as ratios.

mod plot;
mod report;

use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::time::Duration;

use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::runtime::Runtime;
use wasmtime::error::Context;

use self::report::Report;
use super::measure::idle::{self, Idle, Idleness, Taken};
use super::measure::{
    BENCHES, Backend, Bench, Contender, Contest, Row, Summary, Work, contend, flood,
};
use super::{BenchArgs, Failure, RuntimeArg, WasiArg, print, say};

/// Benches that are no contest in speed.
const FLOOD: &str = "flood";
const IDLE: &str = "idle";

/// A spread above this says that the machine was too busy to believe the median.
const SPREAD_MAX: f64 = 0.15;

pub(crate) fn bench(args: &BenchArgs) -> Result<ExitCode, Failure> {
    let names: Vec<_> = BENCHES.iter().map(|bench| bench.name).chain([FLOOD, IDLE]).collect();
    if let Some(unknown) = args.names.iter().find(|name| !names.contains(&name.as_str())) {
        let error =
            wasmtime::format_err!("no bench is named {unknown}; there are {}", names.join(", "));
        return Err(Failure::usage(error));
    }
    let wanted = |name: &str| args.names.is_empty() || args.names.iter().any(|n| n == name);
    check_outputs(args).map_err(Failure::usage)?;
    let contest = Contest::new(args.recycle.limits()).map_err(Failure::run)?;
    let runtime = match args.runtime {
        RuntimeArg::PerCore => tokio::runtime::Builder::new_current_thread().enable_all().build(),
        RuntimeArg::MultiThread => tokio::runtime::Builder::new_multi_thread().enable_all().build(),
        RuntimeArg::TokioUring => {
            let error = wasmtime::format_err!("bench runs on per-core or multi-thread");
            return Err(Failure::usage(error));
        }
    }
    .context("cannot start a runtime")
    .map_err(Failure::run)?;

    let benches: Vec<_> = BENCHES.iter().filter(|bench| wanted(bench.name)).collect();
    let mut noisy = false;
    if !benches.is_empty() {
        let rows = contests(args, &contest, &runtime, &benches).map_err(Failure::run)?;
        let report = Report::new(args.rounds.get(), rows);
        report.print();
        noisy |= report.is_noisy();
        if let Some(file) = &args.json {
            report.write_json(file).map_err(Failure::run)?;
        }
        if let Some(dir) = &args.plot {
            for file in report.plot(dir).map_err(Failure::run)? {
                say(format_args!("drew {}", file.display()));
            }
        }
    }
    drop(runtime);
    for wasi in &args.wasi {
        if wanted(FLOOD) {
            noisy |= flood(args, *wasi, &contest).map_err(Failure::run)?;
        }
        if wanted(IDLE) {
            idle(args, *wasi, &contest).map_err(Failure::run)?;
        }
    }
    if noisy {
        say("this machine was busy: where the spread is large, measure again with more --rounds");
    }
    Ok(ExitCode::SUCCESS)
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

fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_FULL_CONDENSED).set_header(header);
    table
}

/// Whether a figure cannot be believed.
fn is_noisy(summary: &Summary) -> bool {
    summary.spread > SPREAD_MAX
}

/// Speed, bench by bench.
fn contests(
    args: &BenchArgs,
    contest: &Contest,
    runtime: &Runtime,
    benches: &[&'static Bench],
) -> wasmtime::Result<Vec<Row>> {
    let contenders: Vec<_> = Contender::ALL
        .into_iter()
        .filter(|contender| contender.wasi().is_none_or(|wasi| args.wasi.contains(&wasi)))
        .collect();
    let rows = benches.len() * args.guests.len();
    let progress = progress_bar(rows * (args.rounds.get() + 1) * contenders.len());
    let mut rows = Vec::new();
    for bench in benches {
        for guests in &args.guests {
            let work = Work::round(bench, guests.get());
            let step = || progress.inc(1);
            rows.push(contend(contest, runtime, &contenders, work, args.rounds.get(), step)?);
        }
    }
    progress.finish_and_clear();
    Ok(rows)
}

fn flood(args: &BenchArgs, wasi: WasiArg, contest: &Contest) -> wasmtime::Result<bool> {
    let rounds = args.rounds.get();
    let sockets = args.sockets.map_or(flood::SOCKETS_DEFAULT, NonZeroUsize::get).max(2);
    let progress = progress_bar(flood::STEPS * rounds * Backend::ALL.len());
    let mut table = table([
        "flood",
        "WASI",
        "p50 calm",
        "p99 calm",
        "elsewhere",
        "flooded",
        "in bulk",
        "flooded / calm",
        "in bulk / calm",
        "lost",
        "held up",
        "flood, bulk per s",
    ]);
    let mut noisy = false;
    for result in flood::measure(contest, wasi, sockets, rounds, &|| progress.inc(1))? {
        noisy |= is_noisy(&result.flooded);
        let [calm, elsewhere, flooded, in_bulk] = result.p99;
        let [flood, bulk] = result.flood_per_second;
        let times =
            |Summary { median, spread }: Summary| format!("{median:.2} ±{:.0}%", spread * 100.0);
        table.add_row([
            result.backend.name().to_owned(),
            wasi.version().to_owned(),
            format!("{:.0} µs", result.calm_p50),
            format!("{calm:.0} µs"),
            format!("{elsewhere:.0} µs"),
            format!("{flooded:.0} µs"),
            format!("{in_bulk:.0} µs"),
            times(result.flooded),
            times(result.flooded_in_bulk),
            format!("{} of {}", result.lost, result.asked),
            result.held_up.to_string(),
            format!("{flood:.0}, {bulk:.0}"),
        ]);
    }
    progress.finish_and_clear();
    print(table);
    print(format_args!(
        "{} sockets answer a paced client; one more is flooded from another thread, by single \
         datagrams or in bulk, or a plain socket is (elsewhere). Medians of the rounds' p99, without \
         the questions held up by other programs that had the guests' CPU.",
        sockets - 1,
    ));
    Ok(noisy)
}

fn idle(args: &BenchArgs, wasi: WasiArg, contest: &Contest) -> wasmtime::Result<()> {
    let most = contest.sockets() as usize / 2;
    let sockets = args.sockets.map_or(idle::SOCKETS_DEFAULT, NonZeroUsize::get).clamp(2, most);
    let rounds = args.rounds.get();
    let progress = progress_bar(rounds * Backend::ALL.len() * Idleness::ALL.len());
    let mut table = table(["idle", "WASI", "sockets", "process", "kernel", "together", "spread"]);
    let command = std::env::current_exe()?;
    for result in idle::measure(&command, wasi, sockets, rounds, || progress.inc(1))? {
        let Idle { backend, idleness, rounds } = result;
        let summary = |of: fn(&Taken) -> f64| Summary::of(rounds.iter().map(of));
        let (process, kernel) = (summary(|taken| taken.process), summary(|taken| taken.kernel));
        table.add_row([
            backend.name().to_owned(),
            wasi.version().to_owned(),
            idleness.name().to_owned(),
            format!("{:.0} B", process.median),
            format!("{:.0} B", kernel.median),
            format!("{:.0} B", process.median + kernel.median),
            format!("±{:.0}%, ±{:.0}%", process.spread * 100.0, kernel.spread * 100.0),
        ]);
    }
    progress.finish_and_clear();
    print(table);
    print(format_args!(
        "Memory per socket of one guest that holds {sockets}: the process's own, and the growth of \
         the kernel's slab."
    ));
    Ok(())
}

pub(crate) fn progress_bar(steps: usize) -> ProgressBar {
    let progress = ProgressBar::new(steps as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} rounds, {eta} to go") {
        progress.set_style(style);
    }
    progress.enable_steady_tick(Duration::from_millis(200));
    progress
}
