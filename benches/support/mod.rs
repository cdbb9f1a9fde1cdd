//! The contests of `wasi-uring bench` as criterion's: CPU time of the process and the time that
//! passed, of contenders that take turns, and how many times as fast as others the ring's guests
//! are.

mod figures;

use std::cell::OnceCell;
use std::num::NonZeroUsize;

use tokio::runtime::Builder;
use wasi_uring::Recycle;
use wasi_uring_cli::measure::{
    Backend, Bench, Contender, Contest, Peer, Row, Sample, WasiArg, Work, contend, percent,
};

use figures::{ROUNDS, Unit, criterion, group, is_test, tell};

/// Guests of either WASI version on either backend, and the floor under them.
#[allow(dead_code, reason = "each bench has its own contenders")]
pub(crate) const GUESTS: &[Contender] = &[
    Contender::Guest(WasiArg::P2, Backend::Stock),
    Contender::Guest(WasiArg::P2, Backend::Uring),
    Contender::Guest(WasiArg::P3, Backend::Stock),
    Contender::Guest(WasiArg::P3, Backend::Uring),
    Contender::Native(Peer::Floor),
];

/// Native programs, the bare ring, and the guests that are to be compared with them.
#[allow(dead_code, reason = "each bench has its own contenders")]
pub(crate) const NATIVES: &[Contender] = &[
    Contender::Guest(WasiArg::P2, Backend::Uring),
    Contender::Guest(WasiArg::P3, Backend::Uring),
    Contender::Native(Peer::Std),
    Contender::Native(Peer::Tokio),
    Contender::Native(Peer::TokioUring),
    Contender::Native(Peer::Floor),
];

/// Measures all contenders at each bench with each number of guests.
pub(crate) fn run(name: &str, benches: &[(&str, &[usize])], contenders: &[Contender]) {
    let mut criterion = criterion(Unit::Nanoseconds);
    let contest = Contest::new(Recycle::default(), NonZeroUsize::MIN);
    let contest = contest.expect("io_uring: see wasi-uring doctor");
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    for (bench, guests) in benches {
        let bench = Bench::named(bench).expect("one of BENCHES");
        let guests = if is_test() { &guests[..1] } else { guests };
        let takes_part = |contender: &Contender| {
            let sample = contest.run(&runtime, *contender, &Work::of(bench, 1, 1));
            sample.expect("every contender does its work").is_some()
        };
        let contenders: Vec<_> = contenders.iter().copied().filter(takes_part).collect();
        for guests in guests {
            let row = OnceCell::new();
            let measured = || {
                row.get_or_init(|| {
                    let (work, rounds) = if is_test() {
                        (Work::of(bench, *guests, 1), 1)
                    } else {
                        (Work::round(bench, *guests), ROUNDS)
                    };
                    contend(&contest, &runtime, &contenders, work, rounds, || ())
                        .expect("every contender does its work")
                })
            };
            let mut group = group(&mut criterion, format!("{name}/{}/guests_{guests}", bench.name));
            for contender in &contenders {
                for (clock, of) in CLOCKS {
                    let name = format!("{}/{clock}", contender.to_string().replace(' ', "_"));
                    tell(&mut group, name, || measured().nanoseconds(*contender, of).collect());
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

/// What criterion does not tell: ratios of the same rounds, and counts.
fn report(row: &Row) {
    for contender in row.contenders().filter(|one| row.yardsticks(*one).next().is_some()) {
        let ratios = row.yardsticks(contender).map(|other| {
            let ratio = row.cpu_ratio(contender, other);
            format!("{:.2} times as fast as {other} ({}), ", ratio.median, percent(ratio.spread))
        });
        let ratios: String = ratios.collect();
        println!("{contender}: {ratios}{:.3} enters", row.enters(contender));
    }
    println!();
}
