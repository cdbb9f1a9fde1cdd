//! Recycled sockets: which closed ones are kept for another owner, and what each has been through.
//!
//! A kernel socket costs more to make and to free than everything else in a short life. One whose
//! history leaves no trace is therefore not closed but unbound (CONNECT with `AF_UNSPEC`), and
//! becomes another guest's when that guest cannot tell it from a new one:
//!
//! 1. *unbound*: no packet that arrives from now on finds it;
//! 2. *quarantined* until an RCU grace period is over, for the kernel looks sockets up and delivers
//!    to them within one read-side section: no packet that found it before is still on its way;
//! 3. *drained*: what had been queued is received and dropped, datagrams and errors, until nothing
//!    is left;
//! 4. *warm*: the next bind to port 0 takes it.
//!
//! Whatever does not behave on the way is closed. This file is the books of that way; the ring
//! pushes the operations, `grace` waits, and `trial` tries on the running kernel whether it works.

use std::collections::VecDeque;
use std::time::Duration;

use super::slots::SlotIndex;
use crate::datagram::Family;
use crate::limits::{DRAINS_MAX, KEPT_SOCKETS_DEFAULT, WARM_MIN};
use crate::stats::ClosedInstead;

/// How many closed sockets a ring keeps for new owners, and for how long:
/// [`UringBuilder::recycle`](crate::UringBuilder::recycle).
///
/// A kept socket takes about 3 KB of kernel memory, and up to 4 KB more for datagrams that its guest
/// has not read; with more of those it is closed. So the default limits are about 50 MB at most,
/// which takes 8192 sockets open at once or 400,000 closed per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recycle {
    /// Sockets that may be in quarantine at a time; what is closed beyond them is closed for good.
    /// 0 turns recycling off.
    ///
    /// A quarantine takes 8 to 20 ms, so 8192 are enough for 400,000 closes per second. They have
    /// places in the fixed-file table of their own; where `RLIMIT_NOFILE` leaves no room for so
    /// many beside the sockets, there are fewer.
    pub quarantined_max: u32,
    /// Sockets that may wait for a new owner behind their quarantine.
    pub warm_max: u32,
    /// At this interval those are closed that were not needed in the course of it; of the few that
    /// are ready to be given away at once, half. At least a millisecond.
    pub idle: Duration,
}

impl Recycle {
    /// Every socket is closed for good.
    pub const OFF: Self =
        Self { quarantined_max: 0, warm_max: 0, idle: Duration::from_millis(250) };
}

impl Default for Recycle {
    fn default() -> Self {
        Self { quarantined_max: KEPT_SOCKETS_DEFAULT, warm_max: KEPT_SOCKETS_DEFAULT, ..Self::OFF }
    }
}

/// What a kernel socket has been through, as far as its next owner could notice.
#[derive(Clone, Copy, Debug)]
pub(crate) struct History {
    family: Family,
    /// Bound to an address and not to all of them. The kernel remembers that for good
    /// (`SOCK_BINDADDR_LOCK`): bound to all addresses, such a socket would not forget the address
    /// that a connect has chosen for it.
    is_addressed: bool,
    has_connected: bool,
    /// Something may still be on its way out: what a device holds back is charged to the socket,
    /// and leaves its next owner less room.
    may_be_sending: bool,
    unfit: Option<Unfit>,
}

/// Why a socket is closed for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unfit {
    /// Bound to a port by its number, which a disconnect does not give up.
    NamedPort,
    /// A guest or this crate has set an option.
    Options,
    /// Connected, of a family that remembers its peers.
    Connected,
    /// An operation has failed.
    Error,
    /// An operation was still going on when its owner dropped it.
    Busy,
    /// No place is left among the kept.
    NoRoom,
    /// More waited to be received than is worth keeping.
    Unread,
    /// It could not be unbound, or not be drained.
    Unclean,
    /// Nobody has wanted it for a while.
    Idle,
}

impl ClosedInstead {
    fn count(&mut self, unfit: Unfit) {
        *match unfit {
            Unfit::NamedPort => &mut self.named_port,
            Unfit::Options => &mut self.options,
            Unfit::Connected => &mut self.connected,
            Unfit::Error => &mut self.error,
            Unfit::Busy => &mut self.busy,
            Unfit::NoRoom => &mut self.no_room,
            Unfit::Unread => &mut self.unread,
            Unfit::Unclean => &mut self.unclean,
            Unfit::Idle => &mut self.idle,
        } += 1;
    }
}

