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

    /// Queues what arrived and returns the waker of whoever waits for it. A full inbox still
    /// takes it: what the kernel has delivered is never lost. The excess is what was delivered
    /// before the cancel of its receive, which is pushed at once.
    pub(crate) fn push(&self, arrival: Arrival) -> Option<Waker> {
        let mut state = self.lock();
        state.bytes += arrival.as_ref().map_or(0, |datagram| datagram.payload.len());
        state.arrivals.push_back(arrival);
        state.waker.take()
    }

    /// Whether the receive should pause; remembers it, so that `pop` asks for it to go on.
    pub(crate) fn pause_if_full(&self) -> bool {
        let mut state = self.lock();
        state.paused |= state.is_full(self.limits);
        state.paused
    }

    /// Ends a pause if the guest has drained half of the inbox.
    pub(crate) fn resume_if_drained(&self) -> bool {
        let mut state = self.lock();
        let half = InboxLimits {
            datagrams: self.limits.datagrams.div_ceil(2),
            bytes: self.limits.bytes.div_ceil(2),
        };
        let resume = state.paused && !state.is_full(half);
        if resume {
            state.paused = false;
        }
        resume
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
            let refused = state.arrivals.pop_front();
            state.forget(refused.as_ref());
        }
    }

    pub(crate) fn starts_with_error(&self) -> bool {
        matches!(self.lock().arrivals.front(), Some(Err(_)))
    }

    /// Takes the first arrival, which `admit` has passed.
    pub(crate) fn pop(&self) -> Option<Arrival> {
        let mut state = self.lock();
        state.admitted = false;
        let arrival = state.arrivals.pop_front();
        state.forget(arrival.as_ref());
        arrival
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
    fn is_full(&self, limits: InboxLimits) -> bool {
        self.arrivals.len() >= limits.datagrams || self.bytes >= limits.bytes
    }

    fn forget(&mut self, arrival: Option<&Arrival>) {
        if let Some(Ok(datagram)) = arrival {
            self.bytes -= datagram.payload.len();
        }
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

    #[test]
    fn a_full_inbox_pauses_and_resumes_when_half_is_drained() {
        let inbox = inbox(4, 1000);
        for port in 1..=4 {
            assert!(!inbox.pause_if_full());
            inbox.push(Ok(datagram(port, 1)));
        }
        assert!(inbox.pause_if_full());
        inbox.pop();
        inbox.pop();
        assert!(!inbox.resume_if_drained(), "two of four are still half");
        inbox.pop();
        assert!(inbox.resume_if_drained());
        assert!(!inbox.resume_if_drained(), "a pause ends once");
    }

    #[test]
    fn bytes_fill_an_inbox_too_and_leave_it_with_their_datagram() {
        let inbox = inbox(100, 1000);
        inbox.push(Ok(datagram(1, 1000)));
        assert!(inbox.pause_if_full());
        inbox.pop();
        assert!(inbox.resume_if_drained());
        assert!(!inbox.pause_if_full());
    }

    #[test]
    fn refused_senders_are_dropped_and_errors_pass() {
        let inbox = inbox(10, 1000);
        inbox.push(Ok(datagram(1, 1)));
        inbox.push(Err(Errno(libc::ECONNREFUSED)));
        inbox.push(Ok(datagram(2, 1)));
        let mut shown = 0;
        assert!(inbox.admit(|_| {
            shown += 1;
            false
        }));
        assert_eq!(inbox.pop(), Some(Err(Errno(libc::ECONNREFUSED))));
        assert!(inbox.admit(|from| from.port() == 2));
        assert!(inbox.admit(|_| unreachable!("an admitted datagram is not shown again")));
        inbox.readmit();
        assert!(!inbox.admit(|_| false), "a new peer looks at it anew");
        assert_eq!(shown, 1);
        assert_eq!(inbox.pop(), None);
    }
}
