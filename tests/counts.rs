//! What an operation costs, in counts that are the same on every machine: allocations, bytes,
//! suspensions, enters and submissions. The built-in guest does it so many times and so many more;
//! the difference is what is counted, so starting and ending are not.

mod common;

use std::future::poll_fn;
use std::pin::pin;
use std::time::Duration;

use allocation_counter::{AllocationInfo, measure};
use common::{Backend, Check, Setup, host, within};
use wasi_uring::{Quota, Recycle, Stats, UdpCtx, Uring};
use wasmtime::component::{Component, Linker, ResourceTable};
use wasmtime::{Config, Engine, Store};
use wasmtime_wasi::{WasiCtx, p2, p3};

/// The version of WASI that the guest is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wasi {
    P2,
    P3,
}

impl Wasi {
    const ALL: [Self; 2] = [Self::P2, Self::P3];

    /// The command's built-in guest.
    fn guest(self) -> &'static str {
        match self {
            Self::P2 => include_str!("../src/cli/guests/cycle2.wat"),
            Self::P3 => include_str!("../src/cli/guests/cycle3.wat"),
        }
    }
}

/// What one operation costs.
#[derive(Clone, Copy, Debug)]
struct Cost {
    allocations: f64,
    bytes: f64,
    suspensions: f64,
    enters: f64,
    submissions: f64,
}

/// Totals of a run.
struct Run {
    memory: AllocationInfo,
    suspensions: u64,
    stats: Stats,
}

impl Run {
    /// Without those of the ring's own thread, of which a slow machine sees more.
    fn enters(&self) -> u64 {
        self.stats.enters - self.stats.enters_overdue
    }
}

/// Bytes of a datagram where a test does not ask for others, and datagrams of a batch.
const BYTES: usize = 64;
const BATCH: usize = 16;

/// A ring that recycles or does not, and has no clock: what no bind has needed for a while stays cached,
/// which else a slow machine sees more of.
fn ring(recycles: bool) -> Uring {
    let mut recycle = if recycles { Recycle::default() } else { Recycle::OFF };
    recycle.idle = Duration::from_hours(10);
    Uring::builder().sockets(1024).recycle(recycle).build().unwrap()
}

fn run(backend: Backend, setup: Setup, wasi: Wasi, mode: &str, count: usize, bytes: usize) -> Run {
    let engine = Engine::new(Config::new().concurrency_support(wasi == Wasi::P3)).unwrap();
    let component = Component::new(&engine, wasi.guest()).unwrap();
    // None of these modes sends to the port.
    let numbers = [count, 0, bytes, BATCH].map(|number| number.to_string());
    let args = [mode.to_owned()].into_iter().chain(numbers).collect();
    let (uring, mut linker, mut store) = host(&engine, backend, Setup { args, ..setup });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut suspensions = 0;
    let memory = match wasi {
        Wasi::P2 => {
            let command = runtime
                .block_on(p2::bindings::Command::instantiate_async(&mut store, &component, &linker))
                .unwrap();
            let ended = async { command.wasi_cli_run().call_run(&mut store).await };
            measure(|| suspensions = runtime.block_on(suspensions_of(ended)))
        }
        Wasi::P3 => {
            add_p3(backend, &mut linker);
            let command = runtime
                .block_on(p3::bindings::Command::instantiate_async(&mut store, &component, &linker))
                .unwrap();
            measure(|| {
                suspensions = runtime.block_on(suspensions_of(run_p3(&command, &mut store)));
            })
        }
    };
    Run { memory, suspensions, stats: uring.stats() }
}

fn add_p3(backend: Backend, linker: &mut Linker<common::Host>) {
    match backend {
        Backend::Stock => p3::add_to_linker(linker).unwrap(),
        Backend::Uring => wasi_uring::p3::add_to_linker(linker).unwrap(),
    }
}

async fn run_p3(
    command: &p3::bindings::Command,
    store: &mut Store<common::Host>,
) -> wasmtime::Result<Result<(), ()>> {
    store.run_concurrent(async |store| command.wasi_cli_run().call_run(store).await).await?
}

/// How often a guest that must end well was not ready before.
async fn suspensions_of(guest: impl Future<Output = wasmtime::Result<Result<(), ()>>>) -> u64 {
    let mut guest = pin!(guest);
    let mut suspensions = 0;
    let counting = poll_fn(|cx| {
        let poll = guest.as_mut().poll(cx);
        suspensions += u64::from(poll.is_pending());
        poll
    });
    within(counting).await.unwrap().unwrap();
    suspensions
}

