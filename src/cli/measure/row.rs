//! What contenders take for the same work, in turn.

use std::time::Duration;

use tokio::runtime::Runtime;
use wasmtime::error::Context;

use super::{Backend, Contender, Contest, FLOOR, STD, Sample, Summary, Work};

/// What each contender has taken, round by round.
#[derive(Debug)]
pub struct Row {
    work: Work,
    samples: Vec<(Contender, Vec<Sample>)>,
}

/// Has some work done by each in turn, after one round to warm up. Each round begins with another,
/// and every other one goes backwards, so that nobody always follows the same. `step` is called after
/// each.
///
/// # Errors
///
/// As [`Contest::run`].
pub fn contend(
    contest: &Contest,
    runtime: &Runtime,
    contenders: &[Contender],
    work: Work,
    rounds: usize,
    step: impl Fn(),
) -> wasmtime::Result<Row> {
    let mut samples: Vec<_> = contenders.iter().map(|one| (*one, Vec::new())).collect();
    for round in 0..=rounds {
        for at in 0..contenders.len() {
            let at = if round % 2 == 0 { at } else { contenders.len() - 1 - at };
            let (contender, samples) = &mut samples[(at + round) % contenders.len()];
            let sample = contest.run(runtime, *contender, &work).with_context(|| {
                format!("{} with {} guests, {contender}", work.bench.name, work.guests)
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

    /// Those who took part.
    pub fn contenders(&self) -> impl Iterator<Item = Contender> {
        self.samples.iter().map(|(contender, _)| *contender)
    }

    /// The same guest on stock, of a guest on the ring, if it took part.
    pub(crate) fn stock_of(&self, one: Contender) -> Option<Contender> {
        let Contender::Guest(wasi, Backend::Uring) = one else {
            return None;
        };
        Some(Contender::Guest(wasi, Backend::Stock)).filter(|stock| self.took_part(*stock))
    }

    /// Guests on the ring, each with the same on stock.
    pub(crate) fn duels(&self) -> impl Iterator<Item = (Contender, Contender)> {
        self.contenders().filter_map(|one| Some((one, self.stock_of(one)?)))
    }

    /// Those who took part whom one is compared with: stock, std and the floor, if it is a guest on
    /// the ring; else nobody.
    pub fn yardsticks(&self, one: Contender) -> impl Iterator<Item = Contender> {
        let natives = match one {
            Contender::Guest(_, Backend::Uring) => &[STD, FLOOR][..],
            Contender::Guest(_, Backend::Stock) | Contender::Native(_) => &[],
        };
        let natives = natives.iter().copied().filter(|native| self.took_part(*native));
        self.stock_of(one).into_iter().chain(natives)
    }

    fn took_part(&self, one: Contender) -> bool {
        self.contenders().any(|contender| contender == one)
    }

    fn samples(&self, contender: Contender) -> &[Sample] {
        let found = self.samples.iter().find(|(one, _)| *one == contender);
        found.map_or(&[], |(_, samples)| samples)
    }

    /// Some time of a contender per operation, round by round, in nanoseconds.
    pub fn nanoseconds(
        &self,
        contender: Contender,
        of: impl Fn(&Sample) -> Duration,
    ) -> impl Iterator<Item = f64> {
        self.each(contender, move |sample| of(sample).as_secs_f64() * 1e9)
    }

    /// Some quantity of a contender per operation, round by round.
    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
    fn each(&self, contender: Contender, of: impl Fn(&Sample) -> f64) -> impl Iterator<Item = f64> {
        let operations = self.work.operations() as f64;
        self.samples(contender).iter().map(move |sample| of(sample) / operations)
    }

    /// Likewise, in short; not a number if it did not take part.
    fn per_operation(&self, contender: Contender, of: impl Fn(&Sample) -> f64) -> Summary {
        Summary::of(self.each(contender, of))
    }

    /// CPU time per operation in microseconds.
    #[must_use]
    pub fn micros(&self, contender: Contender) -> Summary {
        self.per_operation(contender, |sample| sample.cpu.as_secs_f64() * 1e6)
    }

    /// Operations per second that has passed.
    pub(crate) fn per_second(&self, contender: Contender) -> f64 {
        1.0 / self.per_operation(contender, |sample| sample.wall.as_secs_f64()).median
    }

    /// CPU time, in microseconds per operation, of the thread that sends what is only received.
    pub(crate) fn source_micros(&self, contender: Contender) -> f64 {
        self.per_operation(contender, |sample| sample.source.as_secs_f64() * 1e6).median
    }

    /// `io_uring_enter` calls per operation; not a number if they are not counted.
    #[must_use]
    pub fn enters(&self, contender: Contender) -> f64 {
        self.count(contender, |sample| sample.enters)
    }

    /// How often a guest gave its thread away, per operation; not a number if it is none.
    pub(crate) fn suspensions(&self, contender: Contender) -> f64 {
        self.count(contender, |sample| sample.suspensions)
    }

    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
    fn count(&self, contender: Contender, of: fn(&Sample) -> Option<u64>) -> f64 {
        let count = |sample: &Sample| of(sample).map_or(f64::NAN, |count| count as f64);
        self.per_operation(contender, count).median
    }

    /// How many times as fast one is as the other, round by round.
    fn ratio(&self, one: Contender, other: Contender, of: fn(&Sample) -> Duration) -> Summary {
        let ones = self.samples(one).iter().map(|sample| of(sample).as_secs_f64());
        let others = self.samples(other).iter().map(|sample| of(sample).as_secs_f64());
        Summary::of(ones.zip(others).map(|(one, other)| other / one))
    }

    /// By CPU time.
    #[must_use]
    pub fn cpu_ratio(&self, one: Contender, other: Contender) -> Summary {
        self.ratio(one, other, |sample| sample.cpu)
    }

    /// By the time that has passed.
    pub(crate) fn wall_ratio(&self, one: Contender, other: Contender) -> Summary {
        self.ratio(one, other, |sample| sample.wall)
    }
}
