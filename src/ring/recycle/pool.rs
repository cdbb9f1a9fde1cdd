//! Cached sockets by stage: plain data, without the kernel and without a clock, so that a test can
//! play both.

use std::collections::VecDeque;
use std::time::Duration;

use super::taint::{Reason, Taint};
use crate::datagram::Family;
use crate::limits::{CACHED_SOCKETS_DEFAULT, DRAINS_MAX, KEPT_IDLE_MAX, TICK_BATCH};
use crate::ring::queues::SlotIndex;
use crate::stats::ClosedInstead;

/// How many closed sockets a ring caches for new owners, and for how long:
/// [`UringBuilder::recycle`](crate::UringBuilder::recycle).
///
/// A cached socket takes about 3 KB of kernel memory: the default limits are about 50 MB at most, which
/// takes 8192 sockets open at once or 400,000 closed per second. What its guest has not read takes more until
/// the quarantine is over, as it has before the close; then it is dropped, and of more than 4 KiB the socket
/// with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Recycle {
    /// Sockets that may be in quarantine at a time; what guests close beyond them is closed for
    /// good. 0 turns recycling off.
    ///
    /// A quarantine takes 8 to 20 ms, so 8192 are enough for 400,000 closes per second. They have
    /// slots of their own in the fixed-file table; where `RLIMIT_NOFILE` leaves no room for so
    /// many beside the guests' sockets, there are fewer.
    pub quarantined_max: u32,
    /// Sockets that may wait for a new owner behind their quarantine.
    pub ready_max: u32,
    /// At this interval those are closed that no bind has needed in the course of it, save for half of them,
    /// 64 at most. At least a millisecond.
    pub idle: Duration,
}

impl Recycle {
    /// Every socket is closed for good.
    pub const OFF: Self =
        Self { quarantined_max: 0, ready_max: 0, idle: Duration::from_millis(250) };
}

impl Default for Recycle {
    fn default() -> Self {
        Self {
            quarantined_max: CACHED_SOCKETS_DEFAULT,
            ready_max: CACHED_SOCKETS_DEFAULT,
            ..Self::OFF
        }
    }
}

/// Where a closed socket is on its way to a new owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cached {
    /// Its last owner's operations and the disconnect are in the kernel.
    Unbinding,
    /// Unbound: no packet that arrives from now on finds it. The next grace period is its.
    AwaitingGrace,
    /// A grace period goes on, for packets that found it before.
    InGrace,
    /// Behind its grace period; what the former owner has left may be queued in it.
    Undrained,
    Draining {
        drains: u32,
    },
    /// As good as new.
    Ready,
    /// To be closed with the next tick.
    Evicting,
    /// Its CLOSE is in the kernel.
    Closing,
}

impl Cached {
    /// Whether it is in a pool, behind its quarantine.
    fn is_pooled(self) -> bool {
        matches!(self, Self::Undrained | Self::Draining { .. } | Self::Ready)
    }
}

/// What becomes of a socket after a drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Drained {
    Again,
    Ready,
    Close,
}

struct Entry {
    stage: Cached,
    taint: Taint,
}

/// Sockets that are alike, behind their grace period.
#[derive(Debug)]
struct Pool {
    /// The oldest first.
    undrained: VecDeque<SlotIndex>,
    draining: usize,
    /// The one drained last is the last.
    ready: VecDeque<SlotIndex>,
    /// The fewest that were in the pool since the last `idle`.
    unneeded: usize,
    /// Of them, so many are to be closed.
    surplus: usize,
    why_surplus: Reason,
}

impl Pool {
    fn new() -> Self {
        Self {
            undrained: VecDeque::new(),
            draining: 0,
            ready: VecDeque::new(),
            unneeded: 0,
            surplus: 0,
            why_surplus: Reason::Idle,
        }
    }

    fn len(&self) -> usize {
        self.undrained.len() + self.draining + self.ready.len()
    }

    fn has_surplus(&self) -> bool {
        self.surplus > 0 && self.len() > self.draining
    }

