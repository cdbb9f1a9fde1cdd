//! A host's waker that panics, on the thread of whichever guest enters the kernel for all.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Wake, Waker};

use wasi_uring::{SocketAddrUse, Uring};

use crate::common::{
    Backend, LOOPBACK, Rig, Setup, block_on, eventually, native, own_ip, payloads, uring, within,
};
use crate::{echo, echo_in_a_store_of_its_own};

/// A waker that panics once it is set to.
#[derive(Default)]
struct Panics {
    is_set: AtomicBool,
    panics: AtomicUsize,
}

impl Wake for Panics {
    fn wake(self: Arc<Self>) {
        if self.is_set.load(Ordering::Relaxed) {
            self.panics.fetch_add(1, Ordering::Relaxed);
            panic!("a waker that panics");
        }
    }
}

/// The ring serves other guests here, on another thread, and both at once.
async fn goes_on(uring: &Uring, rig: &mut Rig) {
    echo(rig).await;
    let (done, is_done) = tokio::sync::oneshot::channel();
    let elsewhere = uring.clone();
    let thread = std::thread::spawn(move || {
        block_on(echo_in_a_store_of_its_own(elsewhere));
        let _ = done.send(());
    });
    echo_in_a_store_of_its_own(uring.clone()).await;
    is_done.await.unwrap();
    thread.join().unwrap();
}

/// Kills: a panic that leaves the ring's "a thread is inside" set, that reaches the guest or the
/// reaper which wakes, or that keeps another guest's waker from being woken.
#[test]
fn a_waker_that_panics_stops_no_other_guest() {
    block_on(async {
        let uring = uring();
        let mut waiting = Rig::on_ring(&uring).await;
        let mut sending = Rig::on_ring(&uring).await;
        let from = sending.endpoint(LOOPBACK).await;
        for round in 1..=3_u8 {
            let to = waiting.endpoint(LOOPBACK).await;
            let panics = Arc::new(Panics::default());
            let waker = Waker::from(Arc::clone(&panics));
            let pollable = waiting.subscribe_incoming(to.incoming).await;
            {
                let mut receivable = pin!(waiting.block(pollable));
                for _ in 0..3 {
                    // Again after the first poll, and after the yield before an enter.
                    let poll = receivable.as_mut().poll(&mut Context::from_waker(&waker));
                    assert!(poll.is_pending());
                }
                // From here on the thread that enters for all wakes it, or the reaper.
                panics.is_set.store(true, Ordering::Relaxed);
                let sent = sending.send_one(from.outgoing, &[round], Some(to.local)).await;
                assert_eq!(sent, Ok(1));
                eventually("it panics", || panics.panics.load(Ordering::Relaxed) > 0).await;
                goes_on(&uring, &mut sending).await;
                panics.is_set.store(false, Ordering::Relaxed);
                within(receivable).await;
            }
            waiting.drop_pollable(pollable).await;
            assert_eq!(payloads(&waiting.receive(to.incoming, 1).await.unwrap()), [[round]]);
            waiting.close(to).await;
        }
    });
}

/// Kills: datagrams that a call has in hand when the host's policy panics, and that nobody counts.
#[test]
fn what_a_policy_that_panics_keeps_from_a_guest_is_counted() {
    block_on(async {
        let (stranger, from_stranger) = native::socket(own_ip());
        let (friend, _) = native::socket(own_ip());
        let setup = Setup::allow(move |addr, addr_use| {
            let is_sender = matches!(addr_use, SocketAddrUse::UdpReceive);
            assert!(!is_sender || addr != from_stranger, "a stranger");
            true
        });
        let mut rig = Rig::new(Backend::Uring, setup).await;
        let uring = rig.uring.clone();
        let counters = rig.counters();
        let endpoint = rig.endpoint(LOOPBACK).await;
        assert_eq!(rig.receive(endpoint.incoming, 1).await, Ok(vec![]), "armed");
        for native in [&friend, &stranger, &friend] {
            native.send_to(b"x", endpoint.local).unwrap();
        }
        eventually("all are there", || {
            let _ = uring.stats();
            counters.stats().datagrams_received == 3
        })
        .await;
        let receives = tokio::spawn(async move { rig.receive(endpoint.incoming, 10).await });
        assert!(receives.await.unwrap_err().is_panic());
        let stats = counters.stats();
        assert_eq!((stats.dropped_by_policy, stats.dropped_at_close), (3, 0));
        assert_eq!(uring.stats().dropped_by_policy, 3);
    });
}
