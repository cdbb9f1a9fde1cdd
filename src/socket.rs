//! A guest's UDP socket: its state, how it is created and dropped, and its addresses. What a guest
//! does with it is in the files below: `bind`, `connect`, `options`, `send`, `receive`. They know
//! WASI's rules and the ring's operations, and nothing of Wasmtime.
//!
//! # Which calls meet
//!
//! One task polls all calls of a store, so two calls of a socket never run at once. Most calls hold
//! the store until they return, and no other comes between. `send_one` and `receive_one`, which WASI
//! 0.3 declares async, do not: while several of them are pending, any other call may run.
//!
//! # Locks
//!
//! The order is the socket's state, then the driver. Under the state's lock no waker is woken,
//! cloned or dropped, and no code of the host runs (policy and its verdicts, tracing subscriber). The driver wakes
//! tasks whenever it enters the kernel, so a future of the driver's that the state holds is taken out
//! of it to be polled, and put back while it is pending.

pub(crate) mod guest;
pub(crate) mod options;
pub(crate) mod policy;

mod bind;
mod connect;
mod receive;
mod send;

use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use smallvec::SmallVec;

use crate::datagram::Family;
use crate::driver::{Driver, Flush, InFlight};
use crate::error::{Errno, ErrorCode, RingGone};
use crate::limits::REACHED_MAX;
use crate::ring::account::{Account, Counters};
use crate::ring::op::{Op, OpResult, Output, SocketName, Whose};
use crate::ring::queues::SlotIndex;
use crate::ring::quota::Level;
use crate::ring::receive_queue::{Datagram, ReceiveQueue};
use crate::socket::guest::GuestCtx;
use crate::socket::policy::{AddrEvent, Judged, Question, SocketAddrUse};
use crate::sync::{Mutex, MutexGuard};

/// A UDP socket that lives in a slot of the ring's fixed-file table. Dropping it closes it.
pub(crate) struct UdpSocket {
    ctx: Arc<GuestCtx>,
    /// Among those of the guest.
    number: u64,
    /// Of the ring that it stays in.
    driver: Arc<Driver>,
    family: Family,
    /// Set by the first bind. From then on the slot's close gives back the socket's entry in the
    /// table and in the guest's quota, before that its drop does.
    slot: OnceLock<SlotIndex>,
    /// Made by the first call that receives.
    receiver: OnceLock<Box<Receiver>>,
    state: Mutex<State>,
    /// Calls of `send_one`, in their order; the first waits for the bind that it may begin with, or for
    /// send buffer.
    send_line: tokio::sync::Mutex<()>,
}

/// Where a socket's datagrams arrive.
struct Receiver {
    /// Shared with the ring, which queues datagrams in it.
    queue: Arc<ReceiveQueue>,
    /// Calls of `receive_one`, in their order; the first waits for the next arrival.
    line: tokio::sync::Mutex<()>,
    /// The first datagram, if it was taken from the queue and no call has it yet. A leaf lock.
    front: Mutex<Option<Front>>,
}

/// How far the first datagram is.
enum Front {
    /// The guest may have it.
    Admitted(Datagram),
    /// The host is asked whether it may. Those behind it wait.
    Asked(Box<Asked>),
}

/// A datagram whose sender the host is asked about.
struct Asked {
    datagram: Datagram,
    question: Question,
}

/// Boxed where most sockets have nothing: a ring has thousands of them.
struct State {
    bind: BindState,
    /// Wakes the `send_one` or `receive_one` that is the first in line, if another call's poll finds done
    /// what it waits for: the bind, or what was sent before.
    first: Option<Waker>,
    options: Options,
    local: Option<Box<Local>>,
    remote: Option<Box<Remote>>,
    /// A connect whose call was told that the kernel refuses enters. It is still queued.
    unsettled: Option<Box<Unsettled>>,
    /// The receive's submission, if a guest has yet to wait for it.
    arming: Option<Box<Flush>>,
    /// What a `send` was answered for before the kernel has taken it: datagrams that are deferred, to which the
    /// next can be added; or a batch for which there was no send buffer, and for which the next `send`, of
    /// whichever stream, waits.
    answered: Option<Box<InFlight>>,
    /// Whom sends have reached lately.
    reached: Option<Box<Peers>>,
    /// Its port, if the guest knows that; else 0.
    known_port: u16,
}

