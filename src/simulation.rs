//! A seeded simulation of the whole: sockets, driver and ring on a kernel that the test plays
//! (`ring::queues::played`). Several guests do what guests may, in any order; other threads do so while
//! one is inside the kernel; calls are dropped, sockets closed, guests gone; the kernel refuses enters,
//! takes parts, fills send buffers, ends receives, loses threads, and panics. Everything runs on one
//! thread, with a time of its own, so that a seed is one life of a ring.
//!
//! After each step the books must agree (`Ring::audit`). Now and then, and at the end, all is left to come
//! to rest: then nobody may wait for what has happened, and in the end nothing may be left.
//!
//! `WASI_URING_SEEDS=1000000 cargo test --lib simulation` tries as many seeds instead of the usual 2000,
//! `WASI_URING_SEED=7` begins with that one, and `WASI_URING_TRACE=1` prints each step.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use tokio::runtime::Runtime;

use crate::clock;
use crate::datagram::Family;
use crate::driver::Driver;
use crate::error::ErrorCode;
use crate::limits::{DEFERRED_TIME_DEFAULT, SHUTDOWN_PATIENCE};
use crate::pool::Pool;
use crate::ring::account::{Account, GuestLimits};
use crate::ring::queues::played::{Dice, Faults, Played, PlayedPanic, Sizes, Stamp};
use crate::ring::quota::Quota;
use crate::ring::receive_queue::{Datagram, QueueLimits};
use crate::ring::recycle::pool::Recycle;
use crate::ring::recycle::rcu::played::PlayedThread;
use crate::socket::UdpSocket;
use crate::socket::guest::GuestCtx;
use crate::socket::options::OptionValue;
use crate::socket::policy::{AddrEvent, Checks, Policy, Reason, SocketAddrUse, SocketId, Verdict};

thread_local! {
    static WORLD: RefCell<Option<Rc<World>>> = const { RefCell::new(None) };
}

struct World {
    driver: Arc<Driver>,
    pool: Arc<Pool>,
    played: Arc<Played>,
    rcu: RefCell<PlayedThread>,
    runtime: Rc<Runtime>,
    dice: RefCell<Dice>,
    guests: RefCell<Vec<Guest>>,
    /// What hosts have yet to decide.
    asked: Asked,
    /// All guests' sockets.
    host: Quota,
    tasks: RefCell<Vec<Task>>,
    next_task: Cell<u64>,
    /// Threads inside each other's enters.
    depth: Cell<usize>,
    /// How often the kernel panics when it may.
    panics: usize,
    is_shut_down: Cell<bool>,
    /// Nobody comes between what a thread does.
    is_over: Cell<bool>,
    traces: bool,
}

struct Guest {
    number: u64,
    /// `None`: gone.
    ctx: Option<Arc<GuestCtx>>,
    /// Calls as of WASI 0.3, else 0.2.
    is_new: bool,
    account: Arc<Account>,
    sockets: Vec<Rc<Socket>>,
    /// It is at work: its thread is the one that is inside.
    is_busy: bool,
    is_woken: Arc<AtomicBool>,
}

struct Socket {
    udp: UdpSocket,
    /// Number of the last datagram it got.
    seen: Cell<u64>,
    /// Its guest has its streams, which the calls of WASI 0.2 that send and receive are of.
    has_streams: Cell<bool>,
}

/// What is to be decided.
type Asked = Arc<Mutex<Vec<Arc<Mutex<Question>>>>>;

#[derive(Default)]
struct Question {
    is_answered: bool,
    waker: Option<Waker>,
}

fn is_allowed(addr: SocketAddr, _: SocketAddrUse) -> bool {
    addr.port() != 13
}

/// A policy that decides at once, or after its first poll, or when the world has it.
struct Undecided {
    asked: Asked,
    driver: Weak<Driver>,
    dice: Mutex<Dice>,
    sockets: AtomicUsize,
}

/// Ready when it is answered.
struct Pondering {
    question: Arc<Mutex<Question>>,
    driver: Weak<Driver>,
    is_allowed: bool,
}

fn assert_unlocked(driver: &Weak<Driver>) {
    let is_free = driver.upgrade().is_none_or(|driver| driver.is_free());
    assert!(is_free || std::thread::panicking(), "the host's code runs under the lock");
}

impl Policy for Undecided {
    fn check(&self, event: &AddrEvent) -> Verdict {
        assert_unlocked(&self.driver);
        let is_allowed = is_allowed(event.addr, event.addr_use);
        let verdict = if is_allowed { Verdict::Allow } else { Verdict::deny("port 13") };
        let what = self.dice.lock().unwrap().below(3);
        if what == 0 {
            return verdict;
        }
        if what == 1 {
            return Verdict::ask(std::future::ready(verdict));
        }
        let question = Arc::<Mutex<Question>>::default();
        self.asked.lock().unwrap().push(Arc::clone(&question));
        Verdict::ask(Pondering { question, driver: Weak::clone(&self.driver), is_allowed })
    }

