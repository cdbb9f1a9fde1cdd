//! Guests side by side: when a task yields, and the enters that guests share.

use std::net::Ipv4Addr;

use tokio::runtime::Builder;
use tokio::task::yield_now;

use crate::common::{
    LOOPBACK, Setup, block_on, enters_while, native, on_each, shared_enters_while, side_by_side,
    steps_beside, uring, within,
};
use crate::rig::{Rig3, Status, V4};

/// Kills: a yield with a waker that wakes no task.
#[test]
fn a_guest_that_always_finds_datagrams_yields_to_others() {
    block_on(async {
        for blocking in [true, false] {
            let mut rig = Rig3::on_ring(&uring()).await;
            let (socket, local) = rig.bound(LOOPBACK).await;
            let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
            let reading = async {
                for burst in 0..8_u8 {
                    for n in 0..32 {
                        native.send_to(&[burst, n], local).unwrap();
                    }
                    for n in 0..32 {
                        let received = if blocking {
                            rig.receive(socket).await
                        } else {
                            let (_, call) = rig.start_receive(socket).await;
                            rig.received(call).await
                        };
                        assert_eq!(received.unwrap().0, [burst, n]);
                    }
                }
            };
            let steps = steps_beside(reading).await;
            eprintln!("blocking {blocking}: {steps} steps");
            assert!(steps + 1 >= 256 / 64, "{steps} steps while 256 datagrams were read");
        }
    });
}

/// The guest waits for the first datagram of either socket.
#[test]
fn a_guest_that_waits_for_two_sockets_of_which_one_never_rests_yields_to_others() {
    block_on(async {
        let mut rig = Rig3::on_ring(&uring()).await;
        let (busy, local) = rig.bound(LOOPBACK).await;
        let (idle, _) = rig.bound(LOOPBACK).await;
        let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
        let selecting = async {
            for _ in 0..20 {
                for n in 0..100_u8 {
                    native.send_to(&[n], local).unwrap();
                }
                for n in 0..100_u8 {
                    let other = rig.waiting_receive(idle).await;
                    assert_eq!(rig.receive(busy).await.unwrap().0, [n]);
                    assert_eq!(rig.cancel(other).await, Status::Cancelled);
                }
            }
        };
        let steps = steps_beside(selecting).await;
        assert!(steps >= 2000 / 100, "{steps} steps while 2000 datagrams were read");
    });
}

#[test]
fn a_guest_that_sends_without_end_yields_to_others() {
    block_on(async {
        let mut rig = Rig3::on_ring(&uring()).await;
        let (_native, to) = native::socket(Ipv4Addr::LOCALHOST);
        let (socket, _) = rig.bound(LOOPBACK).await;
        let sending = async {
            for _ in 0..2000 {
                rig.send(socket, b"x", Some(to)).await.unwrap();
            }
        };
        let steps = steps_beside(sending).await;
        assert!(steps >= 2000 / 200, "{steps} steps while a guest sent 2000 times");
    });
}

#[test]
fn a_receive_of_what_is_queued_makes_no_enter() {
    block_on(async {
        let uring = uring();
        let mut rig = Rig3::on_ring(&uring).await;
        let (socket, local) = rig.bound(LOOPBACK).await;
        let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
        native.send_to(b"the first arms it", local).unwrap();
        rig.receive_queued(socket).await;
        for n in 0..20_u8 {
            native.send_to(&[n], local).unwrap();
        }
        assert_eq!(rig.receive_queued(socket).await, [0], "brings in the others");
        let before = uring.stats().enters;
        for n in 1..20_u8 {
            assert_eq!(rig.receive_queued(socket).await, [n]);
        }
        assert_eq!(uring.stats().enters, before);
    });
}

/// `create`, `bind`, drop.
async fn cycle(rig: &mut Rig3) {
    let socket = rig.create(V4).await.unwrap();
    rig.bind(socket, LOOPBACK).await.unwrap();
    rig.drop_socket(socket).await;
}

#[test]
fn a_lone_guest_enters_once_per_cycle() {
    block_on(async {
        let uring = uring();
        let mut rig = Rig3::on_ring(&uring).await;
        let cycles = async {
            for _ in 0..100 {
                cycle(&mut rig).await;
            }
        };
        let enters = enters_while(&uring, cycles).await;
        assert!(enters <= 101, "{enters}");
    });
}

