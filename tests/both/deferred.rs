//! Sends that are answered before they are submitted: a guest that goes on sending.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use wasi_uring::Stats;

use crate::common::{Backend, ErrorCode, LOOPBACK, Setup, native, own_ip, rest};
use crate::guest::{Guest, on, on_both};

const BURST: u8 = 16;

/// Of a guest that has a minute between two sends, so that the machine may be slow.
fn unhurried() -> Setup {
    Setup::default().deferring(Duration::from_mins(1))
}

/// Sends datagrams of one size, each with a number, to a witness.
async fn send_burst<G: Guest>(guest: &mut G, socket: u32, witness: &UdpSocket) {
    let to = witness.local_addr().unwrap();
    for n in 0..BURST {
        guest.send(socket, &[n; 100], Some(to)).await.unwrap();
    }
}

fn assert_hears_burst(witness: &UdpSocket) {
    for n in 0..BURST {
        let mut buffer = [0; 200];
        let bytes = native::receive(witness, &mut buffer);
        assert_eq!(buffer[..bytes], [n; 100]);
    }
}

in_both!(sends_of_a_guest_that_goes_on_leave_in_one_message_behind_the_first);
/// Kills: an enter for each datagram; datagrams that leave apart.
fn sends_of_a_guest_that_goes_on_leave_in_one_message_behind_the_first<G: Guest>() {
    on::<G, ()>(Backend::Uring, unhurried(), async |guest| {
        let (witness, _) = native::socket(Ipv4Addr::LOCALHOST);
        let (socket, _) = guest.bound(LOOPBACK).await;
        let before = guest.rig().stats();
        send_burst(guest, socket, &witness).await;
        let sent = guest.rig().stats();
        rest().await;
        assert_hears_burst(&witness);
        let after = guest.rig().stats();
        // To look at the counters submits what is deferred.
        assert_eq!(sent.enters - before.enters, 2);
        assert_eq!(after.datagrams_coalesced - before.datagrams_coalesced, 15);
        assert_eq!(after.datagrams_deferred - before.datagrams_deferred, 15);
        assert_eq!(after.datagrams_sent - before.datagrams_sent, BURST.into());
    });
}

/// A native socket asks each of these; the guest hears one after the other, and answers by the socket that
/// `answers_by` has for it to another native socket, which gets all answers. How many of them were deferred.
async fn answer_each<G: Guest>(
    guest: &mut G,
    asking: &UdpSocket,
    sockets: &[(u32, SocketAddr)],
    answers_by: impl Fn(u32) -> u32,
    answered: &UdpSocket,
) -> u64 {
    for (_, local) in sockets {
        asking.send_to(b"question", *local).unwrap();
    }
    rest().await;
    let to = answered.local_addr().unwrap();
    let before = guest.rig().stats();
    for (hears_by, _) in sockets {
        assert_eq!(guest.receive(*hears_by).await.unwrap().0, b"question");
        guest.send(answers_by(*hears_by), b"answer", Some(to)).await.unwrap();
    }
    let after = guest.rig().stats();
    for _ in sockets {
        assert_eq!(native::receive(answered, &mut [0; 16]), 6);
    }
    after.datagrams_deferred - before.datagrams_deferred
}

async fn bound_sockets<G: Guest>(guest: &mut G) -> Vec<(u32, SocketAddr)> {
    let mut sockets = Vec::new();
    for _ in 0..BURST {
        sockets.push(guest.bound(LOOPBACK).await);
    }
    sockets
}

in_both!(answers_by_one_socket_after_the_other_leave_together);
/// Kills: a server with many sockets that enters, or yields to others, for each answer.
fn answers_by_one_socket_after_the_other_leave_together<G: Guest>() {
    on::<G, ()>(Backend::Uring, unhurried(), async |guest| {
        let (native, _) = native::socket(Ipv4Addr::LOCALHOST);
        let sockets = bound_sockets(guest).await;
        let deferred = answer_each(guest, &native, &sockets, |same| same, &native).await;
        assert_eq!(deferred, 0, "a socket's first to a peer");
        let deferred = answer_each(guest, &native, &sockets, |same| same, &native).await;
        // The first too where the guest goes on from the round before.
        assert!(deferred >= u64::from(BURST) - 1, "{deferred} of {BURST} deferred");
    });
}

in_both!(what_a_guest_hands_on_leaves_together);
/// Kills: a forwarder that enters for each answer, because it has heard it by another socket.
fn what_a_guest_hands_on_leaves_together<G: Guest>() {
    on::<G, ()>(Backend::Uring, unhurried(), async |guest| {
        let (asking, from) = native::socket(Ipv4Addr::LOCALHOST);
        let (asked, _) = native::socket(Ipv4Addr::LOCALHOST);
        let (socket, _) = guest.bound(LOOPBACK).await;
        guest.send(socket, b"reached", Some(from)).await.unwrap();
        assert_eq!(native::receive(&asking, &mut [0; 16]), 7);
        let upstream = bound_sockets(guest).await;
        // What enters, as a socket's first receive, submits what is deferred.
        answer_each(guest, &asked, &upstream, |_| socket, &asking).await;
        let deferred = answer_each(guest, &asked, &upstream, |_| socket, &asking).await;
        assert!(deferred >= u64::from(BURST) - 1, "{deferred} of {BURST} deferred");
    });
}

