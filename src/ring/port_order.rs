//! Closes on their way, and the binds that wait for what they give up.
//!
//! A port is free after the completion of the close that gives it up, and not before: a bind to it in
//! the same submission fails. A bind is submitted all the same, because most want another port. One
//! that the kernel refuses for want of a port, while closes were on their way that may hold it, is
//! tried once more when those have ended, or when it has waited for long enough: one that a thread
//! holds up must not hold up the binds of others.

use std::collections::VecDeque;
use std::num::NonZeroU16;
use std::time::Instant;

use super::queues::{OpKey, SlotIndex};
use crate::datagram::Family;
use crate::limits::BIND_PATIENCE;

/// Names a close. Numbers grow in the order in which closes begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct CloseId(u64);

/// What a bind asks for, or a close gives up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Port {
    pub(crate) family: Family,
    /// `None` where the kernel chooses it, or has chosen it.
    pub(crate) number: Option<NonZeroU16>,
}

impl Port {
    /// Whether two may be the same, as far as it can be told.
    fn may_be(self, other: Self) -> bool {
        let is_chosen = self.number.is_none() || other.number.is_none();
        self.family == other.family && (is_chosen || self.number == other.number)
    }
}

/// A bind that the kernel has refused once, stored in the operation table and not queued again.
#[derive(Debug)]
struct Waiting {
    key: OpKey,
    slot: SlotIndex,
    port: Port,
    /// It waits for closes older than this one, of which so many go on.
    closes_before: CloseId,
    left: usize,
    /// When it waits no longer.
    until: Instant,
}

#[derive(Debug, Default)]
pub(crate) struct PortOrder {
    /// Number of the oldest close that goes on.
    oldest: u64,
    /// From `oldest` on: what each is giving up, and since when; `None` once it has.
    closes: VecDeque<Option<(Port, Instant)>>,
    waiting: VecDeque<Waiting>,
}

impl PortOrder {
    pub(crate) fn begin_close(&mut self, port: Port, now: Instant) -> CloseId {
        let close = self.next();
        self.closes.push_back(Some((port, now)));
        close
    }

    fn at(&self, CloseId(close): CloseId) -> Option<usize> {
        usize::try_from(close.checked_sub(self.oldest)?).ok()
    }

    /// A close has given up its port, or has none to give up. May be called more than once.
    pub(crate) fn end_close(&mut self, close: CloseId) {
        let Some(at) = self.at(close) else { return };
        let Some((port, _)) = self.closes.get_mut(at).and_then(Option::take) else { return };
        for bind in &mut self.waiting {
            if close < bind.closes_before && bind.port.may_be(port) {
                bind.left -= 1;
            }
        }
        while let Some(None) = self.closes.front() {
            self.closes.pop_front();
            self.oldest += 1;
        }
    }

    /// The number that the next close will have.
    fn next(&self) -> CloseId {
        CloseId(self.oldest + self.closes.len() as u64)
    }

    /// The oldest close that goes on, and since when.
    pub(crate) fn oldest(&self) -> Option<(CloseId, Instant)> {
        let (_, begun) = (*self.closes.front()?)?;
        Some((CloseId(self.oldest), begun))
    }

    /// Whether a close goes on.
    pub(crate) fn is_closing(&self) -> bool {
        !self.closes.is_empty()
    }

    pub(crate) fn has_ended(&self, close: CloseId) -> bool {
        self.at(close).is_none_or(|at| matches!(self.closes.get(at), Some(None)))
    }

    /// Has a bind wait for the closes that go on now and may hold its port, of which there may be none.
    pub(super) fn wait(&mut self, key: OpKey, slot: SlotIndex, port: Port, now: Instant) {
        let left = self.closes.iter().flatten().filter(|(close, _)| port.may_be(*close)).count();
        let closes_before = self.next();
        let until = now + BIND_PATIENCE;
        self.waiting.push_back(Waiting { key, slot, port, closes_before, left, until });
    }

    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Lets no bind wait beyond its time.
    pub(super) fn expire(&mut self, now: Instant) {
        for bind in self.waiting.iter_mut().filter(|bind| bind.until <= now) {
            bind.left = 0;
        }
    }

