//! Datagrams out and in, one at a time.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use crate::common::network::in_a_network;
use crate::common::{ErrorCode, LOOPBACK, LOOPBACK_6, Setup, addr, native, own_ip, rest};
use crate::guest::{Guest, alike, on_both};

const WILDCARD: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// What no socket can have as a peer: the address of one, and the peer.
const NO_PEERS: [(SocketAddr, &str); 9] = [
    (LOOPBACK, "127.0.0.1:0"),
    (LOOPBACK, "0.0.0.0:9"),
    (LOOPBACK, "[::1]:9"),
    (LOOPBACK_6, "[::1]:0"),
    (LOOPBACK_6, "[::]:9"),
    (LOOPBACK_6, "[::ffff:127.0.0.1]:9"),
    (LOOPBACK_6, "[::ffff:0.0.0.0]:9"),
    (LOOPBACK_6, "[::127.0.0.1]:9"),
    (LOOPBACK_6, "127.0.0.1:9"),
];

// ---- there and back -----------------------------------------------------------------------------

in_both!(a_datagram_arrives_whole_with_its_senders_address);
fn a_datagram_arrives_whole_with_its_senders_address<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        for any in [LOOPBACK, LOOPBACK_6] {
            let (a, b) = (guest.bound(any).await, guest.bound(any).await);
            for (from, to) in [(a, b), (b, a), (a, a)] {
                guest.send(from.0, b"hello", Some(to.1)).await.unwrap();
                assert_eq!(guest.receive(to.0).await, Ok((b"hello".to_vec(), from.1)));
            }
        }
    });
}

in_both!(plain_sockets_and_guests_understand_each_other);
fn plain_sockets_and_guests_understand_each_other<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        for any in [LOOPBACK, LOOPBACK_6] {
            let (socket, local) = guest.bound(any).await;
            let (native, addr) = native::socket(any.ip());
            native.send_to(b"ping", local).unwrap();
            assert_eq!(guest.receive(socket).await, Ok((b"ping".to_vec(), addr)));
            guest.send(socket, b"pong", Some(addr)).await.unwrap();
            let mut buffer = [0; 16];
            assert_eq!(native::receive_from(&native, &mut buffer), (4, local));
            assert_eq!(&buffer[..4], b"pong");
        }
    });
}

in_both!(a_wildcard_socket_receives_on_the_loopback_interface);
fn a_wildcard_socket_receives_on_the_loopback_interface<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        for wildcard in ["0.0.0.0:0", "[::]:0"] {
            let (socket, local) = guest.bound(addr(wildcard)).await;
            let ip = if local.is_ipv4() { LOOPBACK.ip() } else { LOOPBACK_6.ip() };
            let (native, from) = native::socket(ip);
            native.send_to(b"in", (ip, local.port())).unwrap();
            assert_eq!(guest.receive(socket).await, Ok((b"in".to_vec(), from)));
        }
    });
}

in_both!(an_ipv6_wildcard_hears_nothing_of_ipv4);
/// `IPV6_V6ONLY`: WASI's sockets are never dual-stack.
fn an_ipv6_wildcard_hears_nothing_of_ipv4<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        let (six, local) = guest.bound(addr("[::]:0")).await;
        let (four, _) = native::socket(Ipv4Addr::LOCALHOST);
        let (native, from) = native::socket(Ipv6Addr::LOCALHOST);
        four.send_to(b"in four", (Ipv4Addr::LOCALHOST, local.port())).unwrap();
        native.send_to(b"in six", (Ipv6Addr::LOCALHOST, local.port())).unwrap();
        assert_eq!(guest.receive(six).await, Ok((b"in six".to_vec(), from)));
    });
}

// ---- where nothing can be sent ------------------------------------------------------------------

