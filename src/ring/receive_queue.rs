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
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use crate::error::Errno;

/// A datagram as the guest gets it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Datagram {
    pub(crate) payload: Vec<u8>,
    pub(crate) from: SocketAddr,
}

/// What a guest can take: a datagram, or the socket's pending error.
pub(crate) type Arrival = Result<Datagram, Errno>;

/// What a delivery leads to.
pub(crate) struct Pushed {
    /// Datagrams in the queue now.
    pub(crate) queued: usize,
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
}

/// When a queue counts as full.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueLimits {
    pub(crate) datagrams: usize,
    /// Of payload.
    pub(crate) bytes: usize,
}

#[derive(Debug)]
pub(crate) struct ReceiveQueue {
    limits: QueueLimits,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    datagrams: VecDeque<Datagram>,
    /// Of payload.
    bytes: usize,
    error: Option<Errno>,
    /// The one pause state: set when a delivery fills the queue, cleared when the guest has taken
    /// enough. While it is set the ring arms no receive for the socket.
    is_paused: bool,
    waker: Option<Waker>,
}

impl ReceiveQueue {
    pub(crate) fn new(limits: QueueLimits) -> Self {
        Self { limits, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues the datagrams of a message. A full queue still takes them, so that nothing is lost
    /// that the kernel has delivered: the excess came before the cancel of the receive, which the
    /// ring queues at once.
    pub(crate) fn push(&self, datagrams: impl Iterator<Item = Datagram>) -> Pushed {
        let mut state = self.lock();
        for datagram in datagrams {
            state.bytes += datagram.payload.len();
            state.datagrams.push_back(datagram);
        }
        state.pushed(self.limits)
    }

    /// The socket has an error, instead of the one that was pending.
    pub(crate) fn push_error(&self, errno: Errno) -> Pushed {
        let mut state = self.lock();
        state.error = Some(errno);
        state.pushed(self.limits)
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
            state.bytes += datagram.payload.len();
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
            return Taken { arrivals: Some(Err(errno)), resumes: false };
        }
        let arrivals = state.pop().map(Ok);
        Taken { arrivals, resumes: state.resume_if_drained(self.limits) }
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
        while datagrams.len() < most.datagrams && bytes < most.bytes {
            let Some(datagram) = state.pop() else { break };
            bytes += weight(&datagram);
            datagrams.push(datagram);
        }
        Ok(Taken { arrivals: datagrams, resumes: state.resume_if_drained(self.limits) })
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

    /// The socket is gone: its datagrams, which no guest will take. What comes later finds a paused
    /// queue, so nothing arms a receive for it.
    pub(crate) fn discard(&self) -> u64 {
        let closed = State { is_paused: true, ..State::default() };
        // Dropped, with its waker, outside of the lock.
        let state = std::mem::replace(&mut *self.lock(), closed);
        state.datagrams.len() as u64
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        let state = self.lock();
        state.datagrams.is_empty() && state.error.is_none()
    }
}

impl State {
    fn pushed(&mut self, limits: QueueLimits) -> Pushed {
        let pauses = !self.is_paused && self.is_full(limits);
        self.is_paused |= pauses;
        Pushed { queued: self.datagrams.len(), pauses, waker: self.waker.take() }
    }

    fn pop(&mut self) -> Option<Datagram> {
        let datagram = self.datagrams.pop_front()?;
        self.bytes -= datagram.payload.len();
        Some(datagram)
    }

    /// Ends a pause once the guest has left less than half.
    fn resume_if_drained(&mut self, limits: QueueLimits) -> bool {
        let half = QueueLimits {
            datagrams: limits.datagrams.div_ceil(2),
            bytes: limits.bytes.div_ceil(2),
        };
        let resumes = self.is_paused && !self.is_full(half);
        self.is_paused &= !resumes;
        resumes
    }

    fn is_full(&self, limits: QueueLimits) -> bool {
        self.datagrams.len() >= limits.datagrams || self.bytes >= limits.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn datagram(port: u16, bytes: usize) -> Datagram {
        Datagram { payload: vec![0; bytes], from: ([127, 0, 0, 1], port).into() }
    }

    fn queue(datagrams: usize, bytes: usize) -> ReceiveQueue {
        ReceiveQueue::new(QueueLimits { datagrams, bytes })
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

    #[test]
    fn bytes_fill_a_queue_too_and_leave_it_with_their_datagram() {
        let queue = queue(100, 1000);
        assert!(push(&queue, datagram(1, 1000)));
        let first = queue.take_first();
        assert!(first.arrivals.is_some() && first.resumes);
        assert!(!push(&queue, datagram(1, 999)));
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

    #[test]
    fn a_discarded_queue_counts_its_datagrams_and_stays_paused() {
        let queue = queue(10, 1000);
        push(&queue, datagram(1, 1));
        queue.push_error(Errno(libc::ECONNREFUSED));
        assert_eq!(queue.discard(), 1);
        assert!(queue.is_paused() && queue.is_empty());
    }
}
