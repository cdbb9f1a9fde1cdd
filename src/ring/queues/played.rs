//! A kernel that a test plays, in the place of io_uring: the queues that the ring shares with it, and
//! behind them UDP sockets, as far as the ring can tell them from the kernel's own.
//!
//! It reads and writes memory where the entries say, and no sooner or later than the kernel might: so a
//! ring that frees too early shows under a sanitizer, and `Ring::audit` says so without one. What it
//! chooses, it chooses by a seed: faults, orders, ends. What is not modelled: `FIXED_FD_INSTALL`, more than
//! one network.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::resume_unwind;
use std::sync::{Arc, OnceLock, PoisonError};

use io_uring::squeue::{Entry, Flags};
use io_uring::types::{BufRingEntry, CancelBuilder, Timespec};
use io_uring::{cqueue, opcode, squeue};
use proptest::prelude::{Rng, RngExt};
use proptest::test_runner::{RngAlgorithm, TestRng};

use super::{CANCEL, OpKey, Queues, SlotIndex};
use crate::datagram::{Family, RawAddr, decode_addr};
use crate::limits::{BUFFERS, CONTROL_BYTES, NAME_BYTES, RECEIVE_HEADER_BYTES, SQ_ENTRIES};
use crate::ring::Ring;
use crate::ring::buffers::BufferRing;
use crate::ring::eventfd::EventFd;
use crate::ring::kernel_defaults::Defaults;
use crate::ring::process::Process;
use crate::ring::recycle::Recycler;
use crate::ring::recycle::pool::Recycle;
use crate::ring::recycle::rcu::Rcu;
use crate::ring::recycle::rcu::played::PlayedThread;
use crate::ring::recycle::self_test::{FamilySupport, Support};
use crate::ring::setup::{Built, Known};
use crate::ring::share::Share;
use crate::ring::slots::SlotState;
use crate::ring::timer::Timer;
use crate::stats::Stats;
use crate::sync::{Mutex, MutexGuard};

// ---- what `queues` uses of io_uring -----------------------------------------------------------------

pub(crate) enum IoUring {
    Kernel(Box<io_uring::IoUring>),
    Played(Arc<Played>),
}

pub(super) enum SubmissionQueue<'a> {
    Kernel(squeue::SubmissionQueue<'a>),
    Played(&'a Played),
}

pub(super) enum CompletionQueue<'a> {
    Kernel(cqueue::CompletionQueue<'a>),
    Played(&'a Played),
}

pub(super) enum Submitter<'a> {
    Kernel(io_uring::Submitter<'a>),
    Played(&'a Played),
}

/// The submission queue has no room.
pub(super) struct Full;

impl From<io_uring::IoUring> for IoUring {
    fn from(io: io_uring::IoUring) -> Self {
        Self::Kernel(Box::new(io))
    }
}

#[expect(unsafe_code, reason = "as io_uring has it")]
impl IoUring {
    pub(super) unsafe fn submission_shared(&self) -> SubmissionQueue<'_> {
        match self {
            // SAFETY: the caller's.
            Self::Kernel(io) => SubmissionQueue::Kernel(unsafe { io.submission_shared() }),
            Self::Played(played) => SubmissionQueue::Played(played),
        }
    }

    pub(super) unsafe fn completion_shared(&self) -> CompletionQueue<'_> {
        match self {
            // SAFETY: the caller's.
            Self::Kernel(io) => CompletionQueue::Kernel(unsafe { io.completion_shared() }),
            Self::Played(played) => CompletionQueue::Played(played),
        }
    }

    pub(super) fn submitter(&self) -> Submitter<'_> {
        match self {
            Self::Kernel(io) => Submitter::Kernel(io.submitter()),
            Self::Played(played) => Submitter::Played(played),
        }
    }

    pub(super) fn params(&self) -> &io_uring::Parameters {
        match self {
            Self::Kernel(io) => io.params(),
            Self::Played(_) => unreachable!("of a test of the kernel's"),
        }
    }

    pub(super) fn submit_and_wait(&self, want: usize) -> io::Result<usize> {
        match self {
            Self::Kernel(io) => io.submit_and_wait(want),
            Self::Played(_) => unreachable!("of the set-up"),
        }
    }
}

impl AsRawFd for IoUring {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Kernel(io) => io.as_raw_fd(),
            Self::Played(_) => unreachable!("of a fork"),
        }
    }
}

#[expect(unsafe_code, reason = "as io_uring has it")]
impl SubmissionQueue<'_> {
    pub(super) unsafe fn push_multiple(&mut self, chain: &[Entry]) -> Result<(), Full> {
        match self {
            // SAFETY: the caller's.
            Self::Kernel(queue) => unsafe { queue.push_multiple(chain) }.map_err(|_| Full),
            Self::Played(played) => {
                let mut kernel = played.kernel();
                if kernel.submissions.len() + chain.len() > kernel.submissions_max {
                    return Err(Full);
                }
                kernel.submissions.extend(chain.iter().map(Sqe::from));
                Ok(())
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Kernel(queue) => queue.len(),
            Self::Played(played) => played.kernel().submissions.len(),
        }
    }

    pub(super) fn capacity(&self) -> usize {
        match self {
            Self::Kernel(queue) => queue.capacity(),
            Self::Played(played) => played.kernel().submissions_max,
        }
    }

    pub(super) fn cq_overflow(&self) -> bool {
        match self {
            Self::Kernel(queue) => queue.cq_overflow(),
            Self::Played(played) => !played.kernel().overflow.is_empty(),
        }
    }

    pub(super) fn taskrun(&self) -> bool {
        match self {
            Self::Kernel(queue) => queue.taskrun(),
            Self::Played(played) => !played.kernel().work.is_empty(),
        }
    }
}

