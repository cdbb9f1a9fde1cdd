//! A socket's own bounded queue: datagrams between the ring's buffers and the guest.
//!
//! A new owner of a slot gets a new inbox, so nothing can reach it that was meant for the last.

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

/// What a receive can bring: a datagram, or an error the kernel had pending for the socket.
pub(crate) type Arrival = Result<Datagram, Errno>;

/// What came of a delivery.
pub(crate) struct Arrived {
    /// Arrivals that wait now.
    pub(crate) queued: usize,
    /// Whoever waited for one.
    pub(crate) waker: Option<Waker>,
}

/// What was taken from an inbox.
pub(crate) struct Taken {
    pub(crate) datagrams: Vec<Datagram>,
    /// `admit` has passed the first.
    pub(crate) first_is_admitted: bool,
    /// That ended a pause: the receive is to go on.
    pub(crate) resume: bool,
}

/// When an inbox counts as full.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InboxLimits {
    pub(crate) datagrams: usize,
    pub(crate) bytes: usize,
}

#[derive(Debug)]
pub(crate) struct Inbox {
    limits: InboxLimits,
    state: Mutex<InboxState>,
}

#[derive(Debug, Default)]
struct InboxState {
    arrivals: VecDeque<Arrival>,
    bytes: usize,
    /// The first arrival has passed `admit`.
    admitted: bool,
    /// The ring has ended or is ending the receive because the inbox was full.
    paused: bool,
    waker: Option<Waker>,
}