    fn socket_created(&self, _: SocketId) -> Result<(), Reason> {
        assert_unlocked(&self.driver);
        if self.dice.lock().unwrap().once_in(8) {
            return Err("not now".into());
        }
        self.sockets.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn socket_dropped(&self, _: SocketId) {
        assert_unlocked(&self.driver);
        self.sockets.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Undecided {
    fn drop(&mut self) {
        let left = self.sockets.load(Ordering::Relaxed);
        assert!(left == 0 || std::thread::panicking(), "{left} sockets are never dropped");
    }
}

impl Future for Pondering {
    type Output = Verdict;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Verdict> {
        assert_unlocked(&self.driver);
        let mut question = self.question.lock().unwrap();
        if !question.is_answered {
            question.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(if self.is_allowed { Verdict::Allow } else { Verdict::deny("port 13") })
    }
}

impl Drop for Pondering {
    fn drop(&mut self) {
        assert_unlocked(&self.driver);
        // Nobody waits for it any more.
        self.question.lock().unwrap().waker = None;
    }
}

enum Answer {
    Datagrams(Vec<Datagram>),
    Done,
    Error(ErrorCode),
}

impl<T> From<Result<T, ErrorCode>> for Answer {
    fn from(result: Result<T, ErrorCode>) -> Self {
        result.map_or_else(Self::Error, |_| Self::Done)
    }
}

/// A call of a guest.
struct Task {
    number: u64,
    what: &'static str,
    guest: u64,
    socket: Rc<Socket>,
    /// No other call of its guest comes before it has returned.
    is_exclusive: bool,
    /// It may wait for ever: for a datagram.
    awaits_arrival: bool,
    has_begun: bool,
    woken: Arc<Woken>,
    /// `None` while it is polled.
    future: Option<Pin<Box<dyn Future<Output = Answer>>>>,
}

struct Woken {
    is: AtomicBool,
    /// Some call of the guest was woken: its one task is polled.
    guest: Arc<AtomicBool>,
    driver: Weak<Driver>,
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.is.store(true, Ordering::Relaxed);
        self.guest.store(true, Ordering::Relaxed);
        let is_free = self.driver.upgrade().is_none_or(|driver| driver.is_free());
        assert!(is_free, "woken under the lock");
    }
}

/// What others do while a thread is inside.
fn meanwhile() {
    let Some(world) = WORLD.with_borrow(Option::clone) else { return };
    if world.depth.get() < 2 && !world.is_over.get() {
        world.depth.set(world.depth.get() + 1);
        for _ in 0..world.below(3) {
            world.act();
        }
        world.depth.set(world.depth.get() - 1);
    }
}

const EXTERNAL: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 7),
    SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)), 7),
];

impl World {
    fn new(seed: u64, runtime: &Rc<Runtime>) -> Rc<Self> {
        let mut dice = Dice::new(seed);
        let pick = |dice: &mut Dice, of: &[usize]| of[dice.below(of.len())];
        let sizes = Sizes {
            sockets: u32::try_from(pick(&mut dice, &[2, 4, 12])).unwrap(),
            submissions: pick(&mut dice, &[16, 20, 512]),
            completions: pick(&mut dice, &[8, 64, 4096]),
            ports: u16::try_from(pick(&mut dice, &[3, 8, 64])).unwrap(),
            recycle: Recycle {
                quarantined_max: u32::try_from(pick(&mut dice, &[0, 1, 8])).unwrap(),
                ready_max: u32::try_from(pick(&mut dice, &[0, 1, 8])).unwrap(),
                ..Recycle::default()
            },
        };
        let limits = QueueLimits {
            datagrams: pick(&mut dice, &[1, 4, 64]),
            bytes: pick(&mut dice, &[1000, 1 << 18]),
        };
        let (driver, played, rcu) = Driver::played(seed ^ 0x5eed, sizes, limits, meanwhile);
        let is_faulty = dice.once_in(2);
        let mut often = |of: &[usize]| if is_faulty { pick(&mut dice, of) } else { 0 };
        let faults = Faults {
            refuses: often(&[0, 3, 10, 40]),
            outage: None,
            takes_part: often(&[0, 3, 10]),
            cuts_chains: often(&[0, 0, 1]) > 0,
            panics: 0,
        };
        let panics = often(&[0, 0, 30]);
        played.kernel().faults = faults;
        let host = Quota::new(u32::try_from(pick(&mut dice, &[3, 100])).unwrap());
        let traces = std::env::var_os("WASI_URING_TRACE").is_some();
        if traces {
            eprintln!("seed {seed}: {sizes:?} {limits:?} {faults:?} panics {panics}");
        }
        Rc::new(Self {
            pool: Pool::of_one(&driver, sizes.sockets),
            driver,
            played,
            rcu: RefCell::new(rcu),
            runtime: Rc::clone(runtime),
            dice: RefCell::new(dice),
            guests: RefCell::default(),
            asked: Asked::default(),
            host,
            tasks: RefCell::default(),
            next_task: Cell::new(0),
            depth: Cell::new(0),
            panics,
            is_shut_down: Cell::new(false),
            is_over: Cell::new(false),
            traces,
        })
    }

    fn below(&self, end: usize) -> usize {
        self.dice.borrow_mut().below(end)
    }

    fn once_in(&self, times: usize) -> bool {
        self.below(times) == 0
    }

    fn trace(&self, what: impl FnOnce() -> String) {
        if self.traces {
            eprintln!("{}{}", "    ".repeat(self.depth.get()), what());
        }
    }

    /// Runs that with panics of the kernel, or without.
    fn with_panics<T>(&self, panics: usize, what: impl FnOnce() -> T) -> T {
        let before = std::mem::replace(&mut self.played.kernel().faults.panics, panics);
        let result = catch_unwind(AssertUnwindSafe(what));
        self.played.kernel().faults.panics = before;
        result.unwrap_or_else(|panic| resume_unwind(panic))
    }

    // ---- steps ------------------------------------------------------------------------------

    /// What any thread may do.
    fn act(&self) {
        match self.below(16) {
            0..8 => self.call(),
            8..11 => self.poll_one(true),
            11 if self.once_in(2) => self.poll_one(false),
            11 if self.played.kernel().faults.outage.is_none() => _ = self.answer(),
            11 => {}
            12 => self.cancel(),
            13 => self.arrive(),
            14 => self.with_panics(0, || _ = self.driver.snapshot()),
            _ => self.leave_or_come(),
        }
    }

    /// What happens between calls.
    fn step(&self) {
        match self.below(24) {
            0..14 => self.act(),
            14 | 15 => self.run_runtime(),
            16 => {
                self.trace(|| "tick".to_owned());
                self.played.kernel().tick();
            }
            17 => {
                let (which, room) = (self.below(64), self.below(3));
                self.trace(|| format!("room {which} {room}"));
                self.played.kernel().set_room(which, room);
            }
            18 if self.once_in(4) => {
                self.trace(|| "a thread exits".to_owned());
                self.played.kernel().exit_thread();
            }
            18 => self.arm_anew(),
            19 => {
                self.play_thread(Duration::from_micros(self.below(4000) as u64));
            }
            20 if self.once_in(2) => _ = self.play_rcu(),
            20 if self.once_in(4) => {
                self.trace(|| "close cached, stats".to_owned());
                self.driver.close_cached();
                self.driver.reap(None);
            }
            21 if self.once_in(6) => self.have_an_outage(),
            22 if self.once_in(3) => self.come_to_rest(false),
            _ => self.arrive(),
        }
    }

