//! What an echo round trip costs against the number of guests that can run.

mod support;

fn main() {
    support::run("tick", &[("echo", &[1, 16, 64, 256, 1024, 4096])], support::GUESTS);
}
