//! The options a guest may set: hop limit and buffer sizes, before and after the bind.

use std::net::Ipv4Addr;

use crate::common::{ErrorCode, IpAddressFamily, LOOPBACK, LOOPBACK_6, Setup, native, own_ip};
use crate::guest::{Guest, alike, on_both};

const FAMILIES: [IpAddressFamily; 2] = [IpAddressFamily::Ipv4, IpAddressFamily::Ipv6];

async fn bind(guest: &mut impl Guest, socket: u32, family: IpAddressFamily) {
    let any = if family == IpAddressFamily::Ipv4 { LOOPBACK } else { LOOPBACK_6 };
    guest.bind(socket, any).await.unwrap();
}

type Options = (Result<u8, ErrorCode>, Result<u64, ErrorCode>, Result<u64, ErrorCode>);

/// Hop limit, receive buffer, send buffer.
async fn options(guest: &mut impl Guest, socket: u32) -> Options {
    (
        guest.hop_limit(socket).await,
        guest.receive_buffer(socket).await,
        guest.send_buffer(socket).await,
    )
}

in_both!(the_hop_limit_is_what_was_set_before_or_after_bind);
fn the_hop_limit_is_what_was_set_before_or_after_bind<G: Guest>() {
    for family in FAMILIES {
        let answers = alike::<G, _>(Setup::default(), async |guest| {
            let socket = guest.create(family).await.unwrap();
            let mut answers = vec![guest.hop_limit(socket).await];
            for value in [1, 42, 255] {
                guest.set_hop_limit(socket, value).await.unwrap();
                answers.push(guest.hop_limit(socket).await);
            }
            bind(guest, socket, family).await;
            answers.push(guest.hop_limit(socket).await);
            guest.set_hop_limit(socket, 7).await.unwrap();
            answers.push(guest.hop_limit(socket).await);
            answers
        });
        assert_eq!(answers[1..], [Ok(1), Ok(42), Ok(255), Ok(255), Ok(7)]);
    }
}

in_both!(the_hop_limit_of_a_socket_without_one_set_is_the_systems);
fn the_hop_limit_of_a_socket_without_one_set_is_the_systems<G: Guest>() {
    for family in FAMILIES {
        alike::<G, _>(Setup::default(), async |guest| {
            let socket = guest.create(family).await.unwrap();
            let unbound = guest.hop_limit(socket).await.unwrap();
            bind(guest, socket, family).await;
            (unbound, guest.hop_limit(socket).await.unwrap())
        });
    }
}

in_both!(datagrams_leave_with_the_hop_limit_that_was_set);
fn datagrams_leave_with_the_hop_limit_that_was_set<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        let (witness, to) = native::socket(Ipv4Addr::LOCALHOST);
        let socket = guest.create(IpAddressFamily::Ipv4).await.unwrap();
        guest.set_hop_limit(socket, 3).await.unwrap();
        guest.bind(socket, LOOPBACK).await.unwrap();
        guest.send(socket, b"before", Some(to)).await.unwrap();
        assert_eq!(native::receive_with_ttl(&witness), (b"before".to_vec(), 3));
        guest.set_hop_limit(socket, 99).await.unwrap();
        guest.send(socket, b"after", Some(to)).await.unwrap();
        assert_eq!(native::receive_with_ttl(&witness), (b"after".to_vec(), 99));
    });
}

in_both!(options_of_zero_are_invalid_and_change_nothing);
fn options_of_zero_are_invalid_and_change_nothing<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        for family in FAMILIES {
            let socket = guest.create(family).await.unwrap();
            for is_bound in [false, true] {
                if is_bound {
                    bind(guest, socket, family).await;
                }
                let before = options(guest, socket).await;
                let invalid = Err(ErrorCode::InvalidArgument);
                assert_eq!(guest.set_hop_limit(socket, 0).await, invalid);
                assert_eq!(guest.set_receive_buffer(socket, 0).await, invalid);
                assert_eq!(guest.set_send_buffer(socket, 0).await, invalid);
                assert_eq!(options(guest, socket).await, before);
            }
        }
    });
}

in_both!(options_are_answered_alike_before_and_after_the_bind);
fn options_are_answered_alike_before_and_after_the_bind<G: Guest>() {
    alike::<G, _>(Setup::default(), async |guest| {
        let mut answers = Vec::new();
        for family in FAMILIES {
            for is_bound in [false, true] {
                let socket = guest.create(family).await.unwrap();
                if is_bound {
                    bind(guest, socket, family).await;
                }
                answers.push(options(guest, socket).await);
                for value in [0, 1, 200, 70_000, 1 << 40] {
                    let hops = u8::try_from(value).unwrap_or(u8::MAX);
                    let expected =
                        if value == 0 { Err(ErrorCode::InvalidArgument) } else { Ok(()) };
                    assert_eq!(guest.set_hop_limit(socket, hops).await, expected);
                    assert_eq!(guest.set_receive_buffer(socket, value).await, expected);
                    assert_eq!(guest.set_send_buffer(socket, value).await, expected);
                    answers.push(options(guest, socket).await);
                }
            }
        }
        answers
    });
}

/// Small, ordinary and beyond every limit of the kernel.
const SIZES: [u64; 7] = [1, 5_001, 65_536, 300_000, 1 << 30, 1 << 32, u64::MAX];

in_both!(buffer_sizes_are_the_same_numbers_set_before_bind_and_after);
fn buffer_sizes_are_the_same_numbers_set_before_bind_and_after<G: Guest>() {
    for family in FAMILIES {
        alike::<G, _>(Setup::default(), async |guest| {
            let mut answers = Vec::new();
            for size in SIZES {
                let socket = guest.create(family).await.unwrap();
                answers.push(options(guest, socket).await);
                guest.set_receive_buffer(socket, size).await.unwrap();
                guest.set_send_buffer(socket, size).await.unwrap();
                answers.push(options(guest, socket).await);
                bind(guest, socket, family).await;
                answers.push(options(guest, socket).await);
                guest.set_receive_buffer(socket, size / 2 + 1).await.unwrap();
                guest.set_send_buffer(socket, size / 3 + 1).await.unwrap();
                answers.push(options(guest, socket).await);
            }
            answers
        });
    }
}

in_both!(a_receive_buffer_holds_what_was_set_before_bind_and_after);
/// Not only the numbers: the kernel queues for either backend as much as for the other.
fn a_receive_buffer_holds_what_was_set_before_bind_and_after<G: Guest>() {
    let queued = alike::<G, _>(Setup::default(), async |guest| {
        let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
        let mut queued = Vec::new();
        for (before, after) in
            [(None, None), (Some(1), None), (None, Some(1)), (Some(1), Some(1 << 20))]
        {
            let socket = guest.create(IpAddressFamily::Ipv4).await.unwrap();
            if let Some(bytes) = before {
                guest.set_receive_buffer(socket, bytes).await.unwrap();
            }
            guest.bind(socket, (own_ip(), 0)).await.unwrap();
            if let Some(bytes) = after {
                guest.set_receive_buffer(socket, bytes).await.unwrap();
            }
            let local = guest.local(socket).await.unwrap();
            for _ in 0..1000 {
                native.send_to(b"queued or not", local).unwrap();
            }
            queued.push(guest.drain(socket, &native).await.len());
            guest.drop_socket(socket).await;
        }
        queued
    });
    let [default, small, small_later, large] = queued[..] else { panic!("{queued:?}") };
    assert!(small < 10 && small_later < 10, "{queued:?}");
    // As large as net.core.rmem_max lets it be, which is the default's size before Linux 6.18, doubled.
    assert!(default > 50 && large > default, "{queued:?}");
}