    fn pop_oldest(&mut self) -> Option<SlotIndex> {
        let oldest = self.undrained.pop_front().or_else(|| self.ready.pop_front());
        self.has_shrunk();
        oldest
    }

    fn has_shrunk(&mut self) {
        self.unneeded = self.unneeded.min(self.len());
        self.surplus = self.surplus.min(self.len());
    }
}

/// The cached sockets of one ring.
pub(super) struct Pools {
    limits: Recycle,
    /// By slot; `None` for one that is not cached.
    entries: Vec<Option<Entry>>,
    awaiting_grace: Vec<SlotIndex>,
    in_grace: Vec<SlotIndex>,
    evicting: Vec<(SlotIndex, Reason)>,
    /// By family, and by whether they are addressed.
    kinds: [[Pool; 2]; 2],
    /// Entries in no pool: they have slots of their own beside the guests', `quarantined_max` in
    /// all, draining ones included.
    quarantined: u32,
    closed_instead: ClosedInstead,
}

impl Pools {
    pub(super) fn new(limits: Recycle) -> Self {
        Self {
            limits,
            entries: Vec::new(),
            awaiting_grace: Vec::new(),
            in_grace: Vec::new(),
            evicting: Vec::new(),
            kinds: std::array::from_fn(|_| std::array::from_fn(|_| Pool::new())),
            quarantined: 0,
            closed_instead: ClosedInstead::default(),
        }
    }

    pub(super) fn limits(&self) -> Recycle {
        self.limits
    }

    pub(super) fn stage(&self, slot: SlotIndex) -> Option<Cached> {
        Some(self.entries.get(slot.at())?.as_ref()?.stage)
    }

    /// The one place where a socket changes its stage, and where they are counted.
    fn set_stage(&mut self, slot: SlotIndex, stage: Option<Cached>, taint: Taint) {
        if self.entries.len() <= slot.at() {
            self.entries.resize_with(slot.at() + 1, || None);
        }
        let entry = stage.map(|stage| Entry { stage, taint });
        let before = std::mem::replace(&mut self.entries[slot.at()], entry);
        let is_quarantined = |stage: Cached| u32::from(!stage.is_pooled());
        self.quarantined += stage.map_or(0, is_quarantined);
        self.quarantined -= before.map_or(0, |entry| is_quarantined(entry.stage));
    }

    fn move_to(&mut self, slot: SlotIndex, stage: Option<Cached>) {
        if let Some(taint) = self.taint(slot) {
            self.set_stage(slot, stage, taint);
        }
    }

    pub(super) fn taint(&self, slot: SlotIndex) -> Option<Taint> {
        Some(self.entries.get(slot.at())?.as_ref()?.taint)
    }

    // ---- into the cache ---------------------------------------------------------------------

    /// Takes a socket from its owner, to be unbound; `false` if the cache is full.
    pub(super) fn admit(&mut self, slot: SlotIndex, taint: Taint) -> bool {
        // Surplus sockets need capacity, too, while they are closed, and those of the next batch while they are
        // drained.
        if self.spare() <= self.surplus() + self.undrained().min(TICK_BATCH) {
            self.count(Reason::NoRoom);
            return false;
        }
        self.set_stage(slot, Some(Cached::Unbinding), taint);
        true
    }

    /// A socket is unbound, and has been through so much.
    pub(super) fn unbound(&mut self, slot: SlotIndex, taint: Taint) {
        self.set_stage(slot, Some(Cached::AwaitingGrace), taint);
        self.awaiting_grace.push(slot);
    }

    /// The cache has no more to do with a socket: its slot is the ring's again.
    pub(super) fn forget(&mut self, slot: SlotIndex) {
        self.move_to(slot, None);
    }

