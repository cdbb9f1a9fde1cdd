//! A host's own policy: what it is told, and what happens while it has not decided.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

use wasi_uring::limits::{QUEUE_SLACK_BYTES, QUEUED_DATAGRAM_BYTES};
use wasi_uring::{AddrEvent, Policy, Reason, SocketAddrUse, SocketId, Uring, Verdict};

use crate::common::{
    Backend, ErrorCode, IpAddressFamily, LOOPBACK, Setup, eventually, native, own_ip,
    yield_to_others,
};
use crate::guest::{Guest, on};

/// A policy that the test decides for.
#[derive(Clone, Default)]
struct Desk(Arc<Mutex<Papers>>);

#[derive(Default)]
struct Papers {
    events: Vec<AddrEvent>,
    /// By the other end; `None`: it is asked about.
    verdicts: HashMap<SocketAddr, Option<bool>>,
    wakers: Vec<Waker>,
    /// Futures that were made, and dropped.
    questions: (u64, u64),
    refuses_sockets: bool,
    created: Vec<SocketId>,
    dropped: Vec<SocketId>,
}

struct Question {
    desk: Desk,
    of: SocketAddr,
}

impl Drop for Question {
    fn drop(&mut self) {
        self.desk.papers(|papers| papers.questions.1 += 1);
    }
}

impl Desk {
    fn papers<T>(&self, with: impl FnOnce(&mut Papers) -> T) -> T {
        with(&mut self.0.lock().unwrap())
    }

    /// Not decided for now.
    fn ponder(&self, of: SocketAddr) {
        self.papers(|papers| papers.verdicts.insert(of, None));
    }

    fn decide(&self, of: SocketAddr, verdict: bool) {
        let wakers = self.papers(|papers| {
            papers.verdicts.insert(of, Some(verdict));
            std::mem::take(&mut papers.wakers)
        });
        wakers.into_iter().for_each(Waker::wake);
    }

    fn is_asked(&self) -> bool {
        self.papers(|papers| papers.questions.0 > papers.questions.1)
    }

    fn setup(&self) -> Setup {
        Setup::policy(self.clone())
    }
}

impl Policy for Desk {
    fn check(&self, event: &AddrEvent) -> Verdict {
        let event = *event;
        let is_asked = self.papers(|papers| {
            papers.events.push(event);
            papers.verdicts.contains_key(&event.addr)
        });
        if !is_asked {
            return Verdict::Allow;
        }
        self.papers(|papers| papers.questions.0 += 1);
        let question = Question { desk: self.clone(), of: event.addr };
        Verdict::ask(std::future::poll_fn(move |cx| {
            question.desk.papers(|papers| match papers.verdicts[&question.of] {
                None => {
                    papers.wakers.push(cx.waker().clone());
                    Poll::Pending
                }
                Some(true) => Poll::Ready(Verdict::Allow),
                Some(false) => Poll::Ready(Verdict::deny("by the desk")),
            })
        }))
    }

    fn socket_created(&self, socket: SocketId) -> Result<(), Reason> {
        self.papers(|papers| {
            if papers.refuses_sockets {
                return Err("no more sockets".into());
            }
            papers.created.push(socket);
            Ok(())
        })
    }

    fn socket_dropped(&self, socket: SocketId) {
        self.papers(|papers| papers.dropped.push(socket));
    }
}

// ---- datagrams that wait for a verdict ------------------------------------------------------------

in_both!(datagrams_wait_in_their_order_for_the_verdict_about_the_first);
/// Kills: one that overtakes; one that is lost while the host ponders; a wait for all sockets.
fn datagrams_wait_in_their_order_for_the_verdict_about_the_first<G: Guest>() {
    for (verdict, armed) in [(true, false), (false, false), (true, true), (false, true)] {
        let desk = Desk::default();
        on::<G, _>(Backend::Uring, desk.setup(), async |guest| {
            let (stranger, from_stranger) = native::socket(own_ip());
            let (friend, from_friend) = native::socket(own_ip());
            let (asked, local) = guest.bound(LOOPBACK).await;
            let (other, local_2) = guest.bound(LOOPBACK).await;
            desk.ponder(from_stranger);
            if armed {
                guest.arm(asked).await;
            }
            for (sender, data) in [(&stranger, b"1"), (&friend, b"2"), (&stranger, b"3")] {
                sender.send_to(data, local).unwrap();
            }
            for _ in 0..3 {
                guest.assert_hears_nothing(asked).await;
                assert!(desk.is_asked());
                friend.send_to(b"meanwhile", local_2).unwrap();
                let meanwhile = Ok((b"meanwhile".to_vec(), from_friend));
                assert_eq!(guest.receive(other).await, meanwhile);
            }
            desk.decide(from_stranger, verdict);
            if verdict {
                assert_eq!(guest.receive(asked).await, Ok((b"1".to_vec(), from_stranger)));
            }
            assert_eq!(guest.receive(asked).await, Ok((b"2".to_vec(), from_friend)));
            if verdict {
                assert_eq!(guest.receive(asked).await, Ok((b"3".to_vec(), from_stranger)));
            }
            guest.assert_hears_nothing(asked).await;
            assert!(!desk.is_asked());
            let stats = guest.rig().counters().stats();
            let denied = if verdict { 0 } else { 2 };
            assert_eq!((stats.datagrams_received, stats.dropped_by_policy), (6, denied));
        });
    }
}

