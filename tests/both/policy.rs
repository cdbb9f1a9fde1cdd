//! What a guest may do: address checks and quotas.

use std::sync::{Arc, Mutex};

use wasi_uring::SocketAddrUse;

use crate::common::{
    Backend, ErrorCode, IpAddressFamily, LOOPBACK, Setup, native, own_ip, uring_with,
};
use crate::guest::{Guest, on, on_both_by_each_check};

in_both!(without_a_policy_there_is_no_udp);
fn without_a_policy_there_is_no_udp<G: Guest>() {
    on_both_by_each_check::<G>(Setup { allow: None, ..Setup::default() }, async |guest| {
        for family in [IpAddressFamily::Ipv4, IpAddressFamily::Ipv6] {
            assert_eq!(guest.create(family).await, Err(ErrorCode::AccessDenied));
        }
        assert_eq!(guest.rig().stats().sockets_created, 0);
    });
}

in_both!(a_guest_beyond_its_quota_is_refused_until_it_drops_a_socket);
fn a_guest_beyond_its_quota_is_refused_until_it_drops_a_socket<G: Guest>() {
    let setup = Setup { sockets_max: 2, ..Setup::of(&uring_with(16)) };
    on::<G, _>(Backend::Uring, setup, async |guest| {
        let (bound, _) = guest.bound(LOOPBACK).await;
        let unbound = guest.create(IpAddressFamily::Ipv6).await.unwrap();
        for dropped in [bound, unbound] {
            let refused = guest.create(IpAddressFamily::Ipv4).await;
            assert_eq!(refused, Err(ErrorCode::NewSocketLimit));
            guest.drop_socket(dropped).await;
            guest.bound(LOOPBACK).await;
        }
    });
}

in_both!(a_refused_bind_is_denied_and_the_socket_can_be_bound_elsewhere);
fn a_refused_bind_is_denied_and_the_socket_can_be_bound_elsewhere<G: Guest>() {
    let refused = own_ip();
    let setup = Setup::allow(move |addr, use_| {
        !(matches!(use_, SocketAddrUse::UdpBind) && addr.ip() == refused)
    });
    on_both_by_each_check::<G>(setup, async |guest| {
        let socket = guest.create(IpAddressFamily::Ipv4).await.unwrap();
        let answer = guest.begin_bind(socket, (refused, 0)).await;
        assert_eq!(answer, Err(ErrorCode::AccessDenied));
        guest.assert_no_bind_begun(socket).await;
        assert_eq!(guest.local(socket).await, Err(ErrorCode::InvalidState));
        guest.bind(socket, LOOPBACK).await.unwrap();
    });
}

// ---- connections --------------------------------------------------------------------------------

in_both!(a_connection_needs_leave_to_send_and_to_receive_and_a_refused_one_leaves_the_old);
fn a_connection_needs_leave_to_send_and_to_receive_and_a_refused_one_leaves_the_old<G: Guest>() {
    let (mute, deaf) = (own_ip(), own_ip());
    let setup = Setup::allow(move |addr, use_| {
        let to_mute = matches!(use_, SocketAddrUse::UdpSend) && addr.ip() == mute;
        let from_deaf = matches!(use_, SocketAddrUse::UdpReceive) && addr.ip() == deaf;
        !to_mute && !from_deaf
    });
    on_both_by_each_check::<G>(setup, async |guest| {
        let (native, peer) = native::socket(own_ip());
        let (socket, _) = guest.bound(LOOPBACK).await;
        for old in [Err(ErrorCode::InvalidState), Ok(peer)] {
            if old.is_ok() {
                guest.connect(socket, peer).await.unwrap();
            }
            for ip in [mute, deaf] {
                let answer = guest.connect(socket, (ip, 9).into()).await;
                assert_eq!(answer, Err(ErrorCode::AccessDenied));
                assert_eq!(guest.remote(socket).await, old);
            }
        }
        guest.send(socket, b"still here", None).await.unwrap();
        assert_eq!(native::receive(&native, &mut [0; 16]), 10);
    });
}

