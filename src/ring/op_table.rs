//! The operation table: who may touch an operation's memory, whose completion this is, and how many
//! operations each slot has in the kernel.
//!
//! Plain data, so that a test can play the kernel: it reorders completions, repeats them, and
//! detaches operations before they are done.

use std::task::Waker;

use super::op::{Op, OpResult, Outcome};
use super::queues::{OpKey, SlotIndex};
use crate::error::Errno;

/// Who may touch an operation's memory.
enum OpState {
    /// No owner: the entry is free.
    Vacant,
    /// The kernel, once it is queued (a bind that waits for closes is not). A caller waits, or will.
    InKernel { op: Op, waker: Option<Waker> },
    /// The kernel. No caller is left: the last completion frees the memory.
    Detached { op: Op },
    /// It is freed: the last completion came, and the caller has yet to take the result.
    Done { result: OpResult },
}

struct Entry {
    generation: u32,
    slot: SlotIndex,
    /// Completions still to come.
    pending: u32,
    outcome: Outcome,
    state: OpState,
}

/// Operations on a slot that have not had their last completion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct SlotOps {
    pub(super) all: u32,
    /// Those of them that are sends.
    pub(super) sends: u32,
}

#[derive(Default)]
pub(super) struct OpTable {
    entries: Vec<Entry>,
    vacant: Vec<u32>,
    /// By slot.
    in_flight: Vec<SlotOps>,
}

/// What the last completion of an operation leads to.
pub(super) enum Ended {
    /// The caller can take the result; wake its task.
    Awaited(Option<Waker>),
    /// No caller takes it.
    Detached(OpResult),
}

impl OpTable {
    /// Stores an operation that a caller waits for. Must come before its entries are queued: from
    /// here until its last completion its memory is the kernel's.
    pub(super) fn insert(&mut self, op: Op, slot: SlotIndex) -> OpKey {
        self.occupy(slot, OpState::InKernel { op, waker: None })
    }

    /// As `insert`, of an operation without a caller.
    pub(super) fn insert_detached(&mut self, op: Op, slot: SlotIndex) -> OpKey {
        self.occupy(slot, OpState::Detached { op })
    }

    fn occupy(&mut self, slot: SlotIndex, state: OpState) -> OpKey {
        let (OpState::InKernel { op, .. } | OpState::Detached { op }) = &state else {
            unreachable!("an operation is stored before it is in the kernel");
        };
        let (pending, is_send) = (op.completions(), op.is_send());
        if self.in_flight.len() <= slot.at() {
            self.in_flight.resize(slot.at() + 1, SlotOps::default());
        }
        let in_flight = &mut self.in_flight[slot.at()];
        in_flight.all += 1;
        in_flight.sends += u32::from(is_send);
        let outcome = Outcome::default();
        let index = self.vacant.pop().unwrap_or_else(|| {
            let vacant = OpState::Vacant;
            self.entries.push(Entry { generation: 0, slot, pending, outcome, state: vacant });
            u32::try_from(self.entries.len() - 1).expect("fewer than 2^31 operations in flight")
        });
        let entry = &mut self.entries[index as usize];
        *entry = Entry { generation: entry.generation, slot, pending, outcome, state };
        OpKey { index, generation: entry.generation }
    }

    fn entry(&mut self, key: OpKey) -> Option<&mut Entry> {
        self.entries
            .get_mut(key.index as usize)
            .filter(|entry| entry.generation == key.generation)
            .filter(|entry| !matches!(entry.state, OpState::Vacant))
    }

    /// An operation in the kernel, with its slot; `None` if it has ended.
    pub(super) fn find(&mut self, key: OpKey) -> Option<(SlotIndex, &mut Op)> {
        let entry = self.entry(key)?;
        match &mut entry.state {
            OpState::InKernel { op, .. } | OpState::Detached { op } => Some((entry.slot, op)),
            OpState::Vacant | OpState::Done { .. } => None,
        }
    }

