//! The ring: submission and completion queues, and the books of what the kernel holds.
//!
//! Everything here runs under the driver's lock, except [`Gate::enter`]. An operation is stored in
//! the [`OpTable`] before its entries are pushed; a completion is booked there (or moved into its
//! socket's [`Inbox`]) and the wakers of those concerned are collected, never called from here.

pub(crate) mod arrivals;
mod buffers;
mod grace;
pub(crate) mod inbox;
pub(crate) mod op;
pub(crate) mod probe;
pub(crate) mod recycle;
pub(crate) mod send;
pub(crate) mod slots;
pub(crate) mod table;
#[cfg(test)]
mod tests;
pub(crate) mod trial;

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::task::Waker;

use io_uring::squeue::Entry;
use io_uring::types::{CancelBuilder, Timespec};
use io_uring::{IoUring, cqueue};

use self::buffers::{BufferId, BufferRing};
use self::grace::{Grace, News};
use self::inbox::{Datagram, Inbox};
use self::op::{BindOp, Op, SocketMemory, SocketOption};
use self::recycle::{Drained, Recycler, Unfit};
use self::slots::{Ending, Holds, Opened, Receive, Room, SlotIndex, SlotState, SlotTable};
use self::table::{Ended, OpKey, OpTable, Outcome};
use crate::datagram::{parse_received, receive_header};
use crate::error::Errno;
use crate::limits::{
    BURST_DATAGRAMS, CHAIN_ENTRIES_MAX, COMPLETIONS_BATCH, CQ_ENTRIES, KEPT_BYTES_MAX,
    TEARDOWN_ROUNDS_MAX, TEND_BATCH,
};
use crate::stats::Stats;

/// The door to the kernel, usable without the driver's lock.
#[derive(Clone)]
pub(crate) struct Gate(Arc<IoUring>);

impl Gate {
    /// Submits `entries` entries and returns how many the kernel took. Told of `completions`, it
    /// also brings those kept aside for want of room, and blocks the thread until as many are there.
    #[expect(unsafe_code, reason = "io_uring_enter(2)")]
    pub(crate) fn enter(&self, entries: u32, completions: Option<u32>) -> io::Result<u32> {
        // IORING_ENTER_GETEVENTS.
        let (flags, completions) = (u32::from(completions.is_some()), completions.unwrap_or(0));
        // SAFETY: no argument is passed that the kernel would read or write; the memory that the
        // entries point to is kept by the operation table until their last completion
        // (`an_abandoned_operation_keeps_its_memory_until_the_last_completion`).
        let taken = unsafe {
            self.0.submitter().enter::<libc::sigset_t>(entries, completions, flags, None)
        }?;
        Ok(u32::try_from(taken).unwrap_or(u32::MAX))
    }
}

/// What came of an operation, for its caller.
pub(crate) struct Done {
    pub(crate) error: Option<Errno>,
    /// Datagrams that a `send` got into the kernel.
    pub(crate) sent: u64,
    /// What FIXED_FD_INSTALL has made.
    pub(crate) descriptor: Option<OwnedFd>,
}

/// A completion queue entry.
#[derive(Clone, Copy, Debug)]
struct Completion {
    user_data: u64,
    result: i32,
    flags: u32,
}

/// A bind to a port by number, which must not overtake the closes pushed before it.
struct Held {
    key: OpKey,
    closes_before: u64,
}

pub(crate) struct Ring {
    io: Arc<IoUring>,
    ops: OpTable,
    slots: SlotTable,
    grace: Grace,
    /// `None` once leaked.
    buffers: Option<BufferRing>,
    /// What every receive is armed with; boxed, for the kernel reads it by address.
    receive_header: Box<libc::msghdr>,
    /// Chains that did not fit the submission queue, in order.
    backlog: VecDeque<Vec<Entry>>,
    held: VecDeque<Held>,
    chain: Vec<Entry>,
    /// Entries pushed so far, the backlog's included.
    pushed: u64,
    /// Nobody is left who could want anything.
    is_ending: bool,
    /// Payload bytes pushed since everything was last handed to the kernel.
    unsent_bytes: usize,
    wakers: Vec<Waker>,
    pub(crate) stats: Stats,
}

