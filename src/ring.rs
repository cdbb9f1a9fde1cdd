//! The ring: submit, flush, complete.
//!
//! Everything here runs under the driver's lock, except [`Enter::enter`]. An operation is stored in
//! the operation table, then its entries are queued, and `flush` counts what the driver is to bring
//! to the kernel. `reap` takes the completions: a message goes to its socket's [`ReceiveQueue`],
//! an operation's result to the table. The wakers of the tasks concerned are collected and not
//! called here, and what must be logged is collected too.

pub(crate) mod account;
pub(crate) mod buffers;
#[cfg(not(all(test, shuttle)))]
pub(crate) mod eventfd;
mod gro_key;
pub(crate) mod kernel_defaults;
mod mapping;
pub(crate) mod membarrier;
pub(crate) mod op;
pub(crate) mod op_table;
pub(crate) mod port_order;
pub(crate) mod process;
pub(crate) mod queues;
pub(crate) mod quota;
mod receive;
pub(crate) mod receive_queue;
pub(crate) mod recycle;
pub(crate) mod rlimits;
pub(crate) mod send;
pub(crate) mod setup;
pub(crate) mod share;
mod slots;
mod socket_filter;
#[cfg(test)]
mod tests;
pub(crate) mod thread_clock;
pub(crate) mod thread_tag;
#[cfg(not(all(test, shuttle)))]
pub(crate) mod timer;
pub(crate) mod trials;

use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use io_uring::squeue::Entry;

use self::account::Account;
use self::buffers::BufferRing;
use self::gro_key::GroKey;
use self::op::{
    Attempt, BindOp, Completed, Op, OpResult, Output, Record, SocketMemory, SocketOption,
};
use self::op_table::{Ended, Leftover, OpTable, Registered};
use self::port_order::{CloseId, PortOrder};
use self::process::Process;
use self::queues::{Completion, EMPTY_BATCH, Enter, OpKey, Queues, SlotIndex};
use self::receive::{Delivered, Receives};
use self::receive_queue::ReceiveQueue;
use self::recycle::taint::Reason;
use self::recycle::{Next, Recycler};
use self::send::SendOp;
use self::share::Share;
use self::slots::{Receive, Releasing, SlotState, SlotTable};
use self::thread_tag::ThreadTag;
use crate::clock;
use crate::error::Errno;
use crate::limits::{
    BURST_DATAGRAMS, CHAIN_ENTRIES_MAX, COMPLETIONS_BATCH, CQ_ENTRIES, LINGER, TEARDOWN_ROUNDS_MAX,
};
use crate::stats::Stats;
#[cfg(all(test, shuttle))]
pub(crate) use crate::sync::played::{eventfd, timer};

pub(crate) struct Ring {
    process: Process,
    queues: Queues,
    ops: OpTable,
    slots: SlotTable,
    /// The sockets that guests may have open at once: never more than slots are for them.
    share: Arc<Share>,
    ports: PortOrder,
    recycler: Recycler,
    receives: Receives,
    receives_armed: usize,
    gro_key: GroKey,
    /// Empty between calls; its memory is reused.
    chain: Vec<Entry>,
    /// As `chain`.
    recycling: Vec<(SlotIndex, Op)>,
    /// Binds that have ended, with the rest of their chain still queued.
    cut: Vec<(OpKey, Box<BindOp>)>,
    /// Slots with receives that the kernel has yet to take, and up to which entry. As `chain`.
    arming: Vec<(SlotIndex, u64)>,
    /// Slots with sends that the next flush queues, unless that was done before.
    deferred: Vec<SlotIndex>,
    /// Payload bytes queued or deferred since the last flush.
    unsent_bytes: usize,
    /// The ring is being closed.
    is_ending: bool,
    wakers: Vec<Waker>,
    pub(crate) stats: Stats,
}

