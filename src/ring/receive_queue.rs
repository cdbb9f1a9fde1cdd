//! A socket's own bounded queue: datagrams between the ring's buffers and the guest. And its one
//! pending error, which is told once and before the datagrams, as the kernel's sockets do (socket(7),
//! `SO_ERROR`): an armed receive takes the kernel's each time, so that a guest would meet a stale one
//! for every question that was refused.
//!
//! A slot's new owner gets a new queue, so nothing reaches it that was meant for the last one.
//!
//! Its lock is a leaf: the ring takes it under the driver's lock, the guest's thread without. No
//! waker is called, cloned or dropped under it.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};
use std::task::Waker;

use super::account::Account;
use super::quota::ByteQuota;
use crate::error::Errno;
use crate::limits::{QUEUE_DATAGRAMS_DEFAULT, QUEUE_SLACK_BYTES, QUEUED_DATAGRAM_BYTES};
use crate::sync::{Mutex, MutexGuard};

/// A datagram as the guest gets it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Datagram {
    pub(crate) payload: Vec<u8>,
    pub(crate) from: SocketAddr,
}

impl Datagram {
    /// The memory that it is counted as.
    fn bytes(&self) -> usize {
        self.payload.len() + QUEUED_DATAGRAM_BYTES
    }
}

/// What a guest can take: a datagram, or the socket's pending error.
pub(crate) type Arrival = Result<Datagram, Errno>;

/// What a delivery leads to.
pub(crate) struct Pushed {
    /// Datagrams in the queue now.
    pub(crate) queued: usize,
    /// The queue had no room for it, so it was dropped.
    pub(crate) is_dropped: bool,
    /// This delivery has filled the queue: its receive is to be cancelled.
    pub(crate) pauses: bool,
    /// The task that waits for an arrival.
    pub(crate) waker: Option<Waker>,
}

/// What was taken from the queue.
#[derive(Debug)]
pub(crate) struct Taken<T> {
    pub(crate) arrivals: T,
    /// That has ended a pause: the receive is to be armed again.
    pub(crate) resumes: bool,
    /// Nothing is left.
    pub(crate) is_drained: bool,
}

/// When a queue counts as full.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueLimits {
    pub(crate) datagrams: usize,
    pub(crate) bytes: usize,
}

#[derive(Debug)]
pub(crate) struct ReceiveQueue {
    limits: QueueLimits,
    /// The guest's.
    account: Arc<Account>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    datagrams: VecDeque<Datagram>,
    /// What they are counted as.
    bytes: usize,
    error: Option<Errno>,
    /// The one pause state: set when a delivery fills the queue, cleared when the guest has taken
    /// enough. While it is set the ring arms no receive for the socket.
    is_paused: bool,
    waker: Option<Waker>,
}

impl ReceiveQueue {
    pub(crate) fn new(limits: QueueLimits, account: Arc<Account>) -> Self {
        Self { limits, account, state: Mutex::default() }
    }

