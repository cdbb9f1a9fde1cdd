//! Datagrams out and in, on both backends. Of the same binary: several in one message in
//! `datagrams/coalesced.rs`, connections in `datagrams/connected.rs`, networks that are small or
//! slow in `datagrams/networks.rs`, pollables in `datagrams/poll.rs`.

#[path = "datagrams/coalesced.rs"]
mod coalesced;
mod common;
#[path = "datagrams/connected.rs"]
mod connected;
#[path = "datagrams/networks.rs"]
mod networks;
#[path = "datagrams/poll.rs"]
mod poll;

use std::net::{Ipv4Addr, SocketAddr};

use common::{
    Backend, Endpoint, ErrorCode, LOOPBACK, LOOPBACK_6, OutgoingDatagram, Rig, Setup, addr, alike,
    datagram, native, on, on_both, payloads, sender, trap, yield_to_others,
};
use wasi_uring::Uring;

/// Datagrams with one byte each, the position in the batch.
fn numbered(count: u8, to: SocketAddr) -> Vec<OutgoingDatagram> {
    (0..count).map(|n| datagram(&[n], Some(to))).collect()
}

async fn pair(rig: &mut Rig, any: SocketAddr) -> (Endpoint, Endpoint) {
    (rig.endpoint(any).await, rig.endpoint(any).await)
}

// ---- there and back -----------------------------------------------------------------------------

#[test]
fn a_datagram_arrives_whole_with_its_senders_address() {
    on_both(Setup::default(), async |rig| {
        for any in [LOOPBACK, LOOPBACK_6] {
            let (a, b) = pair(rig, any).await;
            for (from, to) in [(a, b), (b, a), (a, a)] {
                let sent = rig.send_one(from.outgoing, b"hello", Some(to.local)).await;
                assert_eq!(sent, Ok(1));
                let received = rig.receive_blocking(to.incoming).await.unwrap();
                assert_eq!(payloads(&received), [b"hello"]);
                assert_eq!(sender(&received[0]), from.local);
            }
        }
    });
}

#[test]
fn plain_sockets_and_guests_understand_each_other() {
    on_both(Setup::default(), async |rig| {
        for any in [LOOPBACK, LOOPBACK_6] {
            let guest = rig.endpoint(any).await;
            let (native, addr) = native::socket(any.ip());
            native.send_to(b"ping", guest.local).unwrap();
            let received = rig.receive_blocking(guest.incoming).await.unwrap();
            assert_eq!((payloads(&received), sender(&received[0])), (vec![&b"ping"[..]], addr));
            rig.send_one(guest.outgoing, b"pong", Some(addr)).await.unwrap();
            let mut buffer = [0; 16];
            assert_eq!(native.recv_from(&mut buffer).unwrap(), (4, guest.local));
            assert_eq!(&buffer[..4], b"pong");
        }
    });
}

#[test]
fn a_wildcard_socket_receives_on_the_loopback_interface() {
    on_both(Setup::default(), async |rig| {
        for wildcard in ["0.0.0.0:0", "[::]:0"] {
            let guest = rig.endpoint(addr(wildcard)).await;
            let ip = if guest.local.is_ipv4() { LOOPBACK.ip() } else { LOOPBACK_6.ip() };
            let (native, _) = native::socket(ip);
            native.send_to(b"in", (ip, guest.local.port())).unwrap();
            let received = rig.receive_blocking(guest.incoming).await.unwrap();
            assert_eq!(payloads(&received), [b"in"]);
        }
    });
}

/// `IPV6_V6ONLY`: WASI's sockets are never dual-stack.
#[test]
fn an_ipv6_wildcard_hears_nothing_of_ipv4() {
    on_both(Setup::default(), async |rig| {
        let six = rig.endpoint(addr("[::]:0")).await;
        let (four, _) = native::socket(Ipv4Addr::LOCALHOST);
        let (native, _) = native::socket(LOOPBACK_6.ip());
        four.send_to(b"in four", (Ipv4Addr::LOCALHOST, six.local.port())).unwrap();
        native.send_to(b"in six", (LOOPBACK_6.ip(), six.local.port())).unwrap();
        let received = rig.receive_exactly(six.incoming, 1).await;
        assert_eq!(payloads(&received), [b"in six"]);
    });
}

// ---- what send refuses --------------------------------------------------------------------------

