//! One ring, many guests: none starves another, and nothing of a former owner reaches the next.

mod common;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::filter::with_filter;
use common::{
    Backend, Endpoint, ErrorCode, IpAddressFamily, LOOPBACK, LOOPBACK_6, Rig, Setup, block_on,
    eventually, native, own_ip, payloads, steps_beside, uring, uring_with, yield_to_others,
};
use wasi_uring::Uring;
use wasi_uring::limits::GUEST_QUEUE_BYTES_DEFAULT;

async fn all_free(uring: &Uring) {
    eventually("every slot is free", || uring.stats().sockets_open == 0).await;
}

/// Sends a datagram around and back; what arrives is what was sent.
async fn exchange(rig: &mut Rig, a: Endpoint, b: Endpoint, n: u32) {
    let data = n.to_be_bytes();
    for (from, to) in [(a, b), (b, a)] {
        rig.send_one(from.outgoing, &data, Some(to.local)).await.unwrap();
        let received = rig.receive_exactly(to.incoming, 1).await;
        assert_eq!(payloads(&received), [data]);
    }
}

// ---- what a host may forbid ----------------------------------------------------------------------

/// As SECURITY.md says. Kills: a ring that makes another when it is at work.
#[test]
fn a_host_may_forbid_io_uring_setup_when_its_ring_is_built() {
    let uring = uring();
    with_filter(libc::SYS_io_uring_setup, libc::EPERM, || {
        assert!(Uring::builder().build().is_err());
        block_on(async {
            let mut rig = Rig::on_ring(&uring).await;
            for n in 0..100 {
                let [a, b] = [rig.endpoint(LOOPBACK).await, rig.endpoint(LOOPBACK).await];
                exchange(&mut rig, a, b, n).await;
                rig.close(a).await;
                rig.close(b).await;
            }
        });
        drop(uring);
    });
}

// ---- no guest starves ----------------------------------------------------------------------------

#[test]
fn a_guest_that_takes_every_slot_does_not_disturb_another() {
    block_on(async {
        let uring = uring_with(64);
        let (mut greedy, mut calm) = (Rig::on_ring(&uring).await, Rig::on_ring(&uring).await);
        let a = calm.endpoint(LOOPBACK).await;
        let b = calm.endpoint(LOOPBACK).await;
        let mut sockets = Vec::new();
        loop {
            match greedy.create(IpAddressFamily::Ipv4).await {
                Ok(socket) => {
                    greedy.bind(socket, LOOPBACK).await.unwrap();
                    sockets.push(socket);
                }
                Err(error) => break assert_eq!(error, ErrorCode::NewSocketLimit),
            }
            exchange(&mut calm, a, b, 1).await;
        }
        assert_eq!(sockets.len(), 62);
        for n in 0..10 {
            exchange(&mut calm, a, b, n).await;
        }
        drop(greedy);
        eventually("its slots are free", || uring.stats().sockets_open == 2).await;
        calm.endpoint(LOOPBACK_6).await;
    });
}

