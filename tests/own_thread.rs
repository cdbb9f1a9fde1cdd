//! When the ring's own thread runs: in a binary of its own, since the threads of other tests' rings have the
//! same name.

mod common;

use std::fs::{read_dir, read_to_string};
use std::time::Duration;

use common::{Backend, IpAddressFamily, LOOPBACK, Rig, Setup, block_on, eventually, uring};

/// How often the ring's own thread has gone to sleep, if it has started.
fn sleeps() -> Option<u64> {
    let tasks = read_dir("/proc/self/task").unwrap();
    let own = { tasks }.map(|task| task.unwrap().path()).find(|task| {
        read_to_string(task.join("comm")).is_ok_and(|name| name == "wasi-uring-due\n")
    });
    let status = read_to_string(own?.join("status")).unwrap();
    let switches = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    Some(switches.unwrap().trim().parse().unwrap())
}

/// Kills: a thread that looks after each store, and so costs the next ones more than it does itself: what they
/// unmap while it runs interrupts its processor.
#[test]
fn stores_that_come_and_go_leave_the_rings_own_thread_asleep() {
    const STORES: u64 = 100;
    const ROUNDS_MAX: u64 = 100;
    let uring = uring();
    block_on(async {
        let store = async || {
            let mut rig = Rig::new(Backend::Uring, Setup::of(&uring)).await;
            let socket = rig.create(IpAddressFamily::Ipv4).await.unwrap();
            rig.bind(socket, LOOPBACK).await.unwrap();
            rig.drop_socket(socket).await;
            drop(rig);
            // Where thousands a second come, it runs each two milliseconds.
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        store().await;
        eventually("it has started", || sleeps().is_some()).await;
        // A machine with much to do gives each store more time than a close may take.
        let is_asleep = async || {
            let before = sleeps().unwrap();
            for _ in 0..STORES {
                store().await;
            }
            sleeps().unwrap() - before < STORES / 2
        };
        let mut rounds = 0;
        while !is_asleep().await {
            rounds += 1;
            assert!(rounds < ROUNDS_MAX, "it runs for every other store at least");
        }
    });
}