in_both!(leave_to_send_to_the_peer_can_be_withdrawn);
/// The policy is called with every datagram of a connected socket, too: leave may be withdrawn.
fn leave_to_send_to_the_peer_can_be_withdrawn<G: Guest>() {
    let withdrawn = Arc::new(Mutex::new(false));
    let seen = Arc::clone(&withdrawn);
    let setup = Setup::allow(move |_, use_| {
        !(matches!(use_, SocketAddrUse::UdpSend) && *seen.lock().unwrap())
    });
    on_both_by_each_check::<G>(setup, async |guest| {
        *withdrawn.lock().unwrap() = false;
        let (_native, peer) = native::socket(own_ip());
        let (socket, _) = guest.bound(LOOPBACK).await;
        guest.connect(socket, peer).await.unwrap();
        guest.send(socket, b"x", None).await.unwrap();
        *withdrawn.lock().unwrap() = true;
        for to in [None, Some(peer)] {
            assert_eq!(guest.send(socket, b"x", to).await, Err(ErrorCode::AccessDenied));
        }
    });
}

// ---- datagrams ----------------------------------------------------------------------------------

in_both!(a_refused_destination_is_denied_and_nothing_leaves);
fn a_refused_destination_is_denied_and_nothing_leaves<G: Guest>() {
    let refused = own_ip();
    let setup = Setup::allow(move |addr, use_| {
        !(matches!(use_, SocketAddrUse::UdpSend) && addr.ip() == refused)
    });
    on_both_by_each_check::<G>(setup, async |guest| {
        let (witness, to_refused) = native::socket(refused);
        let (socket, local) = guest.bound(LOOPBACK).await;
        let answer = guest.send(socket, b"x", Some(to_refused)).await;
        assert_eq!(answer, Err(ErrorCode::AccessDenied));
        guest.send(socket, b"to itself", Some(local)).await.unwrap();
        assert_eq!(guest.receive(socket).await, Ok((b"to itself".to_vec(), local)));
        witness.set_nonblocking(true).unwrap();
        assert!(witness.recv(&mut [0; 16]).is_err(), "nothing has left for it");
    });
}

in_both!(datagrams_of_refused_senders_are_dropped_and_others_pass);
fn datagrams_of_refused_senders_are_dropped_and_others_pass<G: Guest>() {
    const ROUNDS: u64 = 3;
    let refused = own_ip();
    let setup = Setup::allow(move |addr, use_| {
        !(matches!(use_, SocketAddrUse::UdpReceive) && addr.ip() == refused)
    });
    on_both_by_each_check::<G>(setup, async |guest| {
        let (stranger, _) = native::socket(refused);
        let (friend, from) = native::socket(own_ip());
        for armed in [false, true] {
            let before = guest.rig().stats().dropped_by_policy;
            let (socket, local) = guest.bound(LOOPBACK).await;
            for _ in 0..ROUNDS {
                if armed {
                    guest.arm(socket).await;
                }
                stranger.send_to(b"no", local).unwrap();
                guest.assert_hears_nothing(socket).await;
                let messages = [&b"yes"[..], b"indeed", b"really"];
                for message in messages {
                    friend.send_to(message, local).unwrap();
                    stranger.send_to(b"no", local).unwrap();
                }
                for message in messages {
                    assert_eq!(guest.receive(socket).await, Ok((message.to_vec(), from)));
                }
            }
            if guest.is_uring() {
                let dropped = |guest: &G| guest.rig().stats().dropped_by_policy - before;
                // A late verdict is one of the next call's.
                for _ in 0..100 {
                    guest.assert_hears_nothing(socket).await;
                    if dropped(guest) == ROUNDS * 4 {
                        break;
                    }
                }
                assert_eq!(dropped(guest), ROUNDS * 4);
            }
        }
    });
}

// ---- resources ----------------------------------------------------------------------------------

in_both!(a_guest_whose_table_is_full_is_answered_with_an_error_and_goes_on);
/// (wasmtime-wasi's call traps.) Kills: a trap, which ends the guest; a socket that is lost with its handle.
fn a_guest_whose_table_is_full_is_answered_with_an_error_and_goes_on<G: Guest>() {
    let setup = Setup { resources_max: 16, ..Setup::default() };
    on::<G, _>(Backend::Uring, setup, async |guest| {
        let mut sockets = Vec::new();
        let full = loop {
            match guest.create(IpAddressFamily::Ipv4).await {
                Ok(socket) => sockets.push(socket),
                Err(error) => break error,
            }
        };
        assert_eq!(full, ErrorCode::NewSocketLimit);
        let open = guest.rig().stats().sockets_open;
        assert_eq!(open, sockets.len() as u64, "none beside those that the guest has");
        guest.drop_socket(sockets.pop().unwrap()).await;
        guest.create(IpAddressFamily::Ipv4).await.unwrap();
        assert_eq!(guest.create(IpAddressFamily::Ipv4).await, Err(ErrorCode::NewSocketLimit));
    });
}