/// Kills: a guest that enters for itself although others are about to queue entries.
#[test]
fn sixty_four_guests_on_one_thread_share_their_enters() {
    const GUESTS: u64 = 64;
    const CYCLES: u64 = 50;
    block_on(async {
        let uring = uring();
        let mut rigs = Vec::new();
        for _ in 0..GUESTS {
            rigs.push(Rig3::on_ring(&uring).await);
        }
        let cycles = |mut rig| async move {
            for _ in 0..CYCLES {
                cycle(&mut rig).await;
            }
        };
        let enters = shared_enters_while(&uring, side_by_side(rigs.into_iter().map(cycles))).await;
        // Where a cycle takes long the ring's own thread gets in between.
        let stats = uring.stats();
        assert!(enters <= GUESTS * CYCLES / 10 + stats.enters_overdue, "{enters}, {stats:?}");
    });
}

/// As many sockets as guests, and each guest waits for its own.
#[test]
fn guests_that_echo_side_by_side_get_their_own_datagrams() {
    const GUESTS: u8 = 16;
    block_on(async {
        let uring = uring();
        let mut guests = Vec::new();
        for guest in 0..GUESTS {
            let mut rig = Rig3::on_ring(&uring).await;
            guests.push(async move {
                let (a, a_addr) = rig.bound(LOOPBACK).await;
                let (b, b_addr) = rig.bound(LOOPBACK).await;
                for n in 0..50_u8 {
                    let (_, waiting) = rig.start_receive(b).await;
                    let (_, call) = rig.start_send(a, &[guest, n], Some(b_addr)).await;
                    assert_eq!(rig.received(waiting).await, Ok((vec![guest, n], a_addr)));
                    rig.sent(call).await.unwrap();
                    rig.send(b, &[n, guest], Some(a_addr)).await.unwrap();
                    assert_eq!(rig.receive(a).await, Ok((vec![n, guest], b_addr)));
                }
                let (status, _call) = rig.start_receive(a).await;
                assert_eq!(status, Status::Started, "nothing is left");
            });
        }
        side_by_side(guests).await;
    });
}

/// Sends that are cancelled unless they are done at once; how many have told that they were sent, and how
/// many that they were not.
async fn send_or_cancel(mut rig: Rig3) -> (usize, usize) {
    let (witness, to) = native::socket(Ipv4Addr::LOCALHOST);
    witness.set_nonblocking(true).unwrap();
    let (socket, _) = rig.bound(LOOPBACK).await;
    let (mut sent, mut cancelled, mut heard) = (0, 0, 0);
    for _ in 0..500 {
        let (status, call) = rig.start_send(socket, b"now or never", Some(to)).await;
        let status = if status == Status::Started { rig.cancel(call).await } else { status };
        if status == Status::Cancelled {
            cancelled += 1;
        } else {
            rig.sent(call).await.unwrap();
            sent += 1;
        }
        while witness.recv(&mut [0; 16]).is_ok() {
            heard += 1;
        }
        yield_now().await;
    }
    // The last may still be another worker's to submit.
    witness.set_nonblocking(false).unwrap();
    while heard < sent {
        native::receive(&witness, &mut [0; 16]);
        heard += 1;
    }
    native::socket(Ipv4Addr::LOCALHOST).0.send_to(b"the last", to).unwrap();
    let mut last = [0; 16];
    let bytes = native::receive(&witness, &mut last);
    assert_eq!(&last[..bytes], b"the last", "sent, though {cancelled} were cancelled");
    (sent, cancelled)
}

/// As language libraries do it: what is not done at once is cancelled, and tried later. Kills: a send that is
/// left to the thread inside, which sends it although its call was cancelled.
#[test]
fn a_cancelled_send_is_not_sent_and_few_are_cancelled_although_workers_share_a_ring() {
    on_each(|backend| {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (sent, cancelled) = runtime.block_on(within(async {
            let uring = uring();
            let mut guests = Vec::new();
            for _ in 0..16 {
                let rig = Rig3::new(backend, Setup::of(&uring)).await;
                guests.push(tokio::spawn(send_or_cancel(rig)));
            }
            let mut totals = (0, 0);
            for guest in guests {
                let (sent, cancelled) = guest.await.unwrap();
                totals = (totals.0 + sent, totals.1 + cancelled);
            }
            totals
        }));
        // A worker that the machine stops while it is inside holds up the others.
        assert!(cancelled * 100 <= sent, "{cancelled} of {}", sent + cancelled);
    });
}
