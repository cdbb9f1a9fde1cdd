//! Lines of statistics, as statsd takes them, numbered so that a collector can tell which are missing.
//! Guests are built with this file, too.

use std::fmt::Write as _;
use std::ops::Range;

/// What one request of an ordinary service reports.
const METRICS: [(&str, &str); 5] = [
    ("http.requests", "1|c"),
    ("http.latency", "12.75|ms"),
    ("http.bytes", "1843|c"),
    ("db.queries", "3|c"),
    ("db.latency", "4.20|ms"),
];

/// What a source sends: so many bursts, of so many lines each, with pauses between them.
#[derive(Clone, Copy)]
pub struct Load {
    pub bursts: u64,
    pub lines: u64,
    pub pause_millis: u64,
}

impl Load {
    /// The numbers of a burst's lines.
    pub fn numbers(self, burst: u64) -> Range<u64> {
        burst * self.lines..(burst + 1) * self.lines
    }

    pub fn pause_nanos(self) -> u64 {
        self.pause_millis * 1_000_000
    }

    /// How long a source waits before its first burst, so that they do not march in step.
    pub fn start_nanos(self, source: u64) -> u64 {
        source % self.pause_nanos().max(1)
    }
}

/// The source's line of this number.
pub fn write(line: &mut String, source: u64, number: u64) {
    let at = usize::try_from(number % METRICS.len() as u64).unwrap_or(0);
    let (name, value) = METRICS[at];
    line.clear();
    // Writing to a String cannot fail.
    let _ = write!(line, "shop.{name}:{value}|#source:{source:016x},number:{number}");
}

/// The source and number of a line.
pub fn read(line: &[u8]) -> Option<(u64, u64)> {
    let line = std::str::from_utf8(line).ok()?;
    let (_, tags) = line.split_once("|#source:")?;
    let (source, number) = tags.split_once(",number:")?;
    Some((u64::from_str_radix(source, 16).ok()?, number.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_its_source_and_number() {
        let mut line = String::new();
        for number in [0, 1, 2, 99] {
            write(&mut line, 0xA5 << 56, number);
            assert_eq!(read(line.as_bytes()), Some((0xA5 << 56, number)), "{line}");
        }
        assert_eq!(read(b"shop.http.requests:1|c"), None);
    }
}
