//! `wasi-uring demo`: what this is about, in under a minute.

use std::num::NonZeroUsize;
use std::process::ExitCode;

use wasi_uring::Recycle;
use wasmtime::error::Context;

use crate::args::{DemoArgs, WasiArg};
use crate::measure::{Backend, Bench, Harness, Implementation, Work, compare, percent};
use crate::open_files;
use crate::terminal::{Failure, print, progress_bar, table};

/// Pairs of sockets that each guest opens per round.
const PAIRS: usize = 10;

pub(crate) fn demo(args: &DemoArgs) -> Result<ExitCode, Failure> {
    let guests = open_files::within_limit(args.guests.get() * 2) / 2;
    let harness = Harness::new(Recycle::default(), NonZeroUsize::MIN).map_err(Failure::run)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a runtime")
        .map_err(Failure::run)?;
    print(format_args!(
        "{guests} guests on one thread, each opening, binding, using and closing {} UDP sockets \
         on loopback;\n{} rounds for each version of WASI on each backend, alternating.\n",
        PAIRS * 2,
        args.rounds,
    ));
    let progress = progress_bar((args.rounds.get() + 1) * 2 * WasiArg::ALL.len());
    let mut table =
        table(["WASI", "backend", "sockets per second", "CPU µs per socket", "enters per socket"]);
    let mut verdicts = Vec::new();
    let bench = Bench::named("pair").expect("one of BENCHES");
    for wasi in WasiArg::ALL {
        let implementations = Backend::ALL.map(|backend| Implementation::Guest(wasi, backend));
        let (work, rounds) = (Work::of(bench, guests, guests * PAIRS), args.rounds.get());
        let row = compare(&harness, &runtime, &implementations, work, rounds, || progress.inc(1))
            .map_err(Failure::run)?;
        let [stock, uring] = implementations;
        for (implementation, name) in
            [(stock, "stock (wasmtime-wasi)"), (uring, "uring (wasi-uring)")]
        {
            // A pair is two sockets.
            table.add_row([
                wasi.version().to_owned(),
                name.to_owned(),
                format!("{:.0}", row.per_second(implementation) * 2.0),
                format!("{:.2}", row.micros(implementation).median / 2.0),
                if implementation == uring {
                    format!("{:.3}", row.enters(implementation) / 2.0)
                } else {
                    "–".to_owned()
                },
            ]);
        }
        let ratio = row.wall_ratio(uring, stock);
        verdicts.push(format!(
            "{:.1} times as fast for WASI {} ({})",
            ratio.median,
            wasi.version(),
            percent(ratio.spread),
        ));
    }
    drop(progress);
    print(table);
    print(format_args!(
        "The ring is {} (medians of {} rounds).",
        verdicts.join(" and "),
        args.rounds,
    ));
    Ok(ExitCode::SUCCESS)
}
