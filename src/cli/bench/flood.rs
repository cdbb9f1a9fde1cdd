//! `wasi-uring bench flood`: what a flood at one socket costs the others.
//!
//! All guests run on one thread, and with them a client that paces questions to those that answer
//! and takes the time. The flood comes from another thread, so that it takes no CPU time from them
//! but by what it makes of it.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};
use wasi_uring::Uring;
use wasmtime::error::Context;
use wasmtime::{bail, format_err};
use wasmtime_wasi::WasiCtx;

use super::super::NetArg;
use super::super::host::{Backend, GuestConfig, Net, Program};
use super::super::measure::{Contest, Summary};

/// Sockets unless told otherwise: one is flooded, the others answer.
pub(super) const SOCKETS_DEFAULT: usize = 1000;

/// Every so often so many sockets are asked.
const PACE: Duration = Duration::from_millis(1);
const QUESTIONS_PER_PACE: usize = 10;

/// How often each is asked in a window, which takes 1.5 seconds with a thousand.
const QUESTIONS_PER_SOCKET: usize = 15;

/// How long an answer may take before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(2);

/// Bytes of a question: when it was asked, and in which window.
const QUESTION_BYTES: usize = 64;

/// Where the flood goes in a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flooded {
    Nobody,
    /// A plain socket that nobody reads: the flood's cost to the machine.
    Elsewhere,
    Guest,
}

const WINDOWS: [Flooded; 3] = [Flooded::Nobody, Flooded::Elsewhere, Flooded::Guest];

/// Steps of the progress bar per backend and round.
pub(super) const STEPS: usize = WINDOWS.len();

/// What the others' questions met in one window.
#[derive(Clone, Copy, Debug, Default)]
struct Window {
    p50: Duration,
    p99: Duration,
    asked: usize,
    lost: usize,
    /// Datagrams sent by the flood, per second.
    flood: f64,
}

/// The windows of one round, in the order of `WINDOWS`.
struct Round([Window; 3]);

/// One backend's figures.
pub(super) struct Figures {
    pub(super) backend: Backend,
    pub(super) calm_p50: f64,
    pub(super) calm_p99: f64,
    pub(super) elsewhere_p99: f64,
    pub(super) flooded_p99: f64,
    /// Flooded p99 by calm p99.
    pub(super) ratio: Summary,
    pub(super) asked: usize,
    pub(super) lost: usize,
    pub(super) flood_per_second: f64,
}

/// Measures one backend, round by round.
pub(super) fn measure(
    contest: &Contest,
    backend: Backend,
    sockets: usize,
    rounds: usize,
    progress: &ProgressBar,
) -> wasmtime::Result<Figures> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let rounds = runtime.block_on(async {
        let population =
            Population::start(contest.program(backend), &contest.ring, sockets).await?;
        let mut measured = Vec::new();
        for round in 0..=rounds {
            let mut windows = [Window::default(); 3];
            for (window, flooded) in windows.iter_mut().zip(WINDOWS) {
                *window = population.window(flooded).await?;
                progress.inc(1);
            }
            // The first warms up.
            if round > 0 {
                measured.push(Round(windows));
            }
        }
        Ok::<_, wasmtime::Error>(measured)
    })?;
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    let median = |of: &dyn Fn(&Round) -> f64| Summary::of(rounds.iter().map(of)).median;
    let total = |of: fn(&Window) -> usize| rounds.iter().flat_map(|round| &round.0).map(of).sum();
    Ok(Figures {
        backend,
        calm_p50: median(&|Round([calm, ..])| micros(calm.p50)),
        calm_p99: median(&|Round([calm, ..])| micros(calm.p99)),
        elsewhere_p99: median(&|Round([_, elsewhere, _])| micros(elsewhere.p99)),
        flooded_p99: median(&|Round([.., flooded])| micros(flooded.p99)),
        ratio: Summary::of(
            rounds.iter().map(|Round([calm, _, flooded])| {
                flooded.p99.as_secs_f64() / calm.p99.as_secs_f64()
            }),
        ),
        asked: total(|window| window.asked),
        lost: total(|window| window.lost),
        flood_per_second: median(&|Round([.., flooded])| flooded.flood),
    })
}

/// Guests at work, and a client beside them.
struct Population {
    client: Arc<UdpSocket>,
    answerers: Vec<SocketAddr>,
    /// The guest's that is flooded.
    sink: SocketAddr,
    /// Nobody's.
    elsewhere: UdpSocket,
    epoch: Instant,
    _guests: JoinSet<wasmtime::Result<()>>,
}

