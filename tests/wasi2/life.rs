//! A socket's life, call by call: binds of two calls, streams and what hangs on them, drops.

use std::net::{Ipv4Addr, SocketAddr};

use crate::common::{
    Backend, ErrorCode, IpAddressFamily, LOOPBACK, LOOPBACK_6, Rig, Setup, addr, alike, block_on,
    enters_while, eventually, native, on, on_both, own_ip, to_wit, trap, uring, uring_with,
};

const WILDCARD: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

// ---- bind ---------------------------------------------------------------------------------------

#[test]
fn finish_without_start_is_not_in_progress() {
    on_both(Setup::default(), async |rig| {
        let socket = rig.create(IpAddressFamily::Ipv4).await.unwrap();
        assert_eq!(rig.finish_bind(socket).await, Err(ErrorCode::NotInProgress));
        rig.bind(socket, LOOPBACK).await.unwrap();
        assert_eq!(rig.finish_bind(socket).await, Err(ErrorCode::NotInProgress));
    });
}

#[test]
fn a_second_start_before_the_finish_conflicts_and_changes_nothing() {
    on_both(Setup::default(), async |rig| {
        let socket = rig.create(IpAddressFamily::Ipv4).await.unwrap();
        rig.start_bind(socket, LOOPBACK).await.unwrap();
        let again = rig.start_bind(socket, WILDCARD).await;
        assert_eq!(again, Err(ErrorCode::ConcurrencyConflict));
        rig.finish_bind(socket).await.unwrap();
        assert_eq!(rig.local(socket).await.unwrap().ip(), Ipv4Addr::LOCALHOST);
    });
}

#[test]
fn binds_started_before_the_first_is_finished_share_enters() {
    // The second is more than the submission queue has entries.
    for (binds, enters_max) in [(100, 3), (1000, 10)] {
        on_both(Setup::default(), async |rig| {
            let mut sockets = Vec::new();
            for _ in 0..binds {
                sockets.push(rig.create(IpAddressFamily::Ipv4).await.unwrap());
            }
            let uring = rig.uring.clone();
            let bind_all = async {
                for socket in &sockets {
                    rig.start_bind(*socket, LOOPBACK).await.unwrap();
                }
                for socket in &sockets {
                    rig.finish_bind(*socket).await.unwrap();
                }
            };
            let enters = enters_while(&uring, bind_all).await;
            assert!(enters <= enters_max, "{enters} for {binds}");
            for socket in sockets {
                assert_ne!(rig.local(socket).await.unwrap().port(), 0);
            }
        });
    }
}

#[test]
fn a_socket_that_was_started_can_stream_before_the_finish() {
    on_both(Setup::default(), async |rig| {
        let socket = rig.create(IpAddressFamily::Ipv4).await.unwrap();
        rig.start_bind(socket, LOOPBACK).await.unwrap();
        assert_ne!(rig.local(socket).await.unwrap().port(), 0);
        rig.stream(socket, None).await.unwrap();
        let again = rig.start_bind(socket, LOOPBACK).await;
        assert_eq!(again, Err(ErrorCode::ConcurrencyConflict));
        rig.finish_bind(socket).await.unwrap();
        assert_eq!(rig.finish_bind(socket).await, Err(ErrorCode::NotInProgress));
    });
}

// ---- addresses ----------------------------------------------------------------------------------

#[test]
fn a_wildcard_bind_shows_its_route_once_connected_and_the_wildcard_again_after() {
    for (wildcard, target) in [(WILDCARD, LOOPBACK), (addr("[::]:0"), LOOPBACK_6)] {
        let shown = alike(Setup::default(), async |rig| {
            let (_native, peer) = native::socket(target.ip());
            let mut endpoint = rig.endpoint(wildcard).await;
            let mut shown = vec![rig.local(endpoint.socket).await.unwrap().ip()];
            for remote in [Some(peer), None, Some(peer)] {
                rig.reconnect(&mut endpoint, remote).await.unwrap();
                shown.push(rig.local(endpoint.socket).await.unwrap().ip());
            }
            shown
        });
        assert_eq!(shown, [wildcard.ip(), target.ip(), wildcard.ip(), target.ip()]);
    }
}

