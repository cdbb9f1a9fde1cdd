//! The fixed-file table's bookkeeping: who owns a slot, and when it may be given away again.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use io_uring::types::DestinationSlot;

use super::inbox::Inbox;
use super::recycle::{Drained, History, Recycler};
use super::table::OpKey;
use crate::datagram::Family;
use crate::limits::GSO_REFUSAL_SENDS;

/// A place in the ring's fixed-file table: a direct descriptor's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlotIndex(pub(crate) u32);

impl SlotIndex {
    pub(crate) fn destination(self) -> DestinationSlot {
        DestinationSlot::try_from_slot_target(self.0).expect("below SOCKETS_MAX")
    }
}

/// A number of places for sockets: a ring's table has one, and every guest's quota is one. It
/// refuses and never waits.
///
/// Two counters that only grow, one for each side: what is taken is their difference.
#[derive(Debug)]
pub(crate) struct Room {
    created: AtomicU64,
    gone: AtomicU64,
    capacity: u64,
}

impl Room {
    pub(crate) fn new(capacity: u32) -> Arc<Self> {
        Arc::new(Self {
            created: AtomicU64::new(0),
            gone: AtomicU64::new(0),
            capacity: capacity.into(),
        })
    }

    /// Takes a place, or refuses if there is none.
    pub(crate) fn take(&self) -> bool {
        let one_more = |created: u64| {
            // A place given back by another thread is seen to be free by whoever takes it.
            let taken = created.saturating_sub(self.gone.load(Ordering::Acquire));
            (taken < self.capacity).then_some(created + 1)
        };
        self.created.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
    }

    /// As `take`, for callers that are the only one to take: a guest's calls come one after the
    /// other, and `UdpCtx` is borrowed mutably by each that creates a socket.
    pub(crate) fn take_alone(&self) -> bool {
        let created = self.created.load(Ordering::Relaxed);
        let has_room = created.saturating_sub(self.gone.load(Ordering::Acquire)) < self.capacity;
        if has_room {
            self.created.store(created + 1, Ordering::Relaxed);
        }
        has_room
    }

    pub(crate) fn give_back(&self) {
        self.gone.fetch_add(1, Ordering::Release);
    }

    pub(crate) fn taken(&self) -> u64 {
        let gone = self.gone.load(Ordering::Acquire);
        self.created().saturating_sub(gone)
    }

    pub(crate) fn created(&self) -> u64 {
        self.created.load(Ordering::Relaxed)
    }
}

/// A slot's life.
pub(crate) enum SlotState {
    Free,
    /// Owned; a SOCKET operation for it has been pushed.
    Open {
        receive: Receive,
    },
    /// Not owned; waits for the completions of its CLOSE and of every other operation. Sends that
    /// wait for room hold up the CLOSE, for the kernel looks the file up when their turn comes; and
    /// they keep their guest's place, else it could pile up any number of them.
    Closing {
        close: u64,
        ending: Ending,
        is_pushed: bool,
        quota: Option<Arc<Room>>,
    },
    /// Not owned; its socket is unbound and kept. Drained so many times.
    Kept {
        drains: u32,
    },
    /// Not owned; the socket that was kept is being closed.
    GivenUp,
}

/// How a socket ends that its owner has dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    Close,
    Unbind,
}

/// The multishot receive of an open slot.
pub(crate) enum Receive {
    /// Nobody has asked yet.
    Idle,
    Armed(OpKey),
    /// The inbox is full and a cancel is on its way.
    Pausing,
    /// Paused; goes on when the guest has drained the inbox.
    Full(Arc<Inbox>),
}

struct Slot {
    state: SlotState,
    /// Operations that have not had their last completion.
    ops: u32,
    /// Those of them that are sends.
    sends: u32,
    /// Largest datagram that may travel in company, as the kernel has told, and for how many sends
    /// that is still to be believed.
    segment_max: Option<(u16, u16)>,
    /// It has received in bursts, and was told to take them in one message.
    takes_bursts: bool,
    history: History,
}

