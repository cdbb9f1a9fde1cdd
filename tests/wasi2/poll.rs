//! Pollables: which are ready, and what wakes a guest that blocks.

use std::net::Ipv4Addr;

use crate::common::{
    Backend, Endpoint, LOOPBACK, Setup, datagram, native, on, on_both, payloads, yield_to_others,
};

#[test]
fn poll_returns_the_positions_of_all_that_are_ready() {
    on_both(Setup::default(), async |rig| {
        let sender = rig.endpoint(LOOPBACK).await;
        let mut endpoints = Vec::new();
        let mut pollables = Vec::new();
        for _ in 0..4 {
            let endpoint = rig.endpoint(LOOPBACK).await;
            pollables.push(rig.subscribe_incoming(endpoint.incoming).await);
            endpoints.push(endpoint);
        }
        for (newest, expected) in [(2, &[2][..]), (3, &[2, 3]), (0, &[0, 2, 3])] {
            let newest: Endpoint = endpoints[newest];
            rig.send_one(sender.outgoing, b"x", Some(newest.local)).await.unwrap();
            // wasmtime-wasi learns of a datagram from tokio's reactor, which must run first.
            rig.wait_readable(newest.incoming).await;
            assert_eq!(rig.poll(&pollables).await, expected);
        }
        rig.receive(endpoints[2].incoming, 1).await.unwrap();
        assert_eq!(rig.poll(&pollables).await, [0, 3]);
    });
}

#[test]
fn a_datagram_wakes_a_guest_that_has_begun_to_block() {
    on_both(Setup::default(), async |rig| {
        let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
        let quiet = rig.endpoint(LOOPBACK).await;
        let endpoint = rig.endpoint(LOOPBACK).await;
        let pollables = [
            rig.subscribe_incoming(quiet.incoming).await,
            rig.subscribe_incoming(endpoint.incoming).await,
        ];
        for _ in 0..50 {
            let send = async {
                yield_to_others().await;
                native.send_to(b"wake up", endpoint.local).unwrap();
            };
            // Polled in this order, so the guest blocks before the datagram is sent.
            let (ready, ()) = tokio::join!(biased; rig.poll(&pollables), send);
            assert_eq!(ready, [1]);
            let received = rig.receive(endpoint.incoming, 16).await.unwrap();
            assert_eq!(payloads(&received), [b"wake up"]);
        }
    });
}

#[test]
fn a_pollable_can_be_polled_again_and_again() {
    on(Backend::Uring, Setup::default(), async |rig| {
        let endpoint = rig.endpoint(LOOPBACK).await;
        let pollable = rig.subscribe_incoming(endpoint.incoming).await;
        for _ in 0..3 {
            assert!(!rig.is_ready(pollable).await);
            rig.send_one(endpoint.outgoing, b"x", Some(endpoint.local)).await.unwrap();
            // The ring reaps a datagram without a reactor.
            assert!(rig.is_ready(pollable).await && rig.is_ready(pollable).await);
            rig.receive(endpoint.incoming, 1).await.unwrap();
        }
    });
}

/// wasmtime#14174: an event loop over many sockets in one task. On wasmtime-wasi 48 each readiness costs tokio's
/// cooperative budget, and when that is spent all sockets are said to be busy.
#[test]
fn no_socket_is_said_to_be_busy_because_a_task_has_spent_its_budget() {
    for backend in [Backend::Stock, Backend::Uring] {
        let busy = on(backend, Setup::default(), async |rig| {
            let mut endpoints = Vec::new();
            for _ in 0..20 {
                endpoints.push(rig.endpoint(LOOPBACK).await);
            }
            let mut busy = 0;
            for _ in 0..20 {
                for endpoint in &endpoints {
                    if rig.check_send(endpoint.outgoing).await == Ok(0) {
                        busy += 1;
                        continue;
                    }
                    let to_itself = datagram(b"x", Some(endpoint.local));
                    rig.send(endpoint.outgoing, &[to_itself]).await.unwrap();
                    rig.receive(endpoint.incoming, 16).await.unwrap();
                }
            }
            busy
        });
        match backend {
            Backend::Stock => assert!(busy > 0, "wasmtime#14174 is mended: compare both here"),
            Backend::Uring => assert_eq!(busy, 0),
        }
    }
}