/// A sender that never pauses, on a thread of its own, until dropped.
struct Flood {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Flood {
    fn start(targets: Vec<SocketAddr>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
            while !stopped.load(Ordering::Relaxed) {
                for target in &targets {
                    // Refused, or the send buffer full: the flood goes on.
                    let _ = native.send_to(&[0xff; 1000], target);
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

#[test]
fn a_flood_that_no_guest_reads_costs_another_guest_no_datagram() {
    block_on(async {
        let uring = uring();
        let (mut flooded, mut calm) = (Rig::on_ring(&uring).await, Rig::on_ring(&uring).await);
        let target = flooded.endpoint(LOOPBACK).await;
        assert_eq!(flooded.receive(target.incoming, 1).await, Ok(vec![]), "armed");
        let a = calm.endpoint(LOOPBACK).await;
        let b = calm.endpoint(LOOPBACK).await;
        let flood = Flood::start(vec![target.local]);
        eventually("the queue is full", || uring.stats().pauses > 0).await;
        for n in 0..500 {
            exchange(&mut calm, a, b, n).await;
        }
        drop(flood);
        assert_eq!(uring.stats().dropped_malformed, 0);
        assert!(flooded.receive(target.incoming, 16).await.unwrap().len() == 16);
    });
}

#[test]
fn a_flood_that_is_read_costs_another_guest_no_datagram() {
    block_on(async {
        let uring = uring();
        let (mut flooded, mut calm) = (Rig::on_ring(&uring).await, Rig::on_ring(&uring).await);
        let target = flooded.endpoint(LOOPBACK).await;
        let a = calm.endpoint(LOOPBACK).await;
        let b = calm.endpoint(LOOPBACK).await;
        let _flood = Flood::start(vec![target.local]);
        let read = async {
            loop {
                flooded.receive_blocking(target.incoming).await.unwrap();
                tokio::task::yield_now().await;
            }
        };
        let paced = async {
            for n in 0..500 {
                exchange(&mut calm, a, b, n).await;
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = read => {}
            () = paced => {}
        }
    });
}

#[test]
fn a_guest_that_always_finds_datagrams_yields_to_others() {
    block_on(async {
        let mut rig = Rig::on_ring(&uring()).await;
        let target = rig.endpoint(LOOPBACK).await;
        let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
        let reading = async {
            for burst in 0..8_u8 {
                for n in 0..32 {
                    native.send_to(&[burst, n], target.local).unwrap();
                }
                rig.receive_exactly(target.incoming, 32).await;
            }
        };
        let steps = steps_beside(reading).await;
        assert!(steps + 1 >= 256 / 32, "{steps} steps while 256 datagrams were read");
    });
}

/// A guest with a socket at which 200 datagrams wait that its policy refuses.
async fn flooded_with_refused(uring: &Uring) -> (Rig, Endpoint) {
    let (refused, refused_addr) = native::socket(Ipv4Addr::LOCALHOST);
    let setup =
        Setup { uring: Some(uring.clone()), ..Setup::allow(move |addr, _| addr != refused_addr) };
    let mut rig = Rig::new(Backend::Uring, setup).await;
    let target = rig.endpoint(LOOPBACK).await;
    for _ in 0..200 {
        refused.send_to(b"stranger", target.local).unwrap();
    }
    (rig, target)
}

/// Kills: a receive that loops over datagrams of refused senders without spending the budget.
#[test]
fn a_flood_that_the_policy_refuses_yields_to_others() {
    block_on(async {
        let uring = uring();
        let (mut rig, target) = flooded_with_refused(&uring).await;
        let asking = async {
            while uring.stats().dropped_by_policy < 200 {
                assert_eq!(rig.receive(target.incoming, 1).await, Ok(vec![]));
            }
        };
        let steps = steps_beside(asking).await;
        assert!(steps + 1 >= 200 / 32, "{steps} steps while 200 datagrams were refused");
    });
}

/// Kills: datagrams that cost a waiting guest nothing because it may not see them.
#[test]
fn a_flood_that_the_policy_refuses_yields_to_others_while_a_guest_waits() {
    block_on(async {
        let uring = uring();
        let (mut rig, target) = flooded_with_refused(&uring).await;
        let readable = rig.subscribe_incoming(target.incoming).await;
        let (allowed, _) = native::socket(Ipv4Addr::LOCALHOST);
        allowed.send_to(b"friend", target.local).unwrap();
        let steps = steps_beside(rig.block(readable)).await;
        assert_eq!(uring.stats().dropped_by_policy, 200);
        assert!(steps + 1 >= 200 / 64, "{steps} steps while 200 datagrams were refused");
        assert_eq!(payloads(&rig.receive_exactly(target.incoming, 1).await), [b"friend"]);
    });
}

/// Kills: bounds of each queue by itself, which many sockets multiply; receives that end when the flusher
/// comes by; a socket that hears nothing because the guest's others are full.
#[test]
fn what_a_flooded_guest_has_the_host_hold_is_bounded_whatever_the_number_of_its_sockets() {
    const SOCKETS: usize = 200;
    const BYTES: usize = 60_000;
    block_on(async {
        let uring = uring();
        let mut rig = Rig::on_ring(&uring).await;
        let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
        let mut endpoints = Vec::new();
        for _ in 0..SOCKETS {
            let endpoint = rig.endpoint(LOOPBACK).await;
            let readable = rig.subscribe_incoming(endpoint.incoming).await;
            assert!(!rig.is_ready(readable).await);
            rig.drop_pollable(readable).await;
            endpoints.push(endpoint);
        }
        for n in 0..8 {
            for endpoint in &endpoints {
                native.send_to(&vec![n; BYTES], endpoint.local).unwrap();
            }
            yield_to_others().await;
        }
        let held = usize::try_from(uring.stats().bytes_received).unwrap();
        assert!(held > SOCKETS * BYTES, "{held} bytes: more than each socket's first");
        assert!(held <= GUEST_QUEUE_BYTES_DEFAULT + SOCKETS * BYTES, "{held} bytes");

        for endpoint in endpoints {
            let received = rig.receive_exactly(endpoint.incoming, 1).await;
            assert_eq!(received[0].data, vec![0; BYTES]);
            rig.close(endpoint).await;
        }
    });
}

#[test]
fn a_guest_that_polls_an_empty_queue_without_end_yields_to_others() {
    block_on(async {
        let mut rig = Rig::on_ring(&uring()).await;
        let target = rig.endpoint(LOOPBACK).await;
        let asking = async {
            for _ in 0..2000 {
                assert_eq!(rig.receive(target.incoming, 1).await, Ok(vec![]));
            }
        };
        let steps = steps_beside(asking).await;
        assert!(steps >= 2000 / 200, "{steps} steps while a guest received nothing 2000 times");
    });
}

/// A datagram for each of more sockets than the ring has buffers, before the ring reaps any.
#[test]
fn a_burst_beyond_the_rings_buffers_reaches_every_socket() {
    block_on(async {
        let uring = uring();
        let mut rig = Rig::on_ring(&uring).await;
        let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
        let mut endpoints = Vec::new();
        for _ in 0..500 {
            let endpoint = rig.endpoint(LOOPBACK).await;
            assert_eq!(rig.receive(endpoint.incoming, 1).await, Ok(vec![]));
            endpoints.push(endpoint);
        }
        for burst in 0..3_u8 {
            for n in 0..4 {
                for endpoint in &endpoints {
                    native.send_to(&[burst, n], endpoint.local).unwrap();
                }
            }
            for endpoint in &endpoints {
                let received = rig.receive_exactly(endpoint.incoming, 4).await;
                assert_eq!(payloads(&received), [[burst, 0], [burst, 1], [burst, 2], [burst, 3]]);
            }
        }
    });
}

// ---- nothing leaks ------------------------------------------------------------------------------

#[test]
fn datagrams_of_a_former_owner_do_not_reach_the_next() {
    block_on(async {
        let uring = uring_with(1);
        let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
        let mut local = SocketAddr::from((own_ip(), 0));
        // Queued in the kernel, in the ring's completions, or in the socket's own queue.
        for state in ["unarmed", "armed", "taken"].repeat(10) {
            let mut former = Rig::on_ring(&uring).await;
            let endpoint = former.endpoint(local).await;
            local = endpoint.local;
            if state != "unarmed" {
                assert_eq!(former.receive(endpoint.incoming, 1).await, Ok(vec![]));
            }
            for _ in 0..100 {
                native.send_to(b"stale", local).unwrap();
            }
            if state == "taken" {
                assert_eq!(former.receive(endpoint.incoming, 3).await.unwrap().len(), 3);
            }
            drop(former);
            all_free(&uring).await;
            let mut next = Rig::on_ring(&uring).await;
            let endpoint = next.endpoint(local).await;
            let pollable = next.subscribe_incoming(endpoint.incoming).await;
            assert!(!next.is_ready(pollable).await, "{state}");
            assert_eq!(next.receive(endpoint.incoming, 16).await, Ok(vec![]), "{state}");
            native.send_to(b"fresh", local).unwrap();
            let received = next.receive_blocking(endpoint.incoming).await.unwrap();
            assert_eq!(payloads(&received), [b"fresh"], "{state}");
            drop(next);
            all_free(&uring).await;
        }
    });
}

#[test]
fn options_and_peer_of_a_former_owner_do_not_reach_the_next() {
    block_on(async {
        let uring = uring_with(1);
        let (witness, to) = native::socket(Ipv4Addr::LOCALHOST);
        let mut next = Rig::on_ring(&uring).await;
        let (socket, _) = next.bound(LOOPBACK).await;
        let hops = next.hop_limit(socket).await.unwrap();
        let buffers = (next.receive_buffer(socket).await, next.send_buffer(socket).await);
        next.drop_socket(socket).await;
        all_free(&uring).await;
        for after_bind in [false, true] {
            let mut former = Rig::on_ring(&uring).await;
            let socket = former.create(IpAddressFamily::Ipv4).await.unwrap();
            if after_bind {
                former.bind(socket, LOOPBACK).await.unwrap();
            }
            former.set_hop_limit(socket, 3).await.unwrap();
            former.set_receive_buffer(socket, 1).await.unwrap();
            former.set_send_buffer(socket, 1).await.unwrap();
            if !after_bind {
                former.bind(socket, LOOPBACK).await.unwrap();
            }
            former.stream(socket, Some(to)).await.unwrap();
            drop(former);
            all_free(&uring).await;

            let endpoint = next.endpoint((own_ip(), 0)).await;
            assert_eq!(next.remote(endpoint.socket).await, Err(ErrorCode::InvalidState));
            assert_eq!(next.hop_limit(endpoint.socket).await, Ok(hops));
            let inherited = (
                next.receive_buffer(endpoint.socket).await,
                next.send_buffer(endpoint.socket).await,
            );
            assert_eq!(inherited, buffers);
            // The kernel's view: the time to live on the wire, and buffers larger than the former owner's.
            next.send_one(endpoint.outgoing, b"x", Some(to)).await.unwrap();
            assert_eq!(native::receive_with_ttl(&witness).1, i32::from(hops));
            for _ in 0..50 {
                witness.send_to(&[7; 100], endpoint.local).unwrap();
            }
            assert_eq!(next.drain(endpoint, &witness).await.len(), 50);
            let sent = next.send_one(endpoint.outgoing, &vec![0; 60_000], Some(to)).await;
            assert_eq!(sent, Ok(1), "no small send buffer");
            witness.recv(&mut vec![0; 65_536]).unwrap();
            next.close(endpoint).await;
            all_free(&uring).await;
        }
    });
}

#[test]
fn a_pending_error_of_a_former_owner_does_not_reach_the_next() {
    block_on(async {
        let uring = uring_with(1);
        let (_native, to) = native::socket(Ipv4Addr::LOCALHOST);
        for armed in [false, true].repeat(10) {
            let mut former = Rig::on_ring(&uring).await;
            let closed = native::closed_port(own_ip());
            let (socket, _) = former.bound(LOOPBACK).await;
            let (incoming, outgoing) = former.stream(socket, Some(closed)).await.unwrap();
            if armed {
                assert_eq!(former.receive(incoming, 1).await, Ok(vec![]));
            }
            former.send_one(outgoing, b"refused", None).await.unwrap();
            drop(former);
            all_free(&uring).await;
            let mut next = Rig::on_ring(&uring).await;
            let endpoint = next.endpoint(LOOPBACK).await;
            assert_eq!(next.receive(endpoint.incoming, 16).await, Ok(vec![]));
            assert_eq!(next.send_one(endpoint.outgoing, b"x", Some(to)).await, Ok(1));
            drop(next);
            all_free(&uring).await;
        }
    });
}

// ---- guests that are dropped---------------------------------------------------------------------

/// Polls a call until it waits, and drops it.
async fn drop_waiting(call: impl Future<Output: std::fmt::Debug>) {
    tokio::select! {
        biased;
        answer = call => panic!("{answer:?} without waiting"),
        () = yield_to_others() => {}
    }
}

/// As `drop_waiting`, at the first moment that it waits, if it waits at all.
async fn drop_at_first_wait(call: impl Future) {
    tokio::select! {
        biased;
        _ = call => {}
        () = std::future::ready(()) => {}
    }
}

#[test]
fn a_guest_dropped_while_it_waits_leaves_the_ring_healthy() {
    block_on(async {
        let uring = uring();
        let mut other = Rig::on_ring(&uring).await;
        let a = other.endpoint(LOOPBACK).await;
        let b = other.endpoint(LOOPBACK).await;
        for n in 0..20 {
            let mut rig = Rig::on_ring(&uring).await;
            let endpoint = rig.endpoint(LOOPBACK).await;
            let pollable = rig.subscribe_incoming(endpoint.incoming).await;
            drop_waiting(rig.poll(&[pollable])).await;
            drop(rig);
            exchange(&mut other, a, b, n).await;
            eventually("its slot is free", || uring.stats().sockets_open == 2).await;
        }
    });
}

#[test]
fn a_guest_dropped_anywhere_in_a_sockets_life_leaves_the_ring_healthy() {
    block_on(async {
        let uring = uring();
        let mut other = Rig::on_ring(&uring).await;
        let a = other.endpoint(LOOPBACK).await;
        let b = other.endpoint(LOOPBACK).await;
        let (_native, peer) = native::socket(Ipv4Addr::LOCALHOST);
        for step in ["finish", "local", "option", "connect", "receive", "send"].repeat(5) {
            // With another guest active, each call yields before it enters.
            let mut rig = Rig::on_ring(&uring).await;
            exchange(&mut other, a, b, 0).await;
            if step == "finish" {
                let socket = rig.create(IpAddressFamily::Ipv4).await.unwrap();
                rig.start_bind(socket, LOOPBACK).await.unwrap();
                drop_at_first_wait(rig.finish_bind(socket)).await;
            } else {
                let (socket, _) = rig.bound((Ipv4Addr::UNSPECIFIED, 0)).await;
                let (incoming, outgoing) = rig.stream(socket, None).await.unwrap();
                exchange(&mut other, a, b, 1).await;
                match step {
                    "local" => {
                        rig.drop_streams((incoming, outgoing)).await;
                        rig.stream(socket, Some(peer)).await.unwrap();
                        drop_at_first_wait(rig.local(socket)).await;
                    }
                    "option" => drop_at_first_wait(rig.set_hop_limit(socket, 9)).await,
                    "connect" => {
                        rig.drop_streams((incoming, outgoing)).await;
                        drop_at_first_wait(rig.stream(socket, Some(peer))).await;
                    }
                    "receive" => drop_at_first_wait(rig.receive(incoming, 1)).await,
                    _ => drop_at_first_wait(rig.send_one(outgoing, b"x", Some(peer))).await,
                }
            }
            drop(rig);
            exchange(&mut other, a, b, 2).await;
            eventually("its slot is free", || uring.stats().sockets_open == 2).await;
        }
    });
}

#[test]
fn a_guest_that_trapped_gives_everything_back() {
    block_on(async {
        let uring = uring();
        let mut rig = Rig::on_ring(&uring).await;
        let endpoint = rig.endpoint((own_ip(), 0)).await;
        assert_eq!(rig.receive(endpoint.incoming, 1).await, Ok(vec![]));
        rig.guest.call_drop_socket(&mut rig.store, endpoint.socket).await.unwrap_err();
        drop(rig);
        all_free(&uring).await;
        assert!(!native::is_taken(endpoint.local));
    });
}

/// More entries at once than the ring's SQ or CQ has.
#[test]
fn a_thousand_sockets_with_queued_datagrams_are_dropped_together() {
    block_on(async {
        let uring = uring();
        let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
        for _ in 0..3 {
            let mut rig = Rig::on_ring(&uring).await;
            for _ in 0..1000 {
                let endpoint = rig.endpoint(LOOPBACK).await;
                assert_eq!(rig.receive(endpoint.incoming, 1).await, Ok(vec![]));
                native.send_to(b"unread", endpoint.local).unwrap();
            }
            drop(rig);
            all_free(&uring).await;
        }
    });
}

#[test]
fn dropped_calls_leave_no_descriptors_behind() {
    // Other tests of this process have a few meanwhile.
    const OTHERS: usize = 100;
    let sockets = || {
        let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
        let names = descriptors.flatten().flat_map(|entry| std::fs::read_link(entry.path()));
        names.filter(|name| name.to_string_lossy().starts_with("socket:")).count()
    };
    let before = sockets();
    block_on(async {
        let uring = uring();
        let mut other = Rig::on_ring(&uring).await;
        let a = other.endpoint(LOOPBACK).await;
        for _ in 0..3 * OTHERS {
            let mut rig = Rig::on_ring(&uring).await;
            let socket = rig.create(IpAddressFamily::Ipv4).await.unwrap();
            rig.bind(socket, LOOPBACK).await.unwrap();
            // With another guest active, the call yields before it enters.
            other.send_one(a.outgoing, b"x", Some(a.local)).await.unwrap();
            drop_at_first_wait(rig.local(socket)).await;
        }
        eventually("its slots are free", || uring.stats().sockets_open == 1).await;
        eventually("no descriptor stays", || sockets() < before + OTHERS).await;
    });
}
