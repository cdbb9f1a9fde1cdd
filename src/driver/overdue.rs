//! What is overdue: the ring's own thread, which gets on with what the guests' threads leave.
//!
//! The CLOSE of a dropped socket is left to the flusher of its guest's runtime, which may not run for long:
//! the guest computes on, or nobody polls the runtime any more. And the end of a receive waits for the
//! thread that armed it to enter the kernel. So while sockets are closed this thread looks now and then
//! whether that takes longer than [`OVERDUE`], and has the driver get on with it. It is the driver's clock,
//! too, for what is to be done at some time. While there is neither it sleeps.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::task::{Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use crate::limits::{OVERDUE, OVERDUE_AGAIN, QUIET_LOOKS_MAX};
use crate::ring::port_order::CloseId;

/// What the thread looks after: a driver.
pub(super) trait Watched: Send + Sync {
    /// Gets on with closes that take too long; whether some go on.
    fn enter_overdue(&self) -> bool;

    /// The time has come that was given to [`Overdue::call_after`].
    fn on_time(&self);

    /// Whether the thread is to sleep until its next call, or until [`Overdue::note`] or
    /// [`Overdue::call_after`] has it woken.
    fn may_sleep(&self) -> bool;
}

/// What the driver's lock guards of it.
pub(super) struct Overdue {
    watcher: Arc<Watcher>,
    pub(super) is_asleep: bool,
    oldest: Option<CloseId>,
}

/// The thread, which starts when it is first woken.
struct Watcher {
    driver: Weak<dyn Watched>,
    thread: OnceLock<Thread>,
    /// It could not be started, and is to be when it is next woken.
    has_not_started: AtomicBool,
    /// Since when the oldest close goes on, in nanoseconds from `begun`; 0: there is none.
    /// Written under the driver's lock, which the thread does not take to look.
    closing_since: AtomicU64,
    /// When the driver is to be called, as above.
    call_at: AtomicU64,
    begun: Instant,
}

impl Wake for Watcher {
    fn wake(self: Arc<Self>) {
        if let Some(thread) = self.thread.get() {
            return thread.unpark();
        }
        let watcher = Arc::downgrade(&self);
        let named = thread::Builder::new().name("wasi-uring-due".to_owned());
        match named.spawn(move || watch(&watcher)) {
            // Nobody else starts one meanwhile: it counts as awake until it sleeps, and says who it is
            // before.
            Ok(_started) => {}
            Err(error) => {
                tracing::error!(%error, "no thread that gets on with what guests leave, for now");
                self.has_not_started.store(true, Ordering::Relaxed);
            }
        }
    }
}

impl Watcher {
    fn at(&self, time: Instant) -> u64 {
        let since = time.saturating_duration_since(self.begun);
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX).max(1)
    }

    fn now(&self) -> u64 {
        self.at(Instant::now())
    }

    /// How long the oldest close has been going on.
    fn closing_for(&self) -> Option<Duration> {
        let since = self.closing_since.load(Ordering::Relaxed);
        (since != 0).then(|| Duration::from_nanos(self.now().saturating_sub(since)))
    }

    /// How long until the driver is to be called, if it is.
    fn call_in(&self) -> Option<Duration> {
        let call_at = self.call_at.load(Ordering::Relaxed);
        (call_at != 0).then(|| Duration::from_nanos(call_at.saturating_sub(self.now())))
    }
}

impl Overdue {
    pub(super) fn new(driver: Weak<dyn Watched>) -> Self {
        let watcher = Watcher {
            driver,
            thread: OnceLock::new(),
            has_not_started: AtomicBool::new(false),
            closing_since: AtomicU64::new(0),
            call_at: AtomicU64::new(0),
            begun: Instant::now(),
        };
        Self { watcher: Arc::new(watcher), is_asleep: true, oldest: None }
    }

    /// Takes note of the oldest close that goes on. The waker is the thread's, if it is to look.
    pub(super) fn note(&mut self, oldest: Option<(CloseId, Instant)>) -> Option<Waker> {
        let watcher = &self.watcher;
        let close = oldest.map(|(close, _)| close);
        if close != self.oldest {
            self.oldest = close;
            let since = oldest.map_or(0, |(_, begun)| watcher.at(begun));
            watcher.closing_since.store(since, Ordering::Relaxed);
        }
        if oldest.is_some() { self.wake() } else { None }
    }