impl History {
    pub(crate) fn new(family: Family) -> Self {
        Self {
            family,
            is_addressed: false,
            has_connected: false,
            may_be_sending: false,
            unfit: None,
        }
    }

    /// For the next owner: what the kernel remembers stays.
    pub(crate) fn renewed(self) -> Self {
        Self { is_addressed: self.is_addressed, ..Self::new(self.family) }
    }

    pub(crate) fn bind(&mut self, is_addressed: bool) {
        self.is_addressed |= is_addressed;
    }

    pub(crate) fn connect(&mut self) {
        self.has_connected = true;
    }

    pub(crate) fn send(&mut self) {
        self.may_be_sending = true;
    }

    pub(crate) fn has_sent_all(&mut self) {
        self.may_be_sending = false;
    }

    pub(crate) fn may_be_sending(self) -> bool {
        self.may_be_sending
    }

    pub(crate) fn spoil(&mut self, unfit: Unfit) {
        self.unfit.get_or_insert(unfit);
    }
}

/// What recycling may rely on in the sockets of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fitness {
    /// A disconnect restores every socket, or only those that were never connected.
    Sound { also_connected: bool },
    /// Why not.
    Unsound(String),
    /// This kernel has no such family.
    Absent,
}

/// What was found out about each family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Soundness {
    pub(crate) v4: Fitness,
    pub(crate) v6: Fitness,
}

impl Soundness {
    pub(crate) fn of(&self, family: Family) -> &Fitness {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    /// Whether anything is recycled.
    pub(crate) fn is_of_use(&self) -> bool {
        [&self.v4, &self.v6].iter().any(|fitness| matches!(fitness, Fitness::Sound { .. }))
    }

    /// Says what is not recycled, and why.
    pub(crate) fn log(&self) {
        for (family, fitness) in [("IPv4", &self.v4), ("IPv6", &self.v6)] {
            match fitness {
                Fitness::Sound { also_connected } => {
                    tracing::debug!(family, also_connected, "closed sockets are recycled");
                }
                Fitness::Absent => {}
                Fitness::Unsound(reason) => {
                    tracing::warn!(family, %reason, "closed sockets are not recycled");
                }
            }
        }
    }

    /// If no family is recycled, why.
    pub(crate) fn unsound(why: &str) -> Self {
        let unsound = Fitness::Unsound(why.to_owned());
        Self { v4: unsound.clone(), v6: unsound }
    }
}

/// What becomes of a socket that was drained once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drained {
    Again,
    Warm,
    Close,
}

/// Sockets that are alike, behind their grace period.
#[derive(Debug)]
struct Pool {
    /// To be drained, the oldest first.
    undrained: VecDeque<SlotIndex>,
    /// Drains in the kernel.
    draining: usize,
    /// The last was warmed last.
    warm: VecDeque<SlotIndex>,
    /// Fewest that were here since the last `idle`.
    unneeded: usize,
    /// Of them, so many are to be closed.
    surplus: usize,
    why_surplus: Unfit,
}

impl Pool {
    fn new() -> Self {
        Self {
            undrained: VecDeque::new(),
            draining: 0,
            warm: VecDeque::new(),
            unneeded: 0,
            surplus: 0,
            why_surplus: Unfit::Idle,
        }
    }

    fn len(&self) -> usize {
        self.undrained.len() + self.draining + self.warm.len()
    }

    /// Whether few are warm, and more could be.
    fn is_short(&self) -> bool {
        self.warm.len() + self.draining < WARM_MIN && !self.undrained.is_empty()
    }

    fn has_surplus(&self) -> bool {
        self.surplus > 0 && self.len() > self.draining
    }

    fn pop_oldest(&mut self) -> Option<SlotIndex> {
        let oldest = self.undrained.pop_front().or_else(|| self.warm.pop_front());
        self.has_shrunk();
        oldest
    }

    fn has_shrunk(&mut self) {
        self.unneeded = self.unneeded.min(self.len());
        self.surplus = self.surplus.min(self.len());
    }
}

/// The kept sockets of one ring.
pub(crate) struct Recycler {
    limits: Recycle,
    soundness: Soundness,
    /// Unbound; the next grace period is theirs.
    waiting: Vec<SlotIndex>,
    /// A grace period is going on for these.
    covered: Vec<SlotIndex>,
    /// By family, and by whether they are addressed.
    pools: [[Pool; 2]; 2],
    /// Given up while they waited, with why.
    doomed: Vec<(SlotIndex, Unfit)>,
    /// Sockets that are neither an owner's nor in a pool, those being closed included.
    quarantined: u32,
    closed_instead: ClosedInstead,
    recycled: u64,
}

