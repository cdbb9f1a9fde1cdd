//! `wasi-uring bench`: the same guest on both backends and a plain program that does the same,
//! alternating, as ratios.

mod flood;
mod idle;
mod native;

use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::time::Duration;

use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::runtime::Runtime;
use wasmtime::error::Context;

use super::host::Backend;
use super::measure::{Contest, Sample, Summary, Work};
use super::{BenchArgs, Failure, RuntimeArg, WasiArg, print, say};

/// A mode of the built-in guest and how many operations one guest alone does in a round.
const MODES: &[(&str, usize)] = &[
    ("create", 200_000),
    ("bind", 20_000),
    ("bind6", 20_000),
    ("pair", 5_000),
    ("echo", 15_000),
    ("dns", 6_000),
    ("batch", 1_000),
];

/// Operations per guest at least, so that those that open sockets once are not measured doing so.
const COUNT_MIN: usize = 100;

/// Benches that are no contest in speed.
const FLOOD: &str = "flood";
const IDLE: &str = "idle";

/// A spread above this says that the machine was too busy to believe the median.
const SPREAD_MAX: f64 = 0.15;

const BACKENDS: [Backend; 2] = [Backend::Stock, Backend::Uring];

pub(crate) fn bench(args: &BenchArgs) -> Result<ExitCode, Failure> {
    let names: Vec<_> = MODES.iter().map(|(mode, _)| *mode).chain([FLOOD, IDLE]).collect();
    if let Some(unknown) = args.names.iter().find(|name| !names.contains(&name.as_str())) {
        let error =
            wasmtime::format_err!("no bench is named {unknown}; there are {}", names.join(", "));
        return Err(Failure::usage(error));
    }
    let wanted = |name: &str| args.names.is_empty() || args.names.iter().any(|n| n == name);
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

    let modes: Vec<_> = MODES.iter().filter(|(mode, _)| wanted(mode)).collect();
    let mut noisy = false;
    if !modes.is_empty() {
        noisy |= contests(args, &contest, &runtime, &modes).map_err(Failure::run)?;
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

fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_FULL_CONDENSED).set_header(header);
    table
}

/// Whether a figure cannot be believed.
fn is_noisy(summary: &Summary) -> bool {
    summary.spread > SPREAD_MAX
}