// SAFETY: the only field that is not Send by itself is the header's null pointers.
#[expect(unsafe_code, reason = "msghdr holds raw pointers")]
unsafe impl Send for Ring {}

impl Ring {
    fn new(
        io: IoUring,
        buffers: BufferRing,
        room: Arc<Room>,
        recycler: Recycler,
        grace: Grace,
    ) -> Self {
        Self {
            io: Arc::new(io),
            ops: OpTable::default(),
            slots: SlotTable::new(room, recycler),
            grace,
            buffers: Some(buffers),
            receive_header: Box::new(receive_header()),
            backlog: VecDeque::new(),
            held: VecDeque::new(),
            chain: Vec::with_capacity(CHAIN_ENTRIES_MAX),
            pushed: 0,
            is_ending: false,
            unsent_bytes: 0,
            wakers: Vec::new(),
            stats: Stats::default(),
        }
    }

    pub(crate) fn gate(&self) -> Gate {
        Gate(Arc::clone(&self.io))
    }

    // ---- slots ------------------------------------------------------------------------------

    /// The owner of a slot is gone: cancels its receive, closes or unbinds its socket, and gives
    /// the slot away or keeps the socket once the last completion of both has come.
    pub(crate) fn close(&mut self, slot: SlotIndex, quota: &Arc<Room>, unread: u64) {
        self.stats.dropped_at_close += unread;
        let (ops, slots) = (&mut self.ops, &mut self.slots);
        self.held.retain(|held| {
            let mine = ops.find(held.key.user_data()).is_some_and(|(_, other, _)| other == slot);
            if mine {
                ops.withdraw(held.key);
                // Of an open slot, so nothing follows.
                let _ = slots.end(slot, false);
            }
            !mine
        });
        match self.slots.state(slot) {
            SlotState::Free
            | SlotState::Closing { .. }
            | SlotState::Kept { .. }
            | SlotState::GivenUp => return,
            SlotState::Open { receive: Receive::Armed(key) } => {
                // In the same submission as the CLOSE, which else would answer 0 and free nothing.
                let cancel = op::cancel(key.user_data());
                self.push_chain(&[cancel]);
            }
            // Of a bind that was held the kernel knows nothing; the CLOSE of its empty slot then
            // answers EBADF, which is as good.
            SlotState::Open { .. } => {}
        }
        if let Some(ending) = self.slots.close(slot, quota) {
            self.push_ending(slot, ending);
        }
    }

    fn push_ending(&mut self, slot: SlotIndex, ending: Ending) {
        if ending == Ending::Unbind {
            self.submit_unclaimed(slot, Op::Unbind(Box::new(SocketMemory::unknown())));
            return;
        }
        if self.slots.takes_bursts(slot) {
            self.submit_unclaimed(slot, Op::CountDrops(Box::new(SocketMemory::unknown())));
        }
        self.submit_unclaimed(slot, Op::Close);
    }

    // ---- recycling --------------------------------------------------------------------------

    /// Moves kept sockets on: into a grace period, out of it, and out of the way.
    fn tend(&mut self) {
        match self.grace.take_news() {
            Some(News::Over) => self.slots.end_grace(),
            Some(News::Time) => self.slots.recycler.idle(),
            Some(News::Failed) => self.slots.recycler.turn_off("there are no grace periods"),
            None => {}
        }
        self.begin_grace();
        let recycler = &self.slots.recycler;
        if recycler.is_empty() {
            return;
        }
        self.grace.set_timer(recycler.limits().idle);
        for _ in 0..TEND_BATCH {
            let Some(slot) = self.slots.recycler.next_to_drain() else { break };
            self.drain(slot);
        }
        for _ in 0..TEND_BATCH {
            let Some(slot) = self.slots.recycler.next_surplus() else { break };
            self.give_up(slot);
        }
    }

    fn begin_grace(&mut self) {
        if self.slots.recycler.begin_grace() {
            self.grace.begin();
        }
    }

    /// Whether there is something that `tend` has not heard of.
    pub(crate) fn has_news(&self) -> bool {
        self.grace.has_news()
    }

    /// Whether `tend` would push more.
    pub(crate) fn has_kept_work(&self) -> bool {
        self.slots.recycler.has_work()
    }

