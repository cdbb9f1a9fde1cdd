//! Several calls at a time, and calls cancelled.

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::Poll;

use tokio::task::coop::consume_budget;
use wasi_uring::{SocketAddrUse, Uring};

use crate::common::network::in_a_network;
use crate::common::seen::{Seen, recording};
use crate::common::{
    BOUND, Backend, LOOPBACK, LOOPBACK_6, Setup, addr, block_on, eventually, native, own_ip, uring,
    uring_with,
};
use crate::rig::{Call, ErrorCode, Rig3, Status, V4, on, on_both};

/// `count` receives, all of which wait.
async fn waiting_receives(rig: &mut Rig3, socket: u32, count: usize) -> Vec<Call> {
    let mut calls = Vec::new();
    for _ in 0..count {
        calls.push(rig.waiting_receive(socket).await);
    }
    calls
}

/// What receives have got, each a datagram of one byte.
async fn bytes_received(rig: &mut Rig3, calls: &[Call]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for call in calls {
        let (data, _) = rig.received(*call).await.unwrap();
        bytes.extend::<[u8; 1]>(data.try_into().unwrap());
    }
    bytes
}

/// On the ring, receives that wait are served in the order of their calls; wasmtime-wasi leaves it
/// to chance.
fn assert_served(rig: &Rig3, mut bytes: Vec<u8>, expected: impl IntoIterator<Item = u8>) {
    if !rig.is_uring() {
        bytes.sort_unstable();
    }
    assert_eq!(bytes, expected.into_iter().collect::<Vec<_>>());
}

fn send_each(native: &UdpSocket, bytes: impl IntoIterator<Item = u8>, to: SocketAddr) {
    for byte in bytes {
        native.send_to(&[byte], to).unwrap();
    }
}

/// Spends the task's budget, so that an operation which begins now is not done at once.
async fn exhaust_budget() {
    poll_fn(|cx| {
        loop {
            if pin!(consume_budget()).poll(cx).is_pending() {
                return Poll::Ready(());
            }
        }
    })
    .await;
}

// ---- several receives -----------------------------------------------------------------------------

/// Kills: a socket that stores one waker, so that only the last of its receives is woken.
#[test]
fn receives_that_wait_get_a_datagram_each_in_the_order_they_came() {
    on_both(Setup::default(), async |rig| {
        let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
        let (socket, local) = rig.bound(LOOPBACK).await;
        for settled in [false, true, false] {
            let calls = waiting_receives(rig, socket, 10).await;
            if settled {
                rig.settle().await;
            }
            send_each(&native, 0..10, local);
            let bytes = bytes_received(rig, &calls).await;
            assert_served(rig, bytes, 0..10);
        }
    });
}

#[test]
fn datagrams_beyond_the_receives_that_wait_are_there_for_later_ones() {
    on_both(Setup::default(), async |rig| {
        let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
        let (socket, local) = rig.bound(LOOPBACK).await;
        let calls = waiting_receives(rig, socket, 3).await;
        send_each(&native, 0..8, local);
        let bytes = bytes_received(rig, &calls).await;
        assert_served(rig, bytes, 0..3);
        for n in 3..8_u8 {
            assert_eq!(rig.receive_queued(socket).await, [n]);
        }
    });
}

#[test]
fn receives_beyond_the_datagrams_wait_for_later_ones() {
    on_both(Setup::default(), async |rig| {
        let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
        let (socket, local) = rig.bound(LOOPBACK).await;
        let calls = waiting_receives(rig, socket, 5).await;
        send_each(&native, 0..2, local);
        let first = rig.returned_exactly(&calls, 2).await;
        let mut bytes = bytes_received(rig, &first).await;
        let rest: Vec<_> = calls.iter().copied().filter(|call| !first.contains(call)).collect();
        if rig.is_uring() {
            assert_eq!(first, calls[..2]);
        }
        send_each(&native, 2..5, local);
        bytes.extend(bytes_received(rig, &rest).await);
        assert_served(rig, bytes, 0..5);
    });
}

