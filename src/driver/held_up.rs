//! Datagrams that a computing thread holds up, and the thread that interrupts it.
//!
//! The kernel completes a receive on the thread that has armed it, when that next enters the kernel
//! (`IORING_SETUP_COOP_TASKRUN`). On a multi-thread runtime the guest that waits for the datagram may be
//! anywhere else by then, and that thread may run another guest, which computes: the datagram waits for a
//! timer tick (4 ms at 250 Hz), or on a processor without ticks (`nohz_full`) for as long as that guest
//! computes. The ring's own flag for such completions (`IORING_SQ_TASKRUN`) does not tell: any thread
//! that runs its own completions clears it.
//!
//! So where threads share rings, the reapers look whether another thread has computed since they
//! last looked: it has run, and has not entered. From then on a thread of the pool's own interrupts it, for
//! as long as it computes: often while datagrams come, and ever more seldom while none do. And a guest of another
//! thread that waits for what this one has armed has it armed anew (`Driver::arm_here`), so that one interrupt
//! is the last that it needs. Nothing of this costs anything while all threads enter or sleep, but for a few looks
//! each second.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use crate::limits::{
    COMPUTES_PERCENT_MIN, INTERRUPT_EVERY, INTERRUPT_EVERY_MAX, LOOK_EVERY, LOOK_EVERY_MAX,
    LOOKS_WITHOUT_DATAGRAMS,
};
use crate::ring::membarrier::kick;
use crate::ring::thread_clock::ThreadClock;
use crate::ring::thread_tag::ThreadTag;

// ---- threads ------------------------------------------------------------------------------------

/// A thread that has entered the kernel for a ring.
#[derive(Debug)]
struct Entrant {
    tag: ThreadTag,
    enters: AtomicU64,
    /// It has not entered since a look has found that it computes.
    computes: AtomicBool,
    clock: ThreadClock,
}

/// All that live. Only ever tried to lock, because in a fork it may be held for ever.
static ENTRANTS: Mutex<Vec<Weak<Entrant>>> = Mutex::new(Vec::new());

thread_local! {
    static ENTRANT: RefCell<Option<Arc<Entrant>>> = const { RefCell::new(None) };
}

