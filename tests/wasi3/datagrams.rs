//! What is sent and received, call by call.

use std::net::{Ipv4Addr, SocketAddr};

use wasi_uring::SocketAddrUse;

use crate::common::network::{in_a_network, run};
use crate::common::{
    Backend, LOOPBACK, LOOPBACK_6, Setup, addr, block_on, eventually, native, own_ip, uring,
};
use crate::rig::{ErrorCode, Rig3, Status, V4, V6, family, on, on_both};

/// A connected pair of sockets, the second of which is the test's own.
async fn connected_to_a_native(rig: &mut Rig3) -> (u32, std::net::UdpSocket, SocketAddr) {
    let (native, peer) = native::socket(Ipv4Addr::LOCALHOST);
    let (socket, _) = rig.bound(LOOPBACK).await;
    rig.connect(socket, peer).await.unwrap();
    (socket, native, peer)
}

// ---- send ---------------------------------------------------------------------------------------

#[test]
fn send_binds_what_is_not_bound() {
    on_both(Setup::default(), async |rig| {
        for any in [LOOPBACK, LOOPBACK_6] {
            let (native, to) = native::socket(any.ip());
            let socket = rig.create(family(any)).await.unwrap();
            rig.send(socket, b"hello", Some(to)).await.unwrap();
            let (_, from) = native::receive_from(&native, &mut [0; 16]);
            let local = rig.local(socket).await.unwrap();
            assert!(local.ip().is_unspecified());
            assert_eq!(local.port(), from.port());
            native.send_to(b"and back", from).unwrap();
            assert_eq!(rig.receive_queued(socket).await, b"and back");
        }
    });
}

/// Most of some sends to fresh peers that may have to wait, because the ring's own thread is inside just then and
/// a busy machine does not run it.
const BESIDE_OWN_THREAD: usize = 4;

/// The guest makes no subtask: what the kernel takes at once is answered at once.
#[test]
fn a_send_whose_socket_has_buffer_space_returns_at_once() {
    on_both(Setup::default(), async |rig| {
        let (native, to) = native::socket(Ipv4Addr::LOCALHOST);
        let socket = rig.create(V4).await.unwrap();
        let mut at_once = 0;
        for n in 0..10_u8 {
            let (status, call) = rig.start_send(socket, &[n], Some(to)).await;
            at_once += usize::from(status == Status::Returned);
            rig.sent(call).await.unwrap();
            let mut buffer = [0; 16];
            assert_eq!(native::receive(&native, &mut buffer), 1);
            assert_eq!(buffer[0], n);
        }
        assert!(!rig.is_uring() || at_once >= 10 - BESIDE_OWN_THREAD, "{at_once} of 10 at once");
    });
}

#[test]
fn an_unconnected_socket_must_name_where_it_sends() {
    on_both(Setup::default(), async |rig| {
        let unbound = rig.create(V4).await.unwrap();
        let (bound, _) = rig.bound(LOOPBACK).await;
        for socket in [unbound, bound] {
            assert_eq!(rig.send(socket, b"x", None).await, Err(ErrorCode::InvalidArgument));
        }
        assert_eq!(rig.local(unbound).await, Err(ErrorCode::InvalidState));
    });
}

#[test]
fn what_no_route_leads_to_is_unreachable() {
    in_a_network(1500, || {
        on_both(Setup::default(), async |rig| {
            let v4 = rig.create(V4).await.unwrap();
            let v6 = rig.create(V6).await.unwrap();
            for (socket, far) in [(v4, "198.51.100.1:9"), (v6, "[2001:db8::1]:9")] {
                let unreachable = Err(ErrorCode::RemoteUnreachable);
                assert_eq!(rig.send(socket, b"x", Some(addr(far))).await, unreachable);
                assert_eq!(rig.connect(socket, addr(far)).await, unreachable);
                assert_eq!(rig.remote(socket).await, Err(ErrorCode::InvalidState));
            }
            let (socket, _) = rig.bound(LOOPBACK).await;
            let (_native, to) = native::socket(Ipv4Addr::new(127, 0, 0, 2));
            rig.connect(socket, to).await.unwrap();
            run("ip route add unreachable 127.0.0.2 table local");
            let answer = rig.send(socket, b"x", None).await;
            run("ip route del unreachable 127.0.0.2 table local");
            assert_eq!(answer, Err(ErrorCode::RemoteUnreachable));
            rig.send(socket, b"x", None).await.unwrap();
        });
    });
}

