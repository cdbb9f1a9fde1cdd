//! The operation table: who may touch an operation's memory, and whose completion this is.
//!
//! Plain data, so that a test can play the kernel: it reorders completions, repeats them, and
//! lets callers go before they are served.

use std::task::Waker;

use super::op::Op;
use super::send::SendOp;
use super::slots::SlotIndex;
use crate::error::Errno;

/// Names one operation: its place in the table and how often, modulo 2^32, the place was reused.
/// It travels through the kernel as `user_data`, so a late completion cannot reach a successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OpKey {
    index: u32,
    generation: u32,
}

impl OpKey {
    pub(crate) fn user_data(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    fn from_user_data(user_data: u64) -> Option<Self> {
        let index = u32::try_from(user_data & u64::from(u32::MAX)).ok()?;
        let generation = u32::try_from(user_data >> 32).ok()?;
        Some(Self { index, generation })
    }
}

/// How the completions of an operation turned out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// Completions before the first failure.
    pub(crate) succeeded: u32,
    /// Sum of their results: bytes, for sends.
    pub(crate) sum: u64,
    /// Result of the last of them, e.g. an installed descriptor.
    pub(crate) value: u32,
    /// The first failure. Those it cancelled are not failures of their own.
    pub(crate) error: Option<Errno>,
}

/// Who may touch an operation's memory.
enum OpState {
    /// Nobody: the place is free.
    Vacant,
    /// The kernel. A caller waits, or will.
    InKernel { op: Op, waker: Option<Waker> },
    /// The kernel. No caller waits, or none any more: the last completion frees the memory.
    Unclaimed { op: Op },
    /// We do: the last completion came, the caller has yet to fetch it.
    Done { op: Op },
}

struct Place {
    generation: u32,
    slot: SlotIndex,
    /// Completions still to come.
    pending: u32,
    outcome: Outcome,
    state: OpState,
}

#[derive(Default)]
pub(crate) struct OpTable {
    places: Vec<Place>,
    vacant: Vec<u32>,
}

/// What the last completion of an operation leads to.
pub(crate) enum Ended {
    /// The caller can fetch it; wake it.
    Fetchable(Option<Waker>),
    /// Nobody will fetch it: here is the memory, and what came of it.
    Unclaimed(Op, Outcome),
}

impl OpTable {
    /// Stores an operation that somebody waits for. Must come before its entries are pushed.
    pub(crate) fn insert(&mut self, op: Op, slot: SlotIndex) -> OpKey {
        self.occupy(slot, op.completions(), OpState::InKernel { op, waker: None })
    }

    /// Stores an operation that nobody waits for.
    pub(crate) fn insert_unclaimed(&mut self, op: Op, slot: SlotIndex) -> OpKey {
        self.occupy(slot, op.completions(), OpState::Unclaimed { op })
    }

    fn occupy(&mut self, slot: SlotIndex, pending: u32, state: OpState) -> OpKey {
        let outcome = Outcome::default();
        let index = self.vacant.pop().unwrap_or_else(|| {
            let place = Place { generation: 0, slot, pending, outcome, state: OpState::Vacant };
            self.places.push(place);
            u32::try_from(self.places.len() - 1).expect("fewer than 2^31 operations in flight")
        });
        let place = &mut self.places[index as usize];
        *place = Place { generation: place.generation, slot, pending, outcome, state };
        OpKey { index, generation: place.generation }
    }

    fn place(&mut self, key: OpKey) -> Option<&mut Place> {
        self.places
            .get_mut(key.index as usize)
            .filter(|place| place.generation == key.generation)
            .filter(|place| !matches!(place.state, OpState::Vacant))
    }

    /// The operation a completion belongs to, with its slot; `None` if it has ended.
    pub(crate) fn find(&mut self, user_data: u64) -> Option<(OpKey, SlotIndex, &Op)> {
        let key = OpKey::from_user_data(user_data)?;
        let place = self.place(key)?;
        match &place.state {
            OpState::InKernel { op, .. } | OpState::Unclaimed { op } => Some((key, place.slot, op)),
            OpState::Vacant | OpState::Done { .. } => None,
        }
    }

    /// A `send` that the kernel holds.
    pub(crate) fn send_mut(&mut self, key: OpKey) -> Option<&mut SendOp> {
        if let OpState::InKernel { op: Op::Send(send), .. } = &mut self.place(key)?.state {
            return Some(send);
        }
        None
    }

