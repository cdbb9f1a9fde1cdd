//! Connected sockets: from which addresses they receive, to which they may send, and refusals.

use std::net::Ipv4Addr;

use crate::common::{
    Backend, ErrorCode, LOOPBACK, LOOPBACK_6, Setup, addr, alike, datagram, native, on, on_both,
    own_ip, payloads, sender,
};
use crate::datagrams::pair;

#[test]
fn a_connected_socket_sends_to_its_peer_named_or_not() {
    on_both(Setup::default(), async |rig| {
        for any in [LOOPBACK, LOOPBACK_6] {
            let (mut a, b) = pair(rig, any).await;
            rig.reconnect(&mut a, Some(b.local)).await.unwrap();
            let batch = [datagram(b"to nobody", None), datagram(b"to the peer", Some(b.local))];
            assert_eq!(rig.send_all(a.outgoing, &batch).await, Ok(2));
            let received = rig.receive_exactly(b.incoming, 2).await;
            assert_eq!(payloads(&received), [&b"to nobody"[..], b"to the peer"]);
            assert!(received.iter().all(|datagram| sender(datagram) == a.local));
            rig.send_one(b.outgoing, b"back", Some(a.local)).await.unwrap();
            let received = rig.receive_blocking(a.incoming).await.unwrap();
            assert_eq!((payloads(&received), sender(&received[0])), (vec![&b"back"[..]], b.local));
        }
    });
}

#[test]
fn a_connected_socket_cannot_send_to_another() {
    on_both(Setup::default(), async |rig| {
        let (mut a, b) = pair(rig, LOOPBACK).await;
        let other = rig.endpoint(LOOPBACK).await;
        rig.reconnect(&mut a, Some(b.local)).await.unwrap();
        let answer = rig.send_one(a.outgoing, b"x", Some(other.local)).await;
        assert_eq!(answer, Err(ErrorCode::InvalidArgument));
        let batch = [datagram(b"good", None), datagram(b"bad", Some(other.local))];
        assert_eq!(rig.send_all(a.outgoing, &batch).await, Ok(1));
        assert_eq!(payloads(&rig.receive_blocking(b.incoming).await.unwrap()), [b"good"]);
    });
}

#[test]
fn a_connected_socket_hears_only_its_peer_whatever_was_queued_before() {
    on_both(Setup::default(), async |rig| {
        // Queued in the kernel, or taken from it already.
        for armed in [false, true] {
            let (mut a, b) = pair(rig, LOOPBACK).await;
            let (stranger, _) = native::socket(Ipv4Addr::LOCALHOST);
            if armed {
                assert_eq!(rig.receive(a.incoming, 1).await, Ok(vec![]));
            }
            stranger.send_to(b"before", a.local).unwrap();
            rig.send_one(b.outgoing, b"from the peer, early", Some(a.local)).await.unwrap();
            stranger.send_to(b"before, too", a.local).unwrap();
            rig.reconnect(&mut a, Some(b.local)).await.unwrap();
            stranger.send_to(b"after", a.local).unwrap();
            rig.send_one(b.outgoing, b"from the peer", Some(a.local)).await.unwrap();
            let received = rig.receive_exactly(a.incoming, 2).await;
            assert_eq!(payloads(&received), [&b"from the peer, early"[..], b"from the peer"]);
            assert_eq!(rig.receive(a.incoming, 16).await, Ok(vec![]));
        }
    });
}

/// Not so wasmtime-wasi: `stream` traps there while the receive of a dropped stream is still
/// being aborted in the background ("`connect` needs exclusive access").
#[test]
fn streams_can_be_exchanged_at_once_although_a_receive_is_armed() {
    on(Backend::Uring, Setup::default(), async |rig| {
        let (a, b) = pair(rig, LOOPBACK).await;
        assert_eq!(rig.receive(a.incoming, 1).await, Ok(vec![]));
        rig.drop_streams((a.incoming, a.outgoing)).await;
        let (incoming, _) = rig.stream(a.socket, Some(b.local)).await.unwrap();
        rig.send_one(b.outgoing, b"heard", Some(a.local)).await.unwrap();
        assert_eq!(payloads(&rig.receive_exactly(incoming, 1).await), [b"heard"]);
    });
}

#[test]
fn a_datagram_that_was_seen_by_poll_but_not_taken_is_not_shown_to_another_connection() {
    on_both(Setup::default(), async |rig| {
        let (mut a, b) = pair(rig, LOOPBACK).await;
        let (stranger, _) = native::socket(Ipv4Addr::LOCALHOST);
        stranger.send_to(b"seen, not taken", a.local).unwrap();
        rig.wait_readable(a.incoming).await;
        rig.reconnect(&mut a, Some(b.local)).await.unwrap();
        rig.send_one(b.outgoing, b"from the peer", Some(a.local)).await.unwrap();
        assert_eq!(payloads(&rig.receive_exactly(a.incoming, 1).await), [b"from the peer"]);
    });
}

/// Not so wasmtime-wasi, whose streams take a datagram out of the kernel to see whether it is
/// there, and lose it when they are dropped.
#[test]
fn a_datagram_that_was_seen_by_poll_but_not_taken_waits_for_the_next_streams() {
    on(Backend::Uring, Setup::default(), async |rig| {
        let (mut a, b) = pair(rig, LOOPBACK).await;
        rig.send_one(b.outgoing, b"seen, not taken", Some(a.local)).await.unwrap();
        for remote in [Some(b.local), None, Some(b.local)] {
            rig.wait_readable(a.incoming).await;
            rig.reconnect(&mut a, remote).await.unwrap();
        }
        assert_eq!(payloads(&rig.receive_exactly(a.incoming, 1).await), [b"seen, not taken"]);
    });
}

