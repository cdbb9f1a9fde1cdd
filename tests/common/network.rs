//! Networks of a test's own, made with ip(8), as root.

use std::io::Write;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::thread;

use nix::sched::{CloneFlags, unshare};

use super::native::socket;

/// Runs a test on a thread that is in a network by itself. Threads and processes started there
/// are in it, too.
pub fn in_a_network(mtu: u32, test: impl FnOnce() + Send) {
    let alone = || {
        unshare(CloneFlags::CLONE_NEWNET)
            .expect("these tests make networks, for which they are root");
        run(&format!("ip link set lo up mtu {mtu}"));
        test();
    };
    thread::scope(|scope| scope.spawn(alone).join()).expect("the test's own part");
}

/// A network in which a packet or two get through, then a byte per second, until `flow`.
pub fn in_a_clogged_network(test: impl FnOnce() + Send) {
    in_a_network(1500, || {
        run("tc qdisc add dev lo root tbf rate 8bit burst 2000 limit 1000000");
        let _unclogged = Unclogged;
        test();
    });
}

/// A packet that waits in a queue keeps its network alive, and with it memory of the processor's
/// one ICMP socket: after many such networks the kernel reports closed ports in none.
struct Unclogged;

impl Drop for Unclogged {
    fn drop(&mut self) {
        run("tc qdisc del dev lo root");
    }
}

/// Lets nothing more through.
pub fn clog() {
    run("tc qdisc change dev lo root tbf rate 8bit burst 2000 limit 1000000");
}

/// Lets everything through, from the next packet on.
pub fn flow() {
    run("tc qdisc change dev lo root tbf rate 1gbit burst 2000 limit 1000000");
    let (native, _) = socket(Ipv4Addr::LOCALHOST);
    native.send_to(b"the next", "127.0.0.1:9").unwrap();
}

/// Runs a command.
pub fn run(line: &str) {
    run_with(line, "");
}

/// Runs a command with an input.
pub fn run_with(line: &str, input: &str) {
    let mut words = line.split(' ');
    let mut command = Command::new(words.next().unwrap());
    command.args(words).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("iproute2 is installed");
    // A command that has ended before it read this has said why.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}
