//! From the guest to the kernel: which datagrams may leave, in batches (WASI 0.2) or one by one
//! (WASI 0.3); what leaves at once, and what with others; and what waits while the socket's send buffer is
//! full.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::task::{Context, Poll, Waker, ready};

use crate::datagram::{Outgoing, RawAddr};
use crate::driver::{Given, InFlight, Progress, SendNow, is_current_thread};
use crate::error::{Errno, ErrorCode};
use crate::limits::PAYLOAD_BYTES_MAX;
use crate::ring::op::{Op, Output, Sent};
use crate::ring::send::SendOp;
use crate::socket::policy::{Judged, Question, SocketAddrUse, is_of_family, is_remote};
use crate::socket::{Reached, Remote, UdpSocket};

impl UdpSocket {
    /// Sends datagrams in order, as one submission, and returns how many the kernel took or will
    /// take.
    ///
    /// WIT: "If at least one datagram has been sent successfully, this function never returns an
    /// error." What fails after it was answered for is the next `send`'s error.
    pub(crate) async fn send(
        &self,
        mut datagrams: impl ExactSizeIterator<Item = (Vec<u8>, Option<SocketAddr>)>,
    ) -> Result<u64, ErrorCode> {
        self.driver.check()?;
        let before = match self.before() {
            // Boxed, because most often it is over within the call that sends it.
            Before::OnItsWay => Box::pin(self.submit_before()).await,
            before @ (Before::Deferred | Before::Over(_)) => before,
        };
        match before {
            Before::OnItsWay => return Ok(0),
            Before::Deferred => {}
            Before::Over(result) => result?,
        }
        self.settled().await?;
        let remote = self.remote();
        let mut batch = Checked::new(datagrams.len());
        if let Some(asked) = self.check_batch(&mut datagrams, remote, &mut batch) {
            // Boxed, because few hosts have to be waited for.
            batch = Box::pin(self.check_asked(asked, datagrams, remote, batch)).await;
        }
        let Checked { mut accepted, refused, is_reached, last } = batch;
        if accepted.is_empty() {
            return refused.map_or(Ok(0), Err);
        }
        self.take_error()?;
        let accepted_len = accepted.len() as u64;
        let is_used_up = self.ctx.account.sending.is_used_up();
        if self.ctx.sends_on(last.map(|last| last.peer)) && is_reached && !is_used_up {
            let append = |send: &mut SendOp| accepted.drain(..).for_each(|it| send.push(it));
            if self.defer(append)? {
                return Ok(accepted_len);
            }
        }
        if self.lock().answered.is_some() {
            // Boxed, because few guests send to others than before.
            match Box::pin(self.submit_before()).await {
                Before::Over(result) => result?,
                Before::Deferred | Before::OnItsWay => return Ok(0),
            }
        }
        if is_used_up {
            // Boxed, because few guests have so much waiting.
            return Box::pin(self.send_while_taken(accepted)).await;
        }
        // The payloads are the ring's from here until the kernel has taken or refused them.
        let mut in_flight = self.submit(Op::Send(SendOp::new(accepted)))?;
        let result = poll_fn(|cx| in_flight.poll_submitted(cx)).await;
        if in_flight.has_yielded() {
            self.ctx.stretch.end_at_send();
        }
        match result {
            Some(Ok(Output::Sent(sent))) => {
                self.count_sent(sent);
                if sent.error.is_some() {
                    self.lock().reached = None;
                }
                Ok(sent.datagrams)
            }
            Some(Ok(_)) => Ok(0),
            Some(Err(errno)) => {
                self.lock().reached = None;
                Err(errno.into())
            }
            None => {
                in_flight.charge(&self.ctx.account);
                self.set_answered(Box::new(in_flight));
                Ok(accepted_len)
            }
        }
    }

    /// Has datagrams leave with others, and the guest go on. Not if what was deferred before has left by itself,
    /// and by this thread: then the guest has suspended meanwhile; nor if that is still on its way.
    fn defer(&self, append: impl FnOnce(&mut SendOp)) -> Result<bool, ErrorCode> {
        let before = self.lock().answered.take();
        let mut append = Some(append);
        if let Some(mut before) = before {
            let is_appended = before.append(|send| append.take().expect("called once")(send));
            let was_full = before.was_full();
            self.set_answered(before);
            if is_appended {
                return Ok(true);
            }
            match self.before() {
                Before::Over(result) => result?,
                Before::OnItsWay | Before::Deferred => return Ok(false),
            }
            if !was_full && is_current_thread() {
                return Ok(false);
            }
        }
        let (slot, account) = (self.bound_slot(), &self.ctx.account);
        let append = append.expect("not called");
        let deferred = self.driver.defer(self.ctx.guest, slot, account, append)?;
        self.set_answered(Box::new(deferred));
        Ok(true)
    }

