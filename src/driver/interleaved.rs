//! A driver and its threads, which run in any order: those of guests, the tasks of their runtimes, the ring's
//! own, and one that plays the kernel. Where the simulation (`simulation`) has others act only while a thread is
//! inside, here the crate `shuttle` may let another go on at each lock, each atomic and each look at the
//! kernel's queues, by its seed.
//!
//! Whoever waits blocks, so that a wake-up that is lost is a deadlock, which `shuttle` finds. At the end the
//! books must agree, and nothing may be left. What this cannot find: `shuttle` orders all atomics as
//! `SeqCst` does, so nothing is known of weaker orderings.
//!
//! ```text
//! cp Cargo.lock tests/fuzz/Cargo.lock; cd tests/fuzz
//! RUSTFLAGS='--cfg shuttle' cargo test --lib --target-dir ../../target/shuttle interleaved
//! ```
//!
//! `WASI_URING_SCHEDULES=100000` tries as many schedules by each test. A failure prints its seed:
//! `SHUTTLE_RANDOM_SEED=7 WASI_URING_SCHEDULES=400` and the name of the test have it again, and
//! `WASI_URING_TRACE=1` prints what the guests do. `SHUTTLE_CAPTURE_BACKTRACE=1` says where each thread
//! waits in a deadlock.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::hash::{BuildHasher, RandomState};
use std::net::{Ipv4Addr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use shuttle::rand::{RngCore, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::sync::{Barrier, Condvar, Mutex};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner, thread};

use super::enter::Driver;
use super::overdue::{Overdue, Watched};
use crate::clock;
use crate::datagram::Family;
use crate::error::ErrorCode;
use crate::limits::DEFERRED_TIME_DEFAULT;
use crate::pool::Pool;
use crate::ring::account::{Account, GuestLimits};
use crate::ring::port_order::{CloseId, Port, PortOrder};
use crate::ring::queues::played::{Faults, Played, PlayedPanic, Sizes};
use crate::ring::receive_queue::QueueLimits;
use crate::ring::recycle::pool::Recycle;
use crate::ring::timer::Timer;
use crate::socket::UdpSocket;
use crate::socket::guest::GuestCtx;
use crate::socket::options::OptionValue;
use crate::socket::policy::Checks;
use crate::sync::runtime::{Handle, RuntimeFlavor};

// ---- by chance ----------------------------------------------------------------------------------

fn below(end: usize) -> usize {
    usize::try_from(thread_rng().next_u64() % end as u64).expect("below a usize")
}

fn once_in(times: usize) -> bool {
    below(times) == 0
}

fn pick<T: Copy>(of: &[T]) -> T {
    of[below(of.len())]
}

/// Tries so many schedules: in half of them any thread may go on at any time, in the others one goes on for
/// long (`shuttle::scheduler::PctScheduler`).
fn try_schedules(otherwise: usize, life: fn()) {
    let set = std::env::var("WASI_URING_SCHEDULES").ok();
    let schedules = set.map_or(otherwise, |text| text.parse().expect("a number"));
    let run = |scheduler: Box<dyn Scheduler + Send>| {
        let mut config = Config::new();
        config.stack_size = 1 << 18;
        // One that goes on for longer goes round in circles.
        config.max_steps = MaxSteps::FailAfter(200_000);
        config.silence_warnings = true;
        // The seed is enough, and shorter than the schedule.
        config.failure_persistence = FailurePersistence::None;
        Runner::new(scheduler, config).run(life);
    };
    run(Box::new(RandomScheduler::new(schedules.div_ceil(2))));
    for depth in [2, 4] {
        let mut left = schedules.div_ceil(4);
        while left > 0 {
            let batch = left.min(BATCH);
            left -= batch;
            let seed = Seed::new();
            run(Box::new(PctScheduler::new_from_seed(seed.0, depth, batch)));
        }
    }
}

/// Schedules of one seed, where a schedule has none of its own.
const BATCH: usize = 100;

/// It is printed if they fail, as `RandomScheduler` has its own printed.
struct Seed(u64);

impl Seed {
    fn new() -> Self {
        let set = std::env::var("SHUTTLE_RANDOM_SEED").ok();
        let any = || RandomState::new().hash_one(BATCH);
        Self(set.map_or_else(any, |text| text.parse().expect("a number")))
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("failing seed: {}", self.0);
        }
    }
}

