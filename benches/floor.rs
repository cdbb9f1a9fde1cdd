//! What the same operations cost without WebAssembly: native programs, and the ring by itself.

mod support;

fn main() {
    let benches = ["create", "bind", "dns", "echo", "echo_1200", "batch_1", "batch_16", "receive"];
    support::run("floor", &benches.map(|bench| (bench, &[1, 64][..])), support::NATIVES);
}
