//! Over tokio's sockets: each guest is a task of one current-thread runtime.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use tokio::net::UdpSocket;
use tokio::runtime::{Builder, Runtime};
use tokio::task::coop::consume_budget;

use super::{
    BYTES_MAX, Operation, Program, REQUEST_BYTES, Setting, ZEROS, expect_bytes, join_all,
    prepare_all,
};

pub(super) fn program(setting: &Setting<'_>) -> io::Result<Option<Box<dyn Program>>> {
    let Setting { bench, guests, source, .. } = *setting;
    let (bytes, datagrams) = (bench.bytes, bench.datagrams);
    Ok(Some(match bench.operation {
        Operation::Create => prepare(guests, async |_| Ok(Create))?,
        Operation::Bind => prepare(guests, async |_| Ok(Bind(Ipv4Addr::LOCALHOST.into())))?,
        Operation::Bind6 => prepare(guests, async |_| Ok(Bind(Ipv6Addr::LOCALHOST.into())))?,
        Operation::Pair => prepare(guests, async |_| Ok(Pair(bytes)))?,
        Operation::Dns => prepare(guests, async |_| Dns::new(bytes).await)?,
        Operation::Echo => prepare(guests, async |_| Trip::new(bytes).await)?,
        Operation::Batch | Operation::Burst => {
            prepare(guests, async |_| Batch::new(bytes, datagrams).await)?
        }
        Operation::Receive => prepare(guests, async |guest| {
            let socket = bind(Ipv4Addr::LOCALHOST).await?;
            Ok(Receive { socket, source: source.addr(guest), bytes, datagrams })
        })?,
    }))
}

fn prepare<G: Guest>(
    guests: usize,
    guest: impl AsyncFn(usize) -> io::Result<G>,
) -> io::Result<Box<dyn Program>> {
    let runtime = Builder::new_current_thread().enable_io().build()?;
    let guests = runtime.block_on(prepare_all(guests, guest))?;
    Ok(Box::new(Tasks { guests, runtime }))
}

/// Guests, and the runtime that their sockets are registered with.
struct Tasks<G> {
    guests: Vec<G>,
    runtime: Runtime,
}

trait Guest: Send + 'static {
    /// One operation.
    fn operate(&mut self) -> impl Future<Output = io::Result<()>> + Send;
}

impl<G: Guest> Program for Tasks<G> {
    fn run(&mut self, count: usize) -> io::Result<()> {
        let Self { guests, runtime } = self;
        runtime.block_on(async {
            let run = |mut guest: G| {
                tokio::spawn(async move {
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

async fn bind(ip: impl Into<IpAddr>) -> io::Result<UdpSocket> {
    UdpSocket::bind(SocketAddr::new(ip.into(), 0)).await
}

struct Create;

impl Guest for Create {
    /// tokio has no socket that is not bound, but takes those of others.
    async fn operate(&mut self) -> io::Result<()> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Inet, SockType::Datagram, flags, None)?;
        UdpSocket::from_std(socket.into())?;
        give_way().await;
        Ok(())
    }
}

struct Bind(IpAddr);

impl Guest for Bind {
    async fn operate(&mut self) -> io::Result<()> {
        bind(self.0).await?;
        give_way().await;
        Ok(())
    }
}

/// For cycles that never wait: tokio frees what a closed socket had in its reactor when the reactor
/// runs, and that is when tasks give way.
async fn give_way() {
    consume_budget().await;
}

struct Pair(usize);

impl Guest for Pair {
    async fn operate(&mut self) -> io::Result<()> {
        Trip::new(self.0).await?.operate().await
    }
}

/// A socket that sends requests and one that replies.
struct Trip {
    a: UdpSocket,
    b: UdpSocket,
    b_addr: SocketAddr,
    bytes: usize,
}

impl Trip {
    async fn new(bytes: usize) -> io::Result<Self> {
        let (a, b) = (bind(Ipv4Addr::LOCALHOST).await?, bind(Ipv4Addr::LOCALHOST).await?);
        let b_addr = b.local_addr()?;
        Ok(Self { a, b, b_addr, bytes })
    }
}

impl Guest for Trip {
    async fn operate(&mut self) -> io::Result<()> {
        let mut buffer = [0; BYTES_MAX];
        self.a.send_to(&ZEROS[..self.bytes], self.b_addr).await?;
        answer(&self.b, &mut buffer).await?;
        let (len, _) = self.a.recv_from(&mut buffer).await?;
        expect_bytes(len, self.bytes)
    }
}

/// Sends a datagram back to where it came from.
async fn answer(server: &UdpSocket, bytes: &mut [u8]) -> io::Result<()> {
    let (len, from) = server.recv_from(bytes).await?;
    server.send_to(&bytes[..len], from).await?;
    Ok(())
}

/// A server; a client's cycle is one question.
struct Dns {
    server: UdpSocket,
    addr: SocketAddr,
    bytes: usize,
}

impl Dns {
    async fn new(bytes: usize) -> io::Result<Self> {
        let server = bind(Ipv4Addr::LOCALHOST).await?;
        let addr = server.local_addr()?;
        Ok(Self { server, addr, bytes })
    }
}

impl Guest for Dns {
    async fn operate(&mut self) -> io::Result<()> {
        let mut buffer = [0; BYTES_MAX];
        let client = bind(Ipv4Addr::LOCALHOST).await?;
        client.connect(self.addr).await?;
        client.send(&ZEROS[..self.bytes]).await?;
        answer(&self.server, &mut buffer).await?;
        expect_bytes(client.recv(&mut buffer).await?, self.bytes)
    }
}

/// A connected sender and its receiver. tokio has no sendmmsg(2): a system call for each datagram.
struct Batch {
    sender: UdpSocket,
    receiver: UdpSocket,
    bytes: usize,
    datagrams: usize,
}

impl Batch {
    async fn new(bytes: usize, datagrams: usize) -> io::Result<Self> {
        let sender = bind(Ipv4Addr::LOCALHOST).await?;
        let receiver = bind(Ipv4Addr::LOCALHOST).await?;
        sender.connect(receiver.local_addr()?).await?;
        Ok(Self { sender, receiver, bytes, datagrams })
    }
}

impl Guest for Batch {
    async fn operate(&mut self) -> io::Result<()> {
        let mut buffer = [0; BYTES_MAX];
        for _ in 0..self.datagrams {
            self.sender.send(&ZEROS[..self.bytes]).await?;
        }
        for _ in 0..self.datagrams {
            let (len, _) = self.receiver.recv_from(&mut buffer).await?;
            expect_bytes(len, self.bytes)?;
        }
        Ok(())
    }
}

/// A socket that requests datagrams, and receives them one by one.
struct Receive {
    socket: UdpSocket,
    source: SocketAddr,
    bytes: usize,
    datagrams: usize,
}

impl Guest for Receive {
    async fn operate(&mut self) -> io::Result<()> {
        let mut buffer = [0; BYTES_MAX];
        self.socket.send_to(&[0; REQUEST_BYTES], self.source).await?;
        for _ in 0..self.datagrams {
            let (len, _) = self.socket.recv_from(&mut buffer).await?;
            expect_bytes(len, self.bytes)?;
        }
        Ok(())
    }
}
