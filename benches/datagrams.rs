//! What a datagram costs: `datagrams/batch_16/guests_1/uring_0.2`.

mod support;

fn main() {
    let benches = ["echo", "echo_1200", "batch_1", "batch_4", "batch_16", "batch_16_small"];
    support::run("datagrams", &benches, &[1, 64], support::GUESTS);
}