// ---- a ring and its guests ----------------------------------------------------------------------

std::thread_local! {
    /// Of the schedule that is tried.
    static WORLD: RefCell<Option<Arc<World>>> = const { RefCell::new(None) };
}

shuttle::thread_local! {
    /// Whether a panic inside ends this thread's guest, and no more.
    static MAY_PANIC: Cell<bool> = Cell::new(false);
}

struct World {
    driver: Arc<Driver>,
    played: Arc<Played>,
    faults: Plan,
    /// All guests call this, if they are to meet.
    only: Option<usize>,
    /// Where sockets were bound.
    addresses: Mutex<Vec<SocketAddr>>,
    orders: std::sync::Mutex<Orders>,
    /// Of the thread that waits until the kernel has nothing more of the ring's.
    end: std::sync::Mutex<Option<Waker>>,
    is_woken_under_lock: AtomicBool,
    traces: bool,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, Default)]
struct Plan {
    /// The kernel refuses an enter once in so many times; 0: never.
    refuses: usize,
    /// For a while it refuses all.
    has_outage: bool,
    /// A guest's thread panics inside once in so many times.
    panics: usize,
    /// A waker panics once in so many times.
    waker_panics: usize,
}

impl Plan {
    fn new() -> Self {
        let none = Self::default();
        match below(8) {
            0..4 => none,
            4 => Self { refuses: pick(&[2, 5]), ..none },
            5 => Self { has_outage: true, ..none },
            6 => Self { panics: pick(&[3, 10]), ..none },
            _ => Self { waker_panics: 2, ..none },
        }
    }
}

/// What the kernel is to do next.
#[derive(Default)]
struct Orders {
    next: VecDeque<Order>,
    waker: Option<Waker>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Arrive(SocketAddr),
    /// It interrupts the threads.
    Tick,
    /// A send buffer is full for a while.
    FillSendBuffer,
    Refuse,
    /// The ring is gone.
    End,
}

const ELSEWHERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 7);

fn world() -> Option<Arc<World>> {
    WORLD.with_borrow(Option::clone)
}

/// This thread has entered, or is about to leave.
fn meanwhile() {
    let Some(world) = world() else { return };
    assert!(!world.is_locked_here(), "a thread enters with the lock");
    let panics = if MAY_PANIC.with(Cell::get) { world.faults.panics } else { 0 };
    let mut kernel = world.played.kernel();
    // No other thread is inside.
    kernel.faults.panics = panics;
    drop(kernel);
    world.after_kernel();
}

fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    fn trace(&self, what: impl FnOnce() -> String) {
        if self.traces {
            eprintln!("{:?}: {}", thread::current().id(), what());
        }
    }

    /// Whether this thread has the driver's lock: `shuttle` says so by a panic.
    fn is_locked_here(&self) -> bool {
        catch_unwind(AssertUnwindSafe(|| self.driver.while_locked(|| ()))).is_err()
    }

    fn order(&self, order: Order) {
        let mut orders = lock(&self.orders);
        if order != Order::Tick || !orders.next.contains(&order) {
            orders.next.push_back(order);
        }
        orders.waker.take().into_iter().for_each(Waker::wake);
    }

    /// The kernel has done something.
    fn after_kernel(&self) {
        let kernel = self.played.kernel();
        let (has_work, left) = (kernel.has_work(), kernel.left());
        drop(kernel);
        if has_work {
            self.order(Order::Tick);
        }
        if left[..3] == [0; 3] {
            let waker = lock(&self.end).take();
            waker.into_iter().for_each(Waker::wake);
        }
    }

    /// What the kernel does by itself.
    async fn play_kernel(self: Arc<Self>) {
        loop {
            let order = poll_fn(|cx| {
                let mut orders = lock(&self.orders);
                if let Some(order) = orders.next.pop_front() {
                    return Poll::Ready(order);
                }
                orders.waker = Some(cx.waker().clone());
                Poll::Pending
            });
            let order = order.await;
            self.trace(|| format!("the kernel: {order:?}"));
            match order {
                Order::Arrive(to) => self.played.kernel().arrive(ELSEWHERE, to, 20),
                Order::Tick => self.played.kernel().tick(),
                Order::FillSendBuffer => {
                    self.played.kernel().set_room(below(4), 0);
                    yield_now().await;
                    self.played.kernel().make_room();
                }
                Order::Refuse => {
                    self.played.kernel().faults.outage = Some(pick(&[libc::ENOMEM, libc::EBUSY]));
                    for _ in 0..below(20) {
                        yield_now().await;
                    }
                    self.played.kernel().faults.outage = None;
                }
                Order::End => return,
            }
            self.after_kernel();
        }
    }

    /// Waits until the kernel has no entries, operations and sockets of the ring.
    async fn is_over(&self) {
        poll_fn(|cx| {
            // Before the look, so that what ends behind it is heard.
            *lock(&self.end) = Some(cx.waker().clone());
            let left = self.played.kernel().left();
            self.trace(|| format!("{left:?} are left, {}", self.driver.state()));
            if left[..3] == [0; 3] { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

/// Lets other threads go on. (`shuttle`'s has this thread wait until no other can.)
async fn yield_now() {
    thread::sleep(Duration::ZERO);
}

/// A guest's waker: of its thread, which blocks.
struct Woken {
    thread: Waker,
    world: Weak<World>,
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        let Some(world) = self.world.upgrade() else { return self.thread.wake_by_ref() };
        if world.is_locked_here() {
            world.is_woken_under_lock.store(true, Ordering::Relaxed);
        }
        self.thread.wake_by_ref();
        let panics = world.faults.waker_panics;
        if panics > 0 && once_in(panics) && !std::thread::panicking() {
            // Without the panic hook's lines.
            resume_unwind(Box::new(PlayedPanic));
        }
    }
}

struct Guest {
    world: Arc<World>,
    ctx: Arc<GuestCtx>,
    /// Calls as of WASI 0.3, else 0.2.
    is_new: bool,
    /// Of all guests.
    meeting: Arc<Barrier>,
}

/// A panic inside has ended the guest.
struct Ended;

impl Guest {
    /// Waits for a call.
    fn block_on<T>(&self, call: impl Future<Output = T>) -> Result<T, Ended> {
        MAY_PANIC.with(|may_panic| may_panic.set(true));
        let mut call = Box::pin(call);
        let mut is_first = once_in(2);
        let called = catch_unwind(AssertUnwindSafe(|| {
            shuttle::future::block_on(poll_fn(|cx| {
                // As Wasmtime does with a concurrent call.
                if std::mem::take(&mut is_first)
                    && let ready @ Poll::Ready(_) =
                        call.as_mut().poll(&mut Context::from_waker(Waker::noop()))
                {
                    return ready;
                }
                let world = Arc::downgrade(&self.world);
                let woken = Arc::new(Woken { thread: cx.waker().clone(), world });
                call.as_mut().poll(&mut Context::from_waker(&Waker::from(woken)))
            }))
        }));
        MAY_PANIC.with(|may_panic| may_panic.set(false));
        drop(call);
        match called {
            Ok(answer) => Ok(answer),
            Err(panic) if panic.is::<PlayedPanic>() => Err(Ended),
            Err(panic) => resume_unwind(panic),
        }
    }

    /// Polls a call once, and gives it up.
    fn give_up<T>(&self, call: impl Future<Output = T>) -> Result<(), Ended> {
        let mut call = pin!(call);
        self.block_on(poll_fn(|cx| {
            _ = call.as_mut().poll(cx);
            Poll::Ready(())
        }))
    }

    /// A call has returned. It may fail at any time: the kernel may.
    fn note<T>(&self, what: &str, answer: Result<T, ErrorCode>) -> Option<T> {
        self.world.trace(|| format!("{what}: {:?}", answer.as_ref().err()));
        answer.ok()
    }

    /// Does what guests do, on one socket after the other.
    fn live(&self) -> Result<(), Ended> {
        let mut left = 1 + below(8);
        while left > 0 {
            left -= 1;
            let Some((socket, address)) = self.bind()? else { continue };
            while left > 0 && !once_in(5) {
                left -= 1;
                self.call(&socket, address)?;
            }
        }
        Ok(())
    }

    /// Does little, and begins and ends together with the others: no close, and no later call, is what has a
    /// thread enter.
    fn live_with_others(&self) -> Result<(), Ended> {
        let bound = self.bind();
        self.meeting.wait();
        let called = match &bound {
            Ok(Some((socket, address))) => {
                (0..1 + below(2)).try_for_each(|_| self.call(socket, *address))
            }
            _ => Ok(()),
        };
        self.meeting.wait();
        bound?;
        called
    }

    /// A socket that is bound, and where, unless it could not be.
    fn bind(&self) -> Result<Option<(UdpSocket, SocketAddr)>, Ended> {
        let Ok(socket) = UdpSocket::new(&self.ctx, Family::V4) else { return Ok(None) };
        let port = if once_in(6) { 41_000 } else { 0 };
        let local = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        if once_in(8) && !self.is_new {
            // And it does not wait.
            let begun = self.block_on(socket.start_bind(local))?;
            _ = self.note("start-bind", begun);
            return Ok(None);
        }
        let bound = self.block_on(socket.bind(local))?;
        if self.note("bind", bound).is_none() {
            return Ok(None);
        }
        let slot = socket.slot().expect("it is bound");
        let address = self.world.played.kernel().address_of(slot).expect("it is bound");
        self.world.addresses.lock().unwrap_or_else(PoisonError::into_inner).push(address);
        if !self.is_new {
            let stream = self.block_on(socket.stream(None))?;
            if self.note("stream", stream).is_none() {
                return Ok(None);
            }
        }
        Ok(Some((socket, address)))
    }

    /// A socket that is bound, or nobody's.
    fn peer(&self) -> SocketAddr {
        let known = self.world.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        if known.is_empty() || once_in(6) { ELSEWHERE } else { known[below(known.len())] }
    }

    fn call(&self, socket: &UdpSocket, address: SocketAddr) -> Result<(), Ended> {
        let (world, peer) = (&self.world, self.peer());
        let arrive = || world.order(Order::Arrive(address));
        match world.only.unwrap_or_else(|| below(10)) {
            0 | 1 if self.is_new => {
                let sent = self.block_on(socket.send_one(vec![0; 20], Some(peer)))?;
                _ = self.note("send", sent);
            }
            0..3 if !self.is_new => {
                let datagrams: Vec<_> = (0..=below(3)).map(|_| (vec![0; 20], Some(peer))).collect();
                let sent = self.block_on(socket.send(datagrams.into_iter()))?;
                _ = self.note("send", sent);
            }
            2 => {
                // Together with a receive, as in WASI 0.3 calls may be.
                arrive();
                let (mut send, mut receive) = (
                    Box::pin(socket.send_one(vec![0; 20], Some(peer))),
                    Box::pin(socket.receive_one()),
                );
                let (mut sent, mut received) = (false, false);
                self.block_on(poll_fn(|cx| {
                    sent = sent || send.as_mut().poll(cx).is_ready();
                    received = received || receive.as_mut().poll(cx).is_ready();
                    if sent && received { Poll::Ready(()) } else { Poll::Pending }
                }))?;
                world.trace(|| "send and receive".to_owned());
            }
            3..6 => {
                if once_in(2) {
                    arrive();
                } else {
                    // While it waits, or before.
                    self.give_up(async {
                        if self.is_new {
                            _ = socket.receive_one().await;
                        } else {
                            socket.receivable().await;
                        }
                    })?;
                    arrive();
                }
                if self.is_new {
                    let received = self.block_on(socket.receive_one())?;
                    _ = self.note("receive", received);
                } else {
                    self.block_on(socket.receivable())?;
                    let received = self.block_on(socket.receive(8))?;
                    _ = self.note("receive", received);
                }
            }
            6 => {
                let named = self.block_on(socket.local_address())?;
                if let Some(named) = self.note("address", named) {
                    assert_eq!(named, address);
                }
            }
            7 => {
                let set = self.block_on(socket.set_option(OptionValue::HopLimit(9)))?;
                _ = self.note("option", set);
            }
            8 => {
                world.order(Order::FillSendBuffer);
                if self.is_new {
                    self.give_up(socket.send_one(vec![0; 20], Some(peer)))?;
                } else {
                    self.block_on(socket.sendable())?;
                }
            }
            9 if !self.is_new => {
                let received = self.block_on(socket.receive(8))?;
                _ = self.note("receive what is there", received);
            }
            _ if world.faults.has_outage => world.order(Order::Refuse),
            _ => _ = world.driver.snapshot(),
        }
        Ok(())
    }
}

/// Calls that wait for a datagram, for an enter, and (in WASI 0.2) for the enter that arms a receive.
const RECEIVES: usize = 4;
const SENDS: usize = 0;
const ARMS: usize = 9;

/// The life of a ring, and its guests'.
fn live(guest_live: fn(&Guest) -> Result<(), Ended>, only: Option<usize>) {
    clock::played::start();
    let faults = Plan::new();
    let sizes = Sizes {
        sockets: 4,
        submissions: pick(&[16, 512]),
        completions: pick(&[8, 64]),
        ports: 8,
        recycle: Recycle::OFF,
    };
    let limits = QueueLimits { datagrams: pick(&[1, 4, 64]), bytes: 1 << 18 };
    let (driver, played, _rcu) = Driver::played(thread_rng().next_u64(), sizes, limits, meanwhile);
    played.kernel().faults = Faults { refuses: faults.refuses, ..Faults::default() };
    let world = Arc::new(World {
        driver: Arc::clone(&driver),
        played,
        faults,
        only,
        addresses: Mutex::default(),
        orders: std::sync::Mutex::default(),
        end: std::sync::Mutex::default(),
        is_woken_under_lock: AtomicBool::new(false),
        traces: std::env::var_os("WASI_URING_TRACE").is_some(),
    });
    world.trace(|| format!("{faults:?} {sizes:?} {limits:?}"));
    WORLD.set(Some(Arc::clone(&world)));
    let kernel = shuttle::future::spawn(Arc::clone(&world).play_kernel());

    let pool = Pool::of_one(&driver, sizes.sockets);
    let shared = once_in(2).then(|| Handle::new(RuntimeFlavor::MultiThread));
    let count = 2 + below(2);
    let meeting = Arc::new(Barrier::new(count));
    let guests: Vec<_> = (0..count)
        .map(|_| {
            let checks = Checks::allow(|_, _| true);
            let limits = GuestLimits {
                sockets: 2,
                quota: None,
                queue_bytes: usize::MAX,
                send_bytes: pick(&[100, usize::MAX]),
                deferred_time: DEFERRED_TIME_DEFAULT,
            };
            let ctx = Arc::new(GuestCtx::new(Arc::clone(&pool), checks, limits));
            let account = Arc::clone(&ctx.account);
            let (world, meeting) = (Arc::clone(&world), Arc::clone(&meeting));
            let guest = Guest { world, ctx, is_new: only != Some(ARMS) && once_in(2), meeting };
            let runtime = shared.unwrap_or_else(|| Handle::new(RuntimeFlavor::CurrentThread));
            let thread = thread::spawn(move || {
                runtime.enter();
                if guest_live(&guest).is_err() {
                    guest.world.trace(|| "has panicked".to_owned());
                }
            });
            (thread, account)
        })
        .collect();
    drop(pool);
    let accounts: Vec<_> = guests
        .into_iter()
        .map(|(thread, account)| {
            thread.join().unwrap();
            account
        })
        .collect();
    world.trace(|| format!("all guests are gone: {}", driver.state()));
    shuttle::future::block_on(world.is_over());
    check_the_end(&world, &accounts);
    world.order(Order::End);
    shuttle::future::block_on(kernel).unwrap();
    WORLD.set(None);
    clock::played::end();
    // And with the driver its thread ends, or `shuttle` says that it waits for ever.
}

fn check_the_end(world: &World, accounts: &[Arc<Account>]) {
    let driver = &world.driver;
    let left = || {
        let left = world.played.kernel().left();
        (left, driver.is_entering())
    };
    // The last completions are there, and may wait for the thread that is inside.
    for _ in 0..100 {
        if left() == ([0; 5], false) {
            break;
        }
        driver.reap(None);
        thread::yield_now();
    }
    assert_eq!(
        left(),
        ([0; 5], false),
        "entries, operations, sockets, buffers, completions are left"
    );
    assert!(!driver.has_queued(), "entries are counted that the kernel never gets");
    let audit = driver.audit(&world.played);
    assert_eq!((audit.operations, audit.table_in_use, audit.unfree_slots), (0, 0, 0), "left");
    assert!(!audit.is_closing && !audit.has_waiting_binds, "ports");
    for account in accounts {
        let used = (account.sockets.in_use(), account.queued.used(), account.sending.used());
        assert_eq!(used, (0, 0, 0), "quotas");
    }
    assert_eq!(audit.stats.datagrams_sent, world.played.kernel().sent, "datagrams sent");
    let is_woken_under_lock = world.is_woken_under_lock.load(Ordering::Relaxed);
    assert!(!is_woken_under_lock, "a waker was woken under the lock");
}

/// Kills: a thread that leaves without what others have queued; `entering` that stays after a panic; a refused
/// enter that nobody tries again; a close that nobody submits.
#[test]
fn in_any_order_of_threads_all_is_answered_and_nothing_is_left() {
    try_schedules(2000, || live(Guest::live, None));
}

/// Kills, where others that enter later would hide it: a wake-up that is lost between a look and the place of
/// the waker; a completion that comes when a thread has looked for the last time, and of which no reaper hears.
#[test]
fn in_any_order_of_threads_nobody_waits_for_the_others_next_call() {
    try_schedules(6000, || {
        let only = pick(&[RECEIVES, SENDS, ARMS]);
        live(Guest::live_with_others, once_in(2).then_some(only));
    });
}

// ---- the ring's own thread ----------------------------------------------------------------------

/// A driver that does nothing but be called.
struct Called {
    core: Mutex<CalledCore>,
    is_called: Condvar,
}

#[derive(Default)]
struct CalledCore {
    /// `None` until the driver is built.
    overdue: Option<Overdue>,
    closes: PortOrder,
    calls: usize,
    enters: usize,
}

impl CalledCore {
    fn overdue(&mut self) -> &mut Overdue {
        self.overdue.as_mut().expect("it lives")
    }

    fn note(&mut self) -> Option<Waker> {
        let oldest = self.closes.oldest();
        self.overdue().note(oldest)
    }
}

impl Called {
    /// What is done under the lock, and the waker that this leaves for after the unlock.
    fn locked(&self, what: impl FnOnce(&mut CalledCore) -> Option<Waker>) {
        let waker = what(&mut self.core.lock().unwrap());
        waker.into_iter().for_each(Waker::wake);
    }

    fn wait_until(&self, is_so: impl Fn(&CalledCore) -> bool) {
        let mut core = self.core.lock().unwrap();
        while !is_so(&core) {
            core = self.is_called.wait(core).unwrap();
        }
    }

    fn call(&self) {
        let mut before = 0;
        self.locked(|core| {
            before = core.calls;
            core.overdue().call_after(pick(&[Duration::ZERO, Duration::from_millis(1)]))
        });
        self.wait_until(|core| core.calls > before);
    }

    fn close(&self, waits: bool) {
        let (mut before, mut close) = (0, None::<CloseId>);
        self.locked(|core| {
            before = core.enters;
            let port = Port { family: Family::V4, number: None };
            close = Some(core.closes.begin_close(port, clock::now()));
            core.note()
        });
        if waits {
            self.wait_until(|core| core.enters > before);
        }
        self.locked(|core| {
            core.closes.end_close(close.expect("begun"));
            core.note()
        });
    }
}

impl Drop for Called {
    fn drop(&mut self) {
        self.core.get_mut().unwrap().overdue().end();
    }
}

impl Watched for Called {
    fn enter_overdue(&self) {
        self.core.lock().unwrap().enters += 1;
        self.is_called.notify_all();
    }

    fn on_time(&self) {
        let mut core = self.core.lock().unwrap();
        core.overdue().end_call();
        core.calls += 1;
        self.is_called.notify_all();
    }
}

fn call_and_close() {
    clock::played::start();
    let called = Arc::new(Called { core: Mutex::default(), is_called: Condvar::new() });
    let watched: Weak<dyn Watched> = Arc::downgrade(&called) as _;
    called.core.lock().unwrap().overdue = Some(Overdue::new(watched, Timer::new().unwrap()));
    let threads: Vec<_> = (0..2 + below(2))
        .map(|_| {
            let called = Arc::clone(&called);
            thread::spawn(move || {
                for _ in 0..1 + below(4) {
                    match below(4) {
                        0 | 1 => called.call(),
                        2 => called.close(once_in(2)),
                        _ => called.locked(|core| core.overdue().rest()),
                    }
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    // And with it its thread ends.
    drop(called);
    clock::played::end();
}

/// Kills: a timer that is set to what was due before, while another thread has seen that it was set and has left
/// it so; a thread that outlives its driver.
#[test]
fn in_any_order_of_threads_whoever_has_the_driver_called_is_called() {
    try_schedules(10_000, call_and_close);
}