#[test]
fn a_datagram_without_an_address_or_with_an_impossible_one_is_invalid() {
    on_both(Setup::default(), async |rig| {
        let four = rig.endpoint(LOOPBACK).await;
        let six = rig.endpoint(LOOPBACK_6).await;
        let invalid = Err(ErrorCode::InvalidArgument);
        for (endpoint, to) in [
            (four, None),
            (four, Some(addr("127.0.0.1:0"))),
            (four, Some(addr("0.0.0.0:9"))),
            (four, Some(addr("[::1]:9"))),
            (six, None),
            (six, Some(addr("[::1]:0"))),
            (six, Some(addr("[::]:9"))),
            (six, Some(addr("[::ffff:127.0.0.1]:9"))),
            (six, Some(addr("127.0.0.1:9"))),
        ] {
            assert_eq!(rig.send_one(endpoint.outgoing, b"x", to).await, invalid, "{to:?}");
        }
        for endpoint in [four, six] {
            let sent = rig.send_one(endpoint.outgoing, b"fine", Some(endpoint.local)).await;
            assert_eq!(sent, Ok(1), "refusals leave the stream usable");
        }
    });
}

#[test]
fn addresses_that_cannot_be_connected_to_are_invalid() {
    on_both(Setup::default(), async |rig| {
        let (four, _) = rig.bound(LOOPBACK).await;
        let (six, _) = rig.bound(LOOPBACK_6).await;
        for (socket, to) in [
            (four, "127.0.0.1:0"),
            (four, "0.0.0.0:9"),
            (four, "[::1]:9"),
            (six, "[::1]:0"),
            (six, "[::]:9"),
            (six, "[::ffff:127.0.0.1]:9"),
            (six, "127.0.0.1:9"),
        ] {
            let answer = rig.stream(socket, Some(addr(to))).await;
            assert_eq!(answer, Err(ErrorCode::InvalidArgument), "{to}");
        }
        rig.stream(four, None).await.unwrap();
        rig.stream(six, Some(addr("[::1]:9"))).await.unwrap();
    });
}

/// From 127.0.0.1 nothing leaves for either: no leave to broadcast, and no route.
#[test]
fn a_broadcast_or_an_unroutable_destination_is_answered_alike() {
    let told = alike(Setup::default(), async |rig| {
        let endpoint = rig.endpoint(LOOPBACK).await;
        let broadcast = Some(addr("255.255.255.255:9"));
        let unroutable = Some(addr("198.51.100.1:9"));
        [
            rig.send_one(endpoint.outgoing, b"x", broadcast).await,
            rig.send_one(endpoint.outgoing, b"x", unroutable).await,
        ]
    });
    assert_eq!(told, [Err(ErrorCode::AccessDenied), Err(ErrorCode::InvalidArgument)]);
}

// ---- sizes --------------------------------------------------------------------------------------

#[test]
fn the_largest_datagram_arrives_whole_and_a_byte_more_is_too_large() {
    on_both(Setup::default(), async |rig| {
        // The payload that fits 65,535 bytes with UDP's header, and in IPv4 with IP's too.
        for (any, largest) in [(LOOPBACK, 65_507_usize), (LOOPBACK_6, 65_527)] {
            let (a, b) = pair(rig, any).await;
            for endpoint in [a, b] {
                rig.set_receive_buffer(endpoint.socket, 1 << 20).await.unwrap();
                rig.set_send_buffer(endpoint.socket, 1 << 20).await.unwrap();
            }
            let data: Vec<u8> = (0..=250).cycle().take(largest).collect();
            assert_eq!(rig.send_one(a.outgoing, &data, Some(b.local)).await, Ok(1));
            let received = rig.receive_blocking(b.incoming).await.unwrap();
            assert!(payloads(&received) == [&*data], "{} bytes", received[0].data.len());
            for too_long in [largest + 1, 65_535, 65_536, 100_000] {
                let answer = rig.send_one(a.outgoing, &vec![0; too_long], Some(b.local)).await;
                assert_eq!(answer, Err(ErrorCode::DatagramTooLarge), "{too_long}");
            }
            assert_eq!(rig.send_one(a.outgoing, b"fine", Some(b.local)).await, Ok(1));
        }
    });
}

/// A zero-length datagram ends a multishot receive; nobody must notice.
#[test]
fn empty_datagrams_arrive_and_so_does_what_follows() {
    on_both(Setup::default(), async |rig| {
        let (a, b) = pair(rig, LOOPBACK).await;
        for armed in [false, true] {
            if armed {
                assert_eq!(rig.receive(b.incoming, 1).await, Ok(vec![]));
            }
            for data in [&b""[..], b"between", b"", b"", b"last"] {
                assert_eq!(rig.send_one(a.outgoing, data, Some(b.local)).await, Ok(1));
            }
            let received = rig.receive_exactly(b.incoming, 5).await;
            assert_eq!(payloads(&received), [&b""[..], b"between", b"", b"", b"last"]);
        }
    });
}

