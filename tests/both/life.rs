//! A socket's life: create, bind, addresses, peer, drop.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};

use nix::net::if_::if_nametoindex;

use crate::common::network::{in_a_network, run};
use crate::common::{
    BOUND, ErrorCode, IpAddressFamily, LOOPBACK, LOOPBACK_6, Setup, addr, native, own_ip, uring,
    uring_without_recycling,
};
use crate::guest::{Guest, alike, family, on_both};

const WILDCARD: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
const WILDCARD_6: SocketAddr = SocketAddr::new(std::net::IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0);

in_both!(a_socket_knows_its_family);
fn a_socket_knows_its_family<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        for family in [IpAddressFamily::Ipv4, IpAddressFamily::Ipv6] {
            let socket = guest.create(family).await.unwrap();
            assert_eq!(guest.family(socket).await, family);
            guest.drop_socket(socket).await;
        }
    });
}

// ---- bind ---------------------------------------------------------------------------------------

in_both!(a_socket_bound_to_port_0_learns_its_port);
fn a_socket_bound_to_port_0_learns_its_port<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        for any in [LOOPBACK, LOOPBACK_6, WILDCARD, WILDCARD_6] {
            let (socket, local) = guest.bound(any).await;
            assert_eq!(local.ip(), any.ip());
            assert_ne!(local.port(), 0);
            assert!(native::is_taken(local), "the kernel says so too");
            guest.drop_socket(socket).await;
        }
    });
}

in_both!(a_socket_bound_by_number_has_that_address);
fn a_socket_bound_by_number_has_that_address<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        // Other tests have ports of IPv6's one loopback address, and may get this one's.
        for (any, times) in [(SocketAddr::from((own_ip(), 0)), 20), (LOOPBACK_6, 1)] {
            let (mut socket, first) = guest.bound(any).await;
            for _ in 0..times {
                guest.drop_socket(socket).await;
                let (again, second) = guest.bound(first).await;
                assert_eq!(first, second);
                socket = again;
            }
        }
    });
}

in_both!(a_failed_bind_leaves_a_socket_that_can_be_bound_elsewhere);
fn a_failed_bind_leaves_a_socket_that_can_be_bound_elsewhere<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        let (_, taken) = guest.bound(LOOPBACK).await;
        let (_, taken_6) = guest.bound(LOOPBACK_6).await;
        // For documentation only (RFC 5737, RFC 3849).
        let foreign = addr("198.51.100.1:0");
        let foreign_6 = addr("[2001:db8::1]:0");
        for (bad, code, good) in [
            (taken, ErrorCode::AddressInUse, LOOPBACK),
            (taken_6, ErrorCode::AddressInUse, LOOPBACK_6),
            (foreign, ErrorCode::AddressNotBindable, LOOPBACK),
            (foreign_6, ErrorCode::AddressNotBindable, LOOPBACK_6),
        ] {
            let socket = guest.create(family(good)).await.unwrap();
            for _ in 0..3 {
                assert_eq!(guest.bind(socket, bad).await, Err(code), "{bad}");
                assert_eq!(guest.local(socket).await, Err(ErrorCode::InvalidState));
                guest.assert_no_bind_begun(socket).await;
            }
            guest.bind(socket, good).await.unwrap();
            assert_ne!(guest.local(socket).await.unwrap().port(), 0);
        }
    });
}

in_both!(addresses_that_are_not_of_the_family_cannot_be_bound_to);
fn addresses_that_are_not_of_the_family_cannot_be_bound_to<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        let invalid = Err(ErrorCode::InvalidArgument);
        let v4 = guest.create(IpAddressFamily::Ipv4).await.unwrap();
        assert_eq!(guest.begin_bind(v4, LOOPBACK_6).await, invalid);
        let v6 = guest.create(IpAddressFamily::Ipv6).await.unwrap();
        for bad in ["127.0.0.1:0", "[::ffff:127.0.0.1]:0", "[::ffff:0.0.0.0]:0", "[::127.0.0.1]:0"]
        {
            assert_eq!(guest.begin_bind(v6, addr(bad)).await, invalid, "{bad}");
        }
        guest.assert_no_bind_begun(v6).await;
        guest.bind(v4, LOOPBACK).await.unwrap();
        guest.bind(v6, LOOPBACK_6).await.unwrap();
    });
}

