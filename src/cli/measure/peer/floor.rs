//! The floor under every figure: the ring's operations by themselves, without WebAssembly, without
//! tasks, and without anybody asking who may do what.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Wake, Waker};

use super::{Operation, Program, REQUEST_BYTES, RingArgs, Setting, expect_bytes};
use crate::datagram::{Family, Outgoing, RawAddr};
use crate::error::Errno;
use crate::ring::inbox::{Inbox, InboxLimits};
use crate::ring::op::{BindOp, Op, SocketOption};
use crate::ring::send::SendOp;
use crate::ring::slots::{Room, SlotIndex};
use crate::ring::table::OpKey;
use crate::ring::{Done, Gate, Ring, probe};

/// Enters that a datagram on loopback may take to arrive.
const LOOKS_MAX: u32 = 1000;

const LOOPBACK: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);

/// There is no `create`, for an unbound socket is nothing to the ring.
pub(super) fn program(setting: &Setting<'_>) -> io::Result<Option<Box<dyn Program>>> {
    let Setting { bench, guests, .. } = *setting;
    let bare = || Bare::new(bench.bytes, setting.ring);
    Ok(Some(match bench.operation {
        Operation::Create => return Ok(None),
        Operation::Bind => Box::new(Bind { bare: bare()?, guests, addr: LOOPBACK.into() }),
        Operation::Bind6 => {
            Box::new(Bind { bare: bare()?, guests, addr: (Ipv6Addr::LOCALHOST, 0).into() })
        }
        Operation::Pair => Box::new(Pair { bare: bare()?, guests }),
        Operation::Dns => Box::new(Dns::new(bare()?, guests)?),
        Operation::Echo => Box::new(Echo::new(bare()?, guests)?),
        Operation::Batch => Box::new(Batch::new(bare()?, bench.datagrams, guests)?),
        Operation::Receive => Box::new(Receive::new(bare()?, setting)?),
    }))
}

/// A ring whose only thread is this one.
struct Bare {
    ring: Ring,
    gate: Gate,
    room: Arc<Room>,
    /// Of the one owner of all sockets.
    quota: Arc<Room>,
    /// Of a datagram.
    bytes: usize,
}

/// A bound socket that listens.
struct Open {
    slot: SlotIndex,
    inbox: Arc<Inbox>,
}

impl Open {
    /// A datagram that has been booked.
    fn heard(&self) -> io::Result<Option<(Vec<u8>, SocketAddr)>> {
        match self.inbox.take_first() {
            (Some(Ok(datagram)), _) => Ok(Some((datagram.payload, datagram.from))),
            (Some(Err(Errno(errno))), _) => Err(io::Error::from_raw_os_error(errno)),
            (None, _) => Ok(None),
        }
    }
}

impl Bare {
    fn new(bytes: usize, RingArgs { sockets, recycle }: RingArgs) -> io::Result<Self> {
        let probe::Built { mut ring, room, .. } =
            probe::build(sockets, recycle).map_err(io::Error::other)?;
        // Nobody sleeps but in the kernel.
        ring.stop_listening();
        Ok(Self { gate: ring.gate(), ring, room, quota: Room::new(sockets), bytes })
    }

    /// Brings what was pushed to the kernel, and books what it answers.
    fn enter(&mut self) -> io::Result<()> {
        loop {
            let entries = self.ring.ready_to_enter();
            if entries == 0 {
                return Ok(());
            }
            self.enter_with(entries, None)?;
        }
    }

    /// The same once, however little was pushed, and for as many completions at least.
    fn enter_for(&mut self, completions: u32) -> io::Result<()> {
        let entries = self.ring.ready_to_enter();
        self.enter_with(entries, Some(completions))
    }

    fn enter_with(&mut self, entries: u32, completions: Option<u32>) -> io::Result<()> {
        let taken = match self.gate.enter(entries, completions) {
            // A debugger, or a stopped job that goes on.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            taken => taken?,
        };
        self.ring.stats.enters += 1;
        self.ring.stats.submissions += u64::from(taken);
        self.ring.complete_all();
        Ok(())
    }

