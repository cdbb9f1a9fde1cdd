//! What panics, and foreign code that calls back, must not do to the other guests of a ring.

use std::cell::RefCell;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, RawWaker, RawWakerVTable, Wake, Waker};
use std::time::Instant;

use tracing::span;

use super::batching::Guest;
use super::enter::Driver;
use super::flush::Flush;
use super::held_up::HeldUp;
use super::in_flight::InFlight;
use crate::datagram::Family;
use crate::error::Errno;
use crate::limits::{BUFFERS, REFUSAL_PATIENCE, SQ_ENTRIES};
use crate::ring::account::Account;
use crate::ring::op::{BindOp, Op, OpResult, Output};
use crate::ring::queues::SlotIndex;
use crate::ring::receive_queue::QueueLimits;
use crate::ring::recycle::pool::Recycle;
use crate::ring::share::Share;

fn driver() -> Arc<Driver> {
    let limits = QueueLimits { datagrams: 4, bytes: 1 << 20 };
    Driver::build(4, BUFFERS, limits, Recycle::OFF, &HeldUp::new())
        .expect("these tests need io_uring")
}

/// A bound socket.
fn socket(driver: &Arc<Driver>, guest: Guest) -> SlotIndex {
    driver.share().gain(&Share::new(1), |all| all);
    assert!(driver.share().take());
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let bind = Box::new(BindOp::new(Family::V4, Vec::new(), any));
    let mut slot = None;
    let mut in_flight = driver.submit_bind(guest, None, bind, |kept| slot = Some(kept)).unwrap();
    assert_eq!(done_at_once(&mut in_flight).err(), None);
    slot.expect("kept")
}

fn done_at_once(in_flight: &mut InFlight) -> OpResult {
    match in_flight.poll_result(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(done) => done,
        Poll::Pending => panic!("a bind or an install completes when it is submitted"),
    }
}

/// Another guest than those before queues an operation, and it is done: the ring works.
fn assert_it_goes_on(driver: &Arc<Driver>, slot: SlotIndex) {
    let mut in_flight = driver.submit(Guest::new(), slot, Op::Install).unwrap();
    assert!(matches!(done_at_once(&mut in_flight), Ok(Output::Descriptor(_))));
}

/// A waker that counts what is done with it, and how often that is done under the driver's lock.
struct Foreign {
    driver: Arc<Driver>,
    clones: AtomicUsize,
    wakes: AtomicUsize,
    drops: AtomicUsize,
    under_lock: AtomicUsize,
}

impl Foreign {
    fn new(driver: &Arc<Driver>) -> Arc<Self> {
        let [clones, wakes, drops, under_lock] = [const { AtomicUsize::new(0) }; 4];
        Arc::new(Self { driver: Arc::clone(driver), clones, wakes, drops, under_lock })
    }

