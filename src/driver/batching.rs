//! Which guests share an enter, and how long one goes on: every rule, and no lock, waker or ring.
//!
//! A guest that is about to enter yields once before, if other guests use the ring: what they queue
//! meanwhile reaches the kernel with the same `io_uring_enter`. Three guests enter directly instead: a lone one,
//! one with so many bytes to send that they would push those of others out of the cache, and one of so many that
//! it would find its own cache cold after the yield.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::clock;
use crate::limits::{
    ANSWERS_APART_PART, BATCH_BYTES_MAX, BATCH_GUESTS_MAX, COMBINE_ROUNDS_MAX, DIRECT_SUBMITS,
    QUOTA_RETRIES_MAX,
};

/// Names a guest among those of all rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Guest(u64);

impl fmt::Display for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Guest {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// The guests at work on a ring: which have queued entries since the last enter, and which before.
#[derive(Default)]
pub(super) struct Batching {
    queued: Guests,
    submitted: Guests,
    /// Yields of all guests so far.
    yields: u64,
    /// Submits left of a direct-submit streak.
    direct_submits: u32,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Guests {
    #[default]
    None,
    One(Guest),
    Several,
}

impl Guests {
    fn include_other_than(self, guest: Guest) -> bool {
        ![Self::None, Self::One(guest)].contains(&self)
    }
}

/// Whether the guest that waits for an operation has let others queue before it enters.
#[derive(Default)]
pub(super) enum Yielding {
    #[default]
    NotYielded,
    /// It yields now; with the ring's count of yields then.
    Yielded {
        yields: u64,
    },
    Over,
    /// Its call was polled first without a waker to yield with.
    Declined,
}

impl Batching {
    /// `guest` has queued entries.
    pub(super) fn queue(&mut self, guest: Guest) {
        self.queued = match self.queued {
            Guests::None => Guests::One(guest),
            Guests::One(same) if same == guest => Guests::One(guest),
            Guests::One(_) | Guests::Several => Guests::Several,
        };
    }

    /// A thread enters with all that is queued.
    pub(super) fn submit(&mut self) {
        if self.queued != Guests::None {
            self.submitted = std::mem::take(&mut self.queued);
        }
    }

    /// Whether `guest`, with so many bytes of all guests queued, should yield before it enters.
    /// Each `false` that a direct-submit streak is the reason of uses up one submit of it.
    pub(super) fn should_yield(
        &mut self,
        guest: Guest,
        yielding: &Yielding,
        queued_bytes: usize,
    ) -> bool {
        if !matches!(yielding, Yielding::NotYielded) || queued_bytes >= BATCH_BYTES_MAX {
            return false;
        }
        if self.direct_submits > 0 {
            self.direct_submits -= 1;
            return false;
        }
        self.includes_other_than(guest)
    }

    /// Whether others have queued entries since the last enter, or had before.
    pub(super) fn includes_other_than(&self, guest: Guest) -> bool {
        [self.queued, self.submitted].iter().any(|guests| guests.include_other_than(guest))
    }

    /// A guest yields.
    pub(super) fn begin_yield(&mut self) -> Yielding {
        self.yields += 1;
        Yielding::Yielded { yields: self.yields }
    }

    /// A guest goes on. If it has yielded, and to so many that nothing of its own is left in the
    /// cache, a direct-submit streak begins; else one that goes on is over.
    pub(super) fn end_yield(&mut self, yielding: &mut Yielding) {
        if let Yielding::Yielded { yields } = *yielding {
            let is_contended = self.yields - yields > BATCH_GUESTS_MAX;
            self.direct_submits = if is_contended { DIRECT_SUBMITS } else { 0 };
            *yielding = Yielding::Over;
        }
    }
}

/// Rounds that one thread enters for all guests, which keeps its own guest waiting.
#[derive(Default)]
pub(super) struct Rounds(u32);

impl Rounds {
    /// Whether the round that goes on is the last.
    pub(super) fn is_last(&self) -> bool {
        self.0 + 1 >= COMBINE_ROUNDS_MAX
    }

    /// Counts a round; `true` if the reapers are to go on from here.
    pub(super) fn end(&mut self) -> bool {
        let is_last = self.is_last();
        self.0 += 1;
        is_last
    }
}

/// How often a thread looks again at a used-up quota while another thread, inside the
/// kernel, may be closing sockets.
pub(crate) fn quota_retries() -> Range<u32> {
    0..QUOTA_RETRIES_MAX
}

/// What a guest has done since it last suspended, as far as this crate knows: for others it may have to
/// suspend, and what it sends next may wait until it does.
#[derive(Debug)]
pub(crate) struct Stretch {
    /// Datagrams it has taken. A guest that always finds some never suspends by itself, so it yields when its
    /// budget is spent.
    taken: AtomicUsize,
    /// When it last sent, in nanoseconds from `begun`; 0: it has not.
    sent_at: AtomicU64,
    /// Since then it has received all that a socket had.
    has_heard: AtomicBool,
    /// It has sent to a socket of its own.
    talks_to_itself: AtomicBool,
    begun: Instant,
}

impl Stretch {
    pub(crate) fn new() -> Self {
        Self {
            taken: AtomicUsize::new(0),
            sent_at: AtomicU64::new(0),
            has_heard: AtomicBool::new(false),
            talks_to_itself: AtomicBool::new(false),
            begun: clock::now(),
        }
    }

