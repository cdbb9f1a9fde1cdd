//! Sends that wait because the send buffer is full, in networks too slow for them.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};

use wasi_uring::Uring;

use crate::common::network::{clog, flow, in_a_clogged_network};
use crate::common::{Backend, LOOPBACK, Setup, block_on, eventually, native, rest, uring};
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
fn numbered(n: u16) -> Vec<u8> {
    n.to_le_bytes().repeat(50)
}

/// Beyond the numbers of what tests send.
const MARK: u16 = 10_000;
const LAST: u16 = u16::MAX;

/// Begins sends, numbered from `from` on, until so many wait; the number of the first that does.
async fn sends_that_wait(
    rig: &mut Rig3,
    socket: u32,
    from: u16,
    to: Option<SocketAddr>,
    count: usize,
) -> (u16, Vec<Call>) {
    let mut waiting = Vec::new();
    let mut first = from;
    for n in from..MARK {
        let (mut status, call) = rig.start_send(socket, &numbered(n), to).await;
        // Not for another thread, which submits what was sent before.
        let looks = if waiting.is_empty() { 5 } else { 1 };
        for _ in 0..looks {
            if status == Status::Started {
                rest().await;
                status = rig.poll(call).await;
            }
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
fn assert_hears(witness: &UdpSocket, numbers: impl IntoIterator<Item = u16>) {
    let numbers: Vec<_> = numbers.into_iter().collect();
    let mut heard = heard(witness, numbers.len());
    heard.sort_unstable();
    assert_eq!(heard, numbers);
}

fn assert_hears_in_order(witness: &UdpSocket, numbers: impl IntoIterator<Item = u16>) {
    let numbers: Vec<_> = numbers.into_iter().collect();
    assert_eq!(heard(witness, numbers.len()), numbers);
}

/// The numbers of all that was sent to a witness, which are so many: what was deferred comes a little later
/// than it was sent.
fn heard(witness: &UdpSocket, count: usize) -> Vec<u16> {
    let to = witness.local_addr().unwrap();
    let mut heard = Vec::new();
    let next = || {
        let mut buffer = [0; 2000];
        native::receive(witness, &mut buffer);
        u16::from_le_bytes([buffer[0], buffer[1]])
    };
    while heard.len() < count {
        heard.push(next());
    }
    native::socket(Ipv4Addr::LOCALHOST).0.send_to(&LAST.to_le_bytes(), to).unwrap();
    loop {
        match next() {
            LAST => return heard,
            unexpected => heard.push(unexpected),
        }
    }
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
async fn cancel_one(rig: &mut Rig3, place: u16) {
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
    rig.send(socket, &numbered(MARK), Some(to)).await.unwrap();
    let left = (0..first + 3).filter(|n| *n != first + place);
    assert_hears(&witness, left.chain([MARK]));
    rig.drop_socket(socket).await;
}

/// Kills: a cancelled send that is sent all the same; a datagram that was answered for, and goes with its socket.
#[test]
fn of_a_dropped_socket_what_was_answered_is_sent_and_what_was_cancelled_is_not() {
    in_a_clogged_network(|| {
        let uring = uring();
        let setup = Setup { sockets_max: 1, ..Setup::of(&uring) };
        on(Backend::Uring, setup, async |rig| {
            let (witness, to) = native::socket(Ipv4Addr::LOCALHOST);
            let socket = small(rig).await;
            let (first, calls) = sends_that_wait(rig, socket, 0, Some(to), 5).await;
            for call in calls {
                assert_eq!(rig.cancel(call).await, Status::Cancelled);
            }
            rig.drop_socket(socket).await;
            flow();
            eventually("its slot is free", || uring.stats().sockets_open == 0).await;
            assert_hears(&witness, 0..first);
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
            // Of what was answered, the kernel's part: the rest has waited for longer than its guest's end.
            let sent = usize::try_from(uring.stats().datagrams_sent).unwrap();
            let mut heard = heard(&witness, sent);
            assert_eq!(heard.len(), sent);
            heard.sort_unstable();
            heard.dedup();
            assert_eq!(heard.len(), sent, "each once");
            assert!(heard.iter().all(|n| *n < first));
        });
    });
}

#[test]
fn of_many_sends_that_wait_one_is_in_the_ring_and_all_are_sent_in_their_order() {
    const SENDS: usize = 100;
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
            assert!(uring.stats().datagrams_sent <= u64::from(first));
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

/// What waits was not answered for, and goes to whom the socket is connected to when the kernel takes it; a
/// connect waits for what was. Kills: a connect behind which a deferred datagram reaches another peer.
#[test]
fn a_connect_waits_for_what_was_answered_and_what_waits_is_sent_once() {
    in_a_clogged_network(|| {
        on_both(Setup::default(), async |rig| {
            let (first, first_addr) = native::socket(Ipv4Addr::LOCALHOST);
            let (second, second_addr) = native::socket(SECOND);
            let socket = small(rig).await;
            rig.connect(socket, first_addr).await.unwrap();
            let (next, calls) = sends_that_wait(rig, socket, 0, None, 3).await;
            let (connected, ()) = tokio::join!(rig.connect(socket, second_addr), async { flow() });
            connected.unwrap();
            for call in calls {
                rig.sent(call).await.unwrap();
            }
            rig.send(socket, &numbered(MARK), None).await.unwrap();
            rig.settle().await;
            let of_first = heard(&first, usize::from(next));
            let (answered, waited) = of_first.split_at(usize::from(next));
            assert_eq!(answered, (0..next).collect::<Vec<_>>());
            let of_second = heard(&second, 4 - waited.len());
            let mut others = [waited, &of_second].concat();
            others.sort_unstable();
            assert_eq!(others, (next..next + 3).chain([MARK]).collect::<Vec<_>>());
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
