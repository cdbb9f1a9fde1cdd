//! How many sockets are cached, and that those hold neither a port nor a slot that a guest needs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use wasi_uring::{Recycle, Uring};

use crate::common::network::in_a_network;
use crate::common::{
    BOUND, ErrorCode, IpAddressFamily, LOOPBACK, LOOPBACK_6, Rig, block_on, eventually, native,
};

/// Longer than any test.
const NEVER: Duration = Duration::from_hours(1);

const ALL: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
const ALL_6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0);

fn ring(sockets: u32, quarantined_max: u32, ready_max: u32, idle: Duration) -> Uring {
    let mut recycle = Recycle::default();
    (recycle.quarantined_max, recycle.ready_max, recycle.idle) = (quarantined_max, ready_max, idle);
    Uring::builder().sockets(sockets).recycle(recycle).build().unwrap()
}

/// Runs a test in a network of its own without any sockets.
fn alone(test: impl FnOnce() + Send) {
    // What tokio opens once per process must not be opened there.
    block_on(async {});
    in_a_network(65_536, || {
        // Those of ip(8) go, a moment after it.
        block_on(no_sockets());
        test();
    });
}

/// The kernel's count of sockets in this network, unbound ones included.
fn sockets() -> u32 {
    let text = std::fs::read_to_string("/proc/thread-self/net/sockstat").unwrap();
    let used = text.strip_prefix("sockets: used ").and_then(|text| text.lines().next());
    used.expect("the first line").parse().unwrap()
}

/// Waits until the kernel has freed every socket, which it does somewhat after a ring is dropped.
async fn no_sockets() {
    eventually("no socket is there", || sockets() == 0).await;
}

async fn open(rig: &mut Rig, any: SocketAddr, sockets: usize) -> Vec<(u32, SocketAddr)> {
    let mut open = Vec::new();
    for _ in 0..sockets {
        open.push(rig.bound(any).await);
    }
    open
}

/// Opens so many sockets at once and closes them; where they were.
async fn cycle(rig: &mut Rig, any: SocketAddr, sockets: usize) -> Vec<SocketAddr> {
    let open = open(rig, any, sockets).await;
    for (socket, _) in &open {
        rig.drop_socket(*socket).await;
    }
    open.into_iter().map(|(_, local)| local).collect()
}

