//! Who enters the kernel, and when.
//!
//! There is one door and no thread behind it (one beside it waits for grace periods, once sockets
//! are recycled). Callers push entries under a short lock; whoever
//! finds the ring free enters for everybody who has pushed, looks again for what came meanwhile,
//! and wakes those whose completions are in (flat combining). The guests of a current-thread
//! runtime never contend with each other, so there a caller yields once before it enters if other
//! guests use the ring: what they push travels along, one enter per tick. A lone guest enters at
//! once; and so do the guests of a crowd so large that whoever yields finds its cache cold, and
//! one with many bytes to send, which would only push those of others out of the cache.
//!
//! Completions that come by themselves (datagrams, sends that had to wait) signal an eventfd
//! while nobody is inside; a small task per runtime, the reaper, then looks. What nobody waits
//! for, such as the CLOSE of a dropped socket, is left to another, the flusher, which runs when
//! the guest next suspends, unless somebody enters before. They are two because a worker thread
//! keeps a task it has woken to itself until its guest suspends, and arrivals must not wait for
//! a guest that computes.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker, ready};
use std::thread::ThreadId;

use tokio::runtime::{self, Handle, RuntimeFlavor};
use tokio::task::coop;

use crate::error::SetupError;
use crate::first_poll;
use crate::limits::{
    COMBINE_ROUNDS_MAX, CROWD_GUESTS_MAX, FLUSH_BYTES, FULL_ROOM_LOOKS_MAX, INBOX_BYTES_DEFAULT,
    INBOX_DATAGRAMS_DEFAULT, SOCKETS_DEFAULT, SPREE_FLUSHES,
};
use crate::ring::arrivals::Arrivals;
use crate::ring::inbox::{Inbox, InboxLimits};
use crate::ring::op::{BindOp, Op};
use crate::ring::probe::{self, Defaults};
use crate::ring::recycle::Recycle;
use crate::ring::slots::{Room, SlotIndex};
use crate::ring::table::OpKey;
use crate::ring::{Done, Gate, Ring};
use crate::stats::Stats;

/// A ring and its fixed-file table: the handle that every guest's sockets are made through.
///
/// Cheap to clone, and usable from any thread under any tokio runtime with I/O enabled
/// (`enable_io`), several at once included. The ring goes away with its last handle, and sockets
/// hold handles of their own.
///
/// One for each thread is best: those that share one wait for each other. On a multi-thread runtime
/// make as many as it has workers and give them to guests in turn.
///
/// Its threads must be in one network namespace (and one cgroup, and under one security label): a
/// socket is made in those of whichever thread enters the kernel, and recycled with them.
#[derive(Clone)]
pub struct Uring {
    shared: Arc<Shared>,
}

impl fmt::Debug for Uring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stats = self.shared.lock().ring.snapshot();
        f.debug_struct("Uring").field("stats", &stats).finish_non_exhaustive()
    }
}

/// Configures a [`Uring`].
#[derive(Clone, Debug)]
#[must_use]
pub struct UringBuilder {
    sockets: u32,
    inbox: InboxLimits,
    recycle: Recycle,
}

impl UringBuilder {
    /// Slots of the fixed-file table, which bound the sockets open at once over all guests:
    /// 1 to [`SOCKETS_MAX`](crate::limits::SOCKETS_MAX), by default
    /// [`SOCKETS_DEFAULT`].
    ///
    /// A closed socket keeps its slot until the kernel has let go of it, which takes a moment when
    /// the receive was armed by another thread; leave some room for those.
    ///
    /// The kernel registers no table larger than the soft `RLIMIT_NOFILE`, though the sockets
    /// in it do not count against that limit.
    pub fn sockets(mut self, sockets: u32) -> Self {
        self.sockets = sockets;
        self
    }

