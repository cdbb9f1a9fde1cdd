//! One thread enters the kernel for all guests: the state that it shares with the others, and what
//! it does inside.

use std::sync::{Arc, Weak};
use std::task::Waker;
use std::time::Duration;
use std::{fmt, io};

use super::batching::{Batching, Rounds};
use super::held_up::{self, HeldUp, Pulse};
use super::lock::{AfterUnlock, Lock, Locked};
use super::overdue::Overdue;
use super::refusals::Refusals;
use super::runtimes::Runtimes;
use crate::clock;
use crate::error::{Errno, RingGone, SetupError};
use crate::limits::DRAIN_PATIENCE;
use crate::ring::eventfd::EventFd;
use crate::ring::membarrier::kick;
use crate::ring::op::OpResult;
use crate::ring::op_table::{Leftover, Registered};
use crate::ring::process::Process;
use crate::ring::queues::{Enter, OpKey, SlotIndex};
use crate::ring::receive_queue::QueueLimits;
use crate::ring::recycle::pool::Recycle;
use crate::ring::setup::Known;
use crate::ring::share::Share;
use crate::ring::{Ring, setup};
use crate::stats::Stats;
use crate::sync::atomic::{AtomicBool, Ordering};

/// A ring, and how its guests and their threads share it.
pub(crate) struct Driver {
    process: Process,
    /// The host has closed the ring: written under the lock.
    is_closed: AtomicBool,
    pub(super) kernel: Enter,
    pub(super) share: Arc<Share>,
    /// The eventfd that completions signal while no thread is inside.
    pub(super) eventfd: EventFd,
    pub(super) known: Known,
    pub(super) queue_limits: QueueLimits,
    pub(super) held_up: Arc<HeldUp>,
    pulse: Arc<Pulse>,
    pub(super) core: Lock<Core>,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The formatter is the host's code, so not under the lock.
        let stats = self.snapshot();
        f.debug_struct("Driver").field("stats", &stats).finish_non_exhaustive()
    }
}

/// What the driver's lock guards.
pub(super) struct Core {
    pub(super) ring: Ring,
    /// A thread is inside, and will look for what was queued meanwhile.
    pub(super) entering: bool,
    /// Who enters next: `Guest` again when it comes out.
    pub(super) insider: Insider,
    pub(super) batching: Batching,
    pub(super) runtimes: Runtimes,
    /// Of guests that wait until what they queued has reached the kernel.
    pub(super) flush_wakers: Vec<Waker>,
    pub(super) overdue: Overdue,
    pub(super) refusals: Refusals,
    /// `call_after` was called, for a test that plays the ring's own thread.
    #[cfg(test)]
    pub(super) is_call_due: bool,
}

/// On whose behalf a thread is inside, or reaps.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Insider {
    /// A guest's, which may compute on for long when it comes out: what it has woken must not wait for it.
    Guest,
    /// A reaper or flusher, which is soon done.
    Task,
    /// The ring's own thread, which leaves guests' wakers to the reapers: in the queue of a
    /// current-thread runtime those that another thread has woken wait behind the others, and so could
    /// not share their enters.
    OwnThread,
}

/// The driver's lock, held by this thread.
pub(super) type LockedCore<'driver> = Locked<'driver, Core>;

impl Core {
    /// Whether entries are queued that the kernel has not taken, or will be with the next flush.
    pub(super) fn has_queued(&self) -> bool {
        self.ring.queued() > self.ring.submitted() || self.ring.has_deferred()
    }

    /// Whether what the kernel has for a socket is another thread's to reap: of the one that is inside, or that
    /// has armed its receive.
    pub(super) fn is_elsewhere(&mut self, slot: SlotIndex) -> bool {
        self.entering || self.ring.armed_elsewhere(slot).is_some()
    }

    /// Whether a thread can enter now, and the kernel has not just refused another's.
    pub(super) fn may_enter(&self) -> bool {
        !self.entering && !self.refusals.go_on()
    }

