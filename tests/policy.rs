//! What a guest may do: address checks, in the same order as wasmtime-wasi makes them, and quotas.

mod common;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use common::seen::{Seen, recording, take_named};
use common::{
    Backend, ErrorCode, IpAddressFamily, LOOPBACK, Rig, Setup, alike, block_on, datagram,
    eventually, native, on_both, own_ip, payloads, uring_with,
};
use wasi_uring::{SocketAddrUse, Uring};

// ---- address checks -----------------------------------------------------------------------------

#[test]
fn without_a_policy_there_is_no_udp() {
    on_both(Setup { allow: None, ..Setup::default() }, async |rig| {
        for family in [IpAddressFamily::Ipv4, IpAddressFamily::Ipv6] {
            assert_eq!(rig.create(family).await, Err(ErrorCode::AccessDenied));
        }
        assert_eq!(rig.stats().sockets_created, 0);
    });
}

#[test]
fn a_refused_bind_is_denied_and_the_socket_can_be_bound_elsewhere() {
    let refused = own_ip();
    let setup = Setup::allow(move |addr, use_| {
        !(matches!(use_, SocketAddrUse::UdpBind) && addr.ip() == refused)
    });
    on_both(setup, async |rig| {
        let socket = rig.create(IpAddressFamily::Ipv4).await.unwrap();
        assert_eq!(rig.start_bind(socket, (refused, 0)).await, Err(ErrorCode::AccessDenied));
        assert_eq!(rig.finish_bind(socket).await, Err(ErrorCode::NotInProgress));
        rig.bind(socket, LOOPBACK).await.unwrap();
    });
}

#[test]
fn a_connection_needs_leave_to_send_and_to_receive() {
    let (mute, deaf) = (own_ip(), own_ip());
    let setup = Setup::allow(move |addr, use_| {
        let to_mute = matches!(use_, SocketAddrUse::UdpSend) && addr.ip() == mute;
        let from_deaf = matches!(use_, SocketAddrUse::UdpReceive) && addr.ip() == deaf;
        !to_mute && !from_deaf
    });
    on_both(setup, async |rig| {
        let (socket, _) = rig.bound(LOOPBACK).await;
        for ip in [mute, deaf] {
            let answer = rig.stream(socket, Some((ip, 9).into())).await;
            assert_eq!(answer, Err(ErrorCode::AccessDenied));
            assert_eq!(rig.remote(socket).await, Err(ErrorCode::InvalidState));
        }
        let mut endpoint = rig.endpoint(LOOPBACK).await;
        let fine = SocketAddr::from((own_ip(), 9));
        rig.reconnect(&mut endpoint, Some(fine)).await.unwrap();
        assert_eq!(rig.remote(endpoint.socket).await, Ok(fine));
    });
}

#[test]
fn a_refused_connection_leaves_the_old_one() {
    let refused = own_ip();
    on_both(Setup::allow(move |addr, _| addr.ip() != refused), async |rig| {
        let (native, peer) = native::socket(own_ip());
        let (socket, _) = rig.bound(LOOPBACK).await;
        let streams = rig.stream(socket, Some(peer)).await.unwrap();
        rig.drop_streams(streams).await;
        let answer = rig.stream(socket, Some((refused, 9).into())).await;
        assert_eq!(answer, Err(ErrorCode::AccessDenied));
        assert_eq!(rig.remote(socket).await, Ok(peer));
        let (_, outgoing) = rig.stream(socket, Some(peer)).await.unwrap();
        rig.send_one(outgoing, b"still here", None).await.unwrap();
        let mut buffer = [0; 16];
        assert_eq!(native.recv(&mut buffer).unwrap(), 10);
    });
}

