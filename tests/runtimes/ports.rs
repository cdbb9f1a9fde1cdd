//! Ports of sockets that are dropped on another thread than theirs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Instant;

use tokio::runtime::Builder;
use wasi_uring::Uring;

use crate::common::network::in_a_network;
use crate::common::{BOUND, Endpoint, Rig, block_on, native, own_ip, uring, within};

/// What comes of something done beside the thread on which a guest has armed its receive, and which
/// computes until that is done, without a system call.
pub(crate) fn beside_a_thread_that_computes<T>(
    uring: &Uring,
    run: impl FnOnce(Rig, Endpoint) -> T,
) -> T {
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (give, take) = mpsc::channel();
        let is_done = &is_done;
        scope.spawn(move || {
            block_on(async {
                let mut rig = Rig::on_ring(uring).await;
                let endpoint = rig.endpoint((own_ip(), 0)).await;
                // So that it is closed for good.
                rig.set_hop_limit(endpoint.socket, 9).await.unwrap();
                assert_eq!(rig.receive(endpoint.incoming, 1).await, Ok(vec![]));
                give.send((rig, endpoint)).unwrap();
            });
            let end = Instant::now() + BOUND / 2;
            while !is_done.load(Ordering::Relaxed) && Instant::now() < end {
                std::hint::spin_loop();
            }
        });
        let (rig, endpoint) = take.recv_timeout(BOUND).unwrap();
        let result = run(rig, endpoint);
        is_done.store(true, Ordering::Relaxed);
        result
    })
}

/// The receive's end is task work of the thread that armed it, which computes on.
#[test]
fn a_thread_that_computes_on_holds_no_port_up() {
    in_a_network(65_536, || {
        let uring = uring();
        beside_a_thread_that_computes(&uring, |mut rig, endpoint| {
            block_on(rig.close(endpoint));
            native::wait_until_free(endpoint.local);
        });
    });
}

/// Rounds of each guest below.
const ROUNDS: usize = 200;

/// Drops a socket bound by number and binds to its port again; how often that was taken in between.
async fn hand_over(uring: Uring) -> usize {
    let mut rig = Rig::on_ring(&uring).await;
    let (first, local) = rig.bound((own_ip(), 0)).await;
    rig.drop_socket(first).await;
    native::wait_until_free(local);
    let mut taken = 0;
    for _ in 0..ROUNDS {
        let endpoint = rig.endpoint(local).await;
        rig.send_one(endpoint.outgoing, b"to itself", Some(local)).await.unwrap();
        // Armed by one worker, and dropped by it or the other.
        rig.receive_exactly(endpoint.incoming, 1).await;
        tokio::task::yield_now().await;
        rig.close(endpoint).await;
        taken += usize::from(native::is_bound(local));
        native::wait_until_free(local);
    }
    taken
}

/// Kills: a CLOSE beside a receive that is still being cancelled.
#[test]
fn guests_of_two_workers_hand_their_ports_over() {
    const GUESTS: usize = 16;
    in_a_network(65_536, || {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let taken = runtime.block_on(within(async {
            let uring = uring();
            let guest = |_| tokio::spawn(hand_over(uring.clone()));
            let guests: Vec<_> = (0..GUESTS).map(guest).collect();
            let mut taken = 0;
            for guest in guests {
                taken += guest.await.unwrap();
            }
            taken
        }));
        // A worker that the machine stops for long while it is inside holds a close up all the same.
        assert!(taken <= GUESTS * ROUNDS / 1000, "{taken} of {}", GUESTS * ROUNDS);
    });
}
