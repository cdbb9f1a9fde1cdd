//! What a flood at one socket costs the others.
//!
//! All guests run on one thread, and with them a client that paces requests to those that answer
//! and takes the time. The flood comes from another thread, so that it takes no CPU time from them
//! but by the work it makes for the kernel.

use std::io::IoSlice;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sched::sched_setaffinity;
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};
use nix::unistd::Pid;
use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use wasi_uring::Uring;
use wasmtime_wasi::WasiCtx;

use super::client::{Answers, Client, REQUEST_BYTES, reported_addr};
use super::cpus::{Cpus, pin};
use super::{Backend, Harness, Summary, WasiArg};
use crate::args::NetArg;
use crate::host::{GuestConfig, Net, Program};
use crate::terminal::say;

/// Sockets by default: one is flooded, the others answer.
pub(crate) const SOCKETS_DEFAULT: usize = 1000;

/// The client sends so many requests each millisecond.
const REQUESTS_PER_PACE: usize = 10;

/// Requests to each socket in a window, which takes 1.5 seconds with a thousand.
const REQUESTS_PER_SOCKET: usize = 15;

/// The same between the windows.
const REQUESTS_TO_SETTLE: usize = 2;

/// Where the flood goes in a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flooded {
    Nothing,
    /// A plain socket that is never read: the flood's cost to the machine.
    Elsewhere,
    /// A guest's socket, datagram by datagram.
    Guest,
    /// The same, many datagrams to a message.
    GuestInBulk,
}

const WINDOWS: [Flooded; 4] =
    [Flooded::Nothing, Flooded::Elsewhere, Flooded::Guest, Flooded::GuestInBulk];

/// Steps of the progress bar per backend and round.
pub(crate) const STEPS: usize = WINDOWS.len();

/// Datagrams in a message of a flood in bulk.
const BULK_DATAGRAMS: usize = 64;

/// What the others' requests met in one window.
#[derive(Clone, Copy, Debug, Default)]
struct Window {
    answers: Answers,
    /// Datagrams sent by the flood, per second.
    flood: f64,
}

/// The windows of one round, in the order of `WINDOWS`.
struct Round([Window; 4]);

/// One backend's figures.
pub(crate) struct Figures {
    pub(crate) wasi: WasiArg,
    pub(crate) backend: Backend,
    /// The flooded one included.
    pub(crate) sockets: usize,
    /// In microseconds, window by window.
    pub(crate) calm_p50: f64,
    pub(crate) p99: [f64; 4],
    /// A flooded p99 by the calm one of its round.
    pub(crate) flooded: Summary,
    pub(crate) flooded_in_bulk: Summary,
    pub(crate) requests: usize,
    pub(crate) lost: usize,
    pub(crate) held_up: usize,
    /// Datagrams of the flood and of the flood in bulk.
    pub(crate) flood_per_second: [f64; 2],
}

/// Measures both backends in turn, round by round.
pub(crate) fn measure(
    harness: &Harness,
    wasi: WasiArg,
    sockets: usize,
    rounds: usize,
    step: &dyn Fn(),
) -> wasmtime::Result<[Figures; 2]> {
    // Else the scheduler may put the flood beside the guests for some of the time.
    let cpus = Cpus::allowed()?;
    if cpus.first == cpus.last {
        say("one CPU only: flood and guests share it, and what they cost each other is its time");
    }
    pin(cpus.first)?;
    let measured = measure_pinned(harness, wasi, sockets, rounds, step, &cpus);
    sched_setaffinity(Pid::from_raw(0), &cpus.all)?;
    let [stock, uring] = measured?;
    let figures = |backend, rounds: &[Round]| figures(wasi, backend, sockets, rounds);
    Ok([figures(Backend::Stock, &stock), figures(Backend::Uring, &uring)])
}

fn measure_pinned(
    harness: &Harness,
    wasi: WasiArg,
    sockets: usize,
    rounds: usize,
    step: &dyn Fn(),
    cpus: &Cpus,
) -> wasmtime::Result<[Vec<Round>; 2]> {
    let mut measured = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        let backends = Backend::ALL.into_iter().zip(&mut measured);
        let mut backends: Vec<_> = backends.collect();
        backends.rotate_left(round % 2);
        for (backend, measured) in backends {
            // One population at a time, because a thousand guests at rest are still in the way.
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let windows = runtime.block_on(async {
                let population =
                    Population::start(harness.program(wasi, backend), harness.uring(), sockets)
                        .await?;
                let mut windows = [Window::default(); 4];
                // Each is the first once.
                for at in 0..windows.len() {
                    let at = (at + round) % windows.len();
                    // Warms up, and lets guests finish with what the last flood has left.
                    population.window(Flooded::Nothing, REQUESTS_TO_SETTLE, cpus).await?;
                    let window = population.window(WINDOWS[at], REQUESTS_PER_SOCKET, cpus).await?;
                    tracing::debug!(backend = backend.name(), flooded = ?WINDOWS[at], ?window);
                    windows[at] = window;
                    step();
                }
                Ok::<_, wasmtime::Error>(windows)
            })?;
            measured.push(Round(windows));
        }
    }
    Ok(measured)
}