    /// Operations of a slot in the kernel.
    pub(super) fn in_flight(&self, slot: SlotIndex) -> SlotOps {
        self.in_flight.get(slot.at()).copied().unwrap_or_default()
    }

    /// The sends of these slots, which are in the order of their numbers.
    pub(super) fn sends(&self, slots: &[SlotIndex]) -> Vec<OpKey> {
        let is_send = |entry: &Entry| {
            slots.binary_search_by_key(&entry.slot.0, |slot| slot.0).is_ok()
                && matches!(&entry.state,
                    OpState::InKernel { op, .. } | OpState::Detached { op } if op.is_send())
        };
        self.keys(is_send)
    }

    fn keys(&self, is_meant: impl Fn(&Entry) -> bool) -> Vec<OpKey> {
        (0..)
            .zip(&self.entries)
            .filter(|(_, entry)| is_meant(entry))
            .map(|(index, entry)| OpKey { index, generation: entry.generation })
            .collect()
    }

    /// Counts one completion. `Some` if it was the last: the operation is to be ended or restarted.
    pub(super) fn count(&mut self, key: OpKey, result: i32) -> Option<Outcome> {
        self.find(key)?;
        let entry = self.entry(key)?;
        match (u32::try_from(result), entry.outcome.error) {
            (Ok(value), None) => {
                entry.outcome.succeeded += 1;
                entry.outcome.sum += u64::from(value);
                entry.outcome.value = value;
            }
            // An entry of the chain is cancelled because another failed; that one's error counts.
            (Err(_), None | Some(Errno(libc::ECANCELED))) => {
                entry.outcome.error = Some(Errno(-result));
            }
            (_, Some(_)) => {}
        }
        entry.pending = entry.pending.saturating_sub(1);
        (entry.pending == 0).then_some(entry.outcome)
    }

    /// The rest of an operation will be queued again: its memory is the kernel's once more.
    pub(super) fn restart(&mut self, key: OpKey) {
        let Some(entry) = self.entry(key) else { return };
        if let OpState::InKernel { op, .. } | OpState::Detached { op } = &entry.state {
            entry.pending = op.completions();
            entry.outcome = Outcome { sum: entry.outcome.sum, ..Outcome::default() };
        }
    }

    /// Ends an operation whose last completion was counted, and frees its memory.
    pub(super) fn end(&mut self, key: OpKey, result: OpResult) -> Option<Ended> {
        let entry = self.entry(key)?;
        let state = std::mem::replace(&mut entry.state, OpState::Vacant);
        let (slot, is_send, ended) = match state {
            OpState::InKernel { op, waker } => {
                entry.state = OpState::Done { result };
                (entry.slot, op.is_send(), Ended::Awaited(waker))
            }
            OpState::Detached { op } => {
                let slot = entry.slot;
                self.vacate(key);
                (slot, op.is_send(), Ended::Detached(result))
            }
            ended @ (OpState::Vacant | OpState::Done { .. }) => {
                entry.state = ended;
                return None;
            }
        };
        self.count_out(slot, is_send);
        Some(ended)
    }

    fn count_out(&mut self, slot: SlotIndex, is_send: bool) {
        let in_flight = &mut self.in_flight[slot.at()];
        in_flight.all -= 1;
        in_flight.sends -= u32::from(is_send);
    }

    /// Takes the result of an operation that is done.
    pub(super) fn take_result(&mut self, key: OpKey) -> Option<OpResult> {
        let entry = self.entry(key)?;
        match std::mem::replace(&mut entry.state, OpState::Vacant) {
            OpState::Done { result } => {
                self.vacate(key);
                Some(result)
            }
            other @ (OpState::InKernel { .. } | OpState::Detached { .. } | OpState::Vacant) => {
                entry.state = other;
                None
            }
        }
    }

    /// Registers the task that the end of the operation is to wake. The waker that is returned has
    /// no use any more: the one registered before, or this one if the operation has ended.
    pub(super) fn register(&mut self, key: OpKey, waker: Waker) -> Registered {
        let Some(Entry { state: OpState::InKernel { waker: registered, .. }, .. }) =
            self.entry(key)
        else {
            return Registered { has_ended: true, unused: Some(waker) };
        };
        Registered { has_ended: false, unused: registered.replace(waker) }
    }