    /// A host decides; whether one had to.
    fn answer(&self) -> bool {
        let question = {
            let mut asked = self.asked.lock().unwrap();
            if asked.is_empty() {
                return false;
            }
            let at = self.below(asked.len());
            asked.swap_remove(at)
        };
        let waker = {
            let mut question = question.lock().unwrap();
            question.is_answered = true;
            question.waker.take()
        };
        waker.into_iter().for_each(Waker::wake);
        true
    }

    fn leave_or_come(&self) {
        let alive = self.guests.borrow().iter().filter(|guest| guest.ctx.is_some()).count();
        if alive < 2 || (alive < 4 && self.once_in(2)) {
            return self.come();
        }
        if self.once_in(2)
            && let Some(number) = self.pick_guest()
        {
            self.leave(number);
        }
    }

    fn come(&self) {
        let sockets_max = 1 + u32::try_from(self.below(4)).unwrap();
        let bytes_max = [2000, 100_000][self.below(2)];
        let checks = if self.once_in(2) {
            Checks::allow(is_allowed)
        } else {
            Checks::Policy(Arc::new(Undecided {
                asked: Arc::clone(&self.asked),
                driver: Arc::downgrade(&self.driver),
                dice: Mutex::new(Dice::new(self.below(1 << 20) as u64)),
                sockets: AtomicUsize::new(0),
            }))
        };
        let send_max = [3000, 100_000][self.below(2)];
        let mut limits = guest_limits(sockets_max, bytes_max, send_max);
        limits.quota = self.once_in(2).then(|| Quota::within(&self.host, 2));
        let ctx = GuestCtx::new(Arc::clone(&self.pool), checks, limits);
        let account = Arc::clone(&ctx.account);
        let number = self.guests.borrow().len() as u64;
        self.trace(|| format!("guest {number} comes"));
        self.guests.borrow_mut().push(Guest {
            number,
            ctx: Some(Arc::new(ctx)),
            is_new: self.once_in(2),
            account,
            sockets: Vec::new(),
            is_busy: false,
            is_woken: Arc::default(),
        });
    }

    /// A guest that is not at work.
    fn pick_guest(&self) -> Option<u64> {
        let guests = self.guests.borrow();
        let idle: Vec<u64> = guests
            .iter()
            .filter(|guest| guest.ctx.is_some() && !guest.is_busy)
            .map(|guest| guest.number)
            .collect();
        drop(guests);
        (!idle.is_empty()).then(|| idle[self.below(idle.len())])
    }

    fn set_busy(&self, guest: u64, is_busy: bool) {
        self.guests.borrow_mut()[usize::try_from(guest).unwrap()].is_busy = is_busy;
    }

    fn leave(&self, number: u64) {
        self.trace(|| format!("guest {number} leaves"));
        self.set_busy(number, true);
        self.with_panics(0, || {
            let _runtime = self.runtime.enter();
            self.drop_tasks(|task| task.guest == number);
            let (sockets, ctx) = {
                let guest = &mut self.guests.borrow_mut()[usize::try_from(number).unwrap()];
                (std::mem::take(&mut guest.sockets), guest.ctx.take())
            };
            drop(sockets);
            drop(ctx);
        });
        self.set_busy(number, false);
    }

    fn drop_tasks(&self, which: impl Fn(&Task) -> bool) {
        let mut dropped = Vec::new();
        self.tasks.borrow_mut().retain_mut(|task| {
            let is_dropped = which(task);
            if is_dropped {
                dropped.push((task.future.take(), Rc::clone(&task.socket)));
            }
            !is_dropped
        });
        drop(dropped);
    }

    /// A call that its guest gives up, or a wait that is over.
    fn cancel(&self) {
        let Some(guest) = self.pick_guest() else { return };
        let which = {
            let tasks = self.tasks.borrow();
            tasks
                .iter()
                .find(|task| task.guest == guest && !task.is_exclusive)
                .map(|task| task.number)
        };
        let Some(number) = which else { return };
        self.trace(|| format!("call {number} is given up"));
        self.set_busy(guest, true);
        self.with_panics(0, || {
            let _runtime = self.runtime.enter();
            self.drop_tasks(|task| task.number == number);
        });
        self.set_busy(guest, false);
    }

    /// Datagrams from elsewhere.
    fn arrive(&self) {
        let to = self.played.kernel().addresses();
        if to.is_empty() {
            return;
        }
        let to = to[self.below(to.len())];
        let (times, bytes) = ([1, 1, 5, 40][self.below(4)], [0, 5, 100, 100, 2000][self.below(5)]);
        let mut from = EXTERNAL[usize::from(to.is_ipv6())];
        from.set_port([7, 13][usize::from(self.once_in(8))]);
        self.trace(|| format!("{times} of {bytes} bytes from {from} to {to}"));
        for _ in 0..times {
            self.played.kernel().arrive(from, to, bytes);
        }
        if self.once_in(2) {
            self.played.kernel().tick();
        }
    }

    /// A guest waits for what a thread that computes has armed.
    fn arm_anew(&self) {
        let Some(number) = self.pick_guest() else { return };
        let (guest, slots) = {
            let guests = self.guests.borrow();
            let this = &guests[usize::try_from(number).unwrap()];
            let slots: Vec<_> = this.sockets.iter().filter_map(|it| it.udp.slot()).collect();
            (this.ctx.as_ref().unwrap().guest, slots)
        };
        if !slots.is_empty() {
            let slot = slots[self.below(slots.len())];
            self.trace(|| format!("guest {number} arms {slot:?} anew"));
            self.driver.play_arm_anew(guest, slot);
        }
    }

    fn run_runtime(&self) {
        if self.depth.get() > 0 {
            return;
        }
        self.trace(|| "the runtime runs".to_owned());
        self.with_panics(0, || {
            self.runtime.block_on(async {
                for _ in 0..4 {
                    tokio::task::yield_now().await;
                }
            });
        });
    }