impl Recycler {
    pub(crate) fn new(limits: Recycle, soundness: Soundness) -> Self {
        Self {
            limits,
            soundness,
            waiting: Vec::new(),
            covered: Vec::new(),
            pools: std::array::from_fn(|_| std::array::from_fn(|_| Pool::new())),
            doomed: Vec::new(),
            quarantined: 0,
            closed_instead: ClosedInstead::default(),
            recycled: 0,
        }
    }

    pub(crate) fn limits(&self) -> Recycle {
        self.limits
    }

    /// Whether a socket can be kept that its owner has dropped; counts it if not. Its operations
    /// have ended, save for a receive that is being cancelled, or it `is_busy`.
    pub(crate) fn accept(&mut self, history: History, is_busy: bool) -> bool {
        if self.limits.quarantined_max == 0 {
            return false;
        }
        let unfit = match (history.unfit, self.soundness.of(history.family)) {
            (_, Fitness::Unsound(_) | Fitness::Absent) => return false,
            (Some(unfit), _) => Some(unfit),
            (None, Fitness::Sound { also_connected: false }) if history.has_connected => {
                Some(Unfit::Connected)
            }
            (None, Fitness::Sound { .. }) if is_busy => Some(Unfit::Busy),
            // What is surplus needs room, too.
            (None, Fitness::Sound { .. }) => {
                (self.room() <= self.surplus()).then_some(Unfit::NoRoom)
            }
        };
        match unfit {
            Some(unfit) => self.closed_instead.count(unfit),
            None => self.quarantined += 1,
        }
        unfit.is_none()
    }

    /// Whether an accepted socket, unbound, turns out to be unfit after all.
    pub(crate) fn refuses(&mut self, history: History) -> bool {
        if let Some(unfit) = history.unfit {
            self.quarantined -= 1;
            self.closed_instead.count(unfit);
        }
        history.unfit.is_some()
    }

    /// An accepted socket is unbound.
    pub(crate) fn quarantine(&mut self, slot: SlotIndex) {
        if self.soundness.is_of_use() {
            self.waiting.push(slot);
        } else {
            // Turned off while it was unbound.
            self.doomed.push((slot, Unfit::Unclean));
        }
    }

    /// Whether a grace period should begin, which those that wait have before them.
    pub(crate) fn begin_grace(&mut self) -> bool {
        if self.waiting.is_empty() || !self.covered.is_empty() {
            return false;
        }
        std::mem::swap(&mut self.waiting, &mut self.covered);
        true
    }

    /// It is over, for sockets that are to be put into their pools.
    pub(crate) fn end_grace(&mut self) -> Vec<SlotIndex> {
        std::mem::take(&mut self.covered)
    }

    fn pool(&mut self, history: History) -> &mut Pool {
        let family = match history.family {
            Family::V4 => 0,
            Family::V6 => 1,
        };
        &mut self.pools[family][usize::from(history.is_addressed)]
    }

    /// Puts a socket into its pool; one too many makes the oldest there surplus.
    pub(crate) fn put_in_pool(&mut self, slot: SlotIndex, history: History) {
        let is_over = self.pooled() - self.surplus() >= self.limits.warm_max as usize;
        self.quarantined -= 1;
        let pool = self.pool(history);
        pool.undrained.push_back(slot);
        if is_over {
            pool.surplus += 1;
            pool.why_surplus = Unfit::NoRoom;
        }
    }

    fn surplus(&self) -> usize {
        self.pools.iter().flatten().map(|pool| pool.surplus).sum()
    }

    /// How many more may be in quarantine, drained or closed at a time. Those have slots that nobody
    /// else can have, and there are so many beside the owners' own.
    fn room(&self) -> usize {
        let draining: usize = self.pools.iter().flatten().map(|pool| pool.draining).sum();
        (self.limits.quarantined_max as usize).saturating_sub(self.quarantined as usize + draining)
    }

    fn pooled(&self) -> usize {
        self.pools.iter().flatten().map(Pool::len).sum()
    }

    /// A socket that is to be drained, for few of its kind are warm: the youngest, of which most is
    /// still in the cache. The others can wait, for what is touched now and used later is not.
    pub(crate) fn next_to_drain(&mut self) -> Option<SlotIndex> {
        if self.room() == 0 {
            return None;
        }
        let pool = self.pools.iter_mut().flatten().find(|pool| pool.is_short())?;
        pool.draining += 1;
        pool.undrained.pop_back()
    }

