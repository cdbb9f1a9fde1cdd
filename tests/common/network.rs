//! Networks of a test's own, made with ip(8), as root.

use std::io::Write;
use std::process::{Command, Stdio};
use std::thread;

use nix::sched::{CloneFlags, unshare};

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
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}
