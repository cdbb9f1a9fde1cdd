//! Recycled sockets, behind one door: a closed one that leaves no trace is another guest's next.
//!
//! A kernel socket costs more to make and to free than everything else in a short life. One that its
//! taint allows is therefore not closed but unbound (CONNECT with `AF_UNSPEC`), and becomes another
//! guest's when that guest cannot distinguish it from a new one:
//!
//! 1. *unbound*: no packet that arrives from now on finds it;
//! 2. *quarantined* until an RCU grace period is over, because the kernel looks a socket up and
//!    delivers to it within one read-side section: no packet that had found it before is on its way
//!    any more;
//! 3. *drained*: datagrams and errors that were queued in it are received and dropped, until nothing
//!    is left;
//! 4. *ready*: the next bind to port 0 takes it.
//!
//! A socket that does not behave on the way is closed. The ring calls `release` when a guest drops a
//! socket, `completed` when the last operation on such a socket has ended, `tick` before it
//! enters the kernel, `acquire` for a bind, and `close_all`; it knows no stage. The stages are
//! `pool`'s, grace periods `rcu`'s; `self_test` shows on the running kernel whether all this works
//! before a ring relies on it.

pub(crate) mod pool;
pub(crate) mod rcu;
pub(crate) mod self_test;
pub(crate) mod taint;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use self::pool::{Cached, Drained, Pools, Recycle};
use self::rcu::{Rcu, RcuEvent};
use self::self_test::{FamilySupport, Support};
use self::taint::{Reason, Taint};
use super::op::{Op, OpResult, SocketMemory};
use super::queues::SlotIndex;
use crate::datagram::Family;
use crate::error::Errno;
use crate::limits::{RETEST_INTERVAL, TICK_BATCH};
use crate::stats::ClosedInstead;

/// What the ring is to do with a slot after the last operation on its socket.
pub(super) enum Next {
    /// Nothing: the socket is cached.
    Keep,
    /// Submit this.
    Submit(Op),
    /// The socket is not to be cached: close it as its owner would have.
    Refuse,
    /// The socket is closed; the slot is free.
    Free,
}

/// The cached sockets of one ring.
pub(super) struct Recycler {
    support: Support,
    pools: Pools,
    rcu: Rcu,
    retest: Retest,
    /// A grace period has begun of which the driver has not heard.
    has_begun: bool,
    warning: Option<&'static str>,
}

/// The self-test of a family that could not be tested when the ring was built.
#[derive(Default)]
struct Retest {
    is_running: bool,
    /// Not before.
    next: Option<Instant>,
    outcome: Arc<Mutex<Option<Support>>>,
}

impl Recycler {
    pub(super) fn new(limits: Recycle, support: Support, rcu: Rcu) -> Self {
        let pools = Pools::new(limits);
        Self { support, pools, rcu, retest: Retest::default(), has_begun: false, warning: None }
    }

    /// Slots that cached sockets may need beside those of the guests.
    pub(super) fn slots(&self) -> u64 {
        self.pools.limits().quarantined_max.into()
    }

    // ---- the door ---------------------------------------------------------------------------

    /// A guest has dropped a socket. `Some` if it is cached: the operation to submit. `is_busy`:
    /// other operations go on than a receive that is being cancelled, and so it is closed.
    pub(super) fn release(&mut self, slot: SlotIndex, taint: Taint, is_busy: bool) -> Option<Op> {
        if self.pools.limits().quarantined_max == 0 {
            return None;
        }
        let also_connected = match self.support.of(taint.family) {
            FamilySupport::Works { also_connected } => *also_connected,
            FamilySupport::Untested(_) => {
                self.test_again();
                return None;
            }
            FamilySupport::Unsupported(_) | FamilySupport::NoFamily => return None,
        };
        let reason = taint
            .reason
            .or((taint.has_connected && !also_connected).then_some(Reason::Connected))
            .or(is_busy.then_some(Reason::Busy));
        if let Some(reason) = reason {
            self.pools.count(reason);
            return None;
        }
        let is_admitted = self.pools.admit(slot, taint);
        is_admitted.then_some(Op::Unbind)
    }

    /// The last operation on a slot that no guest owns has ended, with this result.
    pub(super) fn completed(&mut self, slot: SlotIndex, taint: Taint, result: &OpResult) -> Next {
        match self.pools.stage(slot) {
            Some(Cached::Unbinding) => {
                if let Some(reason) = taint.reason {
                    self.pools.forget(slot);
                    self.pools.count(reason);
                    return Next::Refuse;
                }
                if self.support.is_any() {
                    self.pools.unbound(slot, taint);
                } else {
                    // Grace periods have failed while it was being unbound.
                    self.pools.evict_unbound(slot, taint, Reason::Unclean);
                }
                Next::Keep
            }
            Some(Cached::Draining { .. }) => {
                let is_empty = matches!(result, Err(Errno(libc::EAGAIN)));
                match self.pools.drained(slot, taint, is_empty) {
                    Drained::Again => Next::Submit(drain(true)),
                    Drained::Ready => Next::Keep,
                    Drained::Close => Next::Submit(Op::Close),
                }
            }
            Some(Cached::Closing) => {
                self.pools.forget(slot);
                Next::Free
            }
            // It was closed and not cached.
            None => Next::Free,
            Some(
                Cached::AwaitingGrace
                | Cached::InGrace
                | Cached::Undrained
                | Cached::Ready
                | Cached::Evicting,
            ) => unreachable!("no operation is submitted in this stage"),
        }
    }