    fn count(&self, which: &AtomicUsize) {
        which.fetch_add(1, Ordering::Relaxed);
        if !self.driver.core.is_free() {
            self.under_lock.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn counts(&self) -> [usize; 3] {
        assert_eq!(self.under_lock.load(Ordering::Relaxed), 0, "run under the driver's lock");
        [&self.clones, &self.wakes, &self.drops].map(|count| count.load(Ordering::Relaxed))
    }

    #[expect(unsafe_code, reason = "std's `Wake` does not see a clone")]
    fn waker(self: &Arc<Self>) -> Waker {
        const VTABLE: RawWakerVTable = RawWakerVTable::new(clone, wake, wake, drop);
        fn this<'any>(data: *const ()) -> &'any Foreign {
            // SAFETY: `data` is of the leaked `Arc` below.
            unsafe { &*data.cast() }
        }
        fn clone(data: *const ()) -> RawWaker {
            this(data).count(&this(data).clones);
            RawWaker::new(data, &VTABLE)
        }
        fn wake(data: *const ()) {
            this(data).count(&this(data).wakes);
        }
        fn drop(data: *const ()) {
            this(data).count(&this(data).drops);
        }
        let data = Arc::into_raw(Arc::clone(self)).cast();
        // SAFETY: the functions take no ownership of the data, which is leaked.
        unsafe { Waker::new(data, &VTABLE) }
    }
}

struct Panics(AtomicUsize);

impl Wake for Panics {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
        panic!("a waker that panics");
    }
}

impl Panics {
    fn new() -> Arc<Self> {
        Arc::new(Self(AtomicUsize::new(0)))
    }
}

/// A guest whose flush waits with this waker, because another thread was inside, which has left
/// without its entries.
fn left_waiting(driver: &Arc<Driver>, waker: &Waker) -> (SlotIndex, Flush) {
    let guest = Guest::new();
    let slot = socket(driver, guest);
    let (_queue, mut flush) = driver.arm(guest, slot, &Account::of_sockets(1)).unwrap();
    driver.lock().unwrap().entering = true;
    assert!(flush.poll(driver, &mut Context::from_waker(waker)).is_pending());
    driver.lock().unwrap().entering = false;
    (slot, flush)
}

/// Kills: a clone of the waker while the lock is held; the guard's fields in another order;
/// `AfterUnlock::run` before the unlock.
#[test]
fn no_waker_is_cloned_woken_or_dropped_under_the_lock() {
    let driver = driver();
    let foreign = Foreign::new(&driver);
    let waker = foreign.waker();
    let (_slot, _flush) = left_waiting(&driver, &waker);
    assert_eq!(foreign.counts(), [1, 0, 0]);
    drop(driver.combine(driver.lock().unwrap()));
    assert_eq!(foreign.counts(), [1, 1, 0]);
    let mut core = driver.lock().unwrap();
    core.drop_later(Some(waker));
    core.wake_later(Some(foreign.waker()));
    assert_eq!(foreign.counts(), [1, 1, 0]);
    drop(core);
    assert_eq!(foreign.counts(), [1, 2, 1]);
}

/// Kills: one `catch_unwind` around all wakers, or none.
#[test]
fn a_waker_that_panics_keeps_no_other_from_its_turn() {
    let driver = driver();
    let (panics, foreign) = (Panics::new(), Foreign::new(&driver));
    let mut core = driver.lock().unwrap();
    for _ in 0..2 {
        core.wake_later(Some(Arc::clone(&panics).into()));
        core.wake_later(Some(foreign.waker()));
    }
    drop(core);
    assert_eq!(panics.0.load(Ordering::Relaxed), 2);
    assert_eq!(foreign.counts(), [0, 2, 0]);
}

/// Kills: the panic goes on to the guest whose thread enters for all; `entering` stays.
#[test]
fn a_waker_that_panics_while_a_thread_is_inside_does_not_stop_the_ring() {
    let driver = driver();
    let slot = socket(&driver, Guest::new());
    let panics = Panics::new();
    let waker = Waker::from(Arc::clone(&panics));
    let mut waiting = driver.submit(Guest::new(), slot, Op::Install).unwrap();
    driver.lock().unwrap().entering = true; // another thread is inside
    assert!(waiting.poll_result(&mut Context::from_waker(&waker)).is_pending());
    driver.lock().unwrap().entering = false;
    assert_it_goes_on(&driver, slot);
    assert_eq!(panics.0.load(Ordering::Relaxed), 1);
    std::thread::scope(|scope| scope.spawn(|| assert_it_goes_on(&driver, slot)).join().unwrap());
    assert!(waiting.poll_result(&mut Context::from_waker(&waker)).is_ready());
}

/// Kills: no guard, or one that clears no flag, wakes no guest, or is dropped while the lock is held.
#[test]
fn a_thread_that_panics_inside_lets_the_others_go_on() {
    let driver = driver();
    let foreign = Foreign::new(&driver);
    let (slot, mut flush) = left_waiting(&driver, &foreign.waker());
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        drop(driver.combine_by(|_, _| panic!("inside"), driver.lock().unwrap(), false));
    }));
    assert!(panicked.is_err());
    assert_eq!(foreign.counts()[1], 1, "the guest that waits is woken, and enters itself");
    assert!(flush.poll(&driver, &mut Context::from_waker(Waker::noop())).is_ready());
    std::thread::scope(|scope| scope.spawn(|| assert_it_goes_on(&driver, slot)).join().unwrap());
}

/// Kills: as above, with a panic under the lock, which poisons it.
#[test]
fn a_thread_that_panics_under_the_lock_lets_the_others_go_on() {
    let driver = driver();
    let slot = socket(&driver, Guest::new());
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let _core = driver.lock().unwrap();
        panic!("under the lock");
    }));
    assert!(panicked.is_err());
    assert_it_goes_on(&driver, slot);
}