    /// Whether a grace period should begin, for the sockets that await one.
    pub(super) fn begin_grace(&mut self) -> bool {
        if self.awaiting_grace.is_empty() || !self.in_grace.is_empty() {
            return false;
        }
        std::mem::swap(&mut self.awaiting_grace, &mut self.in_grace);
        for at in 0..self.in_grace.len() {
            self.move_to(self.in_grace[at], Some(Cached::InGrace));
        }
        true
    }

    /// It is over: its sockets go to their pools. One too many makes the oldest there surplus.
    pub(super) fn end_grace(&mut self) {
        let mut over = std::mem::take(&mut self.in_grace);
        for slot in over.drain(..) {
            let Some(taint) = self.taint(slot) else { continue };
            let is_over = self.pooled() - self.surplus() >= self.limits.ready_max as usize;
            self.set_stage(slot, Some(Cached::Undrained), taint);
            let pool = self.pool(taint);
            pool.undrained.push_back(slot);
            if is_over {
                pool.surplus += 1;
                pool.why_surplus = Reason::NoRoom;
            }
        }
        // Its memory is reused.
        self.in_grace = over;
    }

    // ---- drains -----------------------------------------------------------------------------

    /// A socket that is to be drained now: the oldest of the kind with the most of them. None waits for long,
    /// whether or not a bind needs it, because what was left in it takes memory.
    pub(super) fn next_to_drain(&mut self) -> Option<(SlotIndex, Taint)> {
        if self.spare() == 0 {
            return None;
        }
        let pool = self.kinds.iter_mut().flatten().max_by_key(|pool| pool.undrained.len())?;
        let slot = pool.undrained.pop_front()?;
        pool.draining += 1;
        self.move_to(slot, Some(Cached::Draining { drains: 0 }));
        self.taint(slot).map(|taint| (slot, taint))
    }

    /// A drain has ended: nothing was left in the socket, or else there may be more.
    pub(super) fn drained(&mut self, slot: SlotIndex, taint: Taint, is_empty: bool) -> Drained {
        let Some(Cached::Draining { drains }) = self.stage(slot) else {
            unreachable!("a cached socket's drain ends while it is draining");
        };
        let drains = drains + 1;
        if !is_empty && drains < DRAINS_MAX && taint.reason.is_none() {
            self.set_stage(slot, Some(Cached::Draining { drains }), taint);
            return Drained::Again;
        }
        let is_ready = is_empty && !taint.may_be_sending && taint.reason.is_none();
        let stage = if is_ready { Cached::Ready } else { Cached::Closing };
        self.set_stage(slot, Some(stage), taint);
        let pool = self.pool(taint);
        pool.draining -= 1;
        if is_ready {
            pool.ready.push_back(slot);
            return Drained::Ready;
        }
        pool.has_shrunk();
        self.count(taint.reason.unwrap_or(Reason::Unclean));
        Drained::Close
    }

    // ---- out of the cache -------------------------------------------------------------------

    /// A ready socket for a bind that sets the source address, or does not: the one that was drained
    /// last.
    pub(super) fn take_ready(&mut self, family: Family, sets_source: bool) -> Option<SlotIndex> {
        let like = |is_addressed| Taint { is_addressed, ..Taint::new(family) };
        // Sockets bound to all addresses so far are as good for one; not the other way round.
        let kinds = if sets_source { &[true, false][..] } else { &[false] };
        for kind in kinds {
            let pool = self.pool(like(*kind));
            if let Some(slot) = pool.ready.pop_back() {
                pool.has_shrunk();
                self.move_to(slot, None);
                return Some(slot);
            }
        }
        None
    }

    /// The slot of a cached socket that must go because a bind finds no free slot.
    pub(super) fn evict(&mut self) -> Option<SlotIndex> {
        let slot = self.kinds.iter_mut().flatten().find_map(Pool::pop_oldest)?;
        self.move_to(slot, None);
        self.count(Reason::NoRoom);
        Some(slot)
    }

