//! Coalesced datagrams: several of one size as one message, out (`UDP_SEGMENT`) and in (`UDP_GRO`).
//! Guests must not notice. Networks that do not take such messages, or not yet, are in
//! `networks.rs`.

use std::net::{Ipv4Addr, SocketAddr};

use proptest::prelude::*;
use wasi_uring::{SocketAddrUse, Stats, Uring};

use crate::common::{
    Backend, Endpoint, ErrorCode, IncomingDatagram, LOOPBACK, LOOPBACK_6, OutgoingDatagram, Rig,
    Setup, addr, datagram, eventually, native, on, on_both, own_ip, payloads, rest, sender,
    yield_to_others,
};
use crate::datagrams::pair;

/// The payload of the `n`th datagram of a test, whose bytes differ from its neighbours' everywhere.
pub(crate) fn content(n: usize, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| u8::try_from((n * 7 + at) % 251).unwrap()).collect()
}

/// Datagrams of these sizes.
pub(crate) fn batch(sizes: &[usize], to: Option<SocketAddr>) -> Vec<OutgoingDatagram> {
    let contents = sizes.iter().enumerate().map(|(n, bytes)| content(n, *bytes));
    contents.map(|data| datagram(&data, to)).collect()
}

/// Fails unless these are the datagrams sent, in order, from this sender.
#[track_caller]
pub(crate) fn assert_heard(
    heard: &[IncomingDatagram],
    sent: &[OutgoingDatagram],
    from: SocketAddr,
) {
    let sizes: Vec<_> = heard.iter().map(|datagram| datagram.data.len()).collect();
    let sent: Vec<_> = sent.iter().map(|datagram| &*datagram.data).collect();
    assert!(payloads(heard) == sent, "heard {} datagrams of {sizes:?}", heard.len());
    assert!(heard.iter().all(|datagram| sender(datagram) == from));
}

/// Has the ring turn GRO on for a socket, by a batch that arrives at once.
async fn turn_gro_on(rig: &mut Rig, from: Endpoint, to: Endpoint) {
    let sent = batch(&[1; 16], Some(to.local));
    assert_eq!(rig.receive(to.incoming, 1).await, Ok(vec![]), "armed");
    assert_eq!(rig.send_all(from.outgoing, &sent).await, Ok(16));
    assert_heard(&rig.receive_exactly(to.incoming, 16).await, &sent, from.local);
}

// ---- there --------------------------------------------------------------------------------------

#[test]
fn equal_datagrams_arrive_as_those_that_were_sent() {
    on_both(Setup::default(), async |rig| {
        // The last of them more than one message holds.
        for (any, bytes) in [(LOOPBACK, 1), (LOOPBACK_6, 1), (LOOPBACK, 1472), (LOOPBACK_6, 4100)] {
            let (a, b) = pair(rig, any).await;
            let before = rig.stats().datagrams_coalesced;
            // First one by one, from the second batch on in one message.
            for _ in 0..3 {
                let sent = batch(&[bytes; 16], Some(b.local));
                assert_eq!(rig.send_all(a.outgoing, &sent).await, Ok(16));
                assert_heard(&rig.receive_exactly(b.incoming, 16).await, &sent, a.local);
            }
            if rig.backend == Backend::Uring {
                let coalesced = if bytes == 4100 { 15 } else { 16 };
                assert_eq!(rig.stats().datagrams_coalesced - before, 3 * coalesced);
            }
        }
    });
}

#[test]
fn plain_sockets_receive_what_a_guest_sent_coalesced() {
    on(Backend::Uring, Setup::default(), async |rig| {
        for any in [LOOPBACK, LOOPBACK_6] {
            let (native, to) = native::socket(any.ip());
            let mut guest = rig.endpoint(any).await;
            for connected in [false, true] {
                if connected {
                    rig.reconnect(&mut guest, Some(to)).await.unwrap();
                }
                let sent = batch(&[1000; 16], (!connected).then_some(to));
                assert_eq!(rig.send_all(guest.outgoing, &sent).await, Ok(16));
                for expected in sent {
                    let mut buffer = [0; 1001];
                    assert_eq!(native::receive_from(&native, &mut buffer), (1000, guest.local));
                    assert_eq!(buffer[..1000], expected.data);
                }
            }
        }
        // The ring's own thread, which may have sent the last, has told the receiver before it counts.
        eventually("all are counted", || rig.stats().datagrams_coalesced >= 64).await;
        assert_eq!(rig.stats().datagrams_coalesced, 64);
    });
}

/// A size, which of the receivers, and how many of them in a row.
type Alike = (usize, usize, usize);