impl CompletionQueue<'_> {
    pub(super) fn fill<'a>(
        &mut self,
        batch: &'a mut [MaybeUninit<cqueue::Entry>],
    ) -> &'a mut [cqueue::Entry] {
        match self {
            Self::Kernel(queue) => queue.fill(batch),
            Self::Played(played) => played.kernel().fill(batch),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Kernel(queue) => queue.is_empty(),
            Self::Played(played) => played.kernel().completions.is_empty(),
        }
    }

    pub(super) fn enable_eventfd(&self) {
        match self {
            Self::Kernel(queue) => queue.enable_eventfd(),
            Self::Played(played) => played.kernel().is_notifying = true,
        }
    }

    pub(super) fn disable_eventfd(&self) {
        match self {
            Self::Kernel(queue) => queue.disable_eventfd(),
            Self::Played(played) => played.kernel().is_notifying = false,
        }
    }

    pub(super) fn next(&mut self) -> Option<cqueue::Entry> {
        match self {
            Self::Kernel(queue) => queue.next(),
            Self::Played(_) => unreachable!("of the set-up"),
        }
    }
}

#[expect(unsafe_code, reason = "as io_uring has it")]
impl Submitter<'_> {
    pub(super) unsafe fn enter<T>(
        &self,
        entries: u32,
        completions: u32,
        flags: u32,
        arg: Option<&T>,
    ) -> io::Result<usize> {
        match self {
            // SAFETY: the caller's.
            Self::Kernel(to) => unsafe { to.enter(entries, completions, flags, arg) },
            Self::Played(played) => played.enter(entries, flags != 0),
        }
    }

    pub(super) fn register_sync_cancel(
        &self,
        bound: Option<Timespec>,
        which: CancelBuilder,
    ) -> io::Result<()> {
        match self {
            Self::Kernel(to) => to.register_sync_cancel(bound, which),
            Self::Played(played) => {
                let mut kernel = played.kernel();
                kernel.exit_thread();
                Ok(())
            }
        }
    }
}

// ---- the kernel -------------------------------------------------------------------------------------

/// Numbers by a seed.
pub(crate) struct Dice(TestRng);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        // Neighbours are to differ in more than a bit, and none is to be 0.
        let words =
            [seed, !seed].map(|word| word.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29));
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut rng = TestRng::from_seed(RngAlgorithm::XorShift, &bytes);
        (0..8).for_each(|_| _ = rng.next_u64());
        Self(rng)
    }

    /// Below that.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0.random_range(0..end)
    }

    /// Once in so many times.
    pub(crate) fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }
}

/// What a panic carries that the kernel was told to have.
pub(crate) struct PlayedPanic;

/// How often `io_uring_enter` does what it seldom does.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Faults {
    /// It fails once in so many times; 0: never.
    pub(crate) refuses: usize,
    /// It always fails, with this errno.
    pub(crate) outage: Option<i32>,
    /// It takes only a part once in so many times.
    pub(crate) takes_part: usize,
    /// A part may end within a chain, as where the kernel has no memory for the next of it.
    pub(crate) cuts_chains: bool,
    /// The thread panics there once in so many times.
    pub(crate) panics: usize,
}

pub(crate) struct Played {
    kernel: Mutex<Kernel>,
    /// What other threads do while one is inside.
    meanwhile: fn(),
}

/// A submission queue entry, as `linux/io_uring.h` has it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Sqe {
    opcode: u8,
    flags: u8,
    ioprio: u16,
    fd: i32,
    /// Also the second address, and a command.
    off: u64,
    /// Also level and name of an option.
    addr: u64,
    len: u32,
    op_flags: u32,
    user_data: u64,
    buffer: u16,
    personality: u16,
    /// Also the length of an option or of an address.
    file_index: u32,
    addr3: u64,
    pad: u64,
}

#[expect(unsafe_code, reason = "an entry as the words it consists of")]
impl From<&Entry> for Sqe {
    fn from(entry: &Entry) -> Self {
        // SAFETY: both are 64 bytes of plain integers.
        unsafe { std::mem::transmute::<Entry, Self>(entry.clone()) }
    }
}

impl Sqe {
    fn has(&self, flag: Flags) -> bool {
        self.flags & flag.bits() != 0
    }

    /// For send buffer, or for something to receive.
    fn waits(&self) -> bool {
        self.op_flags & libc::MSG_DONTWAIT.cast_unsigned() == 0
    }

    fn slot(&self) -> usize {
        usize::try_from(self.fd).expect("a slot")
    }

    fn address_len(&self) -> u32 {
        u32::try_from(self.off).unwrap_or(u32::MAX)
    }
}

#[derive(Clone, Copy)]
struct Cqe {
    user_data: u64,
    result: i32,
    flags: u32,
}

impl Cqe {
    #[expect(unsafe_code, reason = "an entry that only the kernel makes")]
    fn entry(self) -> cqueue::Entry {
        let [low, high] = [self.user_data, self.user_data >> 32]
            .map(|word| u32::try_from(word & u64::from(u32::MAX)).expect("half of it"));
        // SAFETY: both are 16 bytes of plain integers.
        unsafe { std::mem::transmute([low, high, self.result.cast_unsigned(), self.flags]) }
    }
}

/// An operation that goes on.
struct Request {
    sqe: Sqe,
    file: u32,
    /// What is linked behind it.
    rest: VecDeque<Sqe>,
    /// Its end waits for its thread to enter.
    is_ending: bool,
}

/// What waits for a thread to enter.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    Go(u64),
    End(u64),
}

struct Message {
    from: SocketAddr,
    payload: Vec<u8>,
}