// ---- batches and permits ------------------------------------------------------------------------

#[test]
fn sixteen_datagrams_are_permitted_and_arrive_in_order() {
    on_both(Setup::default(), async |rig| {
        let (a, b) = pair(rig, LOOPBACK).await;
        for _ in 0..3 {
            assert_eq!(rig.check_send(a.outgoing).await, Ok(16));
            assert_eq!(rig.send(a.outgoing, &numbered(16, b.local)).await, Ok(16));
            let received = rig.receive_exactly(b.incoming, 16).await;
            let order: Vec<u8> = received.iter().map(|datagram| datagram.data[0]).collect();
            assert_eq!(order, (0..16).collect::<Vec<u8>>());
        }
    });
}

#[test]
fn a_bad_datagram_ends_its_batch_and_the_rest_can_be_sent_later() {
    on_both(Setup::default(), async |rig| {
        let (a, b) = pair(rig, LOOPBACK).await;
        // Refused before the kernel is asked, refused by the kernel, and without a route.
        for (bad, error) in [
            (datagram(b"x", Some(addr("127.0.0.1:0"))), ErrorCode::InvalidArgument),
            (datagram(&vec![0; 65_536], Some(b.local)), ErrorCode::DatagramTooLarge),
            (datagram(&vec![0; 65_508], Some(b.local)), ErrorCode::DatagramTooLarge),
            (datagram(b"x", Some(addr("255.255.255.255:9"))), ErrorCode::AccessDenied),
        ] {
            let mut batch = numbered(5, b.local);
            batch[2] = bad;
            assert_eq!(rig.send_all(a.outgoing, &batch).await, Ok(2), "{error:?}");
            let answer = rig.send_all(a.outgoing, &batch[2..]).await;
            assert_eq!(answer, Err(error), "the bad one first");
            assert_eq!(rig.send_all(a.outgoing, &batch[3..]).await, Ok(2), "{error:?}");
            let received = rig.receive_exactly(b.incoming, 4).await;
            assert_eq!(payloads(&received), [[0], [1], [3], [4]]);
        }
    });
}

#[test]
fn more_datagrams_than_permitted_trap() {
    for (permitted, sent) in [(true, 17), (false, 1)] {
        on_both(Setup::default(), async |rig| {
            let endpoint = rig.endpoint(LOOPBACK).await;
            if permitted {
                assert_eq!(rig.check_send(endpoint.outgoing).await, Ok(16));
            }
            let batch = numbered(sent, endpoint.local);
            let answer = rig.guest.call_send(&mut rig.store, endpoint.outgoing, &batch).await;
            let message = trap(answer);
            assert!(message.contains("argument exceeds permitted size"), "{message}");
        });
    }
}

#[test]
fn a_permit_is_good_for_one_send() {
    on_both(Setup::default(), async |rig| {
        let endpoint = rig.endpoint(LOOPBACK).await;
        let batch = numbered(1, endpoint.local);
        assert_eq!(rig.send_all(endpoint.outgoing, &batch).await, Ok(1));
        let answer = rig.guest.call_send(&mut rig.store, endpoint.outgoing, &batch).await;
        assert!(trap(answer).contains("argument exceeds permitted size"));
    });
}

#[test]
fn an_empty_batch_needs_no_permit_and_uses_none() {
    on_both(Setup::default(), async |rig| {
        let endpoint = rig.endpoint(LOOPBACK).await;
        assert_eq!(rig.send(endpoint.outgoing, &[]).await, Ok(0));
        assert_eq!(rig.check_send(endpoint.outgoing).await, Ok(16));
        assert_eq!(rig.send(endpoint.outgoing, &[]).await, Ok(0));
        assert_eq!(rig.send(endpoint.outgoing, &numbered(16, endpoint.local)).await, Ok(16));
    });
}

// ---- receive ------------------------------------------------------------------------------------

#[test]
fn receive_returns_no_more_than_asked_for_and_nothing_when_nothing_is_there() {
    on_both(Setup::default(), async |rig| {
        let (a, b) = pair(rig, LOOPBACK).await;
        for _ in 0..2 {
            assert_eq!(rig.receive(b.incoming, 16).await, Ok(vec![]));
            assert_eq!(rig.send_all(a.outgoing, &numbered(5, b.local)).await, Ok(5));
            rig.wait_readable(b.incoming).await;
            assert_eq!(rig.receive(b.incoming, 0).await, Ok(vec![]));
            let three = rig.receive(b.incoming, 3).await.unwrap();
            assert_eq!(payloads(&three), [[0], [1], [2]]);
            let two = rig.receive_exactly(b.incoming, 2).await;
            assert_eq!(payloads(&two), [[3], [4]]);
        }
    });
}

