//! What a guest may do: address checks, in the same order as wasmtime-wasi makes them, and quotas.

use crate::common::seen::{Seen, recording, take_named};
use crate::common::{
    BOUND, Backend, Check, ErrorCode, IpAddressFamily, LOOPBACK, LOOPBACK_6, Rig, Setup, alike,
    block_on, datagram, eventually, native, on, on_both, on_each, own_ip, payloads, uring_with,
};
use wasi_uring::{SocketAddrUse, Uring};

// ---- address checks -----------------------------------------------------------------------------

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

// ---- the events ---------------------------------------------------------------------------------

#[test]
fn a_policy_sees_the_same_events_in_the_same_order() {
    for check in Check::ALL {
        assert_the_same_events(check);
    }
}

fn assert_the_same_events(check: Check) {
    let seen = Seen::default();
    let events = alike(Setup { check, ..recording(&seen) }, async |rig| {
        seen.lock().unwrap().clear();
        let (socket, _) = rig.bound(LOOPBACK).await;
        let (native, peer) = native::socket(LOOPBACK.ip());
        let (_native_2, peer_2) = native::socket(LOOPBACK.ip());
        let local = rig.local(socket).await.unwrap();
        // The policy is not called with what is invalid, but with what the kernel will refuse.
        rig.start_bind(socket, LOOPBACK).await.unwrap_err();
        let other = rig.create(IpAddressFamily::Ipv4).await.unwrap();
        rig.start_bind(other, LOOPBACK_6).await.unwrap_err();
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
fn a_policy_is_called_for_strangers_of_a_connected_socket_alike() {
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

/// The policy runs inside the guest's call, but must not run under the ring's locks.
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
    is_done.recv_timeout(BOUND).expect("done in time");
}

/// (wasmtime-wasi 48's sockets are "not ready" once tokio's budget of a task's poll is spent, and learn otherwise when
/// the task has suspended: wasmtime#14174.) Kills: a permit, or a send, that waits for that.
#[test]
fn a_guest_that_does_not_suspend_is_never_stalled_by_tokios_budget() {
    on_each(|backend| {
        on(backend, Setup::default(), async |rig| {
            let (_native, peer) = native::socket(own_ip());
            let endpoint = rig.endpoint(LOOPBACK).await;
            let sends = 1000;
            let mut stalled = 0;
            for _ in 0..sends {
                if rig.check_send(endpoint.outgoing).await == Ok(0) {
                    stalled += 1;
                    continue;
                }
                let batch = [datagram(b"x", Some(peer))];
                let sent = rig.send(endpoint.outgoing, &batch).await;
                stalled += u64::from(sent != Ok(1));
            }
            eprintln!("{stalled} of {sends} stalled");
            assert!(stalled == 0 || backend == Backend::Stock, "{stalled} of {sends}");
        });
    });
}

// ---- quotas -------------------------------------------------------------------------------------

/// The guest need not suspend in between: its next create flushes the close.
#[test]
fn a_slot_of_a_full_table_can_be_reused_at_once_when_it_is_freed() {
    on(Backend::Uring, Setup::of(&uring_with(2)), async |rig| {
        rig.bound(LOOPBACK).await;
        for _ in 0..20 {
            let (socket, _) = rig.bound(LOOPBACK).await;
            rig.drop_socket(socket).await;
        }
    });
}

#[test]
fn a_full_table_refuses_every_guest_until_a_slot_is_free() {
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
        a.bind(socket, LOOPBACK_6).await.unwrap();
        a.drop_socket(bound).await;
        eventually("the slot is free", || uring.stats().sockets_open == 3).await;
        let socket = b.create(IpAddressFamily::Ipv4).await.unwrap();
        b.bind(socket, LOOPBACK).await.unwrap();
        assert_eq!(a.create(IpAddressFamily::Ipv4).await, Err(ErrorCode::NewSocketLimit));
    });
}

// ---- refused senders and full queues --------------------------------------------------------------

/// The queue fills with datagrams that the guest may not see, none of which wakes it.
#[test]
fn a_burst_of_refused_senders_does_not_end_the_receive() {
    let uring =
        Uring::builder().sockets(4).queue_datagrams(4).queue_bytes(1 << 20).build().unwrap();
    let (friend, friend_addr) = native::socket(LOOPBACK.ip());
    let setup = Setup {
        uring: Some(uring.clone()),
        ..Setup::allow(move |addr, use_| {
            !matches!(use_, SocketAddrUse::UdpReceive) || addr == friend_addr
        })
    };
    on(Backend::Uring, setup, async |rig| {
        let endpoint = rig.endpoint(LOOPBACK).await;
        let (stranger, _) = native::socket(LOOPBACK.ip());
        assert!(rig.receive(endpoint.incoming, 16).await.unwrap().is_empty(), "armed");
        // While the guest waits, so that the ring has paused before the guest receives; the friend
        // sends when all the others' were dropped.
        let local = endpoint.local;
        let (stats, friend) = (uring.clone(), friend.try_clone().unwrap());
        let later = tokio::spawn(async move {
            for n in 0..20_u8 {
                stranger.send_to(&[n], local).unwrap();
            }
            let all_dropped = || stats.stats().dropped_by_policy == 20;
            eventually("the strangers are dropped", all_dropped).await;
            friend.send_to(b"seen", local).unwrap();
        });
        let received = rig.receive_blocking(endpoint.incoming).await.unwrap();
        assert_eq!(received[0].data, b"seen");
        assert!(uring.stats().pauses > 0, "the queue was full");
        later.await.unwrap();
    });
}

/// A host may stop polling the runtime as soon as the store is dropped, and keep it for later.
#[test]
fn a_guest_that_ends_as_its_runtime_stops_frees_its_ports() {
    let uring = uring_with(4);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = runtime.block_on(async {
        let mut rig = Rig::on_ring(&uring).await;
        // Leaves a CLOSE to the flusher task, which does not run again.
        let (first, _) = rig.bound(LOOPBACK).await;
        rig.drop_socket(first).await;
        rig.bound(LOOPBACK).await.1
    });
    std::net::UdpSocket::bind(local).expect("the port is free");
    drop(runtime);
}