in_both!(what_cannot_be_sent_to_is_invalid);
fn what_cannot_be_sent_to_is_invalid<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        let (four, six) = (guest.bound(LOOPBACK).await, guest.bound(LOOPBACK_6).await);
        let no_address = [(LOOPBACK, None), (LOOPBACK_6, None)];
        let bad = NO_PEERS.map(|(any, bad)| (any, Some(addr(bad))));
        for (any, to) in no_address.into_iter().chain(bad) {
            let (socket, _) = if any == LOOPBACK { four } else { six };
            let answer = guest.send(socket, b"x", to).await;
            assert_eq!(answer, Err(ErrorCode::InvalidArgument), "{to:?}");
        }
        for (socket, local) in [four, six] {
            let sent = guest.send(socket, b"fine", Some(local)).await;
            assert_eq!(sent, Ok(()), "refusals leave the socket usable");
        }
    });
}

in_both!(what_cannot_be_connected_to_is_invalid);
fn what_cannot_be_connected_to_is_invalid<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        let ((four, _), (six, _)) = (guest.bound(LOOPBACK).await, guest.bound(LOOPBACK_6).await);
        for (any, bad) in NO_PEERS {
            let socket = if any == LOOPBACK { four } else { six };
            let answer = guest.connect(socket, addr(bad)).await;
            assert_eq!(answer, Err(ErrorCode::InvalidArgument), "{bad}");
        }
        guest.connect(four, addr("127.0.0.1:9")).await.unwrap();
        guest.connect(six, addr("[::1]:9")).await.unwrap();
    });
}

in_both!(a_broadcast_or_an_unroutable_destination_is_answered_alike);
/// From 127.0.0.1 nothing leaves for either: no leave to broadcast, and no route that could be taken.
fn a_broadcast_or_an_unroutable_destination_is_answered_alike<G: Guest>() {
    let far = addr("198.51.100.1:9");
    let answers = alike::<G, _>(Setup::default(), async |guest| {
        let (socket, _) = guest.bound(LOOPBACK).await;
        [
            guest.send(socket, b"x", Some(addr("255.255.255.255:9"))).await,
            guest.send(socket, b"x", Some(far)).await,
        ]
    });
    let has_route = native::has_route(far);
    let unroutable =
        if has_route { ErrorCode::InvalidArgument } else { ErrorCode::RemoteUnreachable };
    assert_eq!(answers, [Err(ErrorCode::AccessDenied), Err(unroutable)]);
}

// ---- sizes --------------------------------------------------------------------------------------

in_both!(the_largest_datagram_arrives_whole_and_a_byte_more_is_too_large);
fn the_largest_datagram_arrives_whole_and_a_byte_more_is_too_large<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        // The payload that fits 65,535 bytes with UDP's header, and in IPv4 with IP's too.
        for (any, largest) in [(LOOPBACK, 65_507_usize), (LOOPBACK_6, 65_527)] {
            let ((a, from), (b, to)) = (guest.bound(any).await, guest.bound(any).await);
            for socket in [a, b] {
                guest.set_receive_buffer(socket, 1 << 20).await.unwrap();
                guest.set_send_buffer(socket, 1 << 20).await.unwrap();
            }
            let data: Vec<u8> = (0..=250).cycle().take(largest).collect();
            guest.send(a, &data, Some(to)).await.unwrap();
            let received = guest.receive(b).await.unwrap();
            assert!(received == (data, from), "{} bytes from {}", received.0.len(), received.1);
            for too_long in [largest + 1, 65_535, 65_536, 100_000] {
                let answer = guest.send(a, &vec![0; too_long], Some(to)).await;
                assert_eq!(answer, Err(ErrorCode::DatagramTooLarge), "{too_long}");
            }
            guest.send(a, b"fine", Some(to)).await.unwrap();
        }
    });
}