    /// The guest has suspended.
    pub(crate) fn end(&self) {
        self.taken.store(0, Ordering::Relaxed);
        self.sent_at.store(0, Ordering::Relaxed);
        self.talks_to_itself.store(false, Ordering::Relaxed);
    }

    /// It has yielded before it submitted what it sends, and goes on sending.
    pub(crate) fn end_at_send(&self) {
        self.taken.store(0, Ordering::Relaxed);
        self.sent_at.store(self.now(), Ordering::Relaxed);
    }

    /// In nanoseconds from `begun`, and not 0.
    fn now(&self) -> u64 {
        u64::try_from(clock::since(self.begun).as_nanos()).unwrap_or(u64::MAX).max(1)
    }

    /// It has received all that a socket has: what it sends next answers that, or hands it on.
    pub(crate) fn hear(&self) {
        self.has_heard.store(true, Ordering::Relaxed);
    }

    /// It has received nothing where it looked, and so will wait.
    pub(crate) fn hear_nothing(&self) {
        self.sent_at.store(0, Ordering::Relaxed);
    }

    pub(crate) fn take(&self, datagrams: usize) {
        self.taken.fetch_add(datagrams, Ordering::Relaxed);
    }

    pub(crate) fn is_budget_spent(&self, datagrams: usize) -> bool {
        self.taken.load(Ordering::Relaxed) >= datagrams
    }

    /// The guest sends: whether it goes on sending. That long after its last send it has most likely suspended
    /// elsewhere (by a clock, or a TCP stream), of which this crate does not hear. What it has heard meanwhile it
    /// answers soon, or it computes, and its answers are not to wait for that. And if two of its sockets ask each
    /// other, it will look for this one next.
    pub(crate) fn send(&self, pause_max: Duration, is_to_itself: impl FnOnce() -> bool) -> bool {
        let now = self.now();
        let sent_at = self.sent_at.swap(now, Ordering::Relaxed);
        let pause = u128::from(now.saturating_sub(sent_at));
        let has_heard = self.has_heard.load(Ordering::Relaxed);
        if sent_at != 0 && !has_heard {
            return pause < pause_max.as_nanos();
        }
        self.has_heard.store(false, Ordering::Relaxed);
        let mut talks_to_itself = self.talks_to_itself.load(Ordering::Relaxed);
        if !talks_to_itself && is_to_itself() {
            talks_to_itself = true;
            self.talks_to_itself.store(true, Ordering::Relaxed);
        }
        sent_at != 0 && !talks_to_itself && pause < (pause_max / ANSWERS_APART_PART).as_nanos()
    }
}

/// The numbers stand here as they were tuned, and not by name: a test fails if one is changed.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{BUDGET_BATCHED, BUDGET_DATAGRAMS, DEFERRED_TIME_DEFAULT};

    const A: Guest = Guest(u64::MAX - 1);
    const B: Guest = Guest(u64::MAX);

    fn yields_first(batching: &mut Batching, guest: Guest) -> bool {
        batching.should_yield(guest, &Yielding::NotYielded, 0)
    }

    /// Two guests that share enters.
    fn shared() -> Batching {
        let mut batching = Batching::default();
        batching.queue(A);
        batching.queue(B);
        batching
    }

    /// Two guests, of which one yielded and went on when `others` more had yielded.
    fn after_a_yield_to(others: u64) -> Batching {
        let mut batching = shared();
        let mut yielding = batching.begin_yield();
        for _ in 0..others {
            batching.begin_yield();
        }
        batching.end_yield(&mut yielding);
        batching
    }

    #[test]
    fn a_lone_guest_enters_at_once() {
        let mut batching = Batching::default();
        assert!(!yields_first(&mut batching, A), "nothing is queued");
        for _ in 0..3 {
            batching.queue(A);
            assert!(!yields_first(&mut batching, A));
            batching.submit();
            assert!(!yields_first(&mut batching, A));
        }
    }

    #[test]
    fn a_guest_yields_while_another_has_queued_or_did_before_the_last_enter() {
        let mut batching = Batching::default();
        batching.queue(A);
        assert!(yields_first(&mut batching, B));
        batching.queue(B);
        assert!(yields_first(&mut batching, A));
        batching.submit();
        assert!(yields_first(&mut batching, A) && yields_first(&mut batching, B));
        batching.submit();
        assert!(yields_first(&mut batching, A), "an enter without entries says nothing of guests");
        batching.queue(A);
        assert!(yields_first(&mut batching, A));
        batching.submit();
        assert!(!yields_first(&mut batching, A), "only its own are of the last enter");
    }