    fn done(&mut self, key: OpKey) -> io::Result<Done> {
        match self.ring.fetch(key, None) {
            Some(Done { error: Some(Errno(errno)), .. }) => {
                Err(io::Error::from_raw_os_error(errno))
            }
            Some(done) => Ok(done),
            None => Err(io::Error::other("an operation was not done at once")),
        }
    }

    fn all_done(&mut self, keys: impl IntoIterator<Item = OpKey>) -> io::Result<()> {
        keys.into_iter().try_for_each(|key| self.done(key).map(drop))
    }

    fn bind(&mut self, addr: SocketAddr) -> io::Result<(SlotIndex, OpKey)> {
        if !(self.quota.take() && self.room.take()) {
            return Err(io::Error::other("the table is full"));
        }
        let (family, options) = match addr {
            SocketAddr::V4(_) => (Family::V4, Vec::new()),
            SocketAddr::V6(_) => (Family::V6, vec![SocketOption::V6ONLY]),
        };
        Ok(self.ring.submit_bind(None, Box::new(BindOp::new(family, options, addr))))
    }

    /// Binds as many sockets and arms their receives.
    fn open(&mut self, sockets: usize) -> io::Result<Vec<Open>> {
        let binds =
            (0..sockets).map(|_| self.bind(LOOPBACK.into())).collect::<io::Result<Vec<_>>>()?;
        self.enter()?;
        let opened = binds.into_iter().map(|(slot, key)| {
            self.done(key)?;
            Ok(self.listen(slot))
        });
        opened.collect()
    }

    fn listen(&mut self, slot: SlotIndex) -> Open {
        let most = InboxLimits { datagrams: usize::MAX, bytes: usize::MAX };
        let inbox = Arc::new(Inbox::new(most));
        self.ring.arm(slot, &inbox);
        Open { slot, inbox }
    }

    /// Where a socket is bound, as a guest's `local-address` learns it.
    fn local_addr(&mut self, slot: SlotIndex) -> io::Result<SocketAddr> {
        let key = self.ring.submit(slot, Op::Install);
        self.enter()?;
        let descriptor = self.done(key)?.descriptor;
        let descriptor = descriptor.ok_or_else(|| io::Error::other("no descriptor"))?;
        UdpSocket::from(descriptor).local_addr()
    }

    fn connect(&mut self, slot: SlotIndex, to: SocketAddr) -> OpKey {
        self.ring.submit(slot, Op::Connect(Box::new(RawAddr::from(to))))
    }

    fn send(&mut self, slot: SlotIndex, payload: Vec<u8>, to: Option<SocketAddr>) -> OpKey {
        let datagram = Outgoing { payload, to: to.map(RawAddr::from) };
        self.ring.submit(slot, Op::Send(SendOp::new(vec![datagram])))
    }

    /// The next datagram of a socket, which is on its way over loopback.
    fn hear(&mut self, open: &Open) -> io::Result<(Vec<u8>, SocketAddr)> {
        for _ in 0..LOOKS_MAX {
            if let Some(datagram) = open.heard()? {
                return Ok(datagram);
            }
            self.enter_for(0)?;
        }
        Err(io::Error::other("a datagram did not arrive"))
    }

    fn close(&mut self, slot: SlotIndex) {
        let quota = Arc::clone(&self.quota);
        self.ring.close(slot, &quota, 0);
    }
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
            for (slot, key) in binds {
                bare.done(key)?;
                bare.close(slot);
            }
        }
        bare.enter()
    }

    fn enters(&self) -> Option<u64> {
        Some(self.bare.ring.stats.enters)
    }
}

