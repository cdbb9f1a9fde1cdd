//! A self-test of recycling that cannot run when the ring is built, in a binary of its own: what it finds out
//! is remembered for the process.

mod common;

use std::fs;

use common::network::in_a_network;
use common::{
    ErrorCode, IpAddressFamily, LOOPBACK, LOOPBACK_6, Rig, block_on, eventually, native, uring,
};

/// Kills: a verdict of a test that could not run; a test that is never tried again.
#[test]
fn sockets_are_recycled_once_there_are_ports_to_test_with() {
    in_a_network(65_536, || {
        let ports = |range| fs::write("/proc/sys/net/ipv4/ip_local_port_range", range).unwrap();
        ports("40000 40000");
        let (taken, at) = native::socket(LOOPBACK.ip());
        assert_eq!(at.port(), 40_000);
        let uring = uring();
        drop(taken);
        block_on(async {
            let mut rig = Rig::on_ring(&uring).await;
            for few in [true, false] {
                for (family, any) in
                    [(IpAddressFamily::Ipv4, LOOPBACK), (IpAddressFamily::Ipv6, LOOPBACK_6)]
                {
                    let before = uring.stats().sockets_recycled;
                    let mut cycles = 0;
                    while uring.stats().sockets_recycled == before && !(few && cycles == 50) {
                        cycles += 1;
                        assert!(cycles < 20_000, "never: {:?}", uring.stats());
                        let socket = rig.create(family).await.unwrap();
                        // (The self-test that is tried meanwhile may have the only port.)
                        let bound = rig.bind(socket, any).await;
                        assert!(bound.is_ok() || few && bound == Err(ErrorCode::AddressInUse));
                        rig.drop_socket(socket).await;
                        let mut waited = false;
                        eventually("a moment later", || std::mem::replace(&mut waited, true)).await;
                    }
                    assert_eq!(uring.stats().sockets_recycled > before, !few);
                }
                ports("40000 50000");
            }
        });
    });
}
