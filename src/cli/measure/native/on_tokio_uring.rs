//! Over tokio-uring's sockets: each guest is a task of one runtime, whose io_uring all of them share.

use std::future::poll_fn;
use std::io;
use std::mem::take;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::task::Poll;

use tokio_uring::Runtime;
use tokio_uring::buf::BoundedBuf;
use tokio_uring::net::UdpSocket;

use super::{
    Operation, Program, REQUEST_BYTES, Setting, ZEROS, expect_bytes, join_all, prepare_all,
};

/// Completions that the ring has room for at least: tokio-uring's default.
const COMPLETIONS_MIN: usize = 512;
/// The kernel's limit.
const COMPLETIONS_MAX: usize = 65_536;

/// There is no `create`: tokio-uring has no socket that is not bound, and registers none that it is
/// given, so it would be socket(2) and close(2) as without it.
pub(super) fn program(setting: &Setting<'_>) -> io::Result<Option<Box<dyn Program>>> {
    let Setting { bench, source, .. } = *setting;
    let (bytes, datagrams) = (bench.bytes, bench.datagrams);
    let bind_to = |ip: IpAddr| prepare(setting, async |_| Ok(Bind(ip)));
    Ok(Some(match bench.operation {
        Operation::Create => return Ok(None),
        Operation::Bind => bind_to(Ipv4Addr::LOCALHOST.into())?,
        Operation::Bind6 => bind_to(Ipv6Addr::LOCALHOST.into())?,
        Operation::Pair => prepare(setting, async |_| Ok(Pair(bytes)))?,
        Operation::Dns => prepare(setting, async |_| Dns::new(bytes))?,
        Operation::Echo => prepare(setting, async |_| Trip::new(bytes))?,
        Operation::Batch | Operation::Burst => {
            prepare(setting, async |_| Batch::new(bytes, datagrams).await)?
        }
        Operation::Receive => prepare(setting, async |guest| {
            let socket = bind(Ipv4Addr::LOCALHOST)?;
            let buffers = vec![vec![0; bytes]; datagrams];
            Ok(Receive { socket, source: source.addr(guest), bytes, buffers })
        })?,
    }))
}

fn prepare<G: Guest>(
    setting: &Setting<'_>,
    guest: impl AsyncFn(usize) -> io::Result<G>,
) -> io::Result<Box<dyn Program>> {
    // What all guests may have in the ring at once.
    let in_flight = setting.guests * 2 * setting.bench.datagrams;
    let completions = in_flight.next_power_of_two();
    let completions = completions.clamp(COMPLETIONS_MIN, COMPLETIONS_MAX);
    let mut ring = tokio_uring::uring_builder();
    ring.setup_cqsize(u32::try_from(completions).map_err(io::Error::other)?);
    let runtime = Runtime::new(tokio_uring::builder().uring_builder(&ring))?;
    let guests = runtime.block_on(prepare_all(setting.guests, guest))?;
    Ok(Box::new(Tasks { guests, runtime }))
}

/// Guests, whose sockets go first, and the runtime.
struct Tasks<G> {
    guests: Vec<G>,
    runtime: Runtime,
}

trait Guest: 'static {
    /// One operation.
    async fn operate(&mut self) -> io::Result<()>;
}

impl<G: Guest> Program for Tasks<G> {
    fn run(&mut self, count: usize) -> io::Result<()> {
        let Self { guests, runtime } = self;
        runtime.block_on(async {
            let run = |mut guest: G| {
                tokio_uring::spawn(async move {
                    for _ in 0..count {
                        guest.operate().await?;
                    }
                    io::Result::Ok(guest)
                })
            };
            *guests = join_all(guests.drain(..).map(run).collect()).await?;
            Ok(())
        })
    }
}

/// System calls, as `UdpSocket::bind` makes them too, and a close(2) when it is dropped: the ring has
/// no part in either.
///
/// Not by `UdpSocket::bind`, which sets `SO_REUSEADDR` and `SO_REUSEPORT`: with these the kernel may
/// choose a port that another socket of ours already has, and then one hears what was meant for the
/// other.
///
/// It is left to block, as tokio-uring's own are.
fn bind(ip: impl Into<IpAddr>) -> io::Result<UdpSocket> {
    std::net::UdpSocket::bind(SocketAddr::new(ip.into(), 0)).map(UdpSocket::from_std)
}

struct Bind(IpAddr);

impl Guest for Bind {
    async fn operate(&mut self) -> io::Result<()> {
        bind(self.0).map(drop)
    }
}

struct Pair(usize);

impl Guest for Pair {
    async fn operate(&mut self) -> io::Result<()> {
        Trip::new(self.0)?.operate().await
    }
}

/// A socket that sends requests and one that replies.
struct Trip {
    a: UdpSocket,
    b: UdpSocket,
    b_addr: SocketAddr,
    bytes: usize,
    /// Lent to the kernel while it receives.
    buffer: Vec<u8>,
}

