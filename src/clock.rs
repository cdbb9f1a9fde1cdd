//! What time it is, for all that waits with a bound. A test may say what time it is.

use std::time::{Duration, Instant};

use crate::sync::thread;

#[inline]
pub(crate) fn now() -> Instant {
    #[cfg(test)]
    if let Some(now) = played::now() {
        return now;
    }
    Instant::now()
}

#[inline]
pub(crate) fn since(then: Instant) -> Duration {
    now().saturating_duration_since(then)
}

/// Lets other threads run; where a test plays them, time passes by itself.
pub(crate) fn yield_now() {
    #[cfg(all(test, not(shuttle)))]
    if played::now().is_some() {
        return;
    }
    thread::yield_now();
}

/// A thread's own time, which passes when it is looked at.
#[cfg(test)]
pub(crate) mod played {
    use std::cell::Cell;
    use std::time::{Duration, Instant};

    thread_local! {
        static NOW: Cell<Option<Instant>> = const { Cell::new(None) };
    }

    /// What passes between two looks.
    const LOOK: Duration = Duration::from_micros(100);

    pub(super) fn now() -> Option<Instant> {
        let now = NOW.get()? + LOOK;
        NOW.set(Some(now));
        Some(now)
    }

    /// From now on time passes in this thread as `pass` has it, and the looks.
    pub(crate) fn start() {
        NOW.set(Some(Instant::now()));
    }

    pub(crate) fn pass(time: Duration) {
        NOW.set(NOW.get().map(|now| now + time));
    }

    pub(crate) fn end() {
        NOW.set(None);
    }
}
