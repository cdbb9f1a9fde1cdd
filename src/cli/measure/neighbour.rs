//! What guests that compute cost their neighbours on a multi-thread runtime.
//!
//! As many guests as there are workers but one compute, on and on or for 10 ms between two questions; others
//! answer a paced client, which has a thread and a runtime of its own. A worker is always left for them.

use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::runtime::{Builder, Handle};
use tokio::task::JoinSet;
use wasmtime::bail;
use wasmtime_wasi::WasiCtx;

use super::client::{Answers, Client, REQUEST_BYTES, reported_addr};
use super::{Backend, Harness, Summary, WasiArg};
use crate::args::NetArg;
use crate::host::{GuestConfig, Net};

/// Sockets that answer, by default.
pub(crate) const SOCKETS_DEFAULT: usize = 16;

/// The client sends so many requests each millisecond.
const REQUESTS_PER_PACE: usize = 2;

/// Requests in a window, which takes a second.
const REQUESTS: usize = 2000;

/// The same before each window.
const REQUESTS_TO_SETTLE: usize = 50;

/// What the guests beside those that answer do in a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Beside {
    Nothing,
    /// They compute without a pause, and never suspend.
    Computing,
    /// They ask a question, and are answered, after every 10 ms of it.
    Asking,
}

const WINDOWS: [Beside; 3] = [Beside::Nothing, Beside::Computing, Beside::Asking];

/// Steps of the progress bar per backend and round.
pub(crate) const STEPS: usize = WINDOWS.len();

/// Repetitions of a guest that does not end by itself.
const FOR_EVER: u32 = 999_999_999;

type Guests = JoinSet<wasmtime::Result<()>>;

/// How often a guest computes for 10 ms so that it outlasts a window; twice as often if it did not.
const COMPUTATIONS: u32 = 150;

/// What the client's requests met in the windows of one round, in the order of `WINDOWS`.
struct Round([Answers; 3]);

/// One backend's figures.
pub(crate) struct Figures {
    pub(crate) wasi: WasiArg,
    pub(crate) backend: Backend,
    pub(crate) sockets: usize,
    pub(crate) workers: usize,
    /// In microseconds: medians of the rounds' p50, p99 and longest, window by window.
    pub(crate) latencies: [[f64; 3]; 3],
    /// The p99 beside guests that compute, and that ask, by stock's of the same round.
    pub(crate) to_stock: [Summary; 2],
    pub(crate) requests: usize,
    pub(crate) lost: usize,
    pub(crate) held_up: usize,
}

/// Measures both backends in turn, round by round.
pub(crate) fn measure(
    harness: &Harness,
    wasi: WasiArg,
    sockets: usize,
    rounds: usize,
    step: &dyn Fn(),
) -> wasmtime::Result<[Figures; 2]> {
    let workers = available_parallelism().map_or(2, NonZeroUsize::get).max(2);
    let mut measured = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        let mut backends: Vec<_> = Backend::ALL.into_iter().zip(&mut measured).collect();
        backends.rotate_left(round % 2);
        for (backend, measured) in backends {
            let guests =
                Builder::new_multi_thread().worker_threads(workers).enable_all().build()?;
            let neighbourhood =
                Neighbourhood { harness, wasi, backend, workers, guests: guests.handle() };
            let client = Builder::new_current_thread().enable_all().build()?;
            measured.push(client.block_on(neighbourhood.round(sockets, round, step))?);
        }
    }
    let [stock, uring] = measured;
    let figures = |backend, rounds: &[Round]| {
        let summary = |at: usize, of: &dyn Fn(&Answers) -> Duration| {
            Summary::of(rounds.iter().map(|Round(windows)| of(&windows[at]).as_secs_f64() * 1e6))
        };
        let to_stock = |at: usize| {
            let pairs = rounds.iter().zip(&stock);
            Summary::of(pairs.map(|(Round(windows), Round(stock))| {
                windows[at].p99.as_secs_f64() / stock[at].p99.as_secs_f64()
            }))
        };
        let total =
            |of: fn(&Answers) -> usize| rounds.iter().flat_map(|round| &round.0).map(of).sum();
        Figures {
            wasi,
            backend,
            sockets,
            workers,
            latencies: [0, 1, 2].map(|at| {
                let all: [&dyn Fn(&Answers) -> Duration; 3] =
                    [&|one| one.p50, &|one| one.p99, &|one| one.max];
                all.map(|of| summary(at, of).median)
            }),
            to_stock: [1, 2].map(to_stock),
            requests: total(|answers| answers.requests),
            lost: total(|answers| answers.lost),
            held_up: total(|answers| answers.held_up),
        }
    };
    Ok([figures(Backend::Stock, &stock), figures(Backend::Uring, &uring)])
}

