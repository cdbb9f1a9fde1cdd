//! Closes and binds by number, in the order that gives a port away only once it is free.
//!
//! A port is free after the completion of the close that gives it up. A bind that names a port must
//! not be submitted together with a close that may hold that very port, so it is deferred until all
//! closes that began before it have ended.

use std::collections::VecDeque;

use super::queues::{OpKey, SlotIndex};

/// Names a close. Numbers grow in the order in which closes begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct CloseId(u64);

/// A bind by number that is stored in the operation table and not yet queued.
#[derive(Debug)]
struct Deferred {
    key: OpKey,
    slot: SlotIndex,
    closes_before: CloseId,
}

#[derive(Debug, Default)]
pub(super) struct PortOrder {
    /// Number of the oldest close that goes on.
    oldest: u64,
    /// From `oldest` on: whether each has ended.
    ended: VecDeque<bool>,
    deferred: VecDeque<Deferred>,
}

impl PortOrder {
    pub(super) fn begin_close(&mut self) -> CloseId {
        let close = self.next();
        self.ended.push_back(false);
        close
    }

    /// A close has given up its port, or has none to give up. May be called more than once.
    pub(super) fn end_close(&mut self, CloseId(close): CloseId) {
        if let Some(ended) = close
            .checked_sub(self.oldest)
            .and_then(|at| self.ended.get_mut(usize::try_from(at).ok()?))
        {
            *ended = true;
        }
        while self.ended.front() == Some(&true) {
            self.ended.pop_front();
            self.oldest += 1;
        }
    }

    /// The number that the next close will have.
    fn next(&self) -> CloseId {
        CloseId(self.oldest + self.ended.len() as u64)
    }

    /// Whether a close goes on, so that a bind by number must be deferred.
    pub(super) fn is_closing(&self) -> bool {
        !self.ended.is_empty()
    }

    /// Defers a bind behind the closes that go on now.
    pub(super) fn defer(&mut self, key: OpKey, slot: SlotIndex) {
        let closes_before = self.next();
        self.deferred.push_back(Deferred { key, slot, closes_before });
    }

    /// A deferred bind before which no close goes on any more: it is to be queued now.
    pub(super) fn take_due(&mut self) -> Option<OpKey> {
        let front = self.deferred.front()?;
        let is_due = CloseId(self.oldest) >= front.closes_before;
        is_due.then(|| self.deferred.pop_front()).flatten().map(|deferred| deferred.key)
    }

    /// The deferred bind of a slot whose guest has dropped it.
    pub(super) fn withdraw(&mut self, slot: SlotIndex) -> Option<OpKey> {
        let at = self.deferred.iter().position(|deferred| deferred.slot == slot)?;
        self.deferred.remove(at).map(|deferred| deferred.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(index: u32) -> OpKey {
        OpKey { index, generation: 0 }
    }

    #[test]
    fn a_named_port_waits_for_every_close_before_it_and_for_none_after() {
        let mut order = PortOrder::default();
        let (first, second) = (order.begin_close(), order.begin_close());
        order.defer(key(1), SlotIndex(1));
        let third = order.begin_close();
        order.end_close(second);
        assert_eq!(order.take_due(), None);
        order.end_close(first);
        assert_eq!(order.take_due(), Some(key(1)));
        order.defer(key(2), SlotIndex(2));
        assert_eq!(order.take_due(), None);
        assert!(order.is_closing());
        order.end_close(third);
        assert_eq!(order.take_due(), Some(key(2)));
        assert!(!order.is_closing());
    }

    #[test]
    fn a_withdrawn_bind_does_not_become_due() {
        let mut order = PortOrder::default();
        let close = order.begin_close();
        order.defer(key(1), SlotIndex(1));
        order.defer(key(2), SlotIndex(2));
        assert_eq!(order.withdraw(SlotIndex(1)), Some(key(1)));
        assert_eq!(order.withdraw(SlotIndex(1)), None);
        order.end_close(close);
        order.end_close(close);
        assert_eq!(order.take_due(), Some(key(2)));
        assert_eq!(order.take_due(), None);
    }
}