in_both!(a_bound_socket_cannot_be_bound_again);
fn a_bound_socket_cannot_be_bound_again<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        let (_native, peer) = native::socket(Ipv4Addr::LOCALHOST);
        let (socket, local) = guest.bound(LOOPBACK).await;
        for connected in [false, true] {
            if connected {
                guest.connect(socket, peer).await.unwrap();
            }
            // What the state forbids comes before what the argument would say.
            for again in [LOOPBACK, local, LOOPBACK_6] {
                assert_eq!(guest.begin_bind(socket, again).await, Err(ErrorCode::InvalidState));
            }
            assert_eq!(guest.local(socket).await, Ok(local));
        }
    });
}

// ---- addresses ----------------------------------------------------------------------------------

in_both!(an_unbound_socket_has_no_addresses);
fn an_unbound_socket_has_no_addresses<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        let socket = guest.create(IpAddressFamily::Ipv4).await.unwrap();
        assert_eq!(guest.local(socket).await, Err(ErrorCode::InvalidState));
        assert_eq!(guest.remote(socket).await, Err(ErrorCode::InvalidState));
    });
}

in_both!(the_remote_address_is_the_peer_while_there_is_one);
fn the_remote_address_is_the_peer_while_there_is_one<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        for any in [LOOPBACK, LOOPBACK_6] {
            let (_native, peer) = native::socket(any.ip());
            let (socket, local) = guest.bound(any).await;
            assert_eq!(guest.remote(socket).await, Err(ErrorCode::InvalidState));
            guest.connect(socket, peer).await.unwrap();
            assert_eq!(guest.local(socket).await, Ok(local));
            assert_eq!(guest.remote(socket).await, Ok(peer));
            guest.disconnect(socket).await.unwrap();
            assert_eq!(guest.remote(socket).await, Err(ErrorCode::InvalidState));
        }
    });
}

in_both!(flow_information_and_scope_of_a_peer_are_shown_as_the_kernel_shows_them);
fn flow_information_and_scope_of_a_peer_are_shown_as_the_kernel_shows_them<G: Guest>() {
    let shown = alike::<G, _>(Setup::default(), async |guest| {
        let peer = SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::LOCALHOST, 9, 7, 1));
        let socket = guest.connected(peer).await;
        guest.remote(socket).await
    });
    assert_eq!(shown, Ok(addr("[::1]:9")));
}

/// Kills: a peer remembered as it was asked for; an answer dropped because the kernel's peer has a scope.
fn is_answered_by_a_peer_without_a_scope<G: Guest>(asks_early: bool) {
    in_a_network(65_536, || {
        for line in [
            "ip link add va type veth peer name vb",
            "ip link set va up",
            "ip link set vb up",
            "ip -6 addr add fe80::a/64 dev va nodad",
            "ip -6 addr add fe80::b/64 dev va nodad",
        ] {
            run(line);
        }
        native::wait_until_up("va");
        let scope = if_nametoindex("va").unwrap();
        let on_va = |ip: &str, scope| SocketAddrV6::new(ip.parse().unwrap(), 0, 0, scope);
        native::wait_until_carried(on_va("fe80::a", scope), on_va("fe80::b", scope));
        on_both::<G>(Setup::default(), async |guest| {
            let native = UdpSocket::bind(on_va("fe80::b", scope)).unwrap();
            native.set_read_timeout(Some(BOUND)).unwrap();
            let peer = native.local_addr().unwrap();
            let mut asked = on_va("fe80::b", 0);
            asked.set_port(peer.port());

            let (socket, _) = guest.bound(on_va("fe80::a", scope)).await;
            guest.connect(socket, asked.into()).await.unwrap();
            if asks_early {
                assert_eq!(guest.remote(socket).await, Ok(peer));
            }
            for to in [None, asks_early.then_some(peer)] {
                guest.send(socket, b"question", to).await.unwrap();
                let (bytes, from) = native::receive_from(&native, &mut [0; 16]);
                assert_eq!((bytes, from), (8, guest.local(socket).await.unwrap()));
                native.send_to(b"answer", from).unwrap();
                assert_eq!(guest.receive(socket).await, Ok((b"answer".to_vec(), peer)));
            }
            assert_eq!(guest.remote(socket).await, Ok(peer));
            let stats = guest.rig().stats();
            assert_eq!(stats.dropped_not_from_peer, 0);
        });
    });
}

