//! The rings of a host: which of them a new socket goes to.
//!
//! A thread's sockets go to one ring, so that threads do not wait for each other: that of a multi-thread
//! runtime's worker by its number, other threads' in turn. A ring is built when it is first needed. What the pool may
//! have open in all is divided among the rings as they need it ([`Share`]): one that has used up its own takes
//! what is nobody's, then what its neighbours do not use. If its table is full the socket goes to a neighbour.
//! Only when all are in use is a socket refused.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::Instant;

use crate::clock;
use crate::driver::Driver;
use crate::driver::batching::quota_retries;
use crate::driver::held_up::HeldUp;
use crate::error::{RingGone, SetupError};
use crate::limits::{RING_RETRY, RINGS_MAX, SHUTDOWN_PATIENCE, UNITS_GAINED_MAX};
use crate::ring::account::Account;
use crate::ring::receive_queue::QueueLimits;
use crate::ring::recycle::pool::Recycle;
use crate::ring::rlimits::soft_limit;
use crate::ring::share::Share;
use crate::stats::Stats;
use crate::sync::runtime::{Handle, RuntimeFlavor, worker_index};
use crate::sync::{Mutex, MutexGuard};

/// A ring of a pool, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RingIndex(usize);

impl RingIndex {
    /// In a set of rings, of which each bit may be several.
    pub(crate) fn bit(self) -> u64 {
        1 << (self.0 % 64)
    }
}

/// The rings of a host.
#[derive(Debug)]
pub(crate) struct Pool {
    /// Those that threads have come first; the others are for what their tables do not hold.
    rings: Box<[OnceLock<Arc<Driver>>]>,
    threads: usize,
    /// What no ring has of the sockets that may be open.
    nobodys: Arc<Share>,
    held_up: Arc<HeldUp>,
    /// Held by the thread that divides sockets anew; no other is taken under it.
    changing: Mutex<Changing>,
}

#[derive(Debug, Default)]
struct Changing {
    /// When a ring is tried again, after one that could not be built.
    retry_at: Option<Instant>,
}

/// How many rings, and how large.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) sockets: u32,
    /// `None`: as many as processors.
    pub(crate) rings: Option<usize>,
    pub(crate) are_built_at_once: bool,
    /// Of each ring, for what is received.
    pub(crate) buffers: u16,
    pub(crate) queue: QueueLimits,
    pub(crate) recycle: Recycle,
}

impl Pool {
    pub(crate) fn build(plan: Plan) -> Result<Arc<Self>, SetupError> {
        let held_up = HeldUp::new();
        let first = Driver::build(plan.sockets, plan.buffers, plan.queue, plan.recycle, &held_up)?;
        let processors = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = plan.rings.unwrap_or_else(processors).clamp(1, RINGS_MAX);
        let needed = plan.sockets.div_ceil(first.slots()) as usize;
        if needed > RINGS_MAX {
            return Err(SetupError::TablesBeyondNofile {
                sockets: plan.sockets,
                rings: RINGS_MAX,
                limit: soft_limit(libc::RLIMIT_NOFILE),
            });
        }
        let pool = Self::with_first(first, held_up, threads, needed, plan.sockets);
        if plan.are_built_at_once {
            (0..pool.rings.len()).try_for_each(|at| pool.build_ring(at).map(drop))?;
        }
        Ok(pool)
    }

    fn with_first(
        first: Arc<Driver>,
        held_up: Arc<HeldUp>,
        threads: usize,
        needed: usize,
        sockets: u32,
    ) -> Arc<Self> {
        let rings: Box<[_]> = (0..threads.max(needed)).map(|_| OnceLock::new()).collect();
        let _ = rings[0].set(first);
        Arc::new(Self {
            rings,
            threads,
            nobodys: Share::new(sockets),
            held_up,
            changing: Mutex::default(),
        })
    }

    /// Of one ring.
    #[cfg(test)]
    pub(crate) fn of_one(driver: &Arc<Driver>, sockets: u32) -> Arc<Self> {
        Self::with_first(Arc::clone(driver), HeldUp::new(), 1, 1, sockets)
    }

    /// Whether guests can have sockets.
    #[inline]
    pub(crate) fn check(&self) -> Result<(), RingGone> {
        self.first().check()
    }

    /// The ring that is always there.
    pub(crate) fn first(&self) -> &Arc<Driver> {
        self.rings[0].get().expect("set by `with_first`")
    }

