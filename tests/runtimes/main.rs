//! The ring under every kind of tokio runtime, and several at once. Runtimes that end are in
//! `endings.rs`, of the same binary.

#[path = "../common/mod.rs"]
mod common;
mod endings;
mod gone;
mod panics;
mod ports;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use common::{
    BOUND, Backend, Endpoint, IpAddressFamily, LOOPBACK, Rig, Setup, block_on, enters_while,
    eventually, native, payloads, shared_enters_while, side_by_side, uring, within,
};
use tokio::runtime::Builder;
use wasi_uring::{Stats, Uring};

async fn round_trips(rig: &mut Rig, a: Endpoint, b: Endpoint, count: u8) {
    for n in 0..count {
        for (from, to) in [(a, b), (b, a)] {
            assert_eq!(rig.send_one(from.outgoing, &[n], Some(to.local)).await, Ok(1));
            let received = rig.receive_blocking(to.incoming).await.unwrap();
            assert_eq!(payloads(&received), [[n]]);
        }
    }
}

/// Binds two sockets, sends both ways, drops both.
async fn echo(rig: &mut Rig) {
    let a = rig.endpoint(LOOPBACK).await;
    let b = rig.endpoint(LOOPBACK).await;
    round_trips(rig, a, b, 10).await;
    rig.close(a).await;
    rig.close(b).await;
}

async fn echo_in_a_store_of_its_own(uring: Uring) {
    let mut rig = Rig::on_ring(&uring).await;
    for _ in 0..5 {
        echo(&mut rig).await;
    }
}

/// `create-udp-socket`, `start-bind`, `finish-bind`, drop.
async fn cycle(rig: &mut Rig) {
    let socket = rig.create(IpAddressFamily::Ipv4).await.unwrap();
    rig.bind(socket, LOOPBACK).await.unwrap();
    rig.drop_socket(socket).await;
}

/// Runs that many guests at once in the current runtime, each in a task and a store of its own.
async fn run_guests(uring: &Uring, guests: usize) {
    let tasks: Vec<_> =
        (0..guests).map(|_| tokio::spawn(echo_in_a_store_of_its_own(uring.clone()))).collect();
    for task in tasks {
        within(task).await.unwrap();
    }
    eventually("every slot is free", || uring.stats().sockets_open == 0).await;
}

#[test]
fn guests_run_on_a_current_thread_runtime() {
    block_on(run_guests(&uring(), 32));
}

#[test]
fn guests_run_on_a_multi_thread_runtime() {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(within(run_guests(&uring(), 32)));
}

#[test]
fn a_lone_guest_runs_on_the_main_thread_of_a_multi_thread_runtime() {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(within(echo_in_a_store_of_its_own(uring())));
}

#[test]
fn guests_run_on_tokio_urings_runtime() {
    tokio_uring::start(within(run_guests(&uring(), 8)));
}

#[test]
fn one_ring_serves_two_runtimes_on_two_threads_at_once() {
    let uring = uring();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                block_on(async {
                    let tasks: Vec<_> = (0..8)
                        .map(|_| tokio::spawn(echo_in_a_store_of_its_own(uring.clone())))
                        .collect();
                    for task in tasks {
                        task.await.unwrap();
                    }
                });
            });
        }
    });
    block_on(eventually("every slot is free", || uring.stats().sockets_open == 0));
}

#[test]
fn guests_of_two_runtimes_send_to_each_other() {
    let uring = &uring();
    let (to_second, from_first) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            block_on(async {
                let mut rig = Rig::on_ring(uring).await;
                let endpoint = rig.endpoint(LOOPBACK).await;
                to_second.send(endpoint.local).unwrap();
                for n in 0..100_u8 {
                    let received = rig.receive_blocking(endpoint.incoming).await.unwrap();
                    assert_eq!(payloads(&received), [[n]]);
                    let back = common::sender(&received[0]);
                    rig.send_one(endpoint.outgoing, &[n], Some(back)).await.unwrap();
                }
            });
        });
        scope.spawn(move || {
            block_on(async {
                let peer = from_first.recv().unwrap();
                let mut rig = Rig::on_ring(uring).await;
                let endpoint = rig.endpoint(LOOPBACK).await;
                for n in 0..100_u8 {
                    rig.send_one(endpoint.outgoing, &[n], Some(peer)).await.unwrap();
                    let received = rig.receive_blocking(endpoint.incoming).await.unwrap();
                    assert_eq!(payloads(&received), [[n]]);
                }
            });
        });
    });
}