/// A socket.
struct File {
    family: Family,
    /// By the table, and by operations that go on.
    uses: u32,
    port: Option<u16>,
    is_port_named: bool,
    /// Times it was bound: each owner does it once.
    binds: u32,
    peer: Option<SocketAddr>,
    inbox: VecDeque<Message>,
    error: Option<i32>,
    /// Messages that the send buffer has room for.
    room: usize,
    has_gro: bool,
    drops: u32,
    delivered: u64,
}

/// What a datagram carries that arrives at a socket: for which owner it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) file: u32,
    pub(crate) binds: u32,
    pub(crate) number: u64,
}

impl Stamp {
    pub(crate) const BYTES: usize = 16;

    /// Number of one that was on its way when its socket was unbound.
    pub(crate) const LATE: u64 = u64::MAX;

    pub(crate) fn read(payload: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_ne_bytes(payload.get(at..at + 4)?.try_into().ok()?));
        let number = payload.get(8..Self::BYTES)?.try_into().ok()?;
        Some(Self { file: word(0)?, binds: word(4)?, number: u64::from_ne_bytes(number) })
    }
}

pub(crate) struct Kernel {
    dice: Dice,
    pub(crate) faults: Faults,
    is_short: bool,
    submissions: VecDeque<Sqe>,
    submissions_max: usize,
    completions: VecDeque<Cqe>,
    completions_max: usize,
    overflow: VecDeque<Cqe>,
    is_notifying: bool,
    eventfd: EventFd,
    requests: BTreeMap<u64, Request>,
    next_request: u64,
    work: VecDeque<Work>,
    table: Vec<Option<u32>>,
    files: BTreeMap<u32, File>,
    next_file: u32,
    /// Files of no use any more: their ports are free when the thread leaves the kernel.
    dying: Vec<u32>,
    /// Datagrams that had found a socket before it was unbound.
    late: Vec<(u32, Message)>,
    ports: u16,
    buffers: usize,
    buffers_head: u16,
    /// Datagrams that were sent.
    pub(crate) sent: u64,
}

const FIRST_PORT: u16 = 40_000;
const INBOX_MAX: usize = 40;

impl Played {
    pub(crate) fn kernel(&self) -> MutexGuard<'_, Kernel> {
        self.kernel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, entries: u32, flushes: bool) -> io::Result<usize> {
        self.let_others_act();
        let taken = {
            let mut kernel = self.kernel();
            let entries = entries as usize;
            match kernel.fault(entries) {
                Fault::Refuses(errno) => return Err(io::Error::from_raw_os_error(errno)),
                Fault::Panics => {
                    drop(kernel);
                    // Without the panic hook's lines.
                    resume_unwind(Box::new(PlayedPanic));
                }
                Fault::Takes(taken) => {
                    kernel.submit(taken);
                    if flushes {
                        kernel.flush_overflow();
                    }
                    let all = kernel.dice.once_in(2);
                    kernel.run_work(all);
                    kernel.leave();
                    taken
                }
            }
        };
        self.let_others_act();
        Ok(taken)
    }

    fn let_others_act(&self) {
        // `shuttle` has its own dice.
        if cfg!(shuttle) || self.kernel().dice.once_in(3) {
            (self.meanwhile)();
        }
    }
}

enum Fault {
    Refuses(i32),
    Panics,
    Takes(usize),
}

impl Kernel {
    fn fault(&mut self, entries: usize) -> Fault {
        let Faults { refuses, outage, takes_part, cuts_chains, panics } = self.faults;
        if let Some(errno) = outage {
            return Fault::Refuses(errno);
        }
        if panics > 0 && self.dice.once_in(panics) && !std::thread::panicking() {
            return Fault::Panics;
        }
        if refuses > 0 && self.dice.once_in(refuses) {
            let errnos =
                [libc::ENOMEM, libc::EAGAIN, libc::EINTR, libc::EBUSY, libc::ENXIO, libc::EPERM];
            return Fault::Refuses(errnos[self.dice.below(errnos.len())]);
        }
        if takes_part > 0 && entries > 1 && self.dice.once_in(takes_part) {
            let mut taken = 1 + self.dice.below(entries - 1);
            while !cuts_chains && self.submissions[taken - 1].has(Flags::IO_LINK) {
                taken += 1;
            }
            self.is_short |= cuts_chains;
            return Fault::Takes(taken);
        }
        Fault::Takes(entries)
    }

    fn submit(&mut self, entries: usize) {
        let mut chain = VecDeque::new();
        for sqe in self.submissions.drain(..entries).collect::<Vec<_>>() {
            chain.push_back(sqe);
            if !sqe.has(Flags::IO_LINK) {
                self.run(std::mem::take(&mut chain));
            }
        }
        // A chain that was cut ends here, and its rest is another.
        self.run(chain);
    }

    /// Runs a chain until it ends, or one of it waits.
    fn run(&mut self, mut chain: VecDeque<Sqe>) {
        while let Some(sqe) = chain.pop_front() {
            let Some(result) = self.issue(&sqe) else {
                let file = self.table[sqe.slot()].expect("what waits has a file");
                self.files.get_mut(&file).expect("it is in the table").uses += 1;
                let id = self.next_request;
                self.next_request += 1;
                let request = Request { sqe, file, rest: chain, is_ending: false };
                self.requests.insert(id, request);
                return self.go(id);
            };
            let skips = sqe.has(Flags::SKIP_SUCCESS);
            if result < 0 || !skips {
                self.post(sqe.user_data, result, 0);
            }
            if result < 0 {
                self.cancel_rest(&mut chain, skips);
            }
        }
    }