    #[test]
    fn a_guest_yields_once_for_an_operation() {
        let mut batching = shared();
        let mut yielding = batching.begin_yield();
        batching.end_yield(&mut yielding);
        assert!(!batching.should_yield(A, &yielding, 0));
        batching.end_yield(&mut yielding);
        assert!(matches!(yielding, Yielding::Over));
    }

    #[test]
    fn sixteen_kibibytes_do_not_wait_for_others() {
        let mut batching = shared();
        assert!(batching.should_yield(A, &Yielding::NotYielded, 16 * 1024 - 1));
        assert!(!batching.should_yield(A, &Yielding::NotYielded, 16 * 1024));
    }

    #[test]
    fn a_yield_to_128_guests_is_worth_it_and_one_to_129_is_not() {
        assert!(yields_first(&mut after_a_yield_to(128), A));
        assert!(!yields_first(&mut after_a_yield_to(129), A));
    }

    #[test]
    fn after_a_yield_to_too_many_thirty_two_submits_are_direct() {
        let mut batching = after_a_yield_to(129);
        for submit in 1..=32 {
            assert!(!yields_first(&mut batching, A), "{submit}");
        }
        assert!(yields_first(&mut batching, A));
    }

    #[test]
    fn many_bytes_use_up_no_direct_submit() {
        let mut batching = after_a_yield_to(129);
        assert!(!batching.should_yield(A, &Yielding::NotYielded, 1 << 20));
        assert_eq!(batching.direct_submits, 32);
    }

    #[test]
    fn a_yield_to_few_ends_the_streak_and_no_yield_leaves_it() {
        let mut batching = shared();
        let mut early = batching.begin_yield();
        for _ in 0..129 {
            batching.begin_yield();
        }
        let mut late = batching.begin_yield();
        batching.end_yield(&mut early);
        batching.end_yield(&mut Yielding::NotYielded);
        batching.end_yield(&mut Yielding::Over);
        assert_eq!(batching.direct_submits, 32);
        batching.end_yield(&mut late);
        assert_eq!(batching.direct_submits, 0);
    }

    #[test]
    fn the_sixteenth_round_is_the_last() {
        let mut rounds = Rounds::default();
        for round in 1..=15 {
            assert!(!rounds.end(), "{round}");
        }
        assert!(rounds.end());
    }

    #[test]
    fn a_full_quota_is_looked_at_a_thousand_times() {
        assert_eq!(quota_retries().count(), 1000);
    }

    #[test]
    fn a_budget_is_sixty_four_datagrams_or_thirty_two_in_batches() {
        for (max, datagrams) in [(BUDGET_DATAGRAMS, 64), (BUDGET_BATCHED, 32)] {
            let stretch = Stretch::new();
            stretch.take(datagrams - 1);
            assert!(!stretch.is_budget_spent(max));
            stretch.take(1);
            assert!(stretch.is_budget_spent(max));
            stretch.end();
            assert!(!stretch.is_budget_spent(max));
        }
    }

    #[test]
    fn a_guest_sends_on_until_it_suspends_or_a_millisecond_is_over() {
        clock::played::start();
        let stretch = Stretch::new();
        let send = || stretch.send(DEFERRED_TIME_DEFAULT, || false);
        assert!(!send(), "the first");
        assert!(send() && send());
        stretch.end();
        assert!(!send(), "the first since it has suspended");
        assert!(send());
        stretch.hear_nothing();
        assert!(!send(), "the first since there was nothing to hear");
        assert!(send());
        clock::played::pass(DEFERRED_TIME_DEFAULT);
        assert!(!send(), "it has most likely suspended elsewhere");
        assert!(send());
        let never = || stretch.send(Duration::ZERO, || false);
        assert!(!never() && !never(), "its host has it defer nothing");
        clock::played::end();
    }

    #[test]
    fn a_guest_that_answers_sends_on_unless_it_computes_or_hears_itself() {
        clock::played::start();
        let stretch = Stretch::new();
        let answer = |computes: Duration, is_to_itself: bool| {
            stretch.hear();
            clock::played::pass(computes);
            stretch.send(DEFERRED_TIME_DEFAULT, || is_to_itself)
        };
        let apart_max = DEFERRED_TIME_DEFAULT / ANSWERS_APART_PART;
        let soon = Duration::ZERO;
        assert!(!answer(soon, false), "the first");
        assert!(answer(soon, false) && answer(soon, false));
        assert!(!answer(apart_max, false), "it computes");
        assert!(answer(soon, false));
        assert!(!answer(soon, true), "two of its sockets ask each other");
        assert!(!answer(soon, false), "of one of them it may not know the port");
        assert!(stretch.send(DEFERRED_TIME_DEFAULT, || true), "it has heard nothing in between");
        stretch.end();
        assert!(!answer(soon, false), "the first since it has suspended");
        assert!(answer(soon, false));
        clock::played::end();
    }

    #[test]
    fn no_two_guests_have_one_name() {
        assert_ne!(Guest::new(), Guest::new());
    }
}
