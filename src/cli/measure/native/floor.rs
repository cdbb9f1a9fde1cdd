//! The floor under every figure: the ring's operations by themselves, without WebAssembly, without
//! tasks and without address checks.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Wake, Waker};

use wasi_uring::bare::{Bare, Incoming, Queued, Socket};

use super::{Operation, Program, REQUEST_BYTES, Setting, expect_bytes};

/// Enters that a datagram on loopback may take to arrive.
const ENTERS_MAX: u32 = 1000;

const LOOPBACK: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);

/// There is no `create`, because the ring has no unbound sockets.
pub(super) fn program(setting: &Setting<'_>) -> io::Result<Option<Box<dyn Program>>> {
    let Setting { bench, guests, .. } = *setting;
    let bytes = bench.bytes;
    let bare = || Bare::new(setting.ring.sockets, setting.ring.recycle);
    Ok(Some(match bench.operation {
        Operation::Create => return Ok(None),
        Operation::Bind => Box::new(Bind { bare: bare()?, guests, addr: LOOPBACK.into() }),
        Operation::Bind6 => {
            Box::new(Bind { bare: bare()?, guests, addr: (Ipv6Addr::LOCALHOST, 0).into() })
        }
        Operation::Pair => Box::new(Pair { bare: bare()?, bytes, guests }),
        Operation::Dns => Box::new(Dns::new(bare()?, bytes, guests)?),
        Operation::Echo => Box::new(Echo::new(bare()?, bytes, guests)?),
        Operation::Batch | Operation::Burst => {
            Box::new(Batch::new(bare()?, bytes, bench.datagrams, guests)?)
        }
        Operation::Receive => Box::new(Receive::new(bare()?, setting)?),
    }))
}

/// A bound socket that receives.
struct Open {
    socket: Socket,
    incoming: Incoming,
}

fn finish_all(bare: &mut Bare, queued: impl IntoIterator<Item = Queued>) -> io::Result<()> {
    queued.into_iter().try_for_each(|queued| bare.finish(queued))
}

/// Binds as many sockets and arms their receives.
fn open(bare: &mut Bare, sockets: usize) -> io::Result<Vec<Open>> {
    let binds = (0..sockets).map(|_| bare.bind(LOOPBACK.into())).collect::<io::Result<Vec<_>>>()?;
    bare.enter()?;
    let opened = binds.into_iter().map(|(socket, bound)| {
        bare.finish(bound)?;
        Ok(Open { socket, incoming: bare.receive(socket) })
    });
    opened.collect()
}

/// The next datagram of a socket, which is on its way over loopback.
fn receive(bare: &mut Bare, open: &Open) -> io::Result<(Vec<u8>, SocketAddr)> {
    for _ in 0..ENTERS_MAX {
        if let Some(datagram) = open.incoming.take()? {
            return Ok(datagram);
        }
        bare.enter_for(0)?;
    }
    Err(io::Error::other("a datagram did not arrive"))
}

struct Bind {
    bare: Bare,
    guests: usize,
    addr: SocketAddr,
}

impl Program for Bind {
    fn run(&mut self, count: usize) -> io::Result<()> {
        let Self { bare, guests, addr } = self;
        for _ in 0..count {
            let binds = (0..*guests).map(|_| bare.bind(*addr)).collect::<io::Result<Vec<_>>>()?;
            bare.enter()?;
            for (socket, bound) in binds {
                bare.finish(bound)?;
                bare.close(socket);
            }
        }
        bare.enter()
    }

    fn enters(&self) -> Option<u64> {
        Some(self.bare.enters())
    }
}

/// A datagram from each client to its server, and one back.
fn exchange(
    bare: &mut Bare,
    bytes: usize,
    clients: &[Open],
    servers: &[(Open, SocketAddr)],
) -> io::Result<()> {
    let requests: Vec<_> = clients
        .iter()
        .zip(servers)
        .map(|(client, (_, to))| bare.send(client.socket, [vec![0; bytes]], Some(*to)))
        .collect();
    bare.enter()?;
    finish_all(bare, requests)?;
    let mut answers = Vec::with_capacity(servers.len());
    for (server, _) in servers {
        let (payload, from) = receive(bare, server)?;
        answers.push(bare.send(server.socket, [payload], Some(from)));
    }
    bare.enter()?;
    finish_all(bare, answers)?;
    clients.iter().try_for_each(|client| receive(bare, client).map(drop))
}

