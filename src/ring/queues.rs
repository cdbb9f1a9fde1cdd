//! The submission queue and the completion queue, with all that is unsafe about them; what an
//! entry names its socket and its operation by; and `io_uring_enter`.

#[cfg(test)]
pub(crate) mod played;

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

#[cfg(not(test))]
use io_uring::IoUring;
#[cfg(not(test))]
use io_uring::cqueue::CompletionQueue;
use io_uring::squeue::Entry;
#[cfg(not(test))]
use io_uring::squeue::SubmissionQueue;
use io_uring::types::{CancelBuilder, DestinationSlot, Timespec};
use io_uring::{cqueue, types};

// The same, or a kernel that the test plays.
#[cfg(test)]
use self::played::{CompletionQueue, IoUring, SubmissionQueue};
use super::buffers::BufferId;
use crate::limits::COMPLETIONS_BATCH;

/// A slot of the ring's fixed-file table: a direct descriptor's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlotIndex(pub(crate) u32);

impl SlotIndex {
    pub(super) fn fd(self) -> types::Fixed {
        types::Fixed(self.0)
    }

    pub(super) fn destination(self) -> DestinationSlot {
        DestinationSlot::try_from_slot_target(self.0).expect("below SOCKETS_MAX")
    }

    pub(super) fn at(self) -> usize {
        self.0 as usize
    }
}

/// Names one operation: its entry in the operation table and how often, modulo 2^32, the entry was
/// reused. It travels through the kernel as `user_data`, so a late completion cannot reach the
/// entry's next operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OpKey {
    pub(super) index: u32,
    pub(super) generation: u32,
}

/// Marks the `user_data` of a cancel: the top bit of an index, which is never that large.
const CANCEL: u64 = 1 << 31;

impl OpKey {
    pub(super) fn user_data(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    pub(super) fn from_user_data(user_data: u64) -> Option<Self> {
        let index = u32::try_from(user_data & u64::from(u32::MAX)).ok()?;
        let generation = u32::try_from(user_data >> 32).ok()?;
        Some(Self { index, generation })
    }

    /// The `user_data` of a cancel of this operation.
    pub(super) fn cancel_user_data(self) -> u64 {
        self.user_data() | CANCEL
    }
}

/// A completion queue entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Completion {
    pub(super) user_data: u64,
    pub(super) result: i32,
    pub(super) flags: u32,
}

impl Completion {
    /// The operation that a cancel was meant for, if this is a cancel's completion.
    pub(super) fn cancel_target(self) -> Option<OpKey> {
        (self.user_data & CANCEL != 0)
            .then(|| OpKey::from_user_data(self.user_data & !CANCEL))
            .flatten()
    }

    /// The receive buffer that the kernel has filled and let go of.
    pub(super) fn buffer(self) -> Option<BufferId> {
        cqueue::buffer_select(self.flags).map(BufferId)
    }

    /// Whether its operation goes on.
    pub(super) fn has_more(self) -> bool {
        cqueue::more(self.flags)
    }
}

impl From<&cqueue::Entry> for Completion {
    fn from(entry: &cqueue::Entry) -> Self {
        Self { user_data: entry.user_data(), result: entry.result(), flags: entry.flags() }
    }
}

/// Room for the completions that are taken from the queue at once.
pub(super) type Batch = [MaybeUninit<cqueue::Entry>; COMPLETIONS_BATCH];

pub(super) const EMPTY_BATCH: Batch = [const { MaybeUninit::uninit() }; COMPLETIONS_BATCH];

/// `io_uring_enter`, usable without the driver's lock: by one thread at a time, which the driver
/// sees to.
#[derive(Clone)]
pub(crate) struct Enter(Arc<IoUring>);

impl Enter {
    /// Submits `entries` entries and returns how many the kernel took. With `completions` it also
    /// flushes those that the kernel has kept aside (`IORING_ENTER_GETEVENTS`), and blocks the
    /// thread until so many are there.
    #[expect(unsafe_code, reason = "io_uring_enter(2)")]
    pub(crate) fn enter(&self, entries: u32, completions: Option<u32>) -> io::Result<u32> {
        // IORING_ENTER_GETEVENTS.
        let (flags, completions) = (u32::from(completions.is_some()), completions.unwrap_or(0));
        // SAFETY: the call has no argument that the kernel reads or writes; the memory that the
        // queued entries point to stays in the operation table until their last completion
        // (`a_detached_operation_keeps_its_memory_until_the_last_completion`).
        let taken = unsafe {
            self.0.submitter().enter::<libc::sigset_t>(entries, completions, flags, None)
        }?;
        Ok(u32::try_from(taken).unwrap_or(u32::MAX))
    }

