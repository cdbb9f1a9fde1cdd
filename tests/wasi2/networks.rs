//! Networks of a test's own: with an MTU too small for some datagrams, or too slow for a sender.
//! Made with ip(8) and tc(8), as root.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::thread;

use wasi_uring::{Stats, Uring};

use crate::coalesced::{assert_heard, batch, content};
use crate::common::network::{flow, in_a_clogged_network, in_a_network, run};
use crate::common::{
    Backend, Endpoint, ErrorCode, LOOPBACK, LOOPBACK_6, Rig, Setup, block_on, datagram, eventually,
    native, on, on_both, rest, uring, yield_to_others,
};
use crate::datagrams::pair;

// ---- small packets ------------------------------------------------------------------------------

#[test]
fn datagrams_beyond_the_mtu_are_sent_apart_after_one_refusal() {
    in_a_network(1280, || {
        on_both(Setup::default(), async |rig| {
            for any in [LOOPBACK, LOOPBACK_6] {
                for connected in [false, true] {
                    let (mut a, b) = pair(rig, any).await;
                    if connected {
                        rig.reconnect(&mut a, Some(b.local)).await.unwrap();
                    }
                    let before = rig.stats();
                    for (bytes, refusals, coalesced) in
                        [(1400, 1, 0), (1400, 1, 0), (1000, 1, 16), (1400, 1, 16), (1000, 1, 32)]
                    {
                        let sent = batch(&[bytes; 16], (!connected).then_some(b.local));
                        assert_eq!(rig.send_all(a.outgoing, &sent).await, Ok(16));
                        let heard = rig.receive_exactly(b.incoming, 16).await;
                        assert_heard(&heard, &sent, a.local);
                        if rig.backend == Backend::Uring {
                            let after = rig.stats();
                            assert_eq!(after.gso_refusals - before.gso_refusals, refusals);
                            let now = after.datagrams_coalesced - before.datagrams_coalesced;
                            assert_eq!(now, coalesced, "{bytes} B");
                        }
                    }
                }
            }
        });
    });
}

/// The count of what went before, and after, is exact.
#[test]
fn a_batch_of_which_some_are_beyond_the_mtu_arrives_in_order() {
    in_a_network(1280, || {
        on_both(Setup::default(), async |rig| {
            let (a, b) = pair(rig, LOOPBACK).await;
            let sizes = [9, 9, 1400, 1400, 1400, 1300, 0, 1252, 1252, 1253, 1253, 7];
            let mut sent = batch(&sizes, Some(b.local));
            assert_eq!(rig.send_all(a.outgoing, &sent).await, Ok(12));
            assert_heard(&rig.receive_exactly(b.incoming, 12).await, &sent, a.local);
            sent[4].data = vec![0; 65_508];
            let answer = rig.send_all(a.outgoing, &sent).await;
            assert_eq!(answer, Ok(4));
            assert_heard(&rig.receive_exactly(b.incoming, 4).await, &sent[..4], a.local);
            assert_eq!(rig.receive(b.incoming, 1).await, Ok(vec![]), "nothing twice");
            if rig.backend == Backend::Uring {
                // At 1400, at 1253, and none in the second batch: 1252 bytes fit.
                assert_eq!(rig.stats().gso_refusals, 2);
            }
        });
    });
}

// ---- slow ones ----------------------------------------------------------------------------------

const SECOND: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
const THIRD: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);

/// Three witnesses of what a guest sends in one batch: eight datagrams for the first, some of which
/// the interface delays; four for the second, which wait then, since the guest's send buffer is as
/// small as can be; and behind them three for the third, too large to be coalesced.
struct Witnesses([(UdpSocket, SocketAddr); 3]);

/// How many, and of how many bytes, each is sent.
const TESTIMONY: [(usize, usize); 3] = [(8, 1000), (4, 1000), (3, 1600)];

impl Witnesses {
    fn new() -> Self {
        Self([Ipv4Addr::LOCALHOST, SECOND, THIRD].map(native::socket))
    }