    /// The ring's own thread; whether it has or had something to do.
    fn play_thread(&self, time: Duration) -> bool {
        self.trace(|| format!("the ring's thread after {time:?}"));
        clock::played::pass(time);
        self.with_panics(0, || {
            let was_called = self.driver.play_timer();
            self.driver.play_watch() || was_called
        })
    }

    /// The thread of the grace periods; whether it had something to do.
    fn play_rcu(&self) -> bool {
        self.trace(|| "grace periods end".to_owned());
        if self.once_in(200) {
            self.rcu.borrow_mut().fail();
        }
        let end_grace = || self.played.kernel().end_grace();
        self.rcu.borrow_mut().serve(clock::now(), end_grace)
    }

    // ---- calls ------------------------------------------------------------------------------

    fn address(&self, family: Family, other: Option<SocketAddr>) -> SocketAddr {
        let known = self.played.kernel().addresses();
        let known: Vec<_> =
            known.into_iter().filter(|addr| addr.is_ipv4() == (family == Family::V4)).collect();
        match self.below(6) {
            0 => EXTERNAL[usize::from(family == Family::V6)],
            1 if other.is_some() => other.unwrap(),
            _ if known.is_empty() => SocketAddr::new(family.loopback(), 9),
            _ => known[self.below(known.len())],
        }
    }

    /// A guest calls.
    fn call(&self) {
        let Some(guest) = self.pick_guest() else { return };
        if self.tasks.borrow().iter().any(|task| task.guest == guest && task.is_exclusive) {
            return;
        }
        self.set_busy(guest, true);
        let _runtime = self.runtime.enter();
        self.call_as(guest);
        self.set_busy(guest, false);
    }

    #[expect(clippy::too_many_lines, reason = "an arm for each call")]
    fn call_as(&self, guest: u64) {
        let (ctx, is_new, socket) = {
            let guests = self.guests.borrow();
            let this = &guests[usize::try_from(guest).unwrap()];
            let count = this.sockets.len();
            let socket = (count > 0).then(|| Rc::clone(&this.sockets[self.below(count)]));
            (Arc::clone(this.ctx.as_ref().unwrap()), this.is_new, socket)
        };
        let what = self.below(20);
        let (Some(socket), 2..) = (socket, what) else {
            let family = if self.once_in(4) { Family::V6 } else { Family::V4 };
            self.trace(|| format!("guest {guest} creates {family:?}"));
            if let Ok(socket) = self.with_panics(0, || UdpSocket::new(&ctx, family)) {
                let socket = Rc::new(Socket {
                    udp: socket,
                    seen: Cell::new(0),
                    has_streams: Cell::new(false),
                });
                self.guests.borrow_mut()[usize::try_from(guest).unwrap()].sockets.push(socket);
            }
            return;
        };
        if !is_new && self.once_in(2) {
            // Its `poll` has returned.
            self.with_panics(0, || self.drop_tasks(|task| task.guest == guest));
        }
        let this = Rc::clone(&socket);
        let family = socket.udp.family();
        let peer = self.peer(&socket);
        let (max, to) = (1 + self.below(20) as u64, self.address(family, peer));
        match what {
            2..6 => {
                let port = if self.once_in(3) { 41_000 + self.below(3) } else { 0 };
                let ip = if self.once_in(2) { family.loopback() } else { family.unspecified() };
                let to = SocketAddr::new(ip, u16::try_from(port).unwrap());
                if is_new {
                    self.begin(guest, "bind", true, &socket, async move {
                        this.udp.bind(to).await.into()
                    });
                } else {
                    let finishes = !self.once_in(4);
                    self.begin(guest, "start-bind", true, &socket, async move {
                        let begun = this.udp.start_bind(to).await;
                        if finishes && begun.is_ok() {
                            return this.udp.finish_bind().await.into();
                        }
                        begun.into()
                    });
                }
            }
            6 => self.begin(guest, "finish-bind", true, &socket, async move {
                this.udp.finish_bind().await.into()
            }),
            7 | 8 if is_new => {
                let dissolves = self.once_in(4);
                self.begin(guest, "connect", true, &socket, async move {
                    if dissolves {
                        this.udp.disconnect().await.into()
                    } else {
                        this.udp.connect(to).await.into()
                    }
                });
            }
            7 | 8 => {
                let to = (!self.once_in(3)).then_some(to);
                self.begin(guest, "stream", true, &socket, async move {
                    this.udp.stream(to).await.into()
                });
            }
            9..13 if is_new => {
                let payload = vec![0; [0, 20, 20, 1200][self.below(4)]];
                let to = (peer.is_none() || self.once_in(3)).then_some(to);
                self.begin(guest, "send (0.3)", false, &socket, async move {
                    this.udp.send_one(payload, to).await.into()
                });
            }
            9..13 if socket.has_streams.get() => {
                let bytes = [0, 20, 20, 1200][self.below(4)];
                let to = (peer.is_none() || self.once_in(3)).then_some(to);
                let datagrams: Vec<_> = (0..=self.below(6)).map(|_| (vec![0; bytes], to)).collect();
                self.begin(guest, "send (0.2)", true, &socket, async move {
                    this.udp.send(datagrams.into_iter()).await.into()
                });
            }
            13..16 if is_new => self.receive_one(guest, &socket),
            13..15 if socket.has_streams.get() => {
                self.begin(guest, "receive (0.2)", true, &socket, async move {
                    match this.udp.receive(max).await {
                        Ok(datagrams) => Answer::Datagrams(datagrams),
                        Err(error) => Answer::Error(error),
                    }
                });
            }
            15 | 16 if !is_new && socket.has_streams.get() => {
                // One waits for each, and a guest's waits are one task's.
                let waits = |what: &str| {
                    let is_it =
                        |task: &Task| task.what == what && Rc::ptr_eq(&task.socket, &socket);
                    self.tasks.borrow().iter().any(is_it)
                };
                if self.once_in(3) && !waits("poll for sending") {
                    self.begin(guest, "poll for sending", false, &socket, async move {
                        this.udp.sendable().await;
                        Answer::Done
                    });
                } else if !waits("poll for receiving") {
                    self.begin(guest, "poll for receiving", false, &socket, async move {
                        this.udp.receivable().await;
                        Answer::Done
                    });
                }
            }
            17 => {
                let own = self.once_in(2);
                self.begin(guest, "address", true, &socket, async move {
                    if own {
                        this.udp.local_address().await.into()
                    } else {
                        this.udp.remote_address().await.into()
                    }
                });
            }
            18 => self.begin(guest, "set an option", true, &socket, async move {
                this.udp.set_option(OptionValue::HopLimit(9)).await.into()
            }),
            _ => {
                drop(this);
                self.trace(|| format!("guest {guest} drops a socket"));
                self.with_panics(0, || {
                    self.drop_tasks(|task| Rc::ptr_eq(&task.socket, &socket));
                    let sockets =
                        |this: &mut Guest| this.sockets.retain(|one| !Rc::ptr_eq(one, &socket));
                    sockets(&mut self.guests.borrow_mut()[usize::try_from(guest).unwrap()]);
                    drop(socket);
                });
            }
        }
    }