    /// Bytes that wait in all queues of the guest.
    fn quota(&self) -> &ByteQuota {
        &self.account.queued
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues the datagrams of a message. A full queue has some slack, for what the kernel delivers
    /// before the cancel of the receive takes effect; beyond that the message is dropped. An empty
    /// queue takes one in any case: what waits in others must not keep a guest from hearing of it.
    pub(crate) fn push(&self, datagrams: impl ExactSizeIterator<Item = Datagram>) -> Pushed {
        let mut state = self.lock();
        let is_dropped = !state.datagrams.is_empty()
            && (state.bytes >= self.limits.bytes.saturating_add(QUEUE_SLACK_BYTES)
                || self.quota().is_used_up());
        let count = datagrams.len();
        let counters = &self.account.counters;
        if is_dropped {
            counters.dropped_by_queue.add(count as u64);
        } else {
            let before = state.bytes;
            for datagram in datagrams {
                state.bytes += datagram.bytes();
                state.datagrams.push_back(datagram);
            }
            let bytes = state.bytes - before;
            self.quota().take(bytes);
            counters.received.count(count as u64, (bytes - count * QUEUED_DATAGRAM_BYTES) as u64);
        }
        self.pushed(&mut state, is_dropped)
    }

    /// The socket has an error, instead of the one that was pending.
    pub(crate) fn push_error(&self, errno: Errno) -> Pushed {
        let mut state = self.lock();
        state.error = Some(errno);
        self.pushed(&mut state, false)
    }

    /// Takes the pending error, for a call that sends.
    pub(crate) fn take_error(&self) -> Option<Errno> {
        self.lock().error.take()
    }

    /// Gives the pending error back that a wait has found, unless there is a later one.
    pub(crate) fn put_back_error(&self, errno: Errno) {
        self.lock().error.get_or_insert(errno);
    }

    /// Gives datagrams back that were taken last, before all others.
    pub(crate) fn put_back(&self, datagrams: Vec<Datagram>) {
        let mut state = self.lock();
        for datagram in datagrams.into_iter().rev() {
            state.bytes += datagram.bytes();
            self.quota().take(datagram.bytes());
            state.datagrams.push_front(datagram);
        }
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.lock().is_paused
    }

    /// Takes the pending error or the first datagram.
    pub(crate) fn take_first(&self) -> Taken<Option<Arrival>> {
        let mut state = self.lock();
        if let Some(errno) = state.error.take() {
            let is_drained = state.datagrams.is_empty();
            return Taken { arrivals: Some(Err(errno)), resumes: false, is_drained };
        }
        let arrivals = state.pop();
        self.quota().put_back(arrivals.as_ref().map_or(0, Datagram::bytes));
        let resumes = self.resume_if_drained(&mut state);
        let is_drained = state.datagrams.is_empty();
        Taken { arrivals: arrivals.map(Ok), resumes, is_drained }
    }

    /// Takes datagrams from the front, behind one that was taken before: at most so many in all,
    /// and until so many bytes are taken; or the pending error, if none was taken before.
    pub(crate) fn take(
        &self,
        first: Option<Datagram>,
        most: QueueLimits,
    ) -> Result<Taken<Vec<Datagram>>, Errno> {
        // Empty datagrams take their time, too.
        let weight = |datagram: &Datagram| datagram.payload.len().max(1);
        let mut bytes = first.as_ref().map_or(0, weight);
        let mut state = self.lock();
        if first.is_none()
            && let Some(errno) = state.error.take()
        {
            return Err(errno);
        }
        let capacity = (state.datagrams.len() + first.iter().len()).min(most.datagrams);
        let mut datagrams = Vec::with_capacity(capacity);
        datagrams.extend(first);
        let before = state.bytes;
        while datagrams.len() < most.datagrams && bytes < most.bytes {
            let Some(datagram) = state.pop() else { break };
            bytes += weight(&datagram);
            datagrams.push(datagram);
        }
        self.quota().put_back(before - state.bytes);
        let resumes = self.resume_if_drained(&mut state);
        let is_drained = state.datagrams.is_empty();
        Ok(Taken { arrivals: datagrams, resumes, is_drained })
    }

    /// Registers the task that the next arrival is to wake. The caller drops the waker that was
    /// registered before.
    #[must_use = "it is dropped outside of the caller's locks"]
    pub(crate) fn register(&self, waker: Waker) -> Option<Waker> {
        self.lock().waker.replace(waker)
    }

    pub(crate) fn take_waker(&self) -> Option<Waker> {
        self.lock().waker.take()
    }

    /// The socket is gone: how many datagrams no guest will take, which are counted as its guest's. What comes
    /// later finds a paused queue, so nothing arms a receive for it.
    pub(crate) fn discard(&self) -> u64 {
        let closed = State { is_paused: true, ..State::default() };
        // Dropped, with its waker, outside of the lock.
        let state = std::mem::replace(&mut *self.lock(), closed);
        self.quota().put_back(state.bytes);
        let count = state.datagrams.len() as u64;
        self.account.counters.dropped_at_close.add(count);
        count
    }

    fn pushed(&self, state: &mut State, is_dropped: bool) -> Pushed {
        let pauses = !state.is_paused && self.is_full(state);
        state.is_paused |= pauses;
        Pushed { queued: state.datagrams.len(), is_dropped, pauses, waker: state.waker.take() }
    }

    /// Whether no more should come.
    fn is_full(&self, state: &State) -> bool {
        state.is_full(self.limits) || self.quota().is_half_used()
    }

    /// Ends a pause once the guest has left less than half, and its other sockets no more than that
    /// either. An empty queue waits for no other.
    fn resume_if_drained(&self, state: &mut State) -> bool {
        let half = QueueLimits {
            datagrams: self.limits.datagrams.div_ceil(2),
            bytes: self.limits.bytes.div_ceil(2),
        };
        let has_room = !state.is_full(half) && !self.quota().is_half_used();
        let resumes = state.is_paused && (has_room || state.datagrams.is_empty());
        state.is_paused &= !resumes;
        resumes
    }

    #[cfg(test)]
    pub(crate) fn account(&self) -> &Account {
        &self.account
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        let state = self.lock();
        state.datagrams.is_empty() && state.error.is_none()
    }
}

impl Drop for ReceiveQueue {
    /// What came behind the guest's `discard`, of a receive that had its end before the close, goes with the
    /// last that knows of the queue.
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.account.queued.put_back(state.bytes);
        self.account.counters.dropped_at_close.add(state.datagrams.len() as u64);
    }
}

