//! A client that paces requests to guests that answer, and takes the time.
//!
//! Other programs' CPU time is not the guests' doing: a request during which the client's thread waited for
//! its CPU is counted apart, because one such wait of 15 ms is the slowest hundredth of a window.

use std::fs::File;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tokio::io::unix::AsyncFd;
use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use tokio::time::timeout;
use wasmtime::error::Context;
use wasmtime::{bail, format_err};

/// The client sends so many requests each time.
const PACE: Duration = Duration::from_millis(1);

/// How long an answer may take before it counts as lost.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(2);

/// How long a guest may take until it reports its address.
const START_TIME_MAX: Duration = Duration::from_secs(30);

/// How long the client's thread may wait for its CPU in the course of a request.
const CPU_WAIT_MAX: Duration = Duration::from_micros(250);

/// Bytes of a request.
pub(super) const REQUEST_BYTES: usize = 64;

/// The client, in a runtime of one thread.
pub(super) struct Client {
    socket: Arc<UdpSocket>,
    servers: Vec<SocketAddr>,
    requests_per_pace: usize,
    epoch: Instant,
}

/// What requests met.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Answers {
    pub(super) p50: Duration,
    pub(super) p99: Duration,
    pub(super) max: Duration,
    pub(super) requests: usize,
    pub(super) lost: usize,
    /// Answered, but other programs had the CPU meanwhile; not in the quantiles.
    pub(super) held_up: usize,
}

impl Client {
    /// Sends so many requests each millisecond.
    pub(super) async fn new(requests_per_pace: usize) -> wasmtime::Result<Self> {
        let socket = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?);
        Ok(Self { socket, servers: Vec::new(), requests_per_pace, epoch: Instant::now() })
    }

    /// Where guests report their addresses.
    pub(super) fn addr(&self) -> wasmtime::Result<SocketAddr> {
        Ok(self.socket.local_addr()?)
    }

    /// How many guests answer it.
    pub(super) fn servers(&self) -> usize {
        self.servers.len()
    }

    /// Takes the addresses that so many guests report.
    pub(super) async fn meet(
        &mut self,
        servers: usize,
        guests: &mut JoinSet<wasmtime::Result<()>>,
    ) -> wasmtime::Result<()> {
        while self.servers.len() < servers {
            self.servers.push(reported_addr(&self.socket, guests).await?);
        }
        Ok(())
    }

    /// Sends so many requests, to the servers in turn.
    pub(super) async fn request(&self, requests: usize) -> wasmtime::Result<Answers> {
        let window = u64::try_from(self.epoch.elapsed().as_nanos())?;
        let sending = tokio::spawn(send_requests(
            Arc::clone(&self.socket),
            self.servers.clone(),
            self.requests_per_pace,
            (self.epoch, window),
            requests,
        ));
        let cpu_wait = CpuWait::of_this_thread();
        let mut latencies = Vec::with_capacity(requests);
        let mut held_up = 0;
        let mut bytes = [0; REQUEST_BYTES];
        while latencies.len() + held_up < requests {
            let Ok(received) = timeout(ANSWER_TIME_MAX, self.socket.recv_from(&mut bytes)).await
            else {
                break;
            };
            let (len, _) = received?;
            let now = u64::try_from(self.epoch.elapsed().as_nanos())?;
            let Some(request) = Request::read(&bytes[..len]) else {
                bail!("an answer is not what was sent");
            };
            // An answer that came too late for the last window was counted as lost there.
            if request.window != window {
                continue;
            }
            if cpu_wait.so_far().saturating_sub(request.waited_before) > CPU_WAIT_MAX {
                held_up += 1;
            } else {
                latencies.push(Duration::from_nanos(now - request.due));
            }
        }
        sending.await.map_err(|error| format_err!("{error}"))??;
        let lost = requests - latencies.len() - held_up;
        latencies.resize(requests - held_up, ANSWER_TIME_MAX);
        latencies.sort();
        let quantile = |of_hundred: usize| {
            let at = latencies.len().saturating_sub(1) * of_hundred / 100;
            latencies.get(at).copied().unwrap_or(ANSWER_TIME_MAX)
        };
        let [p50, p99, max] = [50, 99, 100].map(quantile);
        Ok(Answers { p50, p99, max, requests, lost, held_up })
    }
}