impl Ring {
    fn new(
        process: Process,
        queues: Queues,
        buffers: BufferRing,
        slots: u32,
        share: Arc<Share>,
        recycler: Recycler,
    ) -> Self {
        Self {
            process,
            queues,
            ops: OpTable::default(),
            slots: SlotTable::new(u64::from(slots) + recycler.slots()),
            share,
            ports: PortOrder::default(),
            recycler,
            receives: Receives::new(buffers),
            receives_armed: 0,
            gro_key: GroKey::default(),
            chain: Vec::with_capacity(CHAIN_ENTRIES_MAX),
            recycling: Vec::new(),
            cut: Vec::new(),
            arming: Vec::new(),
            deferred: Vec::new(),
            unsent_bytes: 0,
            is_ending: false,
            wakers: Vec::new(),
            stats: Stats::default(),
        }
    }

    pub(crate) fn kernel(&self) -> Enter {
        self.queues.kernel()
    }

    // ---- submit -----------------------------------------------------------------------------

    /// Submits an operation that a caller will wait for.
    pub(crate) fn submit(&mut self, slot: SlotIndex, op: Op) -> OpKey {
        let op = self.prepare(slot, op);
        let key = self.ops.insert(op, slot);
        self.queue(key);
        key
    }

    fn submit_detached(&mut self, slot: SlotIndex, op: Op) -> OpKey {
        let op = self.prepare(slot, op);
        let key = self.ops.insert_detached(op, slot);
        self.queue(key);
        key
    }

    /// What the guest has sent before comes before any other operation on its socket.
    fn prepare(&mut self, slot: SlotIndex, mut op: Op) -> Op {
        self.queue_deferred(slot);
        self.slots.get(slot).prepare(&mut op);
        if let Op::Send(send) = &op {
            self.unsent_bytes += send.bytes();
        }
        op
    }

    /// Queues the entries of an operation in the table: from here on its memory is the kernel's.
    fn queue(&mut self, key: OpKey) {
        let Some((slot, op)) = self.ops.find(key) else { return };
        op.write(slot, key.user_data(), self.receives.header(), &mut self.chain);
        self.queues.queue(&self.chain);
        self.chain.clear();
        if let Op::Bind(bind) = op {
            bind.queued = self.queues.queued();
        } else if matches!(op, Op::Receive(_)) {
            self.arming.push((slot, self.queues.queued()));
        }
    }

    /// Takes over a send that is answered for: datagrams can be added to it until the next flush, or until
    /// another operation on the socket is submitted. No other send of the socket is in flight.
    pub(crate) fn defer(&mut self, slot: SlotIndex, account: &Arc<Account>) -> OpKey {
        let key = self.ops.insert(Op::Send(SendOp::answered(account)), slot);
        self.slots.get(slot).deferred = Some(key);
        self.deferred.push(slot);
        key
    }

    /// Adds to a deferred send; `None` if it is deferred no longer, else whether it is full.
    pub(crate) fn append(&mut self, key: OpKey, append: impl FnOnce(&mut SendOp)) -> Option<bool> {
        let (slot, Op::Send(send)) = self.ops.find(key)? else { return None };
        if self.slots.get(slot).deferred != Some(key) {
            return None;
        }
        let (len, bytes) = (send.len(), send.bytes());
        append(send);
        self.stats.datagrams_deferred += (send.len() - len) as u64;
        self.unsent_bytes += send.bytes() - bytes;
        Some(send.is_full())
    }

    pub(crate) fn is_deferred(&mut self, key: OpKey) -> bool {
        self.ops.find(key).is_some_and(|(slot, _)| self.slots.get(slot).deferred == Some(key))
    }

    /// Whether the next flush may queue deferred sends.
    pub(crate) fn has_deferred(&self) -> bool {
        !self.deferred.is_empty()
    }

    pub(crate) fn queue_all_deferred(&mut self) {
        for at in 0..self.deferred.len() {
            self.queue_deferred(self.deferred[at]);
        }
        self.deferred.clear();
    }

    /// Queues the entries of a slot's deferred send: its memory is the kernel's from here on.
    fn queue_deferred(&mut self, slot: SlotIndex) {
        let entry = self.slots.get(slot);
        let Some(key) = entry.deferred.take() else { return };
        if let Some((_, op)) = self.ops.find(key) {
            entry.prepare(op);
        }
        self.ops.restart(key);
        self.queue(key);
    }

    fn cancel_op(&mut self, key: OpKey) {
        self.queues.queue(&[op::cancel(key)]);
    }