    /// How much may wait in one socket's queue, in datagrams and in payload bytes, before its
    /// receive is paused and the kernel's own buffer (`SO_RCVBUF`) takes over.
    ///
    /// Either is at least 1. What the kernel delivers before it ends the receive of a full queue is
    /// still queued: at most what the ring's 128 buffers hold, each a message of up to 64 datagrams
    /// and 65,507 bytes.
    pub fn queue_per_socket(mut self, datagrams: usize, bytes: usize) -> Self {
        self.inbox = InboxLimits { datagrams: datagrams.max(1), bytes: bytes.max(1) };
        self
    }

    /// How closed sockets are kept for new owners, which is cheaper than to make and free them:
    /// by default [`Recycle::default`], and not at all with [`Recycle::OFF`].
    ///
    /// A socket is kept if its guest has only bound it to port 0, connected it, sent and received;
    /// the next owner of its family cannot tell it from a new one. What that rests on is tried on
    /// the running kernel, once per process, by the first `build` (some 20 ms). Where something of
    /// the former owner is left in a family's sockets, or in connected ones, those are not kept,
    /// and the log and [`doctor`](crate::doctor) say why. [`Stats::closed_instead`] tells which
    /// sockets were not kept. A ring that keeps some has a thread that waits for the kernel.
    ///
    /// Turn it off on a host that holds received packets back behind the kernel's socket look-up
    /// (netfilter's NFQUEUE in the INPUT hook): one that is let go after the quarantine could still
    /// reach the socket of a connected predecessor.
    pub fn recycle(mut self, recycle: Recycle) -> Self {
        self.recycle = recycle;
        self
    }

    /// Sets the ring up and checks that this kernel does everything sockets need.
    ///
    /// # Errors
    ///
    /// A [`SetupError`] that names what is missing and what to change.
    pub fn build(self) -> Result<Uring, SetupError> {
        let probe::Built { ring, room, defaults, arrivals } =
            probe::build(self.sockets, self.recycle)?;
        let shared = Shared {
            gate: ring.gate(),
            room,
            arrivals,
            defaults,
            inbox: self.inbox,
            core: Mutex::new(Core {
                ring,
                entering: false,
                crowd: Crowd::default(),
                runtimes: Vec::new(),
                flusher_due: None,
                flush_wakers: Vec::new(),
            }),
        };
        Ok(Uring { shared: Arc::new(shared) })
    }
}

/// Tells guests apart, to know whether there are several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Guest(u64);

impl Guest {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

struct Shared {
    gate: Gate,
    room: Arc<Room>,
    /// The eventfd that completions signal while nobody is inside.
    arrivals: Arrivals,
    defaults: Defaults,
    inbox: InboxLimits,
    core: Mutex<Core>,
}

struct Core {
    ring: Ring,
    /// Somebody is inside, and will look for what was pushed meanwhile.
    entering: bool,
    crowd: Crowd,
    /// Each runtime that has used this ring.
    runtimes: Vec<Attended>,
    /// Where a flusher was woken that has not run.
    flusher_due: Option<(ThreadId, runtime::Id)>,
    /// Callers that wait until what they pushed has reached the kernel.
    flush_wakers: Vec<Waker>,
}

/// A runtime with tasks that attend to the ring.
struct Attended {
    id: runtime::Id,
    reaper: Waker,
    flusher: Waker,
}

/// Whether several guests are at work: who has pushed since the last enter, and before it.
#[derive(Default)]
struct Crowd {
    pushed: Who,
    entered: Who,
    /// How often a guest has yielded so that others could push.
    yields: u64,
    /// Flushes to come that enter at once, for too many are at work.
    spree: u32,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Who {
    #[default]
    Nobody,
    One(Guest),
    Several,
}

/// That a guest has yielded: the how manieth yield it was.
struct Yielded {
    yields: u64,
}

impl Crowd {
    fn push(&mut self, guest: Guest) {
        self.pushed = match self.pushed {
            Who::Nobody => Who::One(guest),
            Who::One(same) if same == guest => Who::One(guest),
            Who::One(_) | Who::Several => Who::Several,
        };
    }

    fn enter(&mut self) {
        if self.pushed != Who::Nobody {
            self.entered = std::mem::take(&mut self.pushed);
        }
    }

