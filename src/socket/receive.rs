//! To the guest: what has arrived, past the policy and the peer filter.
//!
//! The one place where a datagram is admitted is `admits`: the policy decides about its sender when
//! the guest's call, or its wait, takes it from the queue. A datagram that a wait has found, and no
//! call has taken yet, is kept admitted, and judged again only if the guest connects meanwhile.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use tokio::task::coop::consume_budget;

use crate::driver::first_poll;
use crate::error::{Errno, ErrorCode, RingGone};
use crate::limits::{BATCH_DATAGRAMS_MAX, BUDGET_BATCHED, BUDGET_DATAGRAMS, RECEIVE_BYTES_MAX};
use crate::ring::receive_queue::{Arrival, Datagram, QueueLimits, ReceiveQueue, Taken};
use crate::socket::guest::GuestCtx;
use crate::socket::policy::SocketAddrUse;
use crate::socket::{Receiver, Remote, UdpSocket};

impl Receiver {
    fn new(queue: Arc<ReceiveQueue>) -> Self {
        let line = tokio::sync::Mutex::const_new(());
        Self { queue, line, admitted: Mutex::new(None) }
    }

    fn keep_admitted(&self, datagram: Datagram) {
        *self.admitted.lock().unwrap_or_else(PoisonError::into_inner) = Some(datagram);
    }
}

/// Datagrams kept from a guest.
#[derive(Default)]
struct Withheld {
    by_policy: u64,
    not_from_peer: u64,
}

