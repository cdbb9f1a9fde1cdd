//! The collector of statistics: counts lines, and by their numbers those that are missing.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddrV4, UdpSocket};

use nix::sys::socket::{setsockopt, sockopt};
use serde_json::{Value, json};

use super::line;

/// Lines that come while this process has no CPU wait here. Needs `CAP_NET_ADMIN`.
const RECEIVE_BUFFER_BYTES: usize = 64 << 20;
/// Answered with the counts so far. What was sent before it has been counted.
const REPORT: &[u8] = b"report";
/// The same, as the last thing.
const END: &[u8] = b"end";

#[derive(Default)]
struct Counts {
    lines: u64,
    unreadable: u64,
    /// The next number of each source, if none gets lost.
    next: HashMap<u64, u64>,
}

impl Counts {
    fn add(&mut self, datagram: &[u8]) {
        match line::read(datagram) {
            Some((source, number)) => {
                self.lines += 1;
                let next = self.next.entry(source).or_default();
                *next = (number + 1).max(*next);
            }
            None => self.unreadable += 1,
        }
    }

    fn report(&self) -> Value {
        let numbered: u64 = self.next.values().sum();
        json!({
            "lines": self.lines,
            "missing": numbered.saturating_sub(self.lines),
            "sources": self.next.len(),
            "unreadable": self.unreadable,
        })
    }
}

pub(super) fn run(listen: SocketAddrV4) -> io::Result<()> {
    let socket = UdpSocket::bind(listen)?;
    setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER_BYTES)?;
    let mut counts = Counts::default();
    let mut buffer = [0; 2048];
    loop {
        let (len, sender) = socket.recv_from(&mut buffer)?;
        match &buffer[..len] {
            asked @ (REPORT | END) => {
                socket.send_to(counts.report().to_string().as_bytes(), sender)?;
                if asked == END {
                    return Ok(());
                }
            }
            datagram => counts.add(datagram),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_have_not_come_are_missing_whoever_sent_them() {
        let mut counts = Counts::default();
        let mut text = String::new();
        for (source, number) in [(1, 0), (1, 3), (2, 0), (2, 1), (3, 1)] {
            line::write(&mut text, source, number);
            counts.add(text.as_bytes());
        }
        counts.add(b"nothing");
        let report = json!({ "lines": 5, "missing": 3, "sources": 3, "unreadable": 1 });
        assert_eq!(counts.report(), report);
    }
}