    /// Submits the chain that makes and binds a socket, for which the caller has taken a unit of the
    /// ring's share, in the slot that it has or gets now.
    pub(crate) fn submit_bind(
        &mut self,
        slot: Option<SlotIndex>,
        mut bind: Box<BindOp>,
    ) -> (SlotIndex, OpKey) {
        let slot = slot.unwrap_or_else(|| self.slot_for(&mut bind));
        self.slots.get(slot).named_port = bind.port().number;
        bind.is_behind_closes = self.ports.is_closing();
        (slot, self.submit(slot, Op::Bind(bind)))
    }

    /// A slot for a new owner: with a recycled socket, if one is as good for this bind as a new one;
    /// else a free one, or a cached one whose socket goes. There is one, because cached sockets that
    /// `evict` does not find, those in quarantine, have slots beside the guests'.
    fn slot_for(&mut self, bind: &mut BindOp) -> SlotIndex {
        if let Some(sets_source) = bind.recyclable()
            && let Some(slot) = self.recycler.acquire(bind.family, sets_source)
        {
            bind.attempt = Attempt::Recycled;
            self.slots.take_cached(slot);
            return slot;
        }
        if let Some(slot) = self.slots.take_free(bind.family) {
            return slot;
        }
        let slot = self.recycler.evict().expect("the share leaves a slot");
        self.slots.take_evicted(slot, bind.family);
        // If SOCKET failed, BIND would go on with the socket that it has not replaced.
        self.submit_detached(slot, Op::Close);
        slot
    }

    /// A send that goes on waits for send buffer, and counts from here on.
    /// `false` if it has ended.
    pub(crate) fn charge(&mut self, key: OpKey, account: &Arc<Account>) -> bool {
        let Some((_, Op::Send(send))) = self.ops.find(key) else { return false };
        send.charge(account);
        true
    }

    /// Ends an operation of one entry whose caller is gone, if it still waits.
    pub(crate) fn cancel(&mut self, key: OpKey) {
        if self.ops.find(key).is_some_and(|(_, op)| matches!(op, Op::AwaitWritable)) {
            self.cancel_op(key);
        }
    }

    // ---- receives ---------------------------------------------------------------------------

    /// Arms a socket's receive into this queue; `false` if it is armed, or the socket is no guest's.
    pub(crate) fn arm(&mut self, slot: SlotIndex, queue: &Arc<ReceiveQueue>) -> bool {
        let owned = self.slots.get(slot);
        let arms = owned.is_owned() && owned.receive.is_none();
        if arms {
            let key = self.submit_detached(slot, Op::Receive(Arc::clone(queue)));
            self.slots.get(slot).receive =
                Some(Receive { key, is_cancelled: false, armed_by: None });
            self.receives_armed += 1;
        }
        arms
    }

    /// Arms a receive again whose queue was paused and is no longer. If its cancel is still on its
    /// way, `end_receive` will. Another thread may have filled the queue since the guest took from it.
    pub(crate) fn resume(&mut self, slot: SlotIndex, queue: &Arc<ReceiveQueue>) {
        if !queue.is_paused() && self.arm(slot, queue) {
            self.stats.rearms += 1;
        }
    }

    /// This thread has brought receives to the kernel, and is where they complete.
    fn note_armed(&mut self) {
        if self.arming.is_empty() {
            return;
        }
        let (here, submitted) = (ThreadTag::current(), self.submitted());
        let slots = &mut self.slots;
        self.arming.retain(|(slot, queued)| {
            let is_taken = *queued <= submitted;
            if let (true, Some(receive)) = (is_taken, &mut slots.get(*slot).receive) {
                receive.armed_by = Some(here);
            }
            !is_taken
        });
    }

    /// The other thread that must enter before the kernel completes what a socket receives.
    pub(crate) fn armed_elsewhere(&mut self, slot: SlotIndex) -> Option<ThreadTag> {
        let armed_by = self.slots.get(slot).receive.and_then(|receive| receive.armed_by);
        armed_by.filter(|thread| *thread != ThreadTag::current())
    }

