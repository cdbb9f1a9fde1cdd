//! The ring under every kind of tokio runtime, several at once, and one after another.

mod common;

use std::net::Ipv4Addr;
use std::sync::mpsc;

use common::{
    BOUND, Backend, Endpoint, IpAddressFamily, LOOPBACK, Rig, Setup, block_on, eventually, native,
    payloads, uring, uring_with, within,
};
use tokio::runtime::Builder;
use wasi_uring::Uring;

/// Binds two sockets, sends both ways, drops both.
async fn echo(rig: &mut Rig) {
    let a = rig.endpoint(LOOPBACK).await;
    let b = rig.endpoint(LOOPBACK).await;
    for n in 0..10_u8 {
        for (from, to) in [(a, b), (b, a)] {
            assert_eq!(rig.send_one(from.outgoing, &[n], Some(to.local)).await, Ok(1));
            let received = rig.receive_blocking(to.incoming).await.unwrap();
            assert_eq!(payloads(&received), [[n]]);
        }
    }
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
async fn live(rig: &mut Rig) {
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

// ---- runtimes that end --------------------------------------------------------------------------

/// A guest with a socket whose receive is armed, made in a runtime that has ended since.
fn armed_in_a_former_runtime(uring: &Uring) -> (Rig, Endpoint) {
    block_on(async {
        let mut rig = Rig::on_ring(uring).await;
        let endpoint = rig.endpoint(LOOPBACK).await;
        assert_eq!(rig.receive(endpoint.incoming, 1).await, Ok(vec![]));
        (rig, endpoint)
    })
}

async fn goes_on(mut rig: Rig, endpoint: Endpoint) {
    let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
    for data in [&b"first"[..], b"second"] {
        let pollable = rig.subscribe_incoming(endpoint.incoming).await;
        let send = async {
            common::yield_to_others().await;
            native.send_to(data, endpoint.local).unwrap();
        };
        tokio::join!(biased; rig.block(pollable), send);
        rig.drop_pollable(pollable).await;
        assert_eq!(payloads(&rig.receive(endpoint.incoming, 16).await.unwrap()), [data]);
    }
    echo(&mut rig).await;
}

#[test]
fn a_socket_outlives_the_runtime_it_was_made_in() {
    let uring = uring();
    let (rig, endpoint) = armed_in_a_former_runtime(&uring);
    block_on(goes_on(rig, endpoint));
}

/// The kernel cancels what a thread has submitted when that thread exits.
#[test]
fn a_socket_outlives_the_thread_that_armed_its_receive() {
    let uring = uring();
    let (rig, endpoint) = std::thread::scope(|scope| {
        scope.spawn(|| armed_in_a_former_runtime(&uring)).join().unwrap()
    });
    block_on(goes_on(rig, endpoint));
}

#[test]
fn a_datagram_that_arrives_between_two_runtimes_is_received_in_the_second() {
    let uring = uring();
    for thread_ends in [false, true] {
        let (mut rig, endpoint) = if thread_ends {
            std::thread::scope(|scope| {
                scope.spawn(|| armed_in_a_former_runtime(&uring)).join().unwrap()
            })
        } else {
            armed_in_a_former_runtime(&uring)
        };
        let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
        native.send_to(b"meanwhile", endpoint.local).unwrap();
        block_on(async {
            let received = rig.receive_blocking(endpoint.incoming).await.unwrap();
            assert_eq!(payloads(&received), [b"meanwhile"]);
        });
    }
}

#[test]
fn a_store_dropped_outside_of_any_runtime_gives_its_slots_back() {
    let uring = uring();
    let (rig, endpoint) = armed_in_a_former_runtime(&uring);
    drop(rig);
    block_on(eventually("the slot is free", || uring.stats().sockets_open == 0));
    assert!(!native::is_taken(endpoint.local));
}

#[test]
fn a_guest_that_waits_goes_on_when_the_runtime_of_the_others_ends() {
    let uring = uring();
    let (ready, is_ready) = tokio::sync::oneshot::channel();
    let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            block_on(async {
                let mut rig = Rig::on_ring(&uring).await;
                let endpoint = rig.endpoint(LOOPBACK).await;
                assert_eq!(rig.receive(endpoint.incoming, 1).await, Ok(vec![]));
                ready.send(endpoint.local).unwrap();
                payloads(&rig.receive_blocking(endpoint.incoming).await.unwrap()) == [b"at last"]
            })
        });
        let local = is_ready.blocking_recv().unwrap();
        for _ in 0..10 {
            block_on(echo_in_a_store_of_its_own(uring.clone()));
        }
        native.send_to(b"at last", local).unwrap();
        assert!(waiting.join().unwrap());
    });
}