    async fn have_it_sent(&self, rig: &mut Rig) -> Endpoint {
        let endpoint = rig.endpoint(LOOPBACK).await;
        rig.set_send_buffer(endpoint.socket, 1).await.unwrap();
        let sent: Vec<_> = TESTIMONY
            .iter()
            .zip(&self.0)
            .flat_map(|((times, bytes), (_, addr))| batch(&vec![*bytes; *times], Some(*addr)))
            .collect();
        assert_eq!(rig.send_all(endpoint.outgoing, &sent).await, Ok(15), "took or will take");
        assert_eq!(rig.check_send(endpoint.outgoing).await, Ok(0), "the second message waits");
        endpoint
    }

    /// Everything, once and in order, and nothing else.
    fn have_all(&self) {
        const LAST: &[u8] = b"the last";
        for ((witness, addr), (times, bytes)) in self.0.iter().zip(TESTIMONY) {
            native::socket(Ipv4Addr::LOCALHOST).0.send_to(LAST, addr).unwrap();
            let expected = (0..times).map(|n| content(n, bytes)).chain([LAST.to_vec()]);
            for (n, expected) in expected.enumerate() {
                let mut buffer = [0; 2000];
                let bytes = native::receive(witness, &mut buffer);
                assert!(buffer[..bytes] == expected, "{n} of {times}: {bytes} bytes");
            }
        }
    }
}

#[test]
fn messages_deferred_by_a_full_send_buffer_delay_the_next_send_and_leave_when_it_drains() {
    in_a_clogged_network(|| {
        on(Backend::Uring, Setup::default(), async |rig| {
            let witnesses = Witnesses::new();
            let endpoint = witnesses.have_it_sent(rig).await;
            let pollable = rig.subscribe_outgoing(endpoint.outgoing).await;
            assert!(!rig.is_ready(pollable).await);
            // The guest blocks first.
            let unclog = async { flow() };
            tokio::join!(biased; rig.block(pollable), unclog);
            assert_eq!(rig.check_send(endpoint.outgoing).await, Ok(16));
            witnesses.have_all();
            rig.drop_pollable(pollable).await;
            rig.close(endpoint).await;
            let stats = rig.stats();
            assert_eq!((stats.datagrams_sent, stats.datagrams_coalesced), (15, 12));
            assert_eq!((stats.bytes_sent, stats.gso_refusals), (16_800, 1));
        });
    });
}

#[test]
fn messages_deferred_by_a_full_send_buffer_leave_although_their_socket_is_dropped() {
    for guest_ends in [false, true] {
        in_a_clogged_network(|| {
            let uring = uring();
            let witnesses = Witnesses::new();
            block_on(async {
                let mut rig = Rig::on_ring(&uring).await;
                let endpoint = witnesses.have_it_sent(&mut rig).await;
                if guest_ends {
                    drop(rig);
                } else {
                    rig.close(endpoint).await;
                }
                yield_to_others().await;
                let Stats { sockets_open, datagrams_sent, .. } = uring.stats();
                assert_eq!((sockets_open, datagrams_sent), (1, 0), "it waits");
                flow();
                eventually("its slot is free", || uring.stats().sockets_open == 0).await;
                assert_eq!(uring.stats().datagrams_sent, 15);
            });
            witnesses.have_all();
        });
    }
}