/// The last one to be answered first.
#[test]
fn calls_can_be_waited_for_in_any_order() {
    on_both(Setup::default(), async |rig| {
        let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
        let (socket, local) = rig.bound(LOOPBACK).await;
        let mut calls = waiting_receives(rig, socket, 6).await;
        send_each(&native, 0..6, local);
        calls.reverse();
        let mut bytes = bytes_received(rig, &calls).await;
        bytes.reverse();
        assert_served(rig, bytes, 0..6);
    });
}

#[test]
fn receives_of_several_sockets_wait_side_by_side() {
    on_both(Setup::default(), async |rig| {
        let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
        let mut waiting = Vec::new();
        for _ in 0..20 {
            let (socket, local) = rig.bound(LOOPBACK).await;
            waiting.push((rig.waiting_receive(socket).await, local));
        }
        for n in [7_u8, 0, 19, 3] {
            let (call, local) = waiting[usize::from(n)];
            native.send_to(&[n], local).unwrap();
            assert_eq!(rig.received(call).await.unwrap().0, [n]);
        }
    });
}

#[test]
fn an_error_goes_to_one_receive_and_the_others_go_on_waiting() {
    on_both(Setup::default(), async |rig| {
        let peer = own_ip();
        let (native, peer_addr) = native::socket(peer);
        let (socket, local) = rig.bound(LOOPBACK).await;
        rig.connect(socket, peer_addr).await.unwrap();
        let calls = waiting_receives(rig, socket, 3).await;
        drop(native);
        rig.send(socket, b"to nobody", None).await.unwrap();
        let first = rig.returned_exactly(&calls, 1).await;
        assert_eq!(rig.received(first[0]).await, Err(ErrorCode::ConnectionRefused));
        let rest: Vec<_> = calls.iter().copied().filter(|call| !first.contains(call)).collect();
        let native = UdpSocket::bind(peer_addr).unwrap();
        send_each(&native, 0..2, local);
        let bytes = bytes_received(rig, &rest).await;
        assert_served(rig, bytes, 0..2);
    });
}

// ---- several sends ------------------------------------------------------------------------------

#[test]
fn a_thousand_sends_made_before_any_is_waited_for_all_arrive() {
    on_both(Setup::default(), async |rig| {
        // Few enough for each receive buffer.
        let witnesses: Vec<_> = (0..10).map(|_| native::socket(Ipv4Addr::LOCALHOST)).collect();
        let (socket, local) = rig.bound(LOOPBACK).await;
        let mut calls = Vec::new();
        for n in 0..100_u8 {
            for (_, to) in &witnesses {
                calls.push(rig.start_send(socket, &[n], Some(*to)).await);
            }
        }
        if rig.is_uring() {
            // Then tokio's budget is spent.
            let at_once = calls.iter().take_while(|(status, _)| *status == Status::Returned);
            assert!(at_once.count() >= 32, "the send buffer has room");
        }
        for (_, call) in calls {
            rig.sent(call).await.unwrap();
        }
        for (witness, _) in &witnesses {
            let mut heard = BTreeSet::new();
            for _ in 0..100 {
                let mut buffer = [0; 2];
                assert_eq!(native::receive_from(witness, &mut buffer), (1, local));
                heard.insert(buffer[0]);
            }
            assert!(heard.into_iter().eq(0..100), "each once");
        }
        if rig.is_uring() {
            assert_eq!(rig.stats().datagrams_sent, 1000);
        }
    });
}

#[test]
fn sends_and_receives_of_one_socket_do_not_delay_each_other() {
    on_both(Setup::default(), async |rig| {
        let (socket, local) = rig.bound(LOOPBACK).await;
        let calls = waiting_receives(rig, socket, 5).await;
        let mut sends = Vec::new();
        for n in 0..5_u8 {
            sends.push(rig.start_send(socket, &[n], Some(local)).await.1);
        }
        let bytes = bytes_received(rig, &calls).await;
        assert_served(rig, bytes, 0..5);
        for call in sends {
            rig.sent(call).await.unwrap();
        }
    });
}

// ---- binds in flight --------------------------------------------------------------------------------

