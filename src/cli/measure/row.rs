//! What implementations take for the same work, in turn.

use std::time::Duration;

use tokio::runtime::Runtime;
use wasmtime::error::Context;

use super::{FLOOR, Harness, Implementation, STD, Sample, Summary, Work};

/// What each implementation has taken, round by round.
#[derive(Debug)]
pub struct Row {
    work: Work,
    samples: Vec<(Implementation, Vec<Sample>)>,
}

/// Has some work done by each in turn, after one round to warm up. Each round begins with another,
/// and every other one goes backwards, so that none always follows the same. `step` is called after
/// each.
///
/// # Errors
///
/// As [`Harness::run`].
pub fn compare(
    harness: &Harness,
    runtime: &Runtime,
    implementations: &[Implementation],
    work: Work,
    rounds: usize,
    step: impl Fn(),
) -> wasmtime::Result<Row> {
    let mut samples: Vec<_> = implementations.iter().map(|one| (*one, Vec::new())).collect();
    for round in 0..=rounds {
        for at in 0..implementations.len() {
            let at = if round % 2 == 0 { at } else { implementations.len() - 1 - at };
            let (implementation, samples) = &mut samples[(at + round) % implementations.len()];
            let sample = harness.run(runtime, *implementation, &work).with_context(|| {
                format!("{} with {} guests, {implementation}", work.bench.name, work.guests)
            })?;
            if round > 0 {
                samples.extend(sample);
            }
            step();
        }
    }
    samples.retain(|(_, samples)| !samples.is_empty());
    Ok(Row { work, samples })
}

impl Row {
    pub(crate) fn work(&self) -> &Work {
        &self.work
    }

    /// Those that took part.
    pub fn implementations(&self) -> impl Iterator<Item = Implementation> {
        self.samples.iter().map(|(implementation, _)| *implementation)
    }

    /// What an implementation is compared with: a guest on the ring with the same on stock, with std
    /// and with the floor, as far as they took part.
    pub fn baselines(&self, one: Implementation) -> impl Iterator<Item = Implementation> {
        let pair = Implementation::AGAINST_STOCK.into_iter().find(|(ring, _)| *ring == one);
        let baselines = pair.map(|(_, stock)| [stock, STD, FLOOR]).into_iter().flatten();
        baselines.filter(|baseline| self.took_part(*baseline))
    }

    fn took_part(&self, one: Implementation) -> bool {
        self.implementations().any(|implementation| implementation == one)
    }

    fn samples(&self, implementation: Implementation) -> &[Sample] {
        let found = self.samples.iter().find(|(one, _)| *one == implementation);
        found.map_or(&[], |(_, samples)| samples)
    }

    /// Some time of a implementation per operation, round by round, in nanoseconds.
    pub fn nanoseconds(
        &self,
        implementation: Implementation,
        of: impl Fn(&Sample) -> Duration,
    ) -> impl Iterator<Item = f64> {
        self.each(implementation, move |sample| of(sample).as_secs_f64() * 1e9)
    }

    /// Some quantity of a implementation per operation, round by round.
    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
    fn each(
        &self,
        implementation: Implementation,
        of: impl Fn(&Sample) -> f64,
    ) -> impl Iterator<Item = f64> {
        let operations = self.work.operations() as f64;
        self.samples(implementation).iter().map(move |sample| of(sample) / operations)
    }

    /// Likewise, in short; not a number if it did not take part.
    fn per_operation(
        &self,
        implementation: Implementation,
        of: impl Fn(&Sample) -> f64,
    ) -> Summary {
        Summary::of(self.each(implementation, of))
    }

    /// CPU time per operation in microseconds.
    #[must_use]
    pub fn micros(&self, implementation: Implementation) -> Summary {
        self.per_operation(implementation, |sample| sample.cpu.as_secs_f64() * 1e6)
    }

    /// Operations per second that has passed.
    pub(crate) fn per_second(&self, implementation: Implementation) -> f64 {
        1.0 / self.per_operation(implementation, |sample| sample.wall.as_secs_f64()).median
    }

    /// CPU time, in microseconds per operation, of the thread that sends what is only received.
    pub(crate) fn source_micros(&self, implementation: Implementation) -> f64 {
        self.per_operation(implementation, |sample| sample.source.as_secs_f64() * 1e6).median
    }

    /// `io_uring_enter` calls per operation; not a number if they are not counted.
    #[must_use]
    pub fn enters(&self, implementation: Implementation) -> f64 {
        self.count(implementation, |sample| sample.enters)
    }

    /// How often a guest gave its thread away, per operation; not a number if it is none.
    pub(crate) fn suspensions(&self, implementation: Implementation) -> f64 {
        self.count(implementation, |sample| sample.suspensions)
    }

    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
    fn count(&self, implementation: Implementation, of: fn(&Sample) -> Option<u64>) -> f64 {
        let count = |sample: &Sample| of(sample).map_or(f64::NAN, |count| count as f64);
        self.per_operation(implementation, count).median
    }

    /// How many times as fast one is as the other, round by round.
    fn ratio(
        &self,
        one: Implementation,
        other: Implementation,
        of: fn(&Sample) -> Duration,
    ) -> Summary {
        let ones = self.samples(one).iter().map(|sample| of(sample).as_secs_f64());
        let others = self.samples(other).iter().map(|sample| of(sample).as_secs_f64());
        Summary::of(ones.zip(others).map(|(one, other)| other / one))
    }

    /// By CPU time.
    #[must_use]
    pub fn cpu_ratio(&self, one: Implementation, other: Implementation) -> Summary {
        self.ratio(one, other, |sample| sample.cpu)
    }

    /// By the time that has passed.
    pub(crate) fn wall_ratio(&self, one: Implementation, other: Implementation) -> Summary {
        self.ratio(one, other, |sample| sample.wall)
    }
}
