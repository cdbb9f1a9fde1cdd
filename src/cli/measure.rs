//! What is measured, who is measured at it, and one run of it.

use std::fmt;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use cpu_time::ProcessTime;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use wasmtime::format_err;
use wasmtime_wasi::WasiCtx;

use super::bench::peer::RingArgs;
use super::host::{Compiled, GuestConfig, Net, Program};
use super::{Failure, NetArg};
use crate::{Recycle, Uring};

pub use super::WasiArg;
pub use super::bench::idle::{Idleness, Taken, per_idle_socket};
pub use super::bench::peer::Peer;
pub use super::host::Backend;

/// The guest that every measurement runs: its modes are in its header.
#[must_use]
pub fn life(wasi: WasiArg) -> &'static str {
    match wasi {
        WasiArg::P2 => include_str!("guests/life2.wat"),
        WasiArg::P3 => include_str!("guests/life3.wat"),
    }
}

/// An operation that is measured.
#[derive(Debug)]
pub struct Bench {
    /// What it is asked for by.
    pub name: &'static str,
    /// The mode of the built-in guest.
    pub(crate) mode: &'static str,
    /// Of a datagram.
    pub(crate) bytes: usize,
    pub(crate) datagrams: usize,
    /// How often one guest alone does it in a round.
    count: usize,
}

impl Bench {
    const fn new(name: &'static str, mode: &'static str, count: usize) -> Self {
        Self { name, mode, bytes: 64, datagrams: 1, count }
    }

    const fn batch(name: &'static str, datagrams: usize, bytes: usize, count: usize) -> Self {
        Self { name, mode: "batch", bytes, datagrams, count }
    }

    /// The bench of a name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        BENCHES.iter().find(|bench| bench.name == name)
    }
}

/// Every contest in speed.
pub const BENCHES: &[Bench] = &[
    Bench::new("create", "create", 200_000),
    Bench::new("bind", "bind", 20_000),
    Bench::new("bind6", "bind6", 20_000),
    Bench::new("pair", "pair", 5_000),
    Bench::new("dns", "dns", 6_000),
    Bench::new("echo", "echo", 15_000),
    Bench { bytes: 1200, ..Bench::new("echo_1200", "echo", 15_000) },
    Bench::batch("batch_1", 1, 1200, 10_000),
    Bench::batch("batch_4", 4, 1200, 4_000),
    Bench::batch("batch_16", 16, 1200, 1_000),
    Bench::batch("batch_16_small", 16, 64, 1_000),
];

/// Operations per guest at least, so that those that open sockets once are not measured doing so.
const COUNT_MIN: usize = 100;

/// What each guest is to do, and how often.
#[derive(Clone, Debug)]
pub struct Work {
    pub(crate) bench: &'static Bench,
    pub(crate) guests: usize,
    pub(crate) count: usize,
}

impl Work {
    /// So many times in all, or a few more.
    #[must_use]
    pub fn of(bench: &'static Bench, guests: usize, operations: usize) -> Self {
        Self { bench, guests, count: operations.div_ceil(guests).max(1) }
    }

    /// As often as a round of the command has it.
    pub(crate) fn round(bench: &'static Bench, guests: usize) -> Self {
        Self { bench, guests, count: (bench.count / guests).max(COUNT_MIN) }
    }

    /// Operations of all guests.
    #[must_use]
    pub fn operations(&self) -> usize {
        self.guests * self.count
    }
}

/// Who does the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contender {
    /// The built-in guest.
    Guest(WasiArg, Backend),
    /// A native program.
    Native(Peer),
}

impl Contender {
    /// All there are.
    pub const ALL: [Self; 8] = [
        Self::Guest(WasiArg::P2, Backend::Stock),
        Self::Guest(WasiArg::P2, Backend::Uring),
        Self::Guest(WasiArg::P3, Backend::Stock),
        Self::Guest(WasiArg::P3, Backend::Uring),
        Self::Native(Peer::Std),
        Self::Native(Peer::Tokio),
        Self::Native(Peer::TokioUring),
        Self::Native(Peer::Floor),
    ];