/// Where a socket is bound, or being bound.
#[derive(Default)]
struct Local {
    /// What its guest has asked for, if that is for a policy to hear.
    asked: Option<SocketAddr>,
    /// The kernel's last answer, if no operation since then may have changed it.
    answered: Option<SocketAddr>,
}

/// Whom a socket is connected to.
#[derive(Clone, Copy)]
struct Remote {
    asked: SocketAddr,
    /// As the kernel has it, once it was asked: with the scope that it has found, or rewritten by a
    /// cgroup's program.
    peer: Option<SocketAddr>,
}

impl Remote {
    /// The peer, as far as it is known.
    fn known(self) -> SocketAddr {
        self.peer.unwrap_or(self.asked)
    }

    /// Whether only the kernel can tell if this is the peer.
    fn is_unknown_by(self, from: SocketAddr) -> bool {
        self.peer.is_none() && self.asked != from
    }

    /// Whether a guest may mean the peer by this address.
    fn is_named_by(self, to: SocketAddr) -> bool {
        self.asked == to || self.peer == Some(to)
    }
}

/// A connect, or with no address a disconnect, that has yet to go well or not.
struct Unsettled {
    connect: InFlight,
    to: Option<SocketAddr>,
}

/// How far a socket's bind is. The kernel has no socket before `Binding`.
enum BindState {
    Unbound,
    /// The chain that makes and binds the socket is in flight.
    Binding(Box<InFlight>),
    /// The chain has completed, and `finish-bind` has yet to return its result.
    Settled(Result<(), ErrorCode>),
    Bound,
}

/// Peers whom sends have reached, and which of them makes room for the next. (Most sockets have one or two.)
#[derive(Default)]
struct Peers {
    reached: SmallVec<[Reached; 2]>,
    oldest: usize,
}

/// A peer whom the kernel has sent to without an error, for all that is known, and payloads of up to so many
/// bytes.
struct Reached {
    peer: SocketAddr,
    bytes: usize,
}

/// What the guest has set. Reads are answered from here, since only the guest can change it.
#[derive(Clone, Copy, Default)]
struct Options {
    hop_limit: Option<u8>,
    receive_buffer: Option<u32>,
    send_buffer: Option<u32>,
}