    /// So many drains of a socket have ended: nothing was left in it, or else there may be more.
    pub(crate) fn drained(
        &mut self,
        slot: SlotIndex,
        history: History,
        drains: u32,
        is_empty: bool,
    ) -> Drained {
        if !is_empty && drains < DRAINS_MAX {
            return Drained::Again;
        }
        let is_empty = is_empty && !history.may_be_sending;
        let pool = self.pool(history);
        pool.draining -= 1;
        if is_empty {
            pool.warm.push_back(slot);
            return Drained::Warm;
        }
        pool.has_shrunk();
        self.quarantined += 1;
        self.closed_instead.count(Unfit::Unclean);
        Drained::Close
    }

    /// The CLOSE of a socket that was kept has ended.
    pub(crate) fn closed(&mut self) {
        self.quarantined -= 1;
    }

    /// A warm socket for a bind that sets the source address, or does not: the one that was warmed
    /// last.
    pub(crate) fn take(&mut self, family: Family, sets_source: bool) -> Option<SlotIndex> {
        let like = |is_addressed| History { is_addressed, ..History::new(family) };
        // Those bound to all addresses so far are as good for one; not the other way round.
        let kinds = if sets_source { &[true, false][..] } else { &[false] };
        for kind in kinds {
            let pool = self.pool(like(*kind));
            if let Some(slot) = pool.warm.pop_back() {
                pool.has_shrunk();
                return Some(slot);
            }
        }
        None
    }

    /// A socket that was taken is its new owner's, or else did not serve.
    pub(crate) fn taken(&mut self, serves: bool) {
        if serves {
            self.recycled += 1;
        } else {
            self.closed_instead.count(Unfit::Error);
        }
    }

    /// A slot whose kept socket must go, for no slot is free.
    pub(crate) fn evict(&mut self) -> Option<SlotIndex> {
        let slot = self.pools.iter_mut().flatten().find_map(Pool::pop_oldest)?;
        self.closed_instead.count(Unfit::NoRoom);
        Some(slot)
    }

    /// Called at the interval of `idle`: finds out what nobody has needed since. All of that is
    /// surplus, save for some warm ones.
    pub(crate) fn idle(&mut self) {
        for pool in self.pools.iter_mut().flatten() {
            let surplus = pool.unneeded.saturating_sub(pool.warm.len() / 2);
            if surplus > pool.surplus {
                (pool.surplus, pool.why_surplus) = (surplus, Unfit::Idle);
            }
            pool.unneeded = pool.len();
        }
    }

    /// A socket to be closed.
    pub(crate) fn next_surplus(&mut self) -> Option<SlotIndex> {
        if let Some((slot, unfit)) = self.doomed.pop() {
            self.closed_instead.count(unfit);
            return Some(slot);
        }
        if self.room() == 0 {
            return None;
        }
        let pool = self.pools.iter_mut().flatten().find(|pool| pool.has_surplus())?;
        pool.surplus -= 1;
        let slot = pool.pop_oldest()?;
        let why = pool.why_surplus;
        self.quarantined += 1;
        self.closed_instead.count(why);
        Some(slot)
    }

    /// Whether there is something to drain or to close.
    pub(crate) fn has_work(&self) -> bool {
        let mut pools = self.pools.iter().flatten();
        let has_pooled = pools.any(|pool| pool.is_short() || pool.has_surplus());
        !self.doomed.is_empty() || (has_pooled && self.room() > 0)
    }

    /// Makes surplus of as many sockets as are kept now.
    pub(crate) fn give_up(&mut self, unfit: Unfit) {
        let waiting = self.waiting.drain(..).chain(self.covered.drain(..));
        self.doomed.extend(waiting.map(|slot| (slot, unfit)));
        for pool in self.pools.iter_mut().flatten() {
            (pool.surplus, pool.why_surplus, pool.unneeded) = (pool.len(), unfit, 0);
        }
    }

    /// Keeps nothing any more.
    pub(crate) fn turn_off(&mut self, why: &str) {
        self.soundness = Soundness::unsound(why);
        self.give_up(Unfit::Unclean);
    }

    pub(crate) fn recycled(&self) -> u64 {
        self.recycled
    }

    pub(crate) fn closed_instead(&self) -> ClosedInstead {
        self.closed_instead
    }

    /// Sockets kept now.
    pub(crate) fn kept(&self) -> u64 {
        u64::from(self.quarantined) + self.pooled() as u64
    }