    /// What was linked behind one that has failed; its own flag decides for all.
    fn cancel_rest(&mut self, rest: &mut VecDeque<Sqe>, skips: bool) {
        for cancelled in rest.drain(..) {
            if !skips {
                self.post(cancelled.user_data, -libc::ECANCELED, 0);
            }
        }
    }

    /// Has an operation go on that waits.
    fn go(&mut self, id: u64) {
        let Some(request) = self.requests.get(&id).filter(|request| !request.is_ending) else {
            return;
        };
        let (sqe, file) = (request.sqe, request.file);
        match sqe.opcode {
            opcode::RecvMsgMulti::CODE => self.receive(id, sqe, file),
            opcode::PollAdd::CODE => {
                let file = &self.files[&file];
                if file.room > 0 || file.error.is_some() {
                    self.end(id, libc::POLLOUT.into());
                }
            }
            _ => {
                let (room, error) = (self.files[&file].room, self.files[&file].error);
                if room > 0 || error.is_some() {
                    let result = self.send(&sqe, file);
                    self.end(id, result);
                }
            }
        }
    }

    /// Ends an operation that has waited.
    fn end(&mut self, id: u64, result: i32) {
        let Some(Request { sqe, file, mut rest, .. }) = self.requests.remove(&id) else { return };
        self.work.retain(|work| ![Work::Go(id), Work::End(id)].contains(work));
        self.post(sqe.user_data, result, 0);
        self.release(file);
        if result < 0 {
            self.cancel_rest(&mut rest, false);
        } else {
            self.run(rest);
        }
    }

    fn release(&mut self, file: u32) {
        let uses = &mut self.files.get_mut(&file).expect("in use").uses;
        *uses -= 1;
        if *uses == 0 {
            self.dying.push(file);
        }
    }

    /// The thread leaves the kernel.
    fn leave(&mut self) {
        for file in std::mem::take(&mut self.dying) {
            self.files.remove(&file);
        }
    }

    fn post(&mut self, user_data: u64, result: i32, flags: u32) {
        let cqe = Cqe { user_data, result, flags };
        if self.is_full() {
            self.overflow.push_back(cqe);
        } else {
            self.completions.push_back(cqe);
        }
        if self.is_notifying {
            self.eventfd.signal();
        }
    }

    fn is_full(&self) -> bool {
        !self.overflow.is_empty() || self.completions.len() >= self.completions_max
    }

    fn flush_overflow(&mut self) {
        while self.completions.len() < self.completions_max
            && let Some(cqe) = self.overflow.pop_front()
        {
            self.completions.push_back(cqe);
        }
    }

