//! A guest's UDP socket: its life cycle and options here, sending and receiving below. Knows WASI's
//! rules and the ring's operations, and nothing of Wasmtime.
//!
//! Most calls have the guest to themselves until they return. `send_one` and `receive_one`, which
//! WASI 0.3 declares async, do not: several of them wait at a time, and any other call may come
//! between.

mod receive;
mod send;

use std::future::poll_fn;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use tokio::sync::Semaphore;

use crate::ctx::GuestCtx;
use crate::datagram::{Family, RawAddr};
use crate::driver::{Flush, Ticket};
use crate::error::{Errno, ErrorCode};
use crate::limits::SENDS_MAX;
use crate::policy::{SocketAddrUse, is_of_family, is_remote};
use crate::ring::Done;
use crate::ring::inbox::Inbox;
use crate::ring::op::{BindOp, Op, SocketOption};
use crate::ring::probe::{FamilyDefaults, hop_limit_option};
use crate::ring::slots::SlotIndex;

/// A UDP socket that lives in a slot of the ring's fixed-file table. Dropping it closes it.
pub(crate) struct UdpSocket {
    ctx: Arc<GuestCtx>,
    family: Family,
    /// Given with the first bind.
    slot: OnceLock<SlotIndex>,
    /// Made when somebody first wants to receive.
    listening: OnceLock<Box<Listening>>,
    state: Mutex<State>,
    /// A permit for each concurrent send on its way; all of them for the bind it may begin with.
    sends: Semaphore,
}

/// Where a socket's datagrams arrive.
struct Listening {
    inbox: Arc<Inbox>,
    /// Concurrent receives; the first waits for the next arrival.
    line: tokio::sync::Mutex<()>,
}

/// Small, for most sockets of a crowd never need most of it.
struct State {
    life: SocketState,
    /// The concurrent call that waits for the bind. Whoever else hears of it first wakes it.
    binder: Option<Waker>,
    options: Options,
    /// What the kernel last said, if nothing has happened since that may change it.
    local: Option<Box<SocketAddr>>,
    remote: Option<Box<SocketAddr>>,
    /// The receive's way into the kernel.
    arming: Option<Box<Flush>>,
    /// Sends that wait for room: they hold up the next `send`, of whichever stream.
    in_flight: Option<Box<Ticket>>,
}

/// A socket's life. The kernel knows of it from `Binding` on.
enum SocketState {
    Unbound,
    /// `start-bind` has pushed the chain that makes and binds the socket.
    Binding(Box<Ticket>),
    /// Binding failed or succeeded, and `finish-bind` has yet to tell the guest.
    Settled(Result<(), ErrorCode>),
    Bound,
}

/// What the guest has set; answered from here, for nobody else can change it.
#[derive(Clone, Copy, Default)]
struct Options {
    hop_limit: Option<u8>,
    receive_buffer: Option<u32>,
    send_buffer: Option<u32>,
}

/// A socket option that WASI lets guests set.
#[derive(Clone, Copy)]
pub(crate) enum OptionValue {
    HopLimit(u8),
    ReceiveBuffer(u64),
    SendBuffer(u64),
}