    fn drain(&mut self, slot: SlotIndex) {
        let ask = self.slots.history(slot).may_be_sending();
        let memory = ask.then(|| Box::new(SocketMemory::unknown()));
        self.submit_unclaimed(slot, Op::Drain(memory));
    }

    fn drained(&mut self, slot: SlotIndex, is_empty: bool) {
        match self.slots.drained(slot, is_empty) {
            Drained::Again => self.drain(slot),
            Drained::Warm => {}
            Drained::Close => self.give_up(slot),
        }
    }

    /// Closes as many sockets as are kept now, bit by bit.
    pub(crate) fn close_kept(&mut self) {
        self.slots.recycler.give_up(Unfit::Idle);
    }

    fn give_up(&mut self, slot: SlotIndex) {
        self.slots.give_up(slot);
        self.push_ending(slot, Ending::Close);
    }

    // ---- submissions ------------------------------------------------------------------------

    /// Pushes an operation that somebody will wait for.
    pub(crate) fn submit(&mut self, slot: SlotIndex, mut op: Op) -> OpKey {
        if let Op::Send(send) = &mut op {
            send.plan(self.slots.segment_max(slot));
            self.unsent_bytes += send.bytes();
        }
        self.record(slot, &op);
        self.slots.begin(slot, matches!(op, Op::Send(_)));
        let key = self.ops.insert(op, slot);
        self.push(key);
        key
    }

    /// Tells a slot's history of an operation that leaves something in its socket.
    fn record(&mut self, slot: SlotIndex, op: &Op) {
        let history = self.slots.history(slot);
        match op {
            Op::Send(_) => history.send(),
            Op::Connect(_) => history.connect(),
            Op::SetOption(_) => history.spoil(Unfit::Options),
            // `submit_bind` does so itself, for one that is held, too.
            Op::Bind(_)
            | Op::Receive(_)
            | Op::Install
            | Op::CountDrops(_)
            | Op::Unbind(_)
            | Op::Drain(_)
            | Op::Close => {}
        }
    }

    fn submit_unclaimed(&mut self, slot: SlotIndex, op: Op) -> OpKey {
        self.record(slot, &op);
        let key = self.ops.insert_unclaimed(op, slot);
        self.slots.begin(slot, false);
        self.push(key);
        key
    }

    /// Pushes the chain that makes and binds a socket which has its place in the room, in the slot
    /// it has or is given now. A bind to a port by number is held until the closes pushed before it
    /// are done: they may be giving up that very port.
    pub(crate) fn submit_bind(
        &mut self,
        slot: Option<SlotIndex>,
        mut bind: Box<BindOp>,
    ) -> (SlotIndex, OpKey) {
        let (names_port, is_addressed) = (bind.addr.port() != 0, bind.is_addressed());
        let slot = slot.unwrap_or_else(|| {
            let reused = (!names_port && !bind.sets_options()).then(|| bind.sets_source());
            let Opened { slot, holds } = self.slots.open(bind.family, reused);
            bind.is_recycled = holds == Holds::Warm;
            if holds == Holds::Evicted {
                // If SOCKET failed, BIND would go on with what it has not replaced.
                self.submit_unclaimed(slot, Op::Close);
            }
            slot
        });
        let history = self.slots.history(slot);
        history.bind(is_addressed);
        if names_port {
            history.spoil(Unfit::NamedPort);
        }
        if bind.sets_options() {
            history.spoil(Unfit::Options);
        }
        let op = Op::Bind(bind);
        let closes_before = self.slots.closes().next();
        if !names_port || self.slots.closes().all_finished_before(closes_before) {
            return (slot, self.submit(slot, op));
        }
        let key = self.ops.insert(op, slot);
        self.slots.begin(slot, false);
        self.held.push_back(Held { key, closes_before });
        (slot, key)
    }

    /// Arms the slot's receive unless that has been done.
    pub(crate) fn arm(&mut self, slot: SlotIndex, inbox: &Arc<Inbox>) {
        if matches!(self.slots.state(slot), SlotState::Open { receive: Receive::Idle }) {
            let key = self.submit_unclaimed(slot, Op::Receive(Arc::clone(inbox)));
            *self.slots.state(slot) = SlotState::Open { receive: Receive::Armed(key) };
        }
    }

