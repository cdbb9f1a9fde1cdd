//! What is overdue: the ring's own thread, which gets on with what the guests' threads leave.
//!
//! The CLOSE of a dropped socket is left to the flusher of its guest's runtime, which may not run for long:
//! the guest computes on, or nobody polls the runtime any more. And the end of a receive waits for the
//! thread that armed it to enter the kernel. So a close that takes longer than [`OVERDUE`] this thread has the
//! driver get on with. It is the driver's clock, too, for what is to be done at some time.
//!
//! It waits for a timer, which the guests' threads set. So it runs only when something is overdue, or was
//! begun so long ago: while it runs, what other threads unmap has to interrupt its processor, which costs
//! a host with many short stores more than all it does.

use std::sync::{Arc, PoisonError, Weak};
use std::task::{Wake, Waker};
use std::time::{Duration, Instant};

use crate::clock;
use crate::limits::{OVERDUE, OVERDUE_AGAIN, RESTS_APART};
use crate::ring::port_order::CloseId;
use crate::ring::timer::Timer;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Mutex, thread};

/// What the thread looks after: a driver.
pub(super) trait Watched: Send + Sync {
    /// Gets on with closes that take too long.
    fn enter_overdue(&self);

    /// The time has come that was given to [`Overdue::call_after`].
    fn on_time(&self);
}

/// What the driver's lock guards of it.
pub(super) struct Overdue {
    watcher: Arc<Watcher>,
    oldest: Option<CloseId>,
    /// When it last rested.
    rested_at: u64,
}

/// The timer, and what it is set for. The times are nanoseconds from `begun`; 0: none. Those that are due
/// guests' threads write under the driver's lock, which the thread does not take to read them. So that neither side
/// misses the other: who writes what is due looks at `expires_at` afterwards, and who writes that, to be none,
/// looks at what is due.
struct Watcher {
    driver: Weak<dyn Watched>,
    timer: Arc<Timer>,
    /// Taken to set the timer.
    setting: Mutex<()>,
    expires_at: AtomicU64,
    /// The thread, which starts when the timer is first set, runs.
    has_started: AtomicBool,
    /// Since when the oldest close goes on.
    closing_since: AtomicU64,
    /// Not to get on with closes again before.
    again_at: AtomicU64,
    /// When the driver is to be called.
    call_at: AtomicU64,
    begun: Instant,
}

impl Wake for Watcher {
    /// Sets the timer to what is due now.
    fn wake(self: Arc<Self>) {
        self.set_timer();
        if self.has_started.swap(true, Ordering::Relaxed) {
            return;
        }
        let watcher = Arc::downgrade(&self);
        let named = thread::Builder::new().name("wasi-uring-due".to_owned());
        if let Err(error) = named.spawn(move || watch(&watcher)) {
            tracing::error!(%error, "no thread that gets on with what guests leave, for now");
            self.has_started.store(false, Ordering::Relaxed);
            // So that the next to whom something is due tries again.
            self.forget_timer();
        }
    }
}

impl Watcher {
    fn at(&self, time: Instant) -> u64 {
        nanos(time.saturating_duration_since(self.begun)).max(1)
    }

    fn now(&self) -> u64 {
        self.at(clock::now())
    }

    /// When a close is overdue, or when to get on with it again.
    fn overdue_at(&self) -> Option<u64> {
        let since = self.closing_since.load(Ordering::SeqCst);
        let again_at = self.again_at.load(Ordering::Relaxed);
        (since != 0).then(|| since.saturating_add(nanos(OVERDUE)).max(again_at))
    }

    fn call_at(&self) -> Option<u64> {
        let at = self.call_at.load(Ordering::SeqCst);
        (at != 0).then_some(at)
    }

    fn due_at(&self) -> Option<u64> {
        let (overdue_at, call_at) = (self.overdue_at(), self.call_at());
        overdue_at.into_iter().chain(call_at).min()
    }

    /// Whether the timer is to be set because something is due.
    fn is_late(&self) -> bool {
        let expires_at = self.expires_at.load(Ordering::SeqCst);
        self.due_at().is_some_and(|due| expires_at == 0 || due < expires_at)
    }

    /// Has the timer expire when something is due, or not at all if nothing is.
    fn set_timer(&self) {
        let _setting = self.setting.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.expires_at.swap(0, Ordering::SeqCst);
        let Some(due) = self.due_at() else {
            if before != 0 {
                self.timer.set(None);
            }
            return;
        };
        if due != before {
            self.timer.set(Some(Duration::from_nanos(due.saturating_sub(self.now()))));
        }
        self.expires_at.store(due, Ordering::SeqCst);
    }

    /// The timer has expired, or nobody waits for it.
    fn forget_timer(&self) {
        let _setting = self.setting.lock().unwrap_or_else(PoisonError::into_inner);
        self.expires_at.store(0, Ordering::SeqCst);
    }