impl Slot {
    fn open(history: History) -> Self {
        let state = SlotState::Open { receive: Receive::Idle };
        Self { state, ops: 0, sends: 0, segment_max: None, takes_bursts: false, history }
    }
}

/// A slot for a new owner.
pub(crate) struct Opened {
    pub(crate) slot: SlotIndex,
    pub(crate) holds: Holds,
}

/// What is in a slot that has a new owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holds {
    Nothing,
    /// A socket for the new owner.
    Warm,
    /// A socket that was kept and must go, for the slot is needed.
    Evicted,
}

pub(crate) struct SlotTable {
    slots: Vec<Slot>,
    free: Vec<SlotIndex>,
    room: Arc<Room>,
    closes: CloseLog,
    pub(crate) recycler: Recycler,
}

impl SlotTable {
    /// As many slots as the room has places, and one for each socket that may be in quarantine.
    pub(crate) fn new(room: Arc<Room>, recycler: Recycler) -> Self {
        let (slots, free) = (Vec::new(), Vec::new());
        Self { slots, free, room, closes: CloseLog::default(), recycler }
    }

    fn capacity(&self) -> usize {
        let kept = u64::from(self.recycler.limits().quarantined_max);
        usize::try_from(self.room.capacity + kept).unwrap_or(usize::MAX)
    }

    /// Gives a slot to a socket that has its place in the room, so there is one: what is neither
    /// owned nor busy with recycling is free or kept. With a warm socket in it, if one may be
    /// `reused` and there is one that is as good as new for a bind that sets the source address, or
    /// does not.
    pub(crate) fn open(&mut self, family: Family, reused: Option<bool>) -> Opened {
        if let Some(sets_source) = reused
            && let Some(slot) = self.recycler.take(family, sets_source)
        {
            let entry = &mut self.slots[slot.0 as usize];
            *entry = Slot::open(entry.history.renewed());
            return Opened { slot, holds: Holds::Warm };
        }
        let open = Slot::open(History::new(family));
        if let Some(slot) = self.free.pop() {
            self.slots[slot.0 as usize] = open;
            return Opened { slot, holds: Holds::Nothing };
        }
        if self.slots.len() >= self.capacity()
            && let Some(slot) = self.recycler.evict()
        {
            self.slots[slot.0 as usize] = open;
            return Opened { slot, holds: Holds::Evicted };
        }
        let next = u32::try_from(self.slots.len()).expect("no more slots than the kernel has");
        self.slots.push(open);
        Opened { slot: SlotIndex(next), holds: Holds::Nothing }
    }

    /// A recycled socket is about to be replaced by a new one.
    pub(crate) fn replace(&mut self, slot: SlotIndex, family: Family, is_addressed: bool) {
        *self.history(slot) = History::new(family);
        self.history(slot).bind(is_addressed);
    }

    pub(crate) fn history(&mut self, slot: SlotIndex) -> &mut History {
        &mut self.slots[slot.0 as usize].history
    }

    pub(crate) fn state(&mut self, slot: SlotIndex) -> &mut SlotState {
        &mut self.slots[slot.0 as usize].state
    }

    /// Largest datagram that the next send may let travel in company with others.
    pub(crate) fn segment_max(&mut self, slot: SlotIndex) -> usize {
        let limit = &mut self.slots[slot.0 as usize].segment_max;
        let Some((max, sends)) = limit else { return usize::MAX };
        let max = usize::from(*max);
        *sends -= 1;
        if *sends == 0 {
            *limit = None;
        }
        max
    }

    /// The kernel has refused larger ones. One path may do so, and then another be taken, so it is
    /// asked again after a while.
    pub(crate) fn limit_segments(&mut self, slot: SlotIndex, segment_max: usize) {
        let max = u16::try_from(segment_max).unwrap_or(u16::MAX);
        self.slots[slot.0 as usize].segment_max = Some((max, GSO_REFUSAL_SENDS));
    }