#[test]
fn a_refused_destination_is_denied_and_ends_its_batch() {
    let refused = own_ip();
    let setup = Setup::allow(move |addr, use_| {
        !(matches!(use_, SocketAddrUse::UdpSend) && addr.ip() == refused)
    });
    on_both(setup, async |rig| {
        let (witness, to_refused) = native::socket(refused);
        let endpoint = rig.endpoint(LOOPBACK).await;
        let batch = [
            datagram(b"first", Some(endpoint.local)),
            datagram(b"refused", Some(to_refused)),
            datagram(b"last", Some(endpoint.local)),
        ];
        let denied = Err(ErrorCode::AccessDenied);
        assert_eq!(rig.send_one(endpoint.outgoing, b"x", Some(to_refused)).await, denied);
        assert_eq!(rig.send_all(endpoint.outgoing, &batch).await, Ok(1));
        assert_eq!(rig.send_all(endpoint.outgoing, &batch[1..]).await, denied);
        assert_eq!(rig.send_all(endpoint.outgoing, &batch[2..]).await, Ok(1));
        let received = rig.receive_exactly(endpoint.incoming, 2).await;
        assert_eq!(payloads(&received), [&b"first"[..], b"last"]);
        witness.set_nonblocking(true).unwrap();
        assert!(witness.recv(&mut [0; 16]).is_err(), "nothing has left for it");
    });
}

/// A connected socket asks anew with every datagram: leave may be withdrawn.
#[test]
fn leave_to_send_to_the_peer_can_be_withdrawn() {
    let withdrawn = Arc::new(Mutex::new(false));
    let seen = Arc::clone(&withdrawn);
    let setup = Setup::allow(move |_, use_| {
        !(matches!(use_, SocketAddrUse::UdpSend) && *seen.lock().unwrap())
    });
    on_both(setup, async |rig| {
        *withdrawn.lock().unwrap() = false;
        let (_native, peer) = native::socket(own_ip());
        let (socket, _) = rig.bound(LOOPBACK).await;
        let (_, outgoing) = rig.stream(socket, Some(peer)).await.unwrap();
        assert_eq!(rig.send_one(outgoing, b"x", None).await, Ok(1));
        *withdrawn.lock().unwrap() = true;
        for to in [None, Some(peer)] {
            assert_eq!(rig.send_one(outgoing, b"x", to).await, Err(ErrorCode::AccessDenied));
        }
    });
}

#[test]
fn datagrams_of_refused_senders_are_dropped_and_others_pass() {
    let refused = own_ip();
    let setup = Setup::allow(move |addr, use_| {
        !(matches!(use_, SocketAddrUse::UdpReceive) && addr.ip() == refused)
    });
    on_both(setup, async |rig| {
        let (stranger, _) = native::socket(refused);
        let (friend, _) = native::socket(own_ip());
        let endpoint = rig.endpoint(LOOPBACK).await;
        let pollable = rig.subscribe_incoming(endpoint.incoming).await;
        for _ in 0..2 {
            stranger.send_to(b"no", endpoint.local).unwrap();
            assert!(!rig.is_ready(pollable).await, "nothing that the guest could have");
            assert_eq!(rig.receive(endpoint.incoming, 16).await, Ok(vec![]));
            for message in [&b"yes"[..], b"indeed"] {
                friend.send_to(message, endpoint.local).unwrap();
                stranger.send_to(b"no", endpoint.local).unwrap();
            }
            let received = rig.receive_exactly(endpoint.incoming, 2).await;
            assert_eq!(payloads(&received), [&b"yes"[..], b"indeed"]);
        }
        if rig.backend == Backend::Uring {
            assert_eq!(rig.receive(endpoint.incoming, 16).await, Ok(vec![]));
            assert_eq!(rig.stats().dropped_by_policy, 6);
        }
    });
}

// ---- the events ---------------------------------------------------------------------------------

