//! The contests of `wasi-uring bench`, measured by criterion: CPU time of the process, and beside it
//! the time that passed and the ratio to a yardstick, which runs in turn with whatever is measured.

use std::cell::RefCell;
use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{Criterion, SamplingMode};
use tokio::runtime::{Builder, Runtime};
use wasi_uring::Recycle;
use wasi_uring::cli::measure::{
    Backend, Bench, Contender, Contest, Peer, ProcessTime, Sample, Summary, WasiArg, Work,
};

/// Guests of either WASI version on either backend.
#[allow(dead_code, reason = "each bench has its own contenders")]
pub(crate) const GUESTS: &[Contender] = &[
    Contender::Guest(WasiArg::P2, Backend::Stock),
    Contender::Guest(WasiArg::P2, Backend::Uring),
    Contender::Guest(WasiArg::P3, Backend::Stock),
    Contender::Guest(WasiArg::P3, Backend::Uring),
];

/// Native programs, and the bare ring.
#[allow(dead_code, reason = "each bench has its own contenders")]
pub(crate) const NATIVES: &[Contender] = &[
    Contender::Native(Peer::Std),
    Contender::Native(Peer::Tokio),
    Contender::Native(Peer::TokioUring),
    Contender::Native(Peer::Floor),
];

const SAMPLES: usize = 10;
const WARM_UP: Duration = Duration::from_millis(200);
const MEASURING: Duration = Duration::from_secs(1);

/// User and system time of the process.
struct CpuTime;

impl Measurement for CpuTime {
    type Intermediate = ProcessTime;
    type Value = Duration;

    fn start(&self) -> ProcessTime {
        ProcessTime::now()
    }

    fn end(&self, start: ProcessTime) -> Duration {
        start.elapsed()
    }

    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        *a + *b
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        WallTime.to_f64(value)
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        // Both are durations.
        WallTime.formatter()
    }
}

/// Measures each contender at each bench with each number of guests.
pub(crate) fn run(name: &str, benches: &[&str], guests: &[usize], contenders: &[Contender]) {
    let mut criterion = Criterion::default().with_measurement(CpuTime).configure_from_args();
    let contest = Contest::new(Recycle::default()).expect("io_uring: see wasi-uring doctor");
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    // `cargo test --benches` has each bench run once; `cargo bench` says that it is not that.
    let is_test = !std::env::args().any(|arg| arg == "--bench");
    let guests = if is_test { &guests[..1] } else { guests };
    for bench in benches {
        let bench = Bench::named(bench).expect("one of BENCHES");
        for guests in guests {
            let group = format!("{name}/{}/guests_{guests}", bench.name);
            let mut group = criterion.benchmark_group(group);
            group.sample_size(SAMPLES).sampling_mode(SamplingMode::Flat);
            group.warm_up_time(WARM_UP).measurement_time(MEASURING);
            for contender in contenders.iter().copied() {
                let duel = Duel { contest: &contest, runtime: &runtime, contender };
                if !duel.takes_part(bench) {
                    continue;
                }
                let rounds = RefCell::new(Vec::new());
                group.bench_function(contender.to_string().replace(' ', "_"), |bencher| {
                    bencher.iter_custom(|operations| {
                        let operations = usize::try_from(operations).expect("64 bits");
                        let round = duel.round(&Work::of(bench, *guests, operations));
                        rounds.borrow_mut().push(round);
                        // As many guests do a few more.
                        round.cpu_per(operations)
                    });
                });
                let rounds = rounds.into_inner();
                let is_filtered_out = rounds.is_empty();
                if !is_test && !is_filtered_out {
                    report(&duel, &rounds);
                }
            }
            group.finish();
        }
    }
    criterion.final_summary();
}

/// A contender and its yardstick.
struct Duel<'a> {
    contest: &'a Contest,
    runtime: &'a Runtime,
    contender: Contender,
}

/// What both have taken for as many operations.
#[derive(Clone, Copy)]
struct Round {
    operations: usize,
    own: Sample,
    yardstick: Option<Sample>,
}

impl Round {
    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
    fn cpu_per(&self, operations: usize) -> Duration {
        self.own.cpu.mul_f64(operations as f64 / self.operations as f64)
    }
}

impl Duel<'_> {
    /// wasmtime-wasi's for the ring's guests, the ring's for all others.
    fn yardstick(&self) -> Contender {
        match self.contender {
            Contender::Guest(wasi, Backend::Uring) => Contender::Guest(wasi, Backend::Stock),
            Contender::Guest(wasi, Backend::Stock) => Contender::Guest(wasi, Backend::Uring),
            Contender::Native(_) => Contender::Guest(WasiArg::P2, Backend::Uring),
        }
    }

    fn takes_part(&self, bench: &'static Bench) -> bool {
        self.sample(self.contender, &Work::of(bench, 1, 1)).is_some()
    }

    fn sample(&self, contender: Contender, work: &Work) -> Option<Sample> {
        self.contest.run(self.runtime, contender, work).expect("every contender does its work")
    }

    fn round(&self, work: &Work) -> Round {
        let own = self.sample(self.contender, work).expect("it takes part");
        let yardstick = self.sample(self.yardstick(), work);
        Round { operations: work.operations(), own, yardstick }
    }
}

/// What criterion does not tell: the last rounds, which are those measured.
fn report(duel: &Duel<'_>, rounds: &[Round]) {
    let rounds = &rounds[rounds.len().saturating_sub(SAMPLES)..];
    let ratios = rounds
        .iter()
        .filter_map(|round| Some(round.yardstick?.cpu.as_secs_f64() / round.own.cpu.as_secs_f64()));
    let ratio = Summary::of(ratios);
    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
    let per_operation = |of: fn(&Sample) -> f64| {
        Summary::of(rounds.iter().map(|r| of(&r.own) / r.operations as f64))
    };
    let wall = per_operation(|own| own.wall.as_secs_f64() * 1e6);
    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
    let enters = per_operation(|own| own.enters as f64);
    println!(
        "{:>24}wall: {:.3} µs ±{:.0}%; {:.2} times as fast as {} (±{:.0}%); enters: {:.3}\n",
        "",
        wall.median,
        wall.spread * 100.0,
        ratio.median,
        duel.yardstick(),
        ratio.spread * 100.0,
        enters.median,
    );
}