    /// Sends datagrams one by one, for as long as the kernel takes them at once: the guest has so much
    /// waiting elsewhere that nothing more is kept for it. Returns how many; the others are the guest's to
    /// send when there is send buffer.
    async fn send_while_taken(&self, datagrams: Vec<Outgoing>) -> Result<u64, ErrorCode> {
        let (driver, guest) = (&self.driver, self.ctx.guest);
        let mut taken = 0;
        for datagram in datagrams {
            let bytes = datagram.payload.len() as u64;
            let (slot, datagram) = (self.bound_slot(), Box::new(datagram));
            let given = SendNow::new(driver, guest, slot, datagram, None).given().await;
            let ended = match given {
                Ok(Given::Answered(Ok(Output::Unsent(_)))) => self.wait_for_room().await,
                Ok(Given::Answered(Ok(_))) => {
                    self.ctx.account.counters.sent.count(1, bytes);
                    taken += 1;
                    continue;
                }
                Ok(Given::Deferred(_)) => unreachable!("it must not be deferred"),
                Ok(Given::Answered(Err(errno))) | Err(errno) => Err(errno),
            };
            return if taken == 0 { Ok(ended.map(|()| 0)?) } else { Ok(taken) };
        }
        Ok(taken)
    }

    /// Has the next `send`, and the stream's pollable, wait for send buffer.
    async fn wait_for_room(&self) -> Result<(), Errno> {
        let mut waiting = self.submit(Op::AwaitWritable)?.cancelled_with_caller();
        if poll_fn(|cx| waiting.poll_submitted(cx)).await.is_none() {
            self.set_answered(Box::new(waiting));
        }
        Ok(())
    }

    /// Records what comes before the next `send`.
    fn set_answered(&self, answered: Box<InFlight>) {
        // Dropped at the block's end, with the lock released.
        let _previous = self.lock().answered.replace(answered);
    }

    /// What has come of it.
    fn before(&self) -> Before {
        let Some(mut answered) = self.lock().answered.take() else { return Before::Over(Ok(())) };
        let result = match answered.progress() {
            Progress::Ended(result) => result,
            on_its_way @ (Progress::Deferred | Progress::OnItsWay) => {
                self.set_answered(answered);
                return match on_its_way {
                    Progress::Deferred => Before::Deferred,
                    Progress::OnItsWay | Progress::Ended(_) => Before::OnItsWay,
                };
            }
        };
        if let Ok(Output::Sent(sent)) = result
            && !answered.is_charged()
        {
            self.count_sent(sent);
        }
        if let Err(errno) | Ok(Output::Sent(Sent { error: Some(errno), .. })) = result {
            self.lock().reached = None;
            return Before::Over(Err(errno.into()));
        }
        Before::Over(Ok(()))
    }

    /// The socket is dropped: what its guest has sent is over before, if it can be, so that it keeps no socket from
    /// being recycled; and counted if it is.
    pub(super) fn submit_deferred(&self) {
        if matches!(self.before(), Before::Deferred) {
            self.driver.submit_deferred();
        }
    }

    /// Has it submitted. If it is not over then, it waits for send buffer.
    async fn submit_before(&self) -> Before {
        match poll_fn(|cx| self.driver.poll_entered(cx)).await {
            Ok(()) => self.before(),
            Err(errno) => Before::Over(Err(errno.into())),
        }
    }

    /// Ready with it. A thread that is inside has it within microseconds, unless there is no send buffer.
    fn poll_before(&self, cx: &mut Context<'_>) -> Poll<Result<(), ErrorCode>> {
        if let Before::Over(result) = self.before() {
            return Poll::Ready(result);
        }
        ready!(self.driver.poll_entered(cx))?;
        ready!(self.poll_sendable(cx));
        Poll::Ready(match self.before() {
            Before::Over(result) => result,
            Before::Deferred | Before::OnItsWay => Ok(()),
        })
    }

