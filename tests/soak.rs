//! Guests come and go for long: bind, connect, send, receive, are flooded, and end in the midst of it. In
//! the end nothing has grown: memory, descriptors, threads, slots and ports are as before.
//!
//! `WASI_URING_SOAK_SECONDS=36000 cargo test --test soak` does it for ten hours, instead of seconds.

mod common;

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher, RandomState};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::native::socket;
use common::network::in_a_network;
use common::{BOUND, Endpoint, LOOPBACK, LOOPBACK_6, Rig, datagram};
use tokio::runtime::Builder;
use tokio::task::yield_now;
use wasi_uring::{Recycle, Uring};

/// How long it goes on, unless the environment says otherwise.
const SECONDS: u64 = 12;

/// Guests at a time.
const GUESTS: usize = 8;

/// Sockets of a guest.
const SOCKETS_MAX: usize = 6;

/// What may be resident after one half more than after the other, for the allocator's sake.
const GROWTH_MAX: u64 = 16 << 20;

/// The same of what is allocated, for what threads keep to allocate from, and for each life beside: less than
/// the smallest allocation, so that the longer a soak is the less a life can leave.
const HEAP_GROWTH_MAX: u64 = 192 << 10;
const HEAP_GROWTH_OF_LIFE: u64 = 16;

/// Numbers by a seed: the test's, a life's, and how many before.
struct Dice([u64; 3]);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        let Self([.., count]) = self;
        *count += 1;
        BuildHasherDefault::<DefaultHasher>::new().hash_one(self.0) % end
    }
}

/// One guest, from its first call to its last.
async fn live(uring: Uring, mut dice: Dice) {
    let (native, native_addr) = socket(Ipv4Addr::LOCALHOST);
    let mut rig = Rig::on_ring(&uring).await;
    let mut endpoints: Vec<Endpoint> = Vec::new();
    for _ in 0..dice.below(40) {
        let what = dice.below(10);
        if endpoints.is_empty() || (what < 2 && endpoints.len() < SOCKETS_MAX) {
            let addr = if dice.below(4) == 0 { LOOPBACK_6 } else { LOOPBACK };
            endpoints.push(rig.endpoint(addr).await);
            continue;
        }
        let at = usize::try_from(dice.below(endpoints.len() as u64)).unwrap();
        let endpoint = endpoints[at];
        let is_v4 = endpoint.local.is_ipv4();
        let other =
            endpoints.iter().map(|endpoint| endpoint.local).find(|addr| addr.is_ipv4() == is_v4);
        let to: SocketAddr = other.unwrap_or(endpoint.local);
        match what {
            2 => {
                let to = (dice.below(3) > 0).then_some(to);
                // Its datagrams to others are refused from now on.
                rig.reconnect(&mut endpoints[at], to).await.unwrap();
            }
            3 | 4 => {
                let permit = rig.check_send(endpoint.outgoing).await;
                let bytes = [1, 64, 1200, 20_000][usize::try_from(dice.below(4)).unwrap()];
                let batch: Vec<_> =
                    (0..dice.below(16)).map(|_| datagram(&vec![0; bytes], Some(to))).collect();
                if permit.is_ok_and(|permit| permit >= batch.len() as u64) {
                    let _may_be_connected = rig.send(endpoint.outgoing, &batch).await;
                }
            }
            5 | 6 => {
                let _may_be_refused = rig.receive(endpoint.incoming, 16).await;
            }
            7 if is_v4 => {
                for _ in 0..dice.below(400) {
                    native.send_to(&[0; 1000], endpoint.local).unwrap();
                }
            }
            8 if is_v4 => {
                // To a socket of another, that may be closed by then.
                let _may_be_connected =
                    rig.send_one(endpoint.outgoing, b"question", Some(native_addr)).await;
            }
            _ => rig.close(endpoints.swap_remove(at)).await,
        }
    }
    if dice.below(2) == 0 {
        for endpoint in endpoints {
            rig.close(endpoint).await;
        }
    } else if let Some(endpoint) = endpoints.first() {
        // Waits for ever, until it is dropped.
        let pollable = rig.subscribe_incoming(endpoint.incoming).await;
        while dice.below(4) > 0 {
            let _ = rig.receive(endpoint.incoming, 16).await;
        }
        rig.block(pollable).await;
    }
}

