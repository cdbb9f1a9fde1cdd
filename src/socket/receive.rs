//! To the guest: what has arrived, past the policy and the peer filter.
//!
//! The one place where a datagram is admitted is `admit`: the policy decides about its sender when
//! the guest's call, or its wait, takes it from the queue. A datagram that a wait has found, and no
//! call has taken yet, is kept in front of the queue, and judged again only if the guest connects meanwhile.
//! So is one while the host has to be waited for: whoever takes the next datagram polls its verdict. Only the
//! first is ever asked about, so that the order holds; the others are the queue's, and so are its bounds.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::task::coop::consume_budget;

use crate::driver::first_poll;
use crate::error::{Errno, ErrorCode, RingGone};
use crate::limits::{BATCH_DATAGRAMS_MAX, BUDGET_BATCHED, BUDGET_DATAGRAMS, RECEIVE_BYTES_MAX};
use crate::ring::receive_queue::{Arrival, Datagram, QueueLimits, ReceiveQueue, Taken};
use crate::socket::guest::GuestCtx;
use crate::socket::policy::{Judged, Question, Reason, SocketAddrUse};
use crate::socket::{Asked, Front, Receiver, Remote, UdpSocket};
use crate::sync::Mutex;

impl Receiver {
    fn new(queue: Arc<ReceiveQueue>) -> Self {
        let line = tokio::sync::Mutex::const_new(());
        Self { queue, line, front: Mutex::new(None) }
    }

    fn keep_front(&self, front: Front) {
        // Empty: it was taken before.
        *self.front.lock().unwrap_or_else(PoisonError::into_inner) = Some(front);
    }
}

/// What a call that takes datagrams has done, and what is left to do when it is through, also if the host's
/// policy panics.
struct Taking<'socket> {
    socket: &'socket UdpSocket,
    receiver: &'socket Receiver,
    /// Datagrams kept from the guest.
    by_policy: u64,
    not_from_peer: u64,
    /// Those that are lost if the policy panics.
    at_stake: u64,
    /// The receive is to be armed again: not before, because it would go on for as long as datagrams arrive, and
    /// with all in the queue that is put back into it.
    resumes: bool,
}

impl<'socket> Taking<'socket> {
    fn new(socket: &'socket UdpSocket, receiver: &'socket Receiver) -> Self {
        Self { socket, receiver, by_policy: 0, not_from_peer: 0, at_stake: 0, resumes: false }
    }

    fn has_withheld(&self) -> bool {
        self.by_policy + self.not_from_peer > 0
    }

    fn count(&self) {
        let Self { socket: UdpSocket { ctx, driver, .. }, by_policy, not_from_peer, .. } = *self;
        let counters = &ctx.account.counters;
        counters.dropped_by_policy.add(by_policy);
        counters.dropped_not_from_peer.add(not_from_peer);
        driver.count(|stats| {
            stats.dropped_by_policy += by_policy;
            stats.dropped_not_from_peer += not_from_peer;
        });
    }
}

impl Drop for Taking<'_> {
    fn drop(&mut self) {
        self.by_policy += self.at_stake;
        if self.has_withheld() {
            self.count();
        }
        if self.resumes {
            let Self { socket, receiver, .. } = *self;
            socket.driver.resume(socket.ctx.guest, socket.bound_slot(), &receiver.queue);
        }
    }
}

/// What a call that does not wait has found.
enum Batch {
    Admitted(Vec<Datagram>),
    /// Nothing of it is for the guest.
    Withheld,
    Empty,
    /// The host is asked about the first.
    Asked,
    UnknownPeer,
}

/// What a call that waits for an arrival has to do next.
enum Next {
    Arrival(Arrival),
    BudgetIsSpent,
    /// Nothing may come any more: the kernel refuses enters.
    Refused(Errno),
    /// Whether a datagram is the peer's only the kernel can tell.
    UnknownPeer,
}

/// What is there for a call that waits.
enum Found {
    Next(Next),
    Nothing,
    /// The host is asked about the first datagram, and wakes the task.
    Asked,
}

/// Whether the guest may see a datagram.
enum Admission {
    Given,
    Withheld,
    Asked(Question),
}

