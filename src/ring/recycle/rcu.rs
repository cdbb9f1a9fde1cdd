//! Grace periods of the kernel's RCU, and a timer: a thread of their own waits for them, because a
//! grace period takes milliseconds.

#[cfg(test)]
pub(crate) mod played;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use crate::ring::eventfd::EventFd;
use crate::ring::membarrier::wait_for_grace_period;

/// One grace period at a time, and a timer.
pub(crate) struct Rcu {
    /// Until the thread has it.
    eventfd: Option<EventFd>,
    requests: Option<Sender<Request>>,
    state: Arc<State>,
    /// Grace periods begun, and taken note of as over.
    begun: u64,
    ended: u64,
    has_timer: bool,
    has_reported_failure: bool,
}

/// What else the thread does: it may take long.
pub(super) type Task = Box<dyn FnOnce() + Send>;

enum Request {
    Grace,
    Task(Task),
    Timer(Duration),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RcuEvent {
    /// The grace period that was begun last is over.
    GraceOver,
    TimerExpired,
    /// A task has run.
    TaskOver,
    /// No more grace periods will end.
    Failed,
}

/// What the thread writes and the ring reads.
#[derive(Debug, Default)]
struct State {
    over: AtomicU64,
    has_failed: AtomicBool,
    has_expired: AtomicBool,
    has_run: AtomicBool,
}

impl Rcu {
    /// The thread starts with the first request, and signals the eventfd for each event.
    pub(crate) fn new(eventfd: EventFd) -> Self {
        Self {
            eventfd: Some(eventfd),
            requests: None,
            state: Arc::default(),
            begun: 0,
            ended: 0,
            has_timer: false,
            has_reported_failure: false,
        }
    }

    fn request(&mut self, request: Request) {
        if let Some(eventfd) = self.eventfd.take() {
            let (sender, receiver) = channel();
            let state = Arc::clone(&self.state);
            let thread = std::thread::Builder::new().name("wasi-uring-rcu".to_owned());
            if let Ok(_detached) = thread.spawn(move || serve(&receiver, &state, &eventfd)) {
                self.requests = Some(sender);
            }
        }
        let sent = self.requests.as_ref().map(|requests| requests.send(request));
        if !matches!(sent, Some(Ok(()))) {
            self.state.has_failed.store(true, Ordering::Relaxed);
        }
    }

    pub(super) fn begin_grace(&mut self) {
        self.begun += 1;
        self.request(Request::Grace);
    }

    pub(super) fn abandon(&mut self) {
        std::mem::forget(self.requests.take());
    }

    pub(super) fn run(&mut self, task: Task) {
        self.request(Request::Task(task));
    }

    /// Sets the timer unless it is set.
    pub(super) fn set_timer(&mut self, after: Duration) {
        if !self.has_timer {
            self.has_timer = true;
            self.request(Request::Timer(after));
        }
    }

    fn event(&self) -> Option<RcuEvent> {
        if !self.has_reported_failure && self.state.has_failed.load(Ordering::Relaxed) {
            return Some(RcuEvent::Failed);
        }
        // The last one that was begun: the sockets of others are gone. Acquire pairs with the
        // thread's Release, so what the ring queues from now on comes after the grace period.
        if self.ended < self.begun && self.state.over.load(Ordering::Acquire) == self.begun {
            return Some(RcuEvent::GraceOver);
        }
        if self.has_timer && self.state.has_expired.load(Ordering::Relaxed) {
            return Some(RcuEvent::TimerExpired);
        }
        self.state.has_run.load(Ordering::Relaxed).then_some(RcuEvent::TaskOver)
    }

    #[cfg(test)]
    pub(super) fn is_quiet(&self) -> bool {
        self.state.over.load(Ordering::Relaxed) == self.begun
    }

    pub(super) fn has_event(&self) -> bool {
        self.event().is_some()
    }

    /// The next event; each comes once.
    pub(super) fn take_event(&mut self) -> Option<RcuEvent> {
        let event = self.event();
        match event {
            Some(RcuEvent::GraceOver) => self.ended = self.begun,
            Some(RcuEvent::TimerExpired) => {
                self.state.has_expired.store(false, Ordering::Relaxed);
                self.has_timer = false;
            }
            Some(RcuEvent::TaskOver) => self.state.has_run.store(false, Ordering::Relaxed),
            Some(RcuEvent::Failed) => self.has_reported_failure = true,
            None => {}
        }
        event
    }
}

/// The thread: serves until the ring has dropped its end of the channel.
fn serve(requests: &Receiver<Request>, state: &State, eventfd: &EventFd) {
    let mut timer: Option<Instant> = None;
    loop {
        let request = match timer {
            Some(at) => requests.recv_timeout(at.saturating_duration_since(Instant::now())),
            None => requests.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match request {
            Ok(Request::Grace) => match wait_for_grace_period() {
                Ok(()) => {
                    state.over.fetch_add(1, Ordering::Release);
                }
                // The ring logs it; a tracing subscriber that panicked here would end the thread.
                Err(_) => state.has_failed.store(true, Ordering::Relaxed),
            },
            Ok(Request::Task(task)) => {
                task();
                state.has_run.store(true, Ordering::Relaxed);
            }
            Ok(Request::Timer(after)) => {
                // An instant beyond the clock's range never comes.
                timer = Instant::now().checked_add(after);
                continue;
            }
            Err(RecvTimeoutError::Timeout) => {
                timer = None;
                state.has_expired.store(true, Ordering::Relaxed);
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
        eventfd.signal();
    }
}