in_both!(what_a_guest_sends_to_itself_leaves_at_once);
/// Kills: a guest that waits for what it has not sent.
fn what_a_guest_sends_to_itself_leaves_at_once<G: Guest>() {
    on::<G, ()>(Backend::Uring, unhurried(), async |guest| {
        let sockets = [guest.bound(LOOPBACK).await, guest.bound(LOOPBACK).await];
        for _ in 0..BURST {
            for (from, to) in [(0, 1), (1, 0)] {
                guest.send(sockets[from].0, b"x", Some(sockets[to].1)).await.unwrap();
                assert_eq!(guest.receive(sockets[to].0).await.unwrap().0, b"x");
            }
        }
        assert_eq!(guest.rig().stats().datagrams_deferred, 0);
    });
}

in_both!(a_host_may_have_nothing_deferred);
/// Kills: a time of 0 that is taken for none.
fn a_host_may_have_nothing_deferred<G: Guest>() {
    on::<G, ()>(Backend::Uring, Setup::default().deferring(Duration::ZERO), async |guest| {
        let (witness, _) = native::socket(Ipv4Addr::LOCALHOST);
        let (socket, _) = guest.bound(LOOPBACK).await;
        let before = guest.rig().stats();
        send_burst(guest, socket, &witness).await;
        let sent = guest.rig().stats();
        assert_hears_burst(&witness);
        assert_eq!(sent.enters - before.enters, BURST.into());
        assert_eq!(sent.datagrams_deferred, 0);
    });
}

in_both!(what_was_deferred_is_sent_although_its_socket_or_guest_goes);
/// Kills: a drop that takes deferred datagrams along; one that leaves its socket busy, so that it is not recycled.
fn what_was_deferred_is_sent_although_its_socket_or_guest_goes<G: Guest>() {
    for is_guest in [false, true] {
        let mut recycled = 0;
        for _ in 0..5 {
            let (witness, _) = native::socket(Ipv4Addr::LOCALHOST);
            let (deferred, cached) = on::<G, _>(Backend::Uring, unhurried(), async |guest| {
                let (mut deferred, mut cached) = (0, 0);
                for _ in 0..4 {
                    let (socket, _) = guest.bound(LOOPBACK).await;
                    send_burst(guest, socket, &witness).await;
                    if !is_guest {
                        guest.drop_socket(socket).await;
                        assert_hears_burst(&witness);
                    }
                    let stats: Stats = guest.rig().stats();
                    deferred = stats.datagrams_deferred;
                    cached += stats.sockets_cached;
                }
                (deferred, cached)
            });
            recycled += cached;
            if is_guest {
                (0..4).for_each(|_| assert_hears_burst(&witness));
            }
            assert!(deferred > 0, "none was deferred");
        }
        assert!(is_guest || recycled > 0, "none was recycled");
    }
}

in_both!(
    the_refusal_of_a_deferred_datagram_is_answered_to_the_next_send_once_and_the_others_are_sent
);
/// A refusal by the peer is an error that waits in the socket for the next datagram, which is not sent then.
/// Kills: a refused datagram that keeps back those behind it; its error forgotten, or answered twice.
fn the_refusal_of_a_deferred_datagram_is_answered_to_the_next_send_once_and_the_others_are_sent<
    G: Guest,
>() {
    on::<G, ()>(Backend::Uring, unhurried(), async |guest| {
        let closed = native::closed_port(own_ip());
        let socket = guest.connected(closed).await;
        let before = guest.rig().stats();
        for _ in 0..3 {
            assert_eq!(guest.send(socket, b"anybody?", None).await, Ok(()));
        }
        rest().await;
        let after = guest.rig().stats();
        assert_eq!(after.datagrams_deferred - before.datagrams_deferred, 2);
        // The second met the refusal of the first, and the third was sent.
        assert_eq!(after.datagrams_sent - before.datagrams_sent, 2);
        let refused = Err(ErrorCode::ConnectionRefused);
        assert_eq!(guest.send(socket, b"the second's", None).await, refused);
        rest().await;
        assert_eq!(guest.send(socket, b"the third's", None).await, refused);
        rest().await;
        assert_eq!(guest.send(socket, b"anybody now?", None).await, Ok(()));
    });
}

in_both!(a_guest_hears_what_it_has_sent_itself);
/// Kills: a receive that does not submit what its guest has sent before.
fn a_guest_hears_what_it_has_sent_itself<G: Guest>() {
    on_both::<G>(Setup::default(), async |guest| {
        let (from, _) = guest.bound(LOOPBACK).await;
        let (socket, own) = guest.bound(LOOPBACK).await;
        for burst in 1..20_u8 {
            for n in 0..burst {
                guest.send(from, &[n], Some(own)).await.unwrap();
            }
            for n in 0..burst {
                assert_eq!(guest.receive(socket).await.unwrap().0, [n]);
            }
        }
    });
}
