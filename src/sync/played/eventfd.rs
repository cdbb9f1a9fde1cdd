//! An eventfd for `driver::interleaved`, with the readiness that tokio makes of it, edge-triggered.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

#[derive(Clone, Debug, Default)]
pub(crate) struct EventFd(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    signals: u64,
    /// Of each that watches; none that is not waited for.
    wakers: Vec<Option<Waker>>,
}

impl EventFd {
    #[expect(clippy::unnecessary_wraps, reason = "as the system's")]
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self::default())
    }

    /// Signals it as a completion does. The waker is `shuttle`'s own, which runs no code of anybody's.
    pub(crate) fn signal(&self) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.signals += 1;
        state.wakers.iter_mut().filter_map(Option::take).for_each(Waker::wake);
    }

    #[expect(clippy::unnecessary_wraps, reason = "as the system's")]
    pub(crate) fn watch(&self) -> io::Result<WatchedEventFd> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.wakers.push(None);
        let at = state.wakers.len() - 1;
        Ok(WatchedEventFd { eventfd: self.clone(), at, seen: Mutex::new(0) })
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        unreachable!("of the set-up")
    }
}

/// What tokio's `AsyncFd` is of the system's.
#[derive(Debug)]
pub(crate) struct WatchedEventFd {
    eventfd: EventFd,
    at: usize,
    seen: Mutex<u64>,
}

pub(crate) struct Readiness<'watched> {
    watched: &'watched WatchedEventFd,
    signals: u64,
}

impl WatchedEventFd {
    pub(crate) fn poll_read_ready(&self, cx: &Context<'_>) -> Poll<io::Result<Readiness<'_>>> {
        let mut state = self.eventfd.0.lock().unwrap_or_else(PoisonError::into_inner);
        let signals = state.signals;
        if signals != *self.seen.lock().unwrap_or_else(PoisonError::into_inner) {
            return Poll::Ready(Ok(Readiness { watched: self, signals }));
        }
        state.wakers[self.at] = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Readiness<'_> {
    pub(crate) fn clear_ready(&mut self) {
        *self.watched.seen.lock().unwrap_or_else(PoisonError::into_inner) = self.signals;
    }
}