    /// Counts one completion. `Some` if it was the last: the operation, to be ended or restarted.
    pub(crate) fn count(&mut self, key: OpKey, result: i32) -> Option<(&mut Op, &mut Outcome)> {
        let place = self.place(key)?;
        match (u32::try_from(result), place.outcome.error) {
            (Ok(value), None) => {
                place.outcome.succeeded += 1;
                place.outcome.sum += u64::from(value);
                place.outcome.value = value;
            }
            // What was cancelled was so because of another failure, if there is one.
            (Err(_), None | Some(Errno(libc::ECANCELED))) => {
                place.outcome.error = Some(Errno(-result));
            }
            (_, Some(_)) => {}
        }
        place.pending = place.pending.saturating_sub(1);
        if place.pending > 0 {
            return None;
        }
        match &mut place.state {
            OpState::InKernel { op, .. } | OpState::Unclaimed { op } => {
                Some((op, &mut place.outcome))
            }
            // `find` answers neither, and `count` follows it.
            OpState::Vacant | OpState::Done { .. } => None,
        }
    }

    /// The rest of an operation will be pushed again.
    pub(crate) fn restart(&mut self, key: OpKey) {
        let Some(place) = self.place(key) else { return };
        if let OpState::InKernel { op, .. } | OpState::Unclaimed { op } = &place.state {
            place.pending = op.completions();
            place.outcome = Outcome { sum: place.outcome.sum, ..Outcome::default() };
        }
    }

    /// Ends an operation whose last completion was counted.
    pub(crate) fn end(&mut self, key: OpKey) -> Option<Ended> {
        let place = self.place(key)?;
        match std::mem::replace(&mut place.state, OpState::Vacant) {
            OpState::InKernel { op, waker } => {
                place.state = OpState::Done { op };
                Some(Ended::Fetchable(waker))
            }
            OpState::Unclaimed { op } => {
                let outcome = place.outcome;
                self.vacate(key);
                Some(Ended::Unclaimed(op, outcome))
            }
            done @ (OpState::Vacant | OpState::Done { .. }) => {
                place.state = done;
                None
            }
        }
    }

    /// Fetches an operation that is done; else registers the waker, if any, and returns `None`.
    pub(crate) fn fetch(&mut self, key: OpKey, waker: Option<&Waker>) -> Option<(Op, Outcome)> {
        let place = self.place(key)?;
        match std::mem::replace(&mut place.state, OpState::Vacant) {
            OpState::Done { op } => {
                let outcome = place.outcome;
                self.vacate(key);
                Some((op, outcome))
            }
            OpState::InKernel { op, waker: earlier } => {
                place.state = OpState::InKernel { op, waker: waker.cloned().or(earlier) };
                None
            }
            other @ (OpState::Unclaimed { .. } | OpState::Vacant) => {
                place.state = other;
                None
            }
        }
    }

    /// Whether an operation is done (or gone); else registers the waker.
    pub(crate) fn is_done(&mut self, key: OpKey, waker: &Waker) -> bool {
        let Some(Place { state: OpState::InKernel { waker: registered, .. }, .. }) =
            self.place(key)
        else {
            return true;
        };
        *registered = Some(waker.clone());
        false
    }

    /// The caller is gone. What the kernel still uses stays until its last completion; what is
    /// done already is returned.
    pub(crate) fn abandon(&mut self, key: OpKey) -> Option<(Op, Outcome)> {
        let place = self.place(key)?;
        match std::mem::replace(&mut place.state, OpState::Vacant) {
            OpState::Done { op } => {
                let outcome = place.outcome;
                self.vacate(key);
                Some((op, outcome))
            }
            OpState::InKernel { op, .. } | OpState::Unclaimed { op } => {
                place.state = OpState::Unclaimed { op };
                None
            }
            OpState::Vacant => None,
        }
    }

    /// Takes an operation back that was never pushed to the kernel.
    pub(crate) fn withdraw(&mut self, key: OpKey) {
        if self.place(key).is_some() {
            self.vacate(key);
        }
    }

    fn vacate(&mut self, key: OpKey) {
        let place = &mut self.places[key.index as usize];
        place.state = OpState::Vacant;
        place.generation = place.generation.wrapping_add(1);
        self.vacant.push(key.index);
    }

    /// Whether the kernel holds no operation.
    pub(crate) fn is_quiet(&self) -> bool {
        self.places
            .iter()
            .all(|place| matches!(place.state, OpState::Vacant | OpState::Done { .. }))
    }

