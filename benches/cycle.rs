//! What a socket's cycle costs: `cycle/bind/guests_64/uring_0.2/cpu`.

mod support;

const FEW: &[usize] = &[1, 64];

fn main() {
    support::run("cycle", &[("create", FEW), ("bind", FEW), ("dns", FEW)], support::GUESTS);
}