#[test]
fn first_sends_made_at_once_leave_from_one_port() {
    on_both(Setup::default(), async |rig| {
        let (native, to) = native::socket(Ipv4Addr::LOCALHOST);
        for delayed in [false, true].repeat(10) {
            let socket = rig.create(V4).await.unwrap();
            if delayed {
                exhaust_budget().await;
            }
            let mut calls = Vec::new();
            for n in 0..5_u8 {
                calls.push(rig.start_send(socket, &[n], Some(to)).await.1);
            }
            for call in calls {
                rig.sent(call).await.unwrap();
            }
            let port = rig.local(socket).await.unwrap().port();
            let mut heard = BTreeSet::new();
            for _ in 0..5 {
                let mut buffer = [0; 2];
                let (_, from) = native::receive_from(&native, &mut buffer);
                assert_eq!(from.port(), port);
                heard.insert(buffer[0]);
            }
            assert!(heard.into_iter().eq(0..5), "each once");
            rig.drop_socket(socket).await;
        }
    });
}

/// The call finds the socket unbound or bound, and the send leaves all the same.
#[test]
fn any_call_may_come_while_a_send_binds_its_socket() {
    for what in ["receive", "local", "bind", "connect", "option", "two sends", "cancel"] {
        on_both(Setup::default(), async |rig| {
            let (native, to) = native::socket(Ipv4Addr::LOCALHOST);
            for delayed in [false, true].repeat(5) {
                let socket = rig.create(V4).await.unwrap();
                if delayed {
                    exhaust_budget().await;
                }
                let (status, first) = rig.start_send(socket, b"first", Some(to)).await;
                if rig.is_uring() {
                    assert_eq!(status == Status::Started, delayed);
                }
                let mut receive = None;
                let mut sends = 1;
                let is_fair = |answer: Result<(), ErrorCode>, unless: bool| {
                    assert!(matches!(answer, Ok(()) | Err(ErrorCode::InvalidState)), "{answer:?}");
                    assert!(delayed || answer.is_ok() == unless, "{answer:?}");
                };
                match what {
                    "receive" => receive = Some(rig.start_receive(socket).await.1),
                    "local" => is_fair(rig.local(socket).await.map(drop), true),
                    "bind" => is_fair(rig.bind(socket, LOOPBACK).await, false),
                    "connect" => {
                        rig.connect(socket, to).await.unwrap();
                        assert_eq!(rig.remote(socket).await, Ok(to));
                    }
                    "option" => rig.set_hop_limit(socket, 5).await.unwrap(),
                    "two sends" => {
                        sends = 2;
                        let (_, second) = rig.start_send(socket, b"second", Some(to)).await;
                        rig.sent(second).await.unwrap();
                    }
                    _ if status == Status::Returned => {}
                    _ => {
                        if rig.cancel(first).await == Status::Cancelled {
                            sends = 0;
                        }
                    }
                }
                if sends > 0 {
                    rig.sent(first).await.unwrap();
                }
                for _ in 0..sends {
                    native::receive(&native, &mut [0; 16]);
                }
                if sends == 0 {
                    // Dropped, with its bind or without: the next one binds, if need be.
                    rig.send(socket, b"next", Some(to)).await.unwrap();
                    assert_eq!(native::receive(&native, &mut [0; 16]), 4);
                }
                let port = rig.local(socket).await.unwrap().port();
                native.send_to(b"back", (Ipv4Addr::LOCALHOST, port)).unwrap();
                let mut received = match receive {
                    Some(call) => rig.received(call).await,
                    None => rig.receive(socket).await,
                };
                if delayed && received == Err(ErrorCode::InvalidState) {
                    // The receive came before the bind began.
                    received = rig.receive(socket).await;
                }
                assert_eq!(received, Ok((b"back".to_vec(), to)));
                rig.drop_socket(socket).await;
            }
        });
    }
}

