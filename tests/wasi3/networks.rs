//! Sends that wait because the send buffer is full, in networks too slow for them.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};

use wasi_uring::Uring;

use crate::common::network::{clog, flow, in_a_clogged_network};
use crate::common::{Backend, LOOPBACK, Setup, block_on, eventually, native, uring};
use crate::rig::{Call, Rig3, Status, V4, on, on_both};

const SECOND: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// A send buffer as small as can be, which one datagram fills.
async fn small(rig: &mut Rig3) -> u32 {
    let socket = rig.create(V4).await.unwrap();
    rig.set_send_buffer(socket, 1).await.unwrap();
    rig.bind(socket, LOOPBACK).await.unwrap();
    socket
}

/// A datagram that says its number.
fn numbered(n: u8) -> Vec<u8> {
    vec![n; 100]
}

/// Begins sends, numbered from `from` on, until so many wait; the number of the first that does.
async fn sends_that_wait(
    rig: &mut Rig3,
    socket: u32,
    from: u8,
    to: Option<SocketAddr>,
    count: usize,
) -> (u8, Vec<Call>) {
    let mut waiting = Vec::new();
    let mut first = from;
    for n in from..=u8::MAX {
        let (mut status, call) = rig.start_send(socket, &numbered(n), to).await;
        if status == Status::Started {
            rig.settle().await;
            status = rig.poll(call).await;
        }
        if status == Status::Started {
            waiting.push(call);
        } else {
            assert!(waiting.is_empty(), "none overtakes another");
            rig.sent(call).await.unwrap();
            first = n + 1;
        }
        if waiting.len() == count {
            return (first, waiting);
        }
    }
    panic!("the network takes everything");
}

/// Expects datagrams of these numbers, in any order, each once, and no others.
fn assert_hears(witness: &UdpSocket, numbers: impl IntoIterator<Item = u8>) {
    let mut heard = heard(witness);
    heard.sort_unstable();
    assert_eq!(heard, numbers.into_iter().collect::<Vec<_>>());
}

fn assert_hears_in_order(witness: &UdpSocket, numbers: impl IntoIterator<Item = u8>) {
    assert_eq!(heard(witness), numbers.into_iter().collect::<Vec<_>>());
}

/// The numbers of all that was sent to a witness.
fn heard(witness: &UdpSocket) -> Vec<u8> {
    const LAST: u8 = u8::MAX;
    let to = witness.local_addr().unwrap();
    native::socket(Ipv4Addr::LOCALHOST).0.send_to(&[LAST], to).unwrap();
    let mut heard = Vec::new();
    loop {
        let mut buffer = [0; 2000];
        witness.recv(&mut buffer).unwrap();
        if buffer[0] == LAST {
            break;
        }
        heard.push(buffer[0]);
    }
    heard
}

#[test]
fn a_send_that_finds_the_send_buffer_full_returns_when_it_drains() {
    in_a_clogged_network(|| {
        on_both(Setup::default(), async |rig| {
            let (witness, to) = native::socket(Ipv4Addr::LOCALHOST);
            let socket = small(rig).await;
            let (first, calls) = sends_that_wait(rig, socket, 0, Some(to), 3).await;
            // Other calls do not wait for it.
            let receive = rig.waiting_receive(socket).await;
            rig.set_hop_limit(socket, 7).await.unwrap();
            rig.local(socket).await.unwrap();
            flow();
            for call in calls {
                rig.sent(call).await.unwrap();
            }
            assert_hears(&witness, 0..first + 3);
            assert_eq!(rig.cancel(receive).await, Status::Cancelled);
            rig.drop_socket(socket).await;
            clog();
        });
    });
}

/// Kills: a cancelled send that is sent all the same.
#[test]
fn a_send_cancelled_while_it_waits_is_not_sent_and_its_socket_goes_on() {
    for leaves in 0..3 {
        in_a_clogged_network(|| {
            on(Backend::Uring, Setup::default(), async |rig| {
                cancel_one(rig, leaves).await;
                let uring = rig.rig.uring.clone();
                eventually("its slot is free", || uring.stats().sockets_open == 0).await;
            });
        });
        in_a_clogged_network(|| {
            on(Backend::Stock, Setup::default(), async |rig| cancel_one(rig, leaves).await);
        });
    }
}

/// Of three that wait. The socket is dropped then.
async fn cancel_one(rig: &mut Rig3, place: u8) {
    let (witness, to) = native::socket(Ipv4Addr::LOCALHOST);
    let socket = small(rig).await;
    let (first, mut calls) = sends_that_wait(rig, socket, 0, Some(to), 3).await;
    let cancelled = calls.remove(usize::from(place));
    assert_eq!(rig.cancel(cancelled).await, Status::Cancelled);
    rig.settle().await;
    flow();
    for call in calls {
        rig.sent(call).await.unwrap();
    }
    rig.send(socket, &numbered(100), Some(to)).await.unwrap();
    let left = (0..first + 3).filter(|n| *n != first + place);
    assert_hears(&witness, left.chain([100]));
    rig.drop_socket(socket).await;
}