    /// Lets a paused receive go on.
    pub(crate) fn resume(&mut self, slot: SlotIndex) {
        if let SlotState::Open { receive } = self.slots.state(slot)
            && let Receive::Full(inbox) = receive
        {
            let inbox = Arc::clone(inbox);
            *receive = Receive::Idle;
            self.stats.rearms += 1;
            self.arm(slot, &inbox);
        }
    }

    fn push(&mut self, key: OpKey) {
        let Some((_, slot, op)) = self.ops.find(key.user_data()) else { return };
        let mut chain = std::mem::take(&mut self.chain);
        op.write(slot, key.user_data(), &raw const *self.receive_header, &mut chain);
        self.push_chain(&chain);
        chain.clear();
        self.chain = chain;
    }

    /// Pushes entries that must stay together, in order with all others.
    fn push_chain(&mut self, chain: &[Entry]) {
        self.pushed += chain.len() as u64;
        if !self.backlog.is_empty() || !self.try_push(chain) {
            self.backlog.push_back(chain.to_vec());
        }
    }

    #[expect(unsafe_code, reason = "the submission queue")]
    fn try_push(&mut self, chain: &[Entry]) -> bool {
        // SAFETY: `&mut self` is the only way to the queue, so no second one exists.
        let mut queue = unsafe { self.io.submission_shared() };
        // SAFETY: what the entries point to is kept by the operation table until their last
        // completion (`an_abandoned_operation_keeps_its_memory_until_the_last_completion`), and the
        // receive header by the ring.
        unsafe { queue.push_multiple(chain) }.is_ok()
    }

    /// Moves what waits into the submission queue, and returns how many entries are in it.
    #[expect(unsafe_code, reason = "the submission queue")]
    pub(crate) fn ready_to_enter(&mut self) -> u32 {
        if !self.is_ending {
            self.tend();
        }
        while let Some(chain) = self.backlog.pop_front() {
            if !self.try_push(&chain) {
                self.backlog.push_front(chain);
                break;
            }
        }
        // SAFETY: `&mut self` is the only way to the queue, so no second one exists.
        let queue = unsafe { self.io.submission_shared() };
        self.unsent_bytes = 0;
        u32::try_from(queue.len()).unwrap_or(u32::MAX)
    }

    /// Payload bytes that wait for an enter.
    pub(crate) fn unsent_bytes(&self) -> usize {
        self.unsent_bytes
    }

    /// Whether completions are kept aside because their queue was full.
    #[expect(unsafe_code, reason = "the submission queue's flags")]
    pub(crate) fn has_overflow(&mut self) -> bool {
        // SAFETY: `&mut self` is the only way to the queue, so no second one exists.
        unsafe { self.io.submission_shared() }.cq_overflow()
    }

    /// Whether completions wait for the thread that armed a receive to enter the kernel.
    #[expect(unsafe_code, reason = "the submission queue's flags")]
    pub(crate) fn has_task_work(&mut self) -> bool {
        // SAFETY: `&mut self` is the only way to the queue, so no second one exists.
        unsafe { self.io.submission_shared() }.taskrun()
    }

    /// Entries pushed so far; an operation has reached the kernel when `submitted` is as large.
    pub(crate) fn pushed(&self) -> u64 {
        self.pushed
    }

    pub(crate) fn submitted(&self) -> u64 {
        self.stats.submissions
    }

    // ---- completions ------------------------------------------------------------------------

    /// Books every completion that has come.
    #[expect(unsafe_code, reason = "the completion queue")]
    pub(crate) fn complete_all(&mut self) {
        let mut batch = [const { MaybeUninit::uninit() }; COMPLETIONS_BATCH];
        // Bounded, for a flood fills the queue as fast as it is emptied; `listen` tells of the rest.
        for _ in 0..CQ_ENTRIES as usize / COMPLETIONS_BATCH {
            // SAFETY: `&mut self` is the only way to the queue, so no second one exists.
            let mut queue = unsafe { self.io.completion_shared() };
            let batch = queue.fill(&mut batch);
            drop(queue);
            let pauses = self.stats.pauses;
            for entry in &*batch {
                self.complete(Completion {
                    user_data: entry.user_data(),
                    result: entry.result(),
                    flags: entry.flags(),
                });
            }
            // A receive that is to pause must be cancelled before more of it is taken.
            if batch.len() < COMPLETIONS_BATCH || self.stats.pauses > pauses {
                break;
            }
        }
        if !self.is_ending {
            // What is unbound now need not wait for the next enter.
            self.begin_grace();
        }
    }

