//! Who calls `io_uring_enter`, and when.
//!
//! The guests' own threads do, and the tasks of their runtimes; a thread of the ring's own only where those
//! leave a port taken for too long (`overdue`). Guests queue entries under a short lock. The thread
//! that finds no other inside enters for all guests that have queued some, reaps, looks for entries queued meanwhile, and wakes the
//! guests whose completions are in (flat combining: `enter`). Here is what sockets call for that.
//! `batching` has the rules by which guests share an enter, `flush` and `in_flight` what a guest
//! waits by, `tasks` what a runtime's reaper and flusher do, `lock` what happens at an unlock.
//!
//! The locks:
//! 1. A thread takes them in this order: a socket's state; the driver's; a receive queue's. (What a
//!    receiver has in front of its queue has a lock of its own, and so have a guest's reasons for denials, and the
//!    timer of the ring's own thread: under them no other is taken.)
//! 2. It holds at most one of each kind, and while it enters none.
//! 3. Under the driver's and a queue's it wakes, clones and drops no waker,
//! 4. and runs no other code of the host's: neither a policy, nor a verdict that it is to find, nor a tracing
//!    subscriber.
//! 5. What 3 and 4 forbid it leaves in the `Locked`, which runs it after the unlock.
//! 6. A panic there, or of a thread inside, stops no other thread: `lock` and `enter` contain it.

pub(crate) mod batching;
mod enter;
pub(crate) mod first_poll;
mod flush;
pub(crate) mod held_up;
mod in_flight;
#[cfg(all(test, shuttle))]
mod interleaved;
mod lifo_slot;
mod lock;
mod overdue;
#[cfg(test)]
mod played;
mod refusals;
mod runtimes;
mod send_now;
mod tasks;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub(crate) use self::batching::Guest;
pub(crate) use self::enter::Driver;
use self::enter::LockedCore;
pub(crate) use self::flush::{Flush, is_current_thread};
pub(crate) use self::in_flight::{InFlight, Progress};
pub(crate) use self::send_now::{Given, SendNow};
use crate::clock;
use crate::error::Errno;
use crate::limits::{CLOSE_LOOKS_MIN, CLOSE_PATIENCE, CLOSE_PATIENCE_MAX, LINGER};
use crate::ring::account::Account;
use crate::ring::kernel_defaults::Defaults;
use crate::ring::membarrier::kick;
use crate::ring::op::{BindOp, Op};
use crate::ring::port_order::CloseId;
use crate::ring::queues::SlotIndex;
use crate::ring::receive_queue::ReceiveQueue;
use crate::ring::send::SendOp;
use crate::ring::share::Share;
use crate::stats::Stats;

impl Driver {
    pub(crate) fn defaults(&self) -> &Defaults {
        &self.known.defaults
    }

    /// Whether sockets can be asked for their addresses on the ring.
    pub(crate) fn has_names(&self) -> bool {
        self.known.has_names
    }

    /// The sockets that guests may have open at once.
    pub(crate) fn share(&self) -> &Share {
        &self.share
    }

    /// Those that the table has slots for.
    pub(crate) fn slots(&self) -> u32 {
        self.known.slots
    }

    pub(crate) fn count(&self, count: impl FnOnce(&mut Stats)) {
        if let Some(mut core) = self.lock() {
            count(&mut core.ring.stats);
        }
    }

    /// Enters with the closes that are queued, unless another thread is inside: whether one is that may bring
    /// a close to its end.
    pub(crate) fn enter_for_closes(&self) -> bool {
        let Some(core) = self.lock() else { return false };
        if !core.ring.ports().is_closing() {
            return false;
        }
        let is_inside = core.entering;
        if !is_inside {
            drop(self.combine(core));
        }
        is_inside
    }

    // ---- operations -------------------------------------------------------------------------

    /// Queues an operation for the guest to wait for. Its memory moves to the operation table, where
    /// the kernel may use it until the last completion.
    pub(crate) fn submit(
        self: &Arc<Self>,
        guest: Guest,
        slot: SlotIndex,
        op: Op,
    ) -> Result<InFlight, Errno> {
        let mut core = self.lock_to_queue()?;
        core.batching.queue(guest);
        let key = core.ring.submit(slot, op);
        Ok(InFlight::new(self, &core, guest, key))
    }

    /// Takes over datagrams that their guest is told are sent. They leave when any guest next enters, at the
    /// latest when this one suspends, or if it computes on, after the time that its host has set. No other send of
    /// the socket is in flight.
    pub(crate) fn defer(
        self: &Arc<Self>,
        guest: Guest,
        slot: SlotIndex,
        account: &Arc<Account>,
        append: impl FnOnce(&mut SendOp),
    ) -> Result<InFlight, Errno> {
        Ok(self.defer_with(self.lock_to_queue()?, guest, slot, account, append))
    }

    fn defer_with(
        self: &Arc<Self>,
        mut core: LockedCore<'_>,
        guest: Guest,
        slot: SlotIndex,
        account: &Arc<Account>,
        append: impl FnOnce(&mut SendOp),
    ) -> InFlight {
        core.batching.queue(guest);
        let key = core.ring.defer(slot, account);
        let is_full = core.ring.append(key, append) == Some(true);
        let deferred = InFlight::deferred(self, guest, key, is_full);
        if is_full {
            drop(self.combine(core));
        } else if !core.entering {
            core.call_after(account.deferred_time);
            self.leave_to_any_flusher(core);
        }
        deferred
    }