    /// Marks a slot as one that receives in bursts; `true` the first time.
    pub(crate) fn mark_bursts(&mut self, slot: SlotIndex) -> bool {
        !std::mem::replace(&mut self.slots[slot.0 as usize].takes_bursts, true)
    }

    pub(crate) fn takes_bursts(&self, slot: SlotIndex) -> bool {
        self.slots[slot.0 as usize].takes_bursts
    }

    /// An operation on the slot is about to be pushed.
    pub(crate) fn begin(&mut self, slot: SlotIndex, is_send: bool) {
        let entry = &mut self.slots[slot.0 as usize];
        entry.ops += 1;
        entry.sends += u32::from(is_send);
    }

    /// An operation on the slot had its last completion. The slot becomes free, or its socket is
    /// kept, if it was closing and this was the last; its close is over, for those who wait for its
    /// port, when only sends are left. The ending that is to be pushed now, if any: this was the
    /// last send, or the socket cannot be kept.
    pub(crate) fn end(&mut self, slot: SlotIndex, is_send: bool) -> Option<Ending> {
        let entry = &mut self.slots[slot.0 as usize];
        entry.ops -= 1;
        entry.sends -= u32::from(is_send);
        if let SlotState::GivenUp = entry.state
            && entry.ops == 0
        {
            entry.state = SlotState::Free;
            self.free.push(slot);
            self.recycler.closed();
            return None;
        }
        let SlotState::Closing { close, ending, is_pushed, quota } = &mut entry.state else {
            return None;
        };
        if !*is_pushed {
            if entry.ops == entry.sends {
                self.closes.finish(*close);
            }
            *is_pushed = entry.sends == 0;
            return is_pushed.then_some(*ending);
        }
        if entry.ops > 0 {
            return None;
        }
        if *ending == Ending::Unbind && self.recycler.refuses(entry.history) {
            *ending = Ending::Close;
            return Some(Ending::Close);
        }
        self.closes.finish(*close);
        if let Some(quota) = quota.take() {
            quota.give_back();
        }
        entry.state = match ending {
            Ending::Close => {
                self.free.push(slot);
                SlotState::Free
            }
            Ending::Unbind => {
                self.recycler.quarantine(slot);
                SlotState::Kept { drains: 0 }
            }
        };
        self.room.give_back();
        None
    }

    /// The grace period is over.
    pub(crate) fn end_grace(&mut self) {
        for slot in self.recycler.end_grace() {
            self.recycler.put_in_pool(slot, self.slots[slot.0 as usize].history);
        }
    }

    /// A drain of a kept socket has ended.
    pub(crate) fn drained(&mut self, slot: SlotIndex, is_empty: bool) -> Drained {
        let entry = &mut self.slots[slot.0 as usize];
        let SlotState::Kept { drains } = &mut entry.state else {
            unreachable!("a socket is kept until its last drain has ended");
        };
        *drains += 1;
        self.recycler.drained(slot, entry.history, *drains, is_empty)
    }

    /// The CLOSE of a kept socket is about to be pushed.
    pub(crate) fn give_up(&mut self, slot: SlotIndex) {
        self.slots[slot.0 as usize].state = SlotState::GivenUp;
    }