    /// A bind that waits for nothing any more: it is to be queued now.
    pub(super) fn take_due(&mut self) -> Option<OpKey> {
        let at = self.waiting.iter().position(|bind| bind.left == 0)?;
        self.waiting.remove(at).map(|bind| bind.key)
    }

    /// For tests: whether this bind waits.
    #[cfg(test)]
    pub(super) fn keeps(&self, key: OpKey) -> bool {
        self.waiting.iter().any(|bind| bind.key == key)
    }

    /// The waiting bind of a slot whose guest has dropped it.
    pub(super) fn withdraw(&mut self, slot: SlotIndex) -> Option<OpKey> {
        let at = self.waiting.iter().position(|bind| bind.slot == slot)?;
        self.waiting.remove(at).map(|bind| bind.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(index: u32) -> OpKey {
        OpKey { index, generation: 0 }
    }

    fn port(family: Family, number: u16) -> Port {
        Port { family, number: NonZeroU16::new(number) }
    }

    const CHOSEN: Port = Port { family: Family::V4, number: None };

    impl PortOrder {
        fn waits(&mut self, index: u32, port: Port, now: Instant) {
            self.wait(key(index), SlotIndex(index), port, now);
        }
    }

    #[test]
    fn a_bind_waits_for_every_close_that_may_hold_its_port_and_for_no_other() {
        let mut order = PortOrder::default();
        let mine = port(Family::V4, 53);
        let others = [port(Family::V4, 54), port(Family::V6, 53), port(Family::V6, 0)]
            .map(|other| order.begin_close(other, Instant::now()));
        order.waits(1, mine, Instant::now());
        assert_eq!(order.take_due(), Some(key(1)), "no close may hold it");

        let (first, second) =
            (order.begin_close(mine, Instant::now()), order.begin_close(CHOSEN, Instant::now()));
        order.waits(2, mine, Instant::now());
        let third = order.begin_close(mine, Instant::now());
        order.end_close(second);
        assert_eq!(order.take_due(), None);
        order.end_close(first);
        order.end_close(first);
        assert_eq!(order.take_due(), Some(key(2)), "it does not wait for a close after it");

        order.waits(3, CHOSEN, Instant::now());
        for other in others {
            order.end_close(other);
            assert_eq!(order.take_due(), None);
        }
        assert!(order.is_closing() && !order.has_ended(third));
        order.end_close(third);
        assert!(!order.is_closing() && order.has_ended(third));
        assert_eq!(order.take_due(), Some(key(3)), "any of its family may leave it a port");
    }

    /// Kills: closes that are overdue one after the other, each from when the one before has ended.
    #[test]
    fn each_close_goes_on_since_it_has_begun() {
        let mut order = PortOrder::default();
        let (now, later) = (Instant::now(), Instant::now() + BIND_PATIENCE);
        let first = order.begin_close(CHOSEN, now);
        let second = order.begin_close(CHOSEN, later);
        assert_eq!(order.oldest(), Some((first, now)));
        order.end_close(first);
        assert_eq!(order.oldest(), Some((second, later)));
        order.end_close(second);
        assert_eq!(order.oldest(), None);
    }

    #[test]
    fn a_close_that_is_held_up_holds_no_bind_up_for_long() {
        let mut order = PortOrder::default();
        let close = order.begin_close(CHOSEN, Instant::now());
        let now = Instant::now();
        order.waits(1, CHOSEN, now);
        order.expire(now);
        assert_eq!(order.take_due(), None);
        order.expire(now + BIND_PATIENCE);
        assert_eq!(order.take_due(), Some(key(1)));
        assert_eq!(order.take_due(), None);
        order.end_close(close);
    }

    #[test]
    fn a_withdrawn_bind_does_not_become_due() {
        let mut order = PortOrder::default();
        let close = order.begin_close(CHOSEN, Instant::now());
        order.waits(1, CHOSEN, Instant::now());
        order.waits(2, CHOSEN, Instant::now());
        assert_eq!(order.withdraw(SlotIndex(1)), Some(key(1)));
        assert_eq!(order.withdraw(SlotIndex(1)), None);
        order.end_close(close);
        assert_eq!(order.take_due(), Some(key(2)));
        assert_eq!(order.take_due(), None);
    }
}