fn batches() -> impl Strategy<Value = Vec<Vec<Alike>>> {
    let size = prop::sample::select(vec![0, 1, 2, 100, 101, 1472, 4000]);
    let alike = (size, 0..3_usize, 1..17_usize);
    proptest::collection::vec(proptest::collection::vec(alike, 1..6), 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_time: 60_000, ..ProptestConfig::default() })]

    /// A failing batch is shown, and its seed.
    #[test]
    fn whatever_a_batch_is_made_of_every_datagram_arrives_once_and_in_order(
        batches in batches(), six: bool, connected: bool,
    ) {
        let any = if six { LOOPBACK_6 } else { LOOPBACK };
        on_both(Setup::default(), async |rig| {
            let mut from = rig.endpoint(any).await;
            let receivers = [rig.endpoint(any).await, rig.endpoint(any).await];
            let (plain, plain_addr) = native::socket(any.ip());
            let addrs = [receivers[0].local, receivers[1].local, plain_addr];
            if connected {
                rig.reconnect(&mut from, Some(addrs[0])).await.unwrap();
            }
            for alike in &batches {
                let each = alike.iter().flat_map(|(bytes, to, times)| vec![(*bytes, *to); *times]);
                let each = each.take(16).enumerate().map(|(n, (bytes, to))| {
                    // A connected socket may name its peer or not.
                    let to = if connected { (to == 0).then_some(addrs[0]) } else { Some(addrs[to]) };
                    datagram(&content(n, bytes), to)
                });
                let sent: Vec<_> = each.collect();
                let count = rig.send_all(from.outgoing, &sent).await;
                assert_eq!(count, Ok(sent.len() as u64));
                let sent_to = |addr: SocketAddr| -> Vec<OutgoingDatagram> {
                    let peer = datagram(b"", Some(addr)).remote_address;
                    let is_peers = connected && addr == addrs[0];
                    sent.iter()
                        .filter(|datagram| is_peers || (!connected && datagram.remote_address == peer))
                        .cloned()
                        .collect()
                };
                for to in receivers {
                    let sent = sent_to(to.local);
                    let heard = rig.receive_exactly(to.incoming, sent.len()).await;
                    assert_heard(&heard, &sent, from.local);
                }
                for expected in sent_to(plain_addr) {
                    let mut buffer = [0; 4096];
                    let (bytes, addr) = native::receive_from(&plain, &mut buffer);
                    assert!(buffer[..bytes] == expected.data && addr == from.local);
                }
            }
            for to in receivers {
                assert_eq!(rig.receive(to.incoming, 1).await, Ok(vec![]), "no datagram twice");
            }
        });
    }
}

// ---- refused ------------------------------------------------------------------------------------

/// Kills: a failing message counted as a whole; a retry that repeats what was sent; a rest that is
/// lost.
#[test]
fn a_bad_datagram_among_equal_ones_ends_the_send_exactly_there() {
    const FORBIDDEN: &str = "127.0.0.2:9";
    const FAR: &str = "198.51.100.1:9";
    let setup = Setup::allow(|to, _| to != addr(FORBIDDEN));
    let has_route = native::has_route(addr(FAR));
    let unroutable =
        if has_route { ErrorCode::InvalidArgument } else { ErrorCode::RemoteUnreachable };
    on_both(setup, async |rig| {
        let (a, b) = pair(rig, LOOPBACK).await;
        for (to, bytes, error) in [
            (FORBIDDEN, 100, ErrorCode::AccessDenied),
            ("127.0.0.1:0", 100, ErrorCode::InvalidArgument),
            ("[::1]:9", 100, ErrorCode::InvalidArgument),
            // These the kernel refuses: two coalesced, then each alone.
            (FAR, 100, unroutable),
            ("255.255.255.255:9", 100, ErrorCode::AccessDenied),
            ("127.0.0.1:9", 65_508, ErrorCode::DatagramTooLarge),
            ("127.0.0.1:9", 65_536, ErrorCode::DatagramTooLarge),
        ] {
            for good in [0, 1, 2, 13, 14] {
                let mut sent = batch(&[100; 16], Some(b.local));
                for bad in &mut sent[good..good + 2] {
                    *bad = datagram(&vec![0; bytes], Some(addr(to)));
                }
                let count = rig.send_all(a.outgoing, &sent).await;
                let expected = if good == 0 { Err(error) } else { Ok(good as u64) };
                assert_eq!(count, expected, "{to}, {bytes} B, behind {good}");
                assert_eq!(rig.send_all(a.outgoing, &sent[good..]).await, Err(error));
                let rest = sent.split_off(good + 2);
                if !rest.is_empty() {
                    assert_eq!(rig.send_all(a.outgoing, &rest).await, Ok(rest.len() as u64));
                }
                sent.truncate(good);
                sent.extend(rest);
                assert_heard(&rig.receive_exactly(b.incoming, 14).await, &sent, a.local);
                assert_eq!(rig.receive(b.incoming, 1).await, Ok(vec![]), "nothing twice");
            }
        }
    });
}