in_both!(datagrams_of_all_sizes_arrive_whole_and_larger_ones_are_too_large);
fn datagrams_of_all_sizes_arrive_whole_and_larger_ones_are_too_large<G: Guest>() {
    in_a_network(65_536, || {
        let answers = alike::<G, _>(Setup::default(), async |guest| {
            let mut answers = Vec::new();
            for any in [LOOPBACK, LOOPBACK_6] {
                let (socket, local) = guest.bound(any).await;
                for size in [0, 1, 1472, 65_487, 65_507, 65_508, 65_527, 65_528, 65_535, 65_536] {
                    let data: Vec<_> = (0..=250).cycle().take(size).collect();
                    let sent = guest.send(socket, &data, Some(local)).await;
                    if sent.is_ok() {
                        assert_eq!(guest.receive(socket).await, Ok((data, local)));
                    }
                    answers.push((size, sent));
                }
            }
            answers
        });
        let too_large: Vec<_> = answers
            .iter()
            .filter(|(_, sent)| *sent == Err(ErrorCode::DatagramTooLarge))
            .map(|(size, _)| *size)
            .collect();
        assert!(too_large.starts_with(&[65_508, 65_527, 65_528, 65_535, 65_536]), "{too_large:?}");
        assert!(answers.iter().all(|(size, sent)| sent.is_ok() || too_large.contains(size)));
    });
}

in_both!(empty_datagrams_arrive_and_so_does_what_follows);
/// An empty datagram ends a multishot receive, which the guest must not notice.
fn empty_datagrams_arrive_and_so_does_what_follows<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        let ((a, from), (b, to)) = (guest.bound(LOOPBACK).await, guest.bound(LOOPBACK).await);
        for armed in [false, true] {
            if armed {
                guest.arm(b).await;
            }
            let sent = [&b""[..], b"between", b"", b"", b"last"];
            for data in sent {
                guest.send(a, data, Some(to)).await.unwrap();
            }
            for data in sent {
                assert_eq!(guest.receive(b).await, Ok((data.to_vec(), from)));
            }
        }
    });
}

// ---- connected sockets --------------------------------------------------------------------------

in_both!(a_connected_socket_sends_to_its_peer_named_or_not_and_to_no_other);
fn a_connected_socket_sends_to_its_peer_named_or_not_and_to_no_other<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        let (native, peer) = native::socket(Ipv4Addr::LOCALHOST);
        let (_other, other) = native::socket(Ipv4Addr::LOCALHOST);
        let (socket, _) = guest.bound(LOOPBACK).await;
        guest.connect(socket, peer).await.unwrap();
        for to in [None, Some(peer)] {
            guest.send(socket, b"hello", to).await.unwrap();
            assert_eq!(native::receive(&native, &mut [0; 16]), 5);
        }
        let same_port = SocketAddr::from((own_ip(), peer.port()));
        for to in [other, same_port] {
            let answer = guest.send(socket, b"x", Some(to)).await;
            assert_eq!(answer, Err(ErrorCode::InvalidArgument));
        }
        guest.disconnect(socket).await.unwrap();
        assert_eq!(guest.send(socket, b"x", None).await, Err(ErrorCode::InvalidArgument));
        guest.send(socket, b"x", Some(other)).await.unwrap();
    });
}

in_both!(a_connected_socket_can_be_connected_to_another_peer);
/// From a wildcard the second peer has another route than the first, and is reached all the same.
fn a_connected_socket_can_be_connected_to_another_peer<G: Guest>() {
    for any in [WILDCARD, LOOPBACK] {
        on_both::<G>(Setup::default(), async |guest| {
            let (socket, _) = guest.bound(any).await;
            for ip in [Ipv4Addr::LOCALHOST, own_ip(), own_ip(), Ipv4Addr::LOCALHOST] {
                let (native, peer) = native::socket(ip);
                guest.connect(socket, peer).await.unwrap();
                assert_eq!(guest.remote(socket).await, Ok(peer));
                guest.send(socket, b"hello", None).await.unwrap();
                let (bytes, from) = native::receive_from(&native, &mut [0; 16]);
                assert_eq!((bytes, Ok(from)), (5, guest.local(socket).await));
                native.send_to(b"hello", from).unwrap();
                assert_eq!(guest.receive(socket).await, Ok((b"hello".to_vec(), peer)));
            }
        });
    }
}