    /// The timer has expired: does what is due, and sets it anew. `false`: the driver is gone.
    fn look(&self) -> bool {
        let Some(driver) = self.driver.upgrade() else { return false };
        self.forget_timer();
        let is_due = |at: Option<u64>| at.is_some_and(|at| at <= self.now());
        if is_due(self.call_at()) {
            driver.on_time();
        }
        if is_due(self.overdue_at()) {
            // What it has begun goes on elsewhere, most often for microseconds: it looks again soon, and then
            // later each time.
            let overdue_since = self.closing_since.load(Ordering::Relaxed) + nanos(OVERDUE);
            driver.enter_overdue();
            let overdue_for = Duration::from_nanos(self.now().saturating_sub(overdue_since));
            let pause = overdue_for.clamp(OVERDUE_AGAIN, OVERDUE);
            self.again_at.store(self.now().saturating_add(nanos(pause)), Ordering::Relaxed);
        }
        drop(driver);
        self.set_timer();
        true
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Overdue {
    pub(super) fn new(driver: Weak<dyn Watched>, timer: Timer) -> Self {
        let watcher = Watcher {
            driver,
            timer: Arc::new(timer),
            setting: Mutex::new(()),
            expires_at: AtomicU64::new(0),
            has_started: AtomicBool::new(false),
            closing_since: AtomicU64::new(0),
            again_at: AtomicU64::new(0),
            call_at: AtomicU64::new(0),
            begun: clock::now(),
        };
        Self { watcher: Arc::new(watcher), oldest: None, rested_at: 0 }
    }

    /// Takes note of the oldest close that goes on. The waker, as that of all here, sets the timer.
    pub(super) fn note(&mut self, oldest: Option<(CloseId, Instant)>) -> Option<Waker> {
        let watcher = &self.watcher;
        let close = oldest.map(|(close, _)| close);
        if close != self.oldest {
            self.oldest = close;
            let since = oldest.map_or(0, |(_, begun)| watcher.at(begun));
            watcher.closing_since.store(since, Ordering::SeqCst);
        }
        self.wake_if(close.is_some() && watcher.is_late())
    }

    /// Has the thread call the driver after this time, or before if that was wanted.
    pub(super) fn call_after(&mut self, time: Duration) -> Option<Waker> {
        let watcher = &self.watcher;
        let at = watcher.now().saturating_add(nanos(time));
        if watcher.call_at().is_none_or(|before| at < before) {
            watcher.call_at.store(at, Ordering::SeqCst);
        }
        self.wake_if(watcher.is_late())
    }

    /// The driver is called.
    pub(super) fn end_call(&mut self) {
        self.watcher.call_at.store(0, Ordering::SeqCst);
    }

    /// A guest is gone, perhaps the last one for now: the thread need not run before something is due. Where
    /// many go the timer stays: it expires once for all of them.
    pub(super) fn rest(&mut self) -> Option<Waker> {
        let watcher = &self.watcher;
        let expires_at = watcher.expires_at.load(Ordering::SeqCst);
        let is_early = watcher.due_at().is_none_or(|due| due > expires_at);
        if expires_at == 0 || !is_early {
            return None;
        }
        let now = watcher.now();
        let last = std::mem::replace(&mut self.rested_at, now);
        self.wake_if(last == 0 || now.saturating_sub(last) >= nanos(RESTS_APART))
    }

    fn wake_if(&self, wakes: bool) -> Option<Waker> {
        wakes.then(|| Waker::from(Arc::clone(&self.watcher)))
    }

    /// The ring is gone: the thread ends.
    pub(super) fn end(&self) {
        // Due for ever, so that nobody sets the timer to anything else.
        self.watcher.call_at.store(1, Ordering::SeqCst);
        self.watcher.set_timer();
    }

    /// Whether closes go on that the thread will get on with.
    #[cfg(test)]
    pub(super) fn watches(&self) -> bool {
        self.watcher.expires_at.load(Ordering::SeqCst) != 0 && self.watcher.overdue_at().is_some()
    }
}

/// The thread, for as long as the ring lives.
fn watch(watcher: &Weak<Watcher>) {
    let Some(timer) = watcher.upgrade().map(|watcher| Arc::clone(&watcher.timer)) else { return };
    loop {
        if let Err(error) = timer.wait() {
            return tracing::error!(%error, "no thread that gets on with what guests leave");
        }
        if !watcher.upgrade().is_some_and(|watcher| watcher.look()) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::datagram::Family;
    use crate::ring::port_order::{Port, PortOrder};

    /// A driver that counts.
    #[derive(Default)]
    struct Counting {
        enters: AtomicUsize,
        calls: AtomicUsize,
        watcher: OnceLock<Weak<Watcher>>,
    }

    impl Watched for Counting {
        fn enter_overdue(&self) {
            self.enters.fetch_add(1, Ordering::SeqCst);
        }

        fn on_time(&self) {
            let watcher = self.watcher.get().and_then(Weak::upgrade).expect("it calls");
            watcher.call_at.store(0, Ordering::SeqCst);
            self.calls.fetch_add(1, Ordering::SeqCst);
        }
    }

    struct Rig {
        driver: Arc<Counting>,
        overdue: Overdue,
        closes: PortOrder,
    }

    impl Rig {
        fn new() -> Self {
            let driver = Arc::new(Counting::default());
            let watched: Arc<dyn Watched> = driver.clone();
            let overdue = Overdue::new(Arc::downgrade(&watched), Timer::new().unwrap());
            driver.watcher.set(Arc::downgrade(&overdue.watcher)).unwrap();
            Self { driver, overdue, closes: PortOrder::default() }
        }

        /// What the driver does when a close begins.
        fn begin_close(&mut self) -> CloseId {
            let port = Port { family: Family::V4, number: None };
            let close = self.closes.begin_close(port, Instant::now());
            self.note();
            close
        }

        fn end_close(&mut self, close: CloseId) {
            self.closes.end_close(close);
            self.note();
        }

        fn note(&mut self) {
            self.overdue.note(self.closes.oldest()).into_iter().for_each(Waker::wake);
        }

        /// As if nothing had rested for that long.
        fn pass_rests_apart(&mut self) {
            self.overdue.rested_at = self.overdue.rested_at.saturating_sub(nanos(RESTS_APART));
        }

        fn expires(&self) -> bool {
            self.overdue.watcher.expires_at.load(Ordering::SeqCst) != 0
        }
    }

    fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !is_so() {
            assert!(begun.elapsed() < Duration::from_mins(1), "it never is: {what}");
            thread::yield_now();
        }
    }

    /// Kills: a thread that misses what becomes due while it looks, or that goes to sleep.
    #[test]
    fn every_close_that_takes_long_is_got_on_with_again_and_again() {
        let mut rig = Rig::new();
        for _ in 0..100 {
            let before = rig.driver.enters.load(Ordering::SeqCst);
            let close = rig.begin_close();
            // One may be the last close's.
            wait_until("got on with, twice", || {
                rig.driver.enters.load(Ordering::SeqCst) >= before + 3
            });
            rig.end_close(close);
        }
    }

    /// Kills: a thread that runs for each guest.
    #[test]
    fn where_closes_end_in_time_and_guests_go_the_thread_does_not_run() {
        let mut rig = Rig::new();
        let close = rig.begin_close();
        wait_until("the timer is set", || rig.expires());
        rig.end_close(close);
        wait_until("it is not", || {
            rig.pass_rests_apart();
            rig.overdue.rest().into_iter().for_each(Waker::wake);
            !rig.expires()
        });
        // Not before something else is due.
        rig.overdue.call_after(Duration::from_hours(1)).into_iter().for_each(Waker::wake);
        let close = rig.begin_close();
        rig.end_close(close);
        wait_until("the timer is set for that", || {
            rig.pass_rests_apart();
            rig.overdue.rest().into_iter().for_each(Waker::wake);
            rig.overdue.watcher.expires_at.load(Ordering::SeqCst)
                == rig.overdue.watcher.call_at.load(Ordering::SeqCst)
        });
        assert!(rig.overdue.rest().is_none());
    }

    /// Kills: a server with thousands of short stores a second that sets the timer twice for each.
    #[test]
    fn where_many_guests_go_the_timer_stays_set() {
        let mut rig = Rig::new();
        rig.overdue.call_after(Duration::from_hours(1)).into_iter().for_each(Waker::wake);
        let close = rig.begin_close();
        rig.end_close(close);
        let begun = Instant::now();
        rig.overdue.rested_at = rig.overdue.watcher.now();
        let wakes = rig.overdue.rest().is_some();
        assert!(!wakes || begun.elapsed() >= RESTS_APART, "a busy machine");
        wait_until("it rests so long after", || {
            let close = rig.begin_close();
            rig.end_close(close);
            rig.pass_rests_apart();
            rig.overdue.rest().is_some()
        });
    }

    /// Kills: a timer that waits for the later of two, or that is not set while the thread calls.
    #[test]
    fn the_driver_is_called_in_time_once() {
        let mut rig = Rig::new();
        for _ in 0..100 {
            rig.overdue.call_after(Duration::from_hours(1)).into_iter().for_each(Waker::wake);
            rig.overdue.call_after(Duration::from_micros(100)).into_iter().for_each(Waker::wake);
            wait_until("called", || rig.driver.calls.load(Ordering::SeqCst) > 0);
            assert_eq!(rig.driver.calls.swap(0, Ordering::SeqCst), 1);
            assert_eq!(rig.driver.enters.load(Ordering::SeqCst), 0);
        }
    }

    /// Kills: a thread that waits for ever for a timer of a ring that is gone.
    #[test]
    fn the_thread_ends_with_its_driver() {
        for is_closing in [false, true] {
            let mut rig = Rig::new();
            let close = rig.begin_close();
            wait_until("it runs", || rig.driver.enters.load(Ordering::SeqCst) > 0);
            if !is_closing {
                rig.end_close(close);
            }
            let timer = Arc::clone(&rig.overdue.watcher.timer);
            drop(rig.driver);
            rig.overdue.end();
            drop(rig.overdue);
            wait_until("the thread has ended", || Arc::strong_count(&timer) == 1);
        }
    }
}