/// Kills: a slot that records a GSO refusal although the datagram alone is refused, too.
#[test]
fn a_refusal_that_is_not_due_to_coalescing_is_not_recorded() {
    on(Backend::Uring, Setup::default(), async |rig| {
        let (a, b) = pair(rig, LOOPBACK).await;
        // From a loopback address one cannot leave the machine.
        let refused = batch(&[1; 4], Some(addr("198.51.100.1:9")));
        assert!(rig.send_all(a.outgoing, &refused).await.is_err());
        let sent = batch(&[100; 16], Some(b.local));
        assert_eq!(rig.send_all(a.outgoing, &sent).await, Ok(16));
        let Stats { gso_refusals, datagrams_coalesced, .. } = rig.stats();
        assert_eq!((gso_refusals, datagrams_coalesced), (0, 16));
    });
}

/// Unlike wasmtime-wasi, which has the first datagram's result before it sends the second.
#[test]
fn a_refusal_is_answered_after_the_message_that_met_it() {
    on(Backend::Uring, Setup::default(), async |rig| {
        let closed = native::closed_port(own_ip());
        let (socket, _) = rig.bound(LOOPBACK).await;
        let (_, outgoing) = rig.stream(socket, Some(closed)).await.unwrap();
        let sent = batch(&[9; 3], None);
        for _ in 0..3 {
            assert_eq!(rig.send_all(outgoing, &sent).await, Ok(3));
            rest().await;
            let answer = rig.send_all(outgoing, &sent).await;
            assert_eq!(answer, Err(ErrorCode::ConnectionRefused));
        }
        assert_eq!(rig.stats().gso_refusals, 0);
    });
}

// ---- heard or not -------------------------------------------------------------------------------

#[test]
fn a_receive_of_less_than_a_message_leaves_the_rest_in_order() {
    on_both(Setup::default(), async |rig| {
        let (a, b) = pair(rig, LOOPBACK).await;
        for _ in 0..3 {
            let sent = batch(&[100; 16], Some(b.local));
            assert_eq!(rig.send_all(a.outgoing, &sent).await, Ok(16));
            let mut heard = Vec::new();
            for most in [1, 5, 7, 2, 1] {
                rig.wait_readable(b.incoming).await;
                let some = rig.receive(b.incoming, most).await.unwrap();
                assert!(some.len() as u64 <= most);
                heard.extend(some);
            }
            let rest = 16 - heard.len();
            heard.extend(rig.receive_exactly(b.incoming, rest).await);
            assert_heard(&heard, &sent, a.local);
        }
    });
}

#[test]
fn a_connected_socket_hears_of_messages_queued_before_only_its_peers() {
    on_both(Setup::default(), async |rig| {
        for gro in [false, true] {
            let (mut a, b) = pair(rig, LOOPBACK).await;
            let stranger = rig.endpoint(LOOPBACK).await;
            if gro {
                turn_gro_on(rig, b, a).await;
            }
            let early = batch(&[100; 10], Some(a.local));
            for endpoint in [stranger, b, stranger] {
                assert_eq!(rig.send_all(endpoint.outgoing, &early).await, Ok(10));
            }
            rig.reconnect(&mut a, Some(b.local)).await.unwrap();
            assert_eq!(rig.send_all(stranger.outgoing, &early).await, Ok(10));
            let late = batch(&[50; 6], Some(a.local));
            assert_eq!(rig.send_all(b.outgoing, &late).await, Ok(6));
            let before = rig.stats().dropped_not_from_peer;
            let heard = rig.receive_exactly(a.incoming, 16).await;
            assert_heard(&heard, &[early, late].concat(), b.local);
            assert_eq!(rig.receive(a.incoming, 16).await, Ok(vec![]));
            if rig.backend == Backend::Uring {
                assert_eq!(rig.stats().dropped_not_from_peer - before, 20);
            }
        }
    });
}