    /// Submits a receive of what is in the socket now, and before it what was deferred: that may be what is to be
    /// received.
    pub(crate) fn receive_now(&mut self, slot: SlotIndex, queue: &Arc<ReceiveQueue>) -> OpKey {
        self.queue_all_deferred();
        self.submit(slot, Op::ReceiveNow(Arc::clone(queue)))
    }

    fn complete_receive(&mut self, key: OpKey, slot: SlotIndex, completion: Completion) {
        let (queue, is_armed) = match self.ops.find(key) {
            Some((_, Op::Receive(queue))) => (Arc::clone(queue), true),
            Some((_, Op::ReceiveNow(queue))) => (Arc::clone(queue), false),
            _ => return,
        };
        let pushed = match self.receives.deliver(completion, &queue, &mut self.stats) {
            Delivered::Message(pushed) => {
                if pushed.queued >= BURST_DATAGRAMS {
                    self.enable_gro(slot);
                }
                Some(pushed)
            }
            Delivered::Error(pushed) => {
                self.slots.get(slot).taint.mark(Reason::Error);
                Some(pushed)
            }
            Delivered::Nothing => None,
        };
        if let Some(pushed) = pushed {
            self.wakers.extend(pushed.waker);
            if pushed.pauses {
                self.stats.pauses += 1;
                if completion.has_more() || !is_armed {
                    self.cancel_receive(slot);
                }
            }
        }
        if completion.has_more() {
            return;
        }
        if is_armed {
            return self.end_receive(key, slot, &queue);
        }
        if !self.slots.get(slot).is_owned() {
            self.discard(&queue);
        }
        self.end(key, slot, Ok(Output::Done));
    }

    /// Of a guest whose ring is being closed; one that has dropped its socket waits no more.
    fn discard(&mut self, queue: &ReceiveQueue) {
        self.wakers.extend(queue.take_waker());
        self.stats.dropped_at_close += queue.discard();
    }

    /// A receive has had its last completion. Zero-length datagrams, pending errors, an empty buffer
    /// ring, an overflow and the exit of its thread all end it. What follows waits in the kernel
    /// until it is armed again.
    fn end_receive(&mut self, key: OpKey, slot: SlotIndex, queue: &Arc<ReceiveQueue>) {
        let owned = self.slots.get(slot);
        let is_wanted = owned.is_owned() && !self.is_ending && !queue.is_paused();
        if is_wanted
            && let Some(receive) = owned.receive.as_mut().filter(|receive| !receive.is_cancelled)
        {
            receive.armed_by = None;
            self.stats.rearms += 1;
            self.ops.restart(key);
            return self.queue(key);
        }
        owned.receive = None;
        self.receives_armed -= 1;
        if !owned.is_owned() {
            self.discard(queue);
        }
        self.end(key, slot, Ok(Output::Done));
        if is_wanted {
            // Its guest had taken enough while the cancel was on its way. A new operation, because a
            // cancel that came late must not end the next receive.
            self.resume(slot, queue);
        }
    }

    /// How many are in the kernel now.
    pub(crate) fn receives_armed(&self) -> usize {
        self.receives_armed
    }

    /// Has a receive end. Unless its queue is full, whoever sees the end arms the next.
    pub(crate) fn cancel_receive(&mut self, slot: SlotIndex) {
        if let Some(receive) = &mut self.slots.get(slot).receive
            && !receive.is_cancelled
        {
            receive.is_cancelled = true;
            let key = receive.key;
            self.cancel_op(key);
        }
    }

    /// Has the kernel hand over equal datagrams of one sender in one message from now on.
    fn enable_gro(&mut self, slot: SlotIndex) {
        let owned = self.slots.get(slot);
        if owned.is_owned() && !owned.has_gro {
            owned.has_gro = true;
            self.gro_key.hold();
            self.submit_detached(slot, Op::SetOption(Box::new(SocketOption::GRO)));
        }
    }

    // ---- closes -----------------------------------------------------------------------------