    /// The owner is gone. The ending that is to be pushed now, unless a send is on its way. A guest
    /// that has sends on their way gets its place back after them, others at once.
    pub(crate) fn close(&mut self, slot: SlotIndex, quota: &Arc<Room>) -> Option<Ending> {
        let close = self.closes.start();
        let entry = &mut self.slots[slot.0 as usize];
        let is_receiving = match &entry.state {
            SlotState::Open { receive: Receive::Armed(_) | Receive::Pausing } => 1,
            SlotState::Open { receive: Receive::Idle | Receive::Full(_) }
            | SlotState::Free
            | SlotState::Closing { .. }
            | SlotState::Kept { .. }
            | SlotState::GivenUp => 0,
        };
        let is_kept = self.recycler.accept(entry.history, entry.ops > is_receiving);
        let ending = if is_kept { Ending::Unbind } else { Ending::Close };
        let is_pushed = entry.sends == 0;
        let quota = if is_pushed {
            quota.give_back();
            None
        } else {
            Some(Arc::clone(quota))
        };
        entry.state = SlotState::Closing { close, ending, is_pushed, quota };
        if !is_pushed && entry.ops == entry.sends {
            self.closes.finish(close);
        }
        is_pushed.then_some(ending)
    }

    pub(crate) fn closes(&self) -> &CloseLog {
        &self.closes
    }

    pub(crate) fn room(&self) -> &Room {
        &self.room
    }
}

/// Which closes are still going on, in the order they began.
///
/// A port given up by a close is free only after its completion, so a bind that names its port
/// must not travel with a close that may hold it.
#[derive(Debug, Default)]
pub(crate) struct CloseLog {
    /// Number of the oldest unfinished close.
    oldest: u64,
    /// From `oldest` on: whether each has finished.
    finished: VecDeque<bool>,
}

impl CloseLog {
    fn start(&mut self) -> u64 {
        self.finished.push_back(false);
        self.next() - 1
    }

    fn finish(&mut self, close: u64) {
        if let Some(finished) = close
            .checked_sub(self.oldest)
            .and_then(|at| self.finished.get_mut(usize::try_from(at).ok()?))
        {
            *finished = true;
        }
        while self.finished.front() == Some(&true) {
            self.finished.pop_front();
            self.oldest += 1;
        }
    }

    /// The number the next close will have.
    pub(crate) fn next(&self) -> u64 {
        self.oldest + self.finished.len() as u64
    }