    pub(crate) fn ring(&self, at: RingIndex) -> &Arc<Driver> {
        self.rings[at.0].get().expect("a ring that has sockets is there")
    }

    /// Those in a set.
    fn of(&self, rings: u64) -> impl Iterator<Item = &Arc<Driver>> {
        let all = self.rings.iter().enumerate();
        all.filter(move |(at, _)| rings & RingIndex(*at).bit() != 0)
            .filter_map(|(_, ring)| ring.get())
    }

    fn built(&self) -> impl Iterator<Item = &Arc<Driver>> {
        self.rings.iter().filter_map(OnceLock::get)
    }

    /// Runs that while this thread has all locks of the pool and its first ring.
    #[cfg(test)]
    pub(crate) fn while_locked(&self, run: impl FnOnce()) {
        let _changing = self.lock();
        self.first().while_locked(run);
    }

    // ---- which ring -------------------------------------------------------------------------

    /// Takes a socket's place in this thread's ring, or in another if all of that one's slots are in use.
    /// `None` if so many sockets are open as may be.
    #[inline]
    pub(crate) fn take_socket(&self) -> Option<RingIndex> {
        let home = home() % self.threads;
        if let Some(ring) = self.rings[home].get()
            && ring.share().take()
        {
            return Some(RingIndex(home));
        }
        self.acquire(u64::MAX, || self.take_slowly(home))
    }

    /// As `take_socket`, where this thread's ring has none left, or is not there.
    #[cold]
    fn take_slowly(&self, home: usize) -> Option<RingIndex> {
        if !self.has_unused() {
            return None;
        }
        let from_home = || (0..self.rings.len()).map(|beside| (home + beside) % self.rings.len());
        // No ring is built for a thread that could not use it, or while others' have room for what a table
        // does not hold.
        let home = (home, self.ring_or_build(home));
        let built = from_home().map(|at| (at, self.rings[at].get()));
        let built = std::iter::once(home).chain(built);
        let built = built.filter_map(|(at, ring)| Some((at, ring?)));
        built
            .chain(from_home().filter_map(|at| Some((at, self.ring_or_build(at)?))))
            .find(|(_, ring)| self.take_in(ring))
            .map(|(at, _)| RingIndex(at))
    }

    /// Whether a unit is in no use, wherever it is.
    fn has_unused(&self) -> bool {
        let shares = self.built().map(|ring| ring.share());
        shares.chain([&*self.nobodys]).any(Share::has_unused)
    }

    fn take_in(&self, ring: &Driver) -> bool {
        ring.share().take() || self.gain(ring) && ring.share().take()
    }

    /// Has a ring's share gain some units, if its table has slots for them; `false` if none were to be had.
    fn gain(&self, ring: &Driver) -> bool {
        let _dividing = self.lock();
        let share = ring.share();
        let room = u64::from(ring.slots()).saturating_sub(share.held());
        let wanted = room.min(UNITS_GAINED_MAX);
        if wanted == 0 {
            return false;
        }
        // Half of what others do not use: they may be about to use it.
        share.gain(&self.nobodys, |unused| unused.min(wanted)) > 0
            || self
                .built()
                .filter(|other| !std::ptr::eq(other.share(), share))
                .any(|other| share.gain(other.share(), |unused| unused.div_ceil(2).min(wanted)) > 0)
    }

    /// Takes what a quota has by `take`, also if that is about to come back: the CLOSE that gives it back may
    /// be queued in one of these rings, or in the kernel with another thread, which takes microseconds.
    #[inline]
    pub(crate) fn acquire<T>(&self, rings: u64, mut take: impl FnMut() -> Option<T>) -> Option<T> {
        take().or_else(|| self.acquire_after_closes(rings, take))
    }

    #[cold]
    fn acquire_after_closes<T>(
        &self,
        rings: u64,
        mut take: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        for _ in quota_retries() {
            let others_inside = self.of(rings).filter(|ring| ring.enter_for_closes()).count();
            let taken = take();
            if taken.is_some() || others_inside == 0 {
                return taken;
            }
            clock::yield_now();
        }
        None
    }

    // ---- building ---------------------------------------------------------------------------

