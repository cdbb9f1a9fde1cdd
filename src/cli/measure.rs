//! One run of the built-in guest on a backend, or of a plain program that does the same.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cpu_time::ProcessTime;
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use wasi_uring::{Recycle, Uring};
use wasmtime::component::Component;
use wasmtime::{Engine, format_err};
use wasmtime_wasi::WasiCtx;

use super::NetArg;
use super::host::{Backend, GuestConfig, Net, Program};

/// The guest that every measurement runs: its modes are in its header.
pub(crate) const LIFE: &str = include_str!("guests/life.wat");

/// Slots of the ring measured: room for ten thousand guests with a socket each, files permitting,
/// and some files are left for recycled sockets.
const SOCKETS_MAX: u32 = 11_264;

/// What each guest is told to do, and how often.
#[derive(Clone, Debug)]
pub(crate) struct Work {
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
        Sample { wall: self.wall.elapsed(), cpu: self.cpu.elapsed(), enters: 0 }
    }
}

/// Both backends, ready to run work.
pub(crate) struct Contest {
    stock: Arc<Program>,
    uring: Arc<Program>,
    pub(crate) ring: Uring,
    sockets: u32,
}

impl Contest {
    pub(crate) fn new(recycle: Recycle) -> wasmtime::Result<Self> {
        let files = u32::try_from(super::doctor::raise_nofile()).unwrap_or(u32::MAX);
        let sockets = SOCKETS_MAX.min(files);
        let engine = Engine::default();
        let component = Component::new(&engine, LIFE)?;
        Ok(Self {
            stock: Arc::new(Program::link(&engine, &component, Backend::Stock)?),
            uring: Arc::new(Program::link(&engine, &component, Backend::Uring)?),
            ring: Uring::builder().sockets(sockets).recycle(recycle).build()?,
            sockets,
        })
    }

    /// Slots of the ring.
    pub(crate) fn sockets(&self) -> u32 {
        self.sockets
    }

    pub(crate) fn program(&self, backend: Backend) -> &Arc<Program> {
        match backend {
            Backend::Stock => &self.stock,
            Backend::Uring => &self.uring,
        }
    }

    /// Instantiates the guests, then measures how long they run.
    pub(crate) fn run(
        &self,
        runtime: &Runtime,
        backend: Backend,
        work: &Work,
    ) -> wasmtime::Result<Sample> {
        let program = self.program(backend);
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
                tasks.spawn(async move { (guest.run().await, guest) });
            }
            let mut ended = Vec::new();
            while let Some(guest) = tasks.join_next().await {
                ended.push(guest);
            }
            let mut sample = stopwatch.sample();
            sample.enters = self.ring.stats().enters - enters;
            for guest in ended {
                let (result, _store) = guest.map_err(|error| format_err!("{error}"))?;
                result?;
            }
            Ok(sample)
        })
    }
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
