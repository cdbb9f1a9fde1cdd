//! One process with many sockets: opened, asked, closed.
//!
//! Guests of a hundred sockets each, as dense hosts have them: a guest that polls them all pays for its list
//! with each datagram, and a hundred thousand guests would be more than their address space holds.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cpu_time::ThreadTime;
use serde::{Deserialize, Serialize};
use tokio::runtime::Builder;
use tokio::task::{JoinSet, spawn_blocking};
use wasi_uring::{Stats, Uring};
use wasmtime::error::Context;
use wasmtime::{bail, format_err};
use wasmtime_wasi::WasiCtx;

use super::super::cpus::{Cpus, pin};
use super::super::idle::proc_bytes;
use super::super::{Backend, Sample, Stopwatch, WasiArg, built_in_guest};
use super::flows::{Choice, Flows, Traffic};
use crate::args::NetArg;
use crate::host::{Compiled, GuestConfig, Net, Program};

/// Sockets that have an address between them, which has some 28,000 ports to choose from.
const SOCKETS_PER_ADDR: usize = 10_000;

/// How long the sockets may take to close.
const CLOSE_TIME_MAX: Duration = Duration::from_mins(1);

/// How often it is looked whether they are.
const CLOSE_LOOK: Duration = Duration::from_millis(1);

/// What one process does.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Crowd {
    pub(crate) wasi: WasiArg,
    pub(crate) backend: Backend,
    pub(crate) guests: usize,
    pub(crate) sockets_per_guest: usize,
    /// The limit that it sets itself.
    pub(crate) open_files: u64,
    /// Of a ring, for what is received.
    pub(crate) buffers: Option<u16>,
    /// Requests to sockets chosen at random.
    pub(crate) requests: usize,
}

/// What that took.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) rings: u64,
    pub(crate) open: Took,
    /// What the process and the kernel's slab have grown by, in bytes.
    pub(crate) process_bytes: f64,
    pub(crate) kernel_bytes: f64,
    pub(crate) traffic: Traffic,
    /// Receives armed again while there was traffic.
    pub(crate) rearms: u64,
    /// By full queues, the kernel's included, whose losses are read when a socket is closed.
    pub(crate) dropped: u64,
    pub(crate) close: Took,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Took {
    pub(crate) seconds: f64,
    /// Of the process, without the client's.
    pub(crate) cpu_seconds: f64,
}

impl Took {
    fn new(sample: Sample, client: Duration) -> Self {
        Self {
            seconds: sample.wall.as_secs_f64(),
            cpu_seconds: sample.cpu.saturating_sub(client).as_secs_f64(),
        }
    }
}

type Guests = JoinSet<wasmtime::Result<()>>;

impl Crowd {
    pub(crate) fn sockets(&self) -> usize {
        self.guests * self.sockets_per_guest
    }

    /// Does it, in this process, whose limit of open files is another afterwards.
    pub(super) fn run(self) -> wasmtime::Result<Outcome> {
        self.limit_files()?;
        let compiled = Compiled::new(built_in_guest(self.wasi).as_bytes())?;
        let program = Arc::new(Program::link(&compiled, self.backend)?);
        let uring = match self.backend {
            Backend::Stock => None,
            Backend::Uring => {
                let mut builder = Uring::builder().sockets(self.sockets().try_into()?).rings(1);
                if let Some(buffers) = self.buffers {
                    builder = builder.buffers(buffers);
                }
                Some(builder.build()?)
            }
        };
        let cpus = Cpus::allowed()?;
        pin(cpus.first)?;
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let outcome = runtime.block_on(self.measure(&program, uring.as_ref(), &cpus));
        // After a failure the client's thread may still wait.
        runtime.shutdown_background();
        outcome
    }

    fn limit_files(&self) -> wasmtime::Result<()> {
        let (_, hard) = rlimit::Resource::NOFILE.get()?;
        let limit = self.open_files;
        rlimit::Resource::NOFILE.set(limit, hard).with_context(|| {
            format!("cannot limit open files to {limit}, the hard limit is {hard}")
        })
    }