/// Where the guests of a round live.
struct Neighbourhood<'a> {
    harness: &'a Harness,
    wasi: WasiArg,
    backend: Backend,
    workers: usize,
    guests: &'a Handle,
}

impl Neighbourhood<'_> {
    async fn round(
        &self,
        sockets: usize,
        round: usize,
        step: &dyn Fn(),
    ) -> wasmtime::Result<Round> {
        let mut client = Client::new(REQUESTS_PER_PACE).await?;
        let mut guests = JoinSet::new();
        for _ in 0..sockets {
            self.start("serve", FOR_EVER, client.addr()?, &mut guests).await?;
        }
        client.meet(sockets, &mut guests).await?;
        let mut windows = [Answers::default(); 3];
        for at in 0..windows.len() {
            let at = (at + round) % windows.len();
            client.request(REQUESTS_TO_SETTLE).await?;
            windows[at] = match WINDOWS[at] {
                Beside::Nothing => client.request(REQUESTS).await?,
                Beside::Computing => self.beside_computing(&client).await?,
                Beside::Asking => self.beside_asking(&client).await?,
            };
            tracing::debug!(backend = self.backend.name(), beside = ?WINDOWS[at], answers = ?windows[at]);
            step();
        }
        Ok(Round(windows))
    }

    async fn beside_computing(&self, client: &Client) -> wasmtime::Result<Answers> {
        for doublings in 0..6 {
            let count = COMPUTATIONS << doublings;
            let reports_to = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
            let mut computing = JoinSet::new();
            for _ in 1..self.workers {
                self.start("compute", count, reports_to.local_addr()?, &mut computing).await?;
            }
            for _ in 1..self.workers {
                reported_addr(&reports_to, &mut computing).await?;
            }
            let answers = client.request(REQUESTS).await?;
            let ended = computing.try_join_next();
            let outlasted = ended.is_none();
            ended.transpose()?.transpose()?;
            while let Some(ended) = computing.join_next().await {
                ended??;
            }
            if outlasted {
                return Ok(answers);
            }
        }
        bail!("a guest that computes ends too early on this machine")
    }

    async fn beside_asking(&self, client: &Client) -> wasmtime::Result<Answers> {
        let asked = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let mut asking = JoinSet::new();
        for _ in 1..self.workers {
            self.start("ask", FOR_EVER, asked.local_addr()?, &mut asking).await?;
        }
        for _ in 1..self.workers {
            reported_addr(&asked, &mut asking).await?;
        }
        let answering = tokio::spawn(async move {
            let mut question = [0; REQUEST_BYTES];
            while let Ok((len, from)) = asked.recv_from(&mut question).await {
                let _ = asked.send_to(&question[..len], from).await;
            }
        });
        let answers = client.request(REQUESTS).await?;
        // They wait for ever from here on, and so can be ended.
        answering.abort();
        asking.shutdown().await;
        Ok(answers)
    }

    async fn start(
        &self,
        mode: &str,
        count: u32,
        reports_to: SocketAddr,
        guests: &mut Guests,
    ) -> wasmtime::Result<()> {
        let net = Net::new(NetArg::Loopback);
        let mut wasi = WasiCtx::builder();
        net.configure(&mut wasi);
        let port = reports_to.port().to_string();
        wasi.args(&["cycle", mode, &count.to_string(), &port, "4", "1"]);
        let uring = Some(self.harness.uring());
        let config = GuestConfig { wasi, net: &net, uring, sockets_max: 1 };
        let program = Arc::clone(self.harness.program(self.wasi, self.backend));
        let mut instance = program.instantiate(config).await?;
        guests.spawn_on(async move { instance.run().await }, self.guests);
        Ok(())
    }
}