    /// Queues the chain that makes and binds a socket, which reaches the kernel even if the guest
    /// never waits. A socket without a slot gets one, which it is to `keep` before a thread enters: one that
    /// panics there still has a socket to close.
    pub(crate) fn submit_bind(
        self: &Arc<Self>,
        guest: Guest,
        slot: Option<SlotIndex>,
        bind: Box<BindOp>,
        keep: impl FnOnce(SlotIndex),
    ) -> Result<InFlight, Errno> {
        let mut core = self.lock_to_queue()?;
        core.batching.queue(guest);
        let (slot, key) = core.ring.submit_bind(slot, bind);
        let in_flight = InFlight::new(self, &core, guest, key);
        keep(slot);
        self.leave_to_flusher(core);
        Ok(in_flight)
    }

    /// Arms a socket's receive. The queue returned is shared with the ring, which fills it; when the
    /// flush is ready, the datagrams that the kernel had queued before are in it.
    pub(crate) fn arm(
        &self,
        guest: Guest,
        slot: SlotIndex,
        account: &Arc<Account>,
    ) -> Result<(Arc<ReceiveQueue>, Flush), Errno> {
        let queue = Arc::new(ReceiveQueue::new(self.queue_limits, Arc::clone(account)));
        let mut core = self.lock_to_queue()?;
        core.ring.arm(slot, &queue);
        core.batching.queue(guest);
        Ok((queue, Flush::new(&core, guest)))
    }

    /// Lets a paused receive go on. At once: its guest may be about to wait for it.
    pub(crate) fn resume(&self, guest: Guest, slot: SlotIndex, queue: &Arc<ReceiveQueue>) {
        let Ok(mut core) = self.lock_open() else { return };
        core.batching.queue(guest);
        core.ring.resume(slot, queue);
        drop(self.combine(core));
    }

    /// Whether `reap` may miss datagrams that are there for a socket: what guests have deferred; what the kernel
    /// keeps for another thread; and all, while one is inside.
    pub(crate) fn may_miss(&self, slot: SlotIndex) -> bool {
        self.lock().is_some_and(|mut core| core.ring.has_deferred() || core.is_elsewhere(slot))
    }

    /// Has what is in a socket come to its queue, whichever thread has armed its receive; `None` if `reap` does.
    pub(crate) fn receive_now(
        self: &Arc<Self>,
        guest: Guest,
        slot: SlotIndex,
        queue: &Arc<ReceiveQueue>,
    ) -> Result<Option<InFlight>, Errno> {
        let mut core = self.lock_to_queue()?;
        if !core.is_elsewhere(slot) {
            return Ok(None);
        }
        core.batching.queue(guest);
        let key = core.ring.receive_now(slot, queue);
        Ok(Some(InFlight::new(self, &core, guest, key)))
    }

    /// Submits what is deferred.
    pub(crate) fn submit_deferred(&self) {
        if let Some(core) = self.lock() {
            drop(self.combine(core));
        }
    }

    /// Has what is deferred submitted, for a guest that waits for that.
    pub(crate) fn flush_deferred(&self, guest: Guest) -> Result<Flush, Errno> {
        let mut core = self.lock_to_queue()?;
        core.ring.queue_all_deferred();
        Ok(Flush::new(&core, guest))
    }

    /// Gives a slot and the socket in it back to the ring. A port that was bound by number is free when
    /// this returns; the close of another is the flusher's to submit, unless another thread enters
    /// before.
    pub(crate) fn close(
        self: &Arc<Self>,
        guest: Guest,
        slot: SlotIndex,
        account: &Arc<Account>,
        unread: u64,
    ) {
        let Some(mut core) = self.lock() else { return };
        let before = core.ring.queued();
        let named = core.ring.close(slot, account, unread);
        if let Some(close) = named {
            core.batching.queue(guest);
            return self.enter_until_closed(core, close);
        }
        core.watch_closes();
        if core.ring.queued() > before {
            core.batching.queue(guest);
            self.leave_to_flusher(core);
        }
    }

    /// Has a close give its port up before this returns, unless a thread holds it up for too long: one
    /// that is inside, or one that has armed the socket's receive and must run the end of that.
    fn enter_until_closed<'driver>(&'driver self, core: LockedCore<'driver>, close: CloseId) {
        let mut core = self.combine(core);
        let (mut begun, mut looks) = (None, 0);
        while !core.ring.ports().has_ended(close) {
            let elapsed = clock::since(*begun.get_or_insert_with(clock::now));
            // On a machine with much to do the time may be over after one look.
            if elapsed >= CLOSE_PATIENCE && looks >= CLOSE_LOOKS_MIN
                || elapsed >= CLOSE_PATIENCE_MAX
            {
                break;
            }
            looks += 1;
            let is_entering = core.entering;
            drop(core);
            if !is_entering {
                kick();
            }
            clock::yield_now();
            core = self.core.lock();
            if !core.entering {
                core.ring.reap();
                core.wake_completed();
                core = self.combine(core);
            }
        }
    }

    /// Closes all cached sockets.
    pub(crate) fn close_cached(&self) {
        // Completions first: a socket may be on its way into the cache.
        let Ok(core) = self.lock_open() else { return };
        let mut core = self.combine_with(core, true);
        core.ring.close_cached();
        while core.may_enter() && core.ring.has_cached_work() {
            core = self.combine(core);
        }
        if core.entering {
            // The thread inside may leave before all are closed: a reaper goes on.
            core.wake_reapers();
        }
    }

    // ---- entering ---------------------------------------------------------------------------

    /// A guest and all its sockets are dropped. Enters with what they have left queued: the runtime may be
    /// gone, too. Sends that still wait for send buffer keep a unit of its quota, and have some time left.
    pub(crate) fn forsake(&self, account: &Account) {
        let Some(mut core) = self.lock() else { return };
        if core.has_queued() {
            core = self.combine(core);
        }
        if account.sockets.in_use() > 0 {
            account.forsake();
            core.call_after(LINGER);
        }
        core.rest();
    }
}
