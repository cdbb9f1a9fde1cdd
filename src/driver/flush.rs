//! Waiting until what a guest has queued is in the kernel.

use std::task::{Context, Poll, ready};

use super::batching::{Guest, Yielding};
use super::enter::{Core, Driver, LockedCore};
use super::first_poll;
use crate::clock;
use crate::error::Errno;
use crate::limits::{DEFERRED_TIME_DEFAULT, OUTSIDE_PATIENCE};
use crate::sync::runtime::{Handle, RuntimeFlavor, worker_index};

/// Ready when what was queued has reached the kernel, and what completed at once is recorded.
pub(crate) struct Flush {
    guest: Guest,
    /// Entries that the ring's guests had queued up to and with this one's.
    queued: u64,
    yielding: Yielding,
}

impl Flush {
    /// For what `guest` has just queued.
    pub(super) fn new(core: &Core, guest: Guest) -> Self {
        Self { guest, queued: core.ring.queued(), yielding: Yielding::NotYielded }
    }

    /// For what `guest` has deferred: at what entry it ends shows later.
    pub(super) fn deferred(guest: Guest) -> Self {
        Self { guest, queued: u64::MAX, yielding: Yielding::NotYielded }
    }

    pub(crate) fn poll(
        &mut self,
        driver: &Driver,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Errno>> {
        self.poll_submitted(driver, cx, is_current_thread).map(|submitted| submitted.map(drop))
    }

    /// As `poll`; ready with the lock still held.
    #[inline]
    pub(super) fn poll_submitted<'driver>(
        &mut self,
        driver: &'driver Driver,
        cx: &Context<'_>,
        yields: impl FnOnce() -> bool,
    ) -> Poll<Result<LockedCore<'driver>, Errno>> {
        let mut core = driver.lock_open()?;
        self.end_yield(&mut core);
        let core = ready!(self.submit(driver, core, cx, yields));
        if self.is_submitted(&core) {
            return Poll::Ready(Ok(core));
        }
        self.register(driver, core, cx)
    }

    /// Has the thread that is inside wake this guest, unless it has submitted its entries by then.
    #[cold]
    fn register<'driver>(
        &self,
        driver: &'driver Driver,
        core: LockedCore<'driver>,
        cx: &Context<'_>,
    ) -> Poll<Result<LockedCore<'driver>, Errno>> {
        let (mut core, waker) = core.unlocked(|| cx.waker().clone());
        if !self.is_submitted(&core) {
            // The thread that was inside may have come out meanwhile, and without these entries.
            core = driver.combine(core);
        }
        let refusal = self.refusal(&core);
        if self.is_submitted(&core) || refusal.is_some() {
            core.drop_later(Some(waker));
            return Poll::Ready(refusal.map_or(Ok(core), Err));
        }
        core.flush_wakers.push(waker);
        Poll::Pending
    }

    /// Why the guest's entries are not in the kernel, if that is to be waited for no longer.
    pub(super) fn refusal(&self, core: &Core) -> Option<Errno> {
        core.refusal_of(self.queued)
    }

    fn is_submitted(&self, core: &Core) -> bool {
        core.ring.submitted() >= self.queued
    }

    pub(super) fn guest(&self) -> Guest {
        self.guest
    }

    pub(super) fn has_yielded(&self) -> bool {
        matches!(self.yielding, Yielding::Yielded { .. } | Yielding::Over)
    }

    /// To be called whenever the guest is polled.
    pub(super) fn end_yield(&mut self, core: &mut Core) {
        core.batching.end_yield(&mut self.yielding);
    }

    /// Gets the guest's entries into the kernel, unless another thread is inside and will. Pending
    /// if the guest yields first, with its waker woken: it enters when it is polled again. `yields`: whether that
    /// is worth it in this runtime.
    #[inline]
    pub(super) fn submit<'driver>(
        &mut self,
        driver: &'driver Driver,
        mut core: LockedCore<'driver>,
        cx: &Context<'_>,
        yields: impl FnOnce() -> bool,
    ) -> Poll<LockedCore<'driver>> {
        if first_poll::is_first(cx) && !self.has_yielded() {
            // To suspend costs a concurrent call (WASI 0.3) more than an enter.
            self.yielding = Yielding::Declined;
        }
        if core.entering || self.is_submitted(&core) {
            return Poll::Ready(core);
        }
        let bytes = core.ring.unsent_bytes();
        if core.batching.should_yield(self.guest, &self.yielding, bytes) && yields() {
            self.yielding = core.batching.begin_yield();
            if !is_current_thread() {
                // All workers may run guests that compute.
                core.call_after(DEFERRED_TIME_DEFAULT);
            }
            drop(core);
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(driver.combine(core))
    }
}

impl Driver {
    /// Ready, with the lock held, when no other thread is inside. That takes microseconds, for which this
    /// thread waits; if it takes longer, the thread inside wakes the task.
    pub(super) fn poll_outside(&self, cx: &Context<'_>) -> Poll<Result<LockedCore<'_>, Errno>> {
        let mut begun = None;
        loop {
            let core = self.lock_to_queue()?;
            if !core.entering {
                return Poll::Ready(Ok(core));
            }
            if clock::since(*begun.get_or_insert_with(clock::now)) >= OUTSIDE_PATIENCE {
                let (mut core, waker) = core.unlocked(|| cx.waker().clone());
                if core.entering {
                    core.flush_wakers.push(waker);
                    return Poll::Pending;
                }
                core.drop_later(Some(waker));
                return Poll::Ready(Ok(core));
            }
            drop(core);
            clock::yield_now();
        }
    }

    /// Ready when what is queued has reached the kernel, and what completed at once is recorded.
    pub(crate) fn poll_entered(&self, cx: &Context<'_>) -> Poll<Result<(), Errno>> {
        let core = ready!(self.poll_outside(cx))?;
        drop(self.combine(core));
        Poll::Ready(Ok(()))
    }
}

/// Whether a guest that yields on this thread lets others run, and no flusher comes before them.
pub(super) fn is_worker() -> bool {
    worker_index().is_some() || is_current_thread()
}

/// Whether this thread's runtime has no other: its guests never contend for the ring.
pub(crate) fn is_current_thread() -> bool {
    Handle::try_current()
        .is_ok_and(|handle| handle.runtime_flavor() == RuntimeFlavor::CurrentThread)
}