impl Population {
    async fn start(program: &Arc<Program>, ring: &Uring, sockets: usize) -> wasmtime::Result<Self> {
        let loopback = (Ipv4Addr::LOCALHOST, 0);
        let client = UdpSocket::bind(loopback).await?;
        let sinks_client = UdpSocket::bind(loopback).await?;
        let elsewhere = UdpSocket::bind(loopback).await?;
        let net = Net::new(NetArg::Loopback);
        let mut guests = JoinSet::new();
        for guest in 0..sockets {
            let (mode, reports_to) =
                if guest == 0 { ("sink", &sinks_client) } else { ("serve", &client) };
            let port = reports_to.local_addr()?.port().to_string();
            let mut wasi = WasiCtx::builder();
            net.configure(&mut wasi);
            wasi.args(&["life", mode, "999999999", &port]);
            let config = GuestConfig { wasi, net: &net, uring: Some(ring), sockets_max: 1 };
            let mut instance = program.instantiate(config).await?;
            guests.spawn(async move { instance.run().await });
        }
        let sink = hello(&sinks_client, &mut guests).await?;
        let mut answerers = Vec::new();
        while answerers.len() + 1 < sockets {
            answerers.push(hello(&client, &mut guests).await?);
        }
        let (client, epoch) = (Arc::new(client), Instant::now());
        Ok(Self { client, answerers, sink, elsewhere, epoch, _guests: guests })
    }

    async fn window(&self, flooded: Flooded) -> wasmtime::Result<Window> {
        let flood = match flooded {
            Flooded::Nobody => None,
            Flooded::Elsewhere => Some(Flood::start(self.elsewhere.local_addr()?)?),
            Flooded::Guest => Some(Flood::start(self.sink)?),
        };
        let asked = self.answerers.len() * QUESTIONS_PER_SOCKET;
        let window = u64::try_from(self.epoch.elapsed().as_nanos())?;
        let asking = tokio::spawn(ask(
            Arc::clone(&self.client),
            self.answerers.clone(),
            (self.epoch, window),
            asked,
        ));
        let mut latencies = Vec::with_capacity(asked);
        let mut bytes = [0; QUESTION_BYTES];
        while latencies.len() < asked {
            let Ok(received) = timeout(PATIENCE, self.client.recv_from(&mut bytes)).await else {
                break;
            };
            let (len, _) = received?;
            let now = u64::try_from(self.epoch.elapsed().as_nanos())?;
            let Some((asked_at, of_window)) = read_question(&bytes[..len]) else {
                bail!("an answer is not what was asked");
            };
            // An answer that came too late for the last window was counted as lost there.
            if of_window == window {
                latencies.push(Duration::from_nanos(now - asked_at));
            }
        }
        asking.await.map_err(|error| format_err!("{error}"))??;
        let flood = flood.map_or(0.0, Flood::stop);
        latencies.sort();
        let quantile = |of_hundred: usize| {
            let at = latencies.len().saturating_sub(1) * of_hundred / 100;
            latencies.get(at).copied().unwrap_or(PATIENCE)
        };
        let lost = asked - latencies.len();
        Ok(Window { p50: quantile(50), p99: quantile(99), asked, lost, flood })
    }
}

/// Where a guest is, as it tells; an error if one has ended instead.
async fn hello(
    socket: &UdpSocket,
    guests: &mut JoinSet<wasmtime::Result<()>>,
) -> wasmtime::Result<SocketAddr> {
    match timeout(PATIENCE, socket.recv_from(&mut [0; QUESTION_BYTES])).await {
        Ok(received) => Ok(received?.1),
        Err(_) => match guests.try_join_next() {
            Some(ended) => bail!("a guest ended: {ended:?}"),
            None => bail!("a guest has not said where it is"),
        },
    }
}

/// Asks the answerers in turn, at an even pace.
async fn ask(
    client: Arc<UdpSocket>,
    answerers: Vec<SocketAddr>,
    (epoch, window): (Instant, u64),
    asked: usize,
) -> wasmtime::Result<()> {
    let mut pace = interval(PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Burst);
    for (at, answerer) in answerers.iter().cycle().take(asked).enumerate() {
        if at % QUESTIONS_PER_PACE == 0 {
            pace.tick().await;
        }
        let now = u64::try_from(epoch.elapsed().as_nanos())?;
        client.send_to(&question(now, window), answerer).await.context("asking")?;
    }
    Ok(())
}

fn question(asked_at: u64, window: u64) -> [u8; QUESTION_BYTES] {
    let mut bytes = [0; QUESTION_BYTES];
    bytes[..8].copy_from_slice(&asked_at.to_ne_bytes());
    bytes[8..16].copy_from_slice(&window.to_ne_bytes());
    bytes
}

fn read_question(bytes: &[u8]) -> Option<(u64, u64)> {
    let number = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    Some((number(0)?, number(8)?))
}

/// A thread that sends to one address as fast as it can.
struct Flood {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    since: Instant,
    thread: std::thread::JoinHandle<()>,
}

impl Flood {
    fn start(target: SocketAddr) -> wasmtime::Result<Self> {
        let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&sent));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if socket.send_to(&[0; QUESTION_BYTES], target).is_ok() {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Ok(Self { stop, sent, since: Instant::now(), thread })
    }

    /// Ends it; datagrams per second.
    #[expect(clippy::cast_precision_loss, reason = "millions")]
    fn stop(self) -> f64 {
        let rate = self.sent.load(Ordering::Relaxed) as f64 / self.since.elapsed().as_secs_f64();
        self.stop.store(true, Ordering::Relaxed);
        // It cannot panic.
        let _ = self.thread.join();
        rate
    }
}
