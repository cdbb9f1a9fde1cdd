//! Batches of datagrams out and in, and the permits to send them.

use std::net::{Ipv4Addr, SocketAddr};

use crate::common::{
    Backend, Endpoint, ErrorCode, LOOPBACK, OutgoingDatagram, Rig, Setup, addr, alike, datagram,
    native, on, on_both, payloads, trap, yield_to_others,
};
use wasi_uring::Uring;

/// Datagrams with one byte each, the position in the batch.
fn numbered(count: u8, to: SocketAddr) -> Vec<OutgoingDatagram> {
    (0..count).map(|n| datagram(&[n], Some(to))).collect()
}

pub(crate) async fn pair(rig: &mut Rig, any: SocketAddr) -> (Endpoint, Endpoint) {
    (rig.endpoint(any).await, rig.endpoint(any).await)
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
        // Refused before a system call, refused by the kernel, and without a route.
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
fn receive_returns_no_more_than_its_argument_and_nothing_when_nothing_is_there() {
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
        let builder = Uring::builder().sockets(8).queue_datagrams(datagrams).queue_bytes(bytes);
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
            // By then the ring has queued what its queue holds.
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
                assert_eq!(native::receive_from(&native, &mut buffer), (1, endpoint.local));
                assert_eq!(buffer[0], n);
            }
        }
    });
}

/// (On stock, when tokio has heard of it.) Kills: a `receive`, which does not wait, that does not submit what its guest has sent before.
#[test]
fn a_receive_finds_what_its_guest_has_just_sent() {
    on(Backend::Uring, Setup::default(), async |rig| {
        let (a, b) = pair(rig, LOOPBACK).await;
        assert_eq!(rig.receive(b.incoming, 1).await, Ok(vec![]), "armed");
        for burst in 1..=16 {
            for n in 0..burst {
                rig.send_one(a.outgoing, &[n], Some(b.local)).await.unwrap();
            }
            let expected: Vec<_> = (0..burst).map(|n| vec![n]).collect();
            let mut heard = Vec::new();
            while heard.len() < expected.len() {
                let received = rig.receive(b.incoming, 16).await.unwrap();
                assert!(!received.is_empty(), "{} of {burst}", heard.len());
                heard.extend(payloads(&received).iter().map(|payload| payload.to_vec()));
            }
            assert_eq!(heard, expected);
        }
    });
}

#[test]
fn counters_show_what_went_through_and_what_was_withheld() {
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
