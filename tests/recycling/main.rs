//! A guest cannot distinguish recycled sockets from new ones: a million of them here; their ports
//! in `ports.rs`; how many are cached, and that those have neither port nor slot, in `limits.rs`.

mod churn;
#[path = "../common/mod.rs"]
mod common;
mod limits;
mod natives;
mod ports;

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use common::network::in_a_network;
use common::{BOUND, eventually};
use tokio::runtime::Builder;
use wasi_uring::Uring;

use churn::{Churn, Tally};
use natives::{FIRST_CYCLE, Heard, Natives};

const RECYCLED: u64 = 1_000_000;

/// Guests on two workers.
const GUESTS: usize = 4;

/// Cycles of a guest between two checks of whether the test is over.
const CHAPTER: u32 = 500;

/// New sockets after which the test stops and fails, since the ring does not recycle. While grace
/// periods take long, every socket opened meanwhile is new: on a busy machine one in three.
const NEW_MAX: u64 = RECYCLED;

/// What guests share.
struct World {
    uring: Uring,
    seed: u64,
    next_cycle: AtomicU32,
    is_over: AtomicBool,
}

impl World {
    /// A guest's share: chapter after chapter, until enough is done or something is wrong.
    async fn churn(self: Arc<Self>) -> Result<Tally, String> {
        let mut guest = Churn::on(&self.uring).await;
        let mut tally = Tally::default();
        while !self.is_over.load(Ordering::Relaxed) {
            let first = self.next_cycle.fetch_add(CHAPTER, Ordering::Relaxed);
            let ran = guest.run(self.seed, first, CHAPTER).await;
            let stats = self.uring.stats();
            let is_enough = stats.sockets_recycled >= RECYCLED;
            let is_in_vain = stats.sockets_created - stats.sockets_recycled > NEW_MAX;
            if ran.is_err() || is_enough || is_in_vain {
                self.is_over.store(true, Ordering::Relaxed);
            }
            tally = tally + ran?;
        }
        Ok(tally)
    }
}

/// Kills: no grace period, or one that began before a socket was unbound; a socket that is not
/// drained, is drained once, or is not unbound; a taint that is not recorded.
#[test]
fn no_guest_receives_what_is_not_its_own_over_a_million_recycled_sockets() {
    let seed = RandomState::new().hash_one(0);
    eprintln!("seed {seed}");
    in_a_network(65_536, || {
        natives::settle();
        let natives = Natives::start();
        let uring = Uring::builder().sockets(1024).build().unwrap();
        let (next_cycle, is_over) = (FIRST_CYCLE.into(), false.into());
        let world = Arc::new(World { uring: uring.clone(), seed, next_cycle, is_over });
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let ran = runtime.block_on(async {
            let guests: Vec<_> =
                (0..GUESTS).map(|_| tokio::spawn(Arc::clone(&world).churn())).collect();
            let mut tally: Result<_, String> = Ok(Tally::default());
            for guest in guests {
                let ran = tokio::time::timeout(2 * BOUND, guest)
                    .await
                    .expect("done in ten minutes")
                    .unwrap();
                tally = tally.and_then(|tally| Ok(tally + ran?));
            }
            eventually("every slot is free", || uring.stats().sockets_open == 0).await;
            tally
        });
        let heard = natives.stop();
        // A guest that finds something wrong may do so because a native has.
        let heard = heard.unwrap_or_else(|wrong| panic!("a native found: {wrong} (and {ran:?})"));
        let tally = ran.unwrap_or_else(|wrong| panic!("a guest found: {wrong}"));
        assert_everything_is_accounted_for(&uring, tally, heard);
    });
}

fn assert_everything_is_accounted_for(uring: &Uring, tally: Tally, heard: Heard) {
    let stats = uring.stats();
    let account = format!("{tally:?}, {heard:?}, {stats:#?}");
    assert!(stats.sockets_recycled >= RECYCLED, "{account}");
    assert_eq!(stats.sockets_created, tally.cycles, "{account}");
    // What the guests have sent has arrived, and what was sent to them.
    assert_eq!(heard, Heard { hellos: tally.hellos, answers: tally.answers }, "{account}");
    // What has arrived they have received, or it came when they were about to close the socket.
    let withheld = stats.dropped_at_close + stats.dropped_not_from_peer + stats.dropped_by_policy;
    assert_eq!(stats.datagrams_received, tally.heard + withheld, "{account}");
    assert_eq!(stats.dropped_malformed, 0, "{account}");
    // Sockets that a next owner could distinguish from new ones were not cached.
    let closed = stats.closed_instead;
    assert_eq!((closed.named_port, closed.error), (tally.named_port, tally.refused), "{account}");
    // Some have received so many datagrams at once that the ring has turned GRO on.
    let bursty = closed.options.checked_sub(tally.set_hops).expect("each was closed for it");
    let connected = closed.connected..=closed.connected + bursty;
    assert!(connected.contains(&tally.connected_v6), "{account}");
}