/// As stock's, which keep nothing. Kills: a guest that has the host keep a batch for each of its sockets.
#[test]
fn what_waits_for_send_buffer_is_bounded_for_all_sockets_of_a_guest_together() {
    const SOCKETS: usize = 8;
    in_a_clogged_network(|| {
        let setup = Setup { send_bytes_max: 30_000, ..Setup::default() };
        on(Backend::Uring, setup, async |rig| {
            let (witness, to) = native::socket(Ipv4Addr::LOCALHOST);
            let mut accepted = Vec::new();
            let mut endpoints = Vec::new();
            for at in 0..SOCKETS {
                let mark = u8::try_from(at).unwrap();
                let endpoint = rig.endpoint(LOOPBACK).await;
                rig.set_send_buffer(endpoint.socket, 1).await.unwrap();
                let mut taken = 0;
                for _ in 0..4 {
                    let sent: Vec<_> = (0..16).map(|_| datagram(&[mark; 1200], Some(to))).collect();
                    if rig.check_send(endpoint.outgoing).await == Ok(16) {
                        taken += rig.send_all(endpoint.outgoing, &sent).await.unwrap();
                    }
                }
                assert_eq!(
                    rig.check_send(endpoint.outgoing).await,
                    Ok(0),
                    "no send buffer is left"
                );
                accepted.push(taken);
                endpoints.push(endpoint);
            }
            // One socket's batches wait; of the others' the kernel has taken the first or two.
            assert!(accepted[0] >= 16, "{accepted:?}");
            assert!(accepted[2..].iter().all(|taken| (1..16).contains(taken)), "{accepted:?}");
            // And they go on when there is room.
            let pollable = rig.subscribe_outgoing(endpoints[SOCKETS - 1].outgoing).await;
            let unclog = async { flow() };
            tokio::join!(biased; rig.block(pollable), unclog);
            let all: u64 = accepted.iter().sum();
            let mut heard = [0_u64; SOCKETS];
            let mut buffer = [0; 2000];
            for _ in 0..all {
                assert_eq!(native::receive(&witness, &mut buffer), 1200);
                heard[usize::from(buffer[0])] += 1;
            }
            assert_eq!(heard.to_vec(), accepted, "what was accepted, and nothing else");
            let more = vec![datagram(b"more", Some(to)); 16];
            for endpoint in &endpoints {
                let pollable = rig.subscribe_outgoing(endpoint.outgoing).await;
                rig.block(pollable).await;
                assert_eq!(rig.check_send(endpoint.outgoing).await, Ok(16));
                assert_eq!(rig.send_all(endpoint.outgoing, &more).await, Ok(16), "all home");
            }
        });
    });
}

/// As wasmtime-wasi's end with the store. Kills: sends of a guest that is gone which hold its slots, and
/// memory, for as long as nothing flows.
#[test]
fn deferred_messages_are_given_up_a_while_after_their_guest_is_gone() {
    in_a_clogged_network(|| {
        let uring = uring();
        block_on(async {
            let mut rig = Rig::on_ring(&uring).await;
            Witnesses::new().have_it_sent(&mut rig).await;
            drop(rig);
            eventually("its slot is free", || uring.stats().sockets_open == 0).await;
            let [(first, _), ..] = TESTIMONY;
            assert_eq!(uring.stats().datagrams_sent, first as u64, "what the kernel had taken");
        });
    });
}

/// Kills: a connect that does not wait for deferred sends, whose entries name no peer.
#[test]
fn deferred_messages_reach_the_peer_they_were_sent_to_although_the_socket_gets_another() {
    for next in [None, Some(())] {
        in_a_clogged_network(|| {
            on(Backend::Uring, Setup::default(), async |rig| {
                let [(first, first_addr), (second, second_addr), _] = Witnesses::new().0;
                let mut endpoint = rig.endpoint(LOOPBACK).await;
                rig.set_send_buffer(endpoint.socket, 1).await.unwrap();
                rig.reconnect(&mut endpoint, Some(first_addr)).await.unwrap();
                for _ in 0..2 {
                    let sent = batch(&[1000; 8], None);
                    assert_eq!(rig.send_all(endpoint.outgoing, &sent).await, Ok(8));
                    rest().await;
                }
                assert_eq!(rig.check_send(endpoint.outgoing).await, Ok(0), "the second waits");
                let unclog = async {
                    // Time enough for a connect that does not wait.
                    for _ in 0..20 {
                        yield_to_others().await;
                    }
                    flow();
                };
                let next = next.map(|()| second_addr);
                let (connected, ()) =
                    tokio::join!(biased; rig.reconnect(&mut endpoint, next), unclog);
                connected.unwrap();
                native::socket(Ipv4Addr::LOCALHOST).0.send_to(b"alone", second_addr).unwrap();
                let mut buffer = [0; 2000];
                for n in (0..8).chain(0..8) {
                    let bytes = native::receive(&first, &mut buffer);
                    assert!(buffer[..bytes] == content(n, 1000), "{n}: {bytes} bytes");
                }
                let bytes = native::receive(&second, &mut buffer);
                assert_eq!(&buffer[..bytes], b"alone");
            });
        });
    }
}