/// Every datagram pauses the receive, and the guest drains the queue while the pause is still on
/// its way, on the other worker.
#[test]
fn queues_of_one_datagram_pause_and_resume_under_two_workers() {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(within(async {
        let [mut asking, mut answering] = two_guests(Backend::Uring).await;
        let a = asking.endpoint(LOOPBACK).await;
        let b = answering.endpoint(LOOPBACK).await;
        let batch = |n: u32, to: SocketAddr| vec![common::datagram(&n.to_be_bytes(), Some(to)); 3];
        let asked = tokio::spawn(async move {
            for n in 0..1000_u32 {
                asking.send_all(a.outgoing, &batch(n, b.local)).await.unwrap();
                let received = asking.receive_exactly(a.incoming, 3).await;
                assert_eq!(payloads(&received), [n.to_be_bytes(); 3]);
            }
        });
        let answered = tokio::spawn(async move {
            for n in 0..1000_u32 {
                let received = answering.receive_exactly(b.incoming, 3).await;
                assert_eq!(payloads(&received), [n.to_be_bytes(); 3]);
                answering.send_all(b.outgoing, &batch(n, a.local)).await.unwrap();
            }
        });
        asked.await.unwrap();
        answered.await.unwrap();
    }));
}

// ---- guests that compute ------------------------------------------------------------------------

/// A guest sends twice, of which the second is deferred, and computes on until both have come.
async fn send_twice_and_compute(uring: &Uring) {
    // Time enough for a slow machine to get to the second.
    let setup = Setup::of(uring).deferring(Duration::from_millis(100));
    let mut rig = Rig::new(Backend::Uring, setup).await;
    let endpoint = rig.endpoint(LOOPBACK).await;
    let (witness, to) = native::socket(Ipv4Addr::LOCALHOST);
    let heard = Arc::new(AtomicBool::new(false));
    let listener = std::thread::spawn({
        let heard = Arc::clone(&heard);
        move || {
            for n in [1, 2] {
                let mut buffer = [0; 2];
                assert_eq!(native::receive(&witness, &mut buffer), 1);
                assert_eq!(buffer[0], n);
            }
            heard.store(true, Ordering::Relaxed);
        }
    });
    for n in [1, 2] {
        rig.send_one(endpoint.outgoing, &[n], Some(to)).await.unwrap();
    }
    let begun = Instant::now();
    while !heard.load(Ordering::Relaxed) {
        assert!(begun.elapsed() < BOUND, "the second does not leave while its guest computes");
        std::hint::spin_loop();
    }
    listener.join().unwrap();
    assert_eq!(uring.stats().datagrams_deferred, 1);
}

/// Kills: a deferred datagram that waits until its guest suspends.
#[test]
fn what_a_guest_has_sent_leaves_although_it_computes_on() {
    block_on(send_twice_and_compute(&uring()));
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(send_twice_and_compute(&uring()));
    runtime.block_on(async {
        let uring = uring();
        within(tokio::spawn(async move { send_twice_and_compute(&uring).await })).await.unwrap();
    });
    tokio_uring::start(send_twice_and_compute(&uring()));
}

/// Closes a socket, which leaves work to do when the guest next suspends, and then computes,
/// without a system call, until `stop`.
async fn close_and_compute(mut rig: Rig, begun: mpsc::Sender<()>, stop: mpsc::Receiver<()>) {
    cycle(&mut rig).await;
    begun.send(()).unwrap();
    while stop.try_recv() == Err(mpsc::TryRecvError::Empty) {
        std::hint::spin_loop();
    }
}

/// Fills its queue until its receive is paused, drains it, and waits for what comes then.
async fn pause_and_resume(mut rig: Rig, endpoint: Endpoint) {
    let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
    for n in 0..10_u8 {
        native.send_to(&[n], endpoint.local).unwrap();
        native.send_to(&[n], endpoint.local).unwrap();
        let received = rig.receive_exactly(endpoint.incoming, 2).await;
        assert_eq!(payloads(&received), [[n], [n]]);
    }
}

