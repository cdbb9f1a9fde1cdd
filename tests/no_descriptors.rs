//! A process that has no descriptor to spare, in a binary of its own: other tests need some.

mod common;

use std::fs::File;
use std::net::Ipv4Addr;

use common::{IpAddressFamily, Rig, block_on, native, payloads, uring};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Kills: a runtime whose first guest comes at such a time, and that no arrival wakes from then on.
#[test]
fn a_guest_is_woken_although_no_descriptor_was_left_when_its_runtime_first_used_the_ring() {
    let uring = uring();
    block_on(async {
        let mut rig = Rig::on_ring(&uring).await;
        let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
        let addr = native::closed_port(Ipv4Addr::LOCALHOST);
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 256, hard).unwrap();
        let taken: Vec<_> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
        assert!(!taken.is_empty() && taken.len() < 256);

        let socket = rig.create(IpAddressFamily::Ipv4).await.unwrap();
        rig.bind(socket, addr).await.unwrap();
        let (incoming, _) = rig.stream(socket, None).await.unwrap();
        for n in 0..3_u8 {
            // The guest blocks first.
            let send = async { native.send_to(&[n], addr).unwrap() };
            let (received, _) = tokio::join!(biased; rig.receive_blocking(incoming), send);
            assert_eq!(payloads(&received.unwrap()), [[n]]);
        }
    });
}