#[test]
fn the_error_of_a_deferred_send_is_the_answer_of_the_next() {
    in_a_clogged_network(|| {
        on(Backend::Uring, Setup::default(), async |rig| {
            let witnesses = Witnesses::new();
            let endpoint = witnesses.have_it_sent(rig).await;
            run(&format!("ip route add unreachable {SECOND} table local"));
            flow();
            let pollable = rig.subscribe_outgoing(endpoint.outgoing).await;
            rig.block(pollable).await;
            let again = batch(&[9; 2], Some(witnesses.0[0].1));
            let answer = rig.send_all(endpoint.outgoing, &again).await;
            assert_eq!(answer, Err(ErrorCode::RemoteUnreachable));
            assert_eq!(rig.stats().datagrams_sent, 8);
            assert_eq!(rig.send_all(endpoint.outgoing, &again).await, Ok(2));
        });
    });
}

/// The kernel cancels what a thread has submitted when that thread exits.
#[test]
fn deferred_messages_are_sent_once_although_their_thread_exits() {
    in_a_clogged_network(|| {
        let uring = uring();
        let witnesses = Witnesses::new();
        let send = || {
            block_on(async {
                let mut rig = Rig::on_ring(&uring).await;
                let endpoint = witnesses.have_it_sent(&mut rig).await;
                (rig, endpoint)
            })
        };
        let (mut rig, endpoint) = thread::scope(|scope| scope.spawn(send).join()).unwrap();
        block_on(async {
            assert_eq!(rig.check_send(endpoint.outgoing).await, Ok(0), "it still waits");
            flow();
            let pollable = rig.subscribe_outgoing(endpoint.outgoing).await;
            rig.block(pollable).await;
            witnesses.have_all();
            rig.drop_pollable(pollable).await;
            rig.close(endpoint).await;
        });
        assert_eq!(uring.stats().datagrams_sent, 15);
    });
}

// ---- what the kernel drops ------------------------------------------------------------------------

/// How many datagrams the kernel has dropped for a socket: the last column of its table, exact where
/// no other sockets come and go.
fn kernel_drops(local: SocketAddr) -> u64 {
    let table = std::fs::read_to_string("/proc/thread-self/net/udp").unwrap();
    let port = format!(":{:04X}", local.port());
    let mut lines = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let line = lines.find(|columns| columns[1].ends_with(&port)).expect("a bound socket");
    line.last().unwrap().parse().unwrap()
}

#[test]
fn what_the_kernel_drops_is_counted_when_the_socket_closes() {
    const FLOOD: u64 = 2000;
    in_a_network(65_536, || {
        let uring =
            Uring::builder().sockets(8).queue_datagrams(8).queue_bytes(1 << 20).build().unwrap();
        on(Backend::Uring, Setup::of(&uring), async |rig| {
            let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
            let b = rig.endpoint(LOOPBACK).await;
            rig.set_receive_buffer(b.socket, 10_000).await.unwrap();
            assert_eq!(rig.receive(b.incoming, 1).await, Ok(vec![]), "armed");
            for _ in 0..FLOOD {
                native.send_to(&[0; 100], b.local).unwrap();
            }
            let mut taken = 0;
            while taken + kernel_drops(b.local) < FLOOD {
                taken += rig.receive_blocking(b.incoming).await.unwrap().len() as u64;
            }
            let dropped = kernel_drops(b.local);
            assert!(dropped > 0 && taken + dropped == FLOOD, "{taken} taken, {dropped} dropped");
            assert_eq!(rig.stats().dropped_by_kernel, 0, "not asked yet");
            rig.close(b).await;
            eventually("its slot is free", || uring.stats().sockets_open == 0).await;
            let Stats { datagrams_received, dropped_by_kernel, .. } = uring.stats();
            assert_eq!((datagrams_received, dropped_by_kernel), (taken, dropped));
        });
    });
}