    /// Called at the interval of `idle`: finds what no bind has needed since. All of that is
    /// surplus, save for a few ready ones.
    pub(super) fn idle(&mut self) {
        for pool in self.kinds.iter_mut().flatten() {
            let kept = (pool.ready.len() / 2).min(KEPT_IDLE_MAX);
            let surplus = pool.unneeded.saturating_sub(kept);
            if surplus > pool.surplus {
                (pool.surplus, pool.why_surplus) = (surplus, Reason::Idle);
            }
            pool.unneeded = pool.len();
        }
    }

    /// A socket that is to be closed now.
    pub(super) fn next_to_close(&mut self) -> Option<SlotIndex> {
        if let Some((slot, reason)) = self.evicting.pop() {
            self.move_to(slot, Some(Cached::Closing));
            self.count(reason);
            return Some(slot);
        }
        if self.spare() == 0 {
            return None;
        }
        let pool = self.kinds.iter_mut().flatten().find(|pool| pool.has_surplus())?;
        pool.surplus -= 1;
        let slot = pool.pop_oldest()?;
        let why = pool.why_surplus;
        self.move_to(slot, Some(Cached::Closing));
        self.count(why);
        Some(slot)
    }

    /// Evicts a socket that is unbound after all.
    pub(super) fn evict_unbound(&mut self, slot: SlotIndex, taint: Taint, reason: Reason) {
        self.set_stage(slot, Some(Cached::Evicting), taint);
        self.evicting.push((slot, reason));
    }

    /// Evicts every cached socket, save for those that are being unbound, drained and closed.
    pub(super) fn evict_all(&mut self, reason: Reason) {
        let mut waiting = std::mem::take(&mut self.awaiting_grace);
        waiting.append(&mut self.in_grace);
        for slot in waiting {
            self.move_to(slot, Some(Cached::Evicting));
            self.evicting.push((slot, reason));
        }
        for pool in self.kinds.iter_mut().flatten() {
            (pool.surplus, pool.why_surplus, pool.unneeded) = (pool.len(), reason, 0);
        }
    }

    // ---- figures ----------------------------------------------------------------------------

    pub(super) fn count(&mut self, reason: Reason) {
        self.closed_instead.count(reason);
    }

    pub(super) fn closed_instead(&self) -> ClosedInstead {
        self.closed_instead
    }

    /// Whether there is something to drain or to close.
    pub(super) fn has_work(&self) -> bool {
        let mut pools = self.kinds.iter().flatten();
        let has_pooled = pools.any(|pool| !pool.undrained.is_empty() || pool.has_surplus());
        !self.evicting.is_empty() || (has_pooled && self.spare() > 0)
    }

    fn undrained(&self) -> usize {
        self.kinds.iter().flatten().map(|pool| pool.undrained.len()).sum()
    }

    /// Whether some have yet to be drained.
    pub(super) fn is_quarantining(&self) -> bool {
        let waits = [&self.awaiting_grace, &self.in_grace].iter().any(|slots| !slots.is_empty());
        waits || self.undrained() > 0
    }

    /// Sockets in the cache.
    pub(super) fn len(&self) -> usize {
        self.quarantined as usize + self.pooled()
    }

    #[cfg(test)]
    pub(super) fn has_ready(&self) -> bool {
        self.kinds.iter().flatten().any(|pool| !pool.ready.is_empty())
    }

    fn pool(&mut self, taint: Taint) -> &mut Pool {
        let family = match taint.family {
            Family::V4 => 0,
            Family::V6 => 1,
        };
        &mut self.kinds[family][usize::from(taint.is_addressed)]
    }

    fn pooled(&self) -> usize {
        self.kinds.iter().flatten().map(Pool::len).sum()
    }

    fn surplus(&self) -> usize {
        self.kinds.iter().flatten().map(|pool| pool.surplus).sum()
    }