    fn fill<'a>(&mut self, batch: &'a mut [MaybeUninit<cqueue::Entry>]) -> &'a mut [cqueue::Entry] {
        let count = self.completions.len().min(batch.len());
        let (filled, _) = batch.split_at_mut(count);
        for place in &mut *filled {
            place.write(self.completions.pop_front().expect("counted").entry());
        }
        #[expect(unsafe_code, reason = "as io_uring has it")]
        // SAFETY: all of it was written just now.
        unsafe {
            &mut *(std::ptr::from_mut(filled) as *mut [cqueue::Entry])
        }
    }

    /// Runs what waits for a thread to enter: all, or some.
    fn run_work(&mut self, all: bool) {
        for work in std::mem::take(&mut self.work) {
            if !all && self.dice.once_in(3) {
                self.work.push_back(work);
                continue;
            }
            match work {
                Work::Go(id) => self.go(id),
                Work::End(id) => self.end(id, -libc::ECANCELED),
            }
        }
    }

    /// The kernel interrupts the threads.
    pub(crate) fn tick(&mut self) {
        self.run_work(true);
        self.leave();
    }

    /// The thread of all that goes on ends.
    pub(crate) fn exit_thread(&mut self) {
        for id in self.requests.keys().copied().collect::<Vec<_>>() {
            self.end(id, -libc::ECANCELED);
        }
        self.leave();
    }

    /// What happens to a file now may let operations on it go on.
    fn stir(&mut self, file: u32) {
        let of_file =
            |(id, request): (&u64, &Request)| (request.file == file).then_some(Work::Go(*id));
        for work in self.requests.iter().filter_map(of_file).collect::<Vec<_>>() {
            if !self.work.contains(&work) {
                self.work.push_back(work);
            }
        }
    }

    // ---- operations -------------------------------------------------------------------------

    /// `None`: it waits.
    #[expect(unsafe_code, reason = "memory that entries name")]
    fn issue(&mut self, sqe: &Sqe) -> Option<i32> {
        match sqe.opcode {
            opcode::Socket::CODE => return Some(self.socket(sqe)),
            opcode::Close::CODE => return Some(self.close(sqe)),
            opcode::AsyncCancel::CODE => return Some(self.cancel(sqe.addr)),
            _ => {}
        }
        assert!(sqe.has(Flags::FIXED_FILE), "{sqe:?}");
        let Some(&Some(id)) = self.table.get(sqe.slot()) else { return Some(-libc::EBADF) };
        let file = self.files.get_mut(&id).expect("in the table");
        Some(match sqe.opcode {
            opcode::Bind::CODE => {
                let to = read_addr(sqe.addr, sqe.address_len()).expect("an IP address");
                self.bind(id, to.port())
            }
            opcode::Connect::CODE => {
                let to = read_addr(sqe.addr, sqe.address_len());
                if to.is_none() && !file.is_port_named {
                    if file.port.is_some() && self.dice.once_in(3) {
                        let from = SocketAddr::new(file.family.loopback(), 7);
                        let payload = stamped(vec![0; 60], id, file.binds, Stamp::LATE);
                        self.late.push((id, Message { from, payload }));
                    }
                    file.port = None;
                }
                file.peer = to;
                if to.is_some() && file.port.is_none() { self.bind_by_itself(id) } else { 0 }
            }
            opcode::Send::CODE | opcode::SendMsg::CODE => {
                if file.room == 0 && file.error.is_none() {
                    return (!sqe.waits()).then_some(-libc::EAGAIN);
                }
                self.send(sqe, id)
            }
            opcode::RecvMsgMulti::CODE | opcode::PollAdd::CODE => return None,
            opcode::Recv::CODE => match (file.error.take(), file.inbox.pop_front()) {
                (Some(errno), _) => -errno,
                (None, Some(message)) => i32::try_from(message.payload.len()).expect("small"),
                (None, None) => -libc::EAGAIN,
            },
            opcode::SetSockOpt::CODE => {
                let (command, at) = (sqe.off & 0xff, address(sqe.addr3));
                match command {
                    2 => {
                        let mut memory = [0_u32; 9];
                        memory[0] = u32::try_from(file.inbox.len() * 768).expect("small");
                        memory[8] = file.drops;
                        let to = std::ptr::with_exposed_provenance_mut::<[u32; 9]>(at);
                        // SAFETY: the entry names 36 bytes for it.
                        unsafe { to.write(memory) };
                        0
                    }
                    3 => {
                        // SAFETY: the entry names an int.
                        let value = unsafe { std::ptr::with_exposed_provenance::<i32>(at).read() };
                        let (level, name) = (sqe.addr & 0xffff_ffff, sqe.addr >> 32);
                        if (level, name) == (17, 104) {
                            file.has_gro = value != 0;
                        }
                        if self.dice.once_in(40) { -libc::ENOPROTOOPT } else { 0 }
                    }
                    5 => {
                        let own = SocketAddr::new(file.family.loopback(), file.port.unwrap_or(0));
                        match if sqe.file_index == 1 { file.peer } else { Some(own) } {
                            None => -libc::ENOTCONN,
                            Some(addr) => {
                                let name = raw(addr);
                                let len = i32::try_from(name.len()).expect("28 at most");
                                write(address(sqe.addr), &name);
                                write(at, &len.to_ne_bytes());
                                0
                            }
                        }
                    }
                    _ => panic!("{sqe:?}"),
                }
            }
            _ => panic!("{sqe:?}"),
        })
    }

    fn socket(&mut self, sqe: &Sqe) -> i32 {
        // Most often where it has no memory for what follows either.
        if self.dice.once_in(if std::mem::take(&mut self.is_short) { 3 } else { 60 }) {
            return -libc::ENFILE;
        }
        let slot = sqe.file_index as usize - 1;
        let family = if sqe.fd == libc::AF_INET { Family::V4 } else { Family::V6 };
        let id = self.next_file;
        self.next_file += 1;
        let file = File {
            family,
            uses: 1,
            port: None,
            is_port_named: false,
            binds: 0,
            peer: None,
            inbox: VecDeque::new(),
            error: None,
            room: usize::MAX,
            has_gro: false,
            drops: 0,
            delivered: 0,
        };
        self.files.insert(id, file);
        if let Some(replaced) = self.table[slot].replace(id) {
            self.release(replaced);
        }
        0
    }

    fn close(&mut self, sqe: &Sqe) -> i32 {
        let Some(file) = self.table[sqe.file_index as usize - 1].take() else {
            return -libc::EBADF;
        };
        self.release(file);
        0
    }

    fn cancel(&mut self, target: u64) -> i32 {
        let found = self
            .requests
            .iter()
            .find(|(_, request)| request.sqe.user_data == target && !request.is_ending);
        let Some((&id, _)) = found else { return -libc::ENOENT };
        match self.dice.below(8) {
            0 => return -libc::EALREADY,
            1 | 2 => {
                self.requests.get_mut(&id).expect("found").is_ending = true;
                self.work.push_back(Work::End(id));
            }
            _ => self.end(id, -libc::ECANCELED),
        }
        0
    }

    fn is_port_free(&self, family: Family, port: u16) -> bool {
        self.files.values().all(|file| (file.family, file.port) != (family, Some(port)))
    }

    fn free_port(&self, family: Family) -> Option<u16> {
        (FIRST_PORT..FIRST_PORT + self.ports).find(|port| self.is_port_free(family, *port))
    }

    fn bind(&mut self, id: u32, port: u16) -> i32 {
        let family = self.files[&id].family;
        if self.files[&id].port.is_some() {
            return -libc::EINVAL;
        }
        let chosen = match port {
            0 => self.free_port(family),
            port => self.is_port_free(family, port).then_some(port),
        };
        let Some(chosen) = chosen else { return -libc::EADDRINUSE };
        let file = self.files.get_mut(&id).expect("found");
        file.port = Some(chosen);
        file.is_port_named = port != 0;
        file.binds += 1;
        0
    }

    /// As a connect or a send does.
    fn bind_by_itself(&mut self, id: u32) -> i32 {
        let Some(port) = self.free_port(self.files[&id].family) else { return -libc::EAGAIN };
        self.files.get_mut(&id).expect("found").port = Some(port);
        0
    }

    #[expect(unsafe_code, reason = "memory that entries name")]
    fn send(&mut self, sqe: &Sqe, id: u32) -> i32 {
        let (mut payload, mut segment, mut to) = (Vec::new(), usize::MAX, None);
        if sqe.opcode == opcode::Send::CODE {
            payload.extend(read(address(sqe.addr), sqe.len as usize));
            if sqe.off != 0 {
                to = read_addr(sqe.off, sqe.file_index & 0xffff);
            }
        } else {
            // SAFETY: the entry names a message.
            let header = unsafe {
                std::ptr::with_exposed_provenance::<libc::msghdr>(address(sqe.addr)).read()
            };
            for part in 0..header.msg_iovlen {
                // SAFETY: so many parts are there.
                let part = unsafe { header.msg_iov.add(part) };
                // SAFETY: the sender has written it.
                let part = unsafe { part.read() };
                payload.extend(read(part.iov_base.expose_provenance(), part.iov_len));
            }
            let control = read(header.msg_control.expose_provenance(), 18);
            segment = usize::from(u16::from_ne_bytes([control[16], control[17]]));
            if !header.msg_name.is_null() {
                to = read_addr(header.msg_name.expose_provenance() as u64, header.msg_namelen);
            }
        }
        let file = self.files.get_mut(&id).expect("in use");
        if let Some(errno) = file.error.take() {
            return -errno;
        }
        let Some(to) = to.or(file.peer) else { return -libc::EDESTADDRREQ };
        if segment != usize::MAX && self.dice.once_in(8) {
            return -[libc::EMSGSIZE, libc::EINVAL, libc::EIO][self.dice.below(3)];
        }
        if self.dice.once_in(50) {
            return -[libc::EPERM, libc::ENETUNREACH, libc::EMSGSIZE][self.dice.below(3)];
        }
        if self.files[&id].port.is_none() {
            let bound = self.bind_by_itself(id);
            if bound < 0 {
                return bound;
            }
        }
        let file = self.files.get_mut(&id).expect("in use");
        file.room = file.room.saturating_sub(usize::from(file.room != usize::MAX));
        let from = SocketAddr::new(file.family.loopback(), file.port.expect("bound"));
        let bytes = i32::try_from(payload.len()).expect("64 KiB at most");
        let parts: Vec<&[u8]> =
            if payload.is_empty() { vec![&[]] } else { payload.chunks(segment).collect() };
        for part in parts {
            self.sent += 1;
            self.deliver(from, to, part.to_vec());
        }
        if to.ip() != (if to.is_ipv4() { Family::V4 } else { Family::V6 }).loopback()
            && self.dice.once_in(6)
        {
            self.fail(id, libc::ECONNREFUSED);
        }
        bytes
    }

    fn deliver(&mut self, from: SocketAddr, to: SocketAddr, mut payload: Vec<u8>) {
        let is_receiver = |file: &File| {
            file.port == Some(to.port())
                && to.ip() == file.family.loopback()
                && file.peer.is_none_or(|peer| peer == from)
        };
        let Some((&id, file)) = self.files.iter_mut().find(|(_, file)| is_receiver(file)) else {
            return;
        };
        if file.inbox.len() >= INBOX_MAX {
            file.drops += 1;
            return;
        }
        file.delivered += 1;
        payload = stamped(payload, id, file.binds, file.delivered);
        file.inbox.push_back(Message { from, payload });
        self.stir(id);
    }

    /// A grace period ends: what was on its way is there.
    pub(crate) fn end_grace(&mut self) {
        for (id, message) in std::mem::take(&mut self.late) {
            if let Some(file) = self.files.get_mut(&id) {
                file.inbox.push_back(message);
                self.stir(id);
            }
        }
    }

    /// A socket's pending error.
    fn fail(&mut self, file: u32, errno: i32) {
        self.files.get_mut(&file).expect("in use").error = Some(errno);
        self.stir(file);
    }

    /// What a multishot receive does when it is armed, or when something has arrived.
    fn receive(&mut self, id: u64, sqe: Sqe, file: u32) {
        for _ in 0..32 {
            let file = self.files.get_mut(&file).expect("in use");
            if let Some(errno) = file.error.take() {
                return self.end(id, -errno);
            }
            if file.inbox.is_empty() {
                break;
            }
            let Some((buffer, at)) = self.take_buffer() else {
                return self.end(id, -libc::ENOBUFS);
            };
            let file = self.files.get_mut(&self.requests[&id].file).expect("in use");
            let first = file.inbox.pop_front().expect("not empty");
            let (from, segment) = (first.from, first.payload.len());
            let (mut payload, mut parts) = (first.payload, 1);
            while file.has_gro
                && segment > 0
                && parts < 16
                && let Some(next) = file.inbox.pop_front_if(|next| {
                    next.from == from && (1..=segment).contains(&next.payload.len())
                })
            {
                let is_last = next.payload.len() < segment;
                payload.extend(next.payload);
                parts += 1;
                if is_last {
                    break;
                }
            }
            let mut name = raw(from);
            let control_len = if parts > 1 { CONTROL_BYTES } else { 0 };
            let lens = [name.len(), control_len, payload.len(), 0];
            let lens = lens.map(|len| u32::try_from(len).expect("small").to_ne_bytes());
            name.resize(NAME_BYTES, 0);
            let mut control = [0; CONTROL_BYTES];
            control[8..12].copy_from_slice(&libc::SOL_UDP.to_ne_bytes());
            control[12..16].copy_from_slice(&libc::UDP_GRO.to_ne_bytes());
            control[16..20].copy_from_slice(&i32::try_from(segment).expect("small").to_ne_bytes());
            write(at, &[&lens.concat(), &name, &control[..], &payload].concat());
            let result = RECEIVE_HEADER_BYTES + NAME_BYTES + CONTROL_BYTES + payload.len();
            let result = i32::try_from(result).expect("68 KiB at most");
            // Also where completions overflow.
            let ends = payload.is_empty() || self.is_full() || self.dice.once_in(30);
            let flags = 1 | u32::from(buffer) << 16;
            if ends {
                let Request { file, .. } = self.requests.remove(&id).expect("it goes on");
                self.work.retain(|work| ![Work::Go(id), Work::End(id)].contains(work));
                self.post(sqe.user_data, result, flags);
                return self.release(file);
            }
            self.post(sqe.user_data, result, flags | 2);
        }
        if !sqe.waits() {
            return self.end(id, -libc::EAGAIN);
        }
        if !self.files[&file].inbox.is_empty() {
            self.work.push_back(Work::Go(id));
        }
    }

    /// The next buffer that the ring has given to the kernel: its number, and where it is.
    fn take_buffer(&mut self) -> Option<(u16, usize)> {
        if self.free_buffers() == 0 {
            return None;
        }
        let (id, at) = self.buffer_at(self.buffers_head);
        self.buffers_head = self.buffers_head.wrapping_add(1);
        Some((id, at))
    }

    #[expect(unsafe_code, reason = "memory that is shared with the ring")]
    fn buffer_at(&self, head: u16) -> (u16, usize) {
        let entries = std::ptr::with_exposed_provenance::<BufRingEntry>(self.buffers);
        // SAFETY: there are so many entries.
        let entry = unsafe { entries.add(usize::from(head % BUFFERS)) };
        // SAFETY: the ring has written it before its tail.
        let entry = unsafe { &*entry };
        (entry.bid(), usize::try_from(entry.addr()).expect("an address"))
    }

    #[expect(unsafe_code, reason = "memory that is shared with the ring")]
    fn free_buffers(&self) -> u16 {
        let entries = std::ptr::with_exposed_provenance::<BufRingEntry>(self.buffers);
        // SAFETY: the entries begin there.
        let tail = unsafe { BufRingEntry::tail(entries) };
        // SAFETY: an aligned u16 of the ring's.
        unsafe { tail.read_volatile() }.wrapping_sub(self.buffers_head)
    }

    // ---- what the test does -----------------------------------------------------------------

    /// Whose the datagrams are that arrive at the socket in a slot.
    pub(crate) fn owner(&self, slot: SlotIndex) -> Option<(u32, u32)> {
        let file = self.table[slot.at()]?;
        Some((file, self.files[&file].binds))
    }

    /// Where sockets can be reached.
    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        let address = |file: &File| Some(SocketAddr::new(file.family.loopback(), file.port?));
        self.files.values().filter_map(address).collect()
    }

    pub(crate) fn address_of(&self, slot: SlotIndex) -> Option<SocketAddr> {
        let file = &self.files[&self.table[slot.at()]?];
        Some(SocketAddr::new(file.family.loopback(), file.port?))
    }

    pub(crate) fn peer_of(&self, slot: SlotIndex) -> Option<SocketAddr> {
        self.files[&self.table[slot.at()]?].peer
    }

    /// A datagram comes from elsewhere.
    pub(crate) fn arrive(&mut self, from: SocketAddr, to: SocketAddr, bytes: usize) {
        self.deliver(from, to, vec![0; bytes]);
    }

    /// The send buffer of a socket has room for so many messages from now on.
    pub(crate) fn set_room(&mut self, which: usize, room: usize) {
        let Some(&file) = self.files.keys().nth(which % self.files.len().max(1)) else { return };
        self.files.get_mut(&file).expect("found").room = room;
        self.stir(file);
    }

    /// All send buffers have room for anything.
    pub(crate) fn make_room(&mut self) {
        for file in self.files.keys().copied().collect::<Vec<_>>() {
            self.files.get_mut(&file).expect("found").room = usize::MAX;
            self.stir(file);
        }
    }

    /// Whether something waits for a thread to enter, or to be interrupted.
    #[cfg(shuttle)]
    pub(crate) fn has_work(&self) -> bool {
        !self.work.is_empty()
    }

    /// Whether nothing is on its way.
    pub(crate) fn is_still(&self) -> bool {
        self.work.is_empty() && self.completions.is_empty() && self.overflow.is_empty()
    }

    /// How far it is from having nothing of the ring's.
    pub(crate) fn left(&self) -> [usize; 5] {
        [
            self.submissions.len(),
            self.requests.len(),
            self.files.len(),
            usize::from(BUFFERS - self.free_buffers()),
            self.completions.len() + self.overflow.len() + self.work.len(),
        ]
    }

    /// The operations that it knows of, cancels left out: those that will read or write their memory, and
    /// those of completions on their way.
    fn known(&self) -> (Vec<u64>, Vec<u64>) {
        let of = |sqe: &Sqe| sqe.user_data;
        let waiting = self.requests.values().flat_map(|request| {
            std::iter::once(of(&request.sqe)).chain(request.rest.iter().map(of))
        });
        let entries = self.submissions.iter().map(of).chain(waiting);
        let completions = self.completions.iter().chain(&self.overflow).map(|cqe| cqe.user_data);
        let is_no_cancel = |user_data: &u64| user_data & CANCEL == 0;
        (entries.filter(is_no_cancel).collect(), completions.filter(is_no_cancel).collect())
    }
}

