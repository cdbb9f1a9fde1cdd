//! Grace periods, waited for by a thread of their own, for each takes milliseconds.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::arrivals::Arrivals;

/// Waits until every read-side critical section of the kernel's RCU that has begun is over: no
/// packet is on its way any more to a socket that was found by it before (membarrier(2)).
///
/// On a machine with one CPU it does not wait, for there nothing runs that could be on such a way:
/// packets are delivered by softirqs, which are over before a thread goes on.
#[expect(unsafe_code, reason = "membarrier(2)")]
pub(crate) fn wait() -> io::Result<()> {
    let (flags, cpu_id) = (0, 0);
    // SAFETY: no pointers.
    let result =
        unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_GLOBAL, flags, cpu_id) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// One grace period at a time, and a timer.
pub(crate) struct Grace {
    arrivals: Option<Arrivals>,
    requests: Option<Sender<Request>>,
    state: Arc<State>,
    /// Grace periods asked for and told to be over.
    begun: u64,
    ended: u64,
    has_timer: bool,
    has_told_of_failure: bool,
}

enum Request {
    Wait,
    Timer(Duration),
}

/// What the ring is to hear of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// The grace period that was begun last is over.
    Over,
    /// The timer has run down.
    Time,
    /// No more grace periods will end.
    Failed,
}

#[derive(Debug, Default)]
struct State {
    over: AtomicU64,
    has_failed: AtomicBool,
    is_time: AtomicBool,
}

impl Grace {
    /// The thread starts with the first request, and signals the arrivals.
    pub(crate) fn new(arrivals: Arrivals) -> Self {
        Self {
            arrivals: Some(arrivals),
            requests: None,
            state: Arc::default(),
            begun: 0,
            ended: 0,
            has_timer: false,
            has_told_of_failure: false,
        }
    }

    fn request(&mut self, request: Request) {
        if let Some(arrivals) = self.arrivals.take() {
            let (sender, receiver) = channel();
            let state = Arc::clone(&self.state);
            let thread = std::thread::Builder::new().name("wasi-uring-rcu".to_owned());
            match thread.spawn(move || serve(&receiver, &state, &arrivals)) {
                Ok(_detached) => self.requests = Some(sender),
                Err(error) => tracing::error!(%error, "no thread waits for grace periods"),
            }
        }
        let sent = self.requests.as_ref().map(|requests| requests.send(request));
        if !matches!(sent, Some(Ok(()))) {
            self.state.has_failed.store(true, Ordering::Relaxed);
        }
    }

    /// Begins a grace period.
    pub(crate) fn begin(&mut self) {
        self.begun += 1;
        self.request(Request::Wait);
    }

    /// Sets the timer unless it is set.
    pub(crate) fn set_timer(&mut self, after: Duration) {
        if !self.has_timer {
            self.has_timer = true;
            self.request(Request::Timer(after));
        }
    }

    fn news(&self) -> Option<News> {
        if !self.has_told_of_failure && self.state.has_failed.load(Ordering::Relaxed) {
            return Some(News::Failed);
        }
        // The last one that was begun: others may have been for sockets that are gone. Pairs with
        // the thread's, so what is pushed now comes after it.
        if self.ended < self.begun && self.state.over.load(Ordering::Acquire) == self.begun {
            return Some(News::Over);
        }
        (self.has_timer && self.state.is_time.load(Ordering::Relaxed)).then_some(News::Time)
    }

    #[cfg(test)]
    pub(super) fn are_all_over(&self) -> bool {
        self.state.over.load(Ordering::Relaxed) == self.begun
    }

    pub(crate) fn has_news(&self) -> bool {
        self.news().is_some()
    }

    /// One of the news, told once.
    pub(crate) fn take_news(&mut self) -> Option<News> {
        let news = self.news();
        match news {
            Some(News::Over) => self.ended = self.begun,
            Some(News::Time) => {
                self.state.is_time.store(false, Ordering::Relaxed);
                self.has_timer = false;
            }
            Some(News::Failed) => self.has_told_of_failure = true,
            None => {}
        }
        news
    }
}

/// Serves until the ring is gone.
fn serve(requests: &Receiver<Request>, state: &State, arrivals: &Arrivals) {
    let mut timer: Option<Instant> = None;
    loop {
        let request = match timer {
            Some(at) => requests.recv_timeout(at.saturating_duration_since(Instant::now())),
            None => requests.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match request {
            Ok(Request::Wait) => match wait() {
                Ok(()) => {
                    state.over.fetch_add(1, Ordering::Release);
                }
                Err(error) => {
                    tracing::error!(%error, "membarrier failed; sockets are not recycled any more");
                    state.has_failed.store(true, Ordering::Relaxed);
                }
            },
            Ok(Request::Timer(after)) => {
                // Beyond what clocks can tell it never runs down.
                timer = Instant::now().checked_add(after);
                continue;
            }
            Err(RecvTimeoutError::Timeout) => {
                timer = None;
                state.is_time.store(true, Ordering::Relaxed);
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
        arrivals.signal();
    }
}