    fn complete(&mut self, completion: Completion) {
        self.stats.completions += 1;
        let Completion { user_data, result, flags } = completion;
        if let Some(target) = op::cancelled_by(user_data) {
            // Only failures complete. If the target has not ended, the cancel came while it was
            // between two waits: once more, for without a receive's end its slot is lost.
            if self.ops.find(target).is_some() {
                self.push_chain(&[op::cancel(target)]);
            }
            return;
        }
        let Some((key, slot, op)) = self.ops.find(user_data) else {
            // Nobody's; a buffer it names is ours again all the same.
            if let (Some(id), Some(buffers)) = (cqueue::buffer_select(flags), &mut self.buffers) {
                buffers.publish(BufferId(id));
            }
            return;
        };
        if let Op::Receive(inbox) = op {
            let inbox = Arc::clone(inbox);
            return self.complete_receive(key, slot, &inbox, completion);
        }
        let Some((op, outcome)) = self.ops.count(key, result) else { return };
        if let Op::Bind(bind) = op
            && bind.is_recycled
        {
            self.slots.recycler.taken(outcome.error.is_none());
            if outcome.error.is_some() && matches!(self.slots.state(slot), SlotState::Open { .. }) {
                // An error is never the former owner's: a new socket, in the same slot, shall tell.
                bind.is_recycled = false;
                self.slots.replace(slot, bind.family, bind.is_addressed());
                self.ops.restart(key);
                return self.push(key);
            }
        }
        if let Op::Send(send) = op {
            let attempt = send.settle(outcome.succeeded as usize, outcome.error);
            if let Some(segment_max) = attempt.segment_max {
                self.slots.limit_segments(slot, segment_max);
                self.stats.gso_refusals += 1;
            }
            if attempt.again && !self.is_ending {
                send.plan(self.slots.segment_max(slot));
                self.ops.restart(key);
                return self.push(key);
            }
            self.stats.datagrams_sent += send.sent();
            self.stats.datagrams_coalesced += send.coalesced();
            self.stats.bytes_sent += outcome.sum;
        }
        let is_send = matches!(op, Op::Send(_));
        let is_drain = matches!(op, Op::Drain(_));
        if let Op::Unbind(memory) = op
            && memory.unread() > KEPT_BYTES_MAX
        {
            self.slots.history(slot).spoil(Unfit::Unread);
        }
        if let Op::Unbind(memory) | Op::Drain(Some(memory)) = op
            && memory.is_all_sent()
        {
            self.slots.history(slot).has_sent_all();
        }
        let error = outcome.error;
        if error.is_some() && !is_drain {
            self.slots.history(slot).spoil(Unfit::Error);
        }
        self.end(slot, is_send);
        if is_drain {
            self.drained(slot, error == Some(Errno(libc::EAGAIN)));
        }
        self.finish(key);
    }

    /// Ends an operation that had its last completion.
    fn finish(&mut self, key: OpKey) {
        match self.ops.end(key) {
            Some(Ended::Fetchable(waker)) => self.wakers.extend(waker),
            Some(Ended::Unclaimed(op, outcome)) => drop(self.done(&op, outcome)),
            None => {}
        }
    }

    fn end(&mut self, slot: SlotIndex, is_send: bool) {
        if let Some(ending) = self.slots.end(slot, is_send) {
            self.push_ending(slot, ending);
        }
        while let Some(held) = self.held.pop_front() {
            if !self.slots.closes().all_finished_before(held.closes_before) {
                self.held.push_front(held);
                break;
            }
            self.push(held.key);
        }
    }

    /// Takes what an operation left behind. Called once for each that was fetched or that nobody
    /// will fetch; a descriptor that nobody wants closes itself
    /// (`descriptors_are_not_left_behind_by_calls_given_up`).
    #[expect(unsafe_code, reason = "a descriptor number becomes an owner")]
    fn done(&mut self, op: &Op, outcome: Outcome) -> Done {
        let sent = if let Op::Send(send) = op { send.sent() } else { 0 };
        if let Op::CountDrops(memory) = op
            && outcome.succeeded == 1
        {
            self.stats.dropped_by_kernel += u64::from(memory.drops());
        }
        let installed = matches!(op, Op::Install) && outcome.succeeded == 1;
        let descriptor = installed.then(|| {
            let fd: RawFd = outcome.value.cast_signed();
            // SAFETY: FIXED_FD_INSTALL has just made this descriptor for us alone, and the
            // operation has left the table, so this happens once.
            unsafe { OwnedFd::from_raw_fd(fd) }
        });
        Done { error: outcome.error, sent, descriptor }
    }