    /// The caller is gone. The kernel keeps the memory until the last completion. Returned is what
    /// the caller's side owned, to be dropped outside of the driver's lock.
    pub(super) fn detach(&mut self, key: OpKey) -> Leftover {
        let Some(entry) = self.entry(key) else { return Leftover::default() };
        match std::mem::replace(&mut entry.state, OpState::Vacant) {
            OpState::Done { result } => {
                self.vacate(key);
                Leftover { result: Some(result), waker: None }
            }
            OpState::InKernel { op, waker } => {
                entry.state = OpState::Detached { op };
                Leftover { result: None, waker }
            }
            other @ (OpState::Detached { .. } | OpState::Vacant) => {
                entry.state = other;
                Leftover::default()
            }
        }
    }

    /// Takes an operation back that was never queued.
    pub(super) fn withdraw(&mut self, key: OpKey) {
        let Some((slot, is_send)) = self.find(key).map(|(slot, op)| (slot, op.is_send())) else {
            return;
        };
        self.vacate(key);
        self.count_out(slot, is_send);
    }

    fn vacate(&mut self, key: OpKey) {
        let entry = &mut self.entries[key.index as usize];
        entry.state = OpState::Vacant;
        entry.generation = entry.generation.wrapping_add(1);
        self.vacant.push(key.index);
    }

    /// Whether the kernel holds no operation.
    pub(super) fn is_quiet(&self) -> bool {
        self.entries
            .iter()
            .all(|entry| matches!(entry.state, OpState::Vacant | OpState::Done { .. }))
    }

    /// For tests that play the kernel: every operation it holds.
    #[cfg(test)]
    pub(super) fn in_kernel(&self) -> Vec<OpKey> {
        self.keys(|entry| {
            matches!(entry.state, OpState::InKernel { .. } | OpState::Detached { .. })
        })
    }

    /// The wakers of all tasks that wait for the kernel.
    pub(super) fn take_wakers(&mut self) -> Vec<Waker> {
        self.entries
            .iter_mut()
            .filter_map(|entry| match &mut entry.state {
                OpState::InKernel { waker, .. } => waker.take(),
                OpState::Detached { op: Op::Receive(queue) } => queue.take_waker(),
                OpState::Detached { .. } | OpState::Vacant | OpState::Done { .. } => None,
            })
            .collect()
    }
}

/// What came of a registration.
#[must_use = "a waker is dropped outside of the driver's lock"]
pub(crate) struct Registered {
    /// The result can be taken, or was: no waker is called.
    pub(crate) has_ended: bool,
    pub(crate) unused: Option<Waker>,
}

/// What a caller that is gone has left.
#[derive(Default)]
#[must_use = "it is dropped outside of the driver's lock"]
pub(crate) struct Leftover {
    pub(crate) result: Option<OpResult>,
    pub(crate) waker: Option<Waker>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::datagram::Outgoing;
    use crate::ring::op::Output;
    use crate::ring::send::SendOp;

    const SLOT: SlotIndex = SlotIndex(0);

    /// Counts a completion, and ends the operation if it was the last.
    fn complete(table: &mut OpTable, key: OpKey, result: i32) -> Option<(Ended, Outcome)> {
        let outcome = table.count(key, result)?;
        let result = outcome.error.map_or(Ok(Output::Done), Err);
        table.end(key, result).map(|ended| (ended, outcome))
    }

    /// A `send` of as many messages as datagrams: no two are of one size in a row.
    fn send_op(datagrams: usize) -> Op {
        let datagrams = (1..=datagrams).map(|len| Outgoing { payload: vec![0; len], to: None });
        let mut send = SendOp::new(datagrams.collect());
        send.plan(0);
        Op::Send(send)
    }

