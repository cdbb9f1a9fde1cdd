//! The two tasks of each runtime whose guests use the ring, and what the ring's own thread does where
//! they do not run.
//!
//! Completions that come by themselves (datagrams, sends that waited for send buffer) signal an
//! eventfd while no thread is inside the kernel for the ring. The reaper then reaps them. What no
//! guest waits for, such as the CLOSE of a dropped socket, is left to the flusher, which enters when
//! the guest next suspends, unless another thread enters before. They are two tasks because a worker
//! thread keeps a task it has woken to itself until its guest suspends, and arrivals must not wait
//! for a guest that computes.

use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::task::Poll;

use super::batching::Guest;
use super::enter::{Driver, Insider, LockedCore};
use super::held_up;
use super::overdue::Watched;
use crate::error::Errno;
use crate::limits::{DRAIN_PATIENCE, REFUSAL_PAUSE_MAX};
use crate::ring::eventfd::WatchedEventFd;
use crate::ring::membarrier::kick;
use crate::ring::queues::SlotIndex;
use crate::sync::runtime::{self, Handle};
use crate::sync::thread;

impl Driver {
    /// Has a task reap, from now on, completions that come by themselves.
    pub(super) fn ensure_reaper(self: &Arc<Self>) {
        let Ok(handle) = Handle::try_current() else {
            return tracing::error!("a wasi-uring socket was awaited outside of a tokio runtime");
        };
        let Some(mut core) = self.lock() else { return };
        if core.runtimes.get(handle.id()).is_none() {
            self.spawn_tasks(core, &handle);
        }
    }

    /// Has what is queued reach the kernel although no guest waits for it.
    pub(super) fn leave_to_flusher(self: &Arc<Self>, core: LockedCore<'_>) {
        if core.entering {
            // The thread inside finds it.
            return;
        }
        if core.runtimes.flusher_due.is_none() {
            return self.wake_flusher(core);
        }
        // One that is due elsewhere runs when a guest suspends there, not here.
        if !core.runtimes.is_flusher_due_here() {
            drop(self.combine(core));
        }
    }

    /// As `leave_to_flusher`, for what may wait until a guest suspends elsewhere, too.
    pub(super) fn leave_to_any_flusher(self: &Arc<Self>, core: LockedCore<'_>) {
        if !core.entering && core.runtimes.flusher_due.is_none() {
            self.wake_flusher(core);
        }
    }

    fn wake_flusher(self: &Arc<Self>, mut core: LockedCore<'_>) {
        let Ok(handle) = Handle::try_current() else {
            // Outside of any runtime there is none.
            return drop(self.combine(core));
        };
        core.runtimes.flusher_due = Some((thread::current().id(), handle.id()));
        let Some(tasks) = core.runtimes.get(handle.id()) else {
            return self.spawn_tasks(core, &handle);
        };
        let flusher = tasks.flusher.take();
        core.wake_later(flusher);
    }

    /// Has a socket's receive armed anew, by another thread than before, if that computes: its datagrams would go
    /// on waiting until it is interrupted.
    pub(crate) fn arm_here(&self, guest: Guest, slot: SlotIndex) {
        if self.held_up.is_calm() {
            return;
        }
        let Ok(mut core) = self.lock_open() else { return };
        if core.ring.armed_elsewhere(slot).is_some_and(held_up::computes) {
            self.arm_anew(core, guest, slot);
        }
    }

    /// The thread that sees the end of the receive before arms it.
    pub(super) fn arm_anew(&self, mut core: LockedCore<'_>, guest: Guest, slot: SlotIndex) {
        core.batching.queue(guest);
        core.ring.cancel_receive(slot);
        drop(self.combine(core));
    }

    /// As `reap`, and has a reaper reap what comes later.
    pub(crate) fn start_reaping(self: &Arc<Self>, guest: Guest) -> Option<Errno> {
        self.ensure_reaper();
        self.reap(Some(guest))
    }