#[test]
fn a_refused_destination_is_denied_and_nothing_leaves() {
    let refused = own_ip();
    let setup = Setup::allow(move |addr, use_| {
        !(matches!(use_, SocketAddrUse::UdpSend) && addr.ip() == refused)
    });
    on_both(setup, async |rig| {
        let (witness, to_refused) = native::socket(refused);
        let socket = rig.create(V4).await.unwrap();
        let denied = Err(ErrorCode::AccessDenied);
        assert_eq!(rig.send(socket, b"x", Some(to_refused)).await, denied);
        assert_eq!(rig.local(socket).await, Err(ErrorCode::InvalidState), "not even bound");
        rig.bind(socket, LOOPBACK).await.unwrap();
        assert_eq!(rig.send(socket, b"x", Some(to_refused)).await, denied);
        witness.set_nonblocking(true).unwrap();
        assert!(witness.recv(&mut [0; 16]).is_err(), "nothing has left for it");
    });
}

// ---- receive ------------------------------------------------------------------------------------

#[test]
fn an_unbound_socket_cannot_receive() {
    on_both(Setup::default(), async |rig| {
        for family in [V4, V6] {
            let socket = rig.create(family).await.unwrap();
            assert_eq!(rig.receive(socket).await, Err(ErrorCode::InvalidState));
            let (status, call) = rig.start_receive(socket).await;
            assert_eq!(status, Status::Returned, "there is nothing to wait for");
            assert_eq!(rig.received(call).await, Err(ErrorCode::InvalidState));
        }
    });
}

#[test]
fn a_receive_waits_for_a_datagram_and_returns_its_sender() {
    on_both(Setup::default(), async |rig| {
        for any in [LOOPBACK, LOOPBACK_6] {
            let (native, from) = native::socket(any.ip());
            let (socket, local) = rig.bound(any).await;
            for n in 0..10_u8 {
                let call = rig.waiting_receive(socket).await;
                rig.settle().await;
                assert_eq!(rig.poll(call).await, Status::Started);
                native.send_to(&[n], local).unwrap();
                assert_eq!(rig.received(call).await, Ok((vec![n], from)));
            }
        }
    });
}

/// The guest does nothing but wait: what arrives must wake it.
#[test]
fn a_guest_that_blocks_in_a_receive_is_woken() {
    on_both(Setup::default(), async |rig| {
        let (native, from) = native::socket(Ipv4Addr::LOCALHOST);
        let (socket, local) = rig.bound(LOOPBACK).await;
        for n in 0..10_u8 {
            // Polled after the receive, which waits then.
            let later = async { native.send_to(&[n], local).unwrap() };
            let (received, _) = tokio::join!(biased; rig.receive(socket), later);
            assert_eq!(received, Ok((vec![n], from)));
        }
    });
}

/// Kills: a receive that has taken a datagram and yields before it returns.
#[test]
fn what_is_queued_is_received_at_once_the_very_first_time_too() {
    on_both(Setup::default(), async |rig| {
        for any in [LOOPBACK, LOOPBACK_6] {
            let (native, _) = native::socket(any.ip());
            for _ in 0..3 {
                let (socket, local) = rig.bound(any).await;
                for n in 0..3_u8 {
                    native.send_to(&[n], local).unwrap();
                }
                for n in 0..3_u8 {
                    assert_eq!(rig.receive_queued(socket).await, [n]);
                }
                native.send_to(b"later", local).unwrap();
                assert_eq!(rig.receive_queued(socket).await, b"later");
                rig.drop_socket(socket).await;
            }
        }
    });
}

/// Kills: a call that yields before it enters, so that others can queue, and is not woken again.
#[test]
fn what_is_queued_is_received_at_once_although_other_guests_use_the_ring() {
    block_on(async {
        let uring = uring();
        let mut guest = Rig3::on_ring(&uring).await;
        let mut other = Rig3::on_ring(&uring).await;
        let (native, from) = native::socket(Ipv4Addr::LOCALHOST);
        let (others, _) = other.bound(LOOPBACK).await;
        let mut at_once = 0;
        for n in 0..20_u8 {
            let (socket, local) = guest.bound(LOOPBACK).await;
            native.send_to(&[n], local).unwrap();
            other.send(others, b"x", Some(from)).await.unwrap();
            assert_eq!(guest.receive_queued(socket).await, [n]);
            other.send(others, b"x", Some(from)).await.unwrap();
            let (status, call) = guest.start_send(socket, &[n], Some(from)).await;
            at_once += usize::from(status == Status::Returned);
            guest.sent(call).await.unwrap();
            guest.drop_socket(socket).await;
        }
        assert!(at_once >= 20 - BESIDE_OWN_THREAD, "{at_once} of 20 at once");
    });
}