/// Two threads keep the ring busy, so that an operation begun here is not done at once.
fn beside_busy_threads(uring: &Uring, scenario: impl AsyncFnOnce()) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let done = &done;
            let (ready, is_ready) = std::sync::mpsc::channel();
            scope.spawn(move || {
                block_on(async {
                    let mut rig = Rig3::on_ring(uring).await;
                    let (socket, local) = rig.bound(LOOPBACK).await;
                    let data = vec![7; 60_000];
                    ready.send(()).unwrap();
                    while !done.load(Ordering::Relaxed) {
                        rig.send(socket, &data, Some(local)).await.unwrap();
                    }
                });
            });
            is_ready.recv_timeout(BOUND).unwrap();
        }
        // The two threads end although the scenario panics.
        let ended = catch_unwind(AssertUnwindSafe(|| block_on(scenario())));
        done.store(true, Ordering::Relaxed);
        if let Err(panic) = ended {
            resume_unwind(panic);
        }
    });
}

/// The call that first learns that the bind is done must wake the send that waits for it.
///
/// Kills: a send that waits for a bind without storing its waker.
#[test]
fn a_call_that_finds_a_bind_done_lets_the_send_go_on_that_began_it() {
    let uring = uring();
    beside_busy_threads(&uring, async || {
        let mut rig = Rig3::on_ring(&uring).await;
        let (_native, to) = native::socket(Ipv4Addr::LOCALHOST);
        for _ in 0..2000 {
            let socket = rig.create(V4).await.unwrap();
            let (_, call) = rig.start_send(socket, b"x", Some(to)).await;
            let local = rig.local(socket).await;
            assert!(matches!(local, Ok(_) | Err(ErrorCode::InvalidState)), "{local:?}");
            rig.sent(call).await.unwrap();
            rig.drop_socket(socket).await;
        }
    });
}

/// Several calls wait for the bind, and each must be woken.
///
/// Kills: calls that wait for a bind and store one waker, the last call's.
#[test]
fn all_calls_that_wait_for_a_bind_go_on_when_it_is_done() {
    let uring = uring();
    beside_busy_threads(&uring, async || {
        let mut rig = Rig3::on_ring(&uring).await;
        let (_native, to) = native::socket(Ipv4Addr::LOCALHOST);
        for n in 0..2000 {
            let socket = rig.create(V4).await.unwrap();
            let mut sends = Vec::new();
            for _ in 0..3 {
                sends.push(rig.start_send(socket, b"x", Some(to)).await.1);
            }
            let (status, receive) = rig.start_receive(socket).await;
            if n % 2 == 0 {
                rig.set_hop_limit(socket, 9).await.unwrap();
            }
            for call in sends {
                rig.sent(call).await.unwrap();
            }
            if status == Status::Returned || rig.cancel(receive).await == Status::Returned {
                assert_eq!(rig.received(receive).await, Err(ErrorCode::InvalidState));
            }
            rig.drop_socket(socket).await;
        }
    });
}

/// In the network of the test's own: leaves one port for binds to port 0, and binds to it.
fn take_all_ports() -> UdpSocket {
    std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "50000 50000").unwrap();
    UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 50_000)).unwrap()
}

/// wasmtime-wasi does not answer then: Linux returns `EAGAIN`, and it waits.
#[test]
fn calls_that_bind_fail_when_no_port_is_free_and_can_be_made_again() {
    in_a_network(65_536, || {
        on(Backend::Uring, Setup::default(), async |rig| {
            let taken = take_all_ports();
            let (witness, to) = (UdpSocket::bind("127.0.0.1:9").unwrap(), addr("127.0.0.1:9"));
            let sender = rig.create(V4).await.unwrap();
            let connector = rig.create(V4).await.unwrap();
            let binder = rig.create(V4).await.unwrap();
            for _ in 0..3 {
                let in_use = Err(ErrorCode::AddressInUse);
                let (_, first) = rig.start_send(sender, b"x", Some(to)).await;
                let (_, second) = rig.start_send(sender, b"x", Some(to)).await;
                assert_eq!(rig.sent(first).await, in_use);
                assert_eq!(rig.sent(second).await, in_use);
                assert_eq!(rig.receive(sender).await, Err(ErrorCode::InvalidState));
                assert_eq!(rig.connect(connector, to).await, in_use);
                assert_eq!(rig.remote(connector).await, Err(ErrorCode::InvalidState));
                assert_eq!(rig.bind(binder, LOOPBACK).await, in_use);
            }
            drop(taken);
            rig.send(sender, b"hello", Some(to)).await.unwrap();
            assert_eq!(native::receive(&witness, &mut [0; 16]), 5);
            rig.drop_socket(sender).await;
            let uring = rig.rig.uring.clone();
            eventually("its slot is free", || uring.stats().sockets_open == 2).await;
            rig.connect(connector, to).await.unwrap();
        });
    });
}