    #[cfg(test)]
    pub(super) fn is_warm(&self) -> bool {
        self.pools.iter().flatten().any(|pool| !pool.warm.is_empty())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.quarantined == 0 && self.pooled() == 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SOUND: Fitness = Fitness::Sound { also_connected: true };

    fn recycler(quarantined_max: u32, warm_max: u32) -> Recycler {
        let soundness = Soundness { v4: SOUND, v6: Fitness::Sound { also_connected: false } };
        Recycler::new(Recycle { quarantined_max, warm_max, ..Recycle::OFF }, soundness)
    }

    /// Where the test believes a socket to be.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum At {
        Waiting,
        Covered,
        /// Given up in one of these.
        Doomed,
        Undrained,
        Draining(u32),
        Warm,
        Closing,
    }

    type Kept = Vec<(SlotIndex, History, At)>;

    fn find(kept: &Kept, slot: SlotIndex) -> usize {
        kept.iter().position(|(at, ..)| *at == slot).expect("it was kept")
    }

    fn count(kept: &Kept, is: impl Fn(At) -> bool) -> usize {
        kept.iter().filter(|(.., at)| is(*at)).count()
    }

    fn is_pooled(at: At) -> bool {
        matches!(at, At::Undrained | At::Draining(_) | At::Warm)
    }

    proptest! {
        /// Kills: a step left out or taken twice, a socket given to two owners or to one of
        /// another kind, a limit not kept, a counter that drifts.
        #[test]
        fn a_socket_is_warm_only_after_unbinding_a_whole_grace_period_and_an_empty_drain(
            steps in proptest::collection::vec((0_u8..12, any::<prop::sample::Index>(), 0_u8..4), 1..400)
        ) {
            let (quarantined_max, warm_max) = (6, 4);
            let mut recycler = recycler(quarantined_max, warm_max);
            let mut kept = Kept::new();
            let mut next = 0;
            for (step, which, kind) in steps {
                let mut history =
                    History::new(if kind & 1 == 0 { Family::V4 } else { Family::V6 });
                history.bind(kind & 2 != 0);
                match step {
                    0..=2 => if recycler.accept(history, false) {
                        recycler.quarantine(SlotIndex(next));
                        kept.push((SlotIndex(next), history, At::Waiting));
                        next += 1;
                    },
                    3 => {
                        let waits = count(&kept, |at| at == At::Waiting) > 0;
                        let goes_on = count(&kept, |at| at == At::Covered) > 0;
                        prop_assert_eq!(recycler.begin_grace(), waits && !goes_on);
                        if !goes_on {
                            for (.., at) in &mut kept {
                                if *at == At::Waiting {
                                    *at = At::Covered;
                                }
                            }
                        }
                    }
                    4 => for slot in recycler.end_grace() {
                        let at = find(&kept, slot);
                        prop_assert_eq!(kept[at].2, At::Covered);
                        recycler.put_in_pool(slot, kept[at].1);
                        kept[at].2 = At::Undrained;
                    },
                    5 => if let Some(slot) = recycler.next_to_drain() {
                        let at = find(&kept, slot);
                        prop_assert_eq!(kept[at].2, At::Undrained);
                        kept[at].2 = At::Draining(1);
                    },
                    6 => {
                        let draining = kept.iter().filter(|(.., at)| matches!(at, At::Draining(_)));
                        let slots: Vec<_> = draining.map(|(slot, ..)| *slot).collect();
                        if !slots.is_empty() {
                            let at = find(&kept, slots[which.index(slots.len())]);
                            let (slot, history, At::Draining(drains)) = kept[at] else { continue };
                            // Now and then one that is never empty.
                            let (is_empty, drains) = (kind != 0, drains + u32::from(kind == 0) * 32);
                            kept[at].2 = match recycler.drained(slot, history, drains, is_empty) {
                                Drained::Again => At::Draining(drains + 1),
                                Drained::Warm => {
                                    prop_assert!(is_empty);
                                    At::Warm
                                }
                                Drained::Close => At::Closing,
                            };
                        }
                    }
                    7 => if let Some(slot) = recycler.take(history.family, history.is_addressed) {
                        let (_, was, at) = kept.swap_remove(find(&kept, slot));
                        prop_assert_eq!((at, was.family), (At::Warm, history.family));
                        prop_assert!(history.is_addressed || !was.is_addressed);
                    },
                    8 => match kind {
                        0 => {
                            recycler.give_up(Unfit::Idle);
                            for (.., at) in &mut kept {
                                if matches!(at, At::Waiting | At::Covered) {
                                    *at = At::Doomed;
                                }
                            }
                        }
                        1 => if let Some(slot) = recycler.evict() {
                            let (.., at) = kept.swap_remove(find(&kept, slot));
                            prop_assert!(matches!(at, At::Undrained | At::Warm));
                        },
                        _ => recycler.idle(),
                    },
                    9 => while let Some(slot) = recycler.next_surplus() {
                        let at = find(&kept, slot);
                        prop_assert!(!matches!(kept[at].2, At::Draining(_) | At::Closing));
                        kept[at].2 = At::Closing;
                    },
                    _ => {
                        let closing = kept.iter().position(|(.., at)| *at == At::Closing);
                        if let Some(at) = closing {
                            kept.swap_remove(at);
                            recycler.closed();
                        }
                    }
                }
                prop_assert_eq!(recycler.kept(), kept.len() as u64);
                prop_assert_eq!(recycler.is_empty(), kept.is_empty());
                let busy = count(&kept, |at| !is_pooled(at) || matches!(at, At::Draining(_)));
                prop_assert!(busy <= quarantined_max as usize, "{} have slots of their own", busy);
                prop_assert!(kept.len() <= (quarantined_max + warm_max) as usize);
            }
            recycler.give_up(Unfit::Idle);
            while let Some(slot) = recycler.next_surplus() {
                kept.swap_remove(find(&kept, slot));
                recycler.closed();
            }
            let stays = |at: &At| matches!(at, At::Draining(_) | At::Closing);
            let busy = kept.iter().filter(|(.., at)| stays(at)).count();
            prop_assert!(busy == kept.len() || busy >= quarantined_max as usize);
        }
    }