    #[test]
    fn late_completion_does_not_reach_the_entrys_next_user() {
        let mut table = OpTable::default();
        let first = table.insert(Op::Install, SLOT);
        assert!(complete(&mut table, first, 7).is_some());
        table.take_result(first).unwrap().unwrap();
        let second = table.insert(Op::Install, SLOT);
        assert_eq!(first.index, second.index, "the entry is reused");
        assert!(table.find(first).is_none());
        assert!(complete(&mut table, first, 8).is_none());
        assert!(table.take_result(second).is_none(), "still in the kernel");
    }

    #[test]
    fn a_detached_operation_keeps_its_memory_until_the_last_completion() {
        let mut table = OpTable::default();
        let key = table.insert(Op::Install, SLOT);
        assert!(table.detach(key).result.is_none());
        assert!(!table.is_quiet());
        let (ended, outcome) = complete(&mut table, key, 9).unwrap();
        assert!(matches!(ended, Ended::Detached(Ok(_))), "the ring must close descriptor 9");
        assert_eq!(outcome.value, 9);
        assert!(table.is_quiet());
    }

    /// What the seeded test knows of an operation the kernel holds.
    struct Model {
        results: Vec<i32>,
        detached: bool,
    }

    proptest! {
        #![proptest_config(crate::regressions("tests/proptest-regressions/op_table.txt"))]

        // The test plays the kernel: completions in any order, callers that leave at any time,
        // stale completions in between. Proptest prints the seed of a failing run.
        #[test]
        fn outcomes_reach_their_callers_whatever_the_order(
            steps in proptest::collection::vec((0_u8..4, any::<prop::sample::Index>(), -5_i32..5), 1..200)
        ) {
            let mut table = OpTable::default();
            let mut held: Vec<(OpKey, Model)> = Vec::new();
            let mut stale: Vec<OpKey> = Vec::new();
            for (action, index, value) in steps {
                match action {
                    0 => {
                        let datagrams = usize::try_from(value.rem_euclid(3) + 1).unwrap();
                        let op = send_op(datagrams);
                        held.push((
                            table.insert(op, SLOT),
                            Model { results: vec![], detached: false },
                        ));
                    }
                    1 if !held.is_empty() => {
                        let at = index.index(held.len());
                        let (key, model) = &mut held[at];
                        let (_, op) = table.find(*key).expect("in the kernel");
                        let expected = op.completions() as usize;
                        model.results.push(value);
                        let ended = complete(&mut table, *key, value);
                        prop_assert_eq!(ended.is_some(), model.results.len() == expected);
                        if ended.is_some() {
                            let (key, model) = held.swap_remove(at);
                            let (ended, outcome) = ended.unwrap();
                            prop_assert_eq!(matches!(ended, Ended::Detached(_)), model.detached);
                            let result = match ended {
                                Ended::Detached(result) => result,
                                Ended::Awaited(_) => table.take_result(key).unwrap(),
                            };
                            prop_assert_eq!(result.err(), outcome.error);
                            let ok = model.results.iter().take_while(|result| **result >= 0);
                            prop_assert_eq!(outcome.succeeded as usize, ok.count());
                            let first = model.results.iter().find(|result| **result < 0);
                            prop_assert_eq!(outcome.error, first.map(|result| Errno(-result)));
                            stale.push(key);
                        }
                    }
                    2 if !held.is_empty() => {
                        let at = index.index(held.len());
                        let (key, model) = &mut held[at];
                        prop_assert!(table.detach(*key).result.is_none());
                        model.detached = true;
                    }
                    3 if !stale.is_empty() => {
                        let key = stale[index.index(stale.len())];
                        prop_assert!(table.find(key).is_none());
                        prop_assert!(complete(&mut table, key, value).is_none());
                    }
                    _ => {}
                }
            }
            prop_assert_eq!(table.is_quiet(), held.is_empty());
            let held = u32::try_from(held.len()).unwrap();
            prop_assert_eq!(table.in_flight(SLOT), SlotOps { all: held, sends: held });
        }
    }
}