    /// A view for tests that play the kernel: every operation it holds.
    #[cfg(test)]
    pub(super) fn held_by_kernel(&self) -> Vec<OpKey> {
        let held = |place: &&(usize, &Place)| {
            matches!(place.1.state, OpState::InKernel { .. } | OpState::Unclaimed { .. })
        };
        let key = |(index, place): (usize, &Place)| OpKey {
            index: u32::try_from(index).unwrap(),
            generation: place.generation,
        };
        self.places.iter().enumerate().filter(|place| held(&place)).map(key).collect()
    }

    /// The wakers of everybody who waits for the kernel.
    pub(crate) fn take_wakers(&mut self) -> Vec<Waker> {
        self.places
            .iter_mut()
            .filter_map(|place| match &mut place.state {
                OpState::InKernel { waker, .. } => waker.take(),
                OpState::Unclaimed { op: Op::Receive(inbox) } => inbox.take_waker(),
                OpState::Unclaimed { .. } | OpState::Vacant | OpState::Done { .. } => None,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::datagram::Outgoing;
    use crate::ring::send::SendOp;

    const SLOT: SlotIndex = SlotIndex(0);

    /// Counts a completion, and ends the operation if it was the last.
    fn complete(table: &mut OpTable, key: OpKey, result: i32) -> Option<Ended> {
        table.count(key, result)?;
        table.end(key)
    }

    /// A `send` of as many messages as datagrams: no two are of one size in a row.
    fn send_op(datagrams: usize) -> Op {
        let datagrams = (1..=datagrams).map(|len| Outgoing { payload: vec![0; len], to: None });
        let mut send = SendOp::new(datagrams.collect());
        send.plan(0);
        Op::Send(send)
    }

    #[test]
    fn late_completion_does_not_reach_the_places_next_user() {
        let mut table = OpTable::default();
        let first = table.insert(Op::Install, SLOT);
        assert!(complete(&mut table, first, 7).is_some());
        table.fetch(first, None).unwrap();
        let second = table.insert(Op::Install, SLOT);
        assert_eq!(first.index, second.index, "the place is reused");
        assert!(table.find(first.user_data()).is_none());
        assert!(complete(&mut table, first, 8).is_none());
        assert!(table.fetch(second, None).is_none(), "still in the kernel");
    }

    #[test]
    fn an_abandoned_operation_keeps_its_memory_until_the_last_completion() {
        let mut table = OpTable::default();
        let key = table.insert(Op::Install, SLOT);
        assert!(table.abandon(key).is_none());
        assert!(!table.is_quiet());
        let Some(Ended::Unclaimed(Op::Install, outcome)) = complete(&mut table, key, 9) else {
            panic!("the result must come back, for somebody has to close descriptor 9");
        };
        assert_eq!(outcome.value, 9);
        assert!(table.is_quiet());
    }

    /// What the seeded test knows of an operation the kernel holds.
    struct Model {
        results: Vec<i32>,
        abandoned: bool,
    }

    proptest! {
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
                            Model { results: vec![], abandoned: false },
                        ));
                    }
                    1 if !held.is_empty() => {
                        let at = index.index(held.len());
                        let (key, model) = &mut held[at];
                        let (found, _, op) = table.find(key.user_data()).expect("in the kernel");
                        prop_assert_eq!(found, *key);
                        let expected = op.completions() as usize;
                        model.results.push(value);
                        let ended = complete(&mut table, *key, value);
                        prop_assert_eq!(ended.is_some(), model.results.len() == expected);
                        if ended.is_some() {
                            let (key, model) = held.swap_remove(at);
                            let outcome = match ended {
                                Some(Ended::Unclaimed(_, outcome)) => {
                                    prop_assert!(model.abandoned);
                                    outcome
                                }
                                Some(Ended::Fetchable(_)) | None => {
                                    prop_assert!(!model.abandoned);
                                    table.fetch(key, None).unwrap().1
                                }
                            };
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
                        prop_assert!(table.abandon(*key).is_none());
                        model.abandoned = true;
                    }
                    3 if !stale.is_empty() => {
                        let key = stale[index.index(stale.len())];
                        prop_assert!(table.find(key.user_data()).is_none());
                        prop_assert!(complete(&mut table, key, value).is_none());
                    }
                    _ => {}
                }
            }
            prop_assert_eq!(table.is_quiet(), held.is_empty());
        }
    }
}