    /// A guest is about to enter; `true` if it should let others push before, for some have used
    /// the ring lately.
    fn take_turn(&mut self, guest: Guest) -> bool {
        if self.spree > 0 {
            self.spree -= 1;
            return false;
        }
        let is_other = |who: &Who| ![Who::Nobody, Who::One(guest)].contains(who);
        [self.pushed, self.entered].iter().any(is_other)
    }

    fn start_yield(&mut self) -> Yielded {
        self.yields += 1;
        Yielded { yields: self.yields }
    }

    /// A guest goes on that has yielded. If so many had their turn meanwhile that nothing of it is
    /// left in the cache, it had better enter alone for a while.
    fn end_yield(&mut self, yielded: &Yielded) {
        let is_crowded = self.yields - yielded.yields > CROWD_GUESTS_MAX;
        self.spree = if is_crowded { SPREE_FLUSHES } else { 0 };
    }
}

impl Uring {
    /// Starts configuring a ring.
    pub fn builder() -> UringBuilder {
        UringBuilder {
            sockets: SOCKETS_DEFAULT,
            inbox: InboxLimits { datagrams: INBOX_DATAGRAMS_DEFAULT, bytes: INBOX_BYTES_DEFAULT },
            recycle: Recycle::default(),
        }
    }

    /// Closes the sockets that are kept for new owners now. Those that guests close from now on are
    /// kept as before.
    ///
    /// When it returns they are closed, unless another thread is inside the kernel for the ring;
    /// then that does it.
    pub fn drain(&self) {
        // What is with the kernel comes back first.
        let mut core = self.shared.combine_with(self.shared.lock(), true);
        core.ring.close_kept();
        while !core.entering && core.ring.has_kept_work() {
            core = self.shared.combine(core);
        }
    }

    /// The ring's counters so far, what has come and nobody has looked at included.
    #[must_use]
    pub fn stats(&self) -> Stats {
        // What came when no runtime was left to look is counted too.
        self.look();
        self.shared.lock().ring.snapshot()
    }

    pub(crate) fn defaults(&self) -> &Defaults {
        &self.shared.defaults
    }

    /// Takes a place in a room, be it the table's or a guest's quota, by one of its methods.
    pub(crate) fn take_place(&self, take: impl Fn() -> bool) -> bool {
        take() || self.take_place_after_closes(take)
    }

    /// The CLOSE that frees a place may be on its way, or in the kernel with another thread, which
    /// takes microseconds.
    #[cold]
    fn take_place_after_closes(&self, take: impl Fn() -> bool) -> bool {
        for _ in 0..FULL_ROOM_LOOKS_MAX {
            let core = self.shared.lock();
            if !core.entering {
                drop(self.shared.combine(core));
                return take();
            }
            drop(core);
            std::thread::yield_now();
            if take() {
                return true;
            }
        }
        false
    }

    /// The places in the table.
    pub(crate) fn room(&self) -> &Room {
        &self.shared.room
    }

    /// Pushes an operation for the caller to wait for.
    pub(crate) fn submit(&self, guest: Guest, slot: SlotIndex, op: Op) -> Ticket {
        let mut core = self.shared.lock();
        core.crowd.push(guest);
        let key = core.ring.submit(slot, op);
        self.ticket(&core, guest, key)
    }

    /// Pushes the chain that makes and binds a socket, and sees to it that it gets going even if
    /// the caller never waits. A socket without a slot gets one.
    pub(crate) fn submit_bind(
        &self,
        guest: Guest,
        slot: Option<SlotIndex>,
        bind: Box<BindOp>,
    ) -> (SlotIndex, Ticket) {
        let mut core = self.shared.lock();
        core.crowd.push(guest);
        let (slot, key) = core.ring.submit_bind(slot, bind);
        let ticket = self.ticket(&core, guest, key);
        self.carry_out(core);
        (slot, ticket)
    }

    fn ticket(&self, core: &Core, guest: Guest, key: OpKey) -> Ticket {
        let flush = Flush { guest, pushed: core.ring.pushed(), yielding: Yielding::NotYielded };
        Ticket { uring: self.clone(), key, flush, fetched: false, ends_with_caller: false }
    }

