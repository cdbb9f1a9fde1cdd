//! One handle for all threads of a host: who has which ring, more sockets than a table holds, and rings
//! that cannot be built. By itself, because it changes the process's limit of open files.

mod common;

use std::net::{Ipv4Addr, SocketAddr};

use common::filter::with_filter;
use common::network::in_a_network;
use common::{
    Endpoint, ErrorCode, IpAddressFamily, LOOPBACK, Rig, Setup, block_on, eventually, native,
    payloads, within,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::runtime::Builder;
use wasi_uring::{Recycle, SetupError, Uring};

/// One datagram to itself.
async fn echo(rig: &mut Rig, endpoint: Endpoint) {
    assert_eq!(rig.send_one(endpoint.outgoing, b"self", Some(endpoint.local)).await, Ok(1));
    let received = rig.receive_exactly(endpoint.incoming, 1).await;
    assert_eq!(payloads(&received), [b"self"]);
}

/// A guest's socket that has sent and received.
async fn used(rig: &mut Rig) -> Endpoint {
    let endpoint = rig.endpoint(LOOPBACK).await;
    echo(rig, endpoint).await;
    endpoint
}

/// Kills: a table as large as the sum; a socket that goes to a full table.
#[test]
fn a_hundred_thousand_sockets_are_open_under_a_limit_of_twenty_thousand_files() {
    const SOCKETS: u32 = 100_000;
    const FILES: u64 = 20_000;
    /// Guests with an address of their own each, since one has 65,536 ports.
    const GUESTS: u32 = 10;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, FILES, hard).unwrap();
    in_a_network(65_536, || {
        block_on(async {
            let uring = Uring::builder().sockets(SOCKETS).build().unwrap();
            let mut guests = Vec::new();
            for guest in 0..GUESTS {
                let setup = Setup { sockets_max: SOCKETS, ..Setup::of(&uring) };
                let mut rig = Rig::new(common::Backend::Uring, setup).await;
                let addr = Ipv4Addr::new(127, 1, 0, u8::try_from(guest).unwrap());
                let mut last = None;
                for _ in 0..SOCKETS / GUESTS {
                    last = Some(rig.bound((addr, 0)).await);
                }
                guests.push((rig, last.unwrap()));
            }
            let stats = uring.stats();
            assert_eq!(stats.sockets_open, SOCKETS.into());
            assert!(stats.rings > u64::from(SOCKETS) / FILES, "{stats:?}");
            assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap().0, FILES);
            let (rig, _) = &mut guests[0];
            let refused = rig.create(IpAddressFamily::Ipv4).await;
            assert_eq!(refused, Err(ErrorCode::NewSocketLimit));
            // Each is a socket like others, whichever ring it is in, and makes room for any other.
            for (rig, (socket, local)) in &mut guests {
                let (incoming, outgoing) = rig.stream(*socket, None).await.unwrap();
                let endpoint = Endpoint { socket: *socket, incoming, outgoing, local: *local };
                echo(rig, endpoint).await;
                rig.close(endpoint).await;
                used(rig).await;
            }
        });
    });
}

/// Sockets of guests that run at once, each on a worker of its own.
#[test]
fn each_worker_has_a_ring_and_so_have_other_threads() {
    const WORKERS: usize = 3;
    let uring = Uring::builder().sockets(64).rings(WORKERS).build().unwrap();
    assert_eq!(uring.stats().rings, 1);
    let runtime = Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build().unwrap();
    runtime.block_on(within(async {
        // So that each is on another.
        let together = std::sync::Arc::new(std::sync::Barrier::new(WORKERS));
        let guests: Vec<_> = (0..WORKERS)
            .map(|_| {
                let (uring, together) = (uring.clone(), together.clone());
                tokio::spawn(async move {
                    let mut rig = Rig::on_ring(&uring).await;
                    // A worker that waits here has this guest for as long as it does not suspend, and a
                    // socket is created before.
                    together.wait();
                    used(&mut rig).await;
                })
            })
            .collect();
        for guest in guests {
            guest.await.unwrap();
        }
        assert_eq!(uring.stats().rings, WORKERS as u64);
        // This is none of the workers.
        used(&mut Rig::on_ring(&uring).await).await;
    }));
    std::thread::spawn({
        let uring = uring.clone();
        move || block_on(async { _ = used(&mut Rig::on_ring(&uring).await).await })
    })
    .join()
    .unwrap();
    assert_eq!(uring.stats().rings, WORKERS as u64, "rings are for so many threads");
    block_on(eventually("all are closed", || uring.stats().sockets_open == 0));
}

/// Kills: a socket that is refused because its thread's ring cannot be built.
#[test]
fn a_thread_whose_ring_cannot_be_built_shares_that_of_another() {
    let builder = || Uring::builder().sockets(8).rings(64).recycle(Recycle::OFF);
    let (lazy, built) = (builder().build().unwrap(), builder().build_all().build().unwrap());
    assert_eq!((lazy.stats().rings, built.stats().rings), (1, 64));
    for (uring, rings) in [(&lazy, 1), (&built, 64)] {
        // Of several threads at least one is another than that of the first ring.
        for _ in 0..2 {
            with_filter(libc::SYS_io_uring_setup, libc::EPERM, || {
                block_on(async {
                    let mut rig = Rig::on_ring(uring).await;
                    let endpoint = used(&mut rig).await;
                    rig.close(endpoint).await;
                });
                assert!(matches!(builder().build(), Err(SetupError::DeniedBySeccomp { .. })));
            });
        }
        assert_eq!(uring.stats().rings, rings);
    }
}

/// A socket stays in its ring when its guest moves.
#[test]
fn a_guest_moves_between_threads_with_its_sockets() {
    let uring = Uring::builder().sockets(16).rings(4).build().unwrap();
    let (native, to) = native::socket(Ipv4Addr::LOCALHOST);
    let mut guest = block_on(async {
        let mut rig = Rig::on_ring(&uring).await;
        let endpoint = used(&mut rig).await;
        (rig, endpoint)
    });
    let mut seen: Vec<SocketAddr> = Vec::new();
    for _ in 0..4 {
        guest = std::thread::spawn(move || {
            block_on(async {
                let (mut rig, endpoint) = guest;
                // And one of this thread's ring.
                let other = used(&mut rig).await;
                echo(&mut rig, endpoint).await;
                assert_eq!(rig.send_one(endpoint.outgoing, b"x", Some(to)).await, Ok(1));
                rig.close(other).await;
                (rig, endpoint)
            })
        })
        .join()
        .unwrap();
        seen.push(native.recv_from(&mut [0; 8]).unwrap().1);
    }
    assert!(seen.iter().all(|from| *from == guest.1.local), "{seen:?}");
    drop(guest);
    block_on(eventually("all are closed", || uring.stats().sockets_open == 0));
}