impl State {
    fn pop(&mut self) -> Option<Datagram> {
        let datagram = self.datagrams.pop_front()?;
        if self.datagrams.is_empty() {
            // A queue that is drained counts nothing, so it is to take nothing either.
            self.datagrams.shrink_to(QUEUE_DATAGRAMS_DEFAULT);
        }
        self.bytes -= datagram.bytes();
        Some(datagram)
    }

    fn is_full(&self, limits: QueueLimits) -> bool {
        self.datagrams.len() >= limits.datagrams || self.bytes >= limits.bytes
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::account::GuestLimits;
    use super::*;

    fn datagram(port: u16, bytes: usize) -> Datagram {
        Datagram { payload: vec![0; bytes], from: ([127, 0, 0, 1], port).into() }
    }

    fn queue(datagrams: usize, bytes: usize) -> ReceiveQueue {
        ReceiveQueue::new(QueueLimits { datagrams, bytes }, Account::of_sockets(1))
    }

    fn push(queue: &ReceiveQueue, datagram: Datagram) -> bool {
        queue.push(std::iter::once(datagram)).pauses
    }

    fn take(queue: &ReceiveQueue, datagrams: usize) -> Result<Taken<Vec<Datagram>>, Errno> {
        queue.take(None, QueueLimits { datagrams, bytes: 1000 })
    }

    fn ports(taken: &Taken<Vec<Datagram>>) -> Vec<u16> {
        taken.arrivals.iter().map(|datagram| datagram.from.port()).collect()
    }

    #[test]
    fn a_full_queue_pauses_once_and_resumes_when_less_than_half_is_left() {
        let queue = queue(4, 1000);
        for port in 1..=3 {
            assert!(!push(&queue, datagram(port, 1)));
        }
        assert!(!queue.is_paused());
        assert!(push(&queue, datagram(4, 1)));
        assert!(queue.is_paused());
        assert!(!push(&queue, datagram(5, 1)), "it pauses once");
        assert!(!take(&queue, 3).unwrap().resumes, "two of four are still half");
        assert!(take(&queue, 1).unwrap().resumes);
        assert!(!queue.is_paused());
        assert!(!take(&queue, 1).unwrap().resumes, "a pause ends once");
    }

    /// What a datagram counts beside its payload.
    const PLACE: usize = QUEUED_DATAGRAM_BYTES;

    #[test]
    fn bytes_fill_a_queue_too_and_leave_it_with_their_datagram() {
        let queue = queue(100, 1000 + PLACE);
        assert!(push(&queue, datagram(1, 1000)));
        let first = queue.take_first();
        assert!(first.arrivals.is_some() && first.resumes);
        assert!(!push(&queue, datagram(1, 999)));
    }

    /// Kills: a queue whose bound is only asked for.
    #[test]
    fn a_full_queue_drops_what_comes_beyond_its_slack_and_one_message() {
        let account = Account::of_sockets(1);
        let queue = ReceiveQueue::new(QueueLimits { datagrams: 4, bytes: 1 }, Arc::clone(&account));
        // Empty ones count, too.
        for bytes in [0, 1000] {
            let each = bytes + PLACE;
            let bound = 1 + QUEUE_SLACK_BYTES;
            let is_dropped = |_: &usize| queue.push(std::iter::once(datagram(1, bytes))).is_dropped;
            assert_eq!((0..=bound).find(is_dropped), Some(bound.div_ceil(each)));
            assert!(account.queued.used() < bound + each);
            assert_eq!(queue.discard(), bound.div_ceil(each) as u64);
            assert_eq!(account.queued.used(), 0);
        }
    }

    /// Kills: a guest's many queues, each within its bound; a queue that what waits in others keeps empty.
    #[test]
    fn the_queues_of_a_guest_pause_at_half_its_quota_and_drop_beyond_it_all_but_one() {
        let each = 100 + PLACE;
        let account = Account::new(GuestLimits {
            sockets: 1,
            quota: None,
            queue_bytes: 4 * each,
            send_bytes: 0,
            deferred_time: Duration::ZERO,
        });
        let new = || {
            let limits = QueueLimits { datagrams: 100, bytes: 1 << 20 };
            ReceiveQueue::new(limits, Arc::clone(&account))
        };
        let push = |queue: &ReceiveQueue| queue.push(std::iter::once(datagram(1, 100)));
        let (a, b) = (new(), new());
        assert!(!push(&a).pauses);
        assert!(push(&a).pauses, "half is used");
        assert!(!push(&a).is_dropped && !push(&a).is_dropped);
        assert!(push(&a).is_dropped, "all is used");
        let first = push(&b);
        assert!(!first.is_dropped && first.pauses, "the first of an empty queue");
        assert!(push(&b).is_dropped);

        assert!(b.take_first().resumes, "an empty queue waits for no other");
        assert!(!a.take_first().resumes && !a.take_first().resumes, "half is used still");
        assert!(a.take_first().resumes);
        a.put_back(vec![datagram(1, 100)]);
        assert_eq!(take(&a, 9).unwrap().arrivals.len(), 2);
        assert_eq!(account.queued.used(), 0);
    }

    /// Kills: an error for each question that was refused.
    #[test]
    fn one_error_is_pending_at_most_and_told_once() {
        let queue = queue(1, 1000);
        for errno in [libc::ECONNREFUSED, libc::EHOSTUNREACH, libc::ECONNREFUSED] {
            assert!(!queue.push_error(Errno(errno)).pauses);
        }
        assert_eq!(queue.take_first().arrivals, Some(Err(Errno(libc::ECONNREFUSED))));
        assert_eq!(queue.take_first().arrivals, None);
        queue.push_error(Errno(libc::EHOSTUNREACH));
        queue.put_back_error(Errno(libc::ECONNREFUSED));
        assert_eq!(queue.take_error(), Some(Errno(libc::EHOSTUNREACH)), "the later one");
        assert_eq!(queue.take_error(), None);
    }

    #[test]
    fn what_is_taken_ends_at_each_limit() {
        let queue = queue(100, 10_000);
        for port in 1..=5 {
            push(&queue, datagram(port, 400));
        }
        assert_eq!(ports(&take(&queue, 1).unwrap()), [1]);
        assert_eq!(ports(&take(&queue, 9).unwrap()), [2, 3, 4], "1000 bytes are reached");
        assert_eq!(ports(&take(&queue, 9).unwrap()), [5]);
        assert!(take(&queue, 9).unwrap().arrivals.is_empty());
    }

    #[test]
    fn a_datagram_taken_before_counts_for_both_limits() {
        let queue = queue(100, 10_000);
        for port in 2..=5 {
            push(&queue, datagram(port, 400));
        }
        let first = || Some(datagram(1, 400));
        let most = |datagrams, bytes| QueueLimits { datagrams, bytes };
        assert_eq!(ports(&queue.take(first(), most(2, 1000)).unwrap()), [1, 2]);
        assert_eq!(ports(&queue.take(first(), most(9, 800)).unwrap()), [1, 3]);
        assert_eq!(ports(&queue.take(first(), most(9, 400)).unwrap()), [1]);
    }

    #[test]
    fn an_error_is_told_before_the_datagrams_unless_one_was_taken() {
        let queue = queue(10, 1000);
        push(&queue, datagram(1, 1));
        queue.push_error(Errno(libc::ECONNREFUSED));
        push(&queue, datagram(2, 1));
        let before = Some(datagram(9, 1));
        let most = QueueLimits { datagrams: 2, bytes: 1000 };
        assert_eq!(ports(&queue.take(before, most).unwrap()), [9, 1]);
        assert_eq!(take(&queue, 9).map(|_| ()), Err(Errno(libc::ECONNREFUSED)));
        assert_eq!(ports(&take(&queue, 9).unwrap()), [2]);
    }

    /// Kills: bytes that nobody gives back, because a thread has reaped them and the end of their receive
    /// between the guest's discard and the close.
    #[test]
    fn what_comes_behind_the_discard_goes_with_the_queue() {
        let account = Account::of_sockets(1);
        let limits = QueueLimits { datagrams: 10, bytes: 1000 };
        let queue = ReceiveQueue::new(limits, Arc::clone(&account));
        assert_eq!(queue.discard(), 0);
        push(&queue, datagram(1, 1));
        drop(queue);
        assert_eq!((account.queued.used(), account.counters.dropped_at_close.get()), (0, 1));
    }

    #[test]
    fn a_discarded_queue_counts_its_datagrams_and_stays_paused() {
        let queue = queue(10, 1000);
        push(&queue, datagram(1, 1));
        queue.push_error(Errno(libc::ECONNREFUSED));
        assert_eq!(queue.discard(), 1);
        assert!(queue.is_paused() && queue.is_empty());
    }
}