#[test]
fn a_policy_sees_the_same_events_in_the_same_order() {
    let seen = Seen::default();
    let events = alike(recording(&seen), async |rig| {
        seen.lock().unwrap().clear();
        let (socket, _) = rig.bound(LOOPBACK).await;
        let (native, peer) = native::socket(LOOPBACK.ip());
        let (_native_2, peer_2) = native::socket(LOOPBACK.ip());
        let local = rig.local(socket).await.unwrap();
        // What is invalid is not asked about; what the kernel will refuse is.
        rig.start_bind(socket, LOOPBACK).await.unwrap_err();
        let other = rig.create(IpAddressFamily::Ipv4).await.unwrap();
        rig.start_bind(other, common::LOOPBACK_6).await.unwrap_err();
        rig.bind(other, local).await.unwrap_err();
        let (incoming, outgoing) = rig.stream(socket, None).await.unwrap();
        let batch =
            [datagram(b"1", Some(peer)), datagram(b"2", Some(peer_2)), datagram(b"3", None)];
        rig.send_all(outgoing, &batch).await.unwrap();
        rig.send_one(outgoing, &vec![0; 65_536], Some(peer)).await.unwrap_err();
        native.send_to(b"in", local).unwrap();
        rig.receive_exactly(incoming, 1).await;
        rig.drop_streams((incoming, outgoing)).await;
        rig.stream(socket, Some((LOOPBACK.ip(), 0).into())).await.unwrap_err();
        let (incoming, outgoing) = rig.stream(socket, Some(peer)).await.unwrap();
        rig.send_all(outgoing, &[datagram(b"4", None), datagram(b"5", Some(peer))]).await.unwrap();
        rig.send_one(outgoing, b"6", Some(peer_2)).await.unwrap_err();
        for data in [b"in 1", b"in 2"] {
            native.send_to(data, local).unwrap();
        }
        rig.receive_exactly(incoming, 2).await;
        rig.drop_streams((incoming, outgoing)).await;
        let streams = rig.stream(socket, None).await.unwrap();
        rig.drop_streams(streams).await;
        take_named(&seen, &[("itself", local), ("peer", peer), ("peer 2", peer_2)])
    });
    assert_eq!(
        events,
        [
            "UdpBind 127.0.0.1:0",
            "UdpBind itself",
            "UdpSend peer",
            "UdpSend peer 2",
            "UdpReceive peer",
            "UdpSend peer",
            "UdpReceive peer",
            "UdpSend peer",
            "UdpSend peer",
            "UdpReceive peer",
            "UdpReceive peer",
        ]
    );
}

#[test]
fn a_policy_is_asked_about_strangers_of_a_connected_socket_alike() {
    let seen = Seen::default();
    alike(recording(&seen), async |rig| {
        seen.lock().unwrap().clear();
        let (socket, local) = rig.bound(LOOPBACK).await;
        let (stranger, stranger_addr) = native::socket(LOOPBACK.ip());
        let (native, peer) = native::socket(LOOPBACK.ip());
        stranger.send_to(b"queued before the connect", local).unwrap();
        let (incoming, _) = rig.stream(socket, Some(peer)).await.unwrap();
        native.send_to(b"in", local).unwrap();
        rig.receive_exactly(incoming, 1).await;
        take_named(&seen, &[("peer", peer), ("stranger", stranger_addr)])
    });
}

/// It runs inside the guest's call, but must not run inside the ring's locks.
#[test]
fn an_address_check_may_read_the_rings_counters() {
    let uring = uring_with(16);
    let asked = uring.clone();
    let asking = Setup {
        uring: Some(uring.clone()),
        ..Setup::allow(move |_, _| asked.stats().sockets_open > 0)
    };
    let (done, is_done) = std::sync::mpsc::channel();
    // On a thread that the test can leave behind, should it hang.
    std::thread::spawn(move || {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        runtime.unwrap().block_on(async {
            let mut guest = Rig::new(Backend::Uring, asking).await;
            let endpoint = guest.endpoint(LOOPBACK).await;
            let flooding = tokio::spawn(async move {
                let mut rig = Rig::on_ring(&uring).await;
                let own = rig.endpoint(LOOPBACK).await;
                let batch = vec![datagram(b"x", Some(endpoint.local)); 16];
                for _ in 0..2000 {
                    rig.send_all(own.outgoing, &batch).await.unwrap();
                    tokio::task::yield_now().await;
                }
            });
            let reading = tokio::spawn(async move {
                loop {
                    guest.receive_blocking(endpoint.incoming).await.unwrap();
                    tokio::task::yield_now().await;
                }
            });
            flooding.await.unwrap();
            reading.abort();
        });
        done.send(()).unwrap();
    });
    is_done.recv_timeout(common::BOUND).expect("hangs");
}

// ---- quotas -------------------------------------------------------------------------------------

#[test]
fn a_guest_beyond_its_quota_is_refused_until_it_drops_a_socket() {
    let uring = uring_with(16);
    let setup = Setup { sockets_max: 2, ..Setup::of(&uring) };
    common::on(Backend::Uring, setup, async |rig| {
        let (bound, _) = rig.bound(LOOPBACK).await;
        let unbound = rig.create(IpAddressFamily::Ipv6).await.unwrap();
        for dropped in [bound, unbound] {
            let refused = rig.create(IpAddressFamily::Ipv4).await;
            assert_eq!(refused, Err(ErrorCode::NewSocketLimit));
            rig.drop_socket(dropped).await;
            let socket = rig.create(IpAddressFamily::Ipv4).await.unwrap();
            rig.bind(socket, LOOPBACK).await.unwrap();
        }
    });
}

