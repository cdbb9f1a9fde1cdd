//! A driver on a kernel that a test plays, which plays the ring's own thread, too.

use std::sync::{Arc, Weak};

use super::batching::Guest;
use super::enter::Driver;
use super::held_up::HeldUp;
use super::overdue::{Overdue, Watched};
use crate::ring::queues::SlotIndex;
use crate::ring::queues::played::{Audit, Played, Sizes, build};
use crate::ring::receive_queue::QueueLimits;
use crate::ring::recycle::rcu::played::PlayedThread;
use crate::ring::timer::Timer;

impl Driver {
    pub(crate) fn played(
        seed: u64,
        sizes: Sizes,
        limits: QueueLimits,
        meanwhile: fn(),
    ) -> (Arc<Self>, Arc<Played>, PlayedThread) {
        let (built, played, thread) = build(seed, sizes, meanwhile);
        let driver = Self::new(built, limits, &HeldUp::new());
        if !cfg!(shuttle) {
            // Of no driver: the thread ends when the timer first expires, and changes nothing.
            driver.core.lock().overdue = Overdue::new(Weak::<Self>::new(), Timer::new().unwrap());
        }
        (driver, played, thread)
    }

    /// Runs that while this thread has the lock.
    pub(crate) fn while_locked(&self, run: impl FnOnce()) {
        let _core = self.core.lock();
        run();
    }

    /// Whether this thread does not hold the lock.
    pub(crate) fn is_free(&self) -> bool {
        self.core.is_free()
    }

    pub(crate) fn is_entering(&self) -> bool {
        self.core.lock().entering
    }

    /// Another thread is inside, or has come out.
    pub(crate) fn set_entering(&self, entering: bool) {
        self.core.lock().entering = entering;
    }

    /// Whether a guest has ever waited, so that completions are reaped that come by themselves.
    pub(crate) fn has_reaper(&self) -> bool {
        !self.core.lock().runtimes.is_empty()
    }

    /// What is counted and what the guests' threads are told of it, for a trace.
    #[cfg(shuttle)]
    pub(crate) fn state(&self) -> String {
        let core = self.core.lock();
        let (queued, submitted) = (core.ring.queued(), core.ring.submitted());
        let (entering, is_watching) = (core.entering, core.overdue.watches());
        let is_closing = core.ring.ports().is_closing();
        format!("{queued} queued, {submitted} submitted, {entering} {is_watching} {is_closing}")
    }

    pub(crate) fn has_queued(&self) -> bool {
        self.core.lock().has_queued()
    }

    /// A guest waits for what a thread that computes has armed.
    pub(crate) fn play_arm_anew(&self, guest: Guest, slot: SlotIndex) {
        if let Ok(core) = self.lock_open() {
            self.arm_anew(core, guest, slot);
        }
    }

    /// Does what the ring's own thread does when it is called; `false` if nobody has called it.
    pub(crate) fn play_timer(&self) -> bool {
        let is_due = std::mem::take(&mut self.core.lock().is_call_due);
        if is_due {
            self.on_time();
        }
        is_due
    }

    /// Does what the ring's own thread does about closes that take too long; whether some go on.
    pub(crate) fn play_watch(&self) -> bool {
        if !self.core.lock().overdue.watches() {
            return false;
        }
        self.enter_overdue();
        self.core.lock().ring.ports().is_closing()
    }

    pub(crate) fn audit(&self, played: &Played) -> Audit {
        let mut core = self.core.lock();
        core.ring.audit(&played.kernel())
    }
}