impl UdpSocket {
    /// Arms the receive, unless that was done; afterwards what waited in the kernel is in the queue.
    async fn receiver(&self) -> Result<&Receiver, Errno> {
        poll_fn(|cx| {
            let GuestCtx { guest, account, .. } = &*self.ctx;
            let driver = &self.driver;
            // In a fork the lock of an armed receive's queue may be held for ever.
            driver.check()?;
            let receiver: &Receiver = if let Some(armed) = self.receiver.get() {
                armed
            } else {
                let (queue, flush) = driver.arm(*guest, self.bound_slot(), account)?;
                self.lock().arming = Some(Box::new(flush));
                self.receiver.get_or_init(|| Box::new(Receiver::new(queue)))
            };
            // Taken out to be polled with the state unlocked. Kept until it has ended, because the
            // call may be dropped in between.
            let arming = self.lock().arming.take();
            if let Some(mut flush) = arming {
                let Poll::Ready(armed) = flush.poll(driver, cx) else {
                    self.lock().arming = Some(flush);
                    return Poll::Pending;
                };
                armed?;
            }
            Poll::Ready(Ok(receiver))
        })
        .await
    }

    /// Up to `max` datagrams that are there already, at most as many as wasmtime-wasi hands out.
    pub(crate) async fn receive(&self, max: u64) -> Result<Vec<Datagram>, ErrorCode> {
        let max = usize::try_from(max).unwrap_or(usize::MAX).min(BATCH_DATAGRAMS_MAX);
        if max == 0 {
            return Ok(Vec::new());
        }
        // A guest that calls again and again does not suspend by itself.
        consume_budget().await;
        let receiver = self.receiver().await?;
        let most = QueueLimits { datagrams: max, bytes: RECEIVE_BYTES_MAX };
        let mut has_reaped = false;
        loop {
            self.ctx.yield_if_spent(BUDGET_BATCHED).await;
            // What it takes is not to lie in this future while that waits.
            let batch = poll_fn(|cx| Poll::Ready(self.take_batch(receiver, most, cx))).await?;
            let is_peer_known = match batch {
                Batch::Admitted(datagrams) => return Ok(datagrams),
                // WIT: `receive` does not wait.
                Batch::Asked => return Ok(Vec::new()),
                Batch::Empty if std::mem::replace(&mut has_reaped, true) => {
                    self.ctx.stretch.hear_nothing();
                    return Ok(Vec::new());
                }
                Batch::Withheld => continue,
                Batch::Empty if self.driver.may_miss(self.bound_slot()) => true,
                Batch::Empty => {
                    self.reap()?;
                    continue;
                }
                Batch::UnknownPeer => false,
            };
            // Boxed, because few guests receive right after several sends, or on another thread than before, and
            // few sockets hear from another address than they have asked for.
            Box::pin(self.prepare(receiver, is_peer_known)).await?;
        }
    }

    /// What comes before another look at the queue.
    async fn prepare(&self, receiver: &Receiver, is_peer_known: bool) -> Result<(), Errno> {
        if !is_peer_known {
            return self.ask_for_peer().await;
        }
        // What comes next may be the answer to what the guest has sent, perhaps to a socket of its own.
        let guest = self.ctx.guest;
        let receive_now = self.driver.receive_now(guest, self.bound_slot(), &receiver.queue)?;
        if let Some(receive_now) = receive_now {
            return receive_now.result().await.map(drop);
        }
        let mut flush = self.driver.flush_deferred(guest)?;
        poll_fn(|cx| flush.poll(&self.driver, cx)).await?;
        self.reap()
    }

    fn reap(&self) -> Result<(), Errno> {
        self.driver.reap(Some(self.ctx.guest)).map_or(Ok(()), Err)
    }

    /// Takes a batch from the queue, as far as the guest may see it.
    fn take_batch(
        &self,
        receiver: &Receiver,
        most: QueueLimits,
        cx: &mut Context<'_>,
    ) -> Result<Batch, Errno> {
        let mut taking = Taking::new(self, receiver);
        let Poll::Ready(first) = self.poll_front(receiver, cx, &mut taking) else {
            return receiver.queue.take_error().map_or(Ok(Batch::Asked), Err);
        };
        let is_admitted = first.is_some();
        let Taken { arrivals, resumes, is_drained } = receiver.queue.take(first, most)?;
        taking.resumes = resumes;
        if is_drained && !arrivals.is_empty() {
            self.ctx.stretch.hear();
        }
        let batch = self.judge_batch(receiver, arrivals, is_admitted, &mut taking, cx);
        let is_withheld = taking.has_withheld() && matches!(batch, Batch::Empty);
        Ok(if is_withheld { Batch::Withheld } else { batch })
    }

