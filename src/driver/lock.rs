//! A lock, and what the thread that holds it leaves for after the unlock.
//!
//! To wake, clone or drop a waker runs code of the executor that made it, and a log line runs code
//! of the host's tracing subscriber. Either may call back into this crate, or panic. So a
//! [`Locked`] takes them over, and they run right after the unlock. A panic there is a bug of the
//! waker's or the subscriber's owner, and the thread may be any guest's: it is reported and goes no
//! further.

use std::io;
use std::ops::{Deref, DerefMut};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::PoisonError;
use std::task::Waker;

use super::lifo_slot;
use crate::sync::{Mutex, MutexGuard};

pub(super) struct Lock<T>(Mutex<T>);

impl<T> Lock<T> {
    pub(super) fn new(guarded: T) -> Self {
        Self(Mutex::new(guarded))
    }

    pub(super) fn lock(&self) -> Locked<'_, T> {
        self.lock_with(AfterUnlock::default())
    }

    /// A thread that panicked under the lock does not keep the others from it.
    fn lock_with(&self, after: AfterUnlock) -> Locked<'_, T> {
        let guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Locked { lock: self, guard, after }
    }

    pub(super) fn get_mut(&mut self) -> &mut T {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    /// For tests: false if it is still held after a second, which is by this thread, since no other (as the ring's
    /// own) holds it so long.
    #[cfg(test)]
    pub(super) fn is_free(&self) -> bool {
        let is_taken = || matches!(self.0.try_lock(), Err(std::sync::TryLockError::WouldBlock));
        (0..1000).any(|_| {
            if is_taken() {
                std::thread::sleep(std::time::Duration::from_millis(1));
                return false;
            }
            true
        })
    }
}

/// The lock, held by this thread.
pub(super) struct Locked<'lock, T> {
    lock: &'lock Lock<T>,
    // Fields are dropped in this order: the lock is released, then what was left runs.
    guard: MutexGuard<'lock, T>,
    after: AfterUnlock,
}

impl<T> Locked<'_, T> {
    /// Releases the lock while `run` runs.
    pub(super) fn unlocked<R>(self, run: impl FnOnce() -> R) -> (Self, R) {
        let Self { lock, guard, mut after } = self;
        drop(guard);
        after.run();
        let result = run();
        (lock.lock_with(after), result)
    }

    /// Runs what was left for after the unlock, if anything was.
    pub(super) fn run_left(self) -> Self {
        if self.after.is_empty() { self } else { self.unlocked(|| ()).0 }
    }

    /// What is guarded, and where to leave what must not run now.
    pub(super) fn split(&mut self) -> (&mut T, &mut AfterUnlock) {
        (&mut self.guard, &mut self.after)
    }

    pub(super) fn wake_later(&mut self, waker: Option<Waker>) {
        self.after.wake_later(waker);
    }

    pub(super) fn drop_later(&mut self, waker: Option<Waker>) {
        self.after.drop_later(waker);
    }
}

impl<T> Deref for Locked<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for Locked<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

/// What runs when the lock is released. Most often nothing, so that this is one pointer.
#[derive(Default)]
pub(super) struct AfterUnlock(Option<Box<Left>>);

#[derive(Default)]
struct Left {
    woken: Vec<Waker>,
    dropped: Vec<Waker>,
    /// Some of the woken may be in this worker's LIFO slot, and this thread's guest may compute on.
    vacates_slot: bool,
    /// Of `io_uring_enter`.
    failed: Option<io::Error>,
    /// Of the ring.
    warning: Option<&'static str>,
}

impl AfterUnlock {
    fn left(&mut self) -> &mut Left {
        self.0.get_or_insert_default()
    }

    pub(super) fn wake_later(&mut self, wakers: impl IntoIterator<Item = Waker>) {
        self.wake_guests_later(wakers, false);
    }

    /// `by_guest`: by one that may not suspend for long.
    pub(super) fn wake_guests_later(
        &mut self,
        wakers: impl IntoIterator<Item = Waker>,
        by_guest: bool,
    ) {
        let mut wakers = wakers.into_iter().peekable();
        if wakers.peek().is_some() {
            let left = self.left();
            left.woken.extend(wakers);
            left.vacates_slot |= by_guest;
        }
    }

    /// For wakers that were replaced, or that were not needed after all.
    pub(super) fn drop_later(&mut self, waker: Option<Waker>) {
        if let Some(waker) = waker {
            self.left().dropped.push(waker);
        }
    }

    pub(super) fn log_later(&mut self, errno: io::Error) {
        self.left().failed = Some(errno);
    }

    pub(super) fn warn_later(&mut self, warning: &'static str) {
        self.left().warning = Some(warning);
    }

    fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    fn run(&mut self) {
        if let Some(left) = self.0.take() {
            (*left).run();
        }
    }
}

impl Drop for AfterUnlock {
    fn drop(&mut self) {
        self.run();
    }
}

impl Left {
    /// Each by itself, so that one that panics keeps none of the others from running.
    #[inline(never)]
    fn run(self) {
        let Self { woken, dropped, vacates_slot, failed, warning } = self;
        let mut has_panicked = false;
        for waker in woken {
            has_panicked |= !contained(|| waker.wake());
        }
        if vacates_slot {
            contained(lifo_slot::vacate);
        }
        for waker in dropped {
            has_panicked |= !contained(|| drop(waker));
        }
        if let Some(errno) = failed {
            contained(
                || tracing::error!(%errno, "io_uring_enter failed: guests wait, and it is tried again"),
            );
        }
        if let Some(warning) = warning {
            contained(|| tracing::error!("{warning}"));
        }
        if has_panicked {
            contained(|| tracing::error!("a waker has panicked; its task may wait for ever"));
        }
    }
}

/// Runs foreign code, and stops a panic of it here; the process's panic hook has seen it. `false`
/// if it panicked.
fn contained(foreign: impl FnOnce()) -> bool {
    match catch_unwind(AssertUnwindSafe(foreign)) {
        Ok(()) => true,
        Err(payload) => {
            // To drop it would be foreign code once more.
            std::mem::forget(payload);
            false
        }
    }
}