#[test]
fn one_receive_returns_sixteen_datagrams_at_most() {
    on_both(Setup::default(), async |rig| {
        let (a, b) = pair(rig, LOOPBACK).await;
        rig.send_all(a.outgoing, &numbered(16, b.local)).await.unwrap();
        rig.send_all(a.outgoing, &numbered(4, b.local)).await.unwrap();
        rig.wait_readable(b.incoming).await;
        assert_eq!(rig.receive(b.incoming, u64::MAX).await.unwrap().len(), 16);
        assert_eq!(rig.receive_exactly(b.incoming, 4).await.len(), 4);
    });
}

#[test]
fn one_receive_returns_about_64_kibibytes_at_most() {
    alike(Setup::default(), async |rig| {
        let (a, b) = pair(rig, LOOPBACK).await;
        rig.set_receive_buffer(b.socket, 1 << 20).await.unwrap();
        for _ in 0..6 {
            rig.send_one(a.outgoing, &vec![1; 20_000], Some(b.local)).await.unwrap();
        }
        rig.wait_readable(b.incoming).await;
        let first = rig.receive(b.incoming, 16).await.unwrap().len();
        assert_eq!(rig.receive_exactly(b.incoming, 6 - first).await.len(), 6 - first);
        first
    });
}

#[test]
fn what_a_guest_does_not_read_waits_in_the_kernels_buffer_in_order() {
    for (datagrams, bytes) in [(8, 1 << 20), (64, 1 << 20), (64, 100), (1, 1)] {
        let builder = Uring::builder().sockets(8).queue_per_socket(datagrams, bytes);
        let uring = builder.build().unwrap();
        on_both(Setup::of(&uring), async |rig| {
            let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
            let endpoint = rig.endpoint(LOOPBACK).await;
            rig.set_receive_buffer(endpoint.socket, 1 << 20).await.unwrap();
            assert_eq!(rig.receive(endpoint.incoming, 1).await, Ok(vec![]));
            // Empty ones among them, which end a receive in their own way.
            let expected: Vec<_> = (0..300_u16)
                .map(|n| if n % 7 == 0 { vec![] } else { n.to_be_bytes().to_vec() })
                .collect();
            for data in &expected {
                native.send_to(data, endpoint.local).unwrap();
            }
            // Whatever the host does behind the guest's back has been done.
            yield_to_others().await;
            assert_eq!(rig.drain(endpoint, &native).await, expected);
        });
        assert!(uring.stats().pauses > 0, "{uring:?}");
    }
}

#[test]
fn what_was_sent_leaves_although_the_socket_is_dropped_at_once() {
    on_both(Setup::default(), async |rig| {
        let (native, to) = native::socket(Ipv4Addr::LOCALHOST);
        for _ in 0..20 {
            let endpoint = rig.endpoint(LOOPBACK).await;
            assert_eq!(rig.send_all(endpoint.outgoing, &numbered(16, to)).await, Ok(16));
            rig.close(endpoint).await;
            for n in 0..16 {
                let mut buffer = [0xff; 2];
                assert_eq!(native.recv_from(&mut buffer).unwrap(), (1, endpoint.local));
                assert_eq!(buffer[0], n);
            }
        }
    });
}

#[test]
fn counters_tell_what_went_through_and_what_was_withheld() {
    on(Backend::Uring, Setup::default(), async |rig| {
        let (mut a, b) = pair(rig, LOOPBACK).await;
        let (stranger, _) = native::socket(Ipv4Addr::LOCALHOST);
        stranger.send_to(b"withheld", a.local).unwrap();
        rig.reconnect(&mut a, Some(b.local)).await.unwrap();
        rig.send_all(b.outgoing, &numbered(3, a.local)).await.unwrap();
        rig.send_one(a.outgoing, b"unread", None).await.unwrap();
        rig.receive_exactly(a.incoming, 2).await;
        rig.wait_readable(b.incoming).await;
        rig.close(a).await;
        rig.close(b).await;
        let stats = rig.stats();
        assert_eq!((stats.datagrams_sent, stats.bytes_sent), (4, 9));
        assert_eq!((stats.datagrams_received, stats.bytes_received), (5, 17));
        assert_eq!((stats.dropped_not_from_peer, stats.dropped_at_close), (1, 2));
        assert_eq!((stats.dropped_by_policy, stats.dropped_malformed), (0, 0));
    });
}