    fn lock(&self) -> MutexGuard<'_, Changing> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A ring, which is built if it is not there. `None` if it cannot be: others serve its threads, and it is
    /// tried again later.
    fn ring_or_build(&self, at: usize) -> Option<&Arc<Driver>> {
        if let Some(ring) = self.rings[at].get() {
            return Some(ring);
        }
        let now = clock::now();
        // Closed meanwhile, or refused just now.
        if self.check().is_err() || self.lock().retry_at.is_some_and(|retry_at| now < retry_at) {
            return None;
        }
        // Without the lock: it logs, and takes a millisecond.
        match self.build_ring(at) {
            Ok(ring) => Some(ring),
            Err(error) => {
                self.lock().retry_at = Some(now + RING_RETRY);
                tracing::warn!(%error, "no other ring for now: threads share those that are there");
                None
            }
        }
    }

    /// Of two threads that build the same the second finds the first's.
    fn build_ring(&self, at: usize) -> Result<&Arc<Driver>, SetupError> {
        if let Some(ring) = self.rings[at].get() {
            return Ok(ring);
        }
        let another = self.first().build_another()?;
        let ring = self.rings[at].get_or_init(|| another);
        if self.check().is_err() {
            // Closed meanwhile, without this one.
            ring.shut_down(SHUTDOWN_PATIENCE);
        }
        Ok(ring)
    }

    // ---- all --------------------------------------------------------------------------------

    /// A guest that has had sockets in these rings is gone, and so are all its sockets.
    pub(crate) fn forsake(&self, rings: u64, account: &Account) {
        self.of(rings).for_each(|ring| ring.forsake(account));
    }

    pub(crate) fn close_cached(&self) {
        self.built().for_each(|ring| ring.close_cached());
    }

    /// Closes all rings, which takes a bounded time in all; no more are built.
    pub(crate) fn shut_down(&self) {
        if self.check() == Err(RingGone::Forked) {
            return;
        }
        self.built().for_each(|ring| ring.refuse_calls());
        let begun = clock::now();
        for ring in self.built() {
            ring.shut_down(SHUTDOWN_PATIENCE.saturating_sub(clock::since(begun)));
        }
    }

    /// Sums; what came when no runtime was left to reap is counted, too. All 0 in a fork.
    pub(crate) fn stats(&self) -> Stats {
        if self.check() == Err(RingGone::Forked) {
            return Stats::default();
        }
        let mut sum = Stats { interrupts: self.held_up.interrupts(), ..Stats::default() };
        for ring in self.built() {
            ring.reap(None);
            sum += ring.snapshot();
            sum.rings += 1;
        }
        sum
    }
}

/// Which of any number of rings this thread's sockets go to.
fn home() -> usize {
    /// Of threads that are no workers of a multi-thread runtime, in the order of their first sockets.
    static OTHERS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static HOME: usize = worker().unwrap_or_else(|| OTHERS.fetch_add(1, Ordering::Relaxed));
    }
    // An error: the thread is exiting.
    HOME.try_with(|home| *home).unwrap_or(0)
}