    /// A guest has dropped a socket: cancels its receive, and unbinds the socket, or closes it once
    /// nothing else is in flight. After the last completion the slot is free, or its socket is
    /// cached. `unread`: datagrams that the guest has left in its queue. Returned is the close of a
    /// port that was bound by number.
    pub(crate) fn close(
        &mut self,
        slot: SlotIndex,
        account: &Arc<Account>,
        unread: u64,
    ) -> Option<CloseId> {
        self.stats.dropped_at_close += unread;
        // A bind that waits the kernel does not know.
        if let Some(key) = self.ports.withdraw(slot) {
            self.ops.withdraw(key);
        }
        let owned = self.slots.get(slot);
        if !owned.is_owned() {
            // The ring has been closed, and with it the socket: all that is left of it is the guest's unit.
            account.sockets.put_back();
            return None;
        }
        let (taint, is_receiving) = (owned.taint, owned.receive.is_some());
        let is_busy = self.ops.in_flight(slot).all > u32::from(is_receiving);
        let mut releasing = self.begin_release(slot);
        let close = releasing.close;
        if let Some(unbind) = self.recycler.release(slot, taint, is_busy) {
            releasing.is_submitted = true;
            account.sockets.put_back();
            self.slots.get(slot).state = SlotState::Releasing(releasing);
            self.submit_detached(slot, unbind);
        } else {
            // A unit of the guest's quota is the slot's until no send waits any more.
            releasing.account = Some(Arc::clone(account));
            self.slots.get(slot).state = SlotState::Releasing(releasing);
            self.submit_close_once_idle(slot);
        }
        self.slots.port(slot).number.map(|_| close)
    }

    /// A socket is on its way out: nothing more is received for it, and its port is being given up.
    fn begin_release(&mut self, slot: SlotIndex) -> Releasing {
        self.cancel_receive(slot);
        let close = self.ports.begin_close(self.slots.port(slot), clock::now());
        Releasing { close, is_submitted: false, account: None, is_forsaken: false }
    }

    /// The closes on their way.
    pub(crate) fn ports(&self) -> &PortOrder {
        &self.ports
    }

    /// Queues the binds that have waited for long enough.
    pub(crate) fn expire_binds(&mut self) {
        if self.ports.has_waiting() {
            self.ports.expire(clock::now());
            self.queue_due_binds();
        }
    }

    /// Closes that only sends hold up, which wait for send buffer, perhaps for ever: nobody waits for
    /// these closes any more.
    pub(crate) fn give_up_on_sends(&mut self) {
        for (slot, close) in self.slots.held_up() {
            let in_flight = self.ops.in_flight(slot);
            if in_flight.all == in_flight.sends {
                self.ports.end_close(close);
            }
        }
        self.queue_due_binds();
    }

    /// Cancels the sends that wait for send buffer although their guest has been gone for some time; when
    /// to do so again, if any are left.
    pub(crate) fn end_forsaken_sends(&mut self) -> Option<Duration> {
        // Unless the cancels of the last time are still queued.
        let again = self.queued() == self.submitted();
        let (forsaken, next) = self.slots.forsaken(LINGER, again);
        if !forsaken.is_empty() {
            for key in self.ops.sends(&forsaken) {
                self.cancel_op(key);
            }
        }
        next
    }

    fn queue_due_binds(&mut self) {
        while let Some(key) = self.ports.take_due() {
            self.queue(key);
        }
    }

    /// Submits the CLOSE of a socket that its guest has dropped, once nothing else is in flight: the
    /// kernel lets go of a file with its last user, and so the port is free when CLOSE has completed.
    /// (A receive armed by another thread ends there, and lets go of the file after its completion.)
    fn submit_close_once_idle(&mut self, slot: SlotIndex) {
        let in_flight = self.ops.in_flight(slot);
        let SlotState::Releasing(releasing) = &mut self.slots.get(slot).state else { return };
        if in_flight.sends == 0
            && let Some(account) = releasing.account.take()
        {
            account.sockets.put_back();
        }
        if in_flight.all > 0 {
            return;
        }
        releasing.is_submitted = true;
        self.submit_close(slot);
    }

    fn submit_close(&mut self, slot: SlotIndex) {
        if self.slots.get(slot).has_gro {
            self.submit_detached(slot, Op::CountDrops(Box::new(SocketMemory::unknown())));
        }
        self.submit_detached(slot, Op::Close);
    }

