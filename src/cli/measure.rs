//! Measures: work, the implementations that do it, and what one run of it took.

mod client;
mod cpus;
pub(crate) mod density;
pub(crate) mod flood;
mod harness;
pub mod idle;
mod native;
pub(crate) mod neighbour;
mod row;
mod source;

use std::fmt;
use std::fs;
use std::time::{Duration, Instant};

use cpu_time::ProcessTime;

pub use self::harness::Harness;
pub use self::native::Native;
pub use self::row::{Row, compare};
pub use crate::args::WasiArg;
pub use crate::benches::{BENCHES, Bench};
pub use crate::host::Backend;

/// The guest that every measurement runs: its modes are in its header.
pub(crate) fn built_in_guest(wasi: WasiArg) -> &'static str {
    match wasi {
        WasiArg::P2 => include_str!("guests/cycle2.wat"),
        WasiArg::P3 => include_str!("guests/cycle3.wat"),
    }
}

/// Operations per guest, so that those that open sockets once are not measured doing so.
const COUNT_MIN: usize = 100;

/// Datagrams of a round that are enough for any number of guests. Of a thousand that receive,
/// opening their sockets is a fiftieth of it then.
const DATAGRAMS_MAX: usize = 400_000;

/// What each guest does, and how often.
#[derive(Clone, Debug)]
pub struct Work {
    pub(crate) bench: &'static Bench,
    pub(crate) guests: usize,
    count: usize,
}

impl Work {
    /// So many times in all, or a few more.
    #[must_use]
    pub fn of(bench: &'static Bench, guests: usize, operations: usize) -> Self {
        Self { bench, guests, count: operations.div_ceil(guests).max(1) }
    }

    /// As often as a round of the command has it.
    #[must_use]
    pub fn round(bench: &'static Bench, guests: usize) -> Self {
        let most = DATAGRAMS_MAX / bench.datagrams / guests;
        let least = COUNT_MIN.min(most).max(1);
        Self { bench, guests, count: (bench.count / guests).max(least) }
    }

    /// Operations of all guests.
    #[must_use]
    pub fn operations(&self) -> usize {
        self.guests * self.count
    }
}

/// What does the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Implementation {
    /// The built-in guest.
    Guest(WasiArg, Backend),
    /// A native program.
    Native(Native),
}

pub(crate) const STD: Implementation = Implementation::Native(Native::Std);
pub(crate) const TOKIO: Implementation = Implementation::Native(Native::Tokio);
pub(crate) const TOKIO_URING: Implementation = Implementation::Native(Native::TokioUring);
pub(crate) const FLOOR: Implementation = Implementation::Native(Native::Floor);

impl Implementation {
    /// All there are.
    pub const ALL: [Self; 8] = [
        Self::Guest(WasiArg::P2, Backend::Stock),
        Self::Guest(WasiArg::P2, Backend::Uring),
        Self::Guest(WasiArg::P3, Backend::Stock),
        Self::Guest(WasiArg::P3, Backend::Uring),
        STD,
        TOKIO,
        TOKIO_URING,
        FLOOR,
    ];

    /// Guests on the ring, each with the same guest on stock.
    pub(crate) const AGAINST_STOCK: [(Self, Self); 2] = [
        (Self::Guest(WasiArg::P2, Backend::Uring), Self::Guest(WasiArg::P2, Backend::Stock)),
        (Self::Guest(WasiArg::P3, Backend::Uring), Self::Guest(WasiArg::P3, Backend::Stock)),
    ];

    /// A guest's WASI version.
    pub(crate) fn wasi(self) -> Option<WasiArg> {
        match self {
            Self::Guest(wasi, _) => Some(wasi),
            Self::Native(_) => None,
        }
    }
}

impl fmt::Display for Implementation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Guest(wasi, backend) => write!(f, "{} {}", backend.name(), wasi.version()),
            Self::Native(native) => f.write_str(native.name()),
        }
    }
}

/// What one run of some [`Work`] took, for all guests together.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    /// Time that has passed.
    pub wall: Duration,
    /// User and system time of the process.
    pub cpu: Duration,
    /// CPU time of the thread that sends what is only received, which is not in `cpu`. It runs the
    /// kernel's delivery and the wake-ups, too.
    pub source: Duration,
    /// `io_uring_enter` calls, if they are counted.
    pub enters: Option<u64>,
    /// How often guests have given the thread away.
    pub suspensions: Option<u64>,
}

/// Wall clock and CPU time of the process, running.
pub(crate) struct Stopwatch {
    wall: Instant,
    cpu: ProcessTime,
}

impl Stopwatch {
    pub(crate) fn start() -> Self {
        Self { wall: Instant::now(), cpu: ProcessTime::now() }
    }

    pub(crate) fn sample(&self) -> Sample {
        Sample { wall: self.wall.elapsed(), cpu: self.cpu.elapsed(), ..Sample::default() }
    }
}

/// This thread, named after an implementation while that works, so that a profiler's samples tell whose they are
/// (`scripts/profile`).
pub(crate) struct Named {
    before: String,
}

/// See `proc_pid_comm(5)`.
const THREAD_NAME: &str = "/proc/thread-self/comm";

impl Named {
    /// Without a name if there is no /proc: nothing but a profile is worse for it.
    pub(crate) fn after(implementation: impl fmt::Display) -> Self {
        let before = fs::read_to_string(THREAD_NAME).unwrap_or_default();
        let _ = fs::write(THREAD_NAME, implementation.to_string());
        Self { before }
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        let _ = fs::write(THREAD_NAME, self.before.trim_end());
    }
}

/// Median and spread of what some quantity was over the rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// The middle one.
    pub median: f64,
    /// Half the distance between the quartiles, relative to the median.
    pub spread: f64,
}

impl Summary {
    /// Of some values. Not a number if there are none; and of one there is no spread.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        // Between two values in proportion.
        let quantile = |of_four: usize| match values.len() {
            0 => f64::NAN,
            len => {
                let (at, rest) = ((len - 1) * of_four / 4, (len - 1) * of_four % 4);
                let (value, next) = (values[at], values[(at + 1).min(len - 1)]);
                let rest = [0.0, 0.25, 0.5, 0.75][rest];
                value + (next - value) * rest
            }
        };
        let median = quantile(2);
        let distance = if values.len() > 1 { quantile(3) - quantile(1) } else { f64::NAN };
        Self { median, spread: distance / 2.0 / median.abs() }
    }
}

/// A spread in percent; of one value it is not known.
#[must_use]
pub fn percent(spread: f64) -> String {
    if spread.is_finite() { format!("±{:.0}%", spread * 100.0) } else { "±?".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_ignores_an_outlier_and_the_spread_shows_the_rest() {
        let summary = Summary::of([10.0, 9.0, 11.0, 1000.0, 10.0]);
        assert_eq!(summary, Summary { median: 10.0, spread: 0.05 });
    }

    #[test]
    fn an_even_number_of_values_has_its_median_between_two() {
        assert_eq!(Summary::of([1.0, 3.0]), Summary { median: 2.0, spread: 0.25 });
    }

    #[test]
    fn one_value_has_no_spread() {
        assert!(Summary::of([5.0]).spread.is_nan());
    }
}