/// Most stores of a host that has one for each request never open a socket.
///
/// Kills: a guest that is made with its configuration.
#[test]
fn a_store_that_opens_no_socket_allocates_nothing_for_udp() {
    let engine = Engine::default();
    let uring = Uring::builder().sockets(1).build().unwrap();
    let template = UdpCtx::builder(&uring).allow(|_, _| true).quota(&Quota::new(1));
    let without = || drop(Store::new(&engine, (WasiCtx::default(), ResourceTable::new())));
    let with = || {
        let udp = template.clone().build();
        drop(Store::new(&engine, (WasiCtx::default(), ResourceTable::new(), udp)));
    };
    with();
    let [without, with] = [measure(without), measure(with)].map(|memory| memory.count_total);
    assert_eq!(with, without);
    assert_eq!(measure(|| drop(template.clone().build())).count_total, 0);
}

const FEW: usize = 100;
const MANY: usize = 612;

#[expect(clippy::cast_precision_loss, reason = "thousands")]
fn cost(backend: Backend, recycles: bool, wasi: Wasi, mode: &str, bytes: usize) -> Cost {
    // A busy machine must not make it more enters.
    let setup = || Setup::of(&ring(recycles)).deferring(Duration::from_hours(1));
    let run = |count| run(backend, setup(), wasi, mode, count, bytes);
    let (few, many) = (run(FEW), run(MANY));
    let per_operation = |few: u64, many: u64| (many as f64 - few as f64) / (MANY - FEW) as f64;
    let cost = Cost {
        allocations: per_operation(few.memory.count_total, many.memory.count_total),
        bytes: per_operation(few.memory.bytes_total, many.memory.bytes_total),
        suspensions: per_operation(few.suspensions, many.suspensions),
        enters: per_operation(few.enters(), many.enters()),
        submissions: per_operation(few.stats.submissions, many.stats.submissions),
    };
    eprintln!("{mode:>7} of {bytes} bytes {wasi:?} {backend:?}: {cost:.2?}");
    cost
}

/// No more than this; a tenth more where sockets are recycled or not, as the kernel has time.
fn costs_at_most(mode: &str, wasi: Wasi, most: Cost) {
    ring_costs_at_most(true, mode, wasi, most);
}

fn ring_costs_at_most(recycles: bool, mode: &str, wasi: Wasi, most: Cost) {
    let stock = cost(Backend::Stock, recycles, wasi, mode, BYTES);
    let ring = cost(Backend::Uring, recycles, wasi, mode, BYTES);
    for (what, ring, most) in [
        ("allocations", ring.allocations, most.allocations),
        ("bytes", ring.bytes, most.bytes),
        ("suspensions", ring.suspensions, most.suspensions),
        ("enters", ring.enters, most.enters),
        ("submissions", ring.submissions, most.submissions),
    ] {
        assert!(ring <= most, "{mode} of {wasi:?}: {ring} {what}, {most} allowed");
    }
    let tables = if recycles { 200.0 } else { 0.0 };
    assert!(ring.bytes < stock.bytes + tables, "{mode} of {wasi:?} allocates more than on stock");
}

#[test]
fn creating_a_socket_allocates_its_memory_and_asks_nobody() {
    let nothing =
        Cost { allocations: 0.0, bytes: 0.0, suspensions: 0.0, enters: 0.0, submissions: 0.0 };
    costs_at_most("create", Wasi::P2, Cost { allocations: 1.0, bytes: 208.0, ..nothing });
    // One is Wasmtime's, which has a task for each call.
    costs_at_most("create", Wasi::P3, Cost { allocations: 2.0, bytes: 320.0, ..nothing });
}

/// On every machine, because nothing of it depends on how long anything takes.
#[test]
fn a_cycle_of_a_lone_guest_is_one_enter_with_three_entries() {
    let most = Cost {
        allocations: 7.1,
        bytes: 1000.0,
        suspensions: 0.02,
        enters: 1.01,
        submissions: 3.01,
    };
    for wasi in Wasi::ALL {
        ring_costs_at_most(false, "bind", wasi, most);
    }
}