fn figures(wasi: WasiArg, backend: Backend, sockets: usize, rounds: &[Round]) -> Figures {
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    let summary = |of: &dyn Fn(&[Window; 4]) -> f64| {
        Summary::of(rounds.iter().map(|Round(windows)| of(windows)))
    };
    let total = |of: fn(&Window) -> usize| rounds.iter().flat_map(|round| &round.0).map(of).sum();
    let ratio = |at: usize| {
        summary(&|windows| {
            windows[at].answers.p99.as_secs_f64() / windows[0].answers.p99.as_secs_f64()
        })
    };
    Figures {
        wasi,
        backend,
        sockets,
        calm_p50: summary(&|windows| micros(windows[0].answers.p50)).median,
        p99: [0, 1, 2, 3].map(|at| summary(&|windows| micros(windows[at].answers.p99)).median),
        flooded: ratio(2),
        flooded_in_bulk: ratio(3),
        requests: total(|window| window.answers.requests),
        lost: total(|window| window.answers.lost),
        held_up: total(|window| window.answers.held_up),
        flood_per_second: [2, 3].map(|at| summary(&|windows| windows[at].flood).median),
    }
}

/// Guests at work, and a client beside them.
struct Population {
    client: Client,
    /// The guest's that is flooded.
    sink: SocketAddr,
    /// No guest's.
    elsewhere: UdpSocket,
    _guests: JoinSet<wasmtime::Result<()>>,
}

impl Population {
    async fn start(program: &Arc<Program>, ring: &Uring, sockets: usize) -> wasmtime::Result<Self> {
        let loopback = (Ipv4Addr::LOCALHOST, 0);
        let mut client = Client::new(REQUESTS_PER_PACE).await?;
        let sinks_client = UdpSocket::bind(loopback).await?;
        let elsewhere = UdpSocket::bind(loopback).await?;
        let net = Net::new(NetArg::Loopback);
        let mut guests = JoinSet::new();
        for guest in 0..sockets {
            let (mode, reports_to) = if guest == 0 {
                ("sink", sinks_client.local_addr()?)
            } else {
                ("serve", client.addr()?)
            };
            let mut wasi = WasiCtx::builder();
            net.configure(&mut wasi);
            wasi.args(&["cycle", mode, "999999999", &reports_to.port().to_string()]);
            let config = GuestConfig { wasi, net: &net, uring: Some(ring), sockets_max: 1 };
            let mut instance = program.instantiate(config).await?;
            guests.spawn(async move { instance.run().await });
        }
        let sink = reported_addr(&sinks_client, &mut guests).await?;
        client.meet(sockets - 1, &mut guests).await?;
        Ok(Self { client, sink, elsewhere, _guests: guests })
    }

    async fn window(
        &self,
        flooded: Flooded,
        requests_per_socket: usize,
        cpus: &Cpus,
    ) -> wasmtime::Result<Window> {
        let flood = match flooded {
            Flooded::Nothing => None,
            Flooded::Elsewhere => Some(Flood::start(self.elsewhere.local_addr()?, 1, cpus)?),
            Flooded::Guest => Some(Flood::start(self.sink, 1, cpus)?),
            Flooded::GuestInBulk => Some(Flood::start(self.sink, BULK_DATAGRAMS, cpus)?),
        };
        let requests = self.client.servers() * requests_per_socket;
        let answers = self.client.request(requests).await?;
        let rate = flood.as_ref().map_or(0.0, Flood::rate);
        Ok(Window { answers, flood: rate })
    }
}

/// A thread that sends to one address as fast as it can.
struct Flood {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    since: Instant,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // It cannot panic.
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

impl Flood {
    /// Starts one with so many datagrams to a message.
    fn start(target: SocketAddr, datagrams: usize, cpus: &Cpus) -> wasmtime::Result<Self> {
        let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        let target = SockaddrStorage::from(target);
        let segment = u16::try_from(REQUEST_BYTES)?;
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&sent));
        let cpu = cpus.last;
        let thread = std::thread::spawn(move || {
            // If not, it is measured all the same.
            let _ = pin(cpu);
            let bytes = vec![0; REQUEST_BYTES * datagrams];
            let control = [ControlMessage::UdpGsoSegments(&segment)];
            let control = if datagrams > 1 { &control[..] } else { &[] };
            while !stopped.load(Ordering::Relaxed) {
                let (fd, parts) = (socket.as_raw_fd(), [IoSlice::new(&bytes)]);
                if sendmsg(fd, &parts, control, MsgFlags::empty(), Some(&target)).is_ok() {
                    count.fetch_add(datagrams as u64, Ordering::Relaxed);
                }
            }
        });
        Ok(Self { stop, sent, since: Instant::now(), thread: Some(thread) })
    }

    /// Datagrams per second.
    #[expect(clippy::cast_precision_loss, reason = "millions")]
    fn rate(&self) -> f64 {
        self.sent.load(Ordering::Relaxed) as f64 / self.since.elapsed().as_secs_f64()
    }
}
