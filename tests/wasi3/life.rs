//! A socket's life: create, bind, connect, disconnect, addresses, options.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use wasi_uring::SocketAddrUse;

use crate::common::seen::{Seen, recording, take_named};
use crate::common::{Check, LOOPBACK, LOOPBACK_6, Setup, addr, eventually, native, own_ip, trap};
use crate::rig::{ErrorCode, Rig3, Status, V4, V6, alike, family, on_both};

const WILDCARD: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
const WILDCARD_6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0);

/// What no socket of either family can use as a peer: `(family, address)`.
const NO_PEERS: [(SocketAddr, &str); 9] = [
    (LOOPBACK, "[::1]:9"),
    (LOOPBACK, "0.0.0.0:9"),
    (LOOPBACK, "127.0.0.1:0"),
    (LOOPBACK_6, "127.0.0.1:9"),
    (LOOPBACK_6, "[::]:9"),
    (LOOPBACK_6, "[::1]:0"),
    (LOOPBACK_6, "[::ffff:127.0.0.1]:9"),
    (LOOPBACK_6, "[::ffff:0.0.0.0]:9"),
    (LOOPBACK_6, "[::127.0.0.1]:9"),
];

// ---- bind ---------------------------------------------------------------------------------------

#[test]
fn a_socket_bound_by_any_call_cannot_be_bound_again() {
    on_both(Setup::default(), async |rig| {
        let (_native, peer) = native::socket(Ipv4Addr::LOCALHOST);
        for means in ["bind", "connect", "send"] {
            let socket = rig.create(V4).await.unwrap();
            match means {
                "bind" => rig.bind(socket, LOOPBACK).await,
                "connect" => rig.connect(socket, peer).await,
                _ => rig.send(socket, b"x", Some(peer)).await,
            }
            .unwrap();
            let local = rig.local(socket).await.unwrap();
            // What the state forbids comes before what the argument would say.
            for again in [LOOPBACK, local, LOOPBACK_6] {
                let answer = rig.bind(socket, again).await;
                assert_eq!(answer, Err(ErrorCode::InvalidState), "by {means}");
            }
            assert_eq!(rig.local(socket).await, Ok(local));
        }
    });
}

// ---- connect ------------------------------------------------------------------------------------

#[test]
fn connect_binds_what_is_not_bound() {
    on_both(Setup::default(), async |rig| {
        for any in [LOOPBACK, LOOPBACK_6] {
            let (native, peer) = native::socket(any.ip());
            let socket = rig.create(family(any)).await.unwrap();
            rig.connect(socket, peer).await.unwrap();
            let local = rig.local(socket).await.unwrap();
            assert_eq!(local.ip(), any.ip(), "its route");
            assert!(native::is_taken(local), "the kernel says so too");
            assert_eq!(rig.remote(socket).await, Ok(peer));
            native.send_to(b"to the port it has", local).unwrap();
            assert_eq!(rig.receive_queued(socket).await, b"to the port it has");
        }
    });
}

#[test]
fn what_cannot_be_a_peer_is_invalid_and_binds_nothing() {
    on_both(Setup::default(), async |rig| {
        for (any, bad) in NO_PEERS {
            let socket = rig.create(family(any)).await.unwrap();
            let answer = rig.connect(socket, addr(bad)).await;
            assert_eq!(answer, Err(ErrorCode::InvalidArgument), "{bad}");
            let answer = rig.send(socket, b"x", Some(addr(bad))).await;
            assert_eq!(answer, Err(ErrorCode::InvalidArgument), "{bad}");
            assert_eq!(rig.local(socket).await, Err(ErrorCode::InvalidState), "{bad}");
            assert_eq!(rig.remote(socket).await, Err(ErrorCode::InvalidState), "{bad}");
        }
    });
}

#[test]
fn addresses_are_shown_alike_through_connects_and_disconnects() {
    for (start, target) in [
        (None, LOOPBACK),
        (None, LOOPBACK_6),
        (Some(WILDCARD), LOOPBACK),
        (Some(WILDCARD_6), LOOPBACK_6),
        (Some(LOOPBACK), LOOPBACK),
        (Some(LOOPBACK_6), LOOPBACK_6),
    ] {
        let shown = alike(Setup::default(), async |rig| {
            let (_native, peer) = native::socket(target.ip());
            let socket = rig.create(family(target)).await.unwrap();
            if let Some(start) = start {
                rig.bind(socket, start).await.unwrap();
            }
            let mut shown = Vec::new();
            for step in ["", "connect", "connect", "disconnect", "send", "connect", "disconnect"] {
                match step {
                    "connect" => rig.connect(socket, peer).await.unwrap(),
                    "disconnect" => rig.disconnect(socket).await.unwrap(),
                    "send" => rig.send(socket, b"x", Some(peer)).await.unwrap(),
                    _ => {}
                }
                let local = rig.local(socket).await.map(|addr| (addr.ip(), addr.port() == 0));
                shown.push((step, local, rig.remote(socket).await.map(|addr| addr == peer)));
            }
            shown
        });
        let connected: Vec<_> = shown.iter().map(|(_, _, remote)| remote.is_ok()).collect();
        assert_eq!(connected, [false, true, true, false, false, true, false], "{start:?}");
    }
}

