//! Figures that were measured in rounds, for criterion to judge.
//!
//! Implementations take turns, which criterion knows nothing of: it measures one after the other. So
//! they are measured first, and criterion gets what each took in which round.

use std::time::Duration;

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{BenchmarkGroup, Criterion, SamplingMode};

/// Rounds, and samples for criterion.
pub(crate) const ROUNDS: usize = 10;

/// `cargo test --benches` and `cargo bench -- --test` have each bench run once.
pub(crate) fn is_test() -> bool {
    let has = |option| std::env::args().any(|arg| arg == option);
    has("--test") || !has("--bench")
}

/// What figures are of.
#[derive(Clone, Copy)]
pub(crate) enum Unit {
    #[allow(dead_code, reason = "each bench has one unit")]
    Nanoseconds,
    #[allow(dead_code, reason = "each bench has one unit")]
    Bytes,
}

/// By the command line.
pub(crate) fn criterion(unit: Unit) -> Criterion<Unit> {
    Criterion::default().with_measurement(unit).configure_from_args()
}

/// How long criterion is to take for figures that were measured before.
const TELLING: Duration = Duration::from_millis(1);

/// A group whose samples are one figure each.
pub(crate) fn group(criterion: &mut Criterion<Unit>, name: String) -> BenchmarkGroup<'_, Unit> {
    let mut group = criterion.benchmark_group(name);
    group.sample_size(ROUNDS).sampling_mode(SamplingMode::Flat);
    group.warm_up_time(Duration::from_nanos(1)).measurement_time(TELLING);
    group
}

/// Gives criterion figures, round by round; they are measured only if its filter selects them.
pub(crate) fn give(
    group: &mut BenchmarkGroup<'_, Unit>,
    name: String,
    figures: impl Fn() -> Vec<f64>,
) {
    let (mut rounds, mut round) = (Vec::new(), 0);
    group.bench_function(name, |bencher| {
        if rounds.is_empty() {
            rounds = figures();
        }
        bencher.iter_custom(|times| {
            // The warm-up has the first, so that comes once more.
            let figure = rounds[round % rounds.len()];
            round += 1;
            #[expect(clippy::cast_precision_loss, reason = "few")]
            let times = times as f64;
            figure * times
        });
    });
}

impl Measurement for Unit {
    type Intermediate = ();
    type Value = f64;

    fn start(&self) {}

    fn end(&self, (): ()) -> f64 {
        f64::NAN
    }

    fn add(&self, a: &f64, b: &f64) -> f64 {
        a + b
    }

    fn zero(&self) -> f64 {
        0.0
    }

    fn to_f64(&self, value: &f64) -> f64 {
        *value
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        match self {
            Self::Nanoseconds => WallTime.formatter(),
            Self::Bytes => &BytesFormatter,
        }
    }
}

struct BytesFormatter;

impl ValueFormatter for BytesFormatter {
    fn scale_values(&self, _typical: f64, _values: &mut [f64]) -> &'static str {
        "B"
    }

    fn scale_throughputs(
        &self,
        _typical: f64,
        _throughput: &criterion::Throughput,
        _values: &mut [f64],
    ) -> &'static str {
        "B"
    }

    fn scale_for_machines(&self, _values: &mut [f64]) -> &'static str {
        "B"
    }
}