    /// Whose datagrams are to come to a socket that is bound.
    fn owner(&self, socket: &Socket) -> Option<(u32, u32)> {
        let owner = self.played.kernel().owner(socket.udp.slot()?)?;
        (owner.1 > 0).then_some(owner)
    }

    fn peer(&self, socket: &Socket) -> Option<SocketAddr> {
        let slot = socket.udp.slot()?;
        let kernel = self.played.kernel();
        kernel.owner(slot)?;
        kernel.peer_of(slot)
    }

    fn begin(
        &self,
        guest: u64,
        what: &'static str,
        is_exclusive: bool,
        socket: &Rc<Socket>,
        future: impl Future<Output = Answer> + 'static,
    ) {
        let number = self.next_task.replace(self.next_task.get() + 1);
        self.trace(|| format!("guest {guest}, call {number}: {what}, {:?}", socket.udp.slot()));
        let driver = Arc::downgrade(&self.driver);
        let woken = Arc::clone(&self.guests.borrow()[usize::try_from(guest).unwrap()].is_woken);
        self.tasks.borrow_mut().push(Task {
            number,
            what,
            guest,
            socket: Rc::clone(socket),
            is_exclusive,
            awaits_arrival: ["receive (0.3)", "poll for receiving"].contains(&what),
            has_begun: false,
            woken: Arc::new(Woken { is: AtomicBool::new(true), guest: woken, driver }),
            future: Some(Box::pin(future)),
        });
        self.poll(number);
    }

    /// Polls a call whose guest is not at work: one that was woken, or any.
    fn poll_one(&self, is_woken: bool) {
        let ready = self.pollable(is_woken);
        if ready.is_empty() {
            return;
        }
        let (guest, number) = ready[self.below(ready.len())];
        self.poll_of(guest, number);
    }

    /// Calls of guests that are not at work: of each guest its exclusive one alone, if it has one. That is
    /// polled when any of the guest's is woken.
    fn pollable(&self, is_woken: bool) -> Vec<(u64, u64)> {
        let (guests, tasks) = (self.guests.borrow(), self.tasks.borrow());
        let is_set = |flag: &AtomicBool| !is_woken || flag.load(Ordering::Relaxed);
        let is_held =
            |guest: u64| tasks.iter().any(|task| task.guest == guest && task.is_exclusive);
        let is_pollable = |task: &&Task| {
            let guest = &guests[usize::try_from(task.guest).unwrap()];
            let is_next = if task.is_exclusive {
                is_set(&guest.is_woken)
            } else {
                is_set(&task.woken.is) && !is_held(task.guest)
            };
            !guest.is_busy && is_next
        };
        tasks.iter().filter(is_pollable).map(|task| (task.guest, task.number)).collect()
    }

    fn poll_of(&self, guest: u64, number: u64) -> bool {
        self.set_busy(guest, true);
        let _runtime = self.runtime.enter();
        let is_ready = self.poll(number);
        self.set_busy(guest, false);
        is_ready
    }

    /// Polls a call of a guest that is at work; whether it has returned.
    fn poll(&self, number: u64) -> bool {
        let (mut future, woken, first, guest) = {
            let mut tasks = self.tasks.borrow_mut();
            let task = tasks.iter_mut().find(|task| task.number == number).expect("it is pending");
            let first = !std::mem::replace(&mut task.has_begun, true);
            let future = task.future.take().expect("polled once at a time");
            (future, Arc::clone(&task.woken), first, task.guest)
        };
        woken.is.store(false, Ordering::Relaxed);
        woken.guest.store(false, Ordering::Relaxed);
        let polled = self.with_panics(self.panics, || {
            catch_unwind(AssertUnwindSafe(|| {
                // As Wasmtime does with a concurrent call.
                if first
                    && self.once_in(2)
                    && let Poll::Ready(answer) =
                        future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
                {
                    return Poll::Ready(answer);
                }
                future.as_mut().poll(&mut Context::from_waker(&Waker::from(woken)))
            }))
        });
        match polled {
            Ok(Poll::Pending) => {
                let mut tasks = self.tasks.borrow_mut();
                let task = tasks.iter_mut().find(|task| task.number == number).expect("pending");
                task.future = Some(future);
                false
            }
            Ok(Poll::Ready(answer)) => {
                let Task { socket, what, is_exclusive, .. } = {
                    let mut tasks = self.tasks.borrow_mut();
                    let at = tasks.iter().position(|task| task.number == number).expect("pending");
                    tasks.remove(at)
                };
                if is_exclusive && !self.guests.borrow()[usize::try_from(guest).unwrap()].is_new {
                    // Of WASI 0.2, whose `poll` no other call comes between: it calls that anew.
                    let tasks = self.tasks.borrow();
                    let waits = tasks.iter().filter(|task| task.guest == guest);
                    waits.for_each(|task| task.woken.is.store(true, Ordering::Relaxed));
                }
                if what == "stream" && matches!(answer, Answer::Done) {
                    socket.has_streams.set(true);
                }
                self.trace(|| format!("call {number} returns {}", answer.name()));
                self.with_panics(0, || drop(future));
                if let Answer::Datagrams(datagrams) = &answer {
                    self.check_arrivals(&socket, datagrams);
                }
                true
            }
            Err(panic) if panic.is::<PlayedPanic>() => {
                self.trace(|| format!("call {number} panics"));
                self.with_panics(0, || drop(future));
                // Its store is of no use any more.
                self.leave(guest);
                true
            }
            Err(panic) => resume_unwind(panic),
        }
    }