/// Sockets with the addresses they are bound to.
fn named(bare: &mut Bare, sockets: Vec<Open>) -> io::Result<Vec<(Open, SocketAddr)>> {
    let name = |open: Open| {
        let addr = bare.local_addr(open.socket)?;
        Ok((open, addr))
    };
    sockets.into_iter().map(name).collect()
}

struct Pair {
    bare: Bare,
    bytes: usize,
    guests: usize,
}

impl Program for Pair {
    fn run(&mut self, count: usize) -> io::Result<()> {
        let Self { bare, bytes, guests } = self;
        for _ in 0..count {
            let clients = open(bare, *guests)?;
            let servers = open(bare, *guests)?;
            let servers = named(bare, servers)?;
            exchange(bare, *bytes, &clients, &servers)?;
            let servers = servers.iter().map(|(open, _)| open);
            clients.iter().chain(servers).for_each(|open| bare.close(open.socket));
        }
        bare.enter()
    }

    fn enters(&self) -> Option<u64> {
        Some(self.bare.enters())
    }
}

struct Echo {
    bare: Bare,
    bytes: usize,
    clients: Vec<Open>,
    servers: Vec<(Open, SocketAddr)>,
}

impl Echo {
    fn new(mut bare: Bare, bytes: usize, guests: usize) -> io::Result<Self> {
        let clients = open(&mut bare, guests)?;
        let servers = open(&mut bare, guests)?;
        let servers = named(&mut bare, servers)?;
        bare.enter()?;
        Ok(Self { bare, bytes, clients, servers })
    }
}

impl Program for Echo {
    fn run(&mut self, count: usize) -> io::Result<()> {
        let Self { bare, bytes, clients, servers } = self;
        (0..count).try_for_each(|_| exchange(bare, *bytes, clients, servers))
    }

    fn enters(&self) -> Option<u64> {
        Some(self.bare.enters())
    }
}

/// A server for each client, which makes one request and closes.
struct Dns {
    bare: Bare,
    bytes: usize,
    servers: Vec<(Open, SocketAddr)>,
}

impl Dns {
    fn new(mut bare: Bare, bytes: usize, guests: usize) -> io::Result<Self> {
        let servers = open(&mut bare, guests)?;
        let servers = named(&mut bare, servers)?;
        bare.enter()?;
        Ok(Self { bare, bytes, servers })
    }
}

impl Program for Dns {
    fn run(&mut self, count: usize) -> io::Result<()> {
        let Self { bare, bytes, servers } = self;
        for _ in 0..count {
            let clients = open(bare, servers.len())?;
            let connected: Vec<_> = clients
                .iter()
                .zip(&*servers)
                .map(|(client, (_, to))| bare.connect(client.socket, *to))
                .collect();
            bare.enter()?;
            finish_all(bare, connected)?;
            exchange(bare, *bytes, &clients, servers)?;
            for client in clients {
                bare.close(client.socket);
            }
        }
        bare.enter()
    }

    fn enters(&self) -> Option<u64> {
        Some(self.bare.enters())
    }
}

/// A connected sender for each receiver.
struct Batch {
    bare: Bare,
    bytes: usize,
    datagrams: usize,
    pairs: Vec<(Socket, Open)>,
}

impl Batch {
    fn new(mut bare: Bare, bytes: usize, datagrams: usize, guests: usize) -> io::Result<Self> {
        let senders = open(&mut bare, guests)?;
        let receivers = open(&mut bare, guests)?;
        let mut pairs = Vec::new();
        for (sender, (receiver, addr)) in senders.iter().zip(named(&mut bare, receivers)?) {
            let connected = bare.connect(sender.socket, addr);
            bare.enter()?;
            bare.finish(connected)?;
            pairs.push((sender.socket, receiver));
        }
        Ok(Self { bare, bytes, datagrams, pairs })
    }
}