/// Asks of some sockets, answers of others, each to whom it was asked by.
fn exchange(bare: &mut Bare, askers: &[Open], answerers: &[(Open, SocketAddr)]) -> io::Result<()> {
    let asked: Vec<_> = askers
        .iter()
        .zip(answerers)
        .map(|(asker, (_, to))| {
            let payload = vec![0; bare.bytes];
            bare.send(asker.slot, payload, Some(*to))
        })
        .collect();
    bare.enter()?;
    bare.all_done(asked)?;
    let mut answered = Vec::with_capacity(answerers.len());
    for (answerer, _) in answerers {
        let (payload, from) = bare.hear(answerer)?;
        answered.push(bare.send(answerer.slot, payload, Some(from)));
    }
    bare.enter()?;
    bare.all_done(answered)?;
    askers.iter().try_for_each(|asker| bare.hear(asker).map(drop))
}

/// Sockets with the addresses they are bound to.
fn named(bare: &mut Bare, sockets: Vec<Open>) -> io::Result<Vec<(Open, SocketAddr)>> {
    let name = |open: Open| {
        let addr = bare.local_addr(open.slot)?;
        Ok((open, addr))
    };
    sockets.into_iter().map(name).collect()
}

struct Pair {
    bare: Bare,
    guests: usize,
}

impl Program for Pair {
    fn run(&mut self, count: usize) -> io::Result<()> {
        let Self { bare, guests } = self;
        for _ in 0..count {
            let askers = bare.open(*guests)?;
            let answerers = bare.open(*guests)?;
            let answerers = named(bare, answerers)?;
            exchange(bare, &askers, &answerers)?;
            let answerers = answerers.iter().map(|(open, _)| open);
            askers.iter().chain(answerers).for_each(|open| bare.close(open.slot));
        }
        bare.enter()
    }

    fn enters(&self) -> Option<u64> {
        Some(self.bare.ring.stats.enters)
    }
}

struct Echo {
    bare: Bare,
    askers: Vec<Open>,
    answerers: Vec<(Open, SocketAddr)>,
}

impl Echo {
    fn new(mut bare: Bare, guests: usize) -> io::Result<Self> {
        let askers = bare.open(guests)?;
        let answerers = bare.open(guests)?;
        let answerers = named(&mut bare, answerers)?;
        bare.enter()?;
        Ok(Self { bare, askers, answerers })
    }
}

impl Program for Echo {
    fn run(&mut self, count: usize) -> io::Result<()> {
        (0..count).try_for_each(|_| exchange(&mut self.bare, &self.askers, &self.answerers))
    }

    fn enters(&self) -> Option<u64> {
        Some(self.bare.ring.stats.enters)
    }
}

/// A server for each client; a client's life is one question.
struct Dns {
    bare: Bare,
    servers: Vec<(Open, SocketAddr)>,
}

impl Dns {
    fn new(mut bare: Bare, guests: usize) -> io::Result<Self> {
        let servers = bare.open(guests)?;
        let servers = named(&mut bare, servers)?;
        bare.enter()?;
        Ok(Self { bare, servers })
    }
}

impl Program for Dns {
    fn run(&mut self, count: usize) -> io::Result<()> {
        let Self { bare, servers } = self;
        for _ in 0..count {
            let clients = bare.open(servers.len())?;
            let connected: Vec<_> = clients
                .iter()
                .zip(&*servers)
                .map(|(client, (_, to))| bare.connect(client.slot, *to))
                .collect();
            bare.enter()?;
            bare.all_done(connected)?;
            exchange(bare, &clients, servers)?;
            for client in clients {
                bare.close(client.slot);
            }
        }
        bare.enter()
    }

    fn enters(&self) -> Option<u64> {
        Some(self.bare.ring.stats.enters)
    }
}

/// A connected sender for each receiver.
struct Batch {
    bare: Bare,
    datagrams: usize,
    pairs: Vec<(SlotIndex, Open)>,
}