    /// Each is of the socket's owner, and comes after those before.
    fn check_arrivals(&self, socket: &Socket, datagrams: &[Datagram]) {
        for datagram in datagrams {
            assert_ne!(datagram.from.port(), 13, "against the policy");
            let Some(stamp) = Stamp::read(&datagram.payload) else { continue };
            // A call may have had it before the ring was closed, and its socket with that.
            if !self.is_shut_down.get() {
                assert_eq!(Some((stamp.file, stamp.binds)), self.owner(socket), "another owner's");
            }
            if stamp.number != Stamp::LATE {
                assert!(stamp.number > socket.seen.replace(stamp.number), "out of order, or twice");
            }
        }
    }

    // ---- checks -----------------------------------------------------------------------------

    fn check(&self) {
        assert!(!self.driver.is_entering(), "no thread is inside");
        let audit = self.driver.audit(&self.played);
        if self.is_shut_down.get() {
            return;
        }
        let guests = self.guests.borrow();
        for guest in &*guests {
            let sockets = guest.account.sockets.in_use();
            assert!(sockets >= guest.sockets.len() as u64, "a quota that was put back twice");
            let message = 65_507 + 64 * 128;
            let bound =
                100_000 + message * (usize::try_from(guest.account.sockets.in_use()).unwrap() + 1);
            assert!(
                guest.account.queued.used() <= bound,
                "{} bytes are queued",
                guest.account.queued.used()
            );
        }
        let owned: u64 = guests.iter().map(|guest| guest.sockets.len() as u64).sum();
        assert!(audit.table_in_use >= owned, "the table's quota was put back twice");
    }

    /// The kernel refuses every enter for long: whoever waits for one is told.
    fn have_an_outage(&self) {
        self.trace(|| "an outage".to_owned());
        self.played.kernel().faults.outage = Some(libc::ENOMEM);
        for round in 0..16 {
            // Later no call is to begin to wait for the kernel.
            while round < 10 && self.answer() {}
            self.play_thread(Duration::from_millis(60));
            self.run_runtime();
            self.poll_woken();
        }
        if self.driver.has_queued() {
            self.nobody_waits_for_what_has_happened();
        }
        self.played.kernel().faults.outage = None;
        self.trace(|| "the outage is over".to_owned());
    }

    fn poll_woken(&self) -> bool {
        let mut has_polled = false;
        // A guest that yields is woken again.
        for _ in 0..200 {
            let woken = self.pollable(true).first().copied();
            let Some((guest, number)) = woken else { return has_polled };
            has_polled = true;
            self.poll_of(guest, number);
        }
        panic!("calls wake themselves for ever");
    }

    /// A poll without a wake-up must find nothing.
    fn nobody_waits_for_what_has_happened(&self) {
        for (guest, number) in self.pollable(false) {
            let is_still_there = self.pollable(false).contains(&(guest, number));
            if !is_still_there || self.pollable(true).contains(&(guest, number)) {
                continue;
            }
            let returned = self.poll_of(guest, number);
            assert!(!returned, "call {number} was not woken");
        }
    }

    /// Lets everything happen that is going to, without faults.
    fn settle(&self) {
        // One round in which nothing happens may leave something to the runtime: what the ring's thread has
        // found when it was inside.
        let mut quiet = 0;
        for round in 0.. {
            assert!(round < 400, "it never comes to rest");
            self.played.kernel().tick();
            self.run_runtime();
            while self.answer() {}
            let is_busy = self.poll_woken();
            let is_at_work = self.play_thread(Duration::from_millis(100)) | self.play_rcu();
            self.check();
            let is_asked = !self.asked.lock().unwrap().is_empty();
            // Without a reaper what comes by itself is left to the next call.
            let is_still = self.played.kernel().is_still() || !self.driver.has_reaper();
            let is_quiet = is_still && !(is_busy || is_at_work || is_asked);
            quiet = if is_quiet { quiet + 1 } else { 0 };
            if quiet == 2 {
                return;
            }
        }
    }

    /// All comes to rest, but for the send buffers, if `is_stuck`.
    fn come_to_rest(&self, is_stuck: bool) {
        self.trace(|| "it comes to rest".to_owned());
        let faults = std::mem::take(&mut self.played.kernel().faults);
        if !is_stuck {
            self.played.kernel().make_room();
        }
        self.settle();
        if !is_stuck {
            let forgotten: Vec<_> = {
                let tasks = self.tasks.borrow();
                let forgotten = tasks.iter().filter(|task| !task.awaits_arrival);
                forgotten.map(|task| format!("call {}: {}", task.number, task.what)).collect()
            };
            assert!(forgotten.is_empty(), "nobody answers {forgotten:?}");
        }
        self.nobody_waits_for_what_has_happened();
        if !is_stuck && !self.is_shut_down.get() {
            // Nobody comes between.
            let was_over = self.is_over.replace(true);
            self.settle();
            self.have_all_receive();
            self.settle();
            self.wake_receivers();
            self.is_over.set(was_over);
        }
        self.played.kernel().faults = faults;
        self.trace(|| "it has come to rest".to_owned());
    }