    /// Why the kernel has not taken the first so many entries, if it has not for too long.
    pub(super) fn refusal_of(&self, queued: u64) -> Option<Errno> {
        self.refusals.told().filter(|_| !self.entering && self.ring.submitted() < queued)
    }
}

/// Where wakers change hands between the ring and the threads.
impl LockedCore<'_> {
    /// Wakes the guests whose operations or receives the ring has completed, and logs what the ring
    /// could not.
    pub(super) fn wake_completed(&mut self) {
        let (core, after) = self.split();
        let by_guest = core.insider == Insider::Guest;
        if core.insider != Insider::OwnThread || core.runtimes.is_empty() {
            after.wake_guests_later(core.ring.take_wakers(), by_guest);
        } else if core.ring.has_wakers() {
            after.wake_later(core.runtimes.take_reapers());
        }
        if let Some(warning) = core.ring.take_warning() {
            after.warn_later(warning);
        }
    }

    /// Wakes the guests that wait until what they queued has reached the kernel.
    fn wake_submitted(&mut self) {
        let (core, after) = self.split();
        let by_guest = core.insider == Insider::Guest;
        after.wake_guests_later(core.flush_wakers.drain(..), by_guest);
    }

    /// Wakes every reaper, so that they go on where this thread stops.
    pub(super) fn wake_reapers(&mut self) {
        let (core, after) = self.split();
        after.wake_later(core.runtimes.take_reapers());
    }

    /// Wakes all guests that wait for the kernel: each has its runtime start a reaper.
    pub(super) fn wake_all(&mut self) {
        let (core, after) = self.split();
        after.wake_later(core.ring.take_all_wakers());
    }

    /// Takes note of an enter that the kernel has refused: it is tried again, and guests are told if that
    /// goes on.
    fn refuse(&mut self, error: io::Error) {
        let errno = Errno(error.raw_os_error().unwrap_or(libc::EIO));
        let refused = self.refusals.count(errno, clock::now());
        if refused.is_new {
            self.split().1.log_later(error);
        }
        if refused.tells {
            self.wake_submitted();
            self.wake_all();
        }
        self.call_after(refused.again_after);
    }

    /// Has the ring's own thread call `Watched::on_time` then, or before.
    pub(super) fn call_after(&mut self, time: Duration) {
        let (core, after) = self.split();
        #[cfg(test)]
        {
            core.is_call_due = true;
        }
        after.wake_later(core.overdue.call_after(time));
    }

    /// A guest is gone: the ring's own thread need not run if nothing is left to do.
    pub(super) fn rest(&mut self) {
        let (core, after) = self.split();
        after.wake_later(core.overdue.rest());
    }

    /// Takes note of the oldest close that goes on.
    pub(super) fn watch_closes(&mut self) {
        let (core, after) = self.split();
        after.wake_later(core.overdue.note(core.ring.ports().oldest()));
    }

    /// Has what former owners have left in cached sockets drained, whether or not a guest enters again.
    fn watch_cache(&mut self) {
        if self.ring.has_cached_work() {
            // A batch with each enter: the signal of the grace period's end may be over.
            self.wake_reapers();
        }
        if self.ring.take_begun_grace() {
            // Where no reaper runs.
            self.call_after(DRAIN_PATIENCE);
        }
    }

    /// Registers a waker for an operation's last completion; `false` if that has come.
    pub(super) fn register(&mut self, key: OpKey, waker: Waker) -> bool {
        let Registered { has_ended, unused } = self.ring.register(key, waker);
        self.drop_later(unused);
        !has_ended
    }

    /// The future of an operation is dropped: its memory, and what comes of it, are the ring's. If it
    /// had ended, its result is for the caller to drop: that may close a descriptor.
    #[must_use = "it is dropped outside of the driver's lock"]
    pub(super) fn detach(&mut self, key: OpKey) -> Option<OpResult> {
        let Leftover { result, waker } = self.ring.detach(key);
        self.drop_later(waker);
        result
    }
}

impl Driver {
    pub(crate) fn build(
        sockets: u32,
        buffers: u16,
        queue_limits: QueueLimits,
        recycle: Recycle,
        held_up: &Arc<HeldUp>,
    ) -> Result<Arc<Self>, SetupError> {
        Ok(Self::new(setup::build(sockets, buffers, recycle)?, queue_limits, held_up))
    }

