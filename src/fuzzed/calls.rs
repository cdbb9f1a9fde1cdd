//! What guests call, in any sequence, on a ring of the kernel's, over loopback.

use std::future::poll_fn;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Runtime};
use tokio::task::yield_now;

use crate::datagram::Family;
use crate::error::ErrorCode;
use crate::socket::UdpSocket;
use crate::socket::options::OptionValue;
use crate::{Recycle, UdpCtx, Uring, UringBuilder};

/// What all sequences of a thread share.
struct Host {
    runtime: Runtime,
    uring: Uring,
}

impl Host {
    fn new(runtime: &mut Builder, uring: UringBuilder) -> Self {
        let runtime = runtime.enable_io().build().expect("a runtime");
        let recycle = Recycle { quarantined_max: 16, ready_max: 16, ..Recycle::default() };
        let uring = uring.sockets(16).queue_datagrams(4).recycle(recycle).build();
        Self { runtime, uring: uring.expect("this needs io_uring") }
    }
}

thread_local! {
    static HOST: Host = Host::new(&mut Builder::new_current_thread(), Uring::builder());
}

#[cfg(test)]
thread_local! {
    /// Two workers for each ring, so that one enters while another queues, and guests of one wait for
    /// what the other has armed.
    static THREADS: Host = Host::new(
        Builder::new_multi_thread().worker_threads(4),
        Uring::builder().rings(2),
    );
}

/// Sockets of a guest.
const SOCKETS_MAX: u32 = 6;

/// Polls before a call is given up.
const POLLS_MAX: usize = 20;

/// Longest that it takes until all sockets are closed, on a slow machine under a sanitizer.
const CLOSES_WITHIN: Duration = Duration::from_mins(1);

/// Makes calls of the bytes, and drops everything in the end.
///
/// # Panics
///
/// If an answer cannot be, or something is left of the guest.
pub fn run(bytes: &[u8]) {
    HOST.with(|Host { runtime, uring }| {
        runtime.block_on(async {
            live(uring, bytes).await;
            all_are_closed(uring).await;
        });
    });
}

/// As `run`, of as many guests, which go from thread to thread and share rings.
#[cfg(test)]
pub(super) fn run_at_once(lives: Vec<Vec<u8>>) {
    THREADS.with(|Host { runtime, uring }| {
        runtime.block_on(async {
            let guests: Vec<_> = lives
                .into_iter()
                .map(|bytes| {
                    let uring = uring.clone();
                    tokio::spawn(async move { live(&uring, &bytes).await })
                })
                .collect();
            for guest in guests {
                guest.await.expect("no guest panics");
            }
            all_are_closed(uring).await;
        });
    });
}

/// A guest that makes calls of the bytes.
async fn live(uring: &Uring, bytes: &[u8]) {
    let is_loopback = |addr: SocketAddr| addr.ip().is_loopback() && addr.port() != 13;
    let ctx = UdpCtx::builder(uring)
        .allow(move |addr, _| addr.port() == 0 || is_loopback(addr))
        .sockets_max(SOCKETS_MAX)
        .queue_bytes_max(10_000)
        .build();
    let mut guest = Guest { ctx, bytes: bytes.iter().copied().collect(), sockets: Vec::new() };
    while !guest.bytes.is_empty() {
        guest.call().await;
    }
}

async fn all_are_closed(uring: &Uring) {
    let deadline = Instant::now() + CLOSES_WITHIN;
    while Instant::now() < deadline {
        if uring.stats().sockets_open == 0 {
            return;
        }
        yield_now().await;
    }
    panic!("sockets are left: {:?}", uring.stats());
}

struct Guest {
    ctx: UdpCtx,
    bytes: std::collections::VecDeque<u8>,
    sockets: Vec<Socket>,
}

struct Socket {
    udp: Arc<UdpSocket>,
    local: Option<SocketAddr>,
    /// `stream` of WASI 0.2 has succeeded, without which nothing of it sends and receives.
    has_streams: bool,
}

/// Of this process's own: other tests use 127.0.0.1.
fn ip(family: Family) -> IpAddr {
    let [.., high, low] = std::process::id().to_be_bytes();
    match family {
        Family::V4 => Ipv4Addr::new(127, 77, high, low.max(1)).into(),
        Family::V6 => Ipv6Addr::LOCALHOST.into(),
    }
}

/// A call's answer, unless it waits for longer than that: then it is given up.
async fn bounded<T>(call: impl Future<Output = T>) -> Option<T> {
    let mut call = pin!(call);
    for _ in 0..POLLS_MAX {
        let polled = poll_fn(|cx| Poll::Ready(call.as_mut().poll(cx))).await;
        if let Poll::Ready(answer) = polled {
            return Some(answer);
        }
        yield_now().await;
    }
    None
}

