//! Sockets that receive in bursts get `UDP_GRO`, and the kernel's keys for that stay on from the first on: by
//! one more socket of the process, which these tests look for among its descriptors. So they are in a
//! binary of their own, and take turns.

#![expect(unsafe_code, reason = "descriptors by their numbers")]

mod common;

use std::fs;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use common::filter::with_filter;
use common::{BOUND, LOOPBACK, LOOPBACK_6, Rig, block_on, native, uring};
use nix::sys::socket::{getsockopt, sockopt};
use wasi_uring::Uring;

/// From so many on that wait, a socket receives in bursts.
const BURST: usize = 4;

fn my_turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many descriptors of this process are sockets with `UDP_GRO`.
fn kept() -> usize {
    let numbers = fs::read_dir("/proc/self/fd").unwrap().map(|entry| {
        let name = entry.unwrap().file_name();
        name.to_str().unwrap().parse().unwrap()
    });
    let numbers: Vec<i32> = numbers.collect();
    let has_gro = |number: &i32| {
        // SAFETY: the number is looked at, by the next line alone; of a descriptor that has been closed since,
        // the kernel says that it is none.
        let fd = unsafe { BorrowedFd::borrow_raw(*number) };
        getsockopt(&fd, sockopt::UdpGroSegment) == Ok(true)
    };
    numbers.iter().filter(|number| has_gro(number)).count()
}

/// A thread of the ring's own may be about to let go of the ring.
fn wait_until_none_is_kept() {
    let deadline = Instant::now() + BOUND / 2;
    while kept() > 0 {
        assert!(Instant::now() < deadline, "it is kept for good");
    }
}

/// So many lives of a new guest of this ring.
fn lives(uring: &Uring, any: SocketAddr, datagrams: usize, count: usize) {
    let (native, _) = native::socket(any.ip());
    block_on(async {
        let mut rig = Rig::on_ring(uring).await;
        for _ in 0..count {
            rig.receiving_life(any, &native, datagrams).await;
        }
    });
}

/// Kills: one for each burst or ring; one from the start; one for good.
#[test]
fn a_process_keeps_one_socket_with_gro_from_its_first_burst_to_the_end_of_its_rings() {
    let _turn = my_turn();
    let [one, other] = [uring(), uring()];
    for any in [LOOPBACK, LOOPBACK_6] {
        lives(&one, any, BURST - 1, 2);
    }
    assert_eq!(kept(), 0, "no burst");
    for any in [LOOPBACK, LOOPBACK_6] {
        for ring in [&one, &other, &one] {
            lives(ring, any, BURST, 2);
            assert_eq!(kept(), 1);
        }
    }
    drop(one);
    assert_eq!(kept(), 1, "the other ring's");
    drop(other);
    wait_until_none_is_kept();
}

/// Kills: a burst that fails with it; one that is tried once.
#[test]
fn bursts_are_received_where_no_socket_can_be_made_and_the_next_makes_one() {
    let _turn = my_turn();
    for errno in [libc::EPERM, libc::EMFILE] {
        let uring = uring();
        with_filter(libc::SYS_socket, errno, || {
            block_on(async {
                let mut rig = Rig::on_ring(&uring).await;
                let from = rig.endpoint(LOOPBACK).await;
                let to = rig.endpoint(LOOPBACK).await;
                assert_eq!(rig.receive(to.incoming, 1).await, Ok(vec![]), "armed");
                let sent = vec![common::datagram(b"at once", Some(to.local)); 16];
                for _ in 0..3 {
                    assert_eq!(rig.send_all(from.outgoing, &sent).await, Ok(16));
                    assert_eq!(rig.receive_exactly(to.incoming, 16).await.len(), 16);
                }
                rig.close(from).await;
                rig.close(to).await;
            });
        });
        assert!(uring.stats().datagrams_split > 0, "GRO is on all the same");
        wait_until_none_is_kept();
        lives(&uring, LOOPBACK, BURST, 1);
        assert_eq!(kept(), 1);
    }
}