impl Trip {
    fn new(bytes: usize) -> io::Result<Self> {
        let (a, b) = (bind(Ipv4Addr::LOCALHOST)?, bind(Ipv4Addr::LOCALHOST)?);
        let b_addr = b.local_addr()?;
        Ok(Self { a, b, b_addr, bytes, buffer: Vec::with_capacity(bytes) })
    }
}

impl Guest for Trip {
    async fn operate(&mut self) -> io::Result<()> {
        self.a.send_to(&ZEROS[..self.bytes], self.b_addr).await.0?;
        let buffer = answer(&self.b, take(&mut self.buffer)).await?;
        let (received, buffer) = self.a.recv_from(buffer).await;
        self.buffer = buffer;
        expect_bytes(received?.0, self.bytes)
    }
}

/// Sends a datagram back to where it came from.
async fn answer(server: &UdpSocket, buffer: Vec<u8>) -> io::Result<Vec<u8>> {
    let (received, buffer) = server.recv_from(buffer).await;
    let (len, from) = received?;
    let (sent, buffer) = server.send_to(buffer.slice(..len), from).await;
    sent?;
    Ok(buffer.into_inner())
}

/// A server; a client's cycle is one question.
struct Dns {
    server: UdpSocket,
    addr: SocketAddr,
    bytes: usize,
    buffer: Vec<u8>,
}

impl Dns {
    fn new(bytes: usize) -> io::Result<Self> {
        let server = bind(Ipv4Addr::LOCALHOST)?;
        let addr = server.local_addr()?;
        Ok(Self { server, addr, bytes, buffer: Vec::with_capacity(bytes) })
    }
}

impl Guest for Dns {
    async fn operate(&mut self) -> io::Result<()> {
        let client = bind(Ipv4Addr::LOCALHOST)?;
        client.connect(self.addr).await?;
        client.write(&ZEROS[..self.bytes]).submit().await.0?;
        let buffer = answer(&self.server, take(&mut self.buffer)).await?;
        let (received, buffer) = client.read(buffer).await;
        self.buffer = buffer;
        expect_bytes(received?, self.bytes)
    }
}

/// A connected sender and its receiver. All datagrams are in flight at once, which is what
/// tokio-uring has instead of sendmmsg(2): one system call for many.
struct Batch {
    sender: UdpSocket,
    receiver: UdpSocket,
    bytes: usize,
    /// One for each datagram.
    buffers: Vec<Vec<u8>>,
}

impl Batch {
    async fn new(bytes: usize, datagrams: usize) -> io::Result<Self> {
        let (sender, receiver) = (bind(Ipv4Addr::LOCALHOST)?, bind(Ipv4Addr::LOCALHOST)?);
        sender.connect(receiver.local_addr()?).await?;
        let buffers = vec![vec![0; bytes]; datagrams];
        Ok(Self { sender, receiver, bytes, buffers })
    }
}

impl Guest for Batch {
    async fn operate(&mut self) -> io::Result<()> {
        let Self { sender, receiver, bytes, buffers } = self;
        let payload = &ZEROS[..*bytes];
        // Submitted in this order, so that the receives find their datagrams.
        let sends: Vec<_> = buffers.iter().map(|_| sender.write(payload).submit()).collect();
        receive_all(receiver, *bytes, buffers).await?;
        for send in sends {
            send.await.0?;
        }
        Ok(())
    }
}

/// Receives a datagram into each buffer.
async fn receive_all(
    receiver: &UdpSocket,
    bytes: usize,
    buffers: &mut Vec<Vec<u8>>,
) -> io::Result<()> {
    for (received, buffer) in all(buffers.drain(..).map(|buffer| receiver.recv_from(buffer))).await
    {
        buffers.push(buffer);
        expect_bytes(received?.0, bytes)?;
    }
    Ok(())
}

/// A socket that requests datagrams, and waits for all of them at once, which is cheaper than one after the
/// other (50 µs against 70 for a lone guest, 30 against 33 beside 63 more).
struct Receive {
    socket: UdpSocket,
    source: SocketAddr,
    bytes: usize,
    /// One for each datagram.
    buffers: Vec<Vec<u8>>,
}

impl Guest for Receive {
    async fn operate(&mut self) -> io::Result<()> {
        let Self { socket, source, bytes, buffers } = self;
        socket.send_to(&ZEROS[..REQUEST_BYTES], *source).await.0?;
        receive_all(socket, *bytes, buffers).await
    }
}

/// What futures come to, in their order; they run at the same time.
async fn all<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    let mut running: Vec<_> = futures.into_iter().map(|future| (Box::pin(future), None)).collect();
    poll_fn(|cx| {
        for (future, output) in running.iter_mut().filter(|(_, output)| output.is_none()) {
            if let Poll::Ready(ready) = future.as_mut().poll(cx) {
                *output = Some(ready);
            }
        }
        if running.iter().all(|(_, output)| output.is_some()) {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
    running.into_iter().filter_map(|(_, output)| output).collect()
}