#[test]
fn what_is_not_connected_cannot_be_disconnected() {
    on_both(Setup::default(), async |rig| {
        let (_native, peer) = native::socket(Ipv4Addr::LOCALHOST);
        let socket = rig.create(V4).await.unwrap();
        assert_eq!(rig.disconnect(socket).await, Err(ErrorCode::InvalidState));
        rig.bind(socket, LOOPBACK).await.unwrap();
        assert_eq!(rig.disconnect(socket).await, Err(ErrorCode::InvalidState));
        rig.connect(socket, peer).await.unwrap();
        rig.disconnect(socket).await.unwrap();
        assert_eq!(rig.disconnect(socket).await, Err(ErrorCode::InvalidState));
        assert_eq!(rig.remote(socket).await, Err(ErrorCode::InvalidState));
    });
}

#[test]
fn a_refused_connection_binds_nothing() {
    let (mute, deaf) = (own_ip(), own_ip());
    let may_bind = Arc::new(Mutex::new(true));
    let asked = Arc::clone(&may_bind);
    let setup = Setup::allow(move |addr, use_| {
        let may_bind = *asked.lock().unwrap() || !matches!(use_, SocketAddrUse::UdpBind);
        let to_mute = matches!(use_, SocketAddrUse::UdpSend) && addr.ip() == mute;
        let from_deaf = matches!(use_, SocketAddrUse::UdpReceive) && addr.ip() == deaf;
        may_bind && !to_mute && !from_deaf
    });
    on_both(setup, async |rig| {
        let (native, peer) = native::socket(own_ip());
        *may_bind.lock().unwrap() = false;
        let socket = rig.create(V4).await.unwrap();
        assert_eq!(rig.connect(socket, peer).await, Err(ErrorCode::AccessDenied));
        *may_bind.lock().unwrap() = true;
        for ip in [mute, deaf] {
            let answer = rig.connect(socket, (ip, 9).into()).await;
            assert_eq!(answer, Err(ErrorCode::AccessDenied));
        }
        assert_eq!(rig.local(socket).await, Err(ErrorCode::InvalidState));
        rig.connect(socket, peer).await.unwrap();
        assert_eq!(rig.remote(socket).await, Ok(peer));
        rig.send(socket, b"still here", None).await.unwrap();
        assert_eq!(native::receive(&native, &mut [0; 16]), 10);
    });
}

// ---- what the policy is called with -----------------------------------------------------------------

/// The policy is not called with what is invalid, but with what the kernel will refuse.
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
        let (native, peer) = native::socket(LOOPBACK.ip());
        let (native_2, peer_2) = native::socket(LOOPBACK.ip());
        let mut events = Vec::new();
        let names = [("peer", peer), ("peer 2", peer_2)];
        let mut note = |what: &str| {
            events.push(format!("{what}: {}", take_named(&seen, &names).join(", ")));
        };
        let nobody = SocketAddr::from((LOOPBACK.ip(), 0));
        let socket = rig.create(V4).await.unwrap();
        note("create");
        rig.connect(socket, nobody).await.unwrap_err();
        rig.connect(socket, LOOPBACK_6).await.unwrap_err();
        rig.send(socket, b"x", Some(nobody)).await.unwrap_err();
        rig.send(socket, b"x", None).await.unwrap_err();
        rig.send(socket, &vec![0; 65_536], Some(peer)).await.unwrap_err();
        rig.disconnect(socket).await.unwrap_err();
        rig.receive(socket).await.unwrap_err();
        note("invalid");
        rig.connect(socket, peer).await.unwrap();
        note("connect");
        rig.connect(socket, peer_2).await.unwrap();
        note("connect again");
        rig.send(socket, b"x", None).await.unwrap();
        rig.send(socket, b"x", Some(peer_2)).await.unwrap();
        rig.send(socket, b"x", Some(peer)).await.unwrap_err();
        note("send to the peer");
        let local = rig.local(socket).await.unwrap();
        native_2.send_to(b"x", local).unwrap();
        rig.receive(socket).await.unwrap();
        note("receive");
        rig.disconnect(socket).await.unwrap();
        rig.send(socket, b"x", Some(peer)).await.unwrap();
        note("disconnect and send");

        let socket = rig.create(V4).await.unwrap();
        rig.send(socket, b"x", Some(peer)).await.unwrap();
        note("first send");
        rig.send(socket, b"x", Some(peer)).await.unwrap();
        note("second send");
        let local = rig.local(socket).await.unwrap();
        for _ in 0..2 {
            native.send_to(b"x", SocketAddr::from((LOOPBACK.ip(), local.port()))).unwrap();
        }
        rig.receive(socket).await.unwrap();
        rig.receive(socket).await.unwrap();
        note("receive twice");

        let socket = rig.create(V6).await.unwrap();
        rig.bind(socket, LOOPBACK).await.unwrap_err();
        note("bind to the other family");
        rig.connect(socket, addr("[::1]:9")).await.unwrap();
        note("connect");
        let socket = rig.create(V4).await.unwrap();
        rig.bind(socket, peer).await.unwrap_err();
        note("bind to a taken address");
        rig.bind(socket, LOOPBACK).await.unwrap();
        rig.bind(socket, LOOPBACK).await.unwrap_err();
        note("bind twice");
        rig.connect(socket, peer).await.unwrap();
        note("connect what is bound");
        events
    });
    assert_eq!(
        events,
        [
            "create: ",
            "invalid: ",
            "connect: UdpBind 0.0.0.0:0, UdpSend peer, UdpReceive peer",
            "connect again: UdpSend peer 2, UdpReceive peer 2",
            "send to the peer: UdpSend peer 2, UdpSend peer 2",
            "receive: UdpReceive peer 2",
            "disconnect and send: UdpSend peer",
            "first send: UdpBind 0.0.0.0:0, UdpSend peer",
            "second send: UdpSend peer",
            "receive twice: UdpReceive peer, UdpReceive peer",
            "bind to the other family: ",
            "connect: UdpBind [::]:0, UdpSend [::1]:9, UdpReceive [::1]:9",
            "bind to a taken address: UdpBind peer",
            "bind twice: UdpBind 127.0.0.1:0",
            "connect what is bound: UdpSend peer, UdpReceive peer",
        ]
    );
}