/// Kills: a bind that is retried for a waiting call without calling the policy again.
#[test]
fn the_policy_is_called_for_every_bind_although_the_one_before_failed() {
    in_a_network(65_536, || {
        let uring = uring();
        let (_native, to) = native::socket(Ipv4Addr::LOCALHOST);
        beside_busy_threads(&uring, async || {
            let _taken = take_all_ports();
            let seen = Seen::default();
            let setup = Setup { uring: Some(uring.clone()), ..recording(&seen) };
            let mut rig = Rig3::new(Backend::Uring, setup).await;
            for _ in 0..300 {
                let socket = rig.create(V4).await.unwrap();
                let (_, first) = rig.start_send(socket, b"x", Some(to)).await;
                let (_, second) = rig.start_send(socket, b"x", Some(to)).await;
                for call in [first, second] {
                    assert_eq!(rig.sent(call).await, Err(ErrorCode::AddressInUse));
                }
                let seen = std::mem::take(&mut *seen.lock().unwrap());
                let is_bind = |use_: &SocketAddrUse| matches!(use_, SocketAddrUse::UdpBind);
                let binds = seen.iter().filter(|(_, use_)| is_bind(use_)).count();
                assert_eq!(binds, 2);
                rig.drop_socket(socket).await;
            }
        });
    });
}

/// The error is that of its own bind, not of another that came between.
#[test]
fn a_send_whose_bind_fails_answers_so_although_the_guest_binds_meanwhile() {
    in_a_network(65_536, || {
        let uring = uring();
        let (_native, to) = native::socket(Ipv4Addr::LOCALHOST);
        beside_busy_threads(&uring, async || {
            let _taken = take_all_ports();
            let mut rig = Rig3::on_ring(&uring).await;
            for _ in 0..300 {
                let socket = rig.create(V4).await.unwrap();
                let (_, call) = rig.start_send(socket, b"x", Some(to)).await;
                rig.bind(socket, addr("127.0.0.1:60000")).await.unwrap();
                let sent = rig.sent(call).await;
                assert!(matches!(sent, Ok(()) | Err(ErrorCode::AddressInUse)), "{sent:?}");
                rig.drop_socket(socket).await;
                let free = || !native::is_taken(addr("127.0.0.1:60000"));
                eventually("the port is free", free).await;
            }
        });
    });
}

#[test]
fn a_receive_made_while_nothing_binds_the_socket_is_refused_though_a_bind_failed_before() {
    on_both(Setup::default(), async |rig| {
        let (_, taken) = rig.bound(LOOPBACK).await;
        let socket = rig.create(V4).await.unwrap();
        assert_eq!(rig.bind(socket, taken).await, Err(ErrorCode::AddressInUse));
        assert_eq!(rig.receive(socket).await, Err(ErrorCode::InvalidState));
        let (status, call) = rig.start_receive(socket).await;
        assert_eq!(status, Status::Returned);
        assert_eq!(rig.received(call).await, Err(ErrorCode::InvalidState));
    });
}

// ---- receives cancelled -----------------------------------------------------------------------------

/// Kills: a receive that takes a datagram and can still be cancelled then.
#[test]
fn a_cancelled_receive_leaves_what_comes_to_the_next() {
    on_both(Setup::default(), async |rig| {
        for any in [LOOPBACK, LOOPBACK_6] {
            let (native, from) = native::socket(any.ip());
            let (socket, local) = rig.bound(any).await;
            for n in 0..10_u8 {
                let call = rig.waiting_receive(socket).await;
                if n % 2 == 1 {
                    rig.settle().await;
                }
                assert_eq!(rig.cancel(call).await, Status::Cancelled);
                native.send_to(&[n], local).unwrap();
                assert_eq!(rig.receive(socket).await, Ok((vec![n], from)));
            }
        }
    });
}