    /// How many more may be in quarantine, drained or closed at a time.
    fn spare(&self) -> usize {
        let draining: usize = self.kinds.iter().flatten().map(|pool| pool.draining).sum();
        (self.limits.quarantined_max as usize).saturating_sub(self.quarantined as usize + draining)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pools(quarantined_max: u32, ready_max: u32) -> Pools {
        Pools::new(Recycle { quarantined_max, ready_max, ..Recycle::OFF })
    }

    fn count(cached: &[(SlotIndex, Taint, Cached)], is: impl Fn(Cached) -> bool) -> usize {
        cached.iter().filter(|(.., stage)| is(*stage)).count()
    }

    fn find(cached: &[(SlotIndex, Taint, Cached)], slot: SlotIndex) -> usize {
        cached.iter().position(|(at, ..)| *at == slot).expect("it is cached")
    }

    proptest! {
        #![proptest_config(crate::regressions("tests/proptest-regressions/pool.txt"))]

        /// Kills: a step left out or taken twice, a socket given to two owners or to one of
        /// another kind, a limit not kept, a counter that drifts.
        #[test]
        fn a_socket_is_ready_only_after_unbinding_a_whole_grace_period_and_an_empty_drain(
            steps in proptest::collection::vec((0_u8..13, any::<prop::sample::Index>(), 0_u8..4), 1..400)
        ) {
            let (quarantined_max, ready_max) = (6, 4);
            let mut pools = pools(quarantined_max, ready_max);
            // What the test believes.
            let mut cached: Vec<(SlotIndex, Taint, Cached)> = Vec::new();
            let mut next = 0;
            for (step, which, kind) in steps {
                let mut taint = Taint::new(if kind & 1 == 0 { Family::V4 } else { Family::V6 });
                taint.bind(kind & 2 != 0);
                match step {
                    0..=2 => if pools.admit(SlotIndex(next), taint) {
                        cached.push((SlotIndex(next), taint, Cached::Unbinding));
                        next += 1;
                    },
                    3 => {
                        for (slot, taint, stage) in &mut cached {
                            if *stage == Cached::Unbinding {
                                pools.unbound(*slot, *taint);
                                *stage = Cached::AwaitingGrace;
                            }
                        }
                    }
                    4 => {
                        let awaits = count(&cached, |stage| stage == Cached::AwaitingGrace) > 0;
                        let goes_on = count(&cached, |stage| stage == Cached::InGrace) > 0;
                        prop_assert_eq!(pools.begin_grace(), awaits && !goes_on);
                        for (.., stage) in &mut cached {
                            if !goes_on && *stage == Cached::AwaitingGrace {
                                *stage = Cached::InGrace;
                            }
                        }
                    }
                    5 => {
                        pools.end_grace();
                        for (.., stage) in &mut cached {
                            if *stage == Cached::InGrace {
                                *stage = Cached::Undrained;
                            }
                        }
                    }
                    6 => if let Some((slot, _)) = pools.next_to_drain() {
                        let at = find(&cached, slot);
                        prop_assert_eq!(cached[at].2, Cached::Undrained);
                        cached[at].2 = Cached::Draining { drains: 0 };
                    },
                    7 => {
                        let draining: Vec<_> = cached
                            .iter()
                            .filter(|(.., stage)| matches!(stage, Cached::Draining { .. }))
                            .map(|(slot, ..)| *slot)
                            .collect();
                        if draining.is_empty() {
                            continue;
                        }
                        let at = find(&cached, draining[which.index(draining.len())]);
                        let (slot, mut taint, Cached::Draining { drains }) = cached[at] else {
                            continue;
                        };
                        let is_tainted = kind == 3;
                        if is_tainted {
                            taint.mark(Reason::Unread);
                        }
                        // Now and then one that is never empty.
                        let times = if kind == 0 { DRAINS_MAX - drains } else { 1 };
                        for time in 1..=times {
                            cached[at].2 = match pools.drained(slot, taint, kind != 0) {
                                Drained::Again => Cached::Draining { drains: drains + time },
                                Drained::Ready => {
                                    prop_assert!(kind != 0 && !is_tainted);
                                    Cached::Ready
                                }
                                Drained::Close => {
                                    prop_assert_eq!(time, times);
                                    Cached::Closing
                                }
                            };
                        }
                    }
                    8 => if let Some(slot) = pools.take_ready(taint.family, taint.is_addressed) {
                        let (_, was, stage) = cached.swap_remove(find(&cached, slot));
                        prop_assert_eq!((stage, was.family), (Cached::Ready, taint.family));
                        prop_assert!(taint.is_addressed || !was.is_addressed);
                    },
                    9 => match kind {
                        0 => {
                            pools.evict_all(Reason::Idle);
                            for (.., stage) in &mut cached {
                                if matches!(stage, Cached::AwaitingGrace | Cached::InGrace) {
                                    *stage = Cached::Evicting;
                                }
                            }
                        }
                        1 => if let Some(slot) = pools.evict() {
                            let (.., stage) = cached.swap_remove(find(&cached, slot));
                            prop_assert!(matches!(stage, Cached::Undrained | Cached::Ready));
                        },
                        _ => pools.idle(),
                    },
                    10 => while let Some(slot) = pools.next_to_close() {
                        let at = find(&cached, slot);
                        prop_assert!(matches!(
                            cached[at].2,
                            Cached::Evicting | Cached::Undrained | Cached::Ready
                        ));
                        cached[at].2 = Cached::Closing;
                    },
                    _ => {
                        let closing = cached.iter().position(|(.., at)| *at == Cached::Closing);
                        if let Some(at) = closing {
                            let (slot, ..) = cached.swap_remove(at);
                            pools.forget(slot);
                        }
                    }
                }
                for (slot, _, stage) in &cached {
                    prop_assert_eq!(pools.stage(*slot), Some(*stage));
                }
                prop_assert_eq!(pools.len(), cached.len());
                let busy = count(&cached, |stage| {
                    !matches!(stage, Cached::Undrained | Cached::Ready)
                });
                prop_assert!(busy <= quarantined_max as usize, "{} have slots of their own", busy);
                prop_assert!(cached.len() <= (quarantined_max + ready_max) as usize);
            }
            pools.evict_all(Reason::Idle);
            while let Some(slot) = pools.next_to_close() {
                cached.swap_remove(find(&cached, slot));
                pools.forget(slot);
            }
            let stays = |stage| {
                matches!(stage, Cached::Unbinding | Cached::Draining { .. } | Cached::Closing)
            };
            let busy = count(&cached, stays);
            prop_assert!(busy == cached.len() || busy >= quarantined_max as usize);
        }
    }

    #[test]
    fn a_socket_that_may_still_be_sending_does_not_get_ready() {
        let mut pools = pools(1, 1);
        let mut taint = Taint::new(Family::V4);
        taint.send();
        assert!(pools.admit(SlotIndex(0), taint));
        pools.unbound(SlotIndex(0), taint);
        assert!(pools.begin_grace());
        pools.end_grace();
        assert_eq!(pools.next_to_drain().map(|(slot, _)| slot), Some(SlotIndex(0)));
        assert_eq!(pools.drained(SlotIndex(0), taint, true), Drained::Close);
        assert_eq!(pools.closed_instead().unclean, 1);
    }

    #[test]
    fn what_no_bind_needs_is_closed_bit_by_bit_and_in_the_end_all_of_it() {
        let mut pools = pools(100, 100);
        let taint = Taint::new(Family::V4);
        for slot in 0..100 {
            assert!(pools.admit(SlotIndex(slot), taint));
            pools.unbound(SlotIndex(slot), taint);
        }
        assert!(pools.begin_grace());
        pools.end_grace();
        while let Some((slot, _)) = pools.next_to_drain() {
            assert_eq!(pools.drained(slot, taint, true), Drained::Ready);
        }
        let mut left = Vec::new();
        for _ in 0..12 {
            pools.idle();
            while let Some(slot) = pools.next_to_close() {
                pools.forget(slot);
            }
            left.push(pools.len());
        }
        assert_eq!(left[..4], [100, 50, 25, 12], "the first interval saw them come");
        assert_eq!(left.last(), Some(&0));
    }
}
