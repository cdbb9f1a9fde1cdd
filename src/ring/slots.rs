//! The fixed-file table's slots: whose each is, and what the ring remembers of its socket.

use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use super::account::Account;
use super::op::Op;
use super::port_order::{CloseId, Port};
use super::queues::{OpKey, SlotIndex};
use super::recycle::taint::Taint;
use super::send::SegmentLimit;
use super::thread_tag::ThreadTag;
use crate::datagram::Family;

/// Whose a slot is.
#[derive(Debug)]
pub(super) enum SlotState {
    /// The next bind's.
    Free,
    /// A guest's.
    Owned,
    /// Its guest has dropped the socket, and operations on it go on.
    Releasing(Releasing),
    /// The recycler's.
    Cached,
}

/// The way of a socket that its guest has dropped.
#[derive(Debug)]
pub(super) struct Releasing {
    pub(super) close: CloseId,
    /// The socket's CLOSE, or its unbinding, has been submitted. What else is in flight holds a CLOSE up.
    pub(super) is_submitted: bool,
    /// The guest's, while such sends keep a unit of its quota: else a guest could pile up any number
    /// of them.
    pub(super) account: Option<Arc<Account>>,
    /// Its sends are cancelled: their guest is gone.
    pub(super) is_forsaken: bool,
}

/// A slot's multishot receive while it is in the kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Receive {
    pub(super) key: OpKey,
    /// A cancel for it has been queued.
    pub(super) is_cancelled: bool,
    /// The thread that it completes on, once it has been brought to the kernel.
    pub(super) armed_by: Option<ThreadTag>,
}

#[derive(Debug)]
pub(super) struct Slot {
    pub(super) state: SlotState,
    /// `None` where none is armed: not wanted yet, or paused.
    pub(super) receive: Option<Receive>,
    /// Bound to it by its number, or to be.
    pub(super) named_port: Option<NonZeroU16>,
    pub(super) taint: Taint,
    pub(super) segment_limit: SegmentLimit,
    /// A send of which no entry is queued yet.
    pub(super) deferred: Option<OpKey>,
    /// GRO is on, because the socket was seen to receive in bursts.
    pub(super) has_gro: bool,
}

impl Slot {
    fn owned(taint: Taint) -> Self {
        Self {
            state: SlotState::Owned,
            receive: None,
            named_port: None,
            taint,
            segment_limit: SegmentLimit::default(),
            deferred: None,
            has_gro: false,
        }
    }

    /// The entries of an operation on the socket are written next.
    pub(super) fn prepare(&mut self, op: &mut Op) {
        if let Op::Send(send) = op {
            send.plan(self.segment_limit.of_next_send());
        }
        op.mark(&mut self.taint);
    }

    pub(super) fn is_owned(&self) -> bool {
        matches!(self.state, SlotState::Owned)
    }

    pub(super) fn is_forsaken(&self) -> bool {
        matches!(self.state, SlotState::Releasing(Releasing { is_forsaken: true, .. }))
    }
}

pub(super) struct SlotTable {
    slots: Vec<Slot>,
    free: Vec<SlotIndex>,
    capacity: usize,
}

impl SlotTable {
    pub(super) fn new(capacity: u64) -> Self {
        let capacity = usize::try_from(capacity).unwrap_or(usize::MAX);
        Self { slots: Vec::new(), free: Vec::new(), capacity }
    }

    /// A free slot becomes a guest's; `None` if there is none.
    pub(super) fn take_free(&mut self, family: Family) -> Option<SlotIndex> {
        let owned = Slot::owned(Taint::new(family));
        if let Some(slot) = self.free.pop() {
            self.slots[slot.at()] = owned;
            return Some(slot);
        }
        if self.slots.len() >= self.capacity {
            return None;
        }
        let slot = SlotIndex(u32::try_from(self.slots.len()).expect("below SOCKETS_MAX"));
        self.slots.push(owned);
        Some(slot)
    }

    /// A cached slot becomes a guest's, with its socket.
    pub(super) fn take_cached(&mut self, slot: SlotIndex) {
        let taint = self.get(slot).taint.renewed();
        *self.get(slot) = Slot::owned(taint);
    }

    /// A cached slot becomes a guest's, without its socket.
    pub(super) fn take_evicted(&mut self, slot: SlotIndex, family: Family) {
        *self.get(slot) = Slot::owned(Taint::new(family));
    }

    /// The slots that guests own now.
    pub(super) fn owned(&self) -> Vec<SlotIndex> {
        let numbered = (0..).map(SlotIndex).zip(&self.slots);
        numbered.filter_map(|(slot, state)| state.is_owned().then_some(slot)).collect()
    }

    /// Closes that other operations on their slots hold up.
    pub(super) fn held_up(&self) -> Vec<(SlotIndex, CloseId)> {
        let held_up = |(slot, state): (SlotIndex, &Slot)| match &state.state {
            SlotState::Releasing(Releasing { close, is_submitted: false, .. }) => {
                Some((slot, *close))
            }
            SlotState::Free | SlotState::Owned | SlotState::Cached | SlotState::Releasing(_) => {
                None
            }
        };
        (0..).map(SlotIndex).zip(&self.slots).filter_map(held_up).collect()
    }

    /// Whose sends are to be cancelled, because they wait although their guest has been gone for so long; and
    /// after what time to ask again, if guests are gone whose sends wait. With `again` also those that were
    /// returned before: a chain that the kernel has cut takes more than one cancel.
    pub(super) fn forsaken(
        &mut self,
        time: Duration,
        again: bool,
    ) -> (Vec<SlotIndex>, Option<Duration>) {
        let mut next = None;
        let mut forsaken = Vec::new();
        for (slot, state) in (0..).map(SlotIndex).zip(&mut self.slots) {
            let SlotState::Releasing(releasing) = &mut state.state else { continue };
            let gone_for = releasing.account.as_ref().and_then(|account| account.forsaken_for());
            let Some(gone_for) = gone_for else { continue };
            let mut left = time.saturating_sub(gone_for);
            if left.is_zero() {
                if again || !releasing.is_forsaken {
                    forsaken.push(slot);
                }
                releasing.is_forsaken = true;
                left = time;
            }
            next = Some(next.map_or(left, |next: Duration| next.min(left)));
        }
        (forsaken, next)
    }

    /// Slots that were ever used.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// What the close of a slot's socket gives up.
    pub(super) fn port(&self, slot: SlotIndex) -> Port {
        let slot = &self.slots[slot.at()];
        Port { family: slot.taint.family(), number: slot.named_port }
    }

    pub(super) fn get(&mut self, slot: SlotIndex) -> &mut Slot {
        &mut self.slots[slot.at()]
    }

    /// The kernel has let go of the slot's socket.
    pub(super) fn free(&mut self, slot: SlotIndex) {
        self.get(slot).state = SlotState::Free;
        self.free.push(slot);
    }
}
