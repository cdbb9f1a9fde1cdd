//! What a socket's life costs: `life/bind/guests_64/uring_0.2`.

mod support;

fn main() {
    support::run("life", &["create", "bind", "dns"], &[1, 64], support::GUESTS);
}