/// Which worker of a multi-thread runtime this thread is. (A current-thread runtime's only one is 0, too.)
fn worker() -> Option<usize> {
    let handle = Handle::try_current().ok()?;
    let worker =
        worker_index().filter(|_| handle.runtime_flavor() == RuntimeFlavor::MultiThread)?;
    // Another begin for each runtime, of which a host may have many with few workers each.
    let begin = BuildHasherDefault::<DefaultHasher>::default().hash_one(handle.id());
    Some(worker.wrapping_add(usize::try_from(begin).unwrap_or(usize::MAX)))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::datagram::Family;
    use crate::driver::Guest;
    use crate::limits::BUFFERS;
    use crate::ring::op::BindOp;

    fn pool(sockets: u32, rings: usize) -> Arc<Pool> {
        let queue = QueueLimits { datagrams: 4, bytes: 1 << 20 };
        let rings = Some(rings);
        let plan = Plan {
            sockets,
            rings,
            are_built_at_once: false,
            buffers: BUFFERS,
            queue,
            recycle: Recycle::OFF,
        };
        Pool::build(plan).expect("these tests need io_uring")
    }

    /// Has the close of a socket queued, as if another thread were inside.
    fn begin_close(pool: &Pool) {
        let (ring, guest) = (pool.take_socket().unwrap(), Guest::new());
        let driver = pool.ring(ring);
        let bind = BindOp::new(Family::V4, Vec::new(), (Ipv4Addr::LOCALHOST, 0).into());
        let mut slot = None;
        let keep = |kept| slot = Some(kept);
        drop(driver.submit_bind(guest, None, Box::new(bind), keep).unwrap());
        let slot = slot.expect("kept");
        driver.set_entering(true);
        driver.close(guest, slot, &Account::of_sockets(1), 0);
    }

    /// Kills: a retry without an end, or none, while another thread is inside that may end a close; more than
    /// one try after an own enter, which has brought what there is.
    #[test]
    fn a_full_quota_is_tried_a_thousand_times_while_another_thread_closes_and_else_once_more() {
        let pool = pool(4, 1);
        let tries = AtomicUsize::new(0);
        let never = || {
            tries.fetch_add(1, Ordering::Relaxed);
            None::<()>
        };
        assert!(pool.acquire(u64::MAX, never).is_none());
        assert_eq!(tries.swap(0, Ordering::Relaxed), 2);
        begin_close(&pool);
        assert!(pool.acquire(u64::MAX, never).is_none());
        assert_eq!(tries.swap(0, Ordering::Relaxed), 1001);
        // A guest waits for the closes of its own rings alone.
        assert!(pool.acquire(0, never).is_none());
        assert_eq!(tries.swap(0, Ordering::Relaxed), 2);
        let late = || (tries.fetch_add(1, Ordering::Relaxed) == 500).then_some(());
        assert!(pool.acquire(u64::MAX, late).is_some());
        pool.first().set_entering(false);
    }

    /// Kills: sockets beyond the total; a socket that is refused although a neighbour has room for it.
    #[test]
    fn threads_have_all_sockets_of_a_pool_between_them_and_no_more() {
        const SOCKETS: u32 = 100;
        let pool = pool(SOCKETS, 3);
        let taken: Vec<_> = std::thread::scope(|scope| {
            let take = || std::iter::from_fn(|| pool.take_socket()).collect::<Vec<_>>();
            let threads: Vec<_> = (0..3).map(|_| scope.spawn(take)).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(taken.len(), SOCKETS as usize);
        assert_eq!(pool.stats().sockets_open, SOCKETS.into());
        for ring in taken {
            assert!(pool.take_socket().is_none());
            pool.ring(ring).share().put_back();
            // Whichever ring has it.
            let taken = pool.take_socket().expect("one has come back");
            pool.ring(taken).share().put_back();
            assert!(pool.take_socket().is_some());
        }
        assert_eq!(pool.stats().sockets_open, SOCKETS.into());
    }

    /// Kills: more sockets in a ring than its table has slots.
    #[test]
    fn what_a_table_does_not_hold_goes_to_rings_beyond_those_of_threads() {
        let first = pool(10, 1);
        let slots = first.first().slots();
        let pool = Pool::with_first(Arc::clone(first.first()), HeldUp::new(), 1, 3, 3 * slots);
        let taken: Vec<_> = std::iter::from_fn(|| pool.take_socket()).collect();
        assert_eq!(taken.len(), 3 * slots as usize);
        for ring in pool.built() {
            assert_eq!(ring.share().held(), slots.into());
            assert_eq!(ring.share().in_use(), slots.into());
        }
    }

    #[test]
    fn a_thread_keeps_its_ring_and_others_have_their_own() {
        let homes: Vec<_> = (0..4)
            .map(|_| {
                std::thread::spawn(|| {
                    let first = home();
                    assert_eq!(home(), first);
                    first
                })
            })
            .map(|thread| thread.join().unwrap())
            .collect();
        assert!(homes.windows(2).all(|two| two[0] != two[1]), "{homes:?}");
    }

    /// Kills: a ring that is built for a socket that is refused; units that no thread finds.
    #[test]
    fn one_thread_can_have_all_sockets_in_its_ring_and_a_refusal_builds_none() {
        let pool = pool(100, 8);
        let taken: Vec<_> = std::iter::from_fn(|| pool.take_socket()).collect();
        assert_eq!(taken.len(), 100);
        assert!(pool.take_socket().is_none());
        assert!(pool.built().count() <= 2, "the first, and this thread's");
    }

    #[test]
    fn a_closed_pool_builds_no_more_rings() {
        let pool = pool(10, 2);
        pool.shut_down();
        assert!((0..2).all(|home| pool.take_slowly(home).is_none_or(|at| at.0 == 0)));
        assert_eq!(pool.built().count(), 1);
    }
}