    /// Has the thread call the driver after this time, or before if that was wanted. The waker is the
    /// thread's, if it sleeps.
    pub(super) fn call_after(&mut self, time: Duration) -> Option<Waker> {
        let Watcher { call_at, .. } = &*self.watcher;
        let time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let at = self.watcher.now().saturating_add(time);
        let before = call_at.load(Ordering::Relaxed);
        if before == 0 || at < before {
            call_at.store(at, Ordering::Relaxed);
        }
        self.wake()
    }

    /// The driver is called.
    pub(super) fn end_call(&mut self) {
        self.is_asleep = false;
        self.watcher.call_at.store(0, Ordering::Relaxed);
    }

    fn wake(&mut self) -> Option<Waker> {
        let has_not_started = self.watcher.has_not_started.swap(false, Ordering::Relaxed);
        let wakes = std::mem::take(&mut self.is_asleep) || has_not_started;
        wakes.then(|| Waker::from(Arc::clone(&self.watcher)))
    }

    /// The ring is gone: the thread ends.
    pub(super) fn end(&self) {
        if let Some(thread) = self.watcher.thread.get() {
            thread.unpark();
        }
    }
}

/// The thread, for as long as the ring lives. It looks without the driver's lock: so a look costs the
/// guests' threads nothing.
fn watch(watcher: &Weak<Watcher>) {
    let mut quiet_looks = 0;
    let mut time = OVERDUE;
    // What it has begun goes on elsewhere, most often for microseconds.
    let mut soon = OVERDUE_AGAIN;
    loop {
        let Some(call_in) = watcher.upgrade().map(|watcher| watcher.call_in()) else { return };
        // Woken early only to end.
        thread::park_timeout(call_in.map_or(time, |call_in| time.min(call_in)));
        let Some(watcher) = watcher.upgrade() else { return };
        watcher.thread.get_or_init(thread::current);
        if watcher.call_in() == Some(Duration::ZERO) {
            let Some(driver) = watcher.driver.upgrade() else { return };
            driver.on_time();
        }
        let closing_for = watcher.closing_for();
        quiet_looks = if closing_for.is_none() { quiet_looks + 1 } else { 0 };
        time = OVERDUE;
        match closing_for {
            Some(elapsed) if elapsed < OVERDUE => time = OVERDUE.saturating_sub(elapsed),
            None if quiet_looks < QUIET_LOOKS_MAX => {}
            Some(_) | None => {
                let Some(driver) = watcher.driver.upgrade() else { return };
                if closing_for.is_some() {
                    let goes_on = driver.enter_overdue();
                    time = if goes_on { soon } else { OVERDUE };
                    soon = if goes_on { OVERDUE.min(2 * soon) } else { OVERDUE_AGAIN };
                } else if driver.may_sleep() {
                    drop(driver);
                    // After `may_sleep`: from there on a call that is asked for wakes this thread.
                    let call_in = watcher.call_in();
                    drop(watcher);
                    match call_in {
                        Some(time) => thread::park_timeout(time),
                        None => thread::park(),
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Has nothing for the thread to do.
    #[derive(Default)]
    struct Idle {
        sleeps: AtomicBool,
    }

    impl Watched for Idle {
        fn enter_overdue(&self) -> bool {
            false
        }

        fn on_time(&self) {}

        fn may_sleep(&self) -> bool {
            self.sleeps.store(true, Ordering::SeqCst);
            true
        }
    }

    /// Kills: a thread that goes to sleep before the one that has started it, and was held up, says who it
    /// is: the next that wakes it starts a second one, and one of the two sleeps for ever.
    #[test]
    fn the_thread_is_known_before_it_first_sleeps() {
        let idle = Arc::new(Idle::default());
        let driver: Arc<dyn Watched> = idle.clone();
        let overdue = Overdue::new(Arc::downgrade(&driver));
        let watcher = Arc::downgrade(&overdue.watcher);
        let thread = thread::spawn(move || watch(&watcher));
        let begun = Instant::now();
        while !idle.sleeps.load(Ordering::SeqCst) {
            assert!(begun.elapsed() < Duration::from_mins(1), "it does not sleep");
            thread::yield_now();
        }
        let known = overdue.watcher.thread.get().map(Thread::id);
        drop(overdue);
        thread.thread().unpark();
        assert_eq!(known, Some(thread.thread().id()));
        thread.join().unwrap();
    }
}