in_both!(a_peer_of_this_link_answers_though_the_guest_has_named_no_scope);
fn a_peer_of_this_link_answers_though_the_guest_has_named_no_scope<G: Guest>() {
    for asks_early in [false, true] {
        is_answered_by_a_peer_without_a_scope::<G>(asks_early);
    }
}

// ---- drop ---------------------------------------------------------------------------------------

in_both!(a_freed_port_can_be_bound_by_number_at_once_many_times);
fn a_freed_port_can_be_bound_by_number_at_once_many_times<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        let (mut socket, local) = guest.bound((own_ip(), 0)).await;
        for _ in 0..200 {
            guest.drop_socket(socket).await;
            socket = guest.create(IpAddressFamily::Ipv4).await.unwrap();
            guest.bind(socket, local).await.unwrap();
        }
    });
}

in_both!(a_port_bound_by_number_is_free_when_the_drop_has_returned);
fn a_port_bound_by_number_is_free_when_the_drop_has_returned<G: Guest>() {
    in_a_network(65_536, || {
        on_both::<G>(Setup::default(), async |guest| {
            for (any, receives) in [LOOPBACK, LOOPBACK_6].into_iter().zip([false, true]) {
                let (socket, local) = guest.bound(any).await;
                guest.drop_socket(socket).await;
                native::wait_until_free(local);
                for _ in 0..50 {
                    let (socket, _) = guest.bound(local).await;
                    // (wasmtime-wasi's streams keep it for a while, and so does a process that is started
                    // just then.)
                    if receives && guest.is_uring() {
                        guest.arm(socket).await;
                    }
                    guest.drop_socket(socket).await;
                    if guest.is_uring() {
                        assert!(!native::is_bound(local));
                    } else {
                        native::wait_until_free(local);
                    }
                }
            }
        });
    });
}

in_both!(a_port_that_the_kernel_chose_is_free_although_its_guest_computes_on);
/// Kills: a close that waits until its guest suspends.
fn a_port_that_the_kernel_chose_is_free_although_its_guest_computes_on<G: Guest>() {
    in_a_network(65_536, || {
        on_both::<G>(Setup::default(), async |guest| {
            for (any, is_recyclable) in
                [(LOOPBACK, true), (LOOPBACK, false), (LOOPBACK_6, true), (LOOPBACK_6, false)]
            {
                let (socket, local) = guest.bound(any).await;
                if guest.is_uring() {
                    guest.arm(socket).await;
                }
                if !is_recyclable {
                    guest.set_hop_limit(socket, 9).await.unwrap();
                }
                guest.drop_socket(socket).await;
                // On the guest's thread, the only one of its runtime.
                native::wait_until_free(local);
            }
        });
    });
}

in_both!(the_only_port_is_each_sockets_in_turn);
/// Kills: a bind that does not wait for the close before it.
fn the_only_port_is_each_sockets_in_turn<G: Guest>() {
    for is_recycling in [true, false] {
        in_a_network(65_536, || {
            // Before ports are few: the recycling of sockets is tested when a ring is built.
            let uring = if is_recycling { uring() } else { uring_without_recycling() };
            fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40000").unwrap();
            on_both::<G>(Setup::of(&uring), async |guest| {
                let mut refused = 0;
                for any in [LOOPBACK, LOOPBACK_6, WILDCARD, WILDCARD_6] {
                    for _ in 0..20 {
                        let socket = guest.create(family(any)).await.unwrap();
                        // A process that is started just then has wasmtime-wasi's descriptor, too. And
                        // where a processor is held up for longer than a bind waits (5 ms), one of the ring
                        // is refused now and then, but not one in four.
                        let mut is_first = true;
                        while let Err(refusal) = guest.bind(socket, any).await {
                            assert_eq!(refusal, ErrorCode::AddressInUse);
                            refused += u32::from(std::mem::take(&mut is_first));
                        }
                        assert!(
                            !guest.is_uring() || refused <= 20,
                            "{refused} of 80 binds refused"
                        );
                        assert_eq!(guest.local(socket).await.unwrap().port(), 40_000);
                        guest.arm(socket).await;
                        let other = guest.create(family(any)).await.unwrap();
                        assert_eq!(guest.bind(other, any).await, Err(ErrorCode::AddressInUse));
                        guest.drop_socket(other).await;
                        guest.drop_socket(socket).await;
                    }
                }
            });
        });
    }
}