    /// Arms a socket's receive: where its datagrams will be, and what to wait for so that those
    /// already there are seen.
    pub(crate) fn arm(&self, guest: Guest, slot: SlotIndex) -> (Arc<Inbox>, Flush) {
        let inbox = Arc::new(Inbox::new(self.shared.inbox));
        let mut core = self.shared.lock();
        core.ring.arm(slot, &inbox);
        core.crowd.push(guest);
        (inbox, Flush { guest, pushed: core.ring.pushed(), yielding: Yielding::NotYielded })
    }

    /// Lets a paused receive go on. At once: its guest may be about to wait for it.
    pub(crate) fn resume(&self, guest: Guest, slot: SlotIndex) {
        let mut core = self.shared.lock();
        core.crowd.push(guest);
        core.ring.resume(slot);
        drop(self.shared.combine(core));
    }

    /// Gives a slot back; the kernel closes its socket when the guest next suspends.
    pub(crate) fn close(&self, guest: Guest, slot: SlotIndex, quota: &Arc<Room>, unread: u64) {
        let mut core = self.shared.lock();
        let before = core.ring.pushed();
        core.ring.close(slot, quota, unread);
        if core.ring.pushed() > before {
            core.crowd.push(guest);
            self.carry_out(core);
        }
    }

    /// Books completions that have come.
    pub(crate) fn look(&self) {
        let mut core = self.shared.lock();
        if core.entering {
            return;
        }
        core.ring.complete_all();
        let mut wakers = Vec::new();
        core.ring.take_wakers(&mut wakers);
        if core.ring.has_task_work() {
            // Completions wait for a thread to enter, perhaps this one: a guest that looks again
            // and again makes no other system call.
            drop(self.shared.combine_with(core, true));
        } else if core.ring.pushed() > core.ring.submitted() {
            self.carry_out(core);
        } else {
            drop(core);
        }
        wakers.into_iter().for_each(Waker::wake);
    }

    /// As `look`, and sees to it that what comes later is booked as well.
    pub(crate) fn look_and_listen(&self) {
        self.ensure_reaper();
        self.look();
    }

    pub(crate) fn count(&self, count: impl FnOnce(&mut Stats)) {
        count(&mut self.shared.lock().ring.stats);
    }

    /// Sees to it that what was pushed reaches the kernel although nobody waits for it.
    fn carry_out(&self, mut core: MutexGuard<'_, Core>) {
        if core.entering {
            return;
        }
        let handle = Handle::try_current();
        let here = handle.as_ref().map(|handle| (std::thread::current().id(), handle.id())).ok();
        match (core.flusher_due, handle) {
            (Some(due), _) if here == Some(due) => {}
            (None, Ok(handle)) => {
                core.flusher_due = here;
                let runtime = core.runtimes.iter().find(|runtime| runtime.id == handle.id());
                match runtime.map(|runtime| runtime.flusher.clone()) {
                    Some(flusher) => {
                        drop(core);
                        flusher.wake();
                    }
                    None => self.attend(core, &handle),
                }
            }
            // Outside of any runtime there is nobody to leave it to, and a flusher that is due
            // elsewhere runs when a guest suspends there, not here.
            (_, Err(_)) | (Some(_), Ok(_)) => drop(self.shared.combine(core)),
        }
    }

    /// Carries out what is left now, for the guest that left it is gone.
    pub(crate) fn carry_out_now(&self) {
        let core = self.shared.lock();
        if core.ring.pushed() > core.ring.submitted() {
            drop(self.shared.combine(core));
        }
    }

    /// Starts the tasks that attend to the ring in a runtime.
    fn attend(&self, mut core: MutexGuard<'_, Core>, handle: &Handle) {
        let (id, nobody) = (handle.id(), Waker::noop());
        core.runtimes.push(Attended { id, reaper: nobody.clone(), flusher: nobody.clone() });
        // Not under the lock: a runtime that is shutting down drops its tasks at once.
        drop(core);
        let shared = Arc::downgrade(&self.shared);
        handle.spawn(flush(Weak::clone(&shared), id));
        handle.spawn(reap(Attendance { shared, id }));
    }