/// The datagram is there before the cancel: either this call has it, or the next has.
#[test]
fn a_receive_cancelled_when_a_datagram_has_come_loses_nothing() {
    on_both(Setup::default(), async |rig| {
        let (native, from) = native::socket(Ipv4Addr::LOCALHOST);
        let (socket, local) = rig.bound(LOOPBACK).await;
        for n in 0..20_u8 {
            let call = rig.waiting_receive(socket).await;
            if n % 2 == 1 {
                rig.settle().await;
            }
            native.send_to(&[n], local).unwrap();
            let received = if rig.cancel(call).await == Status::Cancelled {
                rig.receive(socket).await
            } else {
                rig.received(call).await
            };
            assert_eq!(received, Ok((vec![n], from)));
        }
    });
}

/// The guest has not been resumed in between, so its cancel comes too late.
#[test]
fn a_cancel_of_a_receive_that_has_returned_says_so_and_its_datagram_is_there() {
    on_both(Setup::default(), async |rig| {
        let (native, from) = native::socket(Ipv4Addr::LOCALHOST);
        let (socket, local) = rig.bound(LOOPBACK).await;
        let call = rig.waiting_receive(socket).await;
        let other = rig.waiting_receive(socket).await;
        native.send_to(b"first", local).unwrap();
        // Long enough that the first has returned, which it does without being polled by the guest.
        if rig.is_uring() {
            for _ in 0..10 {
                rig.settle().await;
            }
            assert_eq!(rig.cancel(call).await, Status::Returned);
            assert_eq!(rig.received(call).await, Ok((b"first".to_vec(), from)));
            assert_eq!(rig.cancel(other).await, Status::Cancelled);
        } else {
            let returned = rig.returned_exactly(&[call, other], 1).await;
            assert_eq!(rig.received(returned[0]).await, Ok((b"first".to_vec(), from)));
        }
    });
}

/// Kills: a queue of waiting receives that loses the others' wakers when one is cancelled.
#[test]
fn a_receive_cancelled_among_several_leaves_the_others_everything() {
    const RECEIVES: usize = 5;
    for leaves in 0..RECEIVES {
        on_both(Setup::default(), async |rig| {
            let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
            let (socket, local) = rig.bound(LOOPBACK).await;
            for (settled, before) in [(false, 0), (true, 0), (false, 2), (true, 2)] {
                let mut calls = waiting_receives(rig, socket, RECEIVES).await;
                if settled {
                    rig.settle().await;
                }
                send_each(&native, 0..before, local);
                let leaver = calls.remove(leaves);
                let mut bytes = Vec::new();
                if rig.cancel(leaver).await == Status::Returned {
                    bytes = bytes_received(rig, &[leaver]).await;
                }
                let total = u8::try_from(RECEIVES - 1 + bytes.len()).unwrap();
                send_each(&native, before..total, local);
                bytes.extend(bytes_received(rig, &calls).await);
                bytes.sort_unstable();
                assert!(bytes.iter().copied().eq(0..total), "{bytes:?}");
            }
        });
    }
}

#[test]
fn receives_all_cancelled_at_once_leave_a_socket_that_receives() {
    on_both(Setup::default(), async |rig| {
        let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
        let (socket, local) = rig.bound(LOOPBACK).await;
        for n in 0..3_u8 {
            for call in waiting_receives(rig, socket, 20).await {
                assert_eq!(rig.cancel(call).await, Status::Cancelled);
            }
            native.send_to(&[n], local).unwrap();
            assert_eq!(rig.receive(socket).await.unwrap().0, [n]);
        }
    });
}

/// Numbers from a seed (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// A guest that starts, cancels and reads receives by chance, and what it has received.
struct Player<'rig> {
    rig: &'rig mut Rig3,
    socket: u32,
    random: Random,
    /// In the order they were started.
    calls: Vec<Call>,
    received: Vec<u32>,
}