in_both!(a_flood_behind_a_verdict_is_bounded_as_any);
/// Kills: datagrams that are taken from the queue to be asked about.
fn a_flood_behind_a_verdict_is_bounded_as_any<G: Guest>() {
    const BYTES: usize = 100;
    const LIMIT: usize = 1000;
    let uring = Uring::builder().sockets(4).queue_bytes(LIMIT).build().unwrap();
    let desk = Desk::default();
    let setup = Setup { uring: Some(uring.clone()), ..desk.setup() };
    on::<G, _>(Backend::Uring, setup, async |guest| {
        let (stranger, from) = native::socket(own_ip());
        let (socket, local) = guest.bound(LOOPBACK).await;
        desk.ponder(from);
        guest.arm(socket).await;
        for number in 0..5000_u32 {
            let mut payload = [0; BYTES];
            payload[..4].copy_from_slice(&number.to_be_bytes());
            stranger.send_to(&payload, local).unwrap();
            if number % 100 == 0 {
                guest.assert_hears_nothing(socket).await;
                yield_to_others().await;
            }
        }
        eventually("the queue is full", || uring.stats().pauses > 0).await;
        guest.assert_hears_nothing(socket).await;
        // One in front, those of the queue, and one message of up to 64.
        let queued = (LIMIT + QUEUE_SLACK_BYTES) / (BYTES + QUEUED_DATAGRAM_BYTES) + 66;
        let received = guest.rig().counters().stats().datagrams_received;
        assert!((2..=queued as u64).contains(&received), "{received} are held, {queued} may");
        desk.decide(from, true);
        let mut last = None;
        for _ in 0..received {
            let (data, _) = guest.receive(socket).await.unwrap();
            let number = Some(u32::from_be_bytes(data[..4].try_into().unwrap()));
            assert!(last < number, "{number:?} comes after {last:?}");
            last = number;
        }
    });
}

in_both!(a_datagram_is_asked_about_anew_when_its_socket_is_connected);
/// Kills: a call that waits for a verdict that nobody will give; a datagram that is lost with it.
fn a_datagram_is_asked_about_anew_when_its_socket_is_connected<G: Guest>() {
    let desk = Desk::default();
    on::<G, _>(Backend::Uring, desk.setup(), async |guest| {
        let (stranger, from_stranger) = native::socket(own_ip());
        let (friend, from_friend) = native::socket(own_ip());
        let (socket, local) = guest.bound(LOOPBACK).await;
        desk.ponder(from_stranger);
        guest.arm(socket).await;
        stranger.send_to(b"before", local).unwrap();
        guest.assert_hears_nothing(socket).await;
        assert!(desk.is_asked());
        guest.connect(socket, from_friend).await.unwrap();
        guest.assert_hears_nothing(socket).await;
        assert_eq!(desk.papers(|papers| papers.questions), (2, 1));
        friend.send_to(b"behind", local).unwrap();
        guest.assert_hears_nothing(socket).await;
        desk.decide(from_stranger, true);
        assert_eq!(guest.receive(socket).await, Ok((b"behind".to_vec(), from_friend)));
        assert_eq!(guest.rig().counters().stats().dropped_not_from_peer, 1);
    });
}

in_both!(a_question_ends_with_its_socket);
fn a_question_ends_with_its_socket<G: Guest>() {
    let desk = Desk::default();
    on::<G, _>(Backend::Uring, desk.setup(), async |guest| {
        let (stranger, from) = native::socket(own_ip());
        let (socket, local) = guest.bound(LOOPBACK).await;
        desk.ponder(from);
        guest.arm(socket).await;
        for _ in 0..2 {
            stranger.send_to(b"x", local).unwrap();
        }
        guest.assert_hears_nothing(socket).await;
        let counters = guest.rig().counters();
        eventually("both are there", || {
            guest.rig().stats();
            counters.stats().datagrams_received == 2
        })
        .await;
        assert!(desk.is_asked());
        guest.drop_socket(socket).await;
        assert!(!desk.is_asked());
        assert_eq!(counters.stats().dropped_at_close, 2);
        eventually("it is closed", || {
            guest.rig().stats();
            counters.stats().sockets_open == 0
        })
        .await;
    });
}

// ---- what a policy is told ------------------------------------------------------------------------

