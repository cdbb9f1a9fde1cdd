//! What a datagram costs: `datagrams/batch_16/guests_1/uring_0.2/cpu`.

mod support;

const FEW: &[usize] = &[1, 64];
/// Each has a socket that receives.
const MANY: &[usize] = &[1, 64, 1024];

fn main() {
    let benches = [
        ("echo", FEW),
        ("echo_1200", FEW),
        ("batch_1", FEW),
        ("batch_4", FEW),
        ("batch_16", FEW),
        ("batch_16_small", FEW),
        ("burst_16", FEW),
        ("receive", MANY),
        ("receive_1200", MANY),
    ];
    support::run("datagrams", &benches, support::GUESTS);
}