/// The address of a guest that reports it; an error if one has ended instead.
pub(super) async fn reported_addr(
    socket: &UdpSocket,
    guests: &mut JoinSet<wasmtime::Result<()>>,
) -> wasmtime::Result<SocketAddr> {
    match timeout(START_TIME_MAX, socket.recv_from(&mut [0; REQUEST_BYTES])).await {
        Ok(received) => Ok(received?.1),
        Err(_) => match guests.try_join_next() {
            Some(ended) => bail!("a guest ended: {ended:?}"),
            None => bail!("no guest has reported its address"),
        },
    }
}

/// Sends requests to the servers in turn, at an even pace. A request's time counts from when it was
/// due: if the guests kept this thread from sending it, that is part of the wait.
async fn send_requests(
    client: Arc<UdpSocket>,
    servers: Vec<SocketAddr>,
    requests_per_pace: usize,
    (epoch, window): (Instant, u64),
    requests: usize,
) -> wasmtime::Result<()> {
    // Tokio's own clock ticks in milliseconds.
    let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
    let start = Instant::now();
    let pace = Expiration::Interval(TimeSpec::from_duration(PACE));
    timer.set(pace, TimerSetTimeFlags::empty())?;
    #[expect(deprecated, reason = "its successor is unsafe; a File keeps its descriptor open")]
    let timer = AsyncFd::new(File::from(OwnedFd::from(timer)))?;
    let cpu_wait = CpuWait::of_this_thread();
    let mut waited_before = cpu_wait.so_far();
    let mut due = start;
    for (at, server) in servers.iter().cycle().take(requests).enumerate() {
        if at % requests_per_pace == 0 {
            due += PACE;
            waited_before = cpu_wait.so_far();
            while Instant::now() < due {
                let mut expired = timer.readable().await?;
                // How often it expired does not matter: the loop reads the clock.
                let _ = expired.try_io(|timer| timer.get_ref().read(&mut [0; 8]));
            }
        }
        let due = u64::try_from((due - epoch).as_nanos())?;
        let request = Request { due, window, waited_before };
        client.send_to(&request.write(), server).await.context("sending a request")?;
    }
    Ok(())
}

/// The contents of a request and of its answer, in nanoseconds.
struct Request {
    due: u64,
    window: u64,
    /// What the client's thread had waited for its CPU before the request was due.
    waited_before: Duration,
}

impl Request {
    fn write(&self) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        let waited = u64::try_from(self.waited_before.as_nanos()).unwrap_or(u64::MAX);
        for (field, value) in bytes.chunks_exact_mut(8).zip([self.due, self.window, waited]) {
            field.copy_from_slice(&value.to_ne_bytes());
        }
        bytes
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let number = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        let (due, window) = (number(0)?, number(8)?);
        Some(Self { due, window, waited_before: Duration::from_nanos(number(16)?) })
    }
}

/// How long a thread has waited for a CPU although it could run (`schedstat`, proc(5)).
struct CpuWait(Option<File>);

impl CpuWait {
    fn of_this_thread() -> Self {
        Self(File::open("/proc/thread-self/schedstat").ok())
    }

    /// Zero where the kernel does not count it.
    fn so_far(&self) -> Duration {
        let read = || {
            let mut text = [0; 64];
            let len = self.0.as_ref()?.read_at(&mut text, 0).ok()?;
            // Time on the CPU, time waiting for it, turns.
            str::from_utf8(&text[..len]).ok()?.split(' ').nth(1)?.parse().ok()
        };
        Duration::from_nanos(read().unwrap_or(0))
    }
}