/// Two guests of one ring, on either backend, whose queues hold one datagram.
async fn two_guests(backend: Backend) -> [Rig; 2] {
    let uring = Uring::builder().sockets(16).queue_datagrams(1).queue_bytes(1).build().unwrap();
    [Rig::new(backend, Setup::of(&uring)).await, Rig::new(backend, Setup::of(&uring)).await]
}

#[test]
fn a_guest_that_computes_does_not_hold_up_another_runtimes() {
    for backend in [Backend::Stock, Backend::Uring] {
        let (begun, has_begun) = mpsc::channel();
        let (stop, stopped) = mpsc::channel();
        let (give, take) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            block_on(async {
                let [computing, mut other] = two_guests(backend).await;
                let endpoint = other.endpoint(LOOPBACK).await;
                if backend == Backend::Uring {
                    // On the very thread that will compute; wasmtime-wasi's cannot move at all.
                    assert_eq!(other.receive(endpoint.incoming, 1).await, Ok(vec![]));
                    give.send((other, endpoint)).unwrap();
                }
                close_and_compute(computing, begun, stopped).await;
            });
        });
        has_begun.recv_timeout(BOUND).unwrap();
        block_on(async {
            if let Ok((other, endpoint)) = take.try_recv() {
                pause_and_resume(other, endpoint).await;
            } else {
                let [mut other, _] = two_guests(backend).await;
                let endpoint = other.endpoint(LOOPBACK).await;
                pause_and_resume(other, endpoint).await;
            }
        });
        drop(stop);
        thread.join().unwrap();
    }
}

#[test]
fn a_guest_that_computes_does_not_hold_up_another_workers() {
    for backend in [Backend::Stock, Backend::Uring] {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(within(async {
            let [computing, mut other] = two_guests(backend).await;
            let (begun, has_begun) = mpsc::channel();
            let (stop, stopped) = mpsc::channel();
            let computing = tokio::spawn(close_and_compute(computing, begun, stopped));
            has_begun.recv_timeout(BOUND).unwrap();
            let other = tokio::spawn(async move {
                let endpoint = other.endpoint(LOOPBACK).await;
                pause_and_resume(other, endpoint).await;
            });
            let held_up = tokio::time::timeout(BOUND / 4, other).await;
            drop(stop);
            computing.await.unwrap();
            held_up.unwrap_or_else(|_| panic!("{backend:?}: held up")).unwrap();
        }));
    }
}

/// Kills: a guest that lies in the LIFO slot of the worker on which the one that has woken it computes on.
#[test]
fn a_guest_that_asks_another_and_computes_on_does_not_keep_it_from_answering() {
    for backend in [Backend::Stock, Backend::Uring] {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(within(async {
            let [mut asking, mut asked] = two_guests(backend).await;
            let source = asking.endpoint(LOOPBACK).await;
            let (answered, has_answered) = mpsc::channel();
            let asking = tokio::spawn(async move {
                // Armed by this thread, which is told first of what arrives.
                let endpoint = asked.endpoint(LOOPBACK).await;
                assert_eq!(asked.receive(endpoint.incoming, 1).await, Ok(vec![]));
                let (waits, is_waiting) = mpsc::channel();
                let waiting = async move {
                    let received = asked.receive_exactly(endpoint.incoming, 1).await;
                    answered.send(payloads(&received).concat()).unwrap();
                };
                tokio::spawn(async move {
                    let mut waiting = std::pin::pin!(waiting);
                    std::future::poll_fn(|cx| {
                        let polled = waiting.as_mut().poll(cx);
                        let _ = waits.send(());
                        polled
                    })
                    .await;
                });
                // It takes the slot itself, so that the other worker can take the one before.
                tokio::spawn(async {});
                is_waiting.recv_timeout(BOUND).unwrap();
                asking.send_one(source.outgoing, b"?", Some(endpoint.local)).await.unwrap();
                assert_eq!(has_answered.recv_timeout(BOUND / 4), Ok(b"?".to_vec()), "{backend:?}");
            });
            asking.await.unwrap();
        }));
    }
}