    /// Sees to it that completions that come by themselves wake those who wait in this runtime.
    fn ensure_reaper(&self) {
        let Ok(handle) = Handle::try_current() else {
            return tracing::error!("a wasi-uring socket was awaited outside of a tokio runtime");
        };
        let core = self.shared.lock();
        if !core.runtimes.iter().any(|runtime| runtime.id == handle.id()) {
            self.attend(core, &handle);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters for everybody who has pushed, unless somebody is inside already.
    fn combine<'core>(&'core self, core: MutexGuard<'core, Core>) -> MutexGuard<'core, Core> {
        self.combine_with(core, false)
    }

    /// `look`: enters even if nothing was pushed, for what only an enter brings to light.
    fn combine_with<'core>(
        &'core self,
        mut core: MutexGuard<'core, Core>,
        mut look: bool,
    ) -> MutexGuard<'core, Core> {
        if core.entering {
            return core;
        }
        core.entering = true;
        core.ring.stop_listening();
        let mut wakers = Vec::new();
        let mut rounds = 0;
        loop {
            rounds += 1;
            let entries = core.ring.ready_to_enter();
            let look = std::mem::take(&mut look) || core.ring.has_overflow();
            if entries > 0 || look {
                core.crowd.enter();
                core.ring.stats.enters += 1;
                drop(core);
                wakers.drain(..).for_each(Waker::wake);
                let taken = self.gate.enter(entries, look.then_some(0));
                core = self.lock();
                match taken {
                    Ok(taken) => core.ring.stats.submissions += u64::from(taken),
                    Err(errno) if is_passing(&errno) => {}
                    Err(errno) => {
                        // Nothing that trying again at once would mend; the next caller tries.
                        tracing::error!(%errno, "io_uring_enter failed");
                        core.ring.listen();
                        break;
                    }
                }
                wakers.append(&mut core.flush_wakers);
            }
            core.ring.complete_all();
            core.ring.take_wakers(&mut wakers);
            let pending = core.ring.pushed() > core.ring.submitted();
            if rounds >= COMBINE_ROUNDS_MAX {
                // Somebody else's turn: the reapers go on from here.
                wakers.extend(core.runtimes.iter().map(|runtime| runtime.reaper.clone()));
                core.ring.listen();
                break;
            }
            // What the thread of the grace periods signals meanwhile finds nobody else listening.
            if !pending && !core.ring.listen() && !core.ring.has_news() {
                break;
            }
            core.ring.stop_listening();
        }
        core.entering = false;
        if !wakers.is_empty() {
            drop(core);
            wakers.drain(..).for_each(Waker::wake);
            core = self.lock();
        }
        core
    }
}

/// Whether `io_uring_enter` will work again once completions were taken (its manual page).
fn is_passing(errno: &io::Error) -> bool {
    matches!(errno.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

impl Drop for Shared {
    fn drop(&mut self) {
        let core = self.core.get_mut().unwrap_or_else(PoisonError::into_inner);
        for Attended { reaper, flusher, .. } in core.runtimes.drain(..) {
            reaper.wake();
            flusher.wake();
        }
    }
}

/// Waits until what was pushed has reached the kernel, and what completed at once is booked.
pub(crate) struct Flush {
    guest: Guest,
    /// Entries pushed up to and with ours.
    pushed: u64,
    yielding: Yielding,
}

/// Whether others had the chance to push before a guest enters.
enum Yielding {
    NotYielded,
    Yielded(Yielded),
    Over,
}

impl Flush {
    pub(crate) fn poll(&mut self, uring: &Uring, cx: &mut Context<'_>) -> Poll<()> {
        self.poll_submitted(uring, cx).map(drop)
    }

    /// As `poll`; ready with the lock still held.
    fn poll_submitted<'core>(
        &mut self,
        uring: &'core Uring,
        cx: &Context<'_>,
    ) -> Poll<MutexGuard<'core, Core>> {
        let mut core = uring.shared.lock();
        self.end_yield(&mut core);
        let mut core = match self.advance(uring, core, cx) {
            Advance::Yielded => return Poll::Pending,
            Advance::Looked(core) => core,
        };
        if core.ring.submitted() >= self.pushed {
            return Poll::Ready(core);
        }
        core.flush_wakers.push(cx.waker().clone());
        Poll::Pending
    }

    /// To be called whenever the caller is polled.
    fn end_yield(&mut self, core: &mut Core) {
        if let Yielding::Yielded(yielded) = &self.yielding {
            core.crowd.end_yield(yielded);
            self.yielding = Yielding::Over;
        }
    }

    /// Gets our entries into the kernel, unless somebody else is about to, or others should have
    /// the chance to travel along.
    fn advance<'core>(
        &mut self,
        uring: &'core Uring,
        mut core: MutexGuard<'core, Core>,
        cx: &Context<'_>,
    ) -> Advance<'core> {
        if core.entering || core.ring.submitted() >= self.pushed {
            return Advance::Looked(core);
        }
        // Until they are sent, payloads push each other out of the cache.
        let is_light = core.ring.unsent_bytes() < FLUSH_BYTES;
        let has_yielded = matches!(self.yielding, Yielding::Over);
        let can_yield = !has_yielded && is_light && !first_poll::is_first(cx);
        if can_yield && core.crowd.take_turn(self.guest) && is_current_thread() {
            self.yielding = Yielding::Yielded(core.crowd.start_yield());
            drop(core);
            cx.waker().wake_by_ref();
            return Advance::Yielded;
        }
        Advance::Looked(uring.shared.combine(core))
    }
}