/// What a call that does not wait has found.
enum Batch {
    Admitted(Vec<Datagram>),
    /// Nothing of it is for the guest.
    Withheld,
    Empty,
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

impl UdpSocket {
    /// Arms the receive, unless that was done; afterwards what waited in the kernel is in the queue.
    async fn receiver(&self) -> Result<&Receiver, Errno> {
        poll_fn(|cx| {
            let GuestCtx { guest, queued, .. } = &*self.ctx;
            let driver = &self.driver;
            // In a fork the lock of an armed receive's queue may be held for ever.
            driver.check()?;
            let receiver: &Receiver = if let Some(armed) = self.receiver.get() {
                armed
            } else {
                let (queue, flush) = driver.arm(*guest, self.bound_slot(), queued)?;
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
            let is_peer_known = match self.take_batch(receiver, most)? {
                Batch::Admitted(datagrams) => return Ok(datagrams),
                Batch::Withheld => true,
                Batch::Empty if std::mem::replace(&mut has_reaped, true) => return Ok(Vec::new()),
                Batch::Empty => match self.driver.reap() {
                    Some(refusal) => return Err(refusal.into()),
                    None => true,
                },
                Batch::UnknownPeer => false,
            };
            if !is_peer_known {
                // Boxed, because few sockets hear from another address than they have asked for.
                Box::pin(self.ask_for_peer()).await?;
            }
        }
    }

    /// Takes a batch from the queue, as far as the guest may see it.
    fn take_batch(&self, receiver: &Receiver, most: QueueLimits) -> Result<Batch, Errno> {
        let first = receiver.take_admitted();
        let mut is_admitted = first.is_some();
        let Taken { arrivals: mut datagrams, resumes } = receiver.queue.take(first, most)?;
        if resumes {
            self.resume(receiver);
        }
        if datagrams.is_empty() {
            return Ok(Batch::Empty);
        }
        let remote = self.remote();
        if let Some(remote) = remote
            && datagrams.iter().any(|datagram| remote.is_unknown_by(datagram.from))
        {
            receiver.queue.put_back(datagrams);
            return Ok(Batch::UnknownPeer);
        }
        self.ctx.budget.spend(datagrams.len());
        let mut withheld = Withheld::default();
        datagrams.retain(|datagram| {
            std::mem::take(&mut is_admitted) || self.admits(datagram.from, remote, &mut withheld)
        });
        self.count(&withheld);
        Ok(if datagrams.is_empty() { Batch::Withheld } else { Batch::Admitted(datagrams) })
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
        self.ctx.budget.spend(1);
        Ok(arrival?)
    }

    /// Ready when `receive` would return a datagram or an error.
    pub(crate) async fn receivable(&self) {
        // What a ring that is gone answers the guest hears from its next call.
        let Ok(receiver) = self.receiver().await else { return };
        match self.next_arrival(receiver).await {
            Ok(Ok(datagram)) => receiver.keep_admitted(datagram),
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
        if let Some(datagram) = receiver.take_admitted() {
            return Poll::Ready(Next::Arrival(Ok(datagram)));
        }
        if let taken @ Poll::Ready(_) = self.take_arrival(receiver) {
            return taken;
        }
        // The task is not registered yet: what this reaps would wake the very task that reaps.
        let refusal = self.driver.start_reaping();
        if let taken @ Poll::Ready(_) = self.take_arrival(receiver) {
            return taken;
        }
        drop(receiver.queue.register(cx.waker().clone()));
        // Another thread may have reaped something in between, or closed the ring.
        if let Err(gone) = check() {
            return gone;
        }
        if let taken @ Poll::Ready(_) = self.take_arrival(receiver) {
            return taken;
        }
        if let Some(refusal) = refusal {
            return Poll::Ready(Next::Refused(refusal));
        }
        if !first_poll::is_first(cx) {
            self.ctx.budget.renew();
        }
        Poll::Pending
    }

    /// Takes arrivals from the queue until the guest may see one; the others are dropped, and after a
    /// budget of them the task is to yield. Errors always pass. Pending if the queue is empty.
    fn take_arrival(&self, receiver: &Receiver) -> Poll<Next> {
        let mut withheld = Withheld::default();
        let mut has_resumed = false;
        let taken = loop {
            let Taken { arrivals: arrival, resumes } = receiver.queue.take_first();
            has_resumed |= resumes;
            let datagram = match arrival {
                None => break Poll::Pending,
                Some(Err(errno)) => break Poll::Ready(Next::Arrival(Err(errno))),
                Some(Ok(datagram)) => datagram,
            };
            let remote = self.remote();
            if let Some(remote) = remote
                && remote.is_unknown_by(datagram.from)
            {
                receiver.queue.put_back(vec![datagram]);
                break Poll::Ready(Next::UnknownPeer);
            }
            if self.admits(datagram.from, remote, &mut withheld) {
                break Poll::Ready(Next::Arrival(Ok(datagram)));
            }
            self.ctx.budget.spend(1);
            if self.ctx.budget.is_spent(BUDGET_DATAGRAMS) {
                break Poll::Ready(Next::BudgetIsSpent);
            }
        };
        self.count(&withheld);
        // Not in the loop, which would go on for as long as datagrams arrive.
        if has_resumed {
            self.resume(receiver);
        }
        taken
    }

    /// Whether the guest may see a datagram of this sender. The policy is the host's code: no lock is
    /// held.
    fn admits(&self, from: SocketAddr, remote: Option<Remote>, withheld: &mut Withheld) -> bool {
        let is_allowed = self.ctx.policy.check(from, SocketAddrUse::UdpReceive).is_ok();
        // The kernel filters what arrives after the connect, not what was queued before.
        let is_peer = remote.is_none_or(|remote| remote.known() == from);
        withheld.by_policy += u64::from(!is_allowed);
        withheld.not_from_peer += u64::from(is_allowed && !is_peer);
        is_allowed && is_peer
    }

    /// The socket has another peer: what was admitted before is judged again.
    pub(super) fn readmit(&self) {
        let Some(receiver) = self.receiver.get() else { return };
        if let Some(datagram) = receiver.take_admitted() {
            receiver.queue.put_back(vec![datagram]);
        }
    }

    /// The socket's pending error, which a call that sends is told if it comes before one that
    /// receives.
    pub(super) fn take_error(&self) -> Result<(), ErrorCode> {
        let error = self.receiver.get().and_then(|receiver| receiver.queue.take_error());
        error.map_or(Ok(()), |errno| Err(errno.into()))
    }

    fn count(&self, Withheld { by_policy, not_from_peer }: &Withheld) {
        if by_policy + not_from_peer > 0 {
            self.driver.count(|stats| {
                stats.dropped_by_policy += by_policy;
                stats.dropped_not_from_peer += not_from_peer;
            });
        }
    }

    fn resume(&self, receiver: &Receiver) {
        self.driver.resume(self.ctx.guest, self.bound_slot(), &receiver.queue);
    }
}

#[cfg(test)]
mod tests {
    use crate::datagram::Family;
    use crate::{UdpCtx, Uring};

    /// Wasmtime moves a call's future twice before it is polled. Up to 128 bytes compilers move in
    /// registers; beyond that each move is a call of memcpy, of some 50 instructions.
    #[test]
    fn futures_of_calls_that_take_what_is_there_are_moved_in_registers() {
        let uring = Uring::builder().sockets(1).build().unwrap();
        let ctx = UdpCtx::builder(&uring).allow(|_, _| true).build();
        let socket = ctx.new_socket(Family::V4).unwrap();
        assert!(size_of_val(&socket.receive(16)) <= 128);
        assert!(size_of_val(&socket.receivable()) <= 128);
    }
}