/// This thread enters, whereby it runs what the kernel has kept for it.
pub(super) fn count_enter() {
    // An error: the thread is exiting.
    let _ = ENTRANT.try_with(|entrant| {
        let mut entrant = entrant.borrow_mut();
        if entrant.is_none() {
            *entrant = register();
        }
        if let Some(entrant) = &*entrant {
            // The only writer.
            entrant.enters.store(entrant.enters.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            if entrant.computes.load(Ordering::Relaxed) {
                entrant.computes.store(false, Ordering::Relaxed);
            }
        }
    });
}

/// Whether a look has found that this thread computes, and it has not entered since.
pub(super) fn computes(thread: ThreadTag) -> bool {
    let Ok(all) = ENTRANTS.try_lock() else { return false };
    let mut live = all.iter().filter_map(Weak::upgrade);
    live.any(|entrant| entrant.tag == thread && entrant.computes.load(Ordering::Relaxed))
}

#[cold]
fn register() -> Option<Arc<Entrant>> {
    let entrant = Arc::new(Entrant {
        tag: ThreadTag::current(),
        enters: AtomicU64::new(0),
        computes: AtomicBool::new(false),
        clock: ThreadClock::current().ok()?,
    });
    let mut all = ENTRANTS.try_lock().ok()?;
    all.retain(|other| other.strong_count() > 0);
    all.push(Arc::downgrade(&entrant));
    Some(entrant)
}

/// What a look has found of a thread.
#[derive(Debug)]
struct Seen {
    entrant: Weak<Entrant>,
    enters: u64,
    ran: Duration,
    /// Since the look before it has run for most of the time, and has not entered.
    has_computed: bool,
}

/// The last look at all threads.
#[derive(Debug, Default)]
struct Look {
    at: Option<Instant>,
    seen: Vec<Seen>,
}

impl Look {
    /// Looks once more; whether a thread has computed since the look before.
    fn again(&mut self, now: Instant) -> bool {
        let Ok(all) = ENTRANTS.try_lock() else { return false };
        let elapsed = self.at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        let before = std::mem::take(&mut self.seen);
        for weak in &*all {
            let Some(entrant) = weak.upgrade() else { continue };
            let enters = entrant.enters.load(Ordering::Relaxed);
            let Some(ran) = entrant.clock.time() else { continue };
            let has_computed = before.iter().any(|last| {
                last.entrant.ptr_eq(weak)
                    && last.enters == enters
                    && 100 * ran.saturating_sub(last.ran) > COMPUTES_PERCENT_MIN * elapsed
            });
            entrant.computes.store(has_computed, Ordering::Relaxed);
            self.seen.push(Seen { entrant: Weak::clone(weak), enters, ran, has_computed });
        }
        self.at = Some(now);
        self.seen.iter().any(|thread| thread.has_computed)
    }
}

// ---- rings --------------------------------------------------------------------------------------

/// What a ring shows without its lock; written under it.
#[derive(Debug, Default)]
pub(super) struct Pulse {
    completions: AtomicU64,
    armed: AtomicUsize,
}

impl Pulse {
    pub(super) fn beat(&self, completions: u64, armed: usize) {
        self.completions.store(completions, Ordering::Relaxed);
        self.armed.store(armed, Ordering::Relaxed);
    }
}

/// Whom the rings of a pool have in common: who looks, and interrupts.
#[derive(Debug)]
pub(crate) struct HeldUp {
    rings: Mutex<Vec<Weak<Pulse>>>,
    /// Of the reapers.
    look: Mutex<Look>,
    interrupts: AtomicU64,
    /// The thread, which starts when rings are first shared.
    thread: OnceLock<Thread>,
    has_started: AtomicBool,
    /// It looks seldom, because none computed when it last looked.
    is_calm: AtomicBool,
}

impl HeldUp {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            rings: Mutex::default(),
            look: Mutex::default(),
            interrupts: AtomicU64::new(0),
            thread: OnceLock::new(),
            has_started: AtomicBool::new(false),
            is_calm: AtomicBool::new(true),
        })
    }

    /// A ring's, for as long as that lives.
    pub(super) fn pulse(&self) -> Arc<Pulse> {
        let pulse = Arc::new(Pulse::default());
        let mut rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        rings.retain(|ring| ring.strong_count() > 0);
        rings.push(Arc::downgrade(&pulse));
        pulse
    }

    /// How often threads were interrupted.
    pub(crate) fn interrupts(&self) -> u64 {
        self.interrupts.load(Ordering::Relaxed)
    }

    /// Guests of several threads wait for these rings from now on.
    pub(super) fn start(self: &Arc<Self>) {
        // Not where a test plays the threads, which are one.
        if cfg!(all(test, shuttle)) || self.has_started.swap(true, Ordering::Relaxed) {
            return;
        }
        let held_up = Arc::downgrade(self);
        let named = thread::Builder::new().name("wasi-uring-wake".to_owned());
        match named.spawn(move || interrupt(&held_up)) {
            Ok(started) => drop(self.thread.set(started.thread().clone())),
            Err(error) => {
                tracing::warn!(%error, "datagrams wait for threads that compute, for now");
                self.has_started.store(false, Ordering::Relaxed);
            }
        }
    }

    /// A reaper has been told of something. Has the thread interrupt from now on if another computes.
    pub(super) fn look(self: &Arc<Self>) {
        if !self.is_calm.load(Ordering::Relaxed) {
            return;
        }
        let Ok(mut look) = self.look.try_lock() else { return };
        let now = Instant::now();
        let is_recent = |at: Instant| now.saturating_duration_since(at) < INTERRUPT_EVERY;
        if look.at.is_some_and(is_recent) || !look.again(now) {
            return;
        }
        match self.thread.get() {
            Some(thread) if self.is_calm.swap(false, Ordering::Relaxed) => thread.unpark(),
            Some(_) => {}
            // It could not be started before.
            None => self.start(),
        }
    }

    /// Whether no thread that computes was seen when the thread last looked.
    pub(super) fn is_calm(&self) -> bool {
        self.is_calm.load(Ordering::Relaxed)
    }

    /// Completions of all rings so far, and whether any has armed receives.
    fn pulses(&self) -> (u64, bool) {
        let rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        rings.iter().filter_map(Weak::upgrade).fold((0, false), |(completions, waits), pulse| {
            (
                completions.wrapping_add(pulse.completions.load(Ordering::Relaxed)),
                waits || pulse.armed.load(Ordering::Relaxed) > 0,
            )
        })
    }
}