impl Program for Batch {
    fn run(&mut self, count: usize) -> io::Result<()> {
        let Self { bare, bytes, datagrams, pairs } = self;
        for _ in 0..count {
            for (sender, receiver) in &*pairs {
                let payloads = (0..*datagrams).map(|_| vec![0; *bytes]);
                let sent = bare.send(*sender, payloads, None);
                bare.enter()?;
                bare.finish(sent)?;
                for _ in 0..*datagrams {
                    receive(bare, receiver)?;
                }
            }
        }
        Ok(())
    }

    fn enters(&self) -> Option<u64> {
        Some(self.bare.enters())
    }
}

/// Receivers, each of which requests a batch at a time.
struct Receive {
    bare: Bare,
    bytes: usize,
    datagrams: usize,
    receivers: Vec<Receiver>,
    ready: Arc<Ready>,
}

struct Receiver {
    open: Open,
    source: SocketAddr,
    waker: Waker,
}

/// Receivers that a datagram has come for.
type Ready = Mutex<Vec<usize>>;

/// Makes a receiver ready.
struct Arrival {
    receiver: usize,
    ready: Arc<Ready>,
}

impl Wake for Arrival {
    fn wake(self: Arc<Self>) {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner).push(self.receiver);
    }
}

impl Receive {
    fn new(mut bare: Bare, setting: &Setting<'_>) -> io::Result<Self> {
        let ready = Arc::default();
        let opened = open(&mut bare, setting.guests)?;
        let receivers = opened.into_iter().enumerate().map(|(at, open)| {
            let waker = Waker::from(Arc::new(Arrival { receiver: at, ready: Arc::clone(&ready) }));
            open.incoming.wake_on_arrival(&waker);
            Receiver { open, source: setting.source.addr(at), waker }
        });
        let receivers = receivers.collect();
        bare.enter()?;
        let Setting { bench, .. } = setting;
        Ok(Self { bare, bytes: bench.bytes, datagrams: bench.datagrams, receivers, ready })
    }

    fn request(&mut self, receivers: &[usize]) -> io::Result<()> {
        let bare = &mut self.bare;
        let requests = receivers.iter().map(|at| {
            let Receiver { open, source, .. } = &self.receivers[*at];
            bare.send(open.socket, [vec![0; REQUEST_BYTES]], Some(*source))
        });
        let requests: Vec<_> = requests.collect();
        bare.enter()?;
        finish_all(bare, requests)
    }

    /// Receivers that are ready, once there is one.
    fn next_ready(&mut self) -> io::Result<Vec<usize>> {
        let mut wakers = Vec::new();
        self.bare.take_wakers(&mut wakers);
        if wakers.is_empty() {
            self.bare.enter_for(1)?;
            self.bare.take_wakers(&mut wakers);
        }
        wakers.into_iter().for_each(Waker::wake);
        Ok(std::mem::take(&mut *self.ready.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

impl Program for Receive {
    fn run(&mut self, count: usize) -> io::Result<()> {
        let mut left = vec![count * self.datagrams; self.receivers.len()];
        let mut receiving = left.len();
        let mut requesting: Vec<_> = (0..left.len()).collect();
        while receiving > 0 {
            self.request(&requesting)?;
            requesting.clear();
            for at in self.next_ready()? {
                let Receiver { open, waker, .. } = &self.receivers[at];
                while let Some((payload, _)) = open.incoming.take()? {
                    expect_bytes(payload.len(), self.bytes)?;
                    left[at] -= 1;
                }
                open.incoming.wake_on_arrival(waker);
                if left[at] == 0 {
                    receiving -= 1;
                } else if left[at].is_multiple_of(self.datagrams) {
                    requesting.push(at);
                }
            }
        }
        Ok(())
    }

    fn enters(&self) -> Option<u64> {
        Some(self.bare.enters())
    }
}