    fn complete_receive(
        &mut self,
        key: OpKey,
        slot: SlotIndex,
        inbox: &Arc<Inbox>,
        Completion { result, flags, .. }: Completion,
    ) {
        if let Some(id) = cqueue::buffer_select(flags) {
            self.deliver(slot, BufferId(id), result, inbox);
        } else if result < 0 {
            match -result {
                // No buffer was free (they are by the time it is armed again), or it was
                // cancelled: by us, or because the thread that armed it has exited.
                libc::ENOBUFS | libc::ECANCELED => {}
                errno => {
                    self.slots.history(slot).spoil(Unfit::Error);
                    self.wakers.extend(inbox.push_error(Errno(errno)));
                }
            }
        }
        let full = inbox.pause_if_full();
        if cqueue::more(flags) {
            if let SlotState::Open { receive } = self.slots.state(slot)
                && full
                && matches!(receive, Receive::Armed(_))
            {
                *receive = Receive::Pausing;
                self.stats.pauses += 1;
                self.push_chain(&[op::cancel(key.user_data())]);
            }
            return;
        }
        // The receive has ended. Zero-length datagrams, pending errors, empty buffer rings and
        // overflows all end it; the datagrams that follow wait in the kernel until it is armed.
        let is_ending = self.is_ending;
        match self.slots.state(slot) {
            // Nobody closes what is open now: armed again, it would be cancelled again, for ever.
            _ if is_ending => {}
            SlotState::Open { receive } if full => {
                if !matches!(receive, Receive::Pausing) {
                    self.stats.pauses += 1;
                }
                *receive = Receive::Full(Arc::clone(inbox));
            }
            SlotState::Open { receive } => {
                *receive = Receive::Armed(key);
                self.stats.rearms += 1;
                return self.push(key);
            }
            SlotState::Closing { .. } => self.stats.dropped_at_close += inbox.discard(),
            // Its receive has ended before.
            SlotState::Free | SlotState::Kept { .. } | SlotState::GivenUp => {}
        }
        self.end(slot, false);
        self.finish(key);
        // The guest may have drained the inbox while the cancel was on its way.
        if inbox.resume_if_drained() {
            self.resume(slot);
        }
    }

    /// Moves what a buffer holds to the inbox, each datagram into memory of its own size, and
    /// sends the buffer home.
    fn deliver(&mut self, slot: SlotIndex, id: BufferId, result: i32, inbox: &Inbox) {
        let Some(buffers) = &mut self.buffers else { return };
        let received = usize::try_from(result)
            .ok()
            .and_then(|len| buffers.filled(id, len))
            .and_then(parse_received);
        let mut queued = 0;
        if let Some(received) = received {
            let payloads = received.payloads();
            let count = payloads.len() as u64;
            self.stats.datagrams_received += count;
            self.stats.datagrams_split += if count > 1 { count } else { 0 };
            self.stats.bytes_received += received.bytes() as u64;
            let from = received.from;
            let arrived =
                inbox.push(payloads.map(|payload| Datagram { payload: payload.to_vec(), from }));
            queued = arrived.queued;
            self.wakers.extend(arrived.waker);
        } else if result >= 0 {
            self.stats.dropped_malformed += 1;
        }
        buffers.publish(id);
        if queued >= BURST_DATAGRAMS {
            self.take_bursts(slot);
        }
    }

    /// Has the kernel hand over equal datagrams of one sender in one message, from now on.
    fn take_bursts(&mut self, slot: SlotIndex) {
        if matches!(self.slots.state(slot), SlotState::Open { .. }) && self.slots.mark_bursts(slot)
        {
            let on = SocketOption { level: libc::SOL_UDP, name: libc::UDP_GRO, value: 1 };
            self.submit_unclaimed(slot, Op::SetOption(Box::new(on)));
        }
    }