    /// Another ring like this one, and of its pool.
    pub(crate) fn build_another(&self) -> Result<Arc<Self>, SetupError> {
        Ok(Self::new(setup::build_another(&self.known)?, self.queue_limits, &self.held_up))
    }

    pub(super) fn new(
        built: setup::Built,
        queue_limits: QueueLimits,
        held_up: &Arc<HeldUp>,
    ) -> Arc<Self> {
        let setup::Built { process, ring, share, eventfd, timer, known } = built;
        Arc::new_cyclic(|driver: &Weak<Self>| Self {
            process,
            is_closed: AtomicBool::new(false),
            kernel: ring.kernel(),
            share,
            eventfd,
            known,
            queue_limits,
            held_up: Arc::clone(held_up),
            pulse: held_up.pulse(),
            core: Lock::new(Core {
                ring,
                entering: false,
                insider: Insider::Guest,
                batching: Batching::default(),
                runtimes: Runtimes::default(),
                flush_wakers: Vec::new(),
                overdue: Overdue::new(driver.clone(), timer),
                refusals: Refusals::default(),
                #[cfg(test)]
                is_call_due: false,
            }),
        })
    }

    /// Whether guests can use the ring.
    #[inline]
    pub(crate) fn check(&self) -> Result<(), RingGone> {
        if !self.process.is_current() {
            return Err(RingGone::Forked);
        }
        if self.is_closed.load(Ordering::Relaxed) { Err(RingGone::Closed) } else { Ok(()) }
    }

