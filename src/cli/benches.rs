//! The table of benches. The command's help and errors, JSON, Markdown, SVG and scripts take names
//! and texts from here.

/// What a guest does over and over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Create,
    Bind,
    Bind6,
    Pair,
    Dns,
    Echo,
    Batch,
    Burst,
    Receive,
}

impl Operation {
    /// The mode of the built-in guest.
    pub(crate) fn mode(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Bind => "bind",
            Self::Bind6 => "bind6",
            Self::Pair => "pair",
            Self::Dns => "dns",
            Self::Echo => "echo",
            Self::Batch => "batch",
            Self::Burst => "burst",
            Self::Receive => "receive",
        }
    }
}

/// An operation whose cost is measured.
#[derive(Debug)]
pub struct Bench {
    /// By this name it is chosen.
    pub name: &'static str,
    /// What one operation does.
    pub what: &'static str,
    pub(crate) operation: Operation,
    /// Sockets that one operation opens; 0 where a guest opens them once.
    pub(crate) sockets: u32,
    /// Datagrams that are sent together.
    pub(crate) datagrams: usize,
    /// Bytes of a datagram.
    pub(crate) bytes: usize,
    /// How often a lone guest does it in a round.
    pub(crate) count: usize,
    /// Whether the README's table has it.
    pub(crate) is_headline: bool,
}

impl Bench {
    const fn new(
        name: &'static str,
        operation: Operation,
        count: usize,
        what: &'static str,
    ) -> Self {
        Self {
            name,
            what,
            operation,
            sockets: 0,
            datagrams: 1,
            bytes: 64,
            count,
            is_headline: false,
        }
    }

    const fn opening(self, sockets: u32) -> Self {
        Self { sockets, ..self }
    }

    const fn of(self, datagrams: usize, bytes: usize) -> Self {
        Self { datagrams, bytes, ..self }
    }

    const fn headline(self) -> Self {
        Self { is_headline: true, ..self }
    }

    /// The bench of a name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        BENCHES.iter().find(|bench| bench.name == name)
    }
}

use Operation::{Batch, Bind, Bind6, Burst, Create, Dns, Echo, Pair, Receive};

/// Every bench of speed. To open is to create and bind.
#[rustfmt::skip]
pub const BENCHES: &[Bench] = &[
    Bench::new("create", Create, 200_000, "create, drop").opening(1).headline(),
    Bench::new("bind", Bind, 20_000, "create, bind, drop").opening(1).headline(),
    Bench::new("bind6", Bind6, 20_000, "create, bind, drop; IPv6").opening(1),
    Bench::new("pair", Pair, 5_000, "open two, a datagram each way, drop").opening(2),
    Bench::new("dns", Dns, 6_000, "open, connect, send, be answered, drop").opening(1).headline(),
    Bench::new("echo", Echo, 15_000, "echo round trip, 64 bytes").headline(),
    Bench::new("echo_1200", Echo, 15_000, "echo round trip, 1200 bytes").of(1, 1200),
    Bench::new("batch_1", Batch, 10_000, "send and receive 1 datagram of 1200 bytes").of(1, 1200),
    Bench::new("batch_4", Batch, 4_000, "send at once and receive 4 datagrams of 1200 bytes").of(4, 1200),
    Bench::new("batch_16", Batch, 1_000, "send at once and receive 16 datagrams of 1200 bytes").of(16, 1200).headline(),
    Bench::new("batch_16_small", Batch, 1_000, "send at once and receive 16 datagrams of 64 bytes").of(16, 64),
    Bench::new("burst_16", Burst, 1_000, "send one by one and receive 16 datagrams of 1200 bytes").of(16, 1200).headline(),
    Bench::new("receive", Receive, 2_000, "receive 16 datagrams of 64 bytes from another thread").of(16, 64).headline(),
    Bench::new("receive_1200", Receive, 2_000, "receive 16 datagrams of 1200 bytes from another thread").of(16, 1200),
];

/// Bytes of the longest datagram.
pub(crate) const BYTES_MAX: usize = 1200;

/// Bytes of a request for datagrams, which each of them begins with.
pub(crate) const REQUEST_BYTES: usize = 4;

const _: () = {
    let mut at = 0;
    while at < BENCHES.len() {
        let bytes = BENCHES[at].bytes;
        assert!(REQUEST_BYTES <= bytes && bytes <= BYTES_MAX);
        at += 1;
    }
};

/// A bench of something else than speed.
pub(crate) struct Special {
    pub(crate) name: &'static str,
    pub(crate) what: &'static str,
    /// What is measured.
    pub(crate) kind: &'static str,
}

pub(crate) const FLOOD: Special = Special {
    name: "flood",
    what: "the latency of many sockets while another is flooded",
    kind: "latency",
};
pub(crate) const NEIGHBOUR: Special = Special {
    name: "neighbour",
    what: "the latency of many sockets while a guest on the same runtime computes",
    kind: "latency",
};
pub(crate) const IDLE: Special = Special {
    name: "idle",
    what: "the memory of a socket that is bound, or waits for datagrams",
    kind: "memory",
};
pub(crate) const DENSITY: Special = Special {
    name: "density",
    what: "many sockets in one process: memory, opening, closing, a datagram to one of them; buffers of a ring",
    kind: "density",
};

/// Every bench of something else than speed.
const SPECIALS: [Special; 4] = [FLOOD, NEIGHBOUR, IDLE, DENSITY];

/// Every bench: its name, what is measured, and what it does.
pub(crate) fn all() -> impl Iterator<Item = (&'static str, &'static str, &'static str)> {
    let speed = BENCHES.iter().map(|bench| (bench.name, "speed", bench.what));
    speed.chain(SPECIALS.map(|special| (special.name, special.kind, special.what)))
}

/// The same for people, a line each.
pub(crate) fn listed() -> String {
    let line = |(name, _, what)| format!("  {name:<15} {what}\n");
    all().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_benchs_words_agree_with_its_numbers() {
        for Bench { name, what, operation, datagrams, bytes, .. } in BENCHES {
            assert!(name.starts_with(operation.mode()), "{name}");
            if matches!(operation, Batch | Burst | Receive) {
                assert!(what.contains(&format!("{datagrams} datagram")), "{name}: {what}");
            }
            if matches!(operation, Batch | Burst | Receive | Echo) {
                assert!(what.contains(&format!("{bytes} bytes")), "{name}: {what}");
            }
        }
    }

    #[test]
    fn names_are_unique() {
        for (name, ..) in all() {
            assert_eq!(all().filter(|(other, ..)| *other == name).count(), 1, "{name}");
        }
    }
}