    /// An operation on a slot has ended: moves on a socket that no guest owns, and then the binds
    /// that waited for it.
    fn advance(&mut self, slot: SlotIndex, result: &OpResult) {
        match &self.slots.get(slot).state {
            SlotState::Free | SlotState::Owned => return,
            SlotState::Releasing(releasing) if !releasing.is_submitted => {
                self.submit_close_once_idle(slot);
            }
            SlotState::Releasing(_) | SlotState::Cached => {
                if self.ops.in_flight(slot).all == 0 {
                    self.conclude(slot, result);
                }
            }
        }
        self.queue_due_binds();
    }

    /// No operation is in flight on a slot that no guest owns.
    fn conclude(&mut self, slot: SlotIndex, result: &OpResult) {
        let taint = self.slots.get(slot).taint;
        match self.recycler.completed(slot, taint, result) {
            Next::Submit(op) => {
                self.submit_detached(slot, op);
            }
            Next::Refuse => self.submit_close(slot),
            Next::Keep => self.end_release(slot),
            Next::Free => {
                self.end_release(slot);
                self.slots.free(slot);
            }
        }
    }

    /// The socket has given up its port, and the guest its unit of the ring's share.
    fn end_release(&mut self, slot: SlotIndex) {
        let state = std::mem::replace(&mut self.slots.get(slot).state, SlotState::Cached);
        if let SlotState::Releasing(releasing) = state {
            self.ports.end_close(releasing.close);
            self.share.put_back();
        }
    }

    // ---- recycling --------------------------------------------------------------------------

    /// Closes the sockets that are cached now, bit by bit.
    pub(crate) fn close_cached(&mut self) {
        self.recycler.close_all();
    }

    /// Whether something has happened that the next flush takes note of.
    pub(crate) fn has_event(&self) -> bool {
        !self.is_ending && self.recycler.has_event()
    }

    /// Whether the next flush submits operations on cached sockets.
    pub(crate) fn has_cached_work(&self) -> bool {
        !self.is_ending && self.recycler.has_work()
    }

    /// Whether a grace period has begun since this was last asked.
    pub(crate) fn take_begun_grace(&mut self) -> bool {
        !self.is_ending && self.recycler.take_begun_grace()
    }

    /// Whether cached sockets have yet to be drained.
    pub(crate) fn is_quarantining(&self) -> bool {
        !self.is_ending && self.recycler.is_quarantining()
    }

    fn tick(&mut self) {
        let mut ops = std::mem::take(&mut self.recycling);
        self.recycler.tick(&mut ops);
        for (slot, op) in ops.drain(..) {
            self.submit_detached(slot, op);
        }
        self.recycling = ops;
    }

    // ---- flush ------------------------------------------------------------------------------

    /// Readies what was queued, and returns how many entries the next `io_uring_enter` is to submit.
    pub(crate) fn flush(&mut self) -> u32 {
        if !self.is_ending {
            self.tick();
        }
        self.queue_all_deferred();
        self.unsent_bytes = 0;
        self.queues.flush()
    }

    /// An `io_uring_enter` of this thread has returned, with so many entries taken.
    pub(crate) fn end_submission(&mut self, taken: u32) {
        self.stats.submissions += u64::from(taken);
        self.queues.end_submission();
        self.note_armed();
    }

    /// Payload bytes that wait for a flush, deferred or queued.
    pub(crate) fn unsent_bytes(&self) -> usize {
        self.unsent_bytes
    }

    /// Entries queued so far: an operation has reached the kernel when `submitted` is as large.
    pub(crate) fn queued(&self) -> u64 {
        self.queues.queued()
    }

    /// Entries that the kernel has consumed: the counter, which is part of what the driver decides by.
    pub(crate) fn submitted(&self) -> u64 {
        self.stats.submissions
    }

    pub(crate) fn has_overflow(&mut self) -> bool {
        self.queues.has_overflow()
    }

    pub(crate) fn has_task_work(&mut self) -> bool {
        self.queues.has_task_work()
    }

    pub(crate) fn enable_notifications(&mut self) -> bool {
        self.queues.enable_notifications()
    }

    pub(crate) fn disable_notifications(&mut self) {
        self.queues.disable_notifications();
    }

    // ---- complete ---------------------------------------------------------------------------