#[test]
fn a_disconnected_socket_bound_by_number_keeps_its_port_and_hears_every_sender() {
    on_both(Setup::default(), async |rig| {
        for armed in [false, true] {
            let (socket, local) = rig.bound((own_ip(), 0)).await;
            rig.drop_socket(socket).await;
            let mut a = rig.endpoint(local).await;
            let (one, one_addr) = native::socket(Ipv4Addr::LOCALHOST);
            let (two, _) = native::socket(Ipv4Addr::LOCALHOST);
            rig.reconnect(&mut a, Some(one_addr)).await.unwrap();
            if armed {
                assert_eq!(rig.receive(a.incoming, 1).await, Ok(vec![]));
            }
            rig.reconnect(&mut a, None).await.unwrap();
            assert_eq!(rig.local(a.socket).await, Ok(local));
            one.send_to(b"one", local).unwrap();
            two.send_to(b"two", local).unwrap();
            let received = rig.receive_exactly(a.incoming, 2).await;
            assert_eq!(payloads(&received), [b"one", b"two"]);
            let to_nobody = rig.send_one(a.outgoing, b"x", None).await;
            assert_eq!(to_nobody, Err(ErrorCode::InvalidArgument));
            assert_eq!(rig.send_one(a.outgoing, b"x", Some(one_addr)).await, Ok(1));
        }
    });
}

/// A disconnect (connect(2), `AF_UNSPEC`) frees a port that the kernel has chosen.
#[test]
fn a_disconnected_socket_bound_to_port_0_loses_its_port_and_gets_another_to_send() {
    for (any, armed) in [
        (LOOPBACK, false),
        (LOOPBACK, true),
        (addr("0.0.0.0:0"), false),
        (addr("0.0.0.0:0"), true),
        (LOOPBACK_6, true),
        (addr("[::]:0"), true),
    ] {
        on_both(Setup::default(), async |rig| {
            let target = if any.is_ipv4() { LOOPBACK } else { LOOPBACK_6 };
            let (native, peer) = native::socket(target.ip());
            let mut a = rig.endpoint(any).await;
            if armed {
                assert_eq!(rig.receive(a.incoming, 1).await, Ok(vec![]));
            }
            rig.reconnect(&mut a, Some(peer)).await.unwrap();
            rig.reconnect(&mut a, None).await.unwrap();
            assert_eq!(rig.local(a.socket).await, Ok(any));
            assert_eq!(rig.start_bind(a.socket, any).await, Err(ErrorCode::InvalidState));
            let sent = rig.send_one(a.outgoing, b"from a new port", Some(peer)).await;
            assert_eq!(sent, Ok(1));
            let local = rig.local(a.socket).await.unwrap();
            let (_, from) = native::receive_from(&native, &mut [0; 32]);
            assert_eq!((from.port(), any.ip()), (local.port(), local.ip()));
            native.send_to(b"back", from).unwrap();
            assert_eq!(payloads(&rig.receive_exactly(a.incoming, 1).await), [b"back"]);
        });
    }
}

/// The routing table of the machine decides, so only that both say the same. Nothing is sent.
#[test]
fn peers_that_cannot_be_reached_are_answered_alike() {
    let four = ["192.0.2.1:9", "255.255.255.255:9", "224.0.0.1:9", "240.0.0.1:9"].map(addr);
    let six = ["[2001:db8::1]:9", "[ff02::1]:9", "[fe80::1]:9", "[::2]:9"].map(addr);
    for (any, peers) in
        [(LOOPBACK, four), (addr("0.0.0.0:0"), four), (LOOPBACK_6, six), (addr("[::]:0"), six)]
    {
        for connected_before in [false, true] {
            alike(Setup::default(), async |rig| {
                let target = if any.is_ipv4() { LOOPBACK } else { LOOPBACK_6 };
                let (_native, good) = native::socket(target.ip());
                let mut answers = Vec::new();
                for peer in peers {
                    let (socket, _) = rig.bound(any).await;
                    if connected_before {
                        let streams = rig.stream(socket, Some(good)).await.unwrap();
                        rig.drop_streams(streams).await;
                    }
                    let answer = rig.stream(socket, Some(peer)).await;
                    let remote = rig.remote(socket).await.map(|remote| remote == good);
                    let local =
                        rig.local(socket).await.map(|local| (local.ip(), local.port() == 0));
                    if let Ok(streams) = answer {
                        rig.drop_streams(streams).await;
                    }
                    let after = rig.stream(socket, Some(good)).await.map(drop);
                    answers.push((peer, answer.map(drop), remote, local, after));
                }
                answers
            });
        }
    }
}

// ---- a peer that refuses ------------------------------------------------------------------------

/// The kernel reports a pending error before what is queued, unless that was received before.
#[test]
fn a_refusal_and_a_datagram_before_it_are_both_heard_in_either_order() {
    on_both(Setup::default(), async |rig| {
        for armed in [false, true] {
            let (native, peer) = native::socket(own_ip());
            let (socket, local) = rig.bound(LOOPBACK).await;
            let (incoming, outgoing) = rig.stream(socket, Some(peer)).await.unwrap();
            if armed {
                assert_eq!(rig.receive(incoming, 1).await, Ok(vec![]));
            }
            native.send_to(b"last words", local).unwrap();
            drop(native);
            rig.send_one(outgoing, b"still there?", None).await.unwrap();
            let (mut words, mut refusals) = (0, 0);
            for _ in 0..2 {
                match rig.receive_blocking(incoming).await {
                    Ok(datagrams) => words += datagrams.len(),
                    Err(error) => {
                        assert_eq!(error, ErrorCode::ConnectionRefused);
                        refusals += 1;
                    }
                }
            }
            assert_eq!((words, refusals), (1, 1), "armed: {armed}");
        }
    });
}