impl Player<'_> {
    fn note(&mut self, (data, _): (Vec<u8>, SocketAddr)) {
        self.received.push(u32::from_le_bytes(data.try_into().unwrap()));
    }

    async fn start(&mut self) {
        let (status, call) = self.rig.start_receive(self.socket).await;
        if status == Status::Returned {
            let received = self.rig.received(call).await.unwrap();
            self.note(received);
        } else {
            self.calls.push(call);
        }
    }

    async fn cancel_any(&mut self) {
        let at = self.random.below(self.calls.len() as u64 + 1);
        let at = usize::try_from(at).unwrap();
        if at < self.calls.len() {
            let call = self.calls.remove(at);
            if self.rig.cancel(call).await == Status::Returned {
                let received = self.rig.received(call).await.unwrap();
                self.note(received);
            }
        }
    }

    async fn read(&mut self) {
        for call in self.rig.returned(&self.calls.clone()).await {
            self.calls.retain(|waiting| *waiting != call);
            let received = self.rig.received(call).await.unwrap();
            self.note(received);
        }
    }

    /// One step by chance.
    async fn play(&mut self) {
        match self.random.below(8) {
            0..=2 if self.calls.len() < 20 => self.start().await,
            0..=4 => self.cancel_any().await,
            5 => self.rig.settle().await,
            6 => self.read().await,
            _ => exhaust_budget().await,
        }
    }

    /// Receives until everything is received that was sent.
    async fn finish(&mut self, sent: u32) {
        let deadline = tokio::time::Instant::now() + BOUND / 2;
        while self.received.len() < sent as usize {
            assert!(tokio::time::Instant::now() < deadline, "lost: {:?}", self.missing(sent));
            if self.calls.is_empty() {
                self.start().await;
            }
            self.rig.settle().await;
            self.read().await;
        }
        let mut received = self.received.clone();
        received.sort_unstable();
        assert!(received.iter().copied().eq(0..sent), "each once: {received:?}");
    }

    fn missing(&self, sent: u32) -> Vec<u32> {
        (0..sent).filter(|n| !self.received.contains(n)).collect()
    }
}

fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    u64::try_from(now.as_nanos() & u128::from(u64::MAX)).unwrap() | 1
}

/// A ring whose queues fill now and then, and a policy that refuses one sender.
fn small_queues(refused: Ipv4Addr) -> Setup {
    let uring =
        Uring::builder().sockets(8).queue_datagrams(4).queue_bytes(1 << 20).build().unwrap();
    Setup {
        uring: Some(uring),
        ..Setup::allow(move |addr, use_| {
            !(matches!(use_, SocketAddrUse::UdpReceive) && addr.ip() == refused)
        })
    }
}

#[test]
fn every_datagram_is_received_once_although_receives_are_cancelled() {
    let seed = seed();
    eprintln!("seed {seed}");
    let refused = own_ip();
    let (stranger, _) = native::socket(refused);
    for round in 0..20_u64 {
        on(Backend::Uring, small_queues(refused), async |rig| {
            let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
            let (socket, local) = rig.bound(LOOPBACK).await;
            let random = Random(seed ^ (round << 32));
            let mut player = Player { rig, socket, random, calls: vec![], received: vec![] };
            let mut sent = 0_u32;
            for _ in 0..300 {
                if player.random.below(3) == 0 && sent as usize - player.received.len() < 100 {
                    for _ in 0..=player.random.below(4) {
                        if player.random.below(8) == 0 {
                            stranger.send_to(b"stranger", local).unwrap();
                        }
                        native.send_to(&sent.to_le_bytes(), local).unwrap();
                        sent += 1;
                    }
                }
                player.play().await;
            }
            player.finish(sent).await;
            for call in player.calls {
                assert_eq!(player.rig.cancel(call).await, Status::Cancelled);
            }
            rig.drop_socket(socket).await;
            let uring = rig.rig.uring.clone();
            eventually("its slot is free", || uring.stats().sockets_open == 0).await;
        });
    }
}