impl Guest {
    fn byte(&mut self) -> u8 {
        self.bytes.pop_front().unwrap_or(0)
    }

    /// Where a datagram may go: mostly to sockets of the guest's own.
    fn remote(&mut self, family: Family) -> SocketAddr {
        let byte = self.byte();
        let known: Vec<SocketAddr> =
            self.sockets.iter().filter_map(|socket| socket.local).collect();
        match byte {
            0..200 if !known.is_empty() => known[usize::from(byte) % known.len()],
            0..210 => SocketAddr::new(ip(family), 13),
            210..220 => SocketAddr::new(ip(family), 0),
            220..230 => (Ipv4Addr::UNSPECIFIED, 9).into(),
            // Beyond the policy, of either family.
            230..240 => (Ipv4Addr::new(192, 0, 2, byte), 9).into(),
            _ => (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, byte.into()), 9).into(),
        }
    }

    async fn call(&mut self) {
        let (what, which) = (self.byte() % 20, usize::from(self.byte()));
        if what < 3 || self.sockets.is_empty() {
            let family = if which % 4 == 0 { Family::V6 } else { Family::V4 };
            match self.ctx.new_socket(family) {
                Ok(socket) => {
                    let socket = Arc::new(socket);
                    self.sockets.push(Socket { udp: socket, local: None, has_streams: false });
                }
                Err(error) => assert!(
                    matches!(error, ErrorCode::NewSocketLimit | ErrorCode::NotSupported),
                    "{error:?}"
                ),
            }
            return;
        }
        let at = which % self.sockets.len();
        let socket = Arc::clone(&self.sockets[at].udp);
        let has_streams = self.sockets[at].has_streams;
        let family = socket.family();
        match what {
            3..6 => {
                let addr = SocketAddr::new(ip(family), 0);
                bounded(socket.start_bind(addr)).await;
                if which % 3 > 0 {
                    bounded(socket.finish_bind()).await;
                }
            }
            6 => drop(bounded(socket.bind(SocketAddr::new(ip(family), 0))).await),
            7 => {
                if let Some(Ok(local)) = bounded(socket.local_address()).await {
                    self.sockets[at].local = Some(local).filter(|local| local.ip() == ip(family));
                }
            }
            8 => {
                let remote = self.remote(family);
                let remote = (which % 3 > 0).then_some(remote);
                if bounded(socket.stream(remote)).await == Some(Ok(())) {
                    self.sockets[at].has_streams = true;
                }
            }
            9 => drop(bounded(socket.connect(self.remote(family))).await),
            10 => drop(bounded(socket.disconnect()).await),
            11 | 12 if has_streams => {
                let datagrams: Vec<_> = (0..usize::from(self.byte()) % 20)
                    .map(|_| {
                        let bytes = usize::from(self.byte()) << (which % 9);
                        (vec![7; bytes], (which % 4 > 0).then(|| self.remote(family)))
                    })
                    .collect();
                let count = datagrams.len() as u64;
                if let Some(Ok(sent)) = bounded(socket.send(datagrams.into_iter())).await {
                    assert!(sent <= count, "{sent} of {count}");
                }
            }
            13 => {
                let to = (which % 4 > 0).then(|| self.remote(family));
                let bytes = usize::from(self.byte()) << (which % 9);
                bounded(socket.send_one(vec![7; bytes], to)).await;
            }
            14 | 15 if has_streams => {
                let max = u64::from(self.byte());
                if let Some(Ok(datagrams)) = bounded(socket.receive(max)).await {
                    assert!(datagrams.len() as u64 <= max.min(16));
                    assert!(datagrams.iter().all(|one| one.from.ip().is_loopback()));
                }
            }
            16 => {
                if let Some(Ok(datagram)) = bounded(socket.receive_one()).await {
                    // (At `::1` others of this machine may have sent it.)
                    let is_ours = datagram.from.ip() == ip(Family::V4);
                    assert!(!is_ours || datagram.payload.iter().all(|byte| *byte == 7));
                }
            }
            17 if has_streams => {
                bounded(socket.receivable()).await;
                bounded(socket.sendable()).await;
            }
            18 => {
                let value = match which % 3 {
                    0 => OptionValue::HopLimit(self.byte()),
                    1 => OptionValue::ReceiveBuffer(u64::from(self.byte()) << (which % 40)),
                    _ => OptionValue::SendBuffer(u64::from(self.byte()) << (which % 40)),
                };
                bounded(socket.set_option(value)).await;
                bounded(socket.remote_address()).await;
            }
            _ => {
                drop(socket);
                drop(self.sockets.swap_remove(at));
            }
        }
    }
}