    /// Waits until the kernel has taken all that was sent.
    pub(super) async fn sent(&self) {
        if self.lock().answered.is_some() {
            // What the kernel refuses is for the next `send` to tell.
            let _ = poll_fn(|cx| self.driver.poll_entered(cx)).await;
            self.sendable().await;
        }
    }

    /// Waits until a `send` would take datagrams.
    pub(crate) async fn sendable(&self) {
        poll_fn(|cx| self.poll_sendable(cx)).await;
    }

    /// Ready when a `send` would take datagrams: the kernel has those sent before, or they are deferred.
    pub(crate) fn poll_sendable(&self, cx: &mut Context<'_>) -> Poll<()> {
        // Taken out to be polled with the state unlocked.
        let answered = self.lock().answered.take();
        let Some(answered) = answered else { return Poll::Ready(()) };
        let is_ready = answered.is_deferred()
            || answered.poll_is_done(cx).is_ready()
            // It may have yet to be submitted.
            || self.driver.poll_entered(cx).is_ready() && answered.poll_is_done(cx).is_ready();
        // Put back also when done: the next `send` fetches its error.
        self.set_answered(answered);
        if !is_ready {
            return Poll::Pending;
        }
        let first = self.lock().first.take();
        first.into_iter().for_each(Waker::wake);
        Poll::Ready(())
    }

    /// Sends one datagram, of a socket that need not be bound, and waits until the kernel has taken or
    /// refused it. While it waits for send buffer nothing of it is in the kernel: if the call is cancelled,
    /// the datagram is not sent.
    pub(crate) async fn send_one(
        &self,
        payload: Vec<u8>,
        to: Option<SocketAddr>,
    ) -> Result<(), ErrorCode> {
        self.driver.check()?;
        if self.lock().unsettled.is_some() {
            // Boxed, because it hardly ever comes to this.
            Box::pin(self.first_in_line(self.settled())).await?;
        }
        let remote = self.remote();
        let effective = self.destination(&payload, to, remote)?;
        let (is_bound, is_binding) = {
            let state = self.lock();
            (state.is_bound(), state.is_binding())
        };
        let is_to_bind = !is_bound && !is_binding;
        if is_to_bind {
            self.may_bind_anywhere().await?;
        }
        self.may_use(effective, SocketAddrUse::UdpSend, false).await?;
        if !is_bound {
            self.first_in_line(self.bind_anywhere(is_to_bind)).await?;
        }
        let _line = self.send_line.lock().await;
        let bytes = payload.len();
        let goes_on = self.ctx.sends_on(Some(effective));
        let is_reached = self.lock().reach(effective, bytes);
        // Where it goes is the kernel's peer's when it goes, as with wasmtime-wasi.
        let mut datagram = Outgoing { payload, to: named(effective, remote) };
        let is_used_up = self.ctx.account.sending.is_used_up();
        if goes_on && is_reached && !is_used_up {
            self.take_error()?;
            let mut kept = Some(datagram);
            if self.defer(|send| send.push(kept.take().expect("called once")))? {
                return Ok(());
            }
            datagram = kept.expect("not deferred");
        }
        self.as_first(poll_fn(|cx| self.poll_before(cx))).await?;
        let mut datagram = Box::new(datagram);
        loop {
            self.take_error()?;
            let (guest, slot) = (self.ctx.guest, self.bound_slot());
            // What went well lately will again: it may be another thread's to submit.
            let account = &self.ctx.account;
            let may_defer = is_reached && !is_used_up && !account.deferred_time.is_zero();
            let send =
                SendNow::new(&self.driver, guest, slot, datagram, may_defer.then_some(account));
            match send.given().await? {
                Given::Deferred(deferred) => {
                    self.set_answered(Box::new(deferred));
                    return Ok(());
                }
                Given::Answered(Ok(Output::Unsent(unsent))) => {
                    datagram = unsent;
                    // Those behind it wait, too, also if this call is given up.
                    self.lock().reached = None;
                }
                Given::Answered(Ok(_)) => {
                    self.ctx.account.counters.sent.count(1, bytes as u64);
                    return Ok(());
                }
                Given::Answered(Err(errno)) => {
                    self.lock().reached = None;
                    return Err(errno.into());
                }
            }
            // Boxed, because few sends wait.
            Box::pin(self.submit(Op::AwaitWritable)?.cancelled_with_caller().result()).await?;
        }
    }

