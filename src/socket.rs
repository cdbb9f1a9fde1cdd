//! A guest's UDP socket: its life cycle, options, sending and receiving. Knows WASI's rules and
//! the ring's operations, and nothing of Wasmtime.

use std::future::poll_fn;
use std::net::{SocketAddr, SocketAddrV6};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::task::coop::consume_budget;

use crate::ctx::GuestCtx;
use crate::datagram::{Family, Outgoing, RawAddr};
use crate::driver::{Flush, Ticket};
use crate::error::{Errno, ErrorCode};
use crate::limits::{BATCH_DATAGRAMS_MAX, PAYLOAD_BYTES_MAX, RECEIVE_BYTES_MAX};
use crate::policy::{SocketAddrUse, is_of_family, is_remote};
use crate::ring::Done;
use crate::ring::inbox::{Datagram, Inbox, InboxLimits, Taken};
use crate::ring::op::{BindOp, Op, SocketOption};
use crate::ring::probe::{FamilyDefaults, hop_limit_option};
use crate::ring::send::SendOp;
use crate::ring::slots::SlotIndex;

/// A UDP socket that lives in a slot of the ring's fixed-file table. Dropping it closes it.
pub(crate) struct UdpSocket {
    ctx: Arc<GuestCtx>,
    family: Family,
    /// Given with the first bind.
    slot: OnceLock<SlotIndex>,
    /// Made when somebody first wants to receive.
    inbox: OnceLock<Arc<Inbox>>,
    state: Mutex<State>,
}