    /// A ready socket for a bind to port 0 that sets the source address, or does not.
    pub(super) fn acquire(&mut self, family: Family, sets_source: bool) -> Option<SlotIndex> {
        self.pools.take_ready(family, sets_source)
    }

    /// A cached socket's slot, for a bind that finds no free one: the socket is to be closed.
    pub(super) fn evict(&mut self) -> Option<SlotIndex> {
        self.pools.evict()
    }

    /// Begins a grace period for the sockets that await one, unless one goes on.
    pub(super) fn begin_grace(&mut self) {
        if self.pools.begin_grace() {
            self.has_begun = true;
            self.rcu.begin_grace();
        }
    }

    /// Moves cached sockets on: into a grace period, out of it, and out of the way. What is to be
    /// submitted for them is appended to `ops`.
    pub(super) fn tick(&mut self, ops: &mut Vec<(SlotIndex, Op)>) {
        match self.rcu.take_event() {
            Some(RcuEvent::GraceOver) => self.pools.end_grace(),
            Some(RcuEvent::TimerExpired) => self.pools.idle(),
            Some(RcuEvent::TaskOver) => self.is_tested_again(),
            Some(RcuEvent::Failed) => {
                const WARNING: &str =
                    "no RCU grace periods: closed sockets are not recycled any more";
                self.support = Support::none(WARNING);
                self.warning = Some(WARNING);
                self.pools.evict_all(Reason::Unclean);
            }
            None => {}
        }
        self.begin_grace();
        if self.pools.len() == 0 {
            return;
        }
        self.rcu.set_timer(self.pools.limits().idle);
        for _ in 0..TICK_BATCH {
            let Some(slot) = self.pools.next_to_close() else { break };
            ops.push((slot, Op::Close));
        }
        for _ in 0..TICK_BATCH {
            let Some((slot, taint)) = self.pools.next_to_drain() else { break };
            ops.push((slot, drain(taint.may_be_sending)));
        }
    }

    /// Closes the sockets that are cached now, a batch with each tick.
    pub(super) fn close_all(&mut self) {
        self.pools.evict_all(Reason::Idle);
    }

    /// In a fork: the thread is the parent's, and a lock of the channel to it may be held for ever.
    pub(super) fn abandon(&mut self) {
        self.rcu.abandon();
    }

    /// Something to log, once.
    pub(super) fn take_warning(&mut self) -> Option<&'static str> {
        self.warning.take()
    }

    // ---- self-test --------------------------------------------------------------------------

    /// Has the thread of the grace periods run the self-test, now and then.
    fn test_again(&mut self) {
        let Retest { is_running, next, outcome } = &mut self.retest;
        if *is_running || next.is_some_and(|next| Instant::now() < next) {
            return;
        }
        *is_running = true;
        let outcome = Arc::clone(outcome);
        self.rcu.run(Box::new(move || {
            let support = self_test::support();
            *outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(support);
        }));
    }

    fn is_tested_again(&mut self) {
        self.retest.is_running = false;
        self.retest.next = Some(Instant::now() + RETEST_INTERVAL);
        let outcome = self.retest.outcome.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(support) = outcome {
            self.support = support;
        }
    }

    // ---- figures ----------------------------------------------------------------------------

    /// Whether the thread of the grace periods has something for the next tick.
    pub(super) fn has_event(&self) -> bool {
        self.rcu.has_event()
    }

    /// Whether the next tick submits something.
    pub(super) fn has_work(&self) -> bool {
        self.pools.has_work()
    }

    pub(super) fn take_begun_grace(&mut self) -> bool {
        std::mem::take(&mut self.has_begun)
    }

    /// Whether sockets are on their way to be drained.
    pub(super) fn is_quarantining(&self) -> bool {
        self.pools.is_quarantining()
    }

    pub(super) fn closed_instead(&self) -> ClosedInstead {
        self.pools.closed_instead()
    }

    pub(super) fn len(&self) -> u64 {
        self.pools.len() as u64
    }

    #[cfg(test)]
    pub(super) fn has_ready(&self) -> bool {
        self.pools.has_ready()
    }

    #[cfg(test)]
    pub(super) fn is_quiet(&self) -> bool {
        self.rcu.is_quiet()
    }
}