    /// Each guest waits for a datagram.
    fn have_all_receive(&self) {
        let sockets: Vec<_> = {
            let guests = self.guests.borrow();
            let of = |guest: &Guest| (guest.number, guest.is_new, guest.sockets.first().cloned());
            guests.iter().filter(|guest| guest.ctx.is_some()).map(of).collect()
        };
        let _runtime = self.runtime.enter();
        for (guest, is_new, socket) in sockets {
            let Some(socket) = socket.filter(|socket| self.owner(socket).is_some()) else {
                continue;
            };
            let this = Rc::clone(&socket);
            self.set_busy(guest, true);
            if is_new {
                self.receive_one(guest, &socket);
            } else if socket.has_streams.get() {
                self.drop_tasks(|task| task.guest == guest);
                self.begin(guest, "poll for receiving", false, &socket, async move {
                    this.udp.receivable().await;
                    Answer::Done
                });
            }
            self.set_busy(guest, false);
        }
    }

    fn receive_one(&self, guest: u64, socket: &Rc<Socket>) {
        let this = Rc::clone(socket);
        self.begin(guest, "receive (0.3)", false, socket, async move {
            match this.udp.receive_one().await {
                Ok(datagram) => Answer::Datagrams(vec![datagram]),
                Err(error) => Answer::Error(error),
            }
        });
    }

    /// Who waits for a datagram gets one.
    fn wake_receivers(&self) {
        let waiting: Vec<_> = {
            let tasks = self.tasks.borrow();
            let waiting = tasks.iter().filter(|task| task.awaits_arrival);
            waiting.map(|task| (task.number, task.what, Rc::clone(&task.socket))).collect()
        };
        for (number, what, socket) in waiting {
            if !self.tasks.borrow().iter().any(|task| task.number == number) {
                continue;
            }
            let to = socket.udp.slot().and_then(|slot| self.played.kernel().address_of(slot));
            let Some(to) = to else { continue };
            let elsewhere = EXTERNAL[usize::from(to.is_ipv6())];
            let from = self.peer(&socket).unwrap_or(elsewhere);
            self.trace(|| format!("call {number} gets one from {from}"));
            let waits = || self.tasks.borrow().iter().any(|task| task.number == number);
            // As many as there may be calls before it.
            let calls = self.tasks.borrow().len();
            for _ in 0..=calls {
                self.played.kernel().arrive(from, to, 50);
            }
            self.settle();
            // Where other sockets have used up the guest's bytes, an empty queue takes one at a time.
            for _ in 0..calls {
                if waits() {
                    self.nobody_waits_for_what_has_happened();
                    self.played.kernel().arrive(from, to, 50);
                    self.settle();
                }
            }
            assert!(!waits(), "{what} (call {number}) hears of no datagram");
        }
    }

    fn end(&self) {
        let (shuts_down, is_stuck) = (self.once_in(8), self.once_in(3));
        if shuts_down {
            self.trace(|| "the ring is closed".to_owned());
            self.is_shut_down.set(true);
            self.driver.shut_down(SHUTDOWN_PATIENCE);
            self.come_to_rest(false);
            assert!(self.tasks.borrow().is_empty(), "calls go on that were told of the end");
        } else {
            self.come_to_rest(is_stuck);
        }
        self.is_over.set(true);
        let faults = std::mem::take(&mut self.played.kernel().faults);
        let guests: Vec<u64> = {
            let guests = self.guests.borrow();
            guests.iter().filter(|guest| guest.ctx.is_some()).map(|guest| guest.number).collect()
        };
        for guest in guests {
            // Also if the kernel refuses it.
            self.played.kernel().faults = faults;
            self.leave(guest);
        }
        self.played.kernel().faults = Faults::default();
        self.settle();
        // What is drained becomes ready, and is closed then.
        for _ in 0..3 {
            self.driver.close_cached();
            self.settle();
        }
        let audit = self.driver.audit(&self.played);
        let left = self.played.kernel().left();
        assert_eq!(audit.operations, 0, "operations are left");
        // What is cached goes with the ring.
        let cached = if shuts_down { audit.cached } else { 0 };
        let expected = [0, 0, usize::try_from(cached).unwrap(), 0, 0];
        assert_eq!(left, expected, "entries, operations, sockets, buffers, completions are left");
        assert_eq!((audit.table_in_use, audit.cached), (0, cached), "slots");
        assert_eq!(audit.unfree_slots as u64, cached, "slots");
        assert!(!audit.is_closing && !audit.has_waiting_binds, "ports");
        for guest in self.guests.borrow().iter().filter(|_| !self.is_shut_down.get()) {
            let used = (
                guest.account.sockets.in_use(),
                guest.account.queued.used(),
                guest.account.sending.used(),
            );
            assert_eq!(used, (0, 0, 0), "quotas");
            assert_eq!(self.host.in_use(), 0, "the host's quota");
        }
        assert!(!self.driver.has_queued(), "entries are counted that the kernel never gets");
        // The rest of a chain that was cut is sent, whatever became of what was before.
        if !faults.cuts_chains {
            assert_eq!(audit.stats.datagrams_sent, self.played.kernel().sent, "datagrams sent");
        }
    }
}

impl Answer {
    fn name(&self) -> String {
        match self {
            Self::Datagrams(datagrams) => format!("{} datagrams", datagrams.len()),
            Self::Done => "well".to_owned(),
            Self::Error(error) => format!("{error:?}"),
        }
    }
}

/// The life of one ring.
fn live(seed: u64, runtime: &Rc<Runtime>) {
    clock::played::start();
    let world = World::new(seed, runtime);
    WORLD.set(Some(Rc::clone(&world)));
    world.come();
    for _ in 0..20 + world.below(150) {
        world.step();
        world.check();
    }
    world.end();
    WORLD.set(None);
    drop(world);
    clock::played::end();
}

fn guest_limits(sockets: u32, queue_bytes: usize, send_bytes: usize) -> GuestLimits {
    let deferred_time = DEFERRED_TIME_DEFAULT;
    GuestLimits { sockets, quota: None, queue_bytes, send_bytes, deferred_time }
}

fn number(variable: &str, otherwise: u64) -> u64 {
    let set = std::env::var(variable).ok();
    set.map_or(otherwise, |text| text.parse().expect("a number"))
}

fn lives(seeds: impl IntoIterator<Item = u64>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    let runtime = Rc::new(runtime);
    for seed in seeds {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| live(seed, &runtime))) {
            // Not to run into more.
            std::mem::forget(WORLD.take());
            eprintln!("seed {seed}: WASI_URING_SEED={seed} WASI_URING_SEEDS=1 is this life");
            resume_unwind(panic);
        }
    }
}