    #[test]
    fn what_could_leave_a_trace_is_closed_and_counted_by_its_reason() {
        let mut recycler = recycler(1, 1);
        let spoilt = |unfit| {
            let mut history = History::new(Family::V4);
            history.spoil(unfit);
            history
        };
        let connected = |family| {
            let mut history = History::new(family);
            history.connect();
            history
        };
        for unfit in [Unfit::NamedPort, Unfit::Options, Unfit::Error] {
            assert!(!recycler.accept(spoilt(unfit), false));
        }
        assert!(!recycler.accept(connected(Family::V6), false));
        assert!(!recycler.accept(History::new(Family::V4), true));
        assert!(recycler.accept(connected(Family::V4), false));
        assert!(!recycler.accept(History::new(Family::V4), false), "one is in quarantine");
        let expected = ClosedInstead {
            named_port: 1,
            options: 1,
            error: 1,
            connected: 1,
            busy: 1,
            no_room: 1,
            ..ClosedInstead::default()
        };
        assert_eq!(recycler.closed_instead(), expected);
    }

    #[test]
    fn a_socket_that_may_still_be_sending_is_not_given_away() {
        let mut recycler = recycler(1, 1);
        let mut history = History::new(Family::V4);
        history.send();
        assert!(recycler.accept(history, false));
        recycler.quarantine(SlotIndex(0));
        assert!(recycler.begin_grace());
        assert_eq!(recycler.end_grace(), [SlotIndex(0)]);
        recycler.put_in_pool(SlotIndex(0), history);
        assert_eq!(recycler.next_to_drain(), Some(SlotIndex(0)));
        assert_eq!(recycler.drained(SlotIndex(0), history, 1, true), Drained::Close);
        assert_eq!(recycler.closed_instead().unclean, 1);
    }

    #[test]
    fn what_nobody_needs_is_given_up_bit_by_bit_and_in_the_end_all_of_it() {
        let mut recycler = recycler(100, 100);
        let history = History::new(Family::V4);
        for slot in 0..100 {
            assert!(recycler.accept(history, false));
            recycler.quarantine(SlotIndex(slot));
        }
        assert!(recycler.begin_grace());
        for slot in recycler.end_grace() {
            recycler.put_in_pool(slot, history);
        }
        while let Some(slot) = recycler.next_to_drain() {
            assert_eq!(recycler.drained(slot, history, 1, true), Drained::Warm);
        }
        let mut left = Vec::new();
        for _ in 0..12 {
            recycler.idle();
            while recycler.next_surplus().is_some() {
                recycler.closed();
            }
            left.push(recycler.kept());
        }
        assert_eq!(left[..4], [100, 50, 25, 12], "the first interval saw them come");
        assert_eq!(left.last(), Some(&0));
    }
}