/// Kills: a `receive`, which does not wait, that takes only what this thread has armed.
#[test]
fn a_receive_finds_what_waits_for_a_thread_that_computes() {
    const ROUNDS: usize = 200;
    let (give, take) = mpsc::channel();
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            block_on(async {
                let mut rig = Rig::on_ring(&uring()).await;
                let endpoint = rig.endpoint(LOOPBACK).await;
                assert_eq!(rig.receive(endpoint.incoming, 1).await, Ok(vec![]), "armed");
                give.send((rig, endpoint)).ok().unwrap();
                while !is_done.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        });
        let (mut rig, endpoint) = take.recv_timeout(BOUND).unwrap();
        block_on(async {
            let mut found = 0;
            for n in 0..ROUNDS {
                let datagram = n.to_ne_bytes();
                rig.send_one(endpoint.outgoing, &datagram, Some(endpoint.local)).await.unwrap();
                let received = rig.receive(endpoint.incoming, 2).await.unwrap();
                found += usize::from(payloads(&received) == [datagram]);
                if received.is_empty() {
                    rig.receive_exactly(endpoint.incoming, 1).await;
                }
            }
            is_done.store(true, Ordering::Relaxed);
            // The kernel itself may be late, where a processor has much to do.
            assert!(found > ROUNDS / 2, "{found} of {ROUNDS}");
        });
    });
}

/// Has a worker arm a socket's receive and compute on, while another thread receives by that socket, until `is_over`.
async fn receive_beside_who_has_armed(uring: &Uring, is_over: impl Fn(&Stats) -> bool) -> Stats {
    /// Few are enough, if the looks at the workers find time.
    const DATAGRAMS_MAX: usize = 5000;
    let mut rig = Rig::on_ring(uring).await;
    let (give, take) = tokio::sync::oneshot::channel();
    let is_done = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&is_done);
    let computing = tokio::spawn(async move {
        let endpoint = rig.endpoint(LOOPBACK).await;
        assert_eq!(rig.receive(endpoint.incoming, 1).await, Ok(vec![]));
        give.send((rig, endpoint)).ok().unwrap();
        // For another worker: it takes this one's slot itself.
        tokio::spawn(async {});
        let end = Instant::now() + BOUND / 2;
        while !stop.load(Ordering::Relaxed) && Instant::now() < end {
            std::hint::spin_loop();
        }
    });
    let (mut rig, endpoint) = take.await.unwrap();
    let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
    for _ in 0..DATAGRAMS_MAX {
        if is_over(&uring.stats()) {
            break;
        }
        native.send_to(b"x", endpoint.local).unwrap();
        rig.receive_exactly(endpoint.incoming, 1).await;
    }
    is_done.store(true, Ordering::Relaxed);
    computing.await.unwrap();
    uring.stats()
}

fn receive_beside_a_worker(is_over: impl Fn(&Stats) -> bool) -> Stats {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(within(async { receive_beside_who_has_armed(&uring(), is_over).await }))
}

/// Kills: datagrams that wait for the timer tick of the thread that has armed the receive.
#[test]
fn a_worker_that_computes_is_interrupted_while_datagrams_come_for_what_it_has_armed() {
    let stats = receive_beside_a_worker(|stats| stats.interrupts > 0);
    assert!(stats.interrupts > 0, "{stats:?}");
}

/// Kills: a socket whose datagrams wait for an interrupt each, for as long as the worker computes.
#[test]
fn what_a_worker_that_computes_has_armed_is_armed_anew_by_the_thread_that_waits() {
    let stats = receive_beside_a_worker(|stats| stats.rearms > 0);
    assert!(stats.rearms > 0, "{stats:?}");
}

// ---- enters -------------------------------------------------------------------------------------

#[test]
fn a_lone_guest_enters_once_per_cycle() {
    block_on(async {
        let uring = uring();
        let mut rig = Rig::on_ring(&uring).await;
        let cycles = async {
            for _ in 0..100 {
                cycle(&mut rig).await;
            }
        };
        let enters = enters_while(&uring, cycles).await;
        assert!(enters <= 101, "{enters}");
    });
}