    /// Reaps completions that have come, for a guest or for the host. Returns why others may never come: the
    /// kernel has refused enters for too long.
    pub(crate) fn reap(self: &Arc<Self>, guest: Option<Guest>) -> Option<Errno> {
        let mut core = self.lock()?;
        if core.entering {
            return None;
        }
        let pauses = core.ring.stats.pauses;
        core.ring.reap();
        core.wake_completed();
        self.show_pulse(&core);
        // Completions may wait for a thread to enter, perhaps this one: a guest that polls again and again
        // makes no other system call. And the kernel fills the buffers given back just now until the
        // cancel of a full queue's receive is there.
        let waits = core.ring.has_task_work();
        // A lone guest need not suspend for what it has sent; among others the flusher submits that of all
        // when this thread's guest suspends.
        let has_others = |guest| core.batching.includes_other_than(guest);
        let waits_for_flusher =
            || guest.is_some_and(has_others) && core.runtimes.is_flusher_due_here();
        let submits = core.ring.has_deferred() && !waits_for_flusher();
        if waits || submits || core.ring.stats.pauses > pauses {
            core = self.combine_with(core, waits);
        }
        let refusal = core.refusals.told();
        if !core.entering && core.has_queued() {
            self.leave_to_flusher(core);
        }
        refusal
    }

    fn spawn_tasks(self: &Arc<Self>, mut core: LockedCore<'_>, handle: &Handle) {
        let id = handle.id();
        core.runtimes.add(id, handle.runtime_flavor());
        let is_shared = core.runtimes.are_shared();
        // Not under the lock: a runtime that is shutting down drops its tasks at once.
        drop(core);
        if is_shared {
            self.held_up.start();
        }
        let driver = Arc::downgrade(self);
        handle.spawn(flush(Weak::clone(&driver), id));
        handle.spawn(reap(Reaper { driver, id }));
    }
}

/// The flusher: enters with what is queued whenever it is woken, for as long as the ring lives.
async fn flush(driver: Weak<Driver>, id: runtime::Id) {
    poll_fn(|cx| {
        let Some(driver) = driver.upgrade() else { return Poll::Ready(()) };
        let waker = cx.waker().clone();
        let Some(mut core) = driver.lock() else { return Poll::Ready(()) };
        core.runtimes.flusher_due = None;
        let replaced = core.runtimes.get(id).and_then(|tasks| tasks.flusher.replace(waker));
        core.drop_later(replaced);
        drop(driver.enter_as_task(core));
        Poll::Pending
    })
    .await;
}

/// The reaper of a runtime, which has its tasks for as long as this lives.
struct Reaper {
    driver: Weak<Driver>,
    id: runtime::Id,
}

/// The reaper: reaps whenever the eventfd was signalled, for as long as the ring and the runtime
/// live.
async fn reap(reaper: Reaper) {
    let mut signals = Signals::default();
    poll_fn(|cx| {
        let Some(driver) = reaper.driver.upgrade() else { return Poll::Ready(()) };
        // Edge-triggered: the counter need not be read, only the readiness cleared.
        while let Some(Poll::Ready(readiness)) =
            signals.watched(&driver).map(|signals| signals.poll_read_ready(cx))
        {
            match readiness {
                Ok(mut readiness) => readiness.clear_ready(),
                Err(_runtime_is_gone) => return Poll::Ready(()),
            }
        }
        let waker = cx.waker().clone();
        let Some(mut core) = driver.lock() else { return Poll::Ready(()) };
        if matches!(signals, Signals::Later) {
            core.runtimes.have_unwatched = true;
            core.call_after(REFUSAL_PAUSE_MAX);
        }
        let replaced = core.runtimes.get(reaper.id).and_then(|tasks| tasks.reaper.replace(waker));
        core.drop_later(replaced);
        let core = driver.enter_as_task(core);
        let is_shared = core.runtimes.are_shared();
        drop(core);
        if is_shared {
            driver.held_up.look();
        }
        Poll::Pending
    })
    .await;
}