    /// Wakers of those whose completions were booked.
    pub(crate) fn take_wakers(&mut self, into: &mut Vec<Waker>) {
        into.append(&mut self.wakers);
    }

    /// The wakers of everybody who waits.
    pub(crate) fn take_all_wakers(&mut self) -> Vec<Waker> {
        let mut wakers = self.ops.take_wakers();
        wakers.append(&mut self.wakers);
        wakers
    }

    /// From now on an arrival signals the eventfd; `true` if one came before that took effect.
    #[expect(unsafe_code, reason = "the completion queue's flags")]
    pub(crate) fn listen(&mut self) -> bool {
        {
            // SAFETY: `&mut self` is the only way to the queue, so no second one exists.
            let queue = unsafe { self.io.completion_shared() };
            queue.enable_eventfd();
        }
        // Between our flag and our look at the tail, as the kernel fences between its own two.
        fence(Ordering::SeqCst);
        // SAFETY: as above; the first queue is gone.
        !unsafe { self.io.completion_shared() }.is_empty()
    }

    /// While somebody is about to look anyway, arrivals need not signal.
    #[expect(unsafe_code, reason = "the completion queue's flags")]
    pub(crate) fn stop_listening(&mut self) {
        // SAFETY: `&mut self` is the only way to the queue, so no second one exists.
        unsafe { self.io.completion_shared() }.disable_eventfd();
    }

    // ---- callers ----------------------------------------------------------------------------

    /// What came of an operation that is done; else remembers whom to wake, if told.
    pub(crate) fn fetch(&mut self, key: OpKey, waker: Option<&Waker>) -> Option<Done> {
        let (op, outcome) = self.ops.fetch(key, waker)?;
        Some(self.done(&op, outcome))
    }

    /// Whether an operation is done; else remembers whom to wake.
    pub(crate) fn is_done(&mut self, key: OpKey, waker: &Waker) -> bool {
        self.ops.is_done(key, waker)
    }

    pub(crate) fn abandon(&mut self, key: OpKey) {
        if let Some((op, outcome)) = self.ops.abandon(key) {
            drop(self.done(&op, outcome));
        }
    }

    /// Takes a `send` of one message back if it still waits for room.
    pub(crate) fn cancel(&mut self, key: OpKey) {
        if let Some(send) = self.ops.send_mut(key) {
            debug_assert_eq!(send.messages(), 1, "a cancel ends one entry");
            send.cancel();
            self.push_chain(&[op::cancel(key.user_data())]);
        }
    }

    pub(crate) fn snapshot(&self) -> Stats {
        let room = self.slots.room();
        let recycler = &self.slots.recycler;
        Stats {
            sockets_created: room.created(),
            sockets_open: room.taken(),
            sockets_recycled: recycler.recycled(),
            sockets_kept: recycler.kept(),
            closed_instead: recycler.closed_instead(),
            ..self.stats
        }
    }
}

impl Drop for Ring {
    /// Cancels everything, waits with a bound for the kernel to let go of the memory, and leaks
    /// what it does not let go of.
    fn drop(&mut self) {
        self.is_ending = true;
        let gate = self.gate();
        let bound = Timespec::new().nsec(1_000_000);
        let mut idle = 0;
        while idle < TEARDOWN_ROUNDS_MAX {
            let (submitted, completed) = (self.submitted(), self.stats.completions);
            let entries = self.ready_to_enter();
            if let Ok(taken) = gate.enter(entries, Some(0)) {
                self.stats.submissions += u64::from(taken);
            }
            self.complete_all();
            if self.ops.is_quiet() && self.backlog.is_empty() {
                return;
            }
            // NotFound: nothing was left to cancel, so its completions are in the queue.
            let _ = self.io.submitter().register_sync_cancel(Some(bound), CancelBuilder::any());
            if (submitted, completed) == (self.submitted(), self.stats.completions) {
                idle += 1;
            }
        }
        tracing::warn!("io_uring operations did not end in time; their memory is leaked");
        std::mem::forget(std::mem::take(&mut self.ops));
        std::mem::forget(std::mem::replace(&mut self.receive_header, Box::new(receive_header())));
        if let Some(buffers) = self.buffers.take() {
            buffers.leak();
        }
    }
}