impl Inbox {
    pub(crate) fn new(limits: InboxLimits) -> Self {
        Self { limits, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, InboxState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues the datagrams of a message. A full inbox still takes them: what the kernel has
    /// delivered is never lost. The excess is what was delivered before the cancel of its receive,
    /// which is pushed at once.
    pub(crate) fn push(&self, datagrams: impl Iterator<Item = Datagram>) -> Arrived {
        let mut state = self.lock();
        for datagram in datagrams {
            state.bytes += datagram.payload.len();
            state.arrivals.push_back(Ok(datagram));
        }
        Arrived { queued: state.arrivals.len(), waker: state.waker.take() }
    }

    /// Queues an error, behind what arrived before it.
    pub(crate) fn push_error(&self, errno: Errno) -> Option<Waker> {
        let mut state = self.lock();
        state.arrivals.push_back(Err(errno));
        state.waker.take()
    }

    /// Whether the receive should pause; remembers it, so that `take` asks for it to go on.
    pub(crate) fn pause_if_full(&self) -> bool {
        let mut state = self.lock();
        state.paused |= state.is_full(self.limits);
        state.paused
    }

    /// Ends a pause if the guest has drained half of the inbox.
    pub(crate) fn resume_if_drained(&self) -> bool {
        self.lock().resume_if_drained(self.limits)
    }

    /// Drops arrivals from the front until one passes `allow`, and says whether one is there.
    /// Errors always pass. Each datagram's sender is shown to `allow` once.
    ///
    /// `allow` is the host's code and runs without the lock, which the ring takes to deliver. The
    /// front stays what it was meanwhile: only the socket's one guest takes from it.
    pub(crate) fn admit(&self, mut allow: impl FnMut(SocketAddr) -> bool) -> bool {
        loop {
            let from = {
                let mut state = self.lock();
                match state.arrivals.front() {
                    None => return false,
                    Some(Ok(datagram)) if !state.admitted => datagram.from,
                    Some(Ok(_) | Err(_)) => {
                        state.admitted = true;
                        return true;
                    }
                }
            };
            let allowed = allow(from);
            let mut state = self.lock();
            if allowed {
                state.admitted = true;
                return true;
            }
            state.pop();
        }
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().arrivals.is_empty()
    }

    /// Takes datagrams from the front, at most so many and until so many bytes are taken; an error
    /// only if it comes first, for what arrived before it is told first.
    pub(crate) fn take(&self, most: InboxLimits) -> Result<Taken, Errno> {
        let mut state = self.lock();
        let first_is_admitted = std::mem::take(&mut state.admitted);
        let mut datagrams = Vec::with_capacity(state.arrivals.len().min(most.datagrams));
        let mut bytes = 0;
        while datagrams.len() < most.datagrams && bytes < most.bytes {
            match state.pop() {
                Some(Ok(datagram)) => {
                    // Empty datagrams take their time, too.
                    bytes += datagram.payload.len().max(1);
                    datagrams.push(datagram);
                }
                Some(Err(errno)) if datagrams.is_empty() => return Err(errno),
                Some(error @ Err(_)) => {
                    state.arrivals.push_front(error);
                    break;
                }
                None => break,
            }
        }
        let resume = state.resume_if_drained(self.limits);
        Ok(Taken { datagrams, first_is_admitted, resume })
    }

    /// Takes the first arrival; and whether that ended a pause, so that the receive is to go on.
    pub(crate) fn take_first(&self) -> (Option<Arrival>, bool) {
        let mut state = self.lock();
        state.admitted = false;
        (state.pop(), state.resume_if_drained(self.limits))
    }

    /// Makes `admit` look at the front again: the socket has a new peer.
    pub(crate) fn readmit(&self) {
        self.lock().admitted = false;
    }

    /// Registers who is to be woken by the next arrival.
    pub(crate) fn wake_on_arrival(&self, waker: &Waker) {
        let mut state = self.lock();
        match &mut state.waker {
            Some(current) => current.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
    }

    pub(crate) fn take_waker(&self) -> Option<Waker> {
        self.lock().waker.take()
    }

    /// Datagrams that nobody will read any more.
    pub(crate) fn discard(&self) -> u64 {
        let mut state = self.lock();
        let datagrams = state.arrivals.iter().filter(|arrival| arrival.is_ok()).count();
        *state = InboxState { paused: true, ..InboxState::default() };
        datagrams as u64
    }
}

impl InboxState {
    fn pop(&mut self) -> Option<Arrival> {
        let arrival = self.arrivals.pop_front()?;
        if let Ok(datagram) = &arrival {
            self.bytes -= datagram.payload.len();
        }
        Some(arrival)
    }

    fn resume_if_drained(&mut self, limits: InboxLimits) -> bool {
        let half = InboxLimits {
            datagrams: limits.datagrams.div_ceil(2),
            bytes: limits.bytes.div_ceil(2),
        };
        let resume = self.paused && !self.is_full(half);
        if resume {
            self.paused = false;
        }
        resume
    }

    fn is_full(&self, limits: InboxLimits) -> bool {
        self.arrivals.len() >= limits.datagrams || self.bytes >= limits.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn datagram(port: u16, bytes: usize) -> Datagram {
        Datagram { payload: vec![0; bytes], from: ([127, 0, 0, 1], port).into() }
    }

    fn inbox(datagrams: usize, bytes: usize) -> Inbox {
        Inbox::new(InboxLimits { datagrams, bytes })
    }

    fn push(inbox: &Inbox, datagram: Datagram) {
        inbox.push(std::iter::once(datagram));
    }

    fn take(inbox: &Inbox, datagrams: usize) -> Result<Taken, Errno> {
        inbox.take(InboxLimits { datagrams, bytes: 1000 })
    }

    fn ports(taken: &Taken) -> Vec<u16> {
        taken.datagrams.iter().map(|datagram| datagram.from.port()).collect()
    }

    #[test]
    fn a_full_inbox_pauses_and_resumes_when_half_is_drained() {
        let inbox = inbox(4, 1000);
        for port in 1..=4 {
            assert!(!inbox.pause_if_full());
            push(&inbox, datagram(port, 1));
        }
        assert!(inbox.pause_if_full());
        assert!(!take(&inbox, 2).unwrap().resume, "two of four are still half");
        assert!(take(&inbox, 1).unwrap().resume);
        assert!(!inbox.resume_if_drained(), "a pause ends once");
    }

    #[test]
    fn bytes_fill_an_inbox_too_and_leave_it_with_their_datagram() {
        let inbox = inbox(100, 1000);
        push(&inbox, datagram(1, 1000));
        assert!(inbox.pause_if_full());
        assert!(take(&inbox, 1).unwrap().resume);
        assert!(!inbox.pause_if_full());
    }

    #[test]
    fn what_is_taken_ends_at_each_limit() {
        let inbox = inbox(100, 10_000);
        for port in 1..=5 {
            push(&inbox, datagram(port, 400));
        }
        assert_eq!(ports(&take(&inbox, 1).unwrap()), [1]);
        assert_eq!(ports(&take(&inbox, 9).unwrap()), [2, 3, 4], "1000 bytes are reached");
        assert_eq!(ports(&take(&inbox, 9).unwrap()), [5]);
        assert!(take(&inbox, 9).unwrap().datagrams.is_empty());
    }

    #[test]
    fn an_error_is_told_when_what_came_before_it_is_taken() {
        let inbox = inbox(10, 1000);
        push(&inbox, datagram(1, 1));
        inbox.push_error(Errno(libc::ECONNREFUSED));
        push(&inbox, datagram(2, 1));
        assert_eq!(ports(&take(&inbox, 9).unwrap()), [1]);
        assert_eq!(take(&inbox, 9).map(|_| ()), Err(Errno(libc::ECONNREFUSED)));
        assert_eq!(ports(&take(&inbox, 9).unwrap()), [2]);
    }

    #[test]
    fn refused_senders_are_dropped_and_errors_pass() {
        let inbox = inbox(10, 1000);
        push(&inbox, datagram(1, 1));
        inbox.push_error(Errno(libc::ECONNREFUSED));
        push(&inbox, datagram(2, 1));
        let mut shown = 0;
        assert!(inbox.admit(|_| {
            shown += 1;
            false
        }));
        assert!(take(&inbox, 1).is_err());
        assert!(inbox.admit(|from| from.port() == 2));
        assert!(inbox.admit(|_| unreachable!("an admitted datagram is not shown again")));
        inbox.readmit();
        assert!(!inbox.admit(|_| false), "a new peer looks at it anew");
        assert_eq!(shown, 1);
        assert!(inbox.is_empty());
    }

    #[test]
    fn only_an_admitted_datagram_is_taken_as_one() {
        let inbox = inbox(10, 1000);
        push(&inbox, datagram(1, 1));
        push(&inbox, datagram(2, 1));
        assert!(inbox.admit(|_| true));
        assert!(take(&inbox, 1).unwrap().first_is_admitted);
        assert!(!take(&inbox, 1).unwrap().first_is_admitted, "nobody has shown this one");
    }
}