#[test]
fn an_unbound_socket_has_no_streams() {
    on_both(Setup::default(), async |rig| {
        let socket = rig.create(IpAddressFamily::Ipv4).await.unwrap();
        let peer = addr("127.0.0.1:9");
        assert_eq!(rig.stream(socket, None).await, Err(ErrorCode::InvalidState));
        assert_eq!(rig.stream(socket, Some(peer)).await, Err(ErrorCode::InvalidState));
    });
}

// ---- drops --------------------------------------------------------------------------------------

#[test]
fn a_port_freed_with_a_receive_armed_can_be_bound_by_number_at_once() {
    on_both(Setup::default(), async |rig| {
        let mut local = SocketAddr::from((own_ip(), 0));
        for _ in 0..100 {
            let endpoint = rig.endpoint(local).await;
            local = endpoint.local;
            assert_eq!(rig.receive(endpoint.incoming, 1).await, Ok(vec![]));
            rig.close(endpoint).await;
        }
    });
}

#[test]
fn a_socket_dropped_before_its_bind_is_finished_frees_its_port_and_its_slot() {
    let setup = || Setup::of(&uring_with(2));
    on_both(setup(), async |rig| {
        let (socket, local) = rig.bound((own_ip(), 0)).await;
        rig.drop_socket(socket).await;
        let uring = rig.uring.clone();
        for _ in 0..20 {
            // With a table of two, slots are free again only if closes are flushed.
            eventually("the slots are free", || uring.stats().sockets_open == 0).await;
            for _ in 0..2 {
                // The second one's bind must wait for the close of the first, and is dropped unbound.
                let socket = rig.create(IpAddressFamily::Ipv4).await.unwrap();
                rig.start_bind(socket, local).await.unwrap();
                rig.drop_socket(socket).await;
            }
        }
        eventually("the slots are free", || uring.stats().sockets_open == 0).await;
        assert_eq!(rig.bound(local).await.1, local);
    });
}

#[test]
fn streams_are_dropped_in_either_order_before_their_socket() {
    on_both(Setup::default(), async |rig| {
        for incoming_first in [true, false] {
            let endpoint = rig.endpoint(LOOPBACK).await;
            if incoming_first {
                rig.drop_incoming(endpoint.incoming).await;
                rig.drop_outgoing(endpoint.outgoing).await;
            } else {
                rig.drop_outgoing(endpoint.outgoing).await;
                rig.drop_incoming(endpoint.incoming).await;
            }
            rig.stream(endpoint.socket, None).await.unwrap();
        }
    });
}

#[test]
fn a_parent_dropped_before_its_child_traps() {
    /// Drops a socket, or a stream of either kind, before a child.
    async fn dropped(rig: &mut Rig, what: &str) -> String {
        let endpoint = rig.endpoint(LOOPBACK).await;
        let (guest, store) = (&rig.guest, &mut rig.store);
        match what {
            "socket before streams" => trap(guest.call_drop_socket(store, endpoint.socket).await),
            "incoming before pollable" => {
                guest.call_subscribe_incoming(&mut *store, endpoint.incoming).await.unwrap();
                trap(guest.call_drop_incoming(store, endpoint.incoming).await)
            }
            "outgoing before pollable" => {
                guest.call_subscribe_outgoing(&mut *store, endpoint.outgoing).await.unwrap();
                trap(guest.call_drop_outgoing(store, endpoint.outgoing).await)
            }
            _ => {
                guest.call_drop_incoming(&mut *store, endpoint.incoming).await.unwrap();
                guest.call_drop_outgoing(&mut *store, endpoint.outgoing).await.unwrap();
                guest.call_subscribe_socket(&mut *store, endpoint.socket).await.unwrap();
                trap(guest.call_drop_socket(store, endpoint.socket).await)
            }
        }
    }
    for what in [
        "socket before streams",
        "incoming before pollable",
        "outgoing before pollable",
        "socket before pollable",
    ] {
        on_both(Setup::default(), async |rig| {
            let message = dropped(rig, what).await;
            assert!(message.contains("resource has children"), "{what}: {message}");
        });
    }
}

