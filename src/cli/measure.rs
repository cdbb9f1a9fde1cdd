//! One run of the built-in guest on a backend, or of a plain program that does the same.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::{Recycle, Uring};
use cpu_time::ProcessTime;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use wasmtime::format_err;
use wasmtime_wasi::WasiCtx;

use super::host::{Backend, Compiled, GuestConfig, Net, Program};
use super::{Failure, NetArg, WasiArg};

/// The guest that every measurement runs: its modes are in its header.
pub(crate) fn life(wasi: WasiArg) -> &'static str {
    match wasi {
        WasiArg::P2 => include_str!("guests/life2.wat"),
        WasiArg::P3 => include_str!("guests/life3.wat"),
    }
}

/// Slots of the ring measured: room for ten thousand guests with a socket each, files permitting,
/// and some files are left for recycled sockets.
const SOCKETS_MAX: u32 = 11_264;

/// What each guest is told to do, and how often.
#[derive(Clone, Debug)]
pub(crate) struct Work {
    pub(crate) wasi: WasiArg,
    /// A mode of the built-in guest.
    pub(crate) mode: &'static str,
    pub(crate) guests: usize,
    pub(crate) count: usize,
}

/// What one run of some [`Work`] took, for all guests together.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sample {
    pub(crate) wall: Duration,
    /// User and system time of the process.
    pub(crate) cpu: Duration,
    /// `io_uring_enter` calls; 0 for stock.
    pub(crate) enters: u64,
    /// How often guests have given the thread away.
    pub(crate) suspensions: u64,
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

/// Both backends, ready to run work.
pub(crate) struct Contest {
    p2: Contestants,
    p3: Contestants,
    pub(crate) ring: Uring,
    sockets: u32,
}

/// The guest of one WASI version, on each backend.
struct Contestants {
    stock: Arc<Program>,
    uring: Arc<Program>,
}

impl Contestants {
    fn new(wasi: WasiArg) -> wasmtime::Result<Self> {
        let compiled = Compiled::new(life(wasi).as_bytes())?;
        let link = |backend| Ok::<_, Failure>(Arc::new(Program::link(&compiled, backend)?));
        Ok(Self { stock: link(Backend::Stock)?, uring: link(Backend::Uring)? })
    }
}

impl Contest {
    pub(crate) fn new(recycle: Recycle) -> wasmtime::Result<Self> {
        let files = u32::try_from(super::doctor::raise_nofile()).unwrap_or(u32::MAX);
        let sockets = SOCKETS_MAX.min(files);
        Ok(Self {
            p2: Contestants::new(WasiArg::P2)?,
            p3: Contestants::new(WasiArg::P3)?,
            ring: Uring::builder().sockets(sockets).recycle(recycle).build()?,
            sockets,
        })
    }

    /// Slots of the ring.
    pub(crate) fn sockets(&self) -> u32 {
        self.sockets
    }

    pub(crate) fn program(&self, wasi: WasiArg, backend: Backend) -> &Arc<Program> {
        let contestants = match wasi {
            WasiArg::P2 => &self.p2,
            WasiArg::P3 => &self.p3,
        };
        match backend {
            Backend::Stock => &contestants.stock,
            Backend::Uring => &contestants.uring,
        }
    }

    /// Instantiates the guests, then measures how long they run.
    pub(crate) fn run(
        &self,
        runtime: &Runtime,
        backend: Backend,
        work: &Work,
    ) -> wasmtime::Result<Sample> {
        let program = self.program(work.wasi, backend);
        runtime.block_on(async {
            let net = Net::new(NetArg::Loopback);
            let mut guests = Vec::new();
            for _ in 0..work.guests {
                let mut wasi = WasiCtx::builder();
                net.configure(&mut wasi);
                wasi.args(&["life", work.mode, &work.count.to_string()]);
                let config = GuestConfig {
                    wasi,
                    net: &net,
                    uring: Some(&self.ring),
                    sockets_max: self.sockets,
                };
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
                let (result, suspensions, _store) =
                    guest.map_err(|error| format_err!("{error}"))?;
                result?;
                sample.suspensions += suspensions;
            }
            Ok(sample)
        })
    }
}

/// A future's output, and how often it was not ready before.
async fn counting_suspensions<T>(future: impl Future<Output = T>) -> (T, u64) {
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
pub(crate) struct Summary {
    pub(crate) median: f64,
    /// Half the distance between the quartiles, relative to the median.
    pub(crate) spread: f64,
}

impl Summary {
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Self {
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
