//! As a plain Rust program would do it.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    AddressFamily, MsgFlags, MultiHeaders, SockFlag, SockType, SockaddrStorage, recvmmsg, sendmmsg,
    socket,
};

use super::{BYTES_MAX, Operation, Program, REQUEST_BYTES, Setting, ZEROS, expect_bytes, wait};

pub(super) fn program(setting: &Setting<'_>) -> io::Result<Option<Box<dyn Program>>> {
    let Setting { bench, guests, .. } = *setting;
    let (bytes, datagrams) = (bench.bytes, bench.datagrams);
    Ok(Some(match bench.operation {
        Operation::Create => Box::new(Cycles { guests, cycle: create }),
        Operation::Bind => {
            Box::new(Cycles { guests, cycle: || bind(Ipv4Addr::LOCALHOST).map(drop) })
        }
        Operation::Bind6 => {
            Box::new(Cycles { guests, cycle: || bind(Ipv6Addr::LOCALHOST).map(drop) })
        }
        Operation::Pair => Box::new(Cycles { guests, cycle: move || pair(bytes) }),
        Operation::Dns => Box::new(Dns::new(bytes, guests)?),
        Operation::Echo => Box::new(Echo::new(bytes, guests)?),
        Operation::Batch | Operation::Burst => {
            let is_one_by_one = bench.operation == Operation::Burst;
            Box::new(Batch::new(datagrams, bytes, is_one_by_one, guests)?)
        }
        Operation::Receive => Box::new(Receive::new(setting)?),
    }))
}

/// Cycles that leave nothing behind.
struct Cycles<F> {
    guests: usize,
    cycle: F,
}