#[test]
fn datagrams_are_received_in_the_order_they_were_sent() {
    on_both(Setup::default(), async |rig| {
        let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
        let (socket, local) = rig.bound(LOOPBACK).await;
        let mut at_once = 0;
        for _ in 0..3 {
            for n in 0..100_u8 {
                native.send_to(&[n], local).unwrap();
            }
            for n in 0..100_u8 {
                let (status, call) = rig.start_receive(socket).await;
                at_once += usize::from(status == Status::Returned);
                assert_eq!(rig.received(call).await.unwrap().0, [n]);
            }
        }
        // Once in 64 the task yields.
        assert!(!rig.is_uring() || at_once >= 295, "{at_once} of 300 at once");
    });
}

#[test]
fn a_connected_socket_hears_no_sender_but_its_peer() {
    on_both(Setup::default(), async |rig| {
        let (stranger, _) = native::socket(Ipv4Addr::LOCALHOST);
        let (socket, native, peer) = connected_to_a_native(rig).await;
        let local = rig.local(socket).await.unwrap();
        for n in 0..5_u8 {
            stranger.send_to(b"stranger", local).unwrap();
            native.send_to(&[n], local).unwrap();
            assert_eq!(rig.receive(socket).await, Ok((vec![n], peer)));
        }
        let call = rig.waiting_receive(socket).await;
        stranger.send_to(b"stranger", local).unwrap();
        rig.settle().await;
        assert_eq!(rig.poll(call).await, Status::Started);
        native.send_to(b"peer", local).unwrap();
        assert_eq!(rig.received(call).await, Ok((b"peer".to_vec(), peer)));
        rig.disconnect(socket).await.unwrap();
        let port = rig.local(socket).await.unwrap().port();
        if port == local.port() {
            stranger.send_to(b"no stranger now", local).unwrap();
            assert_eq!(rig.receive(socket).await.unwrap().0, b"no stranger now");
        }
    });
}

/// WIT: "If the socket is connected, the sender address is guaranteed to match". wasmtime-wasi's
/// 0.3 leaves it to the kernel, which does not filter what it has queued before.
#[test]
fn what_strangers_sent_before_a_connect_is_not_received_after_it() {
    on(Backend::Uring, Setup::default(), async |rig| {
        let (stranger, _) = native::socket(Ipv4Addr::LOCALHOST);
        for listening in [false, true] {
            let (native, peer) = native::socket(Ipv4Addr::LOCALHOST);
            let (socket, local) = rig.bound(LOOPBACK).await;
            // A receive that waits meanwhile returns only the peer's from then on.
            let waiting = if listening { Some(rig.waiting_receive(socket).await) } else { None };
            if !listening {
                stranger.send_to(b"stranger", local).unwrap();
            }
            rig.connect(socket, peer).await.unwrap();
            native.send_to(b"peer", local).unwrap();
            let answer = match waiting {
                Some(call) => rig.received(call).await,
                None => rig.receive(socket).await,
            };
            assert_eq!(answer, Ok((b"peer".to_vec(), peer)));
        }
        assert_eq!(rig.stats().dropped_not_from_peer, 1);
    });
}

/// More than any of the kernel's buffer, the ring's buffers and the receive queue holds.
#[test]
fn large_datagrams_pause_the_receive_and_none_is_lost() {
    let uring =
        wasi_uring::Uring::builder().sockets(4).queue_datagrams(2).queue_bytes(1 << 20).build();
    let uring = uring.unwrap();
    on(Backend::Uring, Setup::of(&uring), async |rig| {
        let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
        let (socket, local) = rig.bound(LOOPBACK).await;
        let mut sent = 0_u8;
        for received in 0..100_u8 {
            while sent < received.saturating_add(10).min(100) {
                native.send_to(&[sent; 5000], local).unwrap();
                sent += 1;
            }
            assert_eq!(rig.receive(socket).await.unwrap().0, [received; 5000]);
        }
        assert!(uring.stats().pauses > 0);
        rig.drop_socket(socket).await;
        eventually("its slot is free", || uring.stats().sockets_open == 0).await;
    });
}
