//! Grace periods, waited for by a thread of their own, for each takes milliseconds.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::arrivals::Arrivals;

/// Waits until every read-side critical section of the kernel's RCU that has begun is over: no
/// packet is on its way any more to a socket that was found by it before (membarrier(2)).
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
    /// Grace periods asked for and seen to be over.
    begun: u64,
    ended: u64,
    has_timer: bool,
}

enum Request {
    Wait,
    Timer(Duration),
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
        }
    }

    fn request(&mut self, request: Request) {
        if let Some(arrivals) = self.arrivals.take() {
            let (sender, receiver) = channel();
            let state = Arc::clone(&self.state);
            let thread = std::thread::Builder::new().name("wasi-uring-rcu".to_owned());
            match thread.spawn(move || serve(&receiver, &state, &arrivals)) {
                Ok(_detached) => self.requests = Some(sender),
                Err(error) => {
                    tracing::error!(%error, "no thread waits for grace periods");
                    self.state.has_failed.store(true, Ordering::Relaxed);
                }
            }
        }
        if let Some(requests) = &self.requests {
            // A thread that is gone has said so.
            let _ = requests.send(request);
        }
    }

    /// Begins a grace period.
    pub(crate) fn begin(&mut self) {
        self.begun += 1;
        self.request(Request::Wait);
    }

    /// Whether the last grace period that was begun is over, told once; `false` if no more will be.
    pub(crate) fn is_over(&mut self) -> Option<bool> {
        if self.state.has_failed.load(Ordering::Relaxed) {
            return Some(false);
        }
        // Pairs with the thread's: what the kernel did before is seen by what is pushed after.
        let is_over =
            self.ended < self.begun && self.state.over.load(Ordering::Acquire) == self.begun;
        if is_over {
            self.ended = self.begun;
        }
        is_over.then_some(true)
    }

    /// Sets the timer unless it is set.
    pub(crate) fn set_timer(&mut self, after: Duration) {
        if !self.has_timer {
            self.has_timer = true;
            self.request(Request::Timer(after));
        }
    }

    /// Whether the timer has run down, told once.
    pub(crate) fn is_time(&mut self) -> bool {
        let is_time = self.has_timer && self.state.is_time.swap(false, Ordering::Relaxed);
        self.has_timer &= !is_time;
        is_time
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
                timer = Some(Instant::now() + after);
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