    /// Whether every close numbered below `bound` has finished.
    pub(crate) fn all_finished_before(&self, bound: u64) -> bool {
        self.oldest >= bound
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ring::recycle::{Fitness, Recycle, Soundness, Unfit};

    /// A table that keeps nothing.
    fn table(room: &Arc<Room>) -> SlotTable {
        let recycler = Recycler::new(Recycle::OFF, Soundness::unsound("not here"));
        SlotTable::new(Arc::clone(room), recycler)
    }

    fn open(slots: &mut SlotTable) -> SlotIndex {
        slots.open(Family::V4, None).slot
    }

    #[test]
    fn a_full_room_refuses_and_takes_places_back() {
        let room = Room::new(2);
        assert!(room.take() && room.take());
        assert!(!room.take() && !room.take());
        room.give_back();
        assert!(room.take());
        assert_eq!((room.taken(), room.created()), (2, 3));
    }

    #[test]
    fn a_closing_slot_is_not_given_away_before_its_last_completion() {
        let room = Room::new(1);
        assert!(room.take());
        let mut slots = table(&room);
        let slot = open(&mut slots);
        let quota = Room::new(1);
        assert!(quota.take());
        slots.begin(slot, false); // a receive
        assert_eq!(slots.close(slot, &quota), Some(Ending::Close));
        slots.begin(slot, false); // the close
        assert!(quota.take(), "the guest may open another");
        assert_eq!(slots.end(slot, false), None);
        assert!(!room.take(), "the receive may still use the file");
        assert_eq!(slots.end(slot, false), None);
        assert!(room.take());
        assert_eq!(open(&mut slots), slot);
    }

    #[test]
    fn a_send_that_waits_keeps_its_guests_place_and_the_file_but_holds_up_no_bind() {
        let room = Room::new(1);
        let quota = Room::new(1);
        assert!(room.take() && quota.take());
        let mut slots = table(&room);
        let slot = open(&mut slots);
        slots.begin(slot, true);
        slots.begin(slot, false); // a receive
        assert_eq!(slots.close(slot, &quota), None, "the kernel would find no file for the send");
        let bound = slots.closes().next();
        assert!(!slots.closes().all_finished_before(bound));
        assert_eq!(slots.end(slot, false), None);
        assert!(slots.closes().all_finished_before(bound));
        assert_eq!(slots.end(slot, true), Some(Ending::Close));
        slots.begin(slot, false);
        assert!(!quota.take() && !room.take());
        assert_eq!(slots.end(slot, false), None);
        assert!(quota.take() && room.take());
    }

    #[test]
    fn a_named_port_waits_for_every_close_before_it_and_for_none_after() {
        let mut log = CloseLog::default();
        let (first, second) = (log.start(), log.start());
        let bound = log.next();
        let third = log.start();
        log.finish(second);
        assert!(!log.all_finished_before(bound));
        log.finish(first);
        assert!(log.all_finished_before(bound));
        assert!(!log.all_finished_before(log.next()));
        log.finish(third);
        assert!(log.all_finished_before(log.next()));
    }

    proptest! {
        /// Kills: more in quarantine, drained and closed than there are slots for, a slot given to
        /// two.
        #[test]
        fn whoever_has_a_place_in_the_room_finds_a_slot_whatever_is_kept(
            steps in proptest::collection::vec((0_u8..8, any::<prop::sample::Index>()), 1..400)
        ) {
            let sound = Fitness::Sound { also_connected: true };
            let soundness = Soundness { v4: sound.clone(), v6: sound };
            let limits = Recycle { quarantined_max: 2, warm_max: 8, ..Recycle::OFF };
            let (room, quota) = (Room::new(3), Room::new(100));
            let recycler = Recycler::new(limits, soundness);
            let mut slots = SlotTable::new(Arc::clone(&room), recycler);
            let mut owned: Vec<SlotIndex> = Vec::new();
            // With the kernel: drains, and endings.
            let (mut draining, mut ending) = (Vec::new(), Vec::new());
            for (step, which) in steps {
                match step {
                    0 | 1 => if room.take() {
                        let family = if which.index(2) == 0 { Family::V4 } else { Family::V6 };
                        let Opened { slot, .. } = slots.open(family, Some(step == 0));
                        prop_assert!((slot.0 as usize) < slots.capacity(), "beyond the table");
                        prop_assert!(!owned.contains(&slot) && !ending.contains(&slot));
                        prop_assert!(!draining.contains(&slot));
                        slots.history(slot).bind(step == 0);
                        owned.push(slot);
                    },
                    2 if !owned.is_empty() => {
                        let slot = owned.swap_remove(which.index(owned.len()));
                        prop_assert!(quota.take());
                        prop_assert!(slots.close(slot, &quota).is_some());
                        slots.begin(slot, false);
                        ending.push(slot);
                    }
                    3 if !ending.is_empty() => {
                        let slot = ending.swap_remove(which.index(ending.len()));
                        prop_assert_eq!(slots.end(slot, false), None);
                    }
                    4 => {
                        slots.recycler.begin_grace();
                    }
                    5 => slots.end_grace(),
                    6 => if let Some(slot) = slots.recycler.next_to_drain() {
                        slots.begin(slot, false);
                        draining.push(slot);
                    } else if !draining.is_empty() {
                        let slot = draining.swap_remove(which.index(draining.len()));
                        prop_assert_eq!(slots.end(slot, false), None);
                        prop_assert_eq!(slots.drained(slot, true), Drained::Warm);
                    },
                    _ => {
                        if which.index(4) == 0 {
                            slots.recycler.give_up(Unfit::Idle);
                        }
                        if let Some(slot) = slots.recycler.next_surplus() {
                            slots.give_up(slot);
                            slots.begin(slot, false);
                            ending.push(slot);
                        }
                    }
                }
            }
        }
    }
}
