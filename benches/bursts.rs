//! What the life of a socket costs that receives a burst, and so gets `UDP_GRO`, where the kernel's keys for
//! that stay on and where not (`ring::gro_key`), in alternation: `cargo bench -p wasi-uring --bench bursts`.
//! Through a guest of WASI 0.2. (There is no difference while any other process of the machine has such a
//! socket.)

#[path = "../tests/common/mod.rs"]
mod common;

use std::fs;
use std::net::SocketAddr;
use std::time::Instant;

use common::filter::with_filter;
use common::{LOOPBACK, LOOPBACK_6, Rig, block_on, native, uring};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use wasi_uring::Uring;

/// From so many on that wait, a socket receives in bursts.
const BURST: usize = 4;

/// What a life takes: CPU time of the process and wall time, in microseconds, and interrupts that
/// processors send each other, those of the whole machine.
#[derive(Clone, Copy, Debug)]
struct Cost {
    cpu: f64,
    wall: f64,
    interrupts: f64,
}

fn cpu_micros() -> u64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    micros.unsigned_abs()
}

/// Function call interrupts so far.
fn interrupts() -> u64 {
    let table = fs::read_to_string("/proc/interrupts").unwrap();
    let calls = table.lines().find(|line| line.trim_start().starts_with("CAL:"));
    let counts = calls.unwrap_or_default().split_whitespace();
    counts.skip(1).map_while(|count| count.parse::<u64>().ok()).sum()
}

/// On a thread that can make no sockets: so a ring whose guests had no burst before keeps none.
#[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
fn cost(uring: &Uring, any: SocketAddr, lives: usize) -> Cost {
    let (native, _) = native::socket(any.ip());
    with_filter(libc::SYS_socket, libc::EPERM, || {
        block_on(async {
            let mut rig = Rig::on_ring(uring).await;
            rig.receiving_life(any, &native, BURST).await;
            let (cpu, called, begin) = (cpu_micros(), interrupts(), Instant::now());
            for _ in 0..lives {
                rig.receiving_life(any, &native, BURST).await;
            }
            let of_each = |all: f64| all / lives as f64;
            Cost {
                wall: of_each(begin.elapsed().as_secs_f64() * 1e6),
                cpu: of_each((cpu_micros() - cpu) as f64),
                interrupts: of_each((interrupts() - called) as f64),
            }
        })
    })
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Of a ring that has a socket with `UDP_GRO` of its own from now on.
fn keep_keys_on(uring: &Uring) {
    let (native, _) = native::socket(LOOPBACK.ip());
    block_on(async {
        let mut rig = Rig::on_ring(uring).await;
        rig.receiving_life(LOOPBACK, &native, BURST).await;
    });
}

fn main() {
    // `cargo test --benches` only wants to see it run.
    let is_bench = std::env::args().any(|arg| arg == "--bench");
    let (rounds, lives) = if is_bench { (9, 300) } else { (1, 3) };
    for (family, any) in [("IPv4", LOOPBACK), ("IPv6", LOOPBACK_6)] {
        let mut measured = Vec::new();
        for _ in 0..rounds {
            let uring = uring();
            let off = cost(&uring, any, lives);
            keep_keys_on(&uring);
            measured.push((off, cost(&uring, any, lives)));
        }
        let figure = |what: &str, of: fn(&Cost) -> f64| {
            let off = median(measured.iter().map(|(off, _)| of(off)));
            let on = median(measured.iter().map(|(_, on)| of(on)));
            println!("{family}, {what} of a life: {off:.1} without, {on:.1} with the keys kept on");
        };
        figure("µs of CPU", |cost| cost.cpu);
        figure("µs of wall time", |cost| cost.wall);
        figure("interrupts", |cost| cost.interrupts);
    }
}
