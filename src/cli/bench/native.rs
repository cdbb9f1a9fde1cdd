//! What the built-in guest does, as a plain Rust program would: the yardstick without WebAssembly
//! and without io_uring.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    AddressFamily, MsgFlags, MultiHeaders, SockFlag, SockType, SockaddrStorage, recvmmsg, sendmmsg,
    socket,
};

use super::super::measure::{Sample, Stopwatch, Work};

const ECHO_BYTES: usize = 64;
const BATCH_BYTES: usize = 1200;
const BATCH_DATAGRAMS: usize = 16;

/// Measures a program that does what the guests of some work do.
pub(super) fn run(work: &Work) -> io::Result<Sample> {
    let mut program = program(work.mode, work.guests)?;
    let stopwatch = Stopwatch::start();
    program.run(work.count)?;
    Ok(stopwatch.sample())
}

/// A mode's program. What guests do once, before they begin to count, is done when this returns.
fn program(mode: &str, guests: usize) -> io::Result<Box<dyn Program>> {
    Ok(match mode {
        "create" => Box::new(Lives { guests, life: create }),
        "bind" => Box::new(Lives { guests, life: || bind(Ipv4Addr::LOCALHOST).map(drop) }),
        "bind6" => Box::new(Lives { guests, life: || bind(Ipv6Addr::LOCALHOST).map(drop) }),
        "pair" => Box::new(Lives { guests, life: pair }),
        "echo" => Box::new(Echo::new(guests)?),
        "dns" => Box::new(Dns::new(guests)?),
        "batch" => Box::new(Batch::new(guests)?),
        _ => return Err(io::Error::other("there is no such native program")),
    })
}

trait Program {
    /// As often for each guest.
    fn run(&mut self, count: usize) -> io::Result<()>;
}

/// Lives that leave nothing behind.
struct Lives<F> {
    guests: usize,
    life: F,
}

impl<F: Fn() -> io::Result<()>> Program for Lives<F> {
    fn run(&mut self, count: usize) -> io::Result<()> {
        (0..count * self.guests).try_for_each(|_| (self.life)())
    }
}

fn create() -> io::Result<()> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Inet, SockType::Datagram, flags, None)?;
    Ok(())
}

fn bind(ip: impl Into<std::net::IpAddr>) -> io::Result<UdpSocket> {
    UdpSocket::bind(SocketAddr::new(ip.into(), 0))
}

fn pair() -> io::Result<()> {
    let (a, b) = (bind(Ipv4Addr::LOCALHOST)?, bind(Ipv4Addr::LOCALHOST)?);
    let mut bytes = [0; ECHO_BYTES];
    a.send_to(&bytes, b.local_addr()?)?;
    let (len, from) = b.recv_from(&mut bytes)?;
    b.send_to(&bytes[..len], from)?;
    a.recv_from(&mut bytes)?;
    Ok(())
}

/// A server for each client; a client's life is one question.
struct Dns {
    servers: Vec<(UdpSocket, SocketAddr)>,
}

impl Dns {
    fn new(guests: usize) -> io::Result<Self> {
        let server = |_| {
            let socket = bind(Ipv4Addr::LOCALHOST)?;
            let addr = socket.local_addr()?;
            Ok((socket, addr))
        };
        Ok(Self { servers: (0..guests).map(server).collect::<io::Result<_>>()? })
    }
}

impl Program for Dns {
    fn run(&mut self, count: usize) -> io::Result<()> {
        let mut bytes = [0; ECHO_BYTES];
        for _ in 0..count {
            for (server, addr) in &self.servers {
                let client = bind(Ipv4Addr::LOCALHOST)?;
                client.connect(addr)?;
                client.send(&bytes)?;
                let (len, from) = server.recv_from(&mut bytes)?;
                server.send_to(&bytes[..len], from)?;
                client.recv(&mut bytes)?;
            }
        }
        Ok(())
    }
}

/// Pairs of sockets behind one epoll, as an event loop has them.
struct Echo {
    epoll: Epoll,
    /// Those who ask at even places, those who answer at odd ones.
    sockets: Vec<UdpSocket>,
    answerers: Vec<SocketAddr>,
}

impl Echo {
    fn new(guests: usize) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let (mut sockets, mut answerers) = (Vec::new(), Vec::new());
        for at in 0..2 * guests {
            let socket = bind(Ipv4Addr::LOCALHOST)?;
            socket.set_nonblocking(true)?;
            epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, at as u64))?;
            if at % 2 == 1 {
                answerers.push(socket.local_addr()?);
            }
            sockets.push(socket);
        }
        Ok(Self { epoll, sockets, answerers })
    }
}

impl Program for Echo {
    fn run(&mut self, count: usize) -> io::Result<()> {
        let mut bytes = [0; ECHO_BYTES];
        let mut trips_left = vec![count; self.answerers.len()];
        let ask = |pair: usize| {
            self.sockets[2 * pair].send_to(&[0; ECHO_BYTES], self.answerers[pair]).map(drop)
        };
        (0..trips_left.len()).try_for_each(ask)?;
        let mut left = count * trips_left.len();
        let mut events = [EpollEvent::empty(); 64];
        while left > 0 {
            let ready = self.epoll.wait(&mut events, EpollTimeout::NONE)?;
            for event in &events[..ready] {
                let at = usize::try_from(event.data()).map_err(io::Error::other)?;
                let (len, from) = self.sockets[at].recv_from(&mut bytes)?;
                if at % 2 == 1 {
                    self.sockets[at].send_to(&bytes[..len], from)?;
                    continue;
                }
                left -= 1;
                trips_left[at / 2] -= 1;
                if trips_left[at / 2] > 0 {
                    ask(at / 2)?;
                }
            }
        }
        Ok(())
    }
}

/// A connected sender for each receiver: sendmmsg(2), recvmmsg(2).
struct Batch {
    pairs: Vec<(UdpSocket, UdpSocket)>,
}

impl Batch {
    fn new(guests: usize) -> io::Result<Self> {
        let pair = |_| {
            let (sender, receiver) = (bind(Ipv4Addr::LOCALHOST)?, bind(Ipv4Addr::LOCALHOST)?);
            sender.connect(receiver.local_addr()?)?;
            Ok((sender, receiver))
        };
        Ok(Self { pairs: (0..guests).map(pair).collect::<io::Result<_>>()? })
    }
}

impl Program for Batch {
    fn run(&mut self, count: usize) -> io::Result<()> {
        let outgoing = [0; BATCH_BYTES];
        let outgoing = [[IoSlice::new(&outgoing)]; BATCH_DATAGRAMS];
        let mut incoming = vec![[0; BATCH_BYTES]; BATCH_DATAGRAMS];
        let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(BATCH_DATAGRAMS, None);
        let flags = MsgFlags::empty();
        for _ in 0..count {
            for (sender, receiver) in &self.pairs {
                // To the connected peer.
                let addrs = [None; BATCH_DATAGRAMS];
                sendmmsg(sender.as_raw_fd(), &mut headers, &outgoing, addrs, [], flags)?;
                let mut incoming: Vec<_> =
                    incoming.iter_mut().map(|bytes| [IoSliceMut::new(bytes)]).collect();
                let fd = receiver.as_raw_fd();
                let received = recvmmsg(fd, &mut headers, &mut incoming, flags, None)?.count();
                if received != BATCH_DATAGRAMS {
                    return Err(io::Error::other(format!("{received} datagrams of a batch")));
                }
            }
        }
        Ok(())
    }
}
