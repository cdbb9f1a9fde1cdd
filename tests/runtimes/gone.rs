//! Rings that their host closes, and calls of guests that go on.

use std::net::SocketAddr;

use wasi_uring::RingGone;

use crate::common::network::in_a_network;
use crate::common::{
    IpAddressFamily, LOOPBACK, LOOPBACK_6, Rig, block_on, datagram, eventually, native, to_wit,
    uring, yield_to_others,
};

/// Why a call has trapped.
#[track_caller]
fn gone<T: std::fmt::Debug>(answer: wasmtime::Result<T>) -> RingGone {
    let error = answer.expect_err("must trap");
    *error.downcast_ref().unwrap_or_else(|| panic!("for another reason: {error:?}"))
}

#[test]
fn a_ring_that_is_closed_gives_up_every_port_although_guests_keep_their_sockets() {
    in_a_network(65_536, || {
        block_on(async {
            let uring = uring();
            let mut rig = Rig::on_ring(&uring).await;
            let mut locals = Vec::new();
            for any in [LOOPBACK, LOOPBACK_6, LOOPBACK, LOOPBACK_6] {
                let endpoint = rig.endpoint(any).await;
                assert_eq!(rig.receive(endpoint.incoming, 1).await, Ok(vec![]));
                locals.push(endpoint.local);
                // Chosen above, and by its number.
                let named = SocketAddr::new(any.ip(), endpoint.local.port() ^ 1);
                rig.bound(named).await;
                locals.push(named);
            }
            let (dropped, local) = rig.bound(LOOPBACK).await;
            rig.drop_socket(dropped).await;
            locals.push(local);
            uring.close();
            for local in locals {
                assert!(!native::is_bound(local), "{local}");
            }
            uring.close();
            assert_eq!(uring.stats().sockets_open, 0);
        });
    });
}

#[test]
fn calls_of_guests_whose_ring_is_closed_trap_and_say_why() {
    block_on(async {
        let uring = uring();
        let mut rigs = Vec::new();
        for _ in 0..6 {
            let mut rig = Rig::on_ring(&uring).await;
            let endpoint = rig.endpoint(LOOPBACK).await;
            assert_eq!(rig.receive(endpoint.incoming, 1).await, Ok(vec![]));
            assert_eq!(rig.check_send(endpoint.outgoing).await, Ok(16));
            let unbound = rig.create(IpAddressFamily::Ipv4).await.unwrap();
            rigs.push((rig, endpoint, unbound));
        }
        uring.close();
        for (call, (mut rig, endpoint, unbound)) in rigs.into_iter().enumerate() {
            let Rig { guest, store, network, .. } = &mut rig;
            let local = to_wit(LOOPBACK);
            let reason = match call {
                0 => gone(guest.call_create_udp_socket(store, IpAddressFamily::Ipv4).await),
                1 => gone(guest.call_start_bind(store, unbound, *network, local).await),
                2 => gone(guest.call_receive(store, endpoint.incoming, 1).await),
                3 => {
                    let late = datagram(b"late", Some(endpoint.local));
                    gone(guest.call_send(store, endpoint.outgoing, &[late]).await)
                }
                4 => gone(guest.call_set_unicast_hop_limit(store, endpoint.socket, 9).await),
                _ => {
                    // What needs no ring is answered, and what is dropped is dropped.
                    assert_eq!(rig.family(unbound).await, IpAddressFamily::Ipv4);
                    rig.drop_socket(unbound).await;
                    rig.close(endpoint).await;
                    continue;
                }
            };
            assert_eq!(reason, RingGone::Closed, "{call}");
        }
    });
}

/// Kills: a ring that does not wake those who wait when it is closed.
#[test]
fn a_guest_that_waits_for_a_datagram_hears_that_its_ring_is_closed() {
    block_on(async {
        let uring = uring();
        let mut rig = Rig::on_ring(&uring).await;
        let endpoint = rig.endpoint(LOOPBACK).await;
        let pollable = rig.subscribe_incoming(endpoint.incoming).await;
        let waiting = tokio::spawn(async move {
            rig.block(pollable).await;
            let Rig { guest, store, .. } = &mut rig;
            gone(guest.call_receive(store, endpoint.incoming, 1).await)
        });
        yield_to_others().await;
        uring.close();
        assert_eq!(waiting.await.unwrap(), RingGone::Closed);
    });
}

#[test]
fn a_ring_is_closed_although_the_thread_that_armed_its_receives_computes_on() {
    let uring = uring();
    let local = crate::ports::beside_a_thread_that_computes(&uring, |_rig, endpoint| {
        uring.close();
        assert_eq!(uring.stats().sockets_open, 0);
        endpoint.local
    });
    block_on(eventually("the port is free", || !native::is_taken(local)));
}