impl Drop for HeldUp {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }
}

/// The thread, for as long as a ring lives.
fn interrupt(held_up: &Weak<HeldUp>) {
    let mut look = Look::default();
    let mut pace = Pace::default();
    let mut completions = 0;
    let mut time = LOOK_EVERY;
    loop {
        thread::park_timeout(time);
        let Some(held_up) = held_up.upgrade() else { return };
        let (now_completions, waits) = held_up.pulses();
        let has_datagrams = completions != now_completions;
        completions = now_completions;
        let is_computing = look.again(Instant::now());
        if is_computing && waits {
            kick();
            held_up.interrupts.fetch_add(1, Ordering::Relaxed);
        }
        time = pace.next(is_computing && waits, has_datagrams);
        held_up.is_calm.store(!(is_computing && waits), Ordering::Relaxed);
    }
}

/// How often the thread looks.
#[derive(Debug, Default)]
struct Pace {
    /// Looks without datagrams, or without a thread that computes.
    quiet: u32,
    was_computing: bool,
}

impl Pace {
    fn next(&mut self, is_computing: bool, has_datagrams: bool) -> Duration {
        if is_computing != self.was_computing || is_computing && has_datagrams {
            self.quiet = 0;
        }
        self.was_computing = is_computing;
        let (first, max) = if is_computing {
            (INTERRUPT_EVERY, INTERRUPT_EVERY_MAX)
        } else {
            (LOOK_EVERY, LOOK_EVERY_MAX)
        };
        let time = max.min(first * (1 << (self.quiet / LOOKS_WITHOUT_DATAGRAMS).min(16)));
        self.quiet = self.quiet.saturating_add(1);
        time
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::limits::LOOKS_WITHOUT_DATAGRAMS as LOOKS;

    /// Of this thread.
    fn entrant() -> Weak<Entrant> {
        count_enter();
        ENTRANT.with_borrow(|entrant| Arc::downgrade(entrant.as_ref().expect("registered")))
    }

    #[test]
    fn a_thread_that_computes_is_told_from_one_that_sleeps() {
        let is_over = AtomicBool::new(false);
        let (begun, has_begun) = mpsc::channel();
        let sleeping = entrant();
        thread::scope(|scope| {
            scope.spawn(|| {
                begun.send(entrant()).unwrap();
                while !is_over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
            let computing = has_begun.recv().unwrap();
            let mut look = Look::default();
            let has_computed = |look: &Look, wanted: &Weak<Entrant>| {
                look.seen.iter().any(|seen| seen.entrant.ptr_eq(wanted) && seen.has_computed)
            };
            look.again(Instant::now());
            // On a busy machine others may have the processor for most of a time.
            let mut has_slept = true;
            let is_found = (0..1000).any(|_| {
                thread::sleep(Duration::from_millis(2));
                look.again(Instant::now());
                has_slept &= !has_computed(&look, &sleeping);
                has_computed(&look, &computing)
            });
            is_over.store(true, Ordering::Relaxed);
            assert!(is_found && has_slept);
        });
    }

    #[test]
    fn looks_are_ever_more_seldom_without_datagrams() {
        let mut pace = Pace::default();
        let times: Vec<_> = (0..100 * LOOKS).map(|_| pace.next(true, false)).collect();
        assert_eq!(times[0], INTERRUPT_EVERY);
        assert_eq!(times[LOOKS as usize], 2 * INTERRUPT_EVERY);
        assert_eq!(times.last(), Some(&INTERRUPT_EVERY_MAX));
        assert_eq!(pace.next(true, true), INTERRUPT_EVERY);
        assert_eq!(pace.next(false, true), LOOK_EVERY);
        let times: Vec<_> = (0..100 * LOOKS).map(|_| pace.next(false, true)).collect();
        assert_eq!(times.last(), Some(&LOOK_EVERY_MAX));
        assert_eq!(pace.next(true, false), INTERRUPT_EVERY);
    }
}