#[test]
fn stream_traps_while_a_stream_of_the_last_call_lives() {
    for left in ["both", "incoming", "outgoing"] {
        on_both(Setup::default(), async |rig| {
            let endpoint = rig.endpoint(LOOPBACK).await;
            match left {
                "incoming" => rig.drop_outgoing(endpoint.outgoing).await,
                "outgoing" => rig.drop_incoming(endpoint.incoming).await,
                _ => {}
            }
            let to = Some(to_wit(endpoint.local));
            let answer = rig.guest.call_stream(&mut rig.store, endpoint.socket, to).await;
            let message = trap(answer);
            assert!(message.contains("UDP streams not dropped yet"), "{left}: {message}");
        });
    }
}

#[test]
fn a_store_dropped_with_everything_open_frees_everything() {
    block_on(async {
        let uring = uring();
        let mut rig = Rig::on_ring(&uring).await;
        let idle = rig.endpoint((own_ip(), 0)).await;
        let reading = rig.endpoint((own_ip(), 0)).await;
        assert_eq!(rig.receive(reading.incoming, 1).await, Ok(vec![]));
        let mut connected = rig.endpoint((own_ip(), 0)).await;
        rig.reconnect(&mut connected, Some(idle.local)).await.unwrap();
        rig.send_one(connected.outgoing, b"unread", None).await.unwrap();
        rig.send_one(idle.outgoing, b"queued", Some(reading.local)).await.unwrap();
        rig.wait_readable(reading.incoming).await;
        let pollable = rig.subscribe_socket(idle.socket).await;
        assert!(rig.is_ready(pollable).await);
        rig.create(IpAddressFamily::Ipv6).await.unwrap();
        let started = rig.create(IpAddressFamily::Ipv4).await.unwrap();
        rig.start_bind(started, LOOPBACK).await.unwrap();
        assert_eq!(uring.stats().sockets_open, 5);
        drop(rig);
        eventually("every slot is free", || uring.stats().sockets_open == 0).await;
        for local in [idle.local, reading.local, connected.local] {
            assert!(!native::is_taken(local), "{local}");
        }
    });
}

// ---- pollables, versions ------------------------------------------------------------------------

#[test]
fn pollables_of_sockets_and_outgoing_streams_are_ready_at_once() {
    on_both(Setup::default(), async |rig| {
        let socket = rig.create(IpAddressFamily::Ipv4).await.unwrap();
        let pollable = rig.subscribe_socket(socket).await;
        assert!(rig.is_ready(pollable).await, "unbound");
        rig.start_bind(socket, LOOPBACK).await.unwrap();
        rig.block(pollable).await;
        rig.finish_bind(socket).await.unwrap();
        assert!(rig.is_ready(pollable).await, "bound");
        let (incoming, outgoing) = rig.stream(socket, None).await.unwrap();
        let readable = rig.subscribe_incoming(incoming).await;
        let writable = rig.subscribe_outgoing(outgoing).await;
        assert_eq!(rig.poll(&[readable, writable, pollable]).await, [1, 2]);
        assert!(!rig.is_ready(readable).await);
        for pollable in [readable, pollable, writable] {
            rig.drop_pollable(pollable).await;
        }
        rig.drop_streams((incoming, outgoing)).await;
        rig.drop_socket(socket).await;
    });
}

#[test]
fn guests_of_any_0_2_are_served_by_the_backend_of_the_linker() {
    for version in ["0.2.0", "0.2.12"] {
        for (backend, created) in [(Backend::Uring, 1), (Backend::Stock, 0)] {
            let setup = Setup { version, ..Setup::default() };
            on(backend, setup, async |rig| {
                rig.endpoint(LOOPBACK).await;
                assert_eq!(rig.stats().sockets_created, created, "{version} on {backend:?}");
            });
        }
    }
}
