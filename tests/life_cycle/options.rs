//! The options a guest may set: hop limit and buffer sizes, before and after bind.

use std::net::Ipv4Addr;

use crate::common::{
    ErrorCode, IpAddressFamily, LOOPBACK, LOOPBACK_6, Rig, Setup, alike, native, on_both, own_ip,
};

const FAMILIES: [IpAddressFamily; 2] = [IpAddressFamily::Ipv4, IpAddressFamily::Ipv6];

async fn bind(rig: &mut Rig, socket: u32, family: IpAddressFamily) {
    let any = if family == IpAddressFamily::Ipv4 { LOOPBACK } else { LOOPBACK_6 };
    rig.bind(socket, any).await.unwrap();
}

#[test]
fn the_hop_limit_is_what_was_set_before_or_after_bind() {
    for family in FAMILIES {
        let told = alike(Setup::default(), async |rig| {
            let socket = rig.create(family).await.unwrap();
            let mut told = vec![rig.hop_limit(socket).await];
            for value in [1, 42, 255] {
                rig.set_hop_limit(socket, value).await.unwrap();
                told.push(rig.hop_limit(socket).await);
            }
            bind(rig, socket, family).await;
            told.push(rig.hop_limit(socket).await);
            rig.set_hop_limit(socket, 7).await.unwrap();
            told.push(rig.hop_limit(socket).await);
            told
        });
        assert_eq!(told[1..], [Ok(1), Ok(42), Ok(255), Ok(255), Ok(7)]);
    }
}

#[test]
fn the_hop_limit_of_a_socket_nobody_configured_is_the_systems() {
    for family in FAMILIES {
        alike(Setup::default(), async |rig| {
            let socket = rig.create(family).await.unwrap();
            let unbound = rig.hop_limit(socket).await.unwrap();
            bind(rig, socket, family).await;
            (unbound, rig.hop_limit(socket).await.unwrap())
        });
    }
}

#[test]
fn datagrams_leave_with_the_hop_limit_that_was_set() {
    on_both(Setup::default(), async |rig| {
        let (witness, to) = native::socket(Ipv4Addr::LOCALHOST);
        let socket = rig.create(IpAddressFamily::Ipv4).await.unwrap();
        rig.set_hop_limit(socket, 3).await.unwrap();
        rig.bind(socket, LOOPBACK).await.unwrap();
        let (_, outgoing) = rig.stream(socket, None).await.unwrap();
        rig.send_one(outgoing, b"before", Some(to)).await.unwrap();
        assert_eq!(native::receive_with_ttl(&witness), (b"before".to_vec(), 3));
        rig.set_hop_limit(socket, 99).await.unwrap();
        rig.send_one(outgoing, b"after", Some(to)).await.unwrap();
        assert_eq!(native::receive_with_ttl(&witness), (b"after".to_vec(), 99));
    });
}

#[test]
fn options_of_zero_are_invalid_and_change_nothing() {
    on_both(Setup::default(), async |rig| {
        for family in FAMILIES {
            let socket = rig.create(family).await.unwrap();
            for is_bound in [false, true] {
                if is_bound {
                    bind(rig, socket, family).await;
                }
                let before = (
                    rig.hop_limit(socket).await,
                    rig.receive_buffer(socket).await,
                    rig.send_buffer(socket).await,
                );
                let invalid = Err(ErrorCode::InvalidArgument);
                assert_eq!(rig.set_hop_limit(socket, 0).await, invalid);
                assert_eq!(rig.set_receive_buffer(socket, 0).await, invalid);
                assert_eq!(rig.set_send_buffer(socket, 0).await, invalid);
                let after = (
                    rig.hop_limit(socket).await,
                    rig.receive_buffer(socket).await,
                    rig.send_buffer(socket).await,
                );
                assert_eq!(before, after);
            }
        }
    });
}

/// Small, ordinary and beyond every limit of the kernel.
const SIZES: [u64; 7] = [1, 5_001, 65_536, 300_000, 1 << 30, 1 << 32, u64::MAX];

#[test]
fn buffer_sizes_are_the_same_numbers_set_before_bind_and_after() {
    for family in FAMILIES {
        alike(Setup::default(), async |rig| {
            let mut told = Vec::new();
            for size in SIZES {
                let socket = rig.create(family).await.unwrap();
                told.push((rig.receive_buffer(socket).await, rig.send_buffer(socket).await));
                rig.set_receive_buffer(socket, size).await.unwrap();
                rig.set_send_buffer(socket, size).await.unwrap();
                told.push((rig.receive_buffer(socket).await, rig.send_buffer(socket).await));
                bind(rig, socket, family).await;
                told.push((rig.receive_buffer(socket).await, rig.send_buffer(socket).await));
                rig.set_receive_buffer(socket, size / 2 + 1).await.unwrap();
                rig.set_send_buffer(socket, size / 3 + 1).await.unwrap();
                told.push((rig.receive_buffer(socket).await, rig.send_buffer(socket).await));
            }
            told
        });
    }
}

/// Not only told but done: the kernel keeps for either backend as much as for the other.
#[test]
fn a_receive_buffer_holds_what_was_set_before_bind_and_after() {
    let kept = alike(Setup::default(), async |rig| {
        let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
        let mut kept = Vec::new();
        for (before, after) in
            [(None, None), (Some(1), None), (None, Some(1)), (Some(1), Some(1 << 20))]
        {
            let socket = rig.create(IpAddressFamily::Ipv4).await.unwrap();
            if let Some(bytes) = before {
                rig.set_receive_buffer(socket, bytes).await.unwrap();
            }
            rig.bind(socket, (own_ip(), 0)).await.unwrap();
            if let Some(bytes) = after {
                rig.set_receive_buffer(socket, bytes).await.unwrap();
            }
            let local = rig.local(socket).await.unwrap();
            for _ in 0..1000 {
                native.send_to(b"kept or not", local).unwrap();
            }
            let (incoming, outgoing) = rig.stream(socket, None).await.unwrap();
            let endpoint = crate::common::Endpoint { socket, incoming, outgoing, local };
            kept.push(rig.drain(endpoint, &native).await.len());
            rig.close(endpoint).await;
        }
        kept
    });
    let [default, small, small_later, large] = kept[..] else { panic!("{kept:?}") };
    assert!(small < 10 && small_later < 10, "{kept:?}");
    assert!(default > 50 && large == 1000, "{kept:?}");
}