    /// What of these datagrams the guest may see, the first of which it may if `is_admitted`.
    fn judge_batch(
        &self,
        receiver: &Receiver,
        mut datagrams: Vec<Datagram>,
        mut is_admitted: bool,
        taking: &mut Taking<'_>,
        cx: &mut Context<'_>,
    ) -> Batch {
        if datagrams.is_empty() {
            return Batch::Empty;
        }
        let remote = self.remote();
        if let Some(remote) = remote
            && datagrams.iter().any(|datagram| remote.is_unknown_by(datagram.from))
        {
            receiver.queue.put_back(datagrams);
            return Batch::UnknownPeer;
        }
        let (mut admitted, mut judged) = (0, 0);
        let mut is_asked = false;
        while let Some(datagram) = datagrams.get(judged) {
            taking.at_stake = (datagrams.len() - judged + admitted) as u64;
            let is_next = if std::mem::take(&mut is_admitted) {
                Admission::Given
            } else {
                self.admit(datagram.from, remote, cx, taking)
            };
            match is_next {
                Admission::Given => {
                    datagrams.swap(admitted, judged);
                    admitted += 1;
                }
                Admission::Withheld => {}
                Admission::Asked(question) => {
                    let mut rest = datagrams.drain(judged..);
                    let datagram = rest.next().expect("it was there");
                    receiver.queue.put_back(rest.collect());
                    receiver.keep_front(Front::Asked(Box::new(Asked { datagram, question })));
                    is_asked = true;
                    break;
                }
            }
            judged += 1;
        }
        taking.at_stake = 0;
        datagrams.truncate(admitted);
        self.ctx.stretch.take(judged);
        match (admitted, is_asked) {
            (0, true) => Batch::Asked,
            (0, false) => Batch::Withheld,
            _ => Batch::Admitted(datagrams),
        }
    }

    /// Who the peer is, by the kernel.
    async fn ask_for_peer(&self) -> Result<(), Errno> {
        match self.remote() {
            Some(remote) => self.query_peer(remote).await.map(drop),
            None => Ok(()),
        }
    }

    /// The next datagram, waited for; concurrent calls are served in the order they came. A call that
    /// is dropped leaves every datagram where it is.
    pub(crate) async fn receive_one(&self) -> Result<Datagram, ErrorCode> {
        if !self.lock().is_bound() {
            let is_binding = self.lock().is_binding();
            if !(is_binding && self.first_in_line(self.is_bound()).await) {
                return Err(ErrorCode::InvalidState);
            }
        }
        let receiver = self.receiver().await?;
        let _line = receiver.line.lock().await;
        self.ctx.yield_if_spent(BUDGET_DATAGRAMS).await;
        let arrival = self.next_arrival(receiver).await?;
        self.ctx.stretch.take(1);
        Ok(arrival?)
    }

    /// Ready when `receive` would return a datagram or an error.
    pub(crate) async fn receivable(&self) {
        // What a ring that is gone answers the guest hears from its next call.
        let Ok(receiver) = self.receiver().await else { return };
        match self.next_arrival(receiver).await {
            Ok(Ok(datagram)) => receiver.keep_front(Front::Admitted(datagram)),
            Ok(Err(errno)) => receiver.queue.put_back_error(errno),
            // No error of the socket's: its next call asks again.
            Err(_) => {}
        }
    }

    /// The next arrival that the guest may see, waited for. Those that it may not see cost it budget,
    /// so that their senders do not hold up the thread's other tasks.
    async fn next_arrival(&self, receiver: &Receiver) -> Result<Arrival, Errno> {
        loop {
            // What it finds is not to lie in this future while that waits.
            let is_peer_known = match poll_fn(|cx| self.poll_arrival(receiver, cx)).await {
                Next::Arrival(arrival) => return Ok(arrival),
                Next::Refused(refusal) => return Err(refusal),
                Next::BudgetIsSpent => true,
                Next::UnknownPeer => false,
            };
            if is_peer_known {
                self.ctx.yield_if_spent(BUDGET_DATAGRAMS).await;
            } else {
                Box::pin(self.ask_for_peer()).await?;
            }
        }
    }