in_both!(a_policy_hears_which_socket_and_where_it_is_bound);
fn a_policy_hears_which_socket_and_where_it_is_bound<G: Guest>() {
    let desk = Desk::default();
    on::<G, _>(Backend::Uring, desk.setup(), async |guest| {
        let (_native, peer) = native::socket(own_ip());
        let one = guest.create(IpAddressFamily::Ipv4).await.unwrap();
        let two = guest.create(IpAddressFamily::Ipv4).await.unwrap();
        let [first, second] = desk.papers(|papers| papers.created.clone())[..] else {
            panic!("two sockets")
        };
        assert_ne!(first, second);
        guest.bind(one, LOOPBACK).await.unwrap();
        guest.send(one, b"x", Some(peer)).await.unwrap();
        let local = guest.local(one).await.unwrap();
        guest.send(one, b"x", Some(peer)).await.unwrap();
        let events = desk.papers(|papers| std::mem::take(&mut papers.events));
        let told = |event: &AddrEvent| {
            (event.socket, format!("{:?}", event.addr_use), event.addr, event.local_addr)
        };
        let send = "UdpSend".to_owned();
        assert_eq!(
            events.iter().map(told).collect::<Vec<_>>(),
            [
                (first, "UdpBind".to_owned(), LOOPBACK, None),
                (first, send.clone(), peer, Some(LOOPBACK)),
                (first, send, peer, Some(local)),
            ]
        );
        assert!(events.iter().all(|event| !event.is_implicit));
        guest.drop_socket(two).await;
        assert_eq!(desk.papers(|papers| papers.dropped.clone()), [second]);
        let three = guest.create(IpAddressFamily::Ipv4).await.unwrap();
        assert!(!desk.papers(|papers| papers.created[..2].contains(&papers.created[2])));
        guest.drop_socket(three).await;
        guest.drop_socket(one).await;
        let mut pairs = desk.papers(|papers| (papers.created.clone(), papers.dropped.clone()));
        pairs.1.sort_unstable();
        assert_eq!(pairs.0, pairs.1, "each is dropped once");
    });
}

in_both!(a_policy_may_refuse_a_socket_which_leaves_nothing);
fn a_policy_may_refuse_a_socket_which_leaves_nothing<G: Guest>() {
    let desk = Desk::default();
    on::<G, _>(Backend::Uring, desk.setup(), async |guest| {
        desk.papers(|papers| papers.refuses_sockets = true);
        for _ in 0..3 {
            let refused = guest.create(IpAddressFamily::Ipv4).await;
            assert_eq!(refused, Err(ErrorCode::AccessDenied));
        }
        let stats = guest.rig().counters().stats();
        assert_eq!((stats.sockets_created, stats.sockets_open), (0, 0));
        let [denials] = &stats.denials[..] else { panic!("{stats:?}") };
        assert_eq!((&*denials.reason, denials.count), ("no more sockets", 3));
        assert_eq!(guest.rig().stats().sockets_open, 0);
        assert_eq!(desk.papers(|papers| papers.dropped.len()), 0);
    });
}

// ---- only WASI 0.3 ----------------------------------------------------------------------------------

#[test]
fn a_policy_can_tell_implicit_binds_from_those_that_the_guest_asks_for() {
    let desk = Desk::default();
    crate::rig::on(Backend::Uring, desk.setup(), async |rig| {
        let (_native, peer) = native::socket(own_ip());
        for connects in [false, true] {
            let socket = rig.create(crate::rig::V4).await.unwrap();
            if connects {
                rig.connect(socket, peer).await.unwrap();
            } else {
                rig.send(socket, b"x", Some(peer)).await.unwrap();
            }
            let events = desk.papers(|papers| std::mem::take(&mut papers.events));
            for event in &events {
                let is_bind = matches!(event.addr_use, SocketAddrUse::UdpBind);
                assert_eq!(event.is_implicit, is_bind, "{event:?}");
            }
            assert!(events.iter().any(|event| event.is_implicit));
        }
    });
}

/// Kills: a lock that is held while the host ponders; a bind that is not looked at again afterwards.
#[test]
fn sends_that_wait_for_verdicts_keep_no_others_and_bind_their_socket_once() {
    let desk = Desk::default();
    crate::rig::on(Backend::Uring, desk.setup(), async |rig| {
        let (slow, to_slow) = native::socket(own_ip());
        let (fast, to_fast) = native::socket(own_ip());
        let socket = rig.create(crate::rig::V4).await.unwrap();
        let anywhere = SocketAddr::from(([0, 0, 0, 0], 0));
        desk.ponder(to_slow);
        desk.ponder(anywhere);
        let (_, first) = rig.start_send(socket, b"slow", Some(to_slow)).await;
        let (_, second) = rig.start_send(socket, b"fast", Some(to_fast)).await;
        rig.settle().await;
        assert_eq!(rig.poll(second).await, crate::rig::Status::Started, "the bind is asked about");
        desk.decide(anywhere, true);
        rig.sent(second).await.unwrap();
        assert_eq!(native::receive(&fast, &mut [0; 16]), 4);
        assert_eq!(rig.poll(first).await, crate::rig::Status::Started);
        desk.decide(to_slow, false);
        assert_eq!(rig.sent(first).await, Err(crate::rig::ErrorCode::AccessDenied));
        slow.set_nonblocking(true).unwrap();
        slow.recv(&mut [0; 16]).unwrap_err();
        assert_eq!(rig.stats().datagrams_sent, 1);
    });
}