impl<F: Fn() -> io::Result<()>> Program for Cycles<F> {
    fn run(&mut self, count: usize) -> io::Result<()> {
        (0..count * self.guests).try_for_each(|_| (self.cycle)())
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

fn pair(bytes: usize) -> io::Result<()> {
    let (a, b) = (bind(Ipv4Addr::LOCALHOST)?, bind(Ipv4Addr::LOCALHOST)?);
    let mut buffer = [0; BYTES_MAX];
    a.send_to(&ZEROS[..bytes], b.local_addr()?)?;
    let (len, from) = b.recv_from(&mut buffer)?;
    b.send_to(&buffer[..len], from)?;
    expect_bytes(a.recv(&mut buffer)?, bytes)
}

/// A server for each client; a client's cycle is one question.
struct Dns {
    bytes: usize,
    servers: Vec<(UdpSocket, SocketAddr)>,
}

impl Dns {
    fn new(bytes: usize, guests: usize) -> io::Result<Self> {
        let server = |_| {
            let socket = bind(Ipv4Addr::LOCALHOST)?;
            let addr = socket.local_addr()?;
            Ok((socket, addr))
        };
        Ok(Self { bytes, servers: (0..guests).map(server).collect::<io::Result<_>>()? })
    }
}

impl Program for Dns {
    fn run(&mut self, count: usize) -> io::Result<()> {
        let mut buffer = [0; BYTES_MAX];
        for _ in 0..count {
            for (server, addr) in &self.servers {
                let client = bind(Ipv4Addr::LOCALHOST)?;
                client.connect(addr)?;
                client.send(&ZEROS[..self.bytes])?;
                let (len, from) = server.recv_from(&mut buffer)?;
                server.send_to(&buffer[..len], from)?;
                expect_bytes(client.recv(&mut buffer)?, self.bytes)?;
            }
        }
        Ok(())
    }
}

/// Pairs of sockets behind one epoll, as an event loop has them.
struct Echo {
    bytes: usize,
    epoll: Epoll,
    /// Sockets that send requests at even indices, sockets that reply at odd ones.
    sockets: Vec<UdpSocket>,
    answerers: Vec<SocketAddr>,
}

impl Echo {
    fn new(bytes: usize, guests: usize) -> io::Result<Self> {
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
        Ok(Self { bytes, epoll, sockets, answerers })
    }
}

impl Program for Echo {
    fn run(&mut self, count: usize) -> io::Result<()> {
        let mut bytes = vec![0; self.bytes];
        let question = bytes.clone();
        let mut trips_left = vec![count; self.answerers.len()];
        let ask =
            |pair: usize| self.sockets[2 * pair].send_to(&question, self.answerers[pair]).map(drop);
        (0..trips_left.len()).try_for_each(ask)?;
        let mut left = count * trips_left.len();
        let mut events = [EpollEvent::empty(); 64];
        while left > 0 {
            let ready = wait(&self.epoll, &mut events, EpollTimeout::NONE)?;
            for event in &events[..ready] {
                let at = usize::try_from(event.data()).map_err(io::Error::other)?;
                let (len, from) = self.sockets[at].recv_from(&mut bytes)?;
                expect_bytes(len, question.len())?;
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
    datagrams: usize,
    bytes: usize,
    /// send(2) for each, and not sendmmsg(2).
    is_one_by_one: bool,
    pairs: Vec<(UdpSocket, UdpSocket)>,
}

impl Batch {
    fn new(datagrams: usize, bytes: usize, is_one_by_one: bool, guests: usize) -> io::Result<Self> {
        let pair = |_| {
            let (sender, receiver) = (bind(Ipv4Addr::LOCALHOST)?, bind(Ipv4Addr::LOCALHOST)?);
            sender.connect(receiver.local_addr()?)?;
            Ok((sender, receiver))
        };
        let pairs = (0..guests).map(pair).collect::<io::Result<_>>()?;
        Ok(Self { datagrams, bytes, is_one_by_one, pairs })
    }
}

impl Program for Batch {
    fn run(&mut self, count: usize) -> io::Result<()> {
        let Self { datagrams, bytes, is_one_by_one, pairs } = self;
        let payload = vec![0; *bytes];
        let outgoing = vec![[IoSlice::new(&payload)]; *datagrams];
        let mut incoming = vec![vec![0; *bytes]; *datagrams];
        let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(*datagrams, None);
        let flags = MsgFlags::empty();
        // To the connected peer.
        let addrs = vec![None; *datagrams];
        for _ in 0..count {
            for (sender, receiver) in &*pairs {
                if *is_one_by_one {
                    for _ in 0..*datagrams {
                        sender.send(&payload)?;
                    }
                } else {
                    sendmmsg(sender.as_raw_fd(), &mut headers, &outgoing, &addrs, [], flags)?;
                }
                let mut incoming: Vec<_> =
                    incoming.iter_mut().map(|bytes| [IoSliceMut::new(bytes)]).collect();
                let fd = receiver.as_raw_fd();
                let received = recvmmsg(fd, &mut headers, &mut incoming, flags, None)?.count();
                if received != *datagrams {
                    return Err(io::Error::other(format!("{received} datagrams of a batch")));
                }
            }
        }
        Ok(())
    }
}

/// Receivers behind one epoll, each of which requests a batch at a time: recvmmsg(2).
struct Receive {
    datagrams: usize,
    bytes: usize,
    epoll: Epoll,
    receivers: Vec<(UdpSocket, SocketAddr)>,
}

impl Receive {
    fn new(setting: &Setting<'_>) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let receiver = |at: usize| {
            let socket = bind(Ipv4Addr::LOCALHOST)?;
            socket.set_nonblocking(true)?;
            epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, at as u64))?;
            Ok((socket, setting.source.addr(at)))
        };
        let receivers = (0..setting.guests).map(receiver).collect::<io::Result<_>>()?;
        let Setting { bench, .. } = setting;
        Ok(Self { datagrams: bench.datagrams, bytes: bench.bytes, epoll, receivers })
    }
}

impl Program for Receive {
    fn run(&mut self, count: usize) -> io::Result<()> {
        let Self { datagrams, bytes, epoll, receivers } = self;
        let ask = |receiver: usize| {
            let (socket, source) = &receivers[receiver];
            socket.send_to(&[0; REQUEST_BYTES], source).map(drop)
        };
        (0..receivers.len()).try_for_each(ask)?;
        let mut left = vec![count * *datagrams; receivers.len()];
        let mut receiving = receivers.len();
        let mut incoming = vec![vec![0; *bytes]; *datagrams];
        let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(*datagrams, None);
        let mut events = [EpollEvent::empty(); 64];
        while receiving > 0 {
            let ready = wait(epoll, &mut events, EpollTimeout::NONE)?;
            for event in &events[..ready] {
                let at = usize::try_from(event.data()).map_err(io::Error::other)?;
                let mut incoming: Vec<_> =
                    incoming.iter_mut().map(|bytes| [IoSliceMut::new(bytes)]).collect();
                let (fd, flags) = (receivers[at].0.as_raw_fd(), MsgFlags::empty());
                for datagram in recvmmsg(fd, &mut headers, &mut incoming, flags, None)? {
                    expect_bytes(datagram.bytes, *bytes)?;
                    left[at] -= 1;
                }
                if left[at] == 0 {
                    receiving -= 1;
                } else if left[at].is_multiple_of(*datagrams) {
                    ask(at)?;
                }
            }
        }
        Ok(())
    }
}