/// Drops a guest, outside of any runtime, whose receive ends after the close that cancels it: on
/// the thread that has armed it, which goes on. Nobody uses the ring afterwards.
fn drop_with_a_receive_of_another_thread(uring: &Uring) {
    std::thread::scope(|scope| {
        let (give, take) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let thread = scope.spawn(move || {
            give.send(armed_in_a_former_runtime(uring)).unwrap();
            let _ = ended.recv_timeout(BOUND);
        });
        drop(take.recv().unwrap());
        drop(end);
        thread.join().unwrap();
    });
}

#[test]
fn places_given_back_while_no_runtime_runs_are_there_for_the_next_guest() {
    let uring = uring_with(1);
    for _ in 0..20 {
        drop_with_a_receive_of_another_thread(&uring);
        block_on(async {
            let mut rig = Rig::on_ring(&uring).await;
            let socket = rig.create(IpAddressFamily::Ipv4).await.unwrap();
            rig.bind(socket, LOOPBACK).await.unwrap();
            rig.drop_socket(socket).await;
            eventually("the slot is free", || uring.stats().sockets_open == 0).await;
        });
    }
}

#[test]
fn counters_are_right_although_nobody_uses_the_ring() {
    for _ in 0..20 {
        let uring = uring();
        drop_with_a_receive_of_another_thread(&uring);
        block_on(eventually("the slot is free", || uring.stats().sockets_open == 0));
    }
}

#[test]
fn a_ring_that_goes_with_its_last_guest_gives_the_ports_back() {
    let (rig, endpoint) = armed_in_a_former_runtime(&uring());
    let connected = block_on(async {
        let mut rig = Rig::on_ring(&uring()).await;
        let mut endpoint = rig.endpoint(LOOPBACK).await;
        let itself = endpoint.local;
        rig.reconnect(&mut endpoint, Some(itself)).await.unwrap();
        assert_eq!(rig.receive(endpoint.incoming, 1).await, Ok(vec![]));
        itself
    });
    drop(rig);
    block_on(async {
        for local in [endpoint.local, connected] {
            eventually("the port is free", || !native::is_taken(local)).await;
        }
    });
}

// ---- guests that compute ------------------------------------------------------------------------

/// Closes a socket, which leaves work to do when the guest next suspends, and then computes,
/// without a system call, until told to stop.
async fn close_and_compute(mut rig: Rig, begun: mpsc::Sender<()>, stop: mpsc::Receiver<()>) {
    live(&mut rig).await;
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
    let uring = Uring::builder().sockets(16).queue_per_socket(1, 1).build().unwrap();
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

// ---- enters -------------------------------------------------------------------------------------

#[test]
fn a_lone_guest_enters_once_per_life() {
    block_on(async {
        let uring = uring();
        let mut rig = Rig::on_ring(&uring).await;
        let before = uring.stats().enters;
        for _ in 0..100 {
            live(&mut rig).await;
        }
        let enters = uring.stats().enters - before;
        assert!(enters <= 101, "{enters}");
    });
}

#[test]
fn sixty_four_guests_on_one_thread_share_their_enters() {
    const GUESTS: u64 = 64;
    const LIVES: u64 = 50;
    block_on(async {
        let uring = uring();
        let mut rigs = Vec::new();
        for _ in 0..GUESTS {
            rigs.push(Rig::on_ring(&uring).await);
        }
        let before = uring.stats().enters;
        let tasks: Vec<_> = rigs
            .into_iter()
            .map(|mut rig| {
                tokio::spawn(async move {
                    for _ in 0..LIVES {
                        live(&mut rig).await;
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        let enters = uring.stats().enters - before;
        assert!(enters <= GUESTS * LIVES / 10, "{enters}");
    });
}