    /// The places of all entries, as the kernel sees them.
    #[cfg(test)]
    #[expect(unsafe_code, reason = "mmap(2) of the ring")]
    pub(crate) fn places(&self) -> Vec<[u64; 8]> {
        const IORING_OFF_SQES: libc::off_t = 0x1000_0000;
        let places = self.0.params().sq_entries() as usize;
        let bytes = places * size_of::<[u64; 8]>();
        // SAFETY: a new mapping touches no existing memory.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ,
                libc::MAP_SHARED,
                self.0.as_raw_fd(),
                IORING_OFF_SQES,
            )
        };
        assert_ne!(start, libc::MAP_FAILED);
        // SAFETY: the mapping is of so many entries, which are plain integers, and nobody writes to it
        // while this thread copies: it holds the driver's lock, or plays all threads.
        let copy = unsafe { std::slice::from_raw_parts(start.cast::<[u64; 8]>(), places) }.to_vec();
        // SAFETY: the mapping was made above, and nothing refers to it any more.
        unsafe { libc::munmap(start, bytes) };
        copy
    }
}

/// Both queues of a ring.
pub(super) struct Queues {
    io: Arc<IoUring>,
    /// Chains that did not fit the submission queue, in order.
    backlog: VecDeque<Vec<Entry>>,
    /// Entries queued so far, the backlog's included.
    queued: u64,
    /// Entries that fit the submission queue beside those of the last submission. The kernel gives their
    /// places back before it is through with them: Linux 6.10 to 6.13.3 reads SETSOCKOPT of a chain when it
    /// gets to it. When the enter has returned it has got to all.
    room: usize,
}

impl Queues {
    pub(super) fn new(io: impl Into<IoUring>) -> Self {
        let io = Arc::new(io.into());
        let mut queues = Self { io, backlog: VecDeque::new(), queued: 0, room: 0 };
        queues.end_submission();
        queues
    }

    /// What enters the kernel for this ring.
    pub(super) fn kernel(&self) -> Enter {
        Enter(Arc::clone(&self.io))
    }