/// Says whose a datagram is, if it has room for it.
fn stamped(mut payload: Vec<u8>, file: u32, binds: u32, number: u64) -> Vec<u8> {
    if payload.len() >= Stamp::BYTES {
        payload[..4].copy_from_slice(&file.to_ne_bytes());
        payload[4..8].copy_from_slice(&binds.to_ne_bytes());
        payload[8..16].copy_from_slice(&number.to_ne_bytes());
    }
    payload
}

/// As the kernel has an address.
fn raw(addr: SocketAddr) -> Vec<u8> {
    let raw = RawAddr::from(addr);
    read(raw.as_ptr().expose_provenance(), raw.len() as usize)
}

fn address(word: u64) -> usize {
    usize::try_from(word).expect("an address")
}

fn read_addr(at: u64, len: u32) -> Option<SocketAddr> {
    decode_addr(&read(address(at), len as usize))
}

#[expect(unsafe_code, reason = "memory that entries name")]
fn read(at: usize, len: usize) -> Vec<u8> {
    let start = std::ptr::with_exposed_provenance::<u8>(at);
    // SAFETY: an entry names so many bytes there.
    unsafe { std::slice::from_raw_parts(if len == 0 { [].as_ptr() } else { start }, len) }.to_vec()
}

#[expect(unsafe_code, reason = "memory that entries name")]
fn write(at: usize, bytes: &[u8]) {
    let start = std::ptr::with_exposed_provenance_mut::<u8>(at);
    // SAFETY: an entry names room for it there.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), start, bytes.len()) };
}