/// A grace period of the kernel's ends within each hundredth enter, or where an enter takes milliseconds within
/// most: the thread inside enters once more then, for the cache, which allocates its lists. And the longer it
/// takes, the more sockets are in quarantine: 200 bytes of tables for each cycle, if none comes out.
#[test]
fn a_cycle_with_recycled_sockets_is_one_enter_and_one_for_each_grace_period() {
    let most = Cost {
        allocations: 11.5,
        bytes: 1600.0,
        suspensions: 0.02,
        enters: 2.02,
        submissions: 4.02,
    };
    for wasi in Wasi::ALL {
        ring_costs_at_most(true, "bind", wasi, most);
        // So many that they outlast many grace periods.
        let cycles = 10_000;
        let setup = Setup::of(&ring(true)).deferring(Duration::from_hours(1));
        let Stats { submissions, sockets_created, sockets_recycled, .. } =
            run(Backend::Uring, setup, wasi, "bind", cycles, BYTES).stats;
        assert!(sockets_recycled > 0);
        let fresh = sockets_created - sockets_recycled;
        // To bind, to unbind and to drain each; and to make those that no closed one was ready for.
        let most = 3 * cycles as u64 + fresh;
        assert!(submissions <= most, "{submissions} submissions with {fresh} fresh sockets");
    }
}

#[test]
fn an_echo_of_a_lone_guest_is_two_enters_and_seldom_suspends() {
    // Wasmtime's and its tables' are 24 of these.
    let most = Cost {
        allocations: 30.5,
        bytes: 4000.0,
        suspensions: 0.1,
        enters: 2.02,
        submissions: 2.02,
    };
    costs_at_most("echo", Wasi::P2, most);
    costs_at_most("echo", Wasi::P3, most);
}

#[test]
fn a_question_of_a_fresh_socket_is_five_enters() {
    let most = Cost {
        allocations: 54.0,
        bytes: 6700.0,
        suspensions: 0.1,
        enters: 5.05,
        submissions: 10.2,
    };
    costs_at_most("dns", Wasi::P2, most);
    costs_at_most("dns", Wasi::P3, most);
}

#[test]
fn a_batch_is_one_enter_where_a_call_takes_many_datagrams() {
    let most = Cost {
        allocations: 43.0,
        bytes: 6000.0,
        suspensions: 0.6,
        enters: 1.02,
        submissions: 1.02,
    };
    costs_at_most("batch", Wasi::P2, most);
    let each = Cost {
        allocations: 262.0,
        bytes: 35_000.0,
        suspensions: 0.6,
        enters: 16.1,
        submissions: 16.1,
    };
    costs_at_most("batch", Wasi::P3, each);
}

/// Kills: a verdict that is not polled before the call suspends.
#[test]
fn a_check_whose_future_is_ready_costs_no_suspension() {
    for wasi in Wasi::ALL {
        for mode in ["bind", "echo", "dns"] {
            let suspensions = Check::ALL.map(|check| {
                let of = |count| {
                    let setup = Setup { check, ..Setup::of(&ring(true)) };
                    run(Backend::Uring, setup, wasi, mode, count, BYTES).suspensions
                };
                of(MANY).saturating_sub(of(FEW))
            });
            eprintln!("{mode} of {wasi:?}: {suspensions:?} suspensions");
            let [allow, ready, late] = suspensions;
            let few = (MANY - FEW) as u64 / 10;
            assert!(ready <= allow + few, "{ready}, and {allow} without futures");
            assert!(late > ready + few, "what waits is seen");
        }
    }
}

/// Between a guest's memory and the kernel a payload lies in one allocation on its way out, and in
/// one on its way in: so many bytes more of it are so many bytes more allocated, each way.
///
/// Kills: a clone of the payload anywhere between.
#[test]
fn a_payload_lies_in_one_allocation_each_way() {
    const LONG: usize = 1200;
    for wasi in Wasi::ALL {
        for (mode, datagrams) in [("echo", 2), ("batch", BATCH)] {
            let [short, long] =
                [BYTES, LONG].map(|bytes| cost(Backend::Uring, true, wasi, mode, bytes));
            #[expect(clippy::cast_precision_loss, reason = "thousands")]
            let (ways, more) = ((2 * datagrams) as f64, (LONG - BYTES) as f64);
            let allocations = (long.bytes - short.bytes) / ways / more;
            // Messages of several are grouped anew for each run.
            assert!((0.98..1.02).contains(&allocations), "{allocations}, {mode} of {wasi:?}");
        }
    }
}