    /// Takes every completion that has come.
    pub(crate) fn reap(&mut self) {
        if !self.cut.is_empty() {
            let submitted = self.submitted();
            self.cut.retain(|(_, bind)| bind.queued > submitted);
        }
        let mut batch = EMPTY_BATCH;
        // Bounded, because a flood fills the queue as fast as it is emptied; what is left makes
        // `enable_notifications` answer `true`.
        for _ in 0..CQ_ENTRIES as usize / COMPLETIONS_BATCH {
            let entries = self.queues.reap(&mut batch);
            let pauses = self.stats.pauses;
            for entry in entries {
                self.complete(Completion::from(entry));
            }
            // The cancel of a receive that pauses must reach the kernel before more is taken.
            if entries.len() < COMPLETIONS_BATCH || self.stats.pauses > pauses {
                break;
            }
        }
        if !self.is_ending {
            // For the sockets unbound just now, which need not wait for the next flush.
            self.recycler.begin_grace();
        }
    }

    fn complete(&mut self, completion: Completion) {
        self.stats.completions += 1;
        if let Some(target) = completion.cancel_target() {
            // Only a cancel's failure completes. If its target has not ended, the cancel came while
            // that was between two waits: once more, because without a receive's end its slot is
            // lost.
            if self.ops.find(target).is_some() {
                self.cancel_op(target);
            }
            return;
        }
        let key = OpKey::from_user_data(completion.user_data);
        let Some((key, (slot, op))) = key.and_then(|key| Some((key, self.ops.find(key)?))) else {
            // Of no operation; a buffer that it names is ours again all the same.
            return self.receives.put_back(completion);
        };
        if matches!(op, Op::Receive(_) | Op::ReceiveNow(_)) {
            return self.complete_receive(key, slot, completion);
        }
        let Some(outcome) = self.ops.count(key, completion.result) else { return };
        // The last completion: the operation's memory is ours again.
        let Some((slot, op)) = self.ops.find(key) else { return };
        let entry = self.slots.get(slot);
        let mut record = Record {
            is_owned: entry.is_owned(),
            is_closing: self.ports.is_closing(),
            is_ending: self.is_ending || entry.is_forsaken(),
            stats: &mut self.stats,
            taint: &mut entry.taint,
            segment_limit: &mut entry.segment_limit,
        };
        match op.complete(outcome, &mut record) {
            Completed::Retry => {
                self.ops.restart(key);
                self.queue(key);
            }
            Completed::RetryAfterCloses(port) => {
                self.ops.restart(key);
                self.ports.wait(key, slot, port, clock::now());
                self.queue_due_binds();
            }
            Completed::Ended(result) => {
                self.keep_cut(key);
                self.end(key, slot, result);
            }
        }
    }

    /// Keeps the memory of a chain that the kernel has cut, for want of memory for its next entry, and whose
    /// first part has failed: the rest is a chain of its own then, and the kernel reads what its entries
    /// name when it takes them. (In a send every entry completes, so that none ends before.)
    fn keep_cut(&mut self, key: OpKey) {
        let submitted = self.submitted();
        if let Some((_, Op::Bind(bind))) = self.ops.find(key)
            && bind.queued > submitted
        {
            let ended = Box::new(BindOp::new(bind.family, Vec::new(), bind.addr));
            self.cut.push((key, std::mem::replace(bind, ended)));
        }
    }

    fn end(&mut self, key: OpKey, slot: SlotIndex, result: OpResult) {
        match self.ops.end(key, result) {
            Some(Ended::Awaited(waker)) => {
                self.wakers.extend(waker);
                self.advance(slot, &Ok(Output::Done));
            }
            Some(Ended::Detached(result)) => self.advance(slot, &result),
            None => {}
        }
    }

    // ---- callers ----------------------------------------------------------------------------

    /// Takes the result of an operation that is done.
    pub(crate) fn take_result(&mut self, key: OpKey) -> Option<OpResult> {
        self.ops.take_result(key)
    }

    /// Registers the task that the end of an operation is to wake.
    pub(crate) fn register(&mut self, key: OpKey, waker: Waker) -> Registered {
        self.ops.register(key, waker)
    }