/// As before, while another thread sends: datagrams and cancels race.
#[test]
fn every_datagram_is_received_once_although_it_comes_while_receives_are_cancelled() {
    const SENT: u32 = 3000;
    let seed = seed();
    eprintln!("seed {seed}");
    let refused = own_ip();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let received = Arc::new(AtomicU32::new(0));
    let so_far = Arc::clone(&received);
    let playing = async move {
        let mut rig = Rig3::new(Backend::Uring, small_queues(refused)).await;
        let (socket, local) = rig.bound(LOOPBACK).await;
        let sending = std::thread::spawn(move || {
            let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
            for n in 0..SENT {
                // No more than the kernel's buffer holds.
                let deadline = std::time::Instant::now() + BOUND;
                while n - so_far.load(Ordering::Relaxed) > 100 {
                    assert!(std::time::Instant::now() < deadline, "nothing is received");
                    std::thread::yield_now();
                }
                native.send_to(&n.to_le_bytes(), local).unwrap();
            }
        });
        let random = Random(seed);
        let mut player = Player { rig: &mut rig, socket, random, calls: vec![], received: vec![] };
        while !sending.is_finished() {
            player.play().await;
            received.store(u32::try_from(player.received.len()).unwrap(), Ordering::Relaxed);
        }
        sending.join().unwrap();
        player.finish(SENT).await;
    };
    runtime.block_on(crate::common::within(async { tokio::spawn(playing).await.unwrap() }));
}

// ---- stores that end ------------------------------------------------------------------------------

#[test]
fn a_store_dropped_with_calls_in_flight_frees_everything() {
    for (settled, delayed) in [(false, false), (true, false), (false, true)] {
        block_on(async {
            let uring = uring_with(64);
            let (native, to) = native::socket(Ipv4Addr::LOCALHOST);
            let mut rig = Rig3::on_ring(&uring).await;
            let mut locals = Vec::new();
            for n in 0..20_usize {
                let (socket, local) = rig.bound((own_ip(), 0)).await;
                locals.push(local);
                let calls = waiting_receives(&mut rig, socket, n % 4).await;
                if n % 3 == 0 {
                    native.send_to(b"unread", local).unwrap();
                }
                if let [first, _, ..] = calls[..]
                    && n % 2 == 0
                {
                    rig.cancel(first).await;
                }
                let binding = rig.create(V4).await.unwrap();
                if delayed {
                    exhaust_budget().await;
                }
                let _send = rig.start_send(binding, b"x", Some(to)).await;
                let _receive = rig.start_receive(binding).await;
            }
            if settled {
                rig.settle().await;
            }
            drop(rig);
            eventually("the slots are free", || uring.stats().sockets_open == 0).await;
            for local in locals {
                assert!(!native::is_taken(local));
            }
            // As many again get slots, and buffers.
            let mut rig = Rig3::on_ring(&uring).await;
            for _ in 0..64 {
                let (socket, local) = rig.bound(LOOPBACK).await;
                native.send_to(b"fresh", local).unwrap();
                assert_eq!(rig.receive(socket).await.unwrap().0, b"fresh");
            }
        });
    }
}

/// At the first moment that the guest blocks: in a receive, or in its first send.
#[test]
fn a_guest_dropped_while_it_blocks_frees_everything() {
    block_on(async {
        let uring = uring();
        let (_native, to) = native::socket(Ipv4Addr::LOCALHOST);
        for n in 0..20 {
            let mut rig = Rig3::on_ring(&uring).await;
            let call = async {
                if n % 2 == 0 {
                    let (socket, _) = rig.bound(LOOPBACK).await;
                    let _ = rig.receive(socket).await;
                } else {
                    let socket = rig.create(V4).await.unwrap();
                    exhaust_budget().await;
                    let _ = rig.send(socket, b"x", Some(to)).await;
                }
            };
            tokio::select! {
                biased;
                () = call => assert_eq!(n % 2, 1, "nothing to receive"),
                () = std::future::ready(()) => {}
            }
            drop(rig);
            eventually("its slot is free", || uring.stats().sockets_open == 0).await;
        }
    });
}