/// Speed, mode by mode; whether some figure was noisy.
fn contests(
    args: &BenchArgs,
    contest: &Contest,
    runtime: &Runtime,
    modes: &[&(&'static str, usize)],
) -> wasmtime::Result<bool> {
    let rows = modes.len() * args.guests.len() * args.wasi.len();
    let progress = progress_bar(rows * (args.rounds.get() + 1) * 2);
    let mut table = table([
        "bench",
        "WASI",
        "guests",
        "stock µs",
        "uring µs",
        "native µs",
        "× stock",
        "× stock, wall",
        "× native",
        "enters/op",
        "suspends/op",
        "spread",
    ]);
    let mut noisy = false;
    for (mode, count) in modes {
        let per_wasi = |wasi| args.guests.iter().map(move |guests| (wasi, guests));
        for (wasi, guests) in args.wasi.iter().flat_map(per_wasi) {
            let count = (count / guests.get()).max(COUNT_MIN);
            let work = Work { wasi: *wasi, mode, guests: guests.get(), count };
            let rounds = contend(contest, runtime, &work, args.rounds.get(), &progress)?;
            let result = rounds.result(&work);
            noisy |= is_noisy(&result.cpu_ratio);
            table.add_row([
                (*mode).to_owned(),
                wasi.version().to_owned(),
                guests.to_string(),
                format!("{:.2}", result.stock_micros),
                format!("{:.2}", result.uring_micros),
                format!("{:.2}", result.native_micros),
                format!("{:.2}", result.cpu_ratio.median),
                format!("{:.2}", result.wall_ratio.median),
                format!("{:.2}", result.native_ratio.median),
                format!("{:.3}", result.enters),
                format!("{:.2}, {:.2}", result.stock_suspensions, result.uring_suspensions),
                format!("±{:.0}%", result.cpu_ratio.spread * 100.0),
            ]);
        }
    }
    progress.finish_and_clear();
    print(table);
    print(
        "µs: CPU time per operation, median. × stock, × native: how many times as fast as these \
         the ring is, round by round, median. suspends/op: how often a guest gave its thread away, \
         on stock and on the ring.",
    );
    Ok(noisy)
}

fn flood(args: &BenchArgs, wasi: WasiArg, contest: &Contest) -> wasmtime::Result<bool> {
    let rounds = args.rounds.get();
    let sockets = args.sockets.map_or(flood::SOCKETS_DEFAULT, NonZeroUsize::get).max(2);
    let progress = progress_bar(flood::STEPS * rounds * BACKENDS.len());
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
    for result in flood::measure(contest, wasi, sockets, rounds, &progress)? {
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
    let progress = progress_bar(rounds * BACKENDS.len());
    let mut table = table(["idle", "WASI", "process", "kernel", "together", "spread"]);
    for result in idle::measure(wasi, sockets, rounds, || progress.inc(1))? {
        let (process, kernel) = (result.process, result.kernel);
        table.add_row([
            result.backend.name().to_owned(),
            wasi.version().to_owned(),
            format!("{:.0} B", process.median),
            format!("{:.0} B", kernel.median),
            format!("{:.0} B", process.median + kernel.median),
            format!("±{:.0}%, ±{:.0}%", process.spread * 100.0, kernel.spread * 100.0),
        ]);
    }
    progress.finish_and_clear();
    print(table);
    print(format_args!(
        "Memory per socket of one guest that holds {sockets}, each with its streams and asked once \
         for datagrams: the process's own, and the growth of the kernel's slab."
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

/// What each has taken in one round.
struct Round {
    stock: Sample,
    uring: Sample,
    native: Sample,
}

pub(crate) struct Rounds(Vec<Round>);

/// A work's figures per operation.
pub(crate) struct Figures {
    pub(crate) stock_micros: f64,
    pub(crate) uring_micros: f64,
    native_micros: f64,
    /// Stock's CPU time by ours, and so on.
    cpu_ratio: Summary,
    pub(crate) wall_ratio: Summary,
    native_ratio: Summary,
    pub(crate) enters: f64,
    stock_suspensions: f64,
    uring_suspensions: f64,
    pub(crate) stock_per_second: f64,
    pub(crate) uring_per_second: f64,
}

/// Runs some work on both backends and natively in turn, after one round each to warm up.
pub(crate) fn contend(
    contest: &Contest,
    runtime: &Runtime,
    work: &Work,
    rounds: usize,
    progress: &ProgressBar,
) -> wasmtime::Result<Rounds> {
    let mut samples = Vec::new();
    for round in 0..=rounds {
        let run = |backend| {
            progress.inc(1);
            contest.run(runtime, backend, work).with_context(|| {
                let Work { wasi, mode, guests, .. } = work;
                format!("{mode} with {guests} guests of {} on {}", wasi.version(), backend.name())
            })
        };
        let (stock, uring) = (run(Backend::Stock)?, run(Backend::Uring)?);
        let native = native::run(work)
            .with_context(|| format!("{} with {} guests, natively", work.mode, work.guests))?;
        if round > 0 {
            samples.push(Round { stock, uring, native });
        }
    }
    Ok(Rounds(samples))
}

impl Rounds {
    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
    pub(crate) fn result(&self, work: &Work) -> Figures {
        let ops = (work.guests * work.count) as f64;
        let micros = |time: Duration| time.as_secs_f64() * 1e6 / ops;
        let summary = |of: &dyn Fn(&Round) -> f64| Summary::of(self.0.iter().map(of));
        let median = |of: &dyn Fn(&Round) -> f64| summary(of).median;
        let ratio = |a: Duration, b: Duration| a.as_secs_f64() / b.as_secs_f64();
        Figures {
            stock_micros: median(&|round| micros(round.stock.cpu)),
            uring_micros: median(&|round| micros(round.uring.cpu)),
            native_micros: median(&|round| micros(round.native.cpu)),
            cpu_ratio: summary(&|round| ratio(round.stock.cpu, round.uring.cpu)),
            wall_ratio: summary(&|round| ratio(round.stock.wall, round.uring.wall)),
            native_ratio: summary(&|round| ratio(round.native.cpu, round.uring.cpu)),
            enters: median(&|round| round.uring.enters as f64 / ops),
            stock_suspensions: median(&|round| round.stock.suspensions as f64 / ops),
            uring_suspensions: median(&|round| round.uring.suspensions as f64 / ops),
            stock_per_second: median(&|round| ops / round.stock.wall.as_secs_f64()),
            uring_per_second: median(&|round| ops / round.uring.wall.as_secs_f64()),
        }
    }
}