    /// `None` in a fork of the process that built the ring: there the lock may be held for ever, by a
    /// thread that only the parent has.
    pub(super) fn lock(&self) -> Option<LockedCore<'_>> {
        self.process.is_current().then(|| self.core.lock())
    }

    /// For what queues operations.
    #[inline]
    pub(super) fn lock_open(&self) -> Result<LockedCore<'_>, RingGone> {
        let core = self.lock().ok_or(RingGone::Forked)?;
        self.check().map(|()| core)
    }

    /// As `lock_open`, for what queues an operation that is waited for: not behind others that the kernel
    /// does not take, which would pile up.
    #[inline]
    pub(super) fn lock_to_queue(&self) -> Result<LockedCore<'_>, Errno> {
        let core = self.lock_open()?;
        match core.refusal_of(core.ring.queued()) {
            None => Ok(core),
            Some(refusal) => Err(refusal),
        }
    }

    /// All 0 in a fork of the process that built the ring.
    pub(crate) fn snapshot(&self) -> Stats {
        self.lock().map_or_else(Stats::default, |core| core.ring.snapshot())
    }

    /// Guests get `RingGone` from now on.
    pub(crate) fn refuse_calls(&self) {
        // Under the lock, so that what they queue is queued before.
        let Some(_core) = self.lock() else { return };
        self.is_closed.store(true, Ordering::Relaxed);
    }

    /// Closes every socket, and waits until the kernel has let go of them, for so long at most. Guests get
    /// `RingGone` from now on.
    pub(crate) fn shut_down(&self, patience: Duration) {
        self.refuse_calls();
        let Some(mut core) = self.lock() else { return };
        core.ring.begin_shutdown();
        let begun = clock::now();
        while !core.ring.is_shut_down() && clock::since(begun) < patience {
            core = self.combine_with(core, true);
            if !core.entering {
                core.ring.cancel_all();
            }
            drop(core);
            // What ends on a thread that computes on.
            kick();
            clock::yield_now();
            core = self.core.lock();
        }
        if !core.ring.is_shut_down() {
            core.split().1.warn_later("closed with operations that the kernel does not end");
        }
        core.wake_all();
    }

    /// What `held_up` may know of the ring.
    pub(super) fn show_pulse(&self, core: &Core) {
        self.pulse.beat(core.ring.stats.completions, core.ring.receives_armed());
    }

    /// Enters for all guests that have queued entries, unless another thread is inside and will.
    pub(super) fn combine<'driver>(
        &'driver self,
        core: LockedCore<'driver>,
    ) -> LockedCore<'driver> {
        self.combine_with(core, false)
    }

    /// With `reap`, enters even if nothing is queued: the kernel posts some completions only then.
    pub(super) fn combine_with<'driver>(
        &'driver self,
        core: LockedCore<'driver>,
        reap: bool,
    ) -> LockedCore<'driver> {
        let enter = |entries, completions| self.kernel.enter(entries, completions);
        self.combine_by(enter, core, reap)
    }

    /// `enter` is `Enter::enter`, or what a test has happen instead.
    pub(super) fn combine_by<'driver>(
        &'driver self,
        enter: impl Fn(u32, Option<u32>) -> io::Result<u32>,
        core: LockedCore<'driver>,
        mut reap: bool,
    ) -> LockedCore<'driver> {
        if core.entering {
            return core;
        }
        let inside = Inside { driver: self };
        // After `inside`, so that a panic releases the lock before that takes it.
        let mut core = core;
        core.entering = true;
        core.ring.disable_notifications();
        let mut rounds = Rounds::default();
        loop {
            core.ring.expire_binds();
            let entries = core.ring.flush();
            let reaps = std::mem::take(&mut reap) || core.ring.has_overflow();
            if entries > 0 || reaps {
                core.batching.submit();
                core.ring.stats.enters += 1;
                held_up::count_enter();
                // From here on the kernel owns the operations' memory, each until its last completion.
                let taken;
                (core, taken) = core.unlocked(|| enter(entries, reaps.then_some(0)));
                match taken {
                    Ok(taken) => {
                        core.ring.end_submission(taken);
                        core.refusals.end();
                    }
                    Err(error) if is_passing(&error) && !rounds.is_last() => {}
                    Err(error) => {
                        // Nothing that trying again at once would mend. Guests that wait for an enter go
                        // on waiting: each would try.
                        core.refuse(error);
                        core.ring.reap();
                        core.wake_completed();
                        if core.ring.enable_notifications() {
                            core.wake_reapers();
                        }
                        break;
                    }
                }
            }
            core.ring.reap();
            core.wake_submitted();
            core.wake_completed();
            if rounds.end() {
                // This thread's own guest has waited long enough.
                core.wake_reapers();
                core.ring.enable_notifications();
                break;
            }
            // While the eventfd's notifications were off, no reaper heard of a grace period's end.
            if !core.has_queued() && !core.ring.enable_notifications() && !core.ring.has_event() {
                break;
            }
            core.ring.disable_notifications();
        }
        core.entering = false;
        core.insider = Insider::Guest;
        self.show_pulse(&core);
        core.watch_closes();
        core.watch_cache();
        std::mem::forget(inside);
        core.run_left()
    }
}

/// Whether `io_uring_enter` will work again once completions were taken (its manual page).
fn is_passing(errno: &io::Error) -> bool {
    matches!(errno.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

/// Held by the thread that is inside for all guests. Dropped only by a panic, of which the others need not
/// know: they are woken and enter by themselves. What the thread was at is half done at worst for one
/// operation, whose memory is the operation table's until its last completion.
struct Inside<'driver> {
    driver: &'driver Driver,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        // (No fork in between: this thread has come from `lock`.)
        let mut core = self.driver.core.lock();
        core.entering = false;
        core.insider = Insider::Guest;
        core.ring.enable_notifications();
        core.wake_completed();
        core.wake_submitted();
        core.wake_reapers();
    }
}

impl Drop for Driver {
    /// The last handle is gone; the ring waits for the kernel when it is dropped next.
    fn drop(&mut self) {
        if !self.process.is_current() {
            // The tasks are the parent's, and so are their wakers.
            let core = self.core.get_mut();
            std::mem::forget((
                std::mem::take(&mut core.runtimes),
                std::mem::take(&mut core.flush_wakers),
            ));
            return;
        }
        let mut after = AfterUnlock::default();
        let core = self.core.get_mut();
        after.wake_later(core.runtimes.take_all());
        core.overdue.end();
    }
}