/// The eventfd as a runtime watches it.
#[derive(Default)]
enum Signals {
    #[default]
    NotYet,
    Watched(WatchedEventFd),
    /// The kernel has refused it: it is tried again.
    Later,
    /// A runtime without I/O: what completes at once works there all the same.
    Never,
}

impl Signals {
    /// What signals the reaper, registered with this runtime unless it is.
    fn watched(&mut self, driver: &Driver) -> Option<&WatchedEventFd> {
        if matches!(self, Self::NotYet | Self::Later) {
            // tokio panics in a runtime without I/O.
            *self = match catch_unwind(AssertUnwindSafe(|| driver.eventfd.watch())) {
                Ok(Ok(signals)) => Self::Watched(signals),
                Ok(Err(error)) => {
                    if matches!(self, Self::NotYet) {
                        tracing::error!(%error, "datagrams do not wake guests here for now");
                    }
                    Self::Later
                }
                Err(_) => {
                    tracing::error!(
                        "datagrams will not wake guests in this runtime: enable its I/O"
                    );
                    Self::Never
                }
            };
        }
        match self {
            Self::Watched(signals) => Some(signals),
            Self::NotYet | Self::Later | Self::Never => None,
        }
    }
}

impl Drop for Reaper {
    /// The runtime is shutting down, and its flusher with it: this enters with what is queued. The
    /// guests that wait in other runtimes are woken, and start reapers there.
    fn drop(&mut self) {
        let Some(driver) = self.driver.upgrade() else { return };
        let Some(mut core) = driver.lock() else { return };
        core.runtimes.flusher_due = None;
        if let Some(ended) = core.runtimes.remove(self.id) {
            core.drop_later(ended.reaper);
            core.drop_later(ended.flusher);
        }
        let mut core = driver.combine(core);
        core.wake_all();
    }
}

impl Driver {
    /// As a reaper or flusher.
    fn enter_as_task<'driver>(&'driver self, mut core: LockedCore<'driver>) -> LockedCore<'driver> {
        if !core.entering {
            core.insider = Insider::Task;
            core = self.combine(core);
        }
        core
    }

    /// As the ring's own thread.
    fn enter_for_all<'driver>(
        &'driver self,
        mut core: LockedCore<'driver>,
        reap: bool,
    ) -> LockedCore<'driver> {
        let before = core.ring.stats.enters;
        core.insider = Insider::OwnThread;
        core = self.combine_with(core, reap);
        core.ring.stats.enters_overdue += core.ring.stats.enters - before;
        core
    }
}

impl Watched for Driver {
    fn enter_overdue(&self) {
        let Some(mut core) = self.lock() else { return };
        // A thread that is inside does this when it comes out. What the kernel refuses is tried again in
        // time.
        if core.may_enter() {
            core.ring.give_up_on_sends();
            core = self.enter_for_all(core, false);
        }
        let is_held_up = core.ring.ports().is_closing() && core.ring.has_task_work();
        drop(core);
        if is_held_up {
            kick();
        }
    }

    fn on_time(&self) {
        let Some(mut core) = self.lock() else { return };
        core.overdue.end_call();
        if std::mem::take(&mut core.runtimes.have_unwatched) {
            core.wake_reapers();
        }
        if let Some(next) = core.ring.end_forsaken_sends() {
            core.call_after(next);
        }
        let was_refused = core.refusals.go_on();
        let drains = core.ring.has_event() || core.ring.has_cached_work();
        if core.ring.is_quarantining() {
            core.call_after(DRAIN_PATIENCE);
        }
        if (was_refused || drains || core.has_queued()) && !core.entering {
            // Also if nothing is queued: completions may have been what the enter was for.
            drop(self.enter_for_all(core, was_refused));
        }
    }
}