in_both!(a_socket_connected_to_one_peer_after_another_hears_the_one_it_has);
fn a_socket_connected_to_one_peer_after_another_hears_the_one_it_has<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        for any in [LOOPBACK, LOOPBACK_6] {
            let (a, local) = guest.bound(any).await;
            let peers = [guest.bound(any).await, guest.bound(any).await];
            for (peer, peer_addr) in [peers[0], peers[1], peers[0]] {
                guest.connect(a, peer_addr).await.unwrap();
                assert_eq!(guest.remote(a).await, Ok(peer_addr));
                guest.send(a, b"here I am", None).await.unwrap();
                assert_eq!(guest.receive(peer).await, Ok((b"here I am".to_vec(), local)));
                for (sender, _) in peers {
                    guest.send(sender, b"answer", Some(local)).await.unwrap();
                }
                assert_eq!(guest.receive(a).await, Ok((b"answer".to_vec(), peer_addr)));
                guest.assert_hears_nothing(a).await;
            }
        }
    });
}

// ---- a peer that refuses ------------------------------------------------------------------------

in_both!(a_refusal_is_answered_to_the_next_send_once);
fn a_refusal_is_answered_to_the_next_send_once<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        let closed = native::closed_port(own_ip());
        let socket = guest.connected(closed).await;
        for _ in 0..3 {
            guest.send(socket, b"x", None).await.unwrap();
            rest().await;
            assert_eq!(guest.send(socket, b"x", None).await, Err(ErrorCode::ConnectionRefused));
            rest().await;
        }
    });
}

in_both!(a_refusal_is_answered_to_a_receive_once_and_the_socket_goes_on_working);
fn a_refusal_is_answered_to_a_receive_once_and_the_socket_goes_on_working<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        for armed in [false, true] {
            let closed = native::closed_port(own_ip());
            let (socket, _) = guest.bound(LOOPBACK).await;
            guest.connect(socket, closed).await.unwrap();
            for _ in 0..3 {
                if armed {
                    guest.arm(socket).await;
                }
                guest.send(socket, b"anybody?", None).await.unwrap();
                assert_eq!(guest.receive(socket).await, Err(ErrorCode::ConnectionRefused));
                guest.assert_hears_nothing(socket).await;
            }
            let open = UdpSocket::bind(closed).unwrap();
            guest.send(socket, b"now", None).await.unwrap();
            let (_, from) = native::receive_from(&open, &mut [0; 16]);
            open.send_to(b"yes", from).unwrap();
            assert_eq!(guest.receive(socket).await, Ok((b"yes".to_vec(), closed)));
        }
    });
}

in_both!(a_refusal_is_answered_to_a_send_although_a_receive_is_armed);
/// Kills: an error kept for receives alone.
fn a_refusal_is_answered_to_a_send_although_a_receive_is_armed<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        let closed = native::closed_port(own_ip());
        let (socket, _) = guest.bound(LOOPBACK).await;
        guest.connect(socket, closed).await.unwrap();
        guest.arm(socket).await;
        let mut refused = 0;
        for _ in 0..6 {
            rest().await;
            match guest.send(socket, b"anybody?", None).await {
                Ok(()) => {}
                Err(error) => {
                    assert_eq!(error, ErrorCode::ConnectionRefused);
                    refused += 1;
                }
            }
        }
        assert!((1..=3).contains(&refused), "{refused} of six sends were refused");
    });
}

in_both!(a_peer_that_refused_many_times_is_one_pending_error);
/// Kills: an error kept for each question.
fn a_peer_that_refused_many_times_is_one_pending_error<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        let closed = native::closed_port(own_ip());
        let (socket, _) = guest.bound(LOOPBACK).await;
        guest.connect(socket, closed).await.unwrap();
        guest.arm(socket).await;
        for _ in 0..20 {
            // Every second one is told of the one before.
            let _ = guest.send(socket, b"anybody?", None).await;
        }
        let open = UdpSocket::bind(closed).unwrap();
        if guest.send(socket, b"now", None).await.is_err() {
            guest.send(socket, b"now", None).await.unwrap();
        }
        let (_, from) = native::receive_from(&open, &mut [0; 16]);
        open.send_to(b"yes", from).unwrap();
        let mut received = guest.receive(socket).await;
        if received == Err(ErrorCode::ConnectionRefused) {
            received = guest.receive(socket).await;
        }
        assert_eq!(received, Ok((b"yes".to_vec(), closed)));
    });
}