/// What came of an attempt to get entries into the kernel.
enum Advance<'core> {
    /// The caller will be polled again when others have had their turn.
    Yielded,
    /// Ours are in, or somebody else is about to bring them in.
    Looked(MutexGuard<'core, Core>),
}

/// Whether this thread's runtime has no other: its guests never contend for the ring.
fn is_current_thread() -> bool {
    Handle::try_current()
        .is_ok_and(|handle| handle.runtime_flavor() == RuntimeFlavor::CurrentThread)
}

/// An operation its holder waits for. Dropping it abandons the operation, which the kernel finishes
/// unless it is a `send` that ends with its caller; its memory stays until then.
pub(crate) struct Ticket {
    uring: Uring,
    key: OpKey,
    flush: Flush,
    fetched: bool,
    ends_with_caller: bool,
}

impl Ticket {
    /// For a `send` that is not to go on without its caller, if it still waits for room.
    pub(crate) fn cancelled_with_caller(mut self) -> Self {
        self.ends_with_caller = true;
        self
    }

    /// Ready with what came of the operation after its last completion.
    pub(crate) fn poll_done(&mut self, cx: &mut Context<'_>) -> Poll<Done> {
        let coop = ready!(coop::poll_proceed(cx));
        let Self { uring, key, flush, fetched, .. } = self;
        let mut core = uring.shared.lock();
        flush.end_yield(&mut core);
        let mut done = core.ring.fetch(*key, None);
        if done.is_none() {
            core = match flush.advance(uring, core, cx) {
                Advance::Yielded => return Poll::Pending,
                Advance::Looked(core) => core,
            };
            done = core.ring.fetch(*key, Some(cx.waker()));
        }
        drop(core);
        if let Some(done) = done {
            *fetched = true;
            coop.made_progress();
            return Poll::Ready(done);
        }
        uring.ensure_reaper();
        Poll::Pending
    }

    /// What came of the operation, if its last completion is in.
    pub(crate) fn try_done(&mut self) -> Option<Done> {
        let done = self.uring.shared.lock().ring.fetch(self.key, None);
        self.fetched |= done.is_some();
        done
    }

    /// Whether its caller has let others push.
    pub(crate) fn has_yielded(&self) -> bool {
        !matches!(self.flush.yielding, Yielding::NotYielded)
    }

