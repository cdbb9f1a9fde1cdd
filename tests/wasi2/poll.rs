//! Pollables: which are ready, and what wakes a guest that blocks.

use std::net::Ipv4Addr;

use crate::common::{
    Backend, Endpoint, LOOPBACK, Setup, native, on, on_both, payloads, yield_to_others,
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