/// Receives and drops; and measures whether everything is sent, and how much is left.
fn drain(measures: bool) -> Op {
    Op::Drain(measures.then(|| Box::new(SocketMemory::unknown())))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ring::eventfd::EventFd;
    use crate::ring::op::Output;
    use crate::ring::share::Share;
    use crate::ring::slots::{SlotState, SlotTable};

    fn recycler(quarantined_max: u32, ready_max: u32) -> Recycler {
        let limits = Recycle { quarantined_max, ready_max, ..Recycle::OFF };
        let support = Support {
            v4: FamilySupport::Works { also_connected: true },
            v6: FamilySupport::Works { also_connected: false },
        };
        Recycler::new(limits, support, Rcu::new(EventFd::new().unwrap()))
    }

    #[test]
    fn what_could_leave_a_trace_is_closed_and_counted_by_its_reason() {
        let mut recycler = recycler(1, 1);
        let mut release = |taint, is_busy| recycler.release(SlotIndex(0), taint, is_busy).is_some();
        let marked = |reason| {
            let mut taint = Taint::new(Family::V4);
            taint.mark(reason);
            taint
        };
        let connected = |family| {
            let mut taint = Taint::new(family);
            taint.connect();
            taint
        };
        for reason in [Reason::NamedPort, Reason::Options, Reason::Error] {
            assert!(!release(marked(reason), false));
        }
        assert!(!release(connected(Family::V6), false));
        assert!(!release(Taint::new(Family::V4), true));
        assert!(release(connected(Family::V4), false));
        assert!(!release(Taint::new(Family::V4), false), "one is in quarantine");
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

    proptest! {
        #![proptest_config(crate::regressions("tests/proptest-regressions/recycle.txt"))]

        /// Kills: more in quarantine, drained and closed than there are slots for; a slot given to
        /// two.
        #[test]
        fn a_guest_with_a_unit_of_the_quota_finds_a_slot_whatever_is_cached(
            steps in proptest::collection::vec((0_u8..8, any::<prop::sample::Index>()), 1..400)
        ) {
            let share = Share::new(3);
            let mut recycler = recycler(2, 8);
            let mut slots = SlotTable::new(3 + recycler.slots());
            let mut owned: Vec<SlotIndex> = Vec::new();
            // Slots whose last operation is in the kernel, and those of them whose guest has just
            // left.
            let (mut in_kernel, mut releasing): (Vec<SlotIndex>, Vec<SlotIndex>) = (vec![], vec![]);
            for (step, which) in steps {
                match step {
                    0 | 1 if share.take() => {
                        let family = [Family::V4, Family::V6][which.index(2)];
                        let slot = if let Some(slot) = recycler.acquire(family, step == 0) {
                            slots.take_cached(slot);
                            slot
                        } else if let Some(slot) = slots.take_free(family) {
                            slot
                        } else {
                            let slot = recycler.evict().expect("the share leaves a slot");
                            slots.take_evicted(slot, family);
                            slot
                        };
                        prop_assert!(slot.at() < 3 + 2, "beyond the table");
                        prop_assert!(!owned.contains(&slot) && !in_kernel.contains(&slot));
                        slots.get(slot).taint.bind(step == 0);
                        owned.push(slot);
                    }
                    2 if !owned.is_empty() => {
                        let slot = owned.swap_remove(which.index(owned.len()));
                        let taint = slots.get(slot).taint;
                        // An UNBIND if it is cached, else a CLOSE.
                        recycler.release(slot, taint, which.index(5) == 0);
                        slots.get(slot).state = SlotState::Cached;
                        in_kernel.push(slot);
                        releasing.push(slot);
                    }
                    3 | 4 if !in_kernel.is_empty() => {
                        let slot = in_kernel.swap_remove(which.index(in_kernel.len()));
                        let taint = slots.get(slot).taint;
                        let drained = which.index(2) == 0;
                        let result = if drained { Err(Errno(libc::EAGAIN)) } else { Ok(Output::Done) };
                        let next = recycler.completed(slot, taint, &result);
                        if let Some(at) = releasing.iter().position(|one| *one == slot) {
                            releasing.swap_remove(at);
                            share.put_back();
                        }
                        match next {
                            Next::Submit(_) => in_kernel.push(slot),
                            Next::Keep => {}
                            Next::Free => slots.free(slot),
                            Next::Refuse => prop_assert!(false, "nothing taints a socket here"),
                        }
                    }
                    5 => {
                        recycler.pools.begin_grace();
                    }
                    6 => recycler.pools.end_grace(),
                    _ => {
                        if which.index(4) == 0 {
                            recycler.close_all();
                        }
                        in_kernel.extend(recycler.pools.next_to_drain().map(|(slot, _)| slot));
                        in_kernel.extend(recycler.pools.next_to_close());
                    }
                }
            }
        }
    }
}