    /// The only accessor of the submission queue.
    #[expect(unsafe_code, reason = "the submission queue")]
    fn submissions(&mut self) -> SubmissionQueue<'_> {
        // SAFETY: `&mut self` is the only way to this queue, and the result borrows it, so no two
        // exist at a time.
        unsafe { self.io.submission_shared() }
    }

    /// The only accessor of the completion queue.
    #[expect(unsafe_code, reason = "the completion queue")]
    fn completions(&mut self) -> CompletionQueue<'_> {
        // SAFETY: `&mut self` is the only way to this queue, and the result borrows it, so no two
        // exist at a time.
        unsafe { self.io.completion_shared() }
    }

    /// Queues entries that must stay together, behind all others. From here on the kernel may use
    /// the memory they point to: the caller has stored it in the operation table before.
    pub(super) fn queue(&mut self, chain: &[Entry]) {
        self.queued += chain.len() as u64;
        if !self.backlog.is_empty() || !self.try_queue(chain) {
            self.backlog.push_back(chain.to_vec());
        }
    }

    #[expect(unsafe_code, reason = "hands entries to the kernel")]
    fn try_queue(&mut self, chain: &[Entry]) -> bool {
        let Some(room) = self.room.checked_sub(chain.len()) else { return false };
        self.room = room;
        let mut submissions = self.submissions();
        // SAFETY: what the entries point to lives in the operation table until their last
        // completion (`a_detached_operation_keeps_its_memory_until_the_last_completion`), and the
        // receive header as long as the ring.
        unsafe { submissions.push_multiple(chain) }.is_ok()
    }

    /// The enter has returned, or has not begun: the places of all entries that the kernel has taken are
    /// ours.
    pub(super) fn end_submission(&mut self) {
        self.room = {
            let submissions = self.submissions();
            submissions.capacity() - submissions.len()
        };
    }

    /// Moves the backlog into the submission queue as far as it fits; the entries in there.
    pub(super) fn flush(&mut self) -> u32 {
        self.end_submission();
        while let Some(chain) = self.backlog.pop_front() {
            if !self.try_queue(&chain) {
                self.backlog.push_front(chain);
                break;
            }
        }
        u32::try_from(self.submissions().len()).unwrap_or(u32::MAX)
    }

    pub(super) fn queued(&self) -> u64 {
        self.queued
    }

    pub(super) fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Whether completions wait in the kernel because their queue was full.
    pub(super) fn has_overflow(&mut self) -> bool {
        self.submissions().cq_overflow()
    }

    /// Whether completions wait for the thread that submitted their operation to enter the kernel
    /// (`IORING_SQ_TASKRUN`).
    pub(super) fn has_task_work(&mut self) -> bool {
        self.submissions().taskrun()
    }

    /// Takes completions from the queue: those that are there, at most a batch.
    pub(super) fn reap<'a>(&mut self, batch: &'a mut Batch) -> &'a [cqueue::Entry] {
        self.completions().fill(batch)
    }

    /// From now on the kernel signals the eventfd for a completion; `true` if one came before that
    /// took effect, be it in the queue or, because that was full, still in the kernel.
    pub(super) fn enable_notifications(&mut self) -> bool {
        self.completions().enable_eventfd();
        // Between our store to the flag and our load of the tail; the kernel fences between its own
        // store to the tail and its load of the flag.
        fence(Ordering::SeqCst);
        !self.completions().is_empty() || self.has_overflow()
    }

    /// For the time that a thread reaps anyway.
    pub(super) fn disable_notifications(&mut self) {
        self.completions().disable_eventfd();
    }

    /// Cancels every operation in the kernel and waits for their end, a millisecond at most.
    pub(super) fn cancel_all(&mut self) {
        let bound = Timespec::new().nsec(1_000_000);
        // ENOENT: nothing was left to cancel, so the completions are in the queue.
        let _ = self.io.submitter().register_sync_cancel(Some(bound), CancelBuilder::any());
    }

    /// Closes the ring's descriptor, and leaves its memory mapped as the process that built it has it: for
    /// a fork of that, which has neither queue.
    #[expect(unsafe_code, reason = "close(2)")]
    pub(super) fn abandon(&mut self) {
        // The ring's owner is never dropped, so nobody else closes the descriptor, or unmaps what another
        // mapping of this process may have taken the place of.
        std::mem::forget(Arc::clone(&self.io));
        // SAFETY: the descriptor is open, and by the line above nothing owns it any more.
        // (`a_fork_of_the_process_gets_errors_and_its_drops_are_harmless` is the test.)
        unsafe { libc::close(self.io.as_raw_fd()) };
    }

    /// Runs a chain that completes once to its end, on a ring without other operations; the
    /// completion's result.
    pub(super) fn run_alone(&mut self, chain: &[Entry]) -> io::Result<i32> {
        if !self.try_queue(chain) {
            return Err(io::Error::other("the chain is longer than the submission queue"));
        }
        let completion = loop {
            // A signal, of a profiler say, that the process handles: the call fails if it has submitted
            // nothing, and else returns before the completion is there.
            match self.io.submit_and_wait(1) {
                Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            self.end_submission();
            if let Some(completion) = self.completions().next() {
                break completion;
            }
        };
        // A datagram that has come meanwhile completes a receive twice.
        while self.completions().next().is_some() {}
        Ok(completion.result())
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use io_uring::opcode;

    use super::*;

    /// Signals go to the thread while it waits. Kills: a ring that cannot be built under a profiler.
    #[test]
    #[expect(unsafe_code, reason = "signal(2) and pthread_kill(3)")]
    fn a_signal_does_not_end_the_wait_for_a_completion() {
        extern "C" fn ignore(_signal: i32) {}
        let handler: extern "C" fn(i32) = ignore;
        // SAFETY: the handler does nothing.
        unsafe { libc::signal(libc::SIGWINCH, handler as libc::sighandler_t) };
        let mut queues = Queues::new(io_uring::IoUring::new(8).unwrap());
        // SAFETY: pthread_self(3) has no conditions.
        let waiting = unsafe { libc::pthread_self() };
        thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..100 {
                    // SAFETY: that thread waits for this one at the scope's end, so it is there.
                    assert_eq!(unsafe { libc::pthread_kill(waiting, libc::SIGWINCH) }, 0);
                    thread::sleep(Duration::from_micros(100));
                }
            });
            let soon = Timespec::new().nsec(20_000_000);
            let result = queues.run_alone(&[opcode::Timeout::new(&raw const soon).build()]);
            assert_eq!(result.unwrap(), -libc::ETIME);
        });
    }
}