impl UdpSocket {
    /// Takes a place in the table. The kernel is not asked: an unbound socket is "effectively an
    /// in-memory configuration object" (wasi:sockets, create-udp-socket).
    pub(crate) fn new(ctx: &mut Arc<GuestCtx>, family: Family) -> Result<Self, ErrorCode> {
        ctx.policy.udp()?;
        if ctx.uring.defaults().of(family).is_none() {
            return Err(ErrorCode::NotSupported);
        }
        if !ctx.uring.take_place(|| ctx.quota.take_alone()) {
            return Err(ErrorCode::NewSocketLimit);
        }
        if !ctx.uring.take_place(|| ctx.uring.room().take()) {
            ctx.quota.give_back();
            return Err(ErrorCode::NewSocketLimit);
        }
        Ok(Self {
            ctx: Arc::clone(ctx),
            family,
            slot: OnceLock::new(),
            listening: OnceLock::new(),
            state: Mutex::new(State {
                life: SocketState::Unbound,
                binder: None,
                options: Options::default(),
                local: None,
                remote: None,
                arming: None,
                in_flight: None,
            }),
            sends: Semaphore::const_new(SENDS_MAX as usize),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn family(&self) -> Family {
        self.family
    }

    // ---- bind -------------------------------------------------------------------------------

    /// Validates, asks the policy, and pushes the bind.
    pub(crate) fn start_bind(&self, addr: SocketAddr) -> Result<(), ErrorCode> {
        match self.lock().life {
            SocketState::Unbound => {}
            SocketState::Binding(_) | SocketState::Settled(_) => {
                return Err(ErrorCode::ConcurrencyConflict);
            }
            SocketState::Bound => return Err(ErrorCode::InvalidState),
        }
        if !is_of_family(addr, self.family) {
            return Err(ErrorCode::InvalidArgument);
        }
        // The host's code, so not under the lock.
        self.ctx.policy.check(addr, SocketAddrUse::UdpBind)?;
        self.push_bind(addr);
        Ok(())
    }

    /// Pushes SOCKET, the options and BIND as one chain.
    fn push_bind(&self, addr: SocketAddr) {
        let mut state = self.lock();
        let bind = BindOp::new(self.family, state.options.to_set(self.family), addr);
        let GuestCtx { uring, guest, .. } = &*self.ctx;
        let slot = self.slot.get().copied();
        let (slot, ticket) = uring.submit_bind(*guest, slot, Box::new(bind));
        self.slot.get_or_init(|| slot);
        state.life = SocketState::Binding(Box::new(ticket));
        // The kernel picks what the guest left open; then only it knows.
        let is_known = addr.port() != 0 && !addr.ip().is_unspecified();
        state.local = is_known.then(|| Box::new(as_the_kernel_names(addr)));
    }

    pub(crate) async fn finish_bind(&self) -> Result<(), ErrorCode> {
        poll_fn(|cx| self.lock().poll_finish(cx)).await
    }

    /// Both steps in one.
    pub(crate) async fn bind(&self, addr: SocketAddr) -> Result<(), ErrorCode> {
        if self.is_bound().await {
            return Err(ErrorCode::InvalidState);
        }
        self.forget_bind().await;
        self.start_bind(addr)?;
        self.finish_bind().await
    }

    /// Binds to any address and port unless the socket is bound. The policy is asked once for each
    /// bind, the first perhaps by the caller.
    async fn bind_anywhere(&self, mut is_allowed: bool) -> Result<(), ErrorCode> {
        while !self.is_bound().await {
            if !std::mem::take(&mut is_allowed) {
                self.may_bind_anywhere()?;
            }
            self.forget_bind().await;
            self.push_bind(anywhere(self.family));
            match self.finish_bind().await {
                // A call that came between has dropped the failure, and perhaps bound the socket.
                Err(ErrorCode::NotInProgress) => {}
                result => return result,
            }
        }
        Ok(())
    }

    /// Waits in a concurrent call for the bind that it begins with, or that another has begun.
    async fn first_in_line<T>(&self, bind: impl Future<Output = T>) -> T {
        let _alone = self.sends.acquire_many(SENDS_MAX).await;
        let mut bind = pin!(bind);
        poll_fn(|cx| {
            let poll = bind.as_mut().poll(cx);
            if poll.is_pending() {
                self.lock().binder = Some(cx.waker().clone());
            }
            poll
        })
        .await
    }

    /// Drops the failure of a bind whose caller has given up.
    async fn forget_bind(&self) {
        let _failure = self.finish_bind().await;
    }

    /// Waits for a bind on its way; whether the socket is bound then.
    async fn is_bound(&self) -> bool {
        poll_fn(|cx| {
            let mut state = self.lock();
            ready!(state.poll_settled(cx));
            Poll::Ready(state.is_bound())
        })
        .await
    }

    /// Asks the policy for the bind to any address and port that the kernel would do by itself.
    fn may_bind_anywhere(&self) -> Result<(), ErrorCode> {
        self.ctx.policy.check(anywhere(self.family), SocketAddrUse::UdpBind)
    }

    /// Pushes an operation on the socket, which is bound, and waits for it.
    async fn run(&self, op: Op) -> Done {
        self.submit(op).done().await
    }

    fn submit(&self, op: Op) -> Ticket {
        self.ctx.uring.submit(self.ctx.guest, self.bound_slot(), op)
    }

    fn bound_slot(&self) -> SlotIndex {
        *self.slot.get().expect("a bound socket has a slot")
    }

    // ---- connect ----------------------------------------------------------------------------

    /// Connects, reconnects or disconnects a bound socket, as `stream` of WASI 0.2 asks.
    pub(crate) async fn stream(&self, remote: Option<SocketAddr>) -> Result<(), ErrorCode> {
        if !self.is_bound().await {
            return Err(ErrorCode::InvalidState);
        }
        if remote.is_some() || self.remote().is_some() {
            // What waits for room is for the peer of its time, whom its entries do not name.
            poll_fn(|cx| self.poll_sendable(cx)).await;
        }
        match remote {
            Some(remote) => {
                self.check_peer(remote, false)?;
                self.associate(remote).await
            }
            None if self.remote().is_some() => self.dissolve().await,
            None => Ok(()),
        }
    }

    /// `connect` of WASI 0.3, which binds what is not bound.
    pub(crate) async fn connect(&self, remote: SocketAddr) -> Result<(), ErrorCode> {
        let is_bound = self.is_bound().await;
        self.check_peer(remote, !is_bound)?;
        self.bind_anywhere(!is_bound).await?;
        self.associate(remote).await
    }

    pub(crate) async fn disconnect(&self) -> Result<(), ErrorCode> {
        self.remote_address()?;
        self.dissolve().await
    }

    fn check_peer(&self, remote: SocketAddr, binds: bool) -> Result<(), ErrorCode> {
        if !is_of_family(remote, self.family) || !is_remote(remote) {
            return Err(ErrorCode::InvalidArgument);
        }
        if binds {
            self.may_bind_anywhere()?;
        }
        self.ctx.policy.check(remote, SocketAddrUse::UdpSend)?;
        self.ctx.policy.check(remote, SocketAddrUse::UdpReceive)
    }

    async fn associate(&self, remote: SocketAddr) -> Result<(), ErrorCode> {
        let mut result = self.run_connect(remote.into()).await;
        if result == Err(Errno(libc::EINVAL)) {
            // A socket keeps the source address of its first route; a peer beyond another one
            // needs the old association dissolved.
            let _ = self.run_connect(RawAddr::unspec()).await;
            self.set_remote(None);
            result = self.run_connect(remote.into()).await;
        }
        match result {
            Ok(()) => {
                self.set_remote(Some(remote));
                Ok(())
            }
            Err(Errno(libc::EAFNOSUPPORT)) => Err(ErrorCode::InvalidArgument),
            Err(errno) => Err(errno.into()),
        }
    }

    async fn dissolve(&self) -> Result<(), ErrorCode> {
        self.run_connect(RawAddr::unspec()).await?;
        self.set_remote(None);
        Ok(())
    }

    fn set_remote(&self, remote: Option<SocketAddr>) {
        self.lock().remote = remote.map(|remote| Box::new(as_the_kernel_names(remote)));
        if let Some(listening) = self.listening.get() {
            listening.inbox.readmit();
        }
    }

    async fn run_connect(&self, addr: RawAddr) -> Result<(), Errno> {
        self.lock().local = None;
        let op = Op::Connect(Box::new(addr));
        self.run(op).await.error.map_or(Ok(()), Err)
    }

    // ---- addresses --------------------------------------------------------------------------

    /// The address the kernel has given the socket.
    pub(crate) async fn local_address(&self) -> Result<SocketAddr, ErrorCode> {
        if !self.is_bound().await {
            return Err(ErrorCode::InvalidState);
        }
        if let Some(local) = self.lock().local.as_deref() {
            return Ok(*local);
        }
        let local = self.ask_local_address().await?;
        if local.port() != 0 {
            self.lock().local = Some(Box::new(local));
        }
        Ok(local)
    }

    /// Linux before 6.19 has no getsockname on the ring, so the direct descriptor is made a file
    /// descriptor for a moment.
    async fn ask_local_address(&self) -> Result<SocketAddr, ErrorCode> {
        let Done { descriptor, error, .. } = self.run(Op::Install).await;
        match (descriptor, error) {
            (Some(descriptor), _) => std::net::UdpSocket::from(descriptor)
                .local_addr()
                .map_err(|error| Errno(error.raw_os_error().unwrap_or(libc::EINVAL)).into()),
            // The process has no descriptor to spare: no limit on sockets, as the table has it.
            (None, Some(Errno(libc::EMFILE | libc::ENFILE))) => Err(ErrorCode::OutOfMemory),
            (None, errno) => Err(errno.map_or(ErrorCode::Unknown, ErrorCode::from)),
        }
    }

    fn remote(&self) -> Option<SocketAddr> {
        self.lock().remote.as_deref().copied()
    }

    pub(crate) fn remote_address(&self) -> Result<SocketAddr, ErrorCode> {
        self.remote().ok_or(ErrorCode::InvalidState)
    }

    // ---- options ----------------------------------------------------------------------------

    fn defaults(&self) -> FamilyDefaults {
        self.ctx.uring.defaults().of(self.family).expect("checked when the socket was created")
    }

    pub(crate) fn hop_limit(&self) -> u8 {
        self.lock().options.hop_limit.unwrap_or(self.defaults().hop_limit)
    }

    pub(crate) fn receive_buffer_size(&self) -> u64 {
        self.defaults().receive_buffer.reported(self.lock().options.receive_buffer)
    }

    pub(crate) fn send_buffer_size(&self) -> u64 {
        self.defaults().send_buffer.reported(self.lock().options.send_buffer)
    }

    /// Records an option; a bound socket is told at once, an unbound one with its bind.
    pub(crate) async fn set_option(&self, value: OptionValue) -> Result<(), ErrorCode> {
        let mut options = Options::default();
        match value {
            // WIT: 0 is an `invalid-argument`.
            OptionValue::HopLimit(0)
            | OptionValue::ReceiveBuffer(0)
            | OptionValue::SendBuffer(0) => {
                return Err(ErrorCode::InvalidArgument);
            }
            OptionValue::HopLimit(hops) => options.hop_limit = Some(hops),
            OptionValue::ReceiveBuffer(bytes) => options.receive_buffer = Some(clamp_to_int(bytes)),
            OptionValue::SendBuffer(bytes) => options.send_buffer = Some(clamp_to_int(bytes)),
        }
        if self.is_bound().await {
            for option in options.to_set(self.family).into_iter().filter(|o| !o.is_v6only()) {
                let op = Op::SetOption(Box::new(option));
                if let Some(errno) = self.run(op).await.error {
                    return Err(errno.into());
                }
            }
        }
        self.lock().options.update(options);
        Ok(())
    }
}

impl State {
    /// Ready when no bind is on its way.
    fn poll_settled(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let SocketState::Binding(ticket) = &mut self.life {
            let result = ready!(ticket.poll_done(cx)).error.map_or(Ok(()), |errno| {
                Err(match errno {
                    // bind(2): the address is not of the socket's family.
                    Errno(libc::EAFNOSUPPORT) => ErrorCode::InvalidArgument,
                    errno => errno.into(),
                })
            });
            self.life = SocketState::Settled(result);
            if let Some(binder) = self.binder.take() {
                binder.wake();
            }
        }
        Poll::Ready(())
    }

    /// Ready with what came of a bind, which is told once.
    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ErrorCode>> {
        ready!(self.poll_settled(cx));
        Poll::Ready(match self.life {
            SocketState::Settled(result) => {
                self.life = if result.is_ok() { SocketState::Bound } else { SocketState::Unbound };
                result
            }
            SocketState::Unbound | SocketState::Binding(_) | SocketState::Bound => {
                Err(ErrorCode::NotInProgress)
            }
        })
    }

    fn is_binding(&self) -> bool {
        matches!(self.life, SocketState::Binding(_))
    }

    fn is_bound(&self) -> bool {
        matches!(self.life, SocketState::Settled(Ok(())) | SocketState::Bound)
    }
}

impl Drop for UdpSocket {
    fn drop(&mut self) {
        let GuestCtx { uring, guest, quota, .. } = &*self.ctx;
        match self.slot.get() {
            None => {
                quota.give_back();
                uring.room().give_back();
            }
            Some(slot) => {
                // What is on its way is abandoned first: no ticket may outlive the slot.
                let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
                state.life = SocketState::Unbound;
                state.in_flight = None;
                let unread = self.listening.get().map_or(0, |listening| listening.inbox.discard());
                uring.close(*guest, *slot, quota, unread);
            }
        }
    }
}

impl Options {
    /// What a socket must be told, `IPV6_V6ONLY` always: WASI sockets are never dual-stack.
    fn to_set(self, family: Family) -> Vec<SocketOption> {
        let mut options = Vec::new();
        if family == Family::V6 {
            options.push(SocketOption::V6ONLY);
        }
        if let Some(hops) = self.hop_limit {
            let (level, name) = hop_limit_option(family);
            options.push(SocketOption { level, name, value: hops.into() });
        }
        for (name, bytes) in
            [(libc::SO_RCVBUF, self.receive_buffer), (libc::SO_SNDBUF, self.send_buffer)]
        {
            if let Some(bytes) = bytes {
                let value = bytes.cast_signed();
                options.push(SocketOption { level: libc::SOL_SOCKET, name, value });
            }
        }
        options
    }

    fn update(&mut self, other: Self) {
        self.hop_limit = other.hop_limit.or(self.hop_limit);
        self.receive_buffer = other.receive_buffer.or(self.receive_buffer);
        self.send_buffer = other.send_buffer.or(self.send_buffer);
    }
}

/// What a socket is bound to that nobody has bound.
fn anywhere(family: Family) -> SocketAddr {
    match family {
        Family::V4 => (Ipv4Addr::UNSPECIFIED, 0).into(),
        Family::V6 => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

/// The kernel takes buffer sizes as an `int` and clamps them itself.
fn clamp_to_int(bytes: u64) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX).min(i32::MAX.unsigned_abs())
}

/// An address as getsockname(2) and getpeername(2) give it back: without flow information, and
/// with a scope only where the address needs one (RFC 4007: link-local).
fn as_the_kernel_names(addr: SocketAddr) -> SocketAddr {
    let SocketAddr::V6(addr) = addr else { return addr };
    let ip = addr.ip();
    let scoped =
        ip.is_unicast_link_local() || matches!(ip.octets(), [0xff, scope, ..] if scope & 0xf == 2);
    let scope_id = if scoped { addr.scope_id() } else { 0 };
    SocketAddr::V6(SocketAddrV6::new(*ip, addr.port(), 0, scope_id))
}
