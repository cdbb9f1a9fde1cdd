//! The benches of `wasi-uring bench` as criterion's: CPU time of the process and the time that
//! passed, of implementations that take turns, and how many times as fast as others the ring's guests
//! are.

mod figures;

use std::cell::OnceCell;
use std::num::NonZeroUsize;

use tokio::runtime::Builder;
use wasi_uring::Recycle;
use wasi_uring_cli::measure::{
    Backend, Bench, Harness, Implementation, Native, Row, Sample, WasiArg, Work, compare, percent,
};

use figures::{ROUNDS, Unit, criterion, give, group, is_test};

/// Guests of either WASI version on either backend, and the floor under them.
#[allow(dead_code, reason = "each bench has its own implementations")]
pub(crate) const GUESTS: &[Implementation] = &[
    Implementation::Guest(WasiArg::P2, Backend::Stock),
    Implementation::Guest(WasiArg::P2, Backend::Uring),
    Implementation::Guest(WasiArg::P3, Backend::Stock),
    Implementation::Guest(WasiArg::P3, Backend::Uring),
    Implementation::Native(Native::Floor),
];

/// Native programs, the bare ring, and the guests that are to be compared with them.
#[allow(dead_code, reason = "each bench has its own implementations")]
pub(crate) const NATIVES: &[Implementation] = &[
    Implementation::Guest(WasiArg::P2, Backend::Uring),
    Implementation::Guest(WasiArg::P3, Backend::Uring),
    Implementation::Native(Native::Std),
    Implementation::Native(Native::Tokio),
    Implementation::Native(Native::TokioUring),
    Implementation::Native(Native::Floor),
];

/// Measures all implementations at each bench with each number of guests.
pub(crate) fn run(name: &str, benches: &[(&str, &[usize])], implementations: &[Implementation]) {
    let mut criterion = criterion(Unit::Nanoseconds);
    let harness = Harness::new(Recycle::default(), NonZeroUsize::MIN);
    let harness = harness.expect("io_uring: see wasi-uring doctor");
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    for (bench, guests) in benches {
        let bench = Bench::named(bench).expect("one of BENCHES");
        let guests = if is_test() { &guests[..1] } else { guests };
        let takes_part = |implementation: &Implementation| {
            let sample = harness.run(&runtime, *implementation, &Work::of(bench, 1, 1));
            sample.expect("every implementation does its work").is_some()
        };
        let implementations: Vec<_> = implementations.iter().copied().filter(takes_part).collect();
        for guests in guests {
            let row = OnceCell::new();
            let measured = || {
                row.get_or_init(|| {
                    let (work, rounds) = if is_test() {
                        (Work::of(bench, *guests, 1), 1)
                    } else {
                        (Work::round(bench, *guests), ROUNDS)
                    };
                    compare(&harness, &runtime, &implementations, work, rounds, || ())
                        .expect("every implementation does its work")
                })
            };
            let mut group = group(&mut criterion, format!("{name}/{}/guests_{guests}", bench.name));
            for implementation in &implementations {
                for (clock, of) in CLOCKS {
                    let name = format!("{}/{clock}", implementation.to_string().replace(' ', "_"));
                    give(&mut group, name, || {
                        measured().nanoseconds(*implementation, of).collect()
                    });
                }
            }
            group.finish();
            if let Some(row) = row.get().filter(|_| !is_test()) {
                report(row);
            }
        }
    }
    criterion.final_summary();
}

/// What times a sample has, by name.
type Clock = (&'static str, fn(&Sample) -> std::time::Duration);

const CLOCKS: [Clock; 2] = [("cpu", |sample| sample.cpu), ("wall", |sample| sample.wall)];

/// What criterion does not show: ratios of the same rounds, and counts.
fn report(row: &Row) {
    for implementation in row.implementations().filter(|one| row.baselines(*one).next().is_some()) {
        let ratios = row.baselines(implementation).map(|other| {
            let ratio = row.cpu_ratio(implementation, other);
            format!("{:.2} times as fast as {other} ({}), ", ratio.median, percent(ratio.spread))
        });
        let ratios: String = ratios.collect();
        println!("{implementation}: {ratios}{:.3} enters", row.enters(implementation));
    }
    println!();
}