/// Once the policy has refused, it is not called again, and nothing has happened.
#[test]
fn a_policy_that_refuses_is_not_called_again() {
    for refused in ["UdpBind", "UdpSend", "UdpReceive"] {
        let seen = Seen::default();
        let noted = Arc::clone(&seen);
        let setup = Setup::allow(move |addr, use_| {
            noted.lock().unwrap().push((addr, use_));
            format!("{use_:?}") != refused
        });
        alike(setup, async |rig| {
            seen.lock().unwrap().clear();
            let (_native, peer) = native::socket(LOOPBACK.ip());
            let mut answers = Vec::new();
            for what in ["connect", "send"] {
                let socket = rig.create(V4).await.unwrap();
                let answer = match what {
                    "connect" => rig.connect(socket, peer).await,
                    _ => rig.send(socket, b"x", Some(peer)).await,
                };
                let is_bound = rig.local(socket).await.is_ok();
                answers.push((answer, is_bound, take_named(&seen, &[("peer", peer)])));
            }
            answers
        });
    }
}

// ---- options ------------------------------------------------------------------------------------

#[test]
fn a_hop_limit_set_before_an_implicit_bind_or_after_is_that_of_the_datagrams() {
    on_both(Setup::default(), async |rig| {
        let (witness, to) = native::socket(Ipv4Addr::LOCALHOST);
        let socket = rig.create(V4).await.unwrap();
        for hops in [3, 9] {
            rig.set_hop_limit(socket, hops).await.unwrap();
            rig.send(socket, b"x", Some(to)).await.unwrap();
            assert_eq!(native::receive_with_ttl(&witness).1, i32::from(hops));
        }
    });
}

// ---- drop ---------------------------------------------------------------------------------------

#[test]
fn a_port_is_freed_with_its_socket_however_it_was_bound() {
    on_both(Setup::default(), async |rig| {
        let (_native, peer) = native::socket(own_ip());
        for means in ["bind", "connect", "send"] {
            let socket = rig.create(V4).await.unwrap();
            match means {
                "bind" => rig.bind(socket, (own_ip(), 0)).await,
                "connect" => rig.connect(socket, peer).await,
                _ => rig.send(socket, b"x", Some(peer)).await,
            }
            .unwrap();
            let local = rig.local(socket).await.unwrap();
            rig.drop_socket(socket).await;
            eventually("the port is free", || !native::is_taken(local)).await;
            assert_eq!(rig.stats().sockets_open, 0);
        }
    });
}

#[test]
fn a_socket_dropped_under_a_call_of_its_own_traps() {
    async fn dropped(rig: &mut Rig3, what: &str) -> String {
        let (socket, _) = rig.bound(LOOPBACK).await;
        let _call = rig.waiting_receive(socket).await;
        if what == "settled" {
            rig.settle().await;
        }
        trap(rig.guest.call_drop_socket(&mut rig.rig.store, socket).await)
    }
    for what in ["at once", "settled"] {
        on_both(Setup::default(), async |rig| {
            let message = dropped(rig, what).await;
            assert!(message.contains("cannot remove owned resource while borrowed"), "{message}");
        });
    }
}

#[test]
fn a_socket_can_be_dropped_once_its_calls_have_ended() {
    on_both(Setup::default(), async |rig| {
        let (socket, local) = rig.bound((own_ip(), 0)).await;
        let call = rig.waiting_receive(socket).await;
        assert_eq!(rig.cancel(call).await, Status::Cancelled);
        rig.drop_socket(socket).await;
        eventually("the port is free", || !native::is_taken(local)).await;
    });
}