/// Kills: a wake-up that is forgotten, a quota that is not given back, a cancel that is lost, `entering`
/// that stays, memory that is freed while the kernel has it, and what else is not as the books have it.
#[test]
fn whatever_guests_and_the_kernel_do_all_is_answered_and_nothing_is_left() {
    let first = number("WASI_URING_SEED", 0);
    lives(first..first + number("WASI_URING_SEEDS", 2000));
}

/// What a seed's life is changes with the simulation; as long as it has not, this kills: a connect that is
/// forgotten when its call was told of an outage; sends of a guest that is gone, of which one cancel ends
/// but the first part of a chain that was cut; a completion that found no room in the queue while a thread was
/// inside, and of which no reaper hears.
#[test]
fn lives_that_once_went_wrong_go_well() {
    lives([179_578_261_519_482, 179_578_261_526_010, 179_578_261_547_537, 179_579_023_250_354]);
}

/// A guest's socket, which is the only one of its ring.
fn only_socket() -> (Arc<Driver>, Arc<Played>, PlayedThread, UdpSocket) {
    let recycle = Recycle::OFF;
    let sizes = Sizes { sockets: 1, submissions: 16, completions: 16, ports: 1, recycle };
    let limits = QueueLimits { datagrams: 4, bytes: 1 << 20 };
    let (driver, played, rcu) = Driver::played(1, sizes, limits, || ());
    let checks = Checks::allow(|_, _| true);
    let pool = Pool::of_one(&driver, sizes.sockets);
    let ctx = Arc::new(GuestCtx::new(pool, checks, guest_limits(1, usize::MAX, usize::MAX)));
    let socket = UdpSocket::new(&ctx, Family::V4).unwrap();
    (driver, played, rcu, socket)
}

/// Kills: a wait for what was sent before that only the last call to wait hears the end of.
#[test]
fn a_send_behind_others_goes_on_although_a_connect_waits_for_those_too() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    let _runtime = runtime.enter();
    let (driver, played, _rcu, socket) = only_socket();
    let woken = || {
        let (is, guest) = (AtomicBool::new(false), Arc::default());
        Arc::new(Woken { is, guest, driver: Weak::new() })
    };
    let polled = |call: Pin<&mut dyn Future<Output = Result<(), ErrorCode>>>,
                  woken: &Arc<Woken>| {
        call.poll(&mut Context::from_waker(&Waker::from(Arc::clone(woken))))
    };
    let to = SocketAddr::new(Family::V4.loopback(), 9);
    let send = || Box::pin(socket.send_one(vec![0; 20], Some(to)));
    assert_eq!(polled(send().as_mut(), &woken()), Poll::Ready(Ok(())));
    played.kernel().set_room(0, 0);
    // Left to another thread, which has come out without it.
    driver.set_entering(true);
    assert_eq!(polled(send().as_mut(), &woken()), Poll::Ready(Ok(())));
    driver.set_entering(false);
    driver.reap(None);

    let (mut behind, mut connect) = (send(), Box::pin(socket.connect(to)));
    let (first, second) = (woken(), woken());
    assert!(polled(behind.as_mut(), &first).is_pending());
    assert!(polled(connect.as_mut(), &second).is_pending());
    played.kernel().make_room();
    played.kernel().tick();
    driver.reap(None);
    assert!(second.is.load(Ordering::Relaxed));
    assert_eq!(polled(connect.as_mut(), &second), Poll::Ready(Ok(())));
    assert!(first.is.load(Ordering::Relaxed), "it is not woken");
    assert_eq!(polled(behind.as_mut(), &first), Poll::Ready(Ok(())));
}

/// Kills: a connect that the kernel gets to after its call was told of refused enters, and that changes the
/// peer behind the guest's back: it hears nobody then, and what it sends to one goes to another.
#[test]
fn a_connect_that_was_told_of_an_outage_is_known_when_the_kernel_gets_to_it() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
    let _runtime = runtime.enter();
    clock::played::start();
    let (driver, played, _rcu, socket) = only_socket();
    let mut cx = Context::from_waker(Waker::noop());
    let [before, now] = [EXTERNAL[0].ip(), Ipv4Addr::new(192, 0, 2, 2).into()]
        .map(|ip: IpAddr| SocketAddr::new(ip, 7));
    let pass = || {
        clock::played::pass(Duration::from_millis(200));
        driver.play_timer();
    };

    assert_eq!(Box::pin(socket.connect(before)).as_mut().poll(&mut cx), Poll::Ready(Ok(())));
    played.kernel().faults.outage = Some(libc::ENOMEM);
    let mut connect = Box::pin(socket.connect(now));
    assert!(connect.as_mut().poll(&mut cx).is_pending());
    pass();
    pass();
    assert_eq!(connect.as_mut().poll(&mut cx), Poll::Ready(Err(ErrorCode::OutOfMemory)));
    let send = |to| Box::pin(socket.send_one(vec![0; 20], Some(to)));
    let refused = send(before).as_mut().poll(&mut cx);
    assert_eq!(refused, Poll::Ready(Err(ErrorCode::OutOfMemory)), "it is not known yet");
    played.kernel().faults.outage = None;
    pass();

    let local = played.kernel().address_of(socket.slot().unwrap()).unwrap();
    let mut receive = Box::pin(socket.receive_one());
    assert!(receive.as_mut().poll(&mut cx).is_pending());
    played.kernel().arrive(now, local, 50);
    played.kernel().tick();
    driver.reap(None);
    let Poll::Ready(Ok(datagram)) = receive.as_mut().poll(&mut cx) else {
        panic!("it hears nobody")
    };
    assert_eq!(datagram.from, now);
    let refused = send(before).as_mut().poll(&mut cx);
    assert_eq!(refused, Poll::Ready(Err(ErrorCode::InvalidArgument)), "no longer the peer");
    assert_eq!(send(now).as_mut().poll(&mut cx), Poll::Ready(Ok(())));
    clock::played::end();
}