/// A subscriber that panics at every event.
struct PanickingSubscriber {
    driver: Arc<Driver>,
    events: Arc<AtomicUsize>,
}

impl tracing::Subscriber for PanickingSubscriber {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, _: &tracing::Event<'_>) {
        self.events.fetch_add(usize::from(self.driver.core.is_free()), Ordering::Relaxed);
        panic!("a subscriber that panics");
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// Kills: a log line under the lock, or before the flag is cleared, or not contained.
#[test]
fn a_subscriber_that_panics_does_not_stop_the_ring() {
    let driver = driver();
    let guest = Guest::new();
    let slot = socket(&driver, guest);
    let mut waiting = driver.submit(guest, slot, Op::Install).unwrap();
    let events = Arc::new(AtomicUsize::new(0));
    let subscriber =
        PanickingSubscriber { driver: Arc::clone(&driver), events: Arc::clone(&events) };
    tracing::subscriber::with_default(subscriber, || {
        let fails = |_, _| Err(io::Error::from_raw_os_error(libc::ENXIO));
        drop(driver.combine_by(fails, driver.lock().unwrap(), false));
    });
    assert_eq!(events.load(Ordering::Relaxed), 1);
    assert_it_goes_on(&driver, slot);
    assert!(waiting.poll_result(&mut Context::from_waker(Waker::noop())).is_ready());
}

/// Kills: operations, and their memory, that pile up while a guest calls again and again.
#[test]
fn nothing_is_queued_behind_what_the_kernel_has_refused_for_too_long() {
    let driver = driver();
    let guest = Guest::new();
    let slot = socket(&driver, guest);
    let mut waiting = driver.submit(guest, slot, Op::Install).unwrap();
    let refusal = Errno(libc::ENOMEM);
    let mut core = driver.lock().unwrap();
    let now = Instant::now();
    for at in [now, now + REFUSAL_PATIENCE] {
        core.refusals.count(refusal, at);
    }
    let queued = core.ring.queued();
    drop(core);
    for _ in 0..100 {
        assert_eq!(driver.submit(guest, slot, Op::Install).err(), Some(refusal));
    }
    assert_eq!(driver.lock().unwrap().ring.queued(), queued);
    assert_eq!(waiting.try_result().map(Result::err), Some(Some(refusal)));
    drop(driver.combine(driver.lock().unwrap()));
    assert!(
        matches!(done_at_once(&mut waiting), Ok(Output::Descriptor(_))),
        "it was not withdrawn"
    );
    assert_it_goes_on(&driver, slot);
}

/// Kills: places that are used again as soon as the kernel has published that it has taken them, while it
/// still reads the options of chains (Linux 6.10 to 6.13.3).
#[test]
fn entries_that_are_queued_while_a_thread_is_inside_leave_those_it_has_submitted_alone() {
    let driver = driver();
    let slot = socket(&driver, Guest::new());
    let [inside, other] = [Guest::new(), Guest::new()];
    let submit = |guest| driver.submit(guest, slot, Op::AwaitWritable).unwrap();
    let mut in_flight: Vec<_> = (0..100).map(|_| submit(inside)).collect();
    let meanwhile = RefCell::new(Vec::new());
    let enter = |entries, completions| {
        let taken = driver.kernel.enter(entries, completions);
        if meanwhile.borrow().is_empty() {
            assert_eq!(entries, 100);
            let before = driver.kernel.places();
            // As many as there are places, and more.
            meanwhile.borrow_mut().extend((0..SQ_ENTRIES + 100).map(|_| submit(other)));
            let after = driver.kernel.places();
            let changed =
                before.iter().zip(&after).filter(|(before, after)| before != after).count();
            assert_eq!(
                changed,
                SQ_ENTRIES as usize - 100,
                "all places but those of the submission"
            );
        }
        taken
    };
    drop(driver.combine_by(enter, driver.lock().unwrap(), false));
    in_flight.append(&mut meanwhile.take());
    for mut in_flight in in_flight {
        assert!(matches!(done_at_once(&mut in_flight), Ok(Output::Done)));
    }
}
