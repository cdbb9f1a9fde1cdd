//! What a socket's life costs: `life/bind/guests_64/uring_0.2/cpu`.

mod support;

const FEW: &[usize] = &[1, 64];

fn main() {
    support::run("life", &[("create", FEW), ("bind", FEW), ("dns", FEW)], support::GUESTS);
}