#[test]
fn a_lone_guest_is_served_without_yielding() {
    block_on(async {
        let mut rig = Rig::on_ring(&uring()).await;
        let (_native, peer) = native::socket(Ipv4Addr::LOCALHOST);
        for _ in 0..3 {
            let life = async {
                let endpoint = rig.endpoint(LOOPBACK).await;
                rig.send_one(endpoint.outgoing, b"x", Some(peer)).await.unwrap();
                assert_eq!(rig.receive(endpoint.incoming, 1).await, Ok(vec![]));
                rig.close(endpoint).await;
            };
            tokio::select! {
                biased;
                () = life => {}
                () = std::future::ready(()) => panic!("it waits, though nobody is before it"),
            }
        }
    });
}

#[test]
fn sixty_four_guests_on_one_thread_share_their_enters() {
    const GUESTS: u64 = 64;
    const CYCLES: u64 = 50;
    block_on(async {
        let uring = uring();
        let mut rigs = Vec::new();
        for _ in 0..GUESTS {
            rigs.push(Rig::on_ring(&uring).await);
        }
        let cycles = |mut rig| async move {
            for _ in 0..CYCLES {
                cycle(&mut rig).await;
            }
        };
        let enters = shared_enters_while(&uring, side_by_side(rigs.into_iter().map(cycles))).await;
        // Where a cycle takes milliseconds the ring's own thread gets in between.
        let stats = uring.stats();
        assert!(enters <= GUESTS * CYCLES / 10 + stats.enters_overdue, "{enters}, {stats:?}");
    });
}

/// Kills: a guest that enters for itself alone because other workers could run the guests that are ready.
#[test]
fn guests_of_a_worker_share_the_enters_of_their_sends() {
    const GUESTS: u64 = 16;
    const TRIPS: u8 = 50;
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let on_the_worker = async {
        let uring = uring();
        let mut guests = Vec::new();
        for _ in 0..GUESTS {
            let mut rig = Rig::on_ring(&uring).await;
            let (a, b) = (rig.endpoint(LOOPBACK).await, rig.endpoint(LOOPBACK).await);
            guests.push((rig, a, b));
        }
        let trips = |(mut rig, a, b)| async move { round_trips(&mut rig, a, b, TRIPS).await };
        let enters = shared_enters_while(&uring, side_by_side(guests.into_iter().map(trips))).await;
        let stats = uring.stats();
        let sends = 2 * GUESTS * u64::from(TRIPS);
        assert!(enters <= sends / 4 + stats.enters_overdue, "{enters}, {stats:?}");
    };
    runtime.block_on(async { tokio::spawn(on_the_worker).await.unwrap() });
}

/// Kills: a guest whose yield leaves its datagram behind guests that compute.
#[test]
fn what_guests_of_a_worker_send_leaves_while_another_computes() {
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let sent = Arc::new(AtomicBool::new(false));
    let has_sent = Arc::clone(&sent);
    let (native, to) = native::socket(LOOPBACK.ip());
    let heard = std::thread::spawn(move || {
        let heard = native::receive_from(&native, &mut [0; 8]).0;
        has_sent.store(true, Ordering::Release);
        heard
    });
    let on_the_worker = async move {
        let uring = uring();
        let mut guests = Vec::new();
        for _ in 0..2 {
            let mut rig = Rig::on_ring(&uring).await;
            let endpoint = rig.endpoint(LOOPBACK).await;
            guests.push((rig, endpoint));
        }
        let sends = guests.into_iter().map(|(mut rig, guest)| async move {
            assert_eq!(rig.send_one(guest.outgoing, &[7], Some(to)).await, Ok(1));
        });
        let computes = tokio::spawn(async move {
            let begun = Instant::now();
            while !sent.load(Ordering::Acquire) {
                assert!(begun.elapsed() < BOUND / 2, "it waits for a guest that computes");
            }
        });
        side_by_side(sends).await;
        computes.await.unwrap();
    };
    runtime.block_on(async { tokio::spawn(on_the_worker).await.unwrap() });
    assert_eq!(heard.join().unwrap(), 1);
}