/// Small, for most sockets of a crowd never need most of it.
struct State {
    life: SocketState,
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

/// Datagrams kept from a guest.
#[derive(Default)]
struct Withheld {
    by_policy: u64,
    not_from_peer: u64,
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
            inbox: OnceLock::new(),
            state: Mutex::new(State {
                life: SocketState::Unbound,
                options: Options::default(),
                local: None,
                remote: None,
                arming: None,
                in_flight: None,
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn family(&self) -> Family {
        self.family
    }

    // ---- bind -------------------------------------------------------------------------------

    /// Validates, asks the policy, and pushes SOCKET, the options and BIND as one chain.
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
        Ok(())
    }

    pub(crate) async fn finish_bind(&self) -> Result<(), ErrorCode> {
        poll_fn(|cx| {
            let mut state = self.lock();
            ready!(state.poll_settled(cx));
            Poll::Ready(match state.life {
                SocketState::Settled(result) => {
                    state.life =
                        if result.is_ok() { SocketState::Bound } else { SocketState::Unbound };
                    result
                }
                SocketState::Unbound | SocketState::Binding(_) | SocketState::Bound => {
                    Err(ErrorCode::NotInProgress)
                }
            })
        })
        .await
    }

    /// Waits for a bind on its way; whether the socket is bound then.
    async fn is_bound(&self) -> bool {
        poll_fn(|cx| {
            let mut state = self.lock();
            ready!(state.poll_settled(cx));
            Poll::Ready(matches!(state.life, SocketState::Settled(Ok(())) | SocketState::Bound))
        })
        .await
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

    // ---- stream -----------------------------------------------------------------------------

    /// Connects, reconnects or disconnects a bound socket, as `stream` asks.
    pub(crate) async fn stream(&self, remote: Option<SocketAddr>) -> Result<(), ErrorCode> {
        if !self.is_bound().await {
            return Err(ErrorCode::InvalidState);
        }
        if remote.is_some() || self.remote().is_some() {
            // What waits for room is for the peer of its time, whom its entries do not name.
            poll_fn(|cx| self.poll_sendable(cx)).await;
        }
        if let Some(remote) = remote {
            self.connect(remote).await?;
        } else if self.lock().remote.is_some() {
            self.run_connect(RawAddr::unspec()).await?;
            self.lock().remote = None;
        }
        if let Some(inbox) = self.inbox.get() {
            inbox.readmit();
        }
        Ok(())
    }

    async fn connect(&self, remote: SocketAddr) -> Result<(), ErrorCode> {
        if !is_of_family(remote, self.family) || !is_remote(remote) {
            return Err(ErrorCode::InvalidArgument);
        }
        self.ctx.policy.check(remote, SocketAddrUse::UdpSend)?;
        self.ctx.policy.check(remote, SocketAddrUse::UdpReceive)?;
        let mut result = self.run_connect(remote.into()).await;
        if result == Err(Errno(libc::EINVAL)) {
            // A socket keeps the source address of its first route; a peer beyond another one
            // needs the old association dissolved.
            let _ = self.run_connect(RawAddr::unspec()).await;
            self.lock().remote = None;
            result = self.run_connect(remote.into()).await;
        }
        match result {
            Ok(()) => {
                self.lock().remote = Some(Box::new(as_the_kernel_names(remote)));
                Ok(())
            }
            Err(Errno(libc::EAFNOSUPPORT)) => Err(ErrorCode::InvalidArgument),
            Err(errno) => Err(errno.into()),
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

    // ---- receive ----------------------------------------------------------------------------

    /// Arms the receive if nobody has; afterwards what the kernel has queued is in the inbox. With
    /// it, the peer that a connected socket hears.
    async fn listening(&self) -> (&Inbox, Option<SocketAddr>) {
        poll_fn(|cx| {
            let GuestCtx { uring, guest, .. } = &*self.ctx;
            let mut state = self.lock();
            let inbox = self.inbox.get_or_init(|| {
                let (inbox, flush) = uring.arm(*guest, self.bound_slot());
                state.arming = Some(Box::new(flush));
                inbox
            });
            // Kept until it is done, for a guest may look once and come back.
            if let Some(flush) = &mut state.arming {
                ready!(flush.poll(uring, cx));
                state.arming = None;
            }
            Poll::Ready((&**inbox, state.remote.as_deref().copied()))
        })
        .await
    }

    /// Up to `max` datagrams that are there already, at most as many as wasmtime-wasi hands out.
    pub(crate) async fn receive(&self, max: u64) -> Result<Vec<Datagram>, ErrorCode> {
        let max = usize::try_from(max).unwrap_or(usize::MAX).min(BATCH_DATAGRAMS_MAX);
        if max == 0 {
            return Ok(Vec::new());
        }
        // A guest that asks without end does not suspend by itself.
        consume_budget().await;
        let (inbox, remote) = self.listening().await;
        let most = InboxLimits { datagrams: max, bytes: RECEIVE_BYTES_MAX };
        let mut has_looked = false;
        loop {
            self.ctx.turn.give_up_if_over().await;
            let Taken { mut datagrams, first_is_admitted, resume } = inbox.take(most)?;
            if resume {
                self.resume();
            }
            if datagrams.is_empty() {
                if std::mem::replace(&mut has_looked, true) {
                    return Ok(datagrams);
                }
                self.ctx.uring.look();
                continue;
            }
            self.ctx.turn.count(datagrams.len());
            let mut is_admitted = first_is_admitted;
            let mut withheld = Withheld::default();
            datagrams.retain(|datagram| {
                std::mem::take(&mut is_admitted)
                    || self.may_hear(datagram.from, remote, &mut withheld)
            });
            self.count(withheld);
            if !datagrams.is_empty() {
                return Ok(datagrams);
            }
        }
    }

    /// Ready when `receive` would return a datagram or an error.
    pub(crate) async fn receivable(&self) {
        let (inbox, remote) = self.listening().await;
        poll_fn(|cx| {
            if self.admit(inbox, remote) {
                return Poll::Ready(());
            }
            // Not registered yet: what the look brings would wake the very task that looks.
            self.ctx.uring.look_and_listen();
            if self.admit(inbox, remote) {
                return Poll::Ready(());
            }
            inbox.wake_on_arrival(cx.waker());
            // Another thread may have booked something in between.
            if self.admit(inbox, remote) {
                return Poll::Ready(());
            }
            self.ctx.turn.begin();
            Poll::Pending
        })
        .await;
    }

    /// Whether an arrival is there that the guest may see; those it may not are dropped.
    fn admit(&self, inbox: &Inbox, remote: Option<SocketAddr>) -> bool {
        let mut withheld = Withheld::default();
        let admitted = inbox.admit(|from| self.may_hear(from, remote, &mut withheld));
        self.count(withheld);
        if !admitted && inbox.resume_if_drained() {
            // What was dropped had filled it.
            self.resume();
        }
        admitted
    }

    /// Whether the guest may see a datagram of this sender.
    fn may_hear(
        &self,
        from: SocketAddr,
        remote: Option<SocketAddr>,
        withheld: &mut Withheld,
    ) -> bool {
        let allowed = self.ctx.policy.check(from, SocketAddrUse::UdpReceive).is_ok();
        // The kernel filters what arrives after the connect, not what was queued before.
        let is_peer = remote.is_none_or(|remote| remote == from);
        withheld.by_policy += u64::from(!allowed);
        withheld.not_from_peer += u64::from(allowed && !is_peer);
        allowed && is_peer
    }

    fn count(&self, Withheld { by_policy, not_from_peer }: Withheld) {
        if by_policy + not_from_peer > 0 {
            self.ctx.uring.count(|stats| {
                stats.dropped_by_policy += by_policy;
                stats.dropped_not_from_peer += not_from_peer;
            });
        }
    }

    fn resume(&self) {
        self.ctx.uring.resume(self.ctx.guest, self.bound_slot());
    }

    // ---- send -------------------------------------------------------------------------------

    /// Sends datagrams in order, as one submission, and returns how many the kernel took or will
    /// take.
    ///
    /// WIT: "If at least one datagram has been sent successfully, this function never returns an
    /// error." What must wait for room is told of by the next `send`, if it fails.
    pub(crate) async fn send(
        &self,
        datagrams: impl ExactSizeIterator<Item = (Vec<u8>, Option<SocketAddr>)>,
    ) -> Result<u64, ErrorCode> {
        let remote = {
            let mut state = self.lock();
            if let Some(earlier) = &mut state.in_flight {
                let Some(done) = earlier.try_done() else { return Ok(0) };
                state.in_flight = None;
                if let Some(errno) = done.error {
                    return Err(errno.into());
                }
            }
            state.remote.as_deref().copied()
        };
        let mut refused = None;
        let mut accepted = Vec::with_capacity(datagrams.len());
        for (payload, to) in datagrams {
            match self.check_outgoing(&payload, to, remote) {
                Ok(to) => accepted.push(Outgoing { payload, to }),
                Err(error) => {
                    refused = Some(error);
                    break;
                }
            }
        }
        if accepted.is_empty() {
            return refused.map_or(Ok(0), Err);
        }
        let accepted_len = accepted.len() as u64;
        let mut ticket = self.submit(Op::Send(SendOp::new(accepted)));
        let done = poll_fn(|cx| ticket.poll_submitted(cx)).await;
        if ticket.has_yielded() {
            self.ctx.turn.begin();
        }
        match done {
            Some(Done { error: Some(errno), sent: 0, .. }) => Err(errno.into()),
            Some(Done { sent, .. }) => Ok(sent),
            None => {
                self.lock().in_flight = Some(Box::new(ticket));
                Ok(accepted_len)
            }
        }
    }

    /// Ready when the kernel has taken all that was sent.
    pub(crate) fn poll_sendable(&self, cx: &mut Context<'_>) -> Poll<()> {
        match &self.lock().in_flight {
            Some(ticket) => ticket.poll_is_done(cx),
            None => Poll::Ready(()),
        }
    }

    /// Checks one datagram; the address to send it to, or none for a connected socket's peer.
    fn check_outgoing(
        &self,
        payload: &[u8],
        to: Option<SocketAddr>,
        remote: Option<SocketAddr>,
    ) -> Result<Option<RawAddr>, ErrorCode> {
        if payload.len() > PAYLOAD_BYTES_MAX {
            return Err(ErrorCode::DatagramTooLarge);
        }
        if let Some(to) = to
            && (!is_remote(to) || !is_of_family(to, self.family))
        {
            return Err(ErrorCode::InvalidArgument);
        }
        let effective = match (to, remote) {
            // WIT: a connected socket's datagrams name its peer or nobody.
            (Some(to), Some(remote)) if to != remote => return Err(ErrorCode::InvalidArgument),
            (Some(to), _) => to,
            (None, Some(remote)) => remote,
            (None, None) => return Err(ErrorCode::InvalidArgument),
        };
        self.ctx.policy.check(effective, SocketAddrUse::UdpSend)?;
        Ok(remote.is_none().then(|| effective.into()))
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
        }
        Poll::Ready(())
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
                let unread = self.inbox.get().map_or(0, |inbox| inbox.discard());
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