#[test]
fn a_message_of_a_refused_sender_is_withheld_and_counted_by_datagram() {
    let (friend, friend_addr) = native::socket(Ipv4Addr::LOCALHOST);
    let setup = Setup::allow(move |addr, use_| {
        !matches!(use_, SocketAddrUse::UdpReceive) || addr == friend_addr
    });
    on_both(setup, async |rig| {
        let (stranger, b) = pair(rig, LOOPBACK).await;
        assert_eq!(rig.receive(b.incoming, 1).await, Ok(vec![]), "armed");
        for message in 1..=3 {
            let withheld = batch(&[100; 16], Some(b.local));
            // Before it as well, so that one receive meets both.
            friend.send_to(b"heard", b.local).unwrap();
            assert_eq!(rig.send_all(stranger.outgoing, &withheld).await, Ok(16));
            rest().await;
            friend.send_to(b"heard", b.local).unwrap();
            assert_eq!(payloads(&rig.receive_exactly(b.incoming, 2).await), [b"heard"; 2]);
            if rig.backend == Backend::Uring {
                assert_eq!(rig.stats().dropped_by_policy, 16 * message);
                assert_eq!(rig.stats().datagrams_split, 16 * (message - 1));
            }
        }
    });
}

#[test]
fn a_full_queue_pauses_and_loses_nothing_of_the_messages_it_gets() {
    for (datagrams, bytes) in [(4, 1 << 20), (20, 1 << 20), (64, 1000), (1, 1)] {
        let builder = Uring::builder().sockets(8).queue_datagrams(datagrams).queue_bytes(bytes);
        let uring = builder.build().unwrap();
        on_both(Setup::of(&uring), async |rig| {
            let (a, b) = pair(rig, LOOPBACK).await;
            rig.set_receive_buffer(b.socket, 1 << 20).await.unwrap();
            turn_gro_on(rig, a, b).await;
            for _ in 0..3 {
                let sent: Vec<_> =
                    (1..=8).flat_map(|n| batch(&[90 + n; 16], Some(b.local))).collect();
                for batch in sent.chunks(16) {
                    // wasmtime-wasi sends no more than tokio's budget of one poll.
                    yield_to_others().await;
                    assert_eq!(rig.send_all(a.outgoing, batch).await, Ok(16));
                }
                assert_heard(&rig.receive_exactly(b.incoming, 128).await, &sent, a.local);
                assert_eq!(rig.receive(b.incoming, 1).await, Ok(vec![]));
            }
        });
        let Stats { pauses, datagrams_received, datagrams_sent, .. } = uring.stats();
        assert!(pauses > 0, "{uring:?}");
        assert_eq!((datagrams_sent, datagrams_received), (400, 400));
    }
}

// ---- counters -----------------------------------------------------------------------------------

#[test]
fn counters_show_what_was_coalesced_either_way() {
    on(Backend::Uring, Setup::default(), async |rig| {
        let (a, b) = pair(rig, LOOPBACK).await;
        let mut expected = Stats::default();
        // Sizes, and how many of them are sent coalesced and received coalesced: equal ones and a
        // shorter one behind them; no empty one and no larger one; none received before GRO is on.
        let mixed = [0, 9, 9, 9, 5, 9, 0, 9, 10];
        for (sizes, coalesced, split) in [
            (&[100][..], 0, 0),
            (&[100; 16], 16, 0),
            (&[100; 16], 16, 16),
            (&[100], 0, 0),
            (&[100, 100, 99, 98], 3, 3),
            (&mixed, 4, 4),
            (&[2, 1], 2, 2),
        ] {
            let sent = batch(sizes, Some(b.local));
            assert_eq!(rig.send_all(a.outgoing, &sent).await, Ok(sizes.len() as u64));
            assert_heard(&rig.receive_exactly(b.incoming, sizes.len()).await, &sent, a.local);
            let bytes = sizes.iter().sum::<usize>() as u64;
            expected.datagrams_sent += sizes.len() as u64;
            expected.datagrams_coalesced += coalesced;
            expected.datagrams_split += split;
            expected.bytes_sent += bytes;
            let stats = rig.stats();
            assert_eq!(stats.datagrams_sent, expected.datagrams_sent);
            assert_eq!(stats.datagrams_received, expected.datagrams_sent);
            assert_eq!(stats.datagrams_coalesced, expected.datagrams_coalesced, "{sizes:?}");
            assert_eq!(stats.datagrams_split, expected.datagrams_split, "{sizes:?}");
            assert_eq!(
                (stats.bytes_sent, stats.bytes_received, stats.gso_refusals),
                (expected.bytes_sent, expected.bytes_sent, 0)
            );
        }
        rig.close(b).await;
        assert_eq!((rig.stats().dropped_at_close, rig.stats().dropped_by_kernel), (0, 0));
    });
}
