//! The fixed-file table's bookkeeping: who owns a slot, and when it may be given away again.

use std::collections::VecDeque;
use std::sync::Arc;

use io_uring::types::DestinationSlot;

use super::inbox::Inbox;
use super::table::OpKey;

/// A place in the ring's fixed-file table: a direct descriptor's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlotIndex(pub(crate) u32);

impl SlotIndex {
    pub(crate) fn destination(self) -> DestinationSlot {
        DestinationSlot::try_from_slot_target(self.0).expect("below SOCKETS_MAX")
    }
}

/// A slot's life.
pub(crate) enum SlotState {
    Free,
    /// Owned; the kernel knows nothing of it.
    Reserved,
    /// Owned; a SOCKET operation for it has been pushed.
    Open { receive: Receive },
    /// Not owned; waits for the completions of its CLOSE and of every other operation.
    Closing { close: u64 },
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
}

pub(crate) struct SlotTable {
    slots: Vec<Slot>,
    free: Vec<SlotIndex>,
    capacity: u32,
    closes: CloseLog,
}

impl SlotTable {
    pub(crate) fn new(capacity: u32) -> Self {
        Self { slots: Vec::new(), free: Vec::new(), capacity, closes: CloseLog::default() }
    }

    /// Gives a slot away, or `None` if the table is full.
    pub(crate) fn reserve(&mut self) -> Option<SlotIndex> {
        if let Some(slot) = self.free.pop() {
            self.slots[slot.0 as usize].state = SlotState::Reserved;
            return Some(slot);
        }
        let index = u32::try_from(self.slots.len()).ok().filter(|index| *index < self.capacity)?;
        self.slots.push(Slot { state: SlotState::Reserved, ops: 0 });
        Some(SlotIndex(index))
    }

    pub(crate) fn state(&mut self, slot: SlotIndex) -> &mut SlotState {
        &mut self.slots[slot.0 as usize].state
    }

    /// An operation on the slot is about to be pushed.
    pub(crate) fn begin(&mut self, slot: SlotIndex) {
        self.slots[slot.0 as usize].ops += 1;
    }

    /// An operation on the slot had its last completion. The slot becomes free if it was closing
    /// and this was the last.
    pub(crate) fn end(&mut self, slot: SlotIndex) {
        let entry = &mut self.slots[slot.0 as usize];
        entry.ops -= 1;
        if let (SlotState::Closing { close }, 0) = (&entry.state, entry.ops) {
            self.closes.finish(*close);
            entry.state = SlotState::Free;
            self.free.push(slot);
        }
    }

    /// Frees a slot the kernel has never heard of.
    pub(crate) fn release(&mut self, slot: SlotIndex) {
        self.slots[slot.0 as usize].state = SlotState::Free;
        self.free.push(slot);
    }

    /// The owner is gone and a CLOSE will be pushed.
    pub(crate) fn close(&mut self, slot: SlotIndex) {
        let close = self.closes.start();
        self.slots[slot.0 as usize].state = SlotState::Closing { close };
    }

    pub(crate) fn closes(&self) -> &CloseLog {
        &self.closes
    }

    /// Slots that are not free.
    pub(crate) fn in_use(&self) -> u64 {
        (self.slots.len() - self.free.len()) as u64
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
    use super::*;

    #[test]
    fn a_full_table_refuses_and_a_released_slot_is_given_again() {
        let mut slots = SlotTable::new(2);
        let first = slots.reserve().unwrap();
        let second = slots.reserve().unwrap();
        assert_ne!(first, second);
        assert!(slots.reserve().is_none());
        slots.release(first);
        assert_eq!(slots.in_use(), 1);
        assert_eq!(slots.reserve(), Some(first));
    }

    #[test]
    fn a_closing_slot_is_not_given_away_before_its_last_completion() {
        let mut slots = SlotTable::new(1);
        let slot = slots.reserve().unwrap();
        slots.begin(slot); // a receive
        slots.begin(slot); // the close
        slots.close(slot);
        slots.end(slot);
        assert!(slots.reserve().is_none(), "the receive may still use the file");
        slots.end(slot);
        assert_eq!(slots.reserve(), Some(slot));
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
}