#[test]
fn a_socket_all_of_whose_sends_were_cancelled_can_be_dropped_though_nothing_flows() {
    in_a_clogged_network(|| {
        let uring = uring();
        let setup = Setup { sockets_max: 1, ..Setup::of(&uring) };
        on(Backend::Uring, setup, async |rig| {
            let (_witness, to) = native::socket(Ipv4Addr::LOCALHOST);
            for _ in 0..3 {
                let socket = small(rig).await;
                let (_, calls) = sends_that_wait(rig, socket, 0, Some(to), 5).await;
                for call in calls {
                    assert_eq!(rig.cancel(call).await, Status::Cancelled);
                }
                rig.drop_socket(socket).await;
                eventually("its slot is free", || uring.stats().sockets_open == 0).await;
            }
        });
    });
}

/// Kills: a dropped store whose waiting sends are not cancelled in the kernel.
#[test]
fn a_store_dropped_with_sends_that_wait_frees_everything_though_nothing_flows() {
    in_a_clogged_network(|| {
        block_on(async {
            let uring = uring();
            let (witness, to) = native::socket(Ipv4Addr::LOCALHOST);
            let mut rig = Rig3::on_ring(&uring).await;
            let mut first = 0;
            for _ in 0..3 {
                let socket = small(&mut rig).await;
                let (next, _) = sends_that_wait(&mut rig, socket, first, Some(to), 70).await;
                first = next;
            }
            drop(rig);
            eventually("the slots are free", || uring.stats().sockets_open == 0).await;
            flow();
            assert_hears(&witness, 0..first);
        });
    });
}

#[test]
fn of_many_sends_that_wait_one_is_in_the_ring_and_all_are_sent_in_their_order() {
    const SENDS: usize = 200;
    in_a_clogged_network(|| {
        let uring = uring();
        on(Backend::Uring, Setup::of(&uring), async |rig| {
            let (witness, to) = native::socket(Ipv4Addr::LOCALHOST);
            let socket = small(rig).await;
            let (first, calls) = sends_that_wait(rig, socket, 0, Some(to), 1).await;
            let before = uring.stats().submissions;
            let (same, more) = sends_that_wait(rig, socket, first + 1, Some(to), SENDS - 1).await;
            assert_eq!(same, first + 1, "none of these was sent");
            assert_eq!(uring.stats().submissions, before, "these are not in the ring");
            assert_eq!(uring.stats().datagrams_sent, u64::from(first));
            // Some of either kind are cancelled.
            let mut kept = Vec::new();
            for (n, call) in (first..).zip(calls.into_iter().chain(more)) {
                if n % 5 == 0 {
                    assert_eq!(rig.cancel(call).await, Status::Cancelled);
                } else {
                    kept.push((n, call));
                }
            }
            flow();
            let numbers: Vec<_> = kept.iter().map(|(n, _)| *n).collect();
            for (_, call) in kept {
                rig.sent(call).await.unwrap();
            }
            assert_hears_in_order(&witness, (0..first).chain(numbers));
        });
    });
}

/// The kernel reads the peer when it takes the datagram. Kills: an entry of a connected socket that names
/// the peer, past what the kernel has made of it.
#[test]
fn a_send_that_waits_reaches_the_peer_that_the_socket_has_then() {
    in_a_clogged_network(|| {
        on_both(Setup::default(), async |rig| {
            let (first, first_addr) = native::socket(Ipv4Addr::LOCALHOST);
            let (second, second_addr) = native::socket(SECOND);
            let socket = small(rig).await;
            rig.connect(socket, first_addr).await.unwrap();
            let (next, calls) = sends_that_wait(rig, socket, 0, None, 3).await;
            rig.connect(socket, second_addr).await.unwrap();
            flow();
            for call in calls {
                rig.sent(call).await.unwrap();
            }
            rig.send(socket, &numbered(100), None).await.unwrap();
            assert_hears(&first, 0..next);
            assert_hears(&second, (next..next + 3).chain([100]));
            rig.drop_socket(socket).await;
            clog();
        });
    });
}

/// The kernel cancels what a thread has submitted when that thread exits.
#[test]
fn sends_that_wait_are_sent_once_although_their_thread_exits() {
    in_a_clogged_network(|| {
        let uring: Uring = uring();
        let (witness, to) = native::socket(Ipv4Addr::LOCALHOST);
        let begin = || {
            block_on(async {
                let mut rig = Rig3::on_ring(&uring).await;
                let socket = small(&mut rig).await;
                let (first, calls) = sends_that_wait(&mut rig, socket, 0, Some(to), 3).await;
                (rig, first, calls)
            })
        };
        let (mut rig, first, calls) =
            std::thread::scope(|scope| scope.spawn(begin).join()).unwrap();
        block_on(async {
            flow();
            for call in calls {
                rig.sent(call).await.unwrap();
            }
        });
        assert_hears(&witness, 0..first + 3);
    });
}