/// Lives of guests, one after the other, of which some end in the midst of a call.
async fn lives(uring: Uring, seed: u64, number: Arc<AtomicU64>, until: Instant) {
    while Instant::now() < until {
        let number = number.fetch_add(1, Ordering::Relaxed);
        let patience = 1 + Dice([seed, number, u64::MAX / 2]).below(300);
        let life = live(uring.clone(), Dice([seed, number, 0]));
        tokio::select! {
            biased;
            () = life => {}
            () = async { for _ in 0..patience { yield_now().await } } => {}
        }
    }
}

/// Of the process.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    /// The ring's own. (tokio keeps some of its own for a while.)
    threads: usize,
    ports: usize,
}

impl Held {
    fn now() -> Self {
        let count = |directory: &str| std::fs::read_dir(directory).unwrap().count();
        let ports = ["udp", "udp6"].map(|table| {
            let table = std::fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap();
            table.lines().count() - 1
        });
        Self {
            descriptors: count("/proc/self/fd"),
            threads: std::fs::read_dir("/proc/self/task")
                .unwrap()
                .filter(|task| {
                    let name = task.as_ref().unwrap().path().join("comm");
                    std::fs::read_to_string(name).is_ok_and(|name| name.starts_with("wasi-uring"))
                })
                .count(),
            ports: ports.iter().sum(),
        }
    }
}

/// Resident memory, in bytes.
fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
    kibibytes << 10
}

/// Bytes that are allocated.
#[expect(unsafe_code, reason = "mallinfo2(3)")]
fn heap() -> u64 {
    // SAFETY: the call takes nothing and returns a structure of numbers.
    let info = unsafe { libc::mallinfo2() };
    (info.uordblks + info.hblkhd) as u64
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + BOUND / 2;
    while !is_so() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Kills: whatever a life leaves behind, be it a slot, a port, a descriptor, a thread or memory.
#[test]
fn guests_that_come_and_go_for_long_leave_nothing_behind() {
    let seconds = std::env::var("WASI_URING_SOAK_SECONDS").ok();
    let seconds = seconds.map_or(SECONDS, |text| text.parse().expect("seconds"));
    let half = Duration::from_secs(seconds) / 2;
    let seed = RandomState::new().hash_one(0);
    eprintln!("seed {seed}");
    in_a_network(65_536, || {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let number = Arc::new(AtomicU64::new(0));
        // All that the runtime has of its own.
        runtime.block_on(async { tokio::spawn(async {}).await.unwrap() });
        let held = Held::now();
        let mut recycle = Recycle::default();
        (recycle.quarantined_max, recycle.ready_max) = (256, 256);
        let uring = Uring::builder().sockets(1024).recycle(recycle).build().unwrap();
        let mut ends = Vec::new();
        // The first is for what is made once: threads, the socket that bursts need, the allocator's arenas.
        for time in [half / 2, half, half] {
            let until = Instant::now() + time;
            runtime.block_on(async {
                let guests: Vec<_> = (0..GUESTS)
                    .map(|_| {
                        let lives = lives(uring.clone(), seed, Arc::clone(&number), until);
                        tokio::spawn(lives)
                    })
                    .collect();
                for guest in guests {
                    guest.await.unwrap();
                }
            });
            wait_until("every slot is free, and no socket cached", || {
                uring.close_cached();
                let stats = uring.stats();
                (stats.sockets_open, stats.sockets_cached) == (0, 0)
            });
            // A receive that another thread has armed lets go of its socket a moment after its completion.
            wait_until("no port is taken", || Held::now().ports == 0);
            let lives = number.load(Ordering::Relaxed);
            ends.push((Held::now(), memory(), heap(), lives));
            eprintln!("{lives} lives, {:?}", ends.last().unwrap());
        }
        let [_, (middle, before, heap_before, lives_before), (end, after, heap_after, lives)] =
            &ends[..]
        else {
            panic!("two halves")
        };
        assert_eq!(end, middle);
        assert!(*after < before + GROWTH_MAX, "memory has grown from {before} to {after}");
        let most = heap_before + HEAP_GROWTH_MAX + HEAP_GROWTH_OF_LIFE * (lives - lives_before);
        assert!(*heap_after < most, "{heap_before} bytes were allocated, and now {heap_after}");
        drop(uring);
        // The kernel's last steps, and the ends of the ring's threads.
        wait_until("all is as before", || Held::now() == held);
        drop(runtime);
    });
}