    async fn measure(
        self,
        program: &Program,
        uring: Option<&Uring>,
        cpus: &Cpus,
    ) -> wasmtime::Result<Outcome> {
        let cpu = cpus.last;
        let mut flows = Flows::new()?;
        let mut instances = Vec::with_capacity(self.guests);
        let net = Net::new(NetArg::Loopback);
        for guest in 0..self.guests {
            let mut wasi = WasiCtx::builder();
            net.configure(&mut wasi);
            let port = flows.addr()?.port();
            let host = 1 + guest * self.sockets_per_guest / SOCKETS_PER_ADDR;
            wasi.args(&["cycle", "crowd", &self.sockets_per_guest.to_string(), &port.to_string()]);
            wasi.args(&["64", "16", &host.to_string()]);
            let sockets_max = self.sockets_per_guest.try_into()?;
            let config = GuestConfig { wasi, net: &net, uring, sockets_max };
            instances.push(program.instantiate(config).await?);
        }
        let stats = || uring.map(Uring::stats).unwrap_or_default();

        let before = (proc_bytes(PROCESS, "RssAnon")?, proc_bytes(KERNEL, "Slab")?);
        let stopwatch = Stopwatch::start();
        let mut guests = Guests::new();
        for mut instance in instances {
            guests.spawn(async move { instance.run().await });
        }
        let expected = self.guests;
        let (mut flows, client) = beside(&mut guests, cpu, move || {
            flows.meet(expected)?;
            Ok(flows)
        })
        .await?;
        let open = Took::new(stopwatch.sample(), client);
        let after = (proc_bytes(PROCESS, "RssAnon")?, proc_bytes(KERNEL, "Slab")?);

        let ((mut flows, sockets), _) = beside(&mut guests, cpu, move || {
            let sockets = flows.learn_sockets()?;
            // Each has received one before anything is measured.
            flows.request(sockets, Choice::InTurn)?;
            Ok((flows, sockets))
        })
        .await?;
        if sockets != self.sockets() {
            bail!("guests have reported {sockets} sockets of {}", self.sockets());
        }
        let stats_before = stats();
        let requests = self.requests;
        let ((flows, traffic), _) = beside(&mut guests, cpu, move || {
            let traffic = flows.request(requests, Choice::AtRandom)?;
            Ok((flows, traffic))
        })
        .await?;
        let stats_after = stats();

        let stopwatch = Stopwatch::start();
        guests.shutdown().await;
        if let Some(uring) = uring {
            closed(uring).await?;
        }
        let close = Took::new(stopwatch.sample(), Duration::ZERO);
        drop(flows);
        Ok(Outcome {
            rings: stats_after.rings,
            open,
            process_bytes: after.0 - before.0,
            kernel_bytes: after.1 - before.1,
            traffic,
            rearms: stats_after.rearms - stats_before.rearms,
            dropped: dropped(&stats()),
            close,
        })
    }
}

const PROCESS: &str = "/proc/self/status";
const KERNEL: &str = "/proc/meminfo";

/// What the client does on a thread and a CPU of its own while guests run, and the CPU time of it. An error if
/// a guest ends meanwhile.
async fn beside<T: Send + 'static>(
    guests: &mut Guests,
    cpu: usize,
    client: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> wasmtime::Result<(T, Duration)> {
    let mut client = spawn_blocking(move || {
        // If not, it is measured all the same.
        let _ = pin(cpu);
        let cpu = ThreadTime::now();
        client().map(|done| (done, cpu.elapsed()))
    });
    std::future::poll_fn(|cx| {
        if let std::task::Poll::Ready(Some(ended)) = guests.poll_join_next(cx) {
            return std::task::Poll::Ready(Err(format_err!("a guest ended: {ended:?}")));
        }
        let client = std::pin::Pin::new(&mut client).poll(cx);
        client.map(|done| Ok(done.map_err(|error| format_err!("{error}"))??))
    })
    .await
}

/// Waits until the kernel has let go of every socket.
async fn closed(uring: &Uring) -> wasmtime::Result<()> {
    let begun = Instant::now();
    loop {
        let open = uring.stats().sockets_open;
        if open == 0 {
            return Ok(());
        }
        if begun.elapsed() > CLOSE_TIME_MAX {
            bail!("{open} sockets are still open {CLOSE_TIME_MAX:?} after their guests were gone");
        }
        tokio::time::sleep(CLOSE_LOOK).await;
    }
}

fn dropped(stats: &Stats) -> u64 {
    stats.dropped_by_kernel + stats.dropped_by_queue + stats.dropped_malformed
}