impl UdpSocket {
    /// Takes an entry of the guest's quotas and of the pool's, in this thread's ring. No system call: an unbound
    /// socket is "effectively an in-memory configuration object" (wasi:sockets, create-udp-socket). The
    /// policy is called last, so that it knows of no socket that there is no room for.
    pub(crate) fn new(ctx: &Arc<GuestCtx>, family: Family) -> Result<Self, ErrorCode> {
        let pool = &ctx.pool;
        pool.check()?;
        ctx.checks.udp().map_err(|reason| ctx.deny(reason))?;
        if pool.first().defaults().of(family).is_none() {
            return Err(ErrorCode::NotSupported);
        }
        let Account { sockets, counters, .. } = &*ctx.account;
        let mut full = None;
        let rings = if sockets.is_shared() { u64::MAX } else { ctx.rings() };
        let taken =
            pool.acquire(rings, || sockets.take_exclusive().map_err(|it| full = Some(it)).ok());
        if taken.is_none() {
            full.into_iter().for_each(Level::refuse);
            counters.sockets_beyond_quota.add_exclusive(1);
            return Err(ErrorCode::NewSocketLimit);
        }
        let Some(ring) = pool.take_socket() else {
            sockets.put_back();
            counters.sockets_beyond_table.add_exclusive(1);
            return Err(ErrorCode::NewSocketLimit);
        };
        let driver = pool.ring(ring);
        let place = Place { account: &ctx.account, driver };
        let number = ctx.number_socket();
        ctx.checks.socket_created(ctx.socket_id(number)).map_err(|reason| ctx.deny(reason))?;
        std::mem::forget(place);
        ctx.use_ring(ring);
        driver.share().count_created();
        counters.sockets_created.add_exclusive(1);
        Ok(Self {
            ctx: Arc::clone(ctx),
            number,
            driver: Arc::clone(driver),
            family,
            slot: OnceLock::new(),
            receiver: OnceLock::new(),
            state: Mutex::new(State {
                bind: BindState::Unbound,
                first: None,
                options: Options::default(),
                local: None,
                remote: None,
                unsettled: None,
                arming: None,
                answered: None,
                reached: None,
                known_port: 0,
            }),
            send_line: tokio::sync::Mutex::const_new(()),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn family(&self) -> Family {
        self.family
    }

    /// Queues an operation on the socket, which is bound. Its memory is the ring's from here until
    /// its last completion.
    fn submit(&self, op: Op) -> Result<InFlight, Errno> {
        self.driver.submit(self.ctx.guest, self.bound_slot(), op)
    }

    /// Queues an operation on the socket, which is bound, and waits for it.
    async fn run(&self, op: Op) -> OpResult {
        self.submit(op)?.result().await
    }

    fn bound_slot(&self) -> SlotIndex {
        *self.slot.get().expect("a bound socket has a slot")
    }

    #[cfg(test)]
    pub(crate) fn slot(&self) -> Option<SlotIndex> {
        self.slot.get().copied()
    }

    // ---- policy -----------------------------------------------------------------------------

    /// Asks the host whether the guest may use an address. No lock is held.
    #[inline]
    fn judge(&self, addr: SocketAddr, addr_use: SocketAddrUse, is_implicit: bool) -> Judged {
        self.ctx.checks.judge(addr, addr_use, || AddrEvent {
            socket: self.ctx.socket_id(self.number),
            addr_use,
            addr,
            is_implicit,
            local_addr: self.lock().known_local(),
        })
    }

    /// Ready when the guest may use an address, or may not. In WASI 0.3 other calls may come between.
    fn may_use(&self, addr: SocketAddr, addr_use: SocketAddrUse, is_implicit: bool) -> May<'_> {
        let ctx = &*self.ctx;
        match self.judge(addr, addr_use, is_implicit).at_once() {
            Judged::Now(answer) => May::Now(answer.map_err(|reason| ctx.deny(reason))),
            Judged::Asked(question) => May::Asked(Box::new((ctx, question))),
        }
    }

    // ---- state ------------------------------------------------------------------------------

    /// Waits for a bind in flight; whether the socket is bound then.
    async fn is_bound(&self) -> bool {
        poll_fn(|cx| self.poll_settled(cx).map(|state| state.is_bound())).await
    }

    /// Ready, with the state locked, when no bind is in flight.
    fn poll_settled(&self, cx: &mut Context<'_>) -> Poll<MutexGuard<'_, State>> {
        let mut state = self.lock();
        // Taken out to be polled with the state unlocked. What is left there is the guest's answer
        // if the poll unwinds.
        let unwound = BindState::Settled(Err(ErrorCode::Unknown));
        let mut bind = match std::mem::replace(&mut state.bind, unwound) {
            BindState::Binding(bind) => bind,
            settled @ (BindState::Unbound | BindState::Settled(_) | BindState::Bound) => {
                state.bind = settled;
                return Poll::Ready(state);
            }
        };
        drop(state);
        let Poll::Ready(result) = bind.poll_result(cx) else {
            self.lock().bind = BindState::Binding(bind);
            return Poll::Pending;
        };
        drop(bind);
        let result = result.map(drop).map_err(|errno| match errno {
            // bind(2): the address is not of the socket's family.
            Errno(libc::EAFNOSUPPORT) => ErrorCode::InvalidArgument,
            errno => errno.into(),
        });
        let mut state = self.lock();
        state.bind = BindState::Settled(result);
        let Some(first) = state.first.take() else { return Poll::Ready(state) };
        drop(state);
        first.wake();
        Poll::Ready(self.lock())
    }

    // ---- addresses --------------------------------------------------------------------------

    /// The address the kernel has given the socket.
    pub(crate) async fn local_address(&self) -> Result<SocketAddr, ErrorCode> {
        self.driver.check()?;
        if !self.is_bound().await {
            return Err(ErrorCode::InvalidState);
        }
        if let Some(answered) = self.lock().local.as_ref().and_then(|local| local.answered) {
            return Ok(answered);
        }
        let local = self.query(Whose::Own).await?;
        if local.port() != 0 {
            self.lock().local.get_or_insert_default().answered = Some(local);
            self.know_port(local.port());
        }
        Ok(local)
    }

    fn know_port(&self, port: u16) {
        let before = std::mem::replace(&mut self.lock().known_port, port);
        if before != port {
            self.ctx.forget_port(before);
            self.ctx.know_port(port);
        }
    }

    /// The address of the socket's peer, as the kernel has it.
    pub(crate) async fn remote_address(&self) -> Result<SocketAddr, ErrorCode> {
        self.driver.check()?;
        self.settled().await?;
        let remote = self.remote().ok_or(ErrorCode::InvalidState)?;
        match remote.peer {
            Some(peer) => Ok(peer),
            None => Ok(self.query_peer(remote).await?),
        }
    }

    async fn query_peer(&self, remote: Remote) -> Result<SocketAddr, Errno> {
        let peer = self.query(Whose::Peers).await?;
        // In WASI 0.3 a `connect` may come while a `receive` asks.
        if let Some(now) = self.lock().remote.as_deref_mut().filter(|now| now.asked == remote.asked)
        {
            now.peer = Some(peer);
        }
        Ok(peer)
    }

    /// Asks the kernel for an address. Linux before 6.19 has neither getsockname nor getpeername on the
    /// ring, so the kernel makes a file descriptor of the direct one, which is closed at once.
    async fn query(&self, whose: Whose) -> Result<SocketAddr, Errno> {
        let query = if self.driver.has_names() {
            Op::QueryName(Box::new(SocketName::new(whose)))
        } else {
            Op::Install
        };
        match self.run(query).await {
            Ok(Output::Address(address)) => Ok(address),
            // Owned from here on: dropping it closes the descriptor, and the slot keeps the socket.
            Ok(Output::Descriptor(descriptor)) => {
                let socket = std::net::UdpSocket::from(descriptor);
                let address = match whose {
                    Whose::Own => socket.local_addr(),
                    Whose::Peers => socket.peer_addr(),
                };
                address.map_err(|error| Errno(error.raw_os_error().unwrap_or(libc::EINVAL)))
            }
            // The process has no descriptor to spare. The errno table has `new-socket-limit` here,
            // but no socket is being made.
            Err(Errno(libc::EMFILE | libc::ENFILE)) => Err(Errno(libc::ENOMEM)),
            Err(errno) => Err(errno),
            Ok(Output::Done | Output::Sent(_) | Output::Unsent(_)) => Err(Errno(libc::EINVAL)),
        }
    }
}

impl Receiver {
    /// To be polled or dropped with the lock released: it may have code of the host's.
    fn take_front(&self) -> Option<Front> {
        self.front.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The socket is gone: how many datagrams no call will take, and the one at the front, which may have code
    /// of the host's.
    fn discard(&self, counters: &Counters) -> (u64, Option<Front>) {
        let front = self.take_front();
        let in_front = u64::from(front.is_some());
        counters.dropped_at_close.add(in_front);
        (in_front + self.queue.discard(), front)
    }
}

/// A socket's entries in the guest's quotas and in a ring's share, until a slot has them.
struct Place<'socket> {
    account: &'socket Account,
    driver: &'socket Driver,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.account.sockets.put_back();
        self.driver.share().put_back();
    }
}

/// Whether the guest may. A call that waits for it has it in its future, so it is small.
enum May<'ctx> {
    Now(Result<(), ErrorCode>),
    Asked(Box<(&'ctx GuestCtx, Question)>),
}

impl Future for May<'_> {
    type Output = Result<(), ErrorCode>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut *self {
            Self::Now(answer) => Poll::Ready(*answer),
            Self::Asked(asked) => {
                let (ctx, question) = &mut **asked;
                let answer = ready!(Pin::new(question).poll(cx));
                Poll::Ready(answer.map_err(|reason| ctx.deny(reason)))
            }
        }
    }
}

impl State {
    fn is_binding(&self) -> bool {
        matches!(self.bind, BindState::Binding(_))
    }