    /// Ready with the next arrival that the guest may see, or with what is to be done before.
    fn poll_arrival(&self, receiver: &Receiver, cx: &mut Context<'_>) -> Poll<Next> {
        let gone = |gone: RingGone| Poll::Ready(Next::Refused(gone.into()));
        let check = || self.driver.check().map_err(gone);
        if let Err(gone) = check() {
            return gone;
        }
        let mut refusal = None;
        let mut found = self.take_arrival(receiver, cx);
        if matches!(found, Found::Nothing) {
            // The task is not registered yet: what this reaps would wake the very task that reaps.
            refusal = self.driver.start_reaping(self.ctx.guest);
            found = self.take_arrival(receiver, cx);
            if matches!(found, Found::Nothing) {
                self.driver.arm_here(self.ctx.guest, self.bound_slot());
            }
        }
        if let Found::Next(next) = found {
            return Poll::Ready(next);
        }
        drop(receiver.queue.register(cx.waker().clone()));
        // Another thread may have reaped something in between, or closed the ring.
        if let Err(gone) = check() {
            return gone;
        }
        if matches!(found, Found::Asked) {
            // Nothing but an error comes before the datagram that the host is asked about.
            if let Some(errno) = receiver.queue.take_error() {
                return Poll::Ready(Next::Arrival(Err(errno)));
            }
        } else if let Found::Next(next) = self.take_arrival(receiver, cx) {
            return Poll::Ready(next);
        }
        if let Some(refusal) = refusal {
            return Poll::Ready(Next::Refused(refusal));
        }
        if !first_poll::is_first(cx) {
            self.ctx.stretch.end();
        }
        Poll::Pending
    }

    /// Takes arrivals, the one in front of the queue first, until the guest may see one; the others are dropped,
    /// and after a budget of them the task is to yield. Errors always pass.
    fn take_arrival(&self, receiver: &Receiver, cx: &mut Context<'_>) -> Found {
        let mut taking = Taking::new(self, receiver);
        match self.poll_front(receiver, cx, &mut taking) {
            Poll::Pending => Found::Asked,
            Poll::Ready(Some(datagram)) => Found::Next(Next::Arrival(Ok(datagram))),
            Poll::Ready(None) => self.take_queued(receiver, cx, &mut taking),
        }
    }

    fn take_queued(
        &self,
        receiver: &Receiver,
        cx: &mut Context<'_>,
        taking: &mut Taking<'_>,
    ) -> Found {
        loop {
            let Taken { arrivals: arrival, resumes, is_drained } = receiver.queue.take_first();
            if is_drained && arrival.is_some() {
                self.ctx.stretch.hear();
            }
            taking.resumes |= resumes;
            let datagram = match arrival {
                None => break Found::Nothing,
                Some(Err(errno)) => break Found::Next(Next::Arrival(Err(errno))),
                Some(Ok(datagram)) => datagram,
            };
            let remote = self.remote();
            if let Some(remote) = remote
                && remote.is_unknown_by(datagram.from)
            {
                receiver.queue.put_back(vec![datagram]);
                break Found::Next(Next::UnknownPeer);
            }
            taking.at_stake = 1;
            let admission = self.admit(datagram.from, remote, cx, taking);
            taking.at_stake = 0;
            match admission {
                Admission::Given => break Found::Next(Next::Arrival(Ok(datagram))),
                Admission::Withheld => {}
                Admission::Asked(question) => {
                    receiver.keep_front(Front::Asked(Box::new(Asked { datagram, question })));
                    break Found::Asked;
                }
            }
            self.ctx.stretch.take(1);
            if self.ctx.stretch.is_budget_spent(BUDGET_DATAGRAMS) {
                break Found::Next(Next::BudgetIsSpent);
            }
        }
    }

    /// Ready with the datagram in front of the queue, unless the guest may not see it; pending while the host
    /// is asked. Only one task takes a socket's datagrams, so none misses the front while it is polled.
    fn poll_front(
        &self,
        receiver: &Receiver,
        cx: &mut Context<'_>,
        taking: &mut Taking<'_>,
    ) -> Poll<Option<Datagram>> {
        let mut asked = match receiver.take_front() {
            None => return Poll::Ready(None),
            Some(Front::Admitted(datagram)) => return Poll::Ready(Some(datagram)),
            Some(Front::Asked(asked)) => asked,
        };
        taking.at_stake = 1;
        let polled = Pin::new(&mut asked.question).poll(cx);
        taking.at_stake = 0;
        let Poll::Ready(answer) = polled else {
            receiver.keep_front(Front::Asked(asked));
            return Poll::Pending;
        };
        let datagram = asked.datagram;
        let is_admitted = self.is_admitted(answer, datagram.from, self.remote(), taking);
        Poll::Ready(is_admitted.then_some(datagram))
    }

