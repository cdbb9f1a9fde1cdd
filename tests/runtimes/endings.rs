//! Runtimes and threads that end while their guests, or others, go on.

use std::net::Ipv4Addr;
use std::sync::mpsc;

use wasi_uring::Uring;

use crate::common::{
    self, BOUND, Endpoint, IpAddressFamily, LOOPBACK, Rig, armed_in_a_former_runtime, block_on,
    eventually, native, payloads, uring, uring_with,
};
use crate::{echo, echo_in_a_store_of_its_own};

async fn goes_on(mut rig: Rig, endpoint: Endpoint) {
    let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
    for data in [&b"first"[..], b"second"] {
        let pollable = rig.subscribe_incoming(endpoint.incoming).await;
        let send = async {
            common::yield_to_others().await;
            native.send_to(data, endpoint.local).unwrap();
        };
        tokio::join!(biased; rig.block(pollable), send);
        rig.drop_pollable(pollable).await;
        assert_eq!(payloads(&rig.receive(endpoint.incoming, 16).await.unwrap()), [data]);
    }
    echo(&mut rig).await;
}

#[test]
fn a_socket_outlives_the_runtime_it_was_made_in() {
    let uring = uring();
    let (rig, endpoint) = armed_in_a_former_runtime(&uring);
    block_on(goes_on(rig, endpoint));
}

/// The kernel cancels what a thread has submitted when that thread exits.
#[test]
fn a_socket_outlives_the_thread_that_armed_its_receive() {
    let uring = uring();
    let (rig, endpoint) = std::thread::scope(|scope| {
        scope.spawn(|| armed_in_a_former_runtime(&uring)).join().unwrap()
    });
    block_on(goes_on(rig, endpoint));
}

#[test]
fn a_datagram_that_arrives_between_two_runtimes_is_received_in_the_second() {
    let uring = uring();
    for thread_ends in [false, true] {
        let (mut rig, endpoint) = if thread_ends {
            std::thread::scope(|scope| {
                scope.spawn(|| armed_in_a_former_runtime(&uring)).join().unwrap()
            })
        } else {
            armed_in_a_former_runtime(&uring)
        };
        let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
        native.send_to(b"meanwhile", endpoint.local).unwrap();
        block_on(async {
            let received = rig.receive_blocking(endpoint.incoming).await.unwrap();
            assert_eq!(payloads(&received), [b"meanwhile"]);
        });
    }
}

#[test]
fn a_store_dropped_outside_of_any_runtime_gives_its_slots_back() {
    let uring = uring();
    let (rig, endpoint) = armed_in_a_former_runtime(&uring);
    drop(rig);
    block_on(eventually("the slot is free", || uring.stats().sockets_open == 0));
    assert!(!native::is_taken(endpoint.local));
}

#[test]
fn a_guest_that_waits_goes_on_when_the_runtime_of_the_others_ends() {
    let uring = uring();
    let (ready, is_ready) = tokio::sync::oneshot::channel();
    let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            block_on(async {
                let mut rig = Rig::on_ring(&uring).await;
                let endpoint = rig.endpoint(LOOPBACK).await;
                assert_eq!(rig.receive(endpoint.incoming, 1).await, Ok(vec![]));
                ready.send(endpoint.local).unwrap();
                payloads(&rig.receive_blocking(endpoint.incoming).await.unwrap()) == [b"at last"]
            })
        });
        let local = is_ready.blocking_recv().unwrap();
        for _ in 0..10 {
            block_on(echo_in_a_store_of_its_own(uring.clone()));
        }
        native.send_to(b"at last", local).unwrap();
        assert!(waiting.join().unwrap());
    });
}

/// Drops a guest, outside of any runtime, whose receive ends after the close that cancels it: on
/// the thread that has armed it, which goes on. No guest uses the ring afterwards.
fn drop_with_a_receive_of_another_thread(uring: &Uring) {
    std::thread::scope(|scope| {
        let (give, take) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let thread = scope.spawn(move || {
            give.send(armed_in_a_former_runtime(uring)).unwrap();
            let _ = ended.recv_timeout(BOUND);
        });
        drop(take.recv().unwrap());
        drop(end);
        thread.join().unwrap();
    });
}

#[test]
fn slots_freed_while_no_runtime_runs_are_there_for_the_next_guest() {
    let uring = uring_with(1);
    for _ in 0..20 {
        drop_with_a_receive_of_another_thread(&uring);
        block_on(async {
            let mut rig = Rig::on_ring(&uring).await;
            let socket = rig.create(IpAddressFamily::Ipv4).await.unwrap();
            rig.bind(socket, LOOPBACK).await.unwrap();
            rig.drop_socket(socket).await;
            eventually("the slot is free", || uring.stats().sockets_open == 0).await;
        });
    }
}

#[test]
fn counters_are_right_although_no_guest_uses_the_ring() {
    for _ in 0..20 {
        let uring = uring();
        drop_with_a_receive_of_another_thread(&uring);
        block_on(eventually("the slot is free", || uring.stats().sockets_open == 0));
    }
}

#[test]
fn a_ring_dropped_with_its_last_guest_frees_the_ports() {
    let (rig, endpoint) = armed_in_a_former_runtime(&uring());
    let connected = block_on(async {
        let mut rig = Rig::on_ring(&uring()).await;
        let mut endpoint = rig.endpoint(LOOPBACK).await;
        let itself = endpoint.local;
        rig.reconnect(&mut endpoint, Some(itself)).await.unwrap();
        assert_eq!(rig.receive(endpoint.incoming, 1).await, Ok(vec![]));
        itself
    });
    drop(rig);
    block_on(async {
        for local in [endpoint.local, connected] {
            eventually("the port is free", || !native::is_taken(local)).await;
        }
    });
}