    fn is_bound(&self) -> bool {
        matches!(self.bind, BindState::Settled(Ok(())) | BindState::Bound)
    }

    /// Where the socket is bound, as far as is known.
    fn known_local(&self) -> Option<SocketAddr> {
        let local = self.local.as_ref().filter(|_| self.is_bound())?;
        local.answered.or(local.asked)
    }

    /// A send to a peer is on its way: whether one of so many bytes has reached it before. (If this one fails,
    /// no peer counts as reached.)
    fn reach(&mut self, peer: SocketAddr, bytes: usize) -> bool {
        self.reached.get_or_insert_default().reach(peer, bytes)
    }
}

impl Peers {
    fn reach(&mut self, peer: SocketAddr, bytes: usize) -> bool {
        if let Some(reached) = self.reached.iter_mut().find(|one| one.peer == peer) {
            let is_reached = bytes <= reached.bytes;
            reached.bytes = reached.bytes.max(bytes);
            return is_reached;
        }
        let reached = Reached { peer, bytes };
        if self.reached.len() < REACHED_MAX {
            self.reached.push(reached);
        } else {
            self.reached[self.oldest] = reached;
            self.oldest = (self.oldest + 1) % REACHED_MAX;
        }
        false
    }
}

impl Drop for UdpSocket {
    fn drop(&mut self) {
        let GuestCtx { guest, account, checks, .. } = &*self.ctx;
        let driver = &self.driver;
        if driver.check() == Err(RingGone::Forked) {
            return;
        }
        match self.slot.get() {
            None => drop(Place { account, driver }),
            Some(slot) => {
                self.submit_deferred();
                // The operations in flight are detached first: the slot's next owner must not meet
                // a future of this one. The ring keeps their memory until they complete.
                let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
                state.bind = BindState::Unbound;
                state.unsettled = None;
                state.answered = None;
                self.ctx.forget_port(state.known_port);
                let (unread, _front) = self
                    .receiver
                    .get()
                    .map_or((0, None), |receiver| receiver.discard(&account.counters));
                // The slot is the ring's from here, with the entries in table and quotas. (The front is dropped
                // behind this, because that may panic.)
                driver.close(*guest, *slot, account, unread);
            }
        }
        checks.socket_dropped(self.ctx.socket_id(self.number));
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    /// Kills: forgetting a peer whose answers could leave together, and growing with each new one.
    #[test]
    fn a_socket_knows_the_last_peers_that_it_has_reached() {
        let peer = |number: usize| {
            SocketAddr::from((Ipv4Addr::LOCALHOST, u16::try_from(number).unwrap() + 1))
        };
        let mut peers = Peers::default();
        for number in 0..REACHED_MAX {
            assert!(!peers.reach(peer(number), 100), "{number} is new");
        }
        for number in 0..REACHED_MAX {
            assert!(peers.reach(peer(number), 100), "{number} was reached");
        }
        assert!(!peers.reach(peer(0), 101), "nothing as long has reached it");
        assert!(peers.reach(peer(0), 101));
        for number in REACHED_MAX..3 * REACHED_MAX {
            assert!(!peers.reach(peer(number), 1), "{number} is new");
        }
        assert_eq!(peers.reached.len(), REACHED_MAX);
        assert!(peers.reach(peer(3 * REACHED_MAX - 1), 1), "the newest is known");
        assert!(peers.reach(peer(2 * REACHED_MAX), 1), "and all since the oldest of them");
        assert!(!peers.reach(peer(2 * REACHED_MAX - 1), 1), "which the one before is not");
    }
}