    /// A guest's WASI version.
    pub(crate) fn wasi(self) -> Option<WasiArg> {
        match self {
            Self::Guest(wasi, _) => Some(wasi),
            Self::Native(_) => None,
        }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Guest(wasi, backend) => write!(f, "{} {}", backend.name(), wasi.version()),
            Self::Native(peer) => f.write_str(peer.name()),
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
    /// `io_uring_enter` calls, as far as they are known.
    pub enters: u64,
    /// How often guests have given the thread away.
    pub suspensions: u64,
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

/// Slots of the ring measured: room for ten thousand guests with a socket each, files permitting,
/// and some files are left for recycled sockets.
const SOCKETS_MAX: u32 = 11_264;

/// Everybody, ready to run.
pub struct Contest {
    p2: Guests,
    p3: Guests,
    pub(crate) ring: Uring,
    args: RingArgs,
}

/// The guest of one WASI version, on each backend.
struct Guests {
    stock: Arc<Program>,
    uring: Arc<Program>,
}

impl Guests {
    fn new(wasi: WasiArg) -> wasmtime::Result<Self> {
        let compiled = Compiled::new(life(wasi).as_bytes())?;
        let link = |backend| Ok::<_, Failure>(Arc::new(Program::link(&compiled, backend)?));
        Ok(Self { stock: link(Backend::Stock)?, uring: link(Backend::Uring)? })
    }
}

impl Contest {
    /// Compiles the guests and builds their ring.
    ///
    /// # Errors
    ///
    /// If there is no io_uring here.
    pub fn new(recycle: Recycle) -> wasmtime::Result<Self> {
        let files = u32::try_from(super::doctor::raise_nofile()).unwrap_or(u32::MAX);
        let sockets = SOCKETS_MAX.min(files);
        Ok(Self {
            p2: Guests::new(WasiArg::P2)?,
            p3: Guests::new(WasiArg::P3)?,
            ring: Uring::builder().sockets(sockets).recycle(recycle).build()?,
            args: RingArgs { sockets, recycle },
        })
    }

    /// Slots of the ring.
    pub(crate) fn sockets(&self) -> u32 {
        self.args.sockets
    }

    pub(crate) fn program(&self, wasi: WasiArg, backend: Backend) -> &Arc<Program> {
        let guests = match wasi {
            WasiArg::P2 => &self.p2,
            WasiArg::P3 => &self.p3,
        };
        match backend {
            Backend::Stock => &guests.stock,
            Backend::Uring => &guests.uring,
        }
    }

    /// Has a contender do some work; `None` if it has no such operation.
    ///
    /// # Errors
    ///
    /// Those of its sockets.
    pub fn run(
        &self,
        runtime: &Runtime,
        contender: Contender,
        work: &Work,
    ) -> wasmtime::Result<Option<Sample>> {
        match contender {
            Contender::Guest(wasi, backend) => {
                Ok(Some(runtime.block_on(self.run_guests(self.program(wasi, backend), work))?))
            }
            Contender::Native(peer) => Ok(peer.run(work, self.args)?),
        }
    }

    /// Instantiates the guests, then measures how long they run.
    async fn run_guests(&self, program: &Arc<Program>, work: &Work) -> wasmtime::Result<Sample> {
        let net = Net::new(NetArg::Loopback);
        let Work { bench: Bench { mode, bytes, datagrams, .. }, .. } = work;
        let mut guests = Vec::new();
        for _ in 0..work.guests {
            let mut wasi = WasiCtx::builder();
            net.configure(&mut wasi);
            wasi.args(&["life", mode]);
            wasi.args(&[work.count, *bytes, *datagrams].map(|number| number.to_string()));
            let uring = Some(&self.ring);
            let config = GuestConfig { wasi, net: &net, uring, sockets_max: self.args.sockets };
            guests.push(program.instantiate(config).await?);
        }
        let enters = self.ring.stats().enters;
        let stopwatch = Stopwatch::start();
        let mut tasks = JoinSet::new();
        for mut guest in guests {
            // The store comes back, so that taking it down is not measured.
            tasks.spawn(async move {
                let (result, suspensions) = counting_suspensions(guest.run()).await;
                (result, suspensions, guest)
            });
        }
        let mut ended = Vec::new();
        while let Some(guest) = tasks.join_next().await {
            ended.push(guest);
        }
        let mut sample = stopwatch.sample();
        sample.enters = self.ring.stats().enters - enters;
        for guest in ended {
            let (result, suspensions, _store) = guest.map_err(|error| format_err!("{error}"))?;
            result?;
            sample.suspensions += suspensions;
        }
        Ok(sample)
    }
}

/// A future's output, and how often it was not ready before.
pub async fn counting_suspensions<T>(future: impl Future<Output = T>) -> (T, u64) {
    let mut future = pin!(future);
    let mut suspensions = 0;
    let output = poll_fn(|cx| {
        let poll = future.as_mut().poll(cx);
        suspensions += u64::from(poll.is_pending());
        poll
    })
    .await;
    (output, suspensions)
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
    /// Of some values; not a number if there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let quantile = |of_four: usize| match values.len() {
            0 => f64::NAN,
            len => values[(len - 1) * of_four / 4],
        };
        let median = quantile(2);
        Self { median, spread: (quantile(3) - quantile(1)) / 2.0 / median }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_ignores_an_outlier_and_the_spread_shows_the_rest() {
        let summary = Summary::of([10.0, 9.0, 11.0, 1000.0, 10.0]);
        assert_eq!(summary, Summary { median: 10.0, spread: 0.05 });
    }
}
