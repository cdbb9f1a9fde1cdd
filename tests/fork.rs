//! A process that is duplicated after it has built a ring, in a binary of its own: a fork has one thread,
//! and the locks of the others' as they were.

#![expect(unsafe_code, reason = "fork(2)")]

mod common;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use common::{
    BOUND, Endpoint, IpAddressFamily, LOOPBACK, Rig, armed_in_a_former_runtime, block_on, native,
    payloads, uring,
};
use wasi_uring::{RingGone, Stats, UdpCtx};

/// Runs that in a fork of this process, which must end well.
fn in_a_fork(run: impl FnOnce()) {
    // SAFETY: the child runs this closure and leaves by `_exit`, on its only thread; the test's other
    // thread waits for this one, and holds no lock that the closure needs.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "fork(2)");
    if child == 0 {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        // SAFETY: nothing of this process is needed any more.
        unsafe { libc::_exit(i32::from(result.is_err())) };
    }
    let deadline = Instant::now() + BOUND;
    loop {
        let mut status = 0;
        // SAFETY: the pointer is to a local.
        match unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } {
            0 => assert!(Instant::now() < deadline, "the fork hangs"),
            ended => {
                assert_eq!(ended, child);
                assert!(
                    libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0,
                    "status {status:#x}"
                );
                return;
            }
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[track_caller]
fn is_told<T: std::fmt::Debug>(answer: wasmtime::Result<T>) {
    let error = answer.expect_err("must trap");
    assert_eq!(error.downcast_ref(), Some(&RingGone::Forked), "{error:?}");
    assert!(format!("{error:#}").contains("is a fork"), "{error:#}");
}

/// Sends a datagram to a guest, which receives it.
fn hears(rig: &mut Rig, endpoint: Endpoint) {
    let (native, _) = native::socket(LOOPBACK.ip());
    native.send_to(b"to the parent", endpoint.local).unwrap();
    block_on(async {
        let received = rig.receive_blocking(endpoint.incoming).await.unwrap();
        assert_eq!(payloads(&received), [b"to the parent"]);
    });
}

#[test]
fn a_fork_of_the_process_gets_errors_and_its_drops_are_harmless() {
    let uring = uring();
    let (mut rig, endpoint) = armed_in_a_former_runtime(&uring);
    let calls: [fn(&mut Rig, Endpoint, SocketAddr); 6] = [
        |Rig { guest, store, .. }, _, _| {
            is_told(block_on(guest.call_create_udp_socket(store, IpAddressFamily::Ipv4)));
        },
        |Rig { guest, store, .. }, Endpoint { incoming, .. }, _| {
            is_told(block_on(guest.call_receive(store, incoming, 1)));
        },
        |Rig { guest, store, .. }, Endpoint { outgoing, .. }, peer| {
            let datagram = common::datagram(b"from the fork", Some(peer));
            is_told(block_on(guest.call_send(store, outgoing, &[datagram])));
        },
        |Rig { guest, store, .. }, Endpoint { socket, .. }, _| {
            is_told(block_on(guest.call_set_unicast_hop_limit(store, socket, 9)));
        },
        // What needs no ring.
        |rig, endpoint, _| block_on(rig.close(endpoint)),
        |rig, _, _| {
            let stats = rig.uring.stats();
            assert_eq!(stats, Stats::default());
            rig.uring.close_cached();
            rig.uring.close();
            drop(UdpCtx::builder(&rig.uring).build());
        },
    ];
    block_on(async { assert_eq!(rig.check_send(endpoint.outgoing).await, Ok(16)) });
    let (native, peer) = native::socket(LOOPBACK.ip());
    native.set_nonblocking(true).unwrap();
    for call in calls {
        in_a_fork(|| call(&mut rig, endpoint, peer));
        hears(&mut rig, endpoint);
    }
    assert!(native.recv(&mut [0; 32]).is_err(), "nothing came from a fork");

    // Everything is dropped, and a ring of the fork's own works.
    let mut all = Some((rig, armed_in_a_former_runtime(&uring), uring));
    in_a_fork(|| {
        drop(all.take());
        let uring = common::uring();
        let (mut rig, endpoint) = armed_in_a_former_runtime(&uring);
        hears(&mut rig, endpoint);
        let rings = std::fs::read_dir("/proc/self/fd").unwrap().filter(|fd| {
            let target = std::fs::read_link(fd.as_ref().unwrap().path());
            target.is_ok_and(|target| target.to_string_lossy().contains("[io_uring]"))
        });
        assert_eq!(rings.count(), 1, "its own: the parent's is not kept alive");
    });
    let (mut rig, (mut other_rig, other), _uring) = all.unwrap();
    hears(&mut rig, endpoint);
    hears(&mut other_rig, other);
}