/// Repeats until a condition holds, with a bound.
async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + BOUND / 2;
    while !condition().await {
        assert!(Instant::now() < deadline, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[test]
fn no_more_sockets_are_cached_than_the_limits_say() {
    const QUARANTINED_MAX: u32 = 16;
    const WARM_MAX: u32 = 8;
    const KEPT_MAX: u64 = (QUARANTINED_MAX + WARM_MAX) as u64;
    alone(|| {
        block_on(async {
            let uring = ring(64, QUARANTINED_MAX, WARM_MAX, NEVER);
            let mut rig = Rig::on_ring(&uring).await;
            let mut opened = 0;
            until("a hundred are recycled", async || {
                for any in [ALL, LOOPBACK, ALL_6, LOOPBACK_6] {
                    opened += cycle(&mut rig, any, 64).await.len() as u64;
                    let stats = uring.stats();
                    assert!(stats.sockets_cached <= KEPT_MAX, "{stats:?}");
                }
                uring.stats().sockets_recycled >= 100
            })
            .await;
            eventually("the quarantine is over", || {
                uring.stats().sockets_cached <= u64::from(WARM_MAX)
            })
            .await;
            eventually("all are closed", || uring.stats().sockets_open == 0).await;
            let stats = uring.stats();
            assert_eq!(stats.sockets_created, opened);
            let no_room = stats.closed_instead.no_room;
            let gone = no_room + stats.sockets_cached + stats.sockets_recycled;
            assert_eq!(gone, opened, "each was cached, or evicted: {stats:?}");
            // The kernel has the cached ones, and no others.
            eventually("the others are gone", || u64::from(sockets()) == stats.sockets_cached)
                .await;
        });
    });
}

#[test]
fn sockets_that_stay_idle_are_closed_in_the_end() {
    alone(|| {
        block_on(async {
            let uring = ring(512, 512, 512, Duration::from_millis(20));
            let mut rig = Rig::on_ring(&uring).await;
            for any in [LOOPBACK, ALL_6] {
                cycle(&mut rig, any, 500).await;
                assert!(uring.stats().sockets_cached > 0);
                eventually("none is cached", || uring.stats().sockets_cached == 0).await;
                no_sockets().await;
            }
            assert!(uring.stats().closed_instead.idle > 0);
        });
    });
}

/// Kills: an idle timer that is checked only when a guest enters or reads the counters.
#[test]
fn sockets_that_stay_idle_are_closed_although_no_guest_enters() {
    alone(|| {
        block_on(async {
            let uring = ring(64, 64, 64, Duration::from_millis(20));
            let mut rig = Rig::on_ring(&uring).await;
            cycle(&mut rig, LOOPBACK, 64).await;
            eventually("they are made", || sockets() > 0).await;
            no_sockets().await;
            assert_eq!(uring.stats().sockets_cached, 0);
        });
    });
}

#[test]
fn a_drain_closes_what_is_cached_with_a_runtime_or_without() {
    alone(|| {
        let uring = ring(64, 64, 64, NEVER);
        for has_runtime in [true, false] {
            block_on(async {
                let mut rig = Rig::on_ring(&uring).await;
                for any in [LOOPBACK, ALL, LOOPBACK_6, ALL_6] {
                    cycle(&mut rig, any, 16).await;
                }
                let kept = uring.stats().sockets_cached;
                assert!(kept >= 16 && sockets() >= 16, "{kept}");
                if has_runtime {
                    uring.close_cached();
                    assert_eq!(uring.stats().sockets_cached, 0);
                    no_sockets().await;
                }
            });
        }
        uring.close_cached();
        assert_eq!(uring.stats().sockets_cached, 0);
        block_on(no_sockets());
    });
}

#[test]
fn a_dropped_ring_closes_what_it_has_cached() {
    alone(|| {
        for outlives_the_runtime in [true, false] {
            let uring = ring(64, 64, 64, NEVER);
            let kept = block_on(async {
                let mut rig = Rig::on_ring(&uring).await;
                cycle(&mut rig, LOOPBACK, 64).await;
                assert!(uring.stats().sockets_cached > 0 && sockets() > 0);
                drop(rig);
                outlives_the_runtime.then_some(uring)
            });
            drop(kept);
            block_on(no_sockets());
        }
    });
}

/// Kills: a socket that is cached without being unbound.
#[test]
fn cached_sockets_hold_no_port() {
    alone(|| {
        block_on(async {
            let uring = ring(512, 512, 512, NEVER);
            let mut rig = Rig::on_ring(&uring).await;
            for any in [LOOPBACK, ALL, LOOPBACK_6, ALL_6] {
                let before = uring.stats().sockets_recycled;
                // New ones first, then some that were cached before.
                until("half of them are recycled", async || {
                    let locals = cycle(&mut rig, any, 64).await;
                    assert!(uring.stats().sockets_cached >= 64);
                    for local in &locals {
                        let (socket, bound) = rig.bound(*local).await;
                        assert_eq!(bound, *local);
                        rig.drop_socket(socket).await;
                    }
                    eventually("all are closed", || uring.stats().sockets_open == 0).await;
                    for local in locals {
                        assert!(!native::is_taken(local), "{local}");
                    }
                    uring.stats().sockets_recycled - before >= 32
                })
                .await;
            }
        });
    });
}

/// Kills: a cached socket that is not evicted when a new one needs its slot.
#[test]
fn a_full_table_of_sockets_can_be_opened_whatever_is_cached() {
    const SOCKETS: usize = 8;
    alone(|| {
        for quarantined_max in [1, 4, 8] {
            block_on(async {
                let uring = ring(u32::try_from(SOCKETS).unwrap(), quarantined_max, 64, NEVER);
                let mut rig = Rig::on_ring(&uring).await;
                let mut evicted = 0;
                until("cached sockets were evicted, often", async || {
                    // Sockets of three kinds are cached, and one of the fourth is opened.
                    for any in [LOOPBACK, ALL_6, LOOPBACK_6, ALL] {
                        eventually("all are closed", || uring.stats().sockets_open == 0).await;
                        let no_room = uring.stats().closed_instead.no_room;
                        let all = open(&mut rig, any, SOCKETS).await;
                        evicted += uring.stats().closed_instead.no_room - no_room;
                        let more = rig.create(IpAddressFamily::Ipv6).await;
                        assert_eq!(more, Err(ErrorCode::NewSocketLimit));
                        for (socket, _) in all {
                            rig.drop_socket(socket).await;
                        }
                        let kept = uring.stats().sockets_cached;
                        assert!(kept <= SOCKETS as u64 + u64::from(quarantined_max), "{kept}");
                    }
                    evicted >= 20
                })
                .await;
            });
        }
    });
}

/// The kernel remembers that a socket was bound to one address (`SOCK_BINDADDR_LOCK`), and later
/// leaves it at the address that a connect has chosen.
#[test]
fn a_socket_that_was_bound_to_an_address_is_not_reused_for_all_addresses() {
    alone(|| {
        block_on(async {
            let uring = ring(16, 16, 16, NEVER);
            let mut rig = Rig::on_ring(&uring).await;
            let own: SocketAddr = (Ipv4Addr::new(127, 0, 0, 5), 0).into();
            let peer = (Ipv4Addr::new(127, 0, 0, 2), 9).into();
            let mut recycled = [0, 0];
            // Each kind is cached before the next of it is opened, again and again.
            until("both kinds are recycled", async || {
                for (any, recycled) in [own, ALL].into_iter().zip(&mut recycled) {
                    let before = uring.stats().sockets_recycled;
                    let (socket, local) = rig.bound(any).await;
                    *recycled += uring.stats().sockets_recycled - before;
                    assert_eq!(local.ip(), any.ip());
                    for remote in [Some(peer), None] {
                        let streams = rig.stream(socket, remote).await.unwrap();
                        rig.drop_streams(streams).await;
                    }
                    assert_eq!(rig.local(socket).await.unwrap().ip(), any.ip());
                    rig.drop_socket(socket).await;
                }
                recycled.iter().all(|recycled| *recycled >= 20)
            })
            .await;
        });
    });
}

#[test]
fn guests_of_several_threads_share_what_is_cached_while_it_is_drained() {
    const CYCLES: u32 = 2000;
    alone(|| {
        let uring = &ring(256, 64, 64, Duration::from_millis(5));
        let left = &AtomicU32::new(3);
        std::thread::scope(|scope| {
            for any in [LOOPBACK, ALL, LOOPBACK_6] {
                scope.spawn(move || {
                    block_on(async {
                        let mut rig = Rig::on_ring(uring).await;
                        for n in 0..CYCLES {
                            cycle(&mut rig, any, 1 + n as usize % 4).await;
                        }
                    });
                    left.fetch_sub(1, Ordering::Relaxed);
                });
            }
            scope.spawn(move || {
                let mut recycled = 0;
                while left.load(Ordering::Relaxed) > 0 {
                    let before = std::mem::replace(&mut recycled, uring.stats().sockets_recycled);
                    if recycled > before {
                        uring.close_cached();
                    }
                }
            });
        });
        uring.close_cached();
        let stats = uring.stats();
        assert!(stats.sockets_recycled > 0, "{stats:?}");
        assert_eq!((stats.sockets_open, stats.sockets_cached), (0, 0), "{stats:?}");
        block_on(no_sockets());
    });
}