    /// Ready when the last completion is in.
    pub(crate) fn poll_is_done(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.uring.look();
        if self.uring.shared.lock().ring.is_done(self.key, cx.waker()) {
            return Poll::Ready(());
        }
        self.uring.ensure_reaper();
        Poll::Pending
    }

    /// Waits for the last completion.
    pub(crate) async fn done(mut self) -> Done {
        poll_fn(|cx| self.poll_done(cx)).await
    }

    /// Ready when the operation has reached the kernel, with what came of it if it is done by then.
    pub(crate) fn poll_submitted(&mut self, cx: &mut Context<'_>) -> Poll<Option<Done>> {
        let coop = ready!(coop::poll_proceed(cx));
        let Self { uring, key, flush, fetched, .. } = self;
        let mut core = ready!(flush.poll_submitted(uring, cx));
        let done = core.ring.fetch(*key, None);
        *fetched = done.is_some();
        coop.made_progress();
        Poll::Ready(done)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.fetched {
            return;
        }
        let mut core = self.uring.shared.lock();
        if self.ends_with_caller {
            core.ring.cancel(self.key);
        }
        core.ring.abandon(self.key);
        if self.ends_with_caller {
            self.uring.carry_out(core);
        }
    }
}

/// Carries out what nobody waits for, whenever it is woken, for as long as the ring lives.
async fn flush(shared: Weak<Shared>, id: runtime::Id) {
    poll_fn(|cx| {
        let Some(shared) = shared.upgrade() else { return Poll::Ready(()) };
        let mut core = shared.lock();
        core.flusher_due = None;
        if let Some(runtime) = core.runtimes.iter_mut().find(|runtime| runtime.id == id) {
            runtime.flusher.clone_from(cx.waker());
        }
        drop(shared.combine(core));
        Poll::Pending
    })
    .await;
}

/// That a runtime is attended to, for as long as its reaper lives.
struct Attendance {
    shared: Weak<Shared>,
    id: runtime::Id,
}

/// Looks whenever the eventfd was signalled, for as long as the ring and the runtime live.
async fn reap(attendance: Attendance) {
    // A runtime without I/O panics here; what completes at once works there all the same.
    let watch = || attendance.shared.upgrade().map(|shared| shared.arrivals.watch());
    let arrivals = match catch_unwind(AssertUnwindSafe(watch)) {
        Ok(Some(Ok(arrivals))) => Some(arrivals),
        Ok(None) => return,
        Ok(Some(Err(error))) => {
            tracing::error!(%error, "datagrams will not wake guests in this runtime");
            None
        }
        Err(_) => {
            tracing::error!("datagrams will not wake guests in this runtime: enable its I/O");
            None
        }
    };
    poll_fn(|cx| {
        // Edge-triggered: the counter need not be read, only the readiness cleared.
        while let Some(Poll::Ready(readiness)) =
            arrivals.as_ref().map(|arrivals| arrivals.poll_read_ready(cx))
        {
            match readiness {
                Ok(mut readiness) => readiness.clear_ready(),
                Err(_runtime_is_gone) => return Poll::Ready(()),
            }
        }
        let Some(shared) = attendance.shared.upgrade() else { return Poll::Ready(()) };
        let mut core = shared.lock();
        if let Some(runtime) = core.runtimes.iter_mut().find(|runtime| runtime.id == attendance.id)
        {
            runtime.reaper.clone_from(cx.waker());
        }
        if shared.combine(core).ring.has_kept_work() {
            // A batch at a time, and between them the guests.
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    })
    .await;
}

impl Drop for Attendance {
    /// The runtime is shutting down. Those who wait in another one start a reaper there; what
    /// nobody waits for is carried out now.
    fn drop(&mut self) {
        let Some(shared) = self.shared.upgrade() else { return };
        let mut core = shared.lock();
        core.runtimes.retain(|runtime| runtime.id != self.id);
        core.flusher_due = None;
        let mut core = shared.combine(core);
        let wakers = core.ring.take_all_wakers();
        drop(core);
        wakers.into_iter().for_each(Waker::wake);
    }
}