    /// Whether the guest may see a datagram of this sender. The policy is the host's code: no lock is
    /// held.
    fn admit(
        &self,
        from: SocketAddr,
        remote: Option<Remote>,
        cx: &mut Context<'_>,
        taking: &mut Taking<'_>,
    ) -> Admission {
        let answer = match self.judge(from, SocketAddrUse::UdpReceive, false).poll_once(cx) {
            Judged::Now(answer) => answer,
            Judged::Asked(question) => return Admission::Asked(question),
        };
        if self.is_admitted(answer, from, remote, taking) {
            Admission::Given
        } else {
            Admission::Withheld
        }
    }

    fn is_admitted(
        &self,
        answer: Result<(), Reason>,
        from: SocketAddr,
        remote: Option<Remote>,
        taking: &mut Taking<'_>,
    ) -> bool {
        if let Err(reason) = answer {
            taking.by_policy += 1;
            self.ctx.deny(reason);
            return false;
        }
        // The kernel filters what arrives after the connect, not what was queued before.
        let is_peer = remote.is_none_or(|remote| remote.known() == from);
        taking.not_from_peer += u64::from(!is_peer);
        is_peer
    }

    /// The socket has another peer: what was judged before is judged again.
    pub(super) fn readmit(&self) {
        let Some(receiver) = self.receiver.get() else { return };
        let datagram = match receiver.take_front() {
            None => return,
            Some(Front::Admitted(datagram)) => datagram,
            Some(Front::Asked(asked)) => asked.datagram,
        };
        receiver.queue.put_back(vec![datagram]);
        // The call that waited for the host's answer is to ask anew.
        receiver.queue.take_waker().into_iter().for_each(Waker::wake);
    }

    /// The socket's pending error, which a call that sends is told if it comes before one that
    /// receives.
    pub(super) fn take_error(&self) -> Result<(), ErrorCode> {
        let error = self.receiver.get().and_then(|receiver| receiver.queue.take_error());
        error.map_or(Ok(()), |errno| Err(errno.into()))
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::pin::pin;
    use std::task::Poll;
    use std::time::{Duration, Instant};

    use crate::datagram::Family;
    use crate::{SocketAddrUse, UdpCtx, Uring};

    /// Wasmtime moves a call's future twice before it is polled. Up to 128 bytes compilers move in
    /// registers; beyond that each move is a call of memcpy, of some 50 instructions.
    #[test]
    fn futures_of_calls_that_take_what_is_there_are_moved_in_registers() {
        let uring = Uring::builder().sockets(1).build().unwrap();
        let mut ctx = UdpCtx::builder(&uring).allow(|_, _| true).build();
        let socket = ctx.new_socket(Family::V4).unwrap();
        assert!(size_of_val(&socket.receive(16)) <= 128);
        assert!(size_of_val(&socket.receivable()) <= 128);
    }

    /// Kills: a receive that stays paused because the call that was to resume it has panicked.
    #[test]
    fn a_socket_hears_on_after_its_policy_has_panicked() {
        let [stranger, friend] =
            [(); 2].map(|()| std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
        let from_stranger = stranger.local_addr().unwrap();
        let uring = Uring::builder().sockets(1).queue_datagrams(1).queue_bytes(1).build().unwrap();
        let ctx = UdpCtx::builder(&uring).allow(move |addr, addr_use| {
            let is_sender = matches!(addr_use, SocketAddrUse::UdpReceive);
            assert!(!is_sender || addr != from_stranger, "a stranger");
            true
        });
        let socket = ctx.build().new_socket(Family::V4).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            socket.bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
            let local = socket.local_address().await.unwrap();
            assert_eq!(socket.receive(1).await.map(|datagrams| datagrams.len()), Ok(0), "armed");
            stranger.send_to(b"x", local).unwrap();
            while uring.stats().pauses == 0 {
                tokio::task::yield_now().await;
            }
            {
                let mut receives = pin!(socket.receive(1));
                let panics = poll_fn(|cx| {
                    match catch_unwind(AssertUnwindSafe(|| receives.as_mut().poll(cx))) {
                        Ok(poll) => poll.map(|_| false),
                        Err(_panic) => Poll::Ready(true),
                    }
                });
                assert!(panics.await);
            }
            friend.send_to(b"y", local).unwrap();
            let begun = Instant::now();
            let heard = loop {
                match socket.receive(1).await.unwrap().pop() {
                    Some(heard) => break heard,
                    None => tokio::task::yield_now().await,
                }
                assert!(begun.elapsed() < Duration::from_mins(1), "it is deaf");
            };
            assert_eq!(heard.payload, b"y");
        });
    }
}
