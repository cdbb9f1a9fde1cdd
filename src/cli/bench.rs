//! `wasi-uring bench`: the same guest on both backends, alternating, as ratios.

use std::process::ExitCode;
use std::time::Duration;

use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use indicatif::{ProgressBar, ProgressStyle};
use wasmtime::error::Context;

use super::host::Backend;
use super::measure::{Contest, Sample, Summary, Work};
use super::{BenchArgs, Failure, RuntimeArg, print, say};

/// A mode of the built-in guest and how many operations one guest alone does in a round.
pub(crate) const MODES: &[(&str, usize)] = &[
    ("create", 200_000),
    ("bind", 20_000),
    ("bind6", 20_000),
    ("pair", 5_000),
    ("echo", 15_000),
    ("dns", 6_000),
    ("batch", 1_000),
];

/// A spread above this says that the machine was too busy to believe the median.
const SPREAD_MAX: f64 = 0.15;

pub(crate) fn bench(args: &BenchArgs) -> Result<ExitCode, Failure> {
    let known = || MODES.iter().map(|(mode, _)| *mode).collect::<Vec<_>>().join(", ");
    if let Some(unknown) = args.modes.iter().find(|name| !MODES.iter().any(|(m, _)| m == name)) {
        let error = wasmtime::format_err!("no bench is named {unknown}; there are {}", known());
        return Err(Failure::usage(error));
    }
    let contest = Contest::new().map_err(Failure::run)?;
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

    let modes: Vec<_> = MODES
        .iter()
        .filter(|(mode, _)| args.modes.is_empty() || args.modes.iter().any(|name| name == mode))
        .collect();
    let steps = modes.len() * args.guests.len() * (args.rounds.get() + 1) * 2;
    let progress = progress_bar(steps);
    let mut table = Table::new();
    table.load_preset(UTF8_FULL_CONDENSED).set_header([
        "bench",
        "guests",
        "stock µs",
        "uring µs",
        "CPU ratio",
        "wall ratio",
        "enters/op",
        "spread",
    ]);
    let mut noisy = false;
    for (mode, count) in modes {
        for guests in &args.guests {
            let count = (count / guests.get()).max(1);
            let work = Work { mode, guests: guests.get(), count };
            let rounds = contend(&contest, &runtime, &work, args.rounds.get(), &progress)
                .map_err(Failure::run)?;
            let result = rounds.result(&work);
            noisy |= result.cpu_ratio.spread > SPREAD_MAX;
            table.add_row([
                (*mode).to_owned(),
                guests.to_string(),
                format!("{:.2}", result.stock_micros),
                format!("{:.2}", result.uring_micros),
                format!("{:.2}×", result.cpu_ratio.median),
                format!("{:.2}×", result.wall_ratio.median),
                format!("{:.3}", result.enters),
                format!("±{:.0}%", result.cpu_ratio.spread * 100.0),
            ]);
        }
    }
    progress.finish_and_clear();
    print(table);
    print("µs: CPU time per operation, median. Ratios: stock / uring, round by round, median.");
    if noisy {
        say("this machine was busy: where the spread is large, measure again with more --rounds");
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn progress_bar(steps: usize) -> ProgressBar {
    let progress = ProgressBar::new(steps as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} rounds, {eta} to go") {
        progress.set_style(style);
    }
    progress.enable_steady_tick(Duration::from_millis(200));
    progress
}

/// Samples of both backends, round by round.
pub(crate) struct Rounds(Vec<(Sample, Sample)>);

/// A work's figures per operation.
pub(crate) struct Figures {
    pub(crate) stock_micros: f64,
    pub(crate) uring_micros: f64,
    pub(crate) cpu_ratio: Summary,
    pub(crate) wall_ratio: Summary,
    pub(crate) enters: f64,
    pub(crate) stock_per_second: f64,
    pub(crate) uring_per_second: f64,
}

/// Runs some work on both backends in turn, after one round each to warm up.
pub(crate) fn contend(
    contest: &Contest,
    runtime: &tokio::runtime::Runtime,
    work: &Work,
    rounds: usize,
    progress: &ProgressBar,
) -> wasmtime::Result<Rounds> {
    let mut samples = Vec::new();
    for round in 0..=rounds {
        let run = |backend| {
            progress.inc(1);
            contest.run(runtime, backend, work).with_context(|| {
                format!("{} with {} guests on {}", work.mode, work.guests, backend.name())
            })
        };
        let pair = (run(Backend::Stock)?, run(Backend::Uring)?);
        if round > 0 {
            samples.push(pair);
        }
    }
    Ok(Rounds(samples))
}

impl Rounds {
    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
    pub(crate) fn result(&self, work: &Work) -> Figures {
        let ops = (work.guests * work.count) as f64;
        let micros = |time: Duration| time.as_secs_f64() * 1e6 / ops;
        let median = |of: &dyn Fn(&(Sample, Sample)) -> f64| Summary::of(self.0.iter().map(of));
        Figures {
            stock_micros: median(&|(stock, _)| micros(stock.cpu)).median,
            uring_micros: median(&|(_, uring)| micros(uring.cpu)).median,
            cpu_ratio: median(&|(stock, uring)| stock.cpu.as_secs_f64() / uring.cpu.as_secs_f64()),
            wall_ratio: median(&|(stock, uring)| {
                stock.wall.as_secs_f64() / uring.wall.as_secs_f64()
            }),
            enters: median(&|(_, uring)| uring.enters as f64 / ops).median,
            stock_per_second: median(&|(stock, _)| ops / stock.wall.as_secs_f64()).median,
            uring_per_second: median(&|(_, uring)| ops / uring.wall.as_secs_f64()).median,
        }
    }
}