    /// The caller of an operation is gone; the operation goes on.
    pub(crate) fn detach(&mut self, key: OpKey) -> Leftover {
        self.ops.detach(key)
    }

    pub(crate) fn has_wakers(&self) -> bool {
        !self.wakers.is_empty()
    }

    /// The wakers of the tasks whose operations have ended, for the driver to wake without its lock.
    pub(crate) fn take_wakers(&mut self) -> impl Iterator<Item = Waker> {
        self.wakers.drain(..)
    }

    /// The wakers of all tasks that wait.
    pub(crate) fn take_all_wakers(&mut self) -> Vec<Waker> {
        let mut wakers = self.ops.take_wakers();
        wakers.append(&mut self.wakers);
        wakers
    }

    /// Something to log, for the driver to do so without its lock.
    pub(crate) fn take_warning(&mut self) -> Option<&'static str> {
        self.recycler.take_warning()
    }

    pub(crate) fn snapshot(&self) -> Stats {
        let mut stats = self.stats;
        stats.sockets_created = self.share.created();
        stats.sockets_open = self.share.in_use();
        stats.sockets_cached = self.recycler.len();
        stats.closed_instead += self.recycler.closed_instead();
        stats
    }
}

/// The end of a ring.
impl Ring {
    /// Closes every socket, whoever owns it. What guests ask of theirs from now on is not to come here.
    pub(crate) fn begin_shutdown(&mut self) {
        self.is_ending = true;
        for slot in self.slots.owned() {
            if let Some(bind) = self.ports.withdraw(slot) {
                self.end(bind, slot, Err(Errno(libc::ECANCELED)));
            }
            let releasing = self.begin_release(slot);
            self.slots.get(slot).state = SlotState::Releasing(releasing);
            self.submit_close_once_idle(slot);
        }
    }

    /// Has the kernel end what waits there: for send buffer, or for other threads.
    pub(crate) fn cancel_all(&mut self) {
        self.queues.cancel_all();
    }

    /// Whether the kernel holds nothing of the ring any more.
    pub(crate) fn is_shut_down(&self) -> bool {
        self.ops.is_quiet() && !self.queues.has_backlog() && self.cut.is_empty()
    }

    /// In a fork of the process that built the ring: its memory is not there, and its wakers are of
    /// tasks of the parent. Only the descriptor is a fork's own, which would keep the ring alive.
    fn abandon(&mut self) {
        std::mem::forget((std::mem::take(&mut self.ops), std::mem::take(&mut self.wakers)));
        std::mem::forget(std::mem::take(&mut self.cut));
        self.recycler.abandon();
        self.receives.leak();
        self.queues.abandon();
    }
}

impl Drop for Ring {
    /// Closes and cancels everything, waits with a bound for the kernel to let go of the memory, and
    /// leaks what it does not let go of.
    fn drop(&mut self) {
        if !self.process.is_current() {
            return self.abandon();
        }
        self.begin_shutdown();
        // Also if something here panics: what the kernel may write to must not be freed.
        let ring = Leaking(self);
        if ring.0.is_let_go_of() {
            std::mem::forget(ring);
        }
    }
}

/// A ring whose memory the kernel keeps.
struct Leaking<'a>(&'a mut Ring);

impl Drop for Leaking<'_> {
    fn drop(&mut self) {
        std::mem::forget(std::mem::take(&mut self.0.ops));
        std::mem::forget(std::mem::take(&mut self.0.cut));
        self.0.receives.leak();
        tracing::warn!("io_uring operations did not end in time; their memory is leaked");
    }
}

impl Ring {
    /// Has the kernel end every operation; `false` if it has not done so in time.
    fn is_let_go_of(&mut self) -> bool {
        let kernel = self.kernel();
        let mut idle = 0;
        while idle < TEARDOWN_ROUNDS_MAX {
            let (submitted, completed) = (self.submitted(), self.stats.completions);
            let entries = self.flush();
            if let Ok(taken) = kernel.enter(entries, Some(0)) {
                self.end_submission(taken);
            }
            self.reap();
            if self.is_shut_down() {
                return true;
            }
            self.cancel_all();
            if (submitted, completed) == (self.submitted(), self.stats.completions) {
                idle += 1;
            }
        }
        false
    }
}