// ---- a ring on it -----------------------------------------------------------------------------------

/// What a test chooses for a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) sockets: u32,
    pub(crate) submissions: usize,
    pub(crate) completions: usize,
    pub(crate) ports: u16,
    pub(crate) recycle: Recycle,
}

/// A ring on a kernel that is played.
pub(crate) fn build(
    seed: u64,
    sizes: Sizes,
    meanwhile: fn(),
) -> (Built, Arc<Played>, PlayedThread) {
    static DEFAULTS: OnceLock<Defaults> = OnceLock::new();
    let eventfd = EventFd::new().expect("a descriptor");
    let timer = Timer::new().expect("a descriptor");
    let (buffers, entries) = BufferRing::played().expect("memory");
    let kernel = Kernel {
        dice: Dice::new(seed),
        faults: Faults::default(),
        is_short: false,
        submissions: VecDeque::new(),
        submissions_max: sizes.submissions.min(SQ_ENTRIES as usize),
        completions: VecDeque::new(),
        completions_max: sizes.completions,
        overflow: VecDeque::new(),
        is_notifying: true,
        eventfd: eventfd.clone(),
        requests: BTreeMap::new(),
        next_request: 0,
        work: VecDeque::new(),
        table: vec![None; (sizes.sockets + sizes.recycle.quarantined_max) as usize],
        files: BTreeMap::new(),
        next_file: 0,
        dying: Vec::new(),
        late: Vec::new(),
        ports: sizes.ports,
        buffers: entries.expose_provenance(),
        buffers_head: 0,
        sent: 0,
    };
    let played = Arc::new(Played { kernel: Mutex::new(kernel), meanwhile });
    let queues = Queues::new(IoUring::Played(Arc::clone(&played)));
    let process = Process::current().expect("a page");
    let share = Share::new(0);
    let support = Support {
        v4: FamilySupport::Works { also_connected: true },
        v6: FamilySupport::Works { also_connected: false },
    };
    let (rcu, thread) = Rcu::played(eventfd.clone());
    let recycler = Recycler::new(sizes.recycle, support.clone(), rcu);
    let ring = Ring::new(process, queues, buffers, sizes.sockets, Arc::clone(&share), recycler);
    let defaults = *DEFAULTS.get_or_init(|| Defaults::query().expect("plain sockets"));
    let known = Known::played(sizes.sockets, sizes.recycle, support, defaults);
    (Built { process, ring, share, eventfd, timer, known }, played, thread)
}