    /// Counts what the kernel took for the guest.
    fn count_sent(&self, sent: Sent) {
        self.ctx.account.counters.sent.count(sent.datagrams, sent.bytes);
    }

    /// Checks the datagrams of a batch up to the first that is refused, or that the host has yet to decide about,
    /// which is returned.
    fn check_batch(
        &self,
        datagrams: &mut impl Iterator<Item = (Vec<u8>, Option<SocketAddr>)>,
        remote: Option<Remote>,
        batch: &mut Checked,
    ) -> Option<(Outgoing, Question)> {
        for (payload, to) in datagrams {
            let effective = match self.destination(&payload, to, remote) {
                Ok(effective) => effective,
                Err(error) => {
                    batch.refused = Some(error);
                    break;
                }
            };
            let bytes = payload.len();
            let datagram = Outgoing { payload, to: named(effective, remote) };
            match self.judge(effective, SocketAddrUse::UdpSend, false).at_once() {
                Judged::Now(Ok(())) => {
                    batch.reach(self, effective, bytes);
                    batch.accepted.push(datagram);
                }
                Judged::Now(Err(reason)) => {
                    batch.refused = Some(self.ctx.deny(reason));
                    break;
                }
                Judged::Asked(question) => return Some((datagram, question)),
            }
        }
        None
    }

    /// Goes on with it, waiting for the host's verdicts.
    async fn check_asked(
        &self,
        mut asked: (Outgoing, Question),
        mut datagrams: impl Iterator<Item = (Vec<u8>, Option<SocketAddr>)>,
        remote: Option<Remote>,
        mut batch: Checked,
    ) -> Checked {
        batch.is_reached = false;
        loop {
            let (datagram, question) = asked;
            if let Err(reason) = question.await {
                batch.refused = Some(self.ctx.deny(reason));
                return batch;
            }
            batch.accepted.push(datagram);
            match self.check_batch(&mut datagrams, remote, &mut batch) {
                Some(next) => asked = next,
                None => return batch,
            }
        }
    }

    /// The peer of a well-formed datagram.
    fn destination(
        &self,
        payload: &[u8],
        to: Option<SocketAddr>,
        remote: Option<Remote>,
    ) -> Result<SocketAddr, ErrorCode> {
        if payload.len() > PAYLOAD_BYTES_MAX {
            return Err(ErrorCode::DatagramTooLarge);
        }
        if let Some(to) = to
            && (!is_remote(to) || !is_of_family(to, self.family))
        {
            return Err(ErrorCode::InvalidArgument);
        }
        match (to, remote) {
            // WIT: a connected socket's datagrams name its peer or none.
            (Some(to), Some(remote)) if !remote.is_named_by(to) => Err(ErrorCode::InvalidArgument),
            (Some(to), _) => Ok(to),
            (None, Some(remote)) => Ok(remote.known()),
            (None, None) => Err(ErrorCode::InvalidArgument),
        }
    }
}

/// What the checks have left of a batch, and why it ends there.
struct Checked {
    accepted: Vec<Outgoing>,
    refused: Option<ErrorCode>,
    /// Sends have reached all peers before.
    is_reached: bool,
    last: Option<Reached>,
}

impl Checked {
    fn new(datagrams: usize) -> Self {
        let accepted = Vec::with_capacity(datagrams);
        Self { accepted, refused: None, is_reached: true, last: None }
    }

    /// The next is for this peer.
    fn reach(&mut self, socket: &UdpSocket, peer: SocketAddr, bytes: usize) {
        if !self.last.as_ref().is_some_and(|last| last.peer == peer && bytes <= last.bytes) {
            self.is_reached &= socket.lock().reach(peer, bytes);
            self.last = Some(Reached { peer, bytes });
        }
    }
}

/// What a `send` was answered for before.
enum Before {
    /// Datagrams can be added to it.
    Deferred,
    OnItsWay,
    /// If it has failed, the next `send` is to tell.
    Over(Result<(), ErrorCode>),
}

/// The address that a datagram's entry names: none for a connected socket's, whose peer the kernel knows
/// better. (What the guest has connected to may have been rewritten, by a load balancer's cgroup program.)
fn named(effective: SocketAddr, remote: Option<Remote>) -> Option<RawAddr> {
    remote.is_none().then(|| effective.into())
}
