//! From the guest to the kernel: which datagrams may leave, in batches (WASI 0.2) or one by one
//! (WASI 0.3), and what waits while the socket's send buffer is full.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::task::{Context, Poll, Waker, ready};

use crate::datagram::{Outgoing, RawAddr};
use crate::driver::{Given, InFlight, SendNow};
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
    /// error." What waits for send buffer and then fails is the next `send`'s error.
    pub(crate) async fn send(
        &self,
        mut datagrams: impl ExactSizeIterator<Item = (Vec<u8>, Option<SocketAddr>)>,
    ) -> Result<u64, ErrorCode> {
        self.driver.check()?;
        match self.take_blocked() {
            None => return Ok(0),
            Some(result) => result?,
        }
        self.settled().await?;
        let remote = self.remote();
        let mut batch = Checked { accepted: Vec::with_capacity(datagrams.len()), refused: None };
        if let Some(asked) = self.check_batch(&mut datagrams, remote, &mut batch) {
            // Boxed, because few hosts have to be waited for.
            batch = Box::pin(self.check_asked(asked, datagrams, remote, batch)).await;
        }
        let Checked { accepted, refused } = batch;
        if accepted.is_empty() {
            return refused.map_or(Ok(0), Err);
        }
        self.take_error()?;
        if self.ctx.account.sending.is_used_up() {
            // Boxed, because few guests have so much waiting.
            return Box::pin(self.send_while_taken(accepted)).await;
        }
        let accepted_len = accepted.len() as u64;
        // The payloads are the ring's from here until the kernel has taken or refused them.
        let mut in_flight = self.submit(Op::Send(SendOp::new(accepted)))?;
        let result = poll_fn(|cx| in_flight.poll_submitted(cx)).await;
        if in_flight.has_yielded() {
            self.ctx.budget.renew();
        }
        match result {
            Some(Ok(Output::Sent(sent))) => {
                self.count_sent(sent);
                Ok(sent.datagrams)
            }
            Some(Ok(_)) => Ok(0),
            Some(Err(errno)) => Err(errno.into()),
            None => {
                in_flight.charge(&self.ctx.account);
                self.set_blocked(Box::new(in_flight));
                Ok(accepted_len)
            }
        }
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
            let given = SendNow::new(driver, guest, slot, datagram, false).given().await;
            let ended = match given {
                Ok(Given::Answered(Ok(Output::Unsent(_)))) => self.wait_for_room().await,
                Ok(Given::Answered(Ok(_))) => {
                    self.ctx.account.counters.sent.count(1, bytes);
                    taken += 1;
                    continue;
                }
                Ok(Given::Queued(_)) => unreachable!("it must not be queued"),
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
            self.set_blocked(Box::new(waiting));
        }
        Ok(())
    }

    /// Records what the next `send` waits for.
    fn set_blocked(&self, accepted: Box<InFlight>) {
        // Dropped at the block's end, with the lock released.
        let _previous = self.lock().blocked_send.replace(accepted);
    }

    /// What has come of it; `None` while it is on its way.
    pub(super) fn take_blocked(&self) -> Option<Result<(), ErrorCode>> {
        let Some(mut blocked) = self.lock().blocked_send.take() else { return Some(Ok(())) };
        let result = blocked.try_result();
        if let Some(Ok(Output::Sent(sent))) = result
            && !blocked.is_charged()
        {
            self.count_sent(sent);
        }
        match result {
            None => {
                self.set_blocked(blocked);
                None
            }
            Some(Err(errno) | Ok(Output::Sent(Sent { error: Some(errno), .. }))) => {
                Some(Err(errno.into()))
            }
            Some(Ok(_)) => Some(Ok(())),
        }
    }

    /// Ready with it. A thread that is inside has it within microseconds, unless there is no send buffer.
    fn poll_blocked(&self, cx: &mut Context<'_>) -> Poll<Result<(), ErrorCode>> {
        if let Some(result) = self.take_blocked() {
            return Poll::Ready(result);
        }
        ready!(self.driver.poll_entered(cx))?;
        ready!(self.poll_sendable(cx));
        Poll::Ready(self.take_blocked().unwrap_or(Ok(())))
    }

    /// Waits until the kernel has taken all that was sent.
    pub(crate) async fn sendable(&self) {
        poll_fn(|cx| self.poll_sendable(cx)).await;
    }

    /// Ready when the kernel has taken all that was sent.
    pub(crate) fn poll_sendable(&self, cx: &mut Context<'_>) -> Poll<()> {
        // Taken out to be polled with the state unlocked.
        let blocked = self.lock().blocked_send.take();
        let Some(blocked) = blocked else { return Poll::Ready(()) };
        let poll = blocked.poll_is_done(cx);
        // Put back also when done: the next `send` fetches its error.
        self.set_blocked(blocked);
        if poll.is_ready() {
            let first = self.lock().first.take();
            first.into_iter().for_each(Waker::wake);
        }
        poll
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
        let mut reached = self.send_line.lock().await;
        if let Err(error) = self.as_first(poll_fn(|cx| self.poll_blocked(cx))).await {
            *reached = None;
            return Err(error);
        }
        let bytes = payload.len();
        // Where it goes is the kernel's peer's when it goes, as with wasmtime-wasi.
        let mut datagram = Box::new(Outgoing { payload, to: named(effective, remote) });
        // What went well lately will again: it may be another thread's to submit.
        let may_queue = !self.ctx.account.sending.is_used_up()
            && reached.as_ref().is_some_and(|last| last.to == effective && bytes <= last.bytes);
        loop {
            self.take_error()?;
            let (guest, slot) = (self.ctx.guest, self.bound_slot());
            let send = SendNow::new(&self.driver, guest, slot, datagram, may_queue);
            match send.given().await? {
                Given::Queued(mut queued) => {
                    queued.charge(&self.ctx.account);
                    self.set_blocked(Box::new(queued));
                    return Ok(());
                }
                Given::Answered(Ok(Output::Unsent(unsent))) => datagram = unsent,
                Given::Answered(Ok(_)) => {
                    self.ctx.account.counters.sent.count(1, bytes as u64);
                    let last = Reached { to: effective, bytes };
                    match &mut *reached {
                        Some(reached) => **reached = last,
                        None => *reached = Some(Box::new(last)),
                    }
                    return Ok(());
                }
                Given::Answered(Err(errno)) => {
                    *reached = None;
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
            let datagram = Outgoing { payload, to: named(effective, remote) };
            match self.judge(effective, SocketAddrUse::UdpSend, false) {
                Judged::Now(Ok(())) => batch.accepted.push(datagram),
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
}

/// The address that a datagram's entry names: none for a connected socket's, whose peer the kernel knows
/// better. (What the guest has connected to may have been rewritten, by a load balancer's cgroup program.)
fn named(effective: SocketAddr, remote: Option<Remote>) -> Option<RawAddr> {
    remote.is_none().then(|| effective.into())
}