/// What a ring has.
#[derive(Debug)]
pub(crate) struct Audit {
    pub(crate) operations: usize,
    pub(crate) unfree_slots: usize,
    pub(crate) cached: u64,
    pub(crate) table_in_use: u64,
    pub(crate) is_closing: bool,
    pub(crate) has_waiting_binds: bool,
    pub(crate) stats: Stats,
}

impl Ring {
    /// Checks what holds at any time, be a thread inside or not.
    pub(crate) fn audit(&mut self, kernel: &Kernel) -> Audit {
        let held = self.ops.in_kernel();
        let (entries, completions) = kernel.known();
        let backlog: Vec<u64> =
            self.queues.backlog.iter().flatten().map(|entry| Sqe::from(entry).user_data).collect();
        let is_held = |user_data: &u64| {
            let is_held = |key| held.contains(&key) || self.cut.iter().any(|(cut, _)| *cut == key);
            OpKey::from_user_data(*user_data).is_some_and(is_held)
        };
        let backlog_ops = backlog.iter().filter(|user_data| **user_data & CANCEL == 0);
        for user_data in entries.iter().chain(backlog_ops) {
            assert!(is_held(user_data), "the kernel may use memory that is freed: {user_data:x}");
        }
        for key in &held {
            let user_data = key.user_data();
            let is_known =
                [&entries, &completions, &backlog].iter().any(|known| known.contains(&user_data));
            let is_kept = self.ports.keeps(*key) || self.is_deferred(*key);
            assert!(is_known || is_kept, "an operation that never ends: {key:?}");
        }
        let mut free = [false; BUFFERS as usize];
        for at in 0..kernel.free_buffers() {
            let (id, _) = kernel.buffer_at(kernel.buffers_head.wrapping_add(at));
            let was_free = std::mem::replace(&mut free[usize::from(id)], true);
            assert!(!was_free, "buffer {id} is there twice");
        }
        let mut unfree_slots = 0;
        for (slot, file) in (0..).map(SlotIndex).zip(&kernel.table) {
            let is_free = slot.at() >= self.slots.len()
                || matches!(self.slots.get(slot).state, SlotState::Free);
            unfree_slots += usize::from(!is_free);
            assert!(!is_free || file.is_none(), "{slot:?} is free, and its socket is not closed");
        }
        Audit {
            operations: held.len(),
            unfree_slots,
            cached: self.recycler.len(),
            table_in_use: self.share.in_use(),
            is_closing: self.ports.is_closing(),
            has_waiting_binds: self.ports.has_waiting(),
            stats: self.snapshot(),
        }
    }
}