/// The guest need not suspend in between: the ring can carry out the close that it waits for.
#[test]
fn a_place_in_a_full_table_that_was_given_back_can_be_taken_at_once() {
    common::on(Backend::Uring, Setup::of(&uring_with(2)), async |rig| {
        rig.bound(LOOPBACK).await;
        for _ in 0..20 {
            let (socket, _) = rig.bound(LOOPBACK).await;
            rig.drop_socket(socket).await;
        }
    });
}

#[test]
fn a_full_table_refuses_every_guest_until_a_place_is_free() {
    block_on(async {
        let uring = uring_with(4);
        let (mut a, mut b) = (Rig::on_ring(&uring).await, Rig::on_ring(&uring).await);
        for rig in [&mut a, &mut b] {
            rig.endpoint(LOOPBACK).await;
        }
        let (bound, _) = a.bound(LOOPBACK).await;
        let unbound = b.create(IpAddressFamily::Ipv4).await.unwrap();
        for rig in [&mut a, &mut b] {
            let refused = rig.create(IpAddressFamily::Ipv4).await;
            assert_eq!(refused, Err(ErrorCode::NewSocketLimit));
        }
        b.drop_socket(unbound).await;
        let socket = a.create(IpAddressFamily::Ipv6).await.expect("free at once: never bound");
        a.bind(socket, common::LOOPBACK_6).await.unwrap();
        a.drop_socket(bound).await;
        eventually("the slot is free", || uring.stats().sockets_open == 3).await;
        let socket = b.create(IpAddressFamily::Ipv4).await.unwrap();
        b.bind(socket, LOOPBACK).await.unwrap();
        assert_eq!(a.create(IpAddressFamily::Ipv4).await, Err(ErrorCode::NewSocketLimit));
    });
}

// ---- refused senders and full queues --------------------------------------------------------------

/// The queue fills with what the guest may not see, so nothing ever wakes it to drain the queue.
#[test]
fn a_burst_of_refused_senders_does_not_end_the_receive() {
    let uring = Uring::builder().sockets(4).queue_per_socket(4, 1 << 20).build().unwrap();
    let (friend, friend_addr) = native::socket(LOOPBACK.ip());
    let setup = Setup {
        uring: Some(uring.clone()),
        ..Setup::allow(move |addr, use_| {
            !matches!(use_, SocketAddrUse::UdpReceive) || addr == friend_addr
        })
    };
    common::on(Backend::Uring, setup, async |rig| {
        let endpoint = rig.endpoint(LOOPBACK).await;
        let (stranger, _) = native::socket(LOOPBACK.ip());
        assert!(rig.receive(endpoint.incoming, 16).await.unwrap().is_empty(), "armed");
        // While the guest waits, so that the ring has paused before the guest looks; and the friend
        // after all the others were dropped.
        let local = endpoint.local;
        let (stats, friend) = (uring.clone(), friend.try_clone().unwrap());
        let later = tokio::spawn(async move {
            for n in 0..20_u8 {
                stranger.send_to(&[n], local).unwrap();
            }
            let all_dropped = || stats.stats().dropped_by_policy == 20;
            common::eventually("the strangers are dropped", all_dropped).await;
            friend.send_to(b"seen", local).unwrap();
        });
        let received = rig.receive_blocking(endpoint.incoming).await.unwrap();
        assert_eq!(received[0].data, b"seen");
        assert!(uring.stats().pauses > 0, "the queue was full");
        later.await.unwrap();
    });
}

/// As a host may do it: the runtime is kept for later, and stops as soon as the store is dropped.
#[test]
fn a_guest_that_ends_with_its_runtimes_turn_gives_its_ports_back() {
    let uring = uring_with(4);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = runtime.block_on(async {
        let mut rig = Rig::on_ring(&uring).await;
        // Leaves a CLOSE to the flusher, which does not run again.
        let (first, _) = rig.bound(LOOPBACK).await;
        rig.drop_socket(first).await;
        rig.bound(LOOPBACK).await.1
    });
    std::net::UdpSocket::bind(local).expect("the port is free");
    drop(runtime);
}