impl Batch {
    fn new(mut bare: Bare, datagrams: usize, guests: usize) -> io::Result<Self> {
        let senders = bare.open(guests)?;
        let receivers = bare.open(guests)?;
        let mut pairs = Vec::new();
        for (sender, (receiver, addr)) in senders.iter().zip(named(&mut bare, receivers)?) {
            let connected = bare.connect(sender.slot, addr);
            bare.enter()?;
            bare.done(connected)?;
            pairs.push((sender.slot, receiver));
        }
        Ok(Self { bare, datagrams, pairs })
    }
}

impl Program for Batch {
    fn run(&mut self, count: usize) -> io::Result<()> {
        let Self { bare, datagrams, pairs } = self;
        for _ in 0..count {
            for (sender, receiver) in &*pairs {
                let datagram = |_| Outgoing { payload: vec![0; bare.bytes], to: None };
                let batch = (0..*datagrams).map(datagram).collect();
                let sent = bare.ring.submit(*sender, Op::Send(SendOp::new(batch)));
                bare.enter()?;
                bare.done(sent)?;
                for _ in 0..*datagrams {
                    bare.hear(receiver)?;
                }
            }
        }
        Ok(())
    }

    fn enters(&self) -> Option<u64> {
        Some(self.bare.ring.stats.enters)
    }
}

/// Receivers, each of which asks for a batch at a time.
struct Receive {
    bare: Bare,
    datagrams: usize,
    receivers: Vec<Receiver>,
    ready: Arc<Ready>,
}

struct Receiver {
    open: Open,
    source: SocketAddr,
    waker: Waker,
}

/// Receivers that something has come for.
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
        let receivers = bare.open(setting.guests)?.into_iter().enumerate().map(|(at, open)| {
            let waker = Waker::from(Arc::new(Arrival { receiver: at, ready: Arc::clone(&ready) }));
            open.inbox.wake_on_arrival(&waker);
            Receiver { open, source: setting.source.addr(at), waker }
        });
        let receivers = receivers.collect();
        bare.enter()?;
        Ok(Self { bare, datagrams: setting.bench.datagrams, receivers, ready })
    }

    fn ask(&mut self, receivers: &[usize]) -> io::Result<()> {
        let bare = &mut self.bare;
        let asked = receivers.iter().map(|at| {
            let Receiver { open, source, .. } = &self.receivers[*at];
            bare.send(open.slot, vec![0; REQUEST_BYTES], Some(*source))
        });
        let asked: Vec<_> = asked.collect();
        bare.enter()?;
        bare.all_done(asked)
    }

    /// Receivers that are ready, once there is one.
    fn next_ready(&mut self) -> io::Result<Vec<usize>> {
        let mut wakers = Vec::new();
        self.bare.ring.take_wakers(&mut wakers);
        if wakers.is_empty() {
            self.bare.enter_for(1)?;
            self.bare.ring.take_wakers(&mut wakers);
        }
        wakers.into_iter().for_each(Waker::wake);
        Ok(std::mem::take(&mut *self.ready.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

impl Program for Receive {
    fn run(&mut self, count: usize) -> io::Result<()> {
        let mut left = vec![count * self.datagrams; self.receivers.len()];
        let mut receiving = left.len();
        let mut asking: Vec<_> = (0..left.len()).collect();
        while receiving > 0 {
            self.ask(&asking)?;
            asking.clear();
            for at in self.next_ready()? {
                let Receiver { open, waker, .. } = &self.receivers[at];
                while let Some((payload, _)) = open.heard()? {
                    expect_bytes(payload.len(), self.bare.bytes)?;
                    left[at] -= 1;
                }
                open.inbox.wake_on_arrival(waker);
                if left[at] == 0 {
                    receiving -= 1;
                } else if left[at].is_multiple_of(self.datagrams) {
                    asking.push(at);
                }
            }
        }
        Ok(())
    }

    fn enters(&self) -> Option<u64> {
        Some(self.bare.ring.stats.enters)
    }
}
