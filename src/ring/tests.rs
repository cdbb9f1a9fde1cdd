//! The test plays the kernel: it completes what the ring has queued, in any order, without ever
//! entering. Proptest prints the seed of a failing run.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::account::Account;
use super::buffers::BufferId;
use super::op::Sent;
use super::receive_queue::QueueLimits;
use super::recycle::pool::Recycle;
use super::send::SendOp;
use super::share::Share;
use super::*;
use crate::datagram::{Family, Outgoing};
use crate::error::Errno;
use crate::limits::BUFFERS;
use crate::stats::ClosedInstead;

const IORING_CQE_F_BUFFER: u32 = 1;
const IORING_CQE_F_MORE: u32 = 2;
const IORING_CQE_BUFFER_SHIFT: u32 = 16;

/// A ring without a kernel behind it, and sockets on it.
struct Rig {
    ring: Ring,
    /// The ring's.
    table: Arc<Share>,
    /// One guest's, for all.
    account: Arc<Account>,
    sockets: Vec<Socket>,
    next_buffer: u16,
}

struct Socket {
    slot: SlotIndex,
    queue: Arc<ReceiveQueue>,
    /// What was delivered and not yet read.
    expected: VecDeque<u8>,
}

/// The next payload, if one is there, and whether the receive is to go on.
fn take_one(queue: &ReceiveQueue) -> (Option<Vec<u8>>, bool) {
    let taken = queue.take_first();
    (taken.arrivals.map(|arrival| arrival.unwrap().payload), taken.resumes)
}

const LIMITS: QueueLimits = QueueLimits { datagrams: 4, bytes: 1 << 20 };

impl Rig {
    fn new() -> Self {
        let setup::Built { ring, share: table, .. } =
            setup::build(16, BUFFERS, Recycle::OFF).unwrap();
        table.gain(&Share::new(16), |all| all);
        Self { ring, table, account: Account::of_sockets(16), sockets: Vec::new(), next_buffer: 0 }
    }

    fn open(&mut self) {
        assert!(self.table.take());
        let slot = self.ring.slots.take_free(Family::V4).unwrap();
        let queue = Arc::new(ReceiveQueue::new(LIMITS, Account::of_sockets(1)));
        self.ring.arm(slot, &queue);
        self.sockets.push(Socket { slot, queue, expected: VecDeque::new() });
    }

    /// The operation that the kernel holds for a slot and that `is` what is meant.
    fn in_kernel(&mut self, slot: SlotIndex, is: impl Fn(&Op) -> bool) -> Option<u64> {
        let ops = &mut self.ring.ops;
        ops.in_kernel()
            .into_iter()
            .find(|key| ops.find(*key).is_some_and(|(at, op)| at == slot && is(op)))
            .map(OpKey::user_data)
    }

    fn receive_in_kernel(&mut self, slot: SlotIndex) -> Option<u64> {
        self.in_kernel(slot, |op| matches!(op, Op::Receive(_)))
    }

    fn receive_now_in_kernel(&mut self, slot: SlotIndex) -> Option<u64> {
        self.in_kernel(slot, |op| matches!(op, Op::ReceiveNow(_)))
    }

    /// Submits a receive that does not wait: its caller's key, and the kernel's.
    fn receive_now(&mut self, slot: SlotIndex, queue: &Arc<ReceiveQueue>) -> (OpKey, u64) {
        let key = self.ring.receive_now(slot, queue);
        (key, self.receive_now_in_kernel(slot).expect("it was submitted"))
    }

    fn close_in_kernel(&mut self, slot: SlotIndex) -> u64 {
        self.in_kernel(slot, |op| matches!(op, Op::Close)).expect("a CLOSE was submitted")
    }

    fn complete_close(&mut self, slot: SlotIndex) {
        let close = self.close_in_kernel(slot);
        self.complete(close, 0, 0);
    }

    /// Completes the operations of a socket that receives in bursts.
    fn complete_asides(&mut self, slot: SlotIndex) {
        let is_aside = |op: &Op| matches!(op, Op::SetOption(_) | Op::CountDrops(_));
        while let Some(aside) = self.in_kernel(slot, is_aside) {
            self.complete(aside, 0, 0);
        }
    }

    fn complete(&mut self, user_data: u64, result: i32, flags: u32) {
        self.ring.complete(Completion { user_data, result, flags });
    }

    /// Delivers a datagram of one byte, or several as one message.
    fn deliver(&mut self, user_data: u64, bytes: &[u8], more: bool) {
        let id = BufferId(self.next_buffer % BUFFERS);
        self.next_buffer += 1;
        let mut message = vec![0; 16 + 28 + 24];
        message[0] = 16; // the name is a sockaddr_in
        message[8] = u8::try_from(bytes.len()).unwrap();
        message[16..18].copy_from_slice(&2_u16.to_ne_bytes()); // AF_INET
        if bytes.len() > 1 {
            message[4] = 24; // a control message: UDP_GRO, 1 byte each
            message[52..56].copy_from_slice(&libc::SOL_UDP.to_ne_bytes());
            message[56..60].copy_from_slice(&libc::UDP_GRO.to_ne_bytes());
            message[60] = 1;
        }
        message.extend(bytes);
        let buffers = self.ring.receives.buffers();
        buffers.fill(id, &message);
        let published = buffers.published();
        let more = if more { IORING_CQE_F_MORE } else { 0 };
        let flags = IORING_CQE_F_BUFFER | u32::from(id.0) << IORING_CQE_BUFFER_SHIFT | more;
        self.complete(user_data, i32::try_from(message.len()).unwrap(), flags);
        let now = self.ring.receives.buffers().published();
        assert_eq!(now, published.wrapping_add(1), "every buffer comes home, once");
    }

    /// Closes everything: a ring that is dropped waits for the kernel, which has none of these operations.
    fn finish(mut self) {
        for socket in std::mem::take(&mut self.sockets) {
            self.ring.close(socket.slot, &self.account, 0);
        }
        // First what holds the CLOSEs up.
        for _ in 0..2 {
            for key in self.ring.ops.in_kernel() {
                self.complete(key.user_data(), -libc::ECANCELED, 0);
            }
        }
        assert!(self.ring.ops.is_quiet());
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 48,
        ..crate::regressions("tests/proptest-regressions/ring.txt")
    })]

    /// Kills: a lost re-arm, a buffer kept, a message not split, a queue shared by successive
    /// owners, a slot given away too early, a datagram lost to a pause.
    #[test]
    fn whatever_the_kernel_does_datagrams_reach_their_own_socket_in_order(
        steps in proptest::collection::vec((0_u8..8, any::<prop::sample::Index>(), any::<u8>()), 1..120)
    ) {
        let mut rig = Rig::new();
        let mut stale = Vec::new();
        rig.open();
        for (action, which, byte) in steps {
            if rig.sockets.is_empty() {
                rig.open();
            }
            let at = which.index(rig.sockets.len());
            let slot = rig.sockets[at].slot;
            let receive = rig.receive_in_kernel(slot);
            match (action, receive) {
                (0, _) if rig.sockets.len() < 8 => rig.open(),
                // Datagrams in one message, and the receive goes on or ends.
                (1 | 2, Some(key)) => {
                    let bytes: Vec<u8> = (0..=byte % 6).map(|n| byte.wrapping_add(n)).collect();
                    rig.deliver(key, &bytes, action == 1);
                    rig.sockets[at].expected.extend(bytes);
                }
                // The receive ends without a datagram: no buffer, or its thread has exited.
                (3, Some(key)) => rig.complete(key, -libc::ENOBUFS, 0),
                (4, Some(key)) => rig.complete(key, -libc::ECANCELED, 0),
                // The guest reads.
                (5, _) => {
                    let socket = &mut rig.sockets[at];
                    let (read, resumes) = take_one(&socket.queue);
                    prop_assert_eq!(read, socket.expected.pop_front().map(|byte| vec![byte]));
                    if resumes {
                        rig.ring.resume(slot, &socket.queue);
                    }
                }
                // The guest drops its socket; the kernel ends the receive, and then closes.
                (6, receive) => {
                    let taken = rig.table.in_use();
                    let socket = rig.sockets.swap_remove(at);
                    rig.ring.close(slot, &rig.account, socket.queue.discard());
                    if let Some(key) = receive {
                        let close = rig.in_kernel(slot, |op| matches!(op, Op::Close));
                        prop_assert!(close.is_none(), "the kernel has yet to end the receive");
                        // What was on its way arrives late, and reaches no socket.
                        rig.deliver(key, &[byte], true);
                        rig.complete(key, -libc::ECANCELED, 0);
                        stale.push(key);
                    }
                    rig.complete_asides(slot);
                    prop_assert_eq!(rig.table.in_use(), taken, "it is not closed yet");
                    rig.complete_close(slot);
                    prop_assert_eq!(rig.table.in_use(), taken - 1);
                }
                // A completion that should not be: its operation has ended.
                (7, _) if !stale.is_empty() => {
                    let key = stale[which.index(stale.len())];
                    rig.complete(key, -libc::ECANCELED, 0);
                }
                _ => {}
            }
            // Unless its queue is full, a socket's receive is armed.
            for at in 0..rig.sockets.len() {
                let (slot, queued) = (rig.sockets[at].slot, rig.sockets[at].expected.len());
                let armed = rig.receive_in_kernel(slot).is_some();
                prop_assert!(armed || queued > LIMITS.datagrams / 2 - 1, "{queued} queued, not armed");
            }
        }
        for socket in &rig.sockets {
            for expected in &socket.expected {
                let arrival = take_one(&socket.queue).0;
                prop_assert_eq!(arrival, Some(vec![*expected]), "nothing delivered is lost");
            }
            prop_assert!(socket.queue.is_empty());
        }
        rig.finish();
    }
}

/// A bind to a port by number, on its way.
fn begun(rig: &mut Rig, port: u16) -> (SlotIndex, OpKey) {
    assert!(rig.table.take());
    let bind = BindOp::new(Family::V4, Vec::new(), ([127, 0, 0, 1], port).into());
    rig.ring.submit_bind(None, Box::new(bind))
}

/// A bind to a port by number, and the kernel's first answer: the port is taken.
fn refused(rig: &mut Rig, port: u16) -> (SlotIndex, OpKey) {
    let (slot, key) = begun(rig, port);
    rig.complete(key.user_data(), -libc::EADDRINUSE, 0);
    (slot, key)
}

/// A socket bound to a port by number.
fn bound(rig: &mut Rig, port: u16) -> SlotIndex {
    let (slot, key) = begun(rig, port);
    rig.complete(key.user_data(), 0, 0);
    assert!(matches!(rig.ring.take_result(key), Some(Ok(Output::Done))));
    slot
}

const IN_USE: i32 = -libc::EADDRINUSE;

#[test]
fn a_bind_that_is_refused_a_port_is_tried_once_more_after_the_close_that_may_hold_it() {
    let mut rig = Rig::new();
    for second_answer in [0, IN_USE] {
        let old = bound(&mut rig, 5000);
        rig.ring.close(old, &rig.account, 0);
        let close = rig.close_in_kernel(old);
        let (new, key) = refused(&mut rig, 5000);
        assert!(rig.ring.take_result(key).is_none(), "it waits for the close");
        assert_eq!(rig.queued_by(|rig| rig.complete(close, 0, 0)), 1, "BIND, with the same socket");
        rig.complete(key.user_data(), second_answer, 0);
        match rig.ring.take_result(key) {
            Some(Ok(_)) => assert_eq!(second_answer, 0),
            Some(Err(Errno(errno))) => assert_eq!(-errno, second_answer),
            None => panic!("no third attempt"),
        }
        rig.ring.close(new, &rig.account, 0);
        rig.complete_close(new);
    }
    rig.finish();
}

#[test]
fn a_bind_that_is_refused_a_port_is_told_at_once_where_no_close_may_hold_it() {
    let mut rig = Rig::new();
    let (_, key) = refused(&mut rig, 5000);
    assert!(matches!(rig.ring.take_result(key), Some(Err(Errno(libc::EADDRINUSE)))));
    rig.finish();
}

/// The kernel does not see a port as free in the submission that closes its socket.
#[test]
fn a_bind_is_tried_again_although_the_close_has_ended_before_the_refusal_came() {
    let mut rig = Rig::new();
    let old = bound(&mut rig, 5000);
    rig.ring.close(old, &rig.account, 0);
    let (new, key) = begun(&mut rig, 5000);
    rig.complete_close(old);
    assert_eq!(rig.queued_by(|rig| rig.complete(key.user_data(), IN_USE, 0)), 1, "BIND");
    rig.complete(key.user_data(), 0, 0);
    assert!(matches!(rig.ring.take_result(key), Some(Ok(_))));
    rig.ring.close(new, &rig.account, 0);
    rig.finish();
}

#[test]
fn a_bind_waits_for_a_close_that_began_after_it() {
    let mut rig = Rig::new();
    let old = bound(&mut rig, 5000);
    let (new, key) = begun(&mut rig, 5000);
    rig.ring.close(old, &rig.account, 0);
    rig.complete(key.user_data(), IN_USE, 0);
    let close = rig.close_in_kernel(old);
    assert_eq!(rig.queued_by(|rig| rig.complete(close, 0, 0)), 1, "BIND");
    rig.ring.close(new, &rig.account, 0);
    rig.finish();
}

/// Kills: memory that is freed although entries that name it are still in the submission queue.
#[test]
fn a_bind_whose_chain_is_cut_keeps_its_memory_until_the_rest_is_submitted() {
    let mut rig = Rig::new();
    let (slot, key) = begun(&mut rig, 5000);
    // Of SOCKET and BIND the kernel has taken the first, and has no memory for either.
    rig.ring.stats.submissions += 1;
    rig.complete(key.user_data(), -libc::ENFILE, 0);
    assert!(matches!(rig.ring.take_result(key), Some(Err(Errno(libc::ENFILE)))));
    rig.ring.reap();
    assert_eq!(rig.ring.cut.len(), 1);
    rig.ring.stats.submissions += 1;
    rig.ring.reap();
    assert!(rig.ring.cut.is_empty());
    rig.complete(key.user_data(), -libc::EBADF, 0);
    rig.ring.close(slot, &rig.account, 0);
    rig.finish();
}

#[test]
fn a_bind_does_not_wait_for_the_close_of_another_port() {
    let mut rig = Rig::new();
    let old = bound(&mut rig, 5001);
    rig.ring.close(old, &rig.account, 0);
    let (new, key) = refused(&mut rig, 5000);
    // It was queued behind a close, so that it is tried twice all the same.
    rig.complete(key.user_data(), IN_USE, 0);
    assert!(matches!(rig.ring.take_result(key), Some(Err(Errno(libc::EADDRINUSE)))));
    rig.ring.close(new, &rig.account, 0);
    rig.finish();
}

#[test]
fn a_bind_whose_guest_drops_it_while_it_waits_is_not_tried_again() {
    let mut rig = Rig::new();
    let old = bound(&mut rig, 5000);
    rig.ring.close(old, &rig.account, 0);
    let close = rig.close_in_kernel(old);
    let (new, key) = refused(&mut rig, 5000);
    drop(rig.ring.detach(key));
    rig.ring.close(new, &rig.account, 0);
    assert_eq!(rig.queued_by(|rig| rig.complete(close, 0, 0)), 0);
    rig.finish();
}

/// Kills: the guest's unit of its quota put back at the close already; a bind by number that waits for
/// a send, which may wait for ever.
#[test]
fn a_send_that_waits_keeps_its_guests_quota_and_the_file_but_holds_up_no_bind() {
    let mut rig = Rig::new();
    rig.account = Account::of_sockets(1);
    assert!(rig.account.sockets.take_exclusive().is_ok());
    let slot = rig.opened();
    let receive = rig.receive_in_kernel(slot).unwrap();
    let send = rig.ring.submit(slot, send_op(&[10]));
    let socket = rig.sockets.pop().unwrap();
    drop(rig.ring.detach(send));
    rig.ring.close(slot, &rig.account, socket.queue.discard());

    let (new, bind) = refused(&mut rig, 5000);
    assert!(rig.ring.take_result(bind).is_none(), "it waits: a receive is still being cancelled");
    let complete_receive = |rig: &mut Rig| rig.complete(receive, -libc::ECANCELED, 0);
    assert_eq!(rig.queued_by(complete_receive), 0, "the send may be on its way to the kernel");
    assert_eq!(rig.queued_by(|rig| rig.ring.give_up_on_sends()), 1, "BIND");
    assert!(rig.account.sockets.take_exclusive().is_err(), "the send keeps it");
    assert_eq!(rig.queued_by(|rig| rig.complete_send(send, &[10])), 1, "the CLOSE");
    assert!(rig.account.sockets.take_exclusive().is_ok());
    assert_eq!(rig.table.in_use(), 2);
    rig.complete_close(slot);
    assert_eq!(rig.table.in_use(), 1);
    rig.ring.close(new, &rig.account, 0);
    rig.finish();
}

/// Another thread reaps between the guest's call, which ends a pause, and its `resume`. Kills: a
/// receive armed on a paused queue, which no delivery would ever cancel.
#[test]
fn a_queue_filled_again_before_its_receive_is_resumed_stays_paused() {
    let mut rig = Rig::new();
    let slot = rig.opened();
    let receive = rig.receive_in_kernel(slot).unwrap();
    rig.deliver(receive, &[1, 2, 3, 4], true);
    let queue = Arc::clone(&rig.sockets[0].queue);
    let resumes: Vec<bool> = (0..3).map(|_| take_one(&queue).1).collect();
    assert_eq!(resumes, [false, false, true]);
    // Before the cancel came.
    rig.deliver(receive, &[5, 6, 7], false);
    assert!(queue.is_paused() && rig.receive_in_kernel(slot).is_none());
    rig.ring.resume(slot, &queue);
    assert!(rig.receive_in_kernel(slot).is_none(), "full");
    while !take_one(&queue).1 {}
    rig.ring.resume(slot, &queue);
    assert!(rig.receive_in_kernel(slot).is_some());
    rig.complete_asides(slot);
    rig.finish();
}

/// Kills: an armed receive that goes on to fill a queue that a receive beside it has filled; EAGAIN as the
/// socket's error.
#[test]
fn a_receive_that_does_not_wait_pauses_the_armed_one_and_ends_alone() {
    let mut rig = Rig::new();
    let slot = rig.opened();
    let queue = Arc::clone(&rig.sockets[0].queue);
    let armed = rig.receive_in_kernel(slot).unwrap();
    let (key, now) = rig.receive_now(slot, &queue);
    rig.deliver(now, &[1, 2, 3], true);
    assert_eq!(rig.queued_by(|rig| rig.complete(now, -libc::EAGAIN, 0)), 0);
    assert!(matches!(rig.ring.take_result(key), Some(Ok(Output::Done))));
    assert!(rig.receive_now_in_kernel(slot).is_none());
    assert_eq!((rig.receive_in_kernel(slot), queue.take_error()), (Some(armed), None));

    let (key, now) = rig.receive_now(slot, &queue);
    rig.deliver(now, &[4], false);
    assert!(rig.ring.slots.get(slot).receive.unwrap().is_cancelled);
    assert!(rig.ring.take_result(key).is_some());
    rig.complete(armed, -libc::ECANCELED, 0);
    assert!(queue.is_paused() && rig.receive_in_kernel(slot).is_none());
    while !take_one(&queue).1 {}
    rig.ring.resume(slot, &queue);
    assert!(rig.receive_in_kernel(slot).is_some());
    rig.complete_asides(slot);
    rig.finish();
}

/// Kills: the thread that queued the entry, or tried to submit it, taken for the one whose enter the kernel has
/// taken it in.
#[test]
fn a_receive_is_armed_by_the_thread_whose_enter_brought_it_to_the_kernel() {
    let mut rig = Rig::new();
    let slot = rig.opened();
    let entries = rig.ring.flush();
    assert!(rig.ring.armed_elsewhere(slot).is_none(), "by none yet");
    std::thread::scope(|scope| scope.spawn(|| rig.ring.end_submission(0)).join().unwrap());
    assert!(rig.ring.armed_elsewhere(slot).is_none(), "the kernel has taken nothing");
    std::thread::scope(|scope| scope.spawn(|| rig.ring.end_submission(entries)).join().unwrap());
    assert!(rig.ring.armed_elsewhere(slot).is_some());
    let receive = rig.receive_in_kernel(slot).unwrap();
    // It ends, and is armed again.
    rig.deliver(receive, &[1], false);
    let entries = rig.ring.flush();
    rig.ring.end_submission(entries);
    assert!(rig.ring.armed_elsewhere(slot).is_none());
}

/// Kills: a cancel that ends the receive for good, or each receive that follows; a second cancel for the same.
#[test]
fn a_receive_that_is_cancelled_while_its_queue_has_room_is_followed_by_another() {
    let mut rig = Rig::new();
    let slot = rig.opened();
    let first = rig.receive_in_kernel(slot).unwrap();
    assert_eq!(rig.queued_by(|rig| rig.ring.cancel_receive(slot)), 1);
    assert_eq!(rig.queued_by(|rig| rig.ring.cancel_receive(slot)), 0, "its cancel is on the way");
    rig.deliver(first, &[1], true);
    rig.complete(first, -libc::ECANCELED, 0);
    let second = rig.receive_in_kernel(slot).unwrap();
    assert_ne!(second, first);
    rig.deliver(second, &[2], true);
    assert_eq!(rig.receive_in_kernel(slot), Some(second));
    rig.complete_asides(slot);
    rig.finish();
}

/// Kills: a slot given to the next socket while a receive of its last one is in flight; datagrams that come with
/// the close, and that nobody counts.
#[test]
fn what_comes_while_a_socket_is_closed_is_counted_and_holds_the_close_up() {
    let mut rig = Rig::new();
    rig.account = Account::of_sockets(1);
    assert!(rig.account.sockets.take_exclusive().is_ok());
    let slot = rig.opened();
    let armed = rig.receive_in_kernel(slot).unwrap();
    let Socket { queue, .. } = rig.sockets.pop().unwrap();
    let (key, now) = rig.receive_now(slot, &queue);
    drop(rig.ring.detach(key));
    rig.ring.close(slot, &rig.account, queue.discard());
    rig.deliver(armed, &[1, 2], true);
    rig.complete(armed, -libc::ECANCELED, 0);
    rig.deliver(now, &[3], true);
    assert_eq!(rig.queued_by(|rig| rig.complete(now, -libc::EAGAIN, 0)), 1, "the CLOSE");
    rig.complete_close(slot);
    assert_eq!(rig.ring.snapshot().dropped_at_close, 3);
    assert_eq!(queue.account().stats().dropped_at_close, 3);
    rig.finish();
}

/// Kills: a waker that is dropped, under the driver's lock, with the queue of a ring that is being closed.
#[test]
fn who_waits_is_woken_whichever_receive_of_a_ring_that_is_being_closed_ends_first() {
    let mut rig = Rig::new();
    let slot = rig.opened();
    let armed = rig.receive_in_kernel(slot).unwrap();
    let queue = Arc::clone(&rig.sockets.pop().unwrap().queue);
    let (key, now) = rig.receive_now(slot, &queue);
    drop(rig.ring.detach(key));
    assert!(queue.register(Waker::noop().clone()).is_none());
    rig.ring.begin_shutdown();
    assert!(!rig.ring.has_wakers());
    rig.complete(now, -libc::EAGAIN, 0);
    assert_eq!(rig.ring.take_wakers().count(), 1);
    rig.complete(armed, -libc::ECANCELED, 0);
    rig.complete_close(slot);
    rig.finish();
}

#[test]
fn a_cancel_that_misses_its_receive_is_sent_again() {
    let mut rig = Rig::new();
    rig.open();
    let slot = rig.sockets[0].slot;
    let receive = rig.receive_in_kernel(slot).unwrap();
    let socket = rig.sockets.pop().unwrap();
    rig.ring.close(slot, &rig.account, socket.queue.discard());
    let cancel = receive | 1 << 31;
    for missed in [-libc::ENOENT, -libc::EALREADY] {
        let queued = rig.ring.queued();
        rig.complete(cancel, missed, 0);
        assert_eq!(rig.ring.queued(), queued + 1, "once more");
    }
    rig.complete(receive, -libc::ECANCELED, 0);
    let queued = rig.ring.queued();
    rig.complete(cancel, -libc::ENOENT, 0);
    assert_eq!(rig.ring.queued(), queued, "the receive has ended");
    rig.complete_close(slot);
    assert_eq!(rig.table.in_use(), 0);
    rig.finish();
}

/// Kills: GRO for every socket, GRO set with each burst, drops counted of every socket or of none.
#[test]
fn only_a_socket_that_receives_in_bursts_gets_gro_and_its_drops_counted() {
    let is_gro = |op: &Op| matches!(op, Op::SetOption(_));
    let is_count = |op: &Op| matches!(op, Op::CountDrops(_));
    let mut rig = Rig::new();
    let (slow, bursty) = (rig.opened(), rig.opened());
    for slot in [slow, bursty] {
        let receive = rig.receive_in_kernel(slot).unwrap();
        rig.deliver(receive, &[1, 2, 3], true);
        assert!(rig.in_kernel(slot, is_gro).is_none());
    }
    let receive = rig.receive_in_kernel(bursty).unwrap();
    rig.deliver(receive, &[4], true);
    let gro = rig.in_kernel(bursty, is_gro).expect("four wait");
    rig.complete(gro, 0, 0);
    rig.deliver(receive, &[5], true);
    assert!(rig.in_kernel(bursty, is_gro).is_none(), "once");
    let Stats { datagrams_received, datagrams_split, .. } = rig.ring.stats;
    assert_eq!((datagrams_received, datagrams_split), (8, 6));

    for (slot, unread, counts) in [(slow, 3, false), (bursty, 5, true)] {
        let receive = rig.receive_in_kernel(slot).unwrap();
        rig.ring.close(slot, &rig.account, unread);
        rig.complete(receive, -libc::ECANCELED, 0);
        assert_eq!(rig.in_kernel(slot, is_count).is_some(), counts);
    }
    rig.finish();
}

// ---- sends ----------------------------------------------------------------------------------------

/// Datagrams that a send got into the kernel, and the error that ended it.
fn sent(result: &OpResult) -> (u64, Option<Errno>) {
    match result {
        Ok(Output::Sent(Sent { datagrams, error, .. })) => (*datagrams, *error),
        Err(errno) => (0, Some(*errno)),
        Ok(output) => panic!("of no send: {output:?}"),
    }
}

fn send_op(sizes: &[usize]) -> Op {
    let outgoing = |bytes: &usize| Outgoing { payload: vec![0; *bytes], to: None };
    Op::Send(SendOp::new(sizes.iter().map(outgoing).collect()))
}

impl Rig {
    fn opened(&mut self) -> SlotIndex {
        self.open();
        self.sockets.last().unwrap().slot
    }

    /// Completes the messages of a send in order.
    fn complete_send(&mut self, key: OpKey, results: &[i32]) {
        for result in results {
            assert!(self.ring.take_result(key).is_none(), "it waits for every message");
            self.complete(key.user_data(), *result, 0);
        }
    }

    /// Entries that a step queues.
    fn queued_by(&mut self, step: impl FnOnce(&mut Self)) -> u64 {
        let before = self.ring.queued();
        step(self);
        self.ring.queued() - before
    }

    /// Sends that, and completes it as the kernel does where nothing is wrong; how many messages
    /// it took.
    fn send_all(&mut self, slot: SlotIndex, sizes: &[usize]) -> u64 {
        let before = self.ring.queued();
        let key = self.ring.submit(slot, send_op(sizes));
        let messages = self.ring.queued() - before;
        (0..messages).for_each(|_| self.complete(key.user_data(), 1, 0));
        let result = self.ring.take_result(key).unwrap();
        assert_eq!(sent(&result), (sizes.len() as u64, None));
        messages
    }
}

/// Kills: a count without what the first attempt sent, or with what it did not; a slot that does
/// not remember; a memory shared by all.
#[test]
fn what_is_refused_coalesced_is_sent_apart_and_the_slot_remembers() {
    for (errno, smaller_coalesced) in [(libc::EMSGSIZE, 1), (libc::EINVAL, 1), (libc::EIO, 3)] {
        let mut rig = Rig::new();
        let slot = rig.opened();
        let key = rig.ring.submit(slot, send_op(&[10, 10, 100, 100, 50, 60]));
        // Three messages, of which the second, the 100s with the 50, is refused.
        let queued = rig.queued_by(|rig| rig.complete_send(key, &[20, -errno, -libc::ECANCELED]));
        assert_eq!(queued, 4, "what is left, one by one");
        rig.complete_send(key, &[100, 100, 50, 60]);
        assert_eq!(rig.ring.stats.gso_refusals, 1);
        let result = rig.ring.take_result(key).unwrap();
        assert_eq!(sent(&result), (6, None));
        let Stats { datagrams_sent, datagrams_coalesced, bytes_sent, .. } = rig.ring.stats;
        assert_eq!((datagrams_sent, datagrams_coalesced, bytes_sent), (6, 2, 330));

        assert_eq!(rig.send_all(slot, &[100; 3]), 3, "the slot remembers");
        assert_eq!(rig.send_all(slot, &[99; 3]), smaller_coalesced, "what is smaller may pass");
        let other = rig.opened();
        assert_eq!(rig.send_all(other, &[100; 3]), 1, "another slot knows nothing of it");
        rig.finish();
    }
}

#[test]
fn a_datagram_refused_alone_as_well_ends_its_send() {
    let mut rig = Rig::new();
    let slot = rig.opened();
    let key = rig.ring.submit(slot, send_op(&[100; 4]));
    let queued = rig.queued_by(|rig| rig.complete_send(key, &[-libc::EMSGSIZE]));
    assert_eq!(queued, 4);
    let results = [100, 100, -libc::EMSGSIZE, -libc::ECANCELED];
    assert_eq!(rig.queued_by(|rig| rig.complete_send(key, &results)), 0, "no third attempt");
    let result = rig.ring.take_result(key).unwrap();
    assert_eq!(sent(&result), (2, Some(Errno(libc::EMSGSIZE))));
    assert_eq!((rig.ring.stats.gso_refusals, rig.ring.stats.bytes_sent), (1, 200));
    rig.finish();
}

#[test]
fn a_send_goes_on_after_its_thread_has_exited() {
    let mut rig = Rig::new();
    let slot = rig.opened();
    let key = rig.ring.submit(slot, send_op(&[10, 10, 20, 20]));
    let queued = rig.queued_by(|rig| rig.complete_send(key, &[20, -libc::ECANCELED]));
    assert_eq!(queued, 1, "what was not sent, still coalesced");
    assert_eq!(rig.queued_by(|rig| rig.complete_send(key, &[-libc::ECANCELED])), 1, "and again");
    rig.complete_send(key, &[40]);
    let result = rig.ring.take_result(key).unwrap();
    assert_eq!(sent(&result), (4, None));
    let Stats { datagrams_coalesced, bytes_sent, gso_refusals, .. } = rig.ring.stats;
    assert_eq!((datagrams_coalesced, bytes_sent, gso_refusals), (4, 60, 0));
    rig.finish();
}

#[test]
fn refusals_and_bursts_of_a_former_owner_are_not_the_next_ones() {
    let mut rig = Rig::new();
    let slot = rig.opened();
    let receive = rig.receive_in_kernel(slot).unwrap();
    rig.deliver(receive, &[1, 2, 3, 4], true);
    let key = rig.ring.submit(slot, send_op(&[100; 2]));
    rig.complete_send(key, &[-libc::EIO, 100, 100]);
    drop(rig.ring.detach(key));
    let socket = rig.sockets.pop().unwrap();
    rig.ring.close(slot, &rig.account, socket.queue.discard());
    while let Some(key) = rig.in_kernel(slot, |_| true) {
        rig.complete(key, -libc::ECANCELED, 0);
    }

    assert_eq!(rig.opened(), slot, "the next has the same");
    assert_eq!(rig.send_all(slot, &[100; 2]), 1);
    rig.ring.close(slot, &rig.account, 0);
    assert!(rig.in_kernel(slot, |op| matches!(op, Op::CountDrops(_))).is_none());
    rig.finish();
}

/// Kills: a CLOSE before it, after which the kernel would find no file for what is left.
#[test]
fn a_send_of_a_closing_slot_is_finished_before_its_close() {
    for (errno, left) in [(libc::EMSGSIZE, 2), (libc::EIO, 2), (libc::ECANCELED, 1)] {
        let mut rig = Rig::new();
        let slot = rig.opened();
        let receive = rig.receive_in_kernel(slot).unwrap();
        let key = rig.ring.submit(slot, send_op(&[10, 10, 20, 20]));
        let socket = rig.sockets.pop().unwrap();
        drop(rig.ring.detach(key));
        rig.ring.close(slot, &rig.account, socket.queue.discard());
        rig.complete(receive, -libc::ECANCELED, 0);
        assert!(rig.in_kernel(slot, |op| matches!(op, Op::Close)).is_none());
        assert_eq!(rig.queued_by(|rig| rig.complete_send(key, &[20, -errno])), left);
        let results = if left == 1 { vec![40] } else { vec![20, 20] };
        assert_eq!(rig.queued_by(|rig| rig.complete_send(key, &results)), 1, "the CLOSE");
        assert_eq!(rig.ring.stats.datagrams_sent, 4);
        assert_eq!(rig.table.in_use(), 1);
        rig.complete_close(slot);
        assert_eq!(rig.table.in_use(), 0);
        rig.finish();
    }
}

/// Enters the kernel until nothing is left to come.
fn enter(ring: &mut Ring) {
    let kernel = ring.kernel();
    for _ in 0..3 {
        let entries = ring.flush();
        kernel.enter(entries, Some(0)).unwrap();
        ring.reap();
    }
}

/// With the real kernel: `Op::completions` and the linked chain rely on it.
#[test]
fn a_failing_socket_operation_completes_its_bind_once() {
    let bad_option = SocketOption { level: libc::SOL_SOCKET, name: -1, value: 1 };
    let foreign = SocketAddr::from(([192, 0, 2, 1], 0));
    let local = SocketAddr::from(([127, 0, 0, 1], 0));
    let cases = [
        // The middle of the chain fails, its end fails, nothing fails.
        (vec![bad_option], local, Some(Errno(libc::ENOPROTOOPT))),
        (vec![], foreign, Some(Errno(libc::EADDRNOTAVAIL))),
        (vec![], local, None),
    ];
    for (options, addr, error) in cases {
        let setup::Built { mut ring, share: table, .. } =
            setup::build(4, BUFFERS, Recycle::OFF).unwrap();
        table.gain(&Share::new(4), |all| all);
        assert!(table.take());
        let bind = BindOp::new(Family::V4, options, addr);
        let (slot, key) = ring.submit_bind(None, Box::new(bind));
        enter(&mut ring);
        assert_eq!(ring.stats.completions, 1, "{error:?}");
        let result = ring.take_result(key).expect("the one completion was the last");
        assert_eq!(result.err(), error);
        ring.close(slot, &Account::of_sockets(1), 0);
        enter(&mut ring);
        assert_eq!((ring.stats.completions, table.in_use()), (2, 0), "{error:?}");
    }
    // The head fails: a slot beyond the table. The kernel does not count that as a failure of
    // the chain, and BIND finds the slot empty; one completion all the same.
    let setup::Built { mut ring, share: table, .. } =
        setup::build(1, BUFFERS, Recycle::OFF).unwrap();
    table.gain(&Share::new(1), |all| all);
    assert!(table.take());
    let bind = BindOp::new(Family::V4, vec![], local);
    // Two slots for a table of one.
    ring.slots = SlotTable::new(2);
    let mut open = || ring.slots.take_free(Family::V4).unwrap();
    let (first, beyond) = (open(), open());
    let (_, key) = ring.submit_bind(Some(beyond), Box::new(bind));
    enter(&mut ring);
    assert_eq!(ring.stats.completions, 1);
    assert_eq!(ring.take_result(key).unwrap().err(), Some(Errno(libc::EBADF)));
    for slot in [first, beyond] {
        ring.close(slot, &Account::of_sockets(1), 0);
    }
    enter(&mut ring);
}

// ---- recycled sockets, with the real kernel -----------------------------------------------------

const EVERYWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const LOOPBACK_6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), 0);

/// A ring that recycles, and its sockets.
struct Recycling {
    ring: Ring,
    table: Arc<Share>,
}

impl Recycling {
    fn new() -> Self {
        let recycle = Recycle { quarantined_max: 4, ready_max: 4, ..Recycle::default() };
        let setup::Built { ring, share: table, .. } = setup::build(4, BUFFERS, recycle).unwrap();
        table.gain(&Share::new(4), |all| all);
        Self { ring, table }
    }

    /// One with a ready socket that was bound to an address, or to all.
    fn with_a_ready_socket(addr: SocketAddr) -> Self {
        let mut this = Self::new();
        let slot = this.bound(addr);
        this.close(slot);
        assert_eq!((this.table.in_use(), this.ring.snapshot().sockets_cached), (0, 1));
        this.until(|ring| ring.recycler.has_ready());
        this
    }

    fn until(&mut self, mut is_so: impl FnMut(&mut Ring) -> bool) {
        let patience = Instant::now() + Duration::from_mins(1);
        while !is_so(&mut self.ring) {
            assert!(Instant::now() < patience, "it usually takes milliseconds");
            std::thread::yield_now();
            enter(&mut self.ring);
        }
    }

    fn bind(&mut self, slot: Option<SlotIndex>, bind: BindOp) -> (SlotIndex, Option<Errno>) {
        assert!(slot.is_some() || self.table.take());
        let (slot, key) = self.ring.submit_bind(slot, Box::new(bind));
        (slot, self.done(key))
    }

    fn done(&mut self, key: OpKey) -> Option<Errno> {
        enter(&mut self.ring);
        self.ring.take_result(key).expect("it completes inside the enter").err()
    }

    fn bound(&mut self, addr: SocketAddr) -> SlotIndex {
        let (slot, error) = self.bind(None, bind_op(addr));
        assert_eq!(error, None);
        slot
    }

    fn run(&mut self, slot: SlotIndex, op: Op) {
        let key = self.ring.submit(slot, op);
        assert_eq!(self.done(key), None);
    }

    fn close(&mut self, slot: SlotIndex) {
        self.ring.close(slot, &Account::of_sockets(1), 0);
        enter(&mut self.ring);
    }

    /// Where a socket is, by a descriptor of it.
    fn port(&mut self, slot: SlotIndex) -> u16 {
        let key = self.ring.submit(slot, Op::Install);
        enter(&mut self.ring);
        let Ok(Output::Descriptor(descriptor)) = self.ring.take_result(key).unwrap() else {
            panic!("it makes a descriptor");
        };
        UdpSocket::from(descriptor).local_addr().unwrap().port()
    }
}

fn bind_op(addr: SocketAddr) -> BindOp {
    let family = if addr.is_ipv4() { Family::V4 } else { Family::V6 };
    BindOp::new(family, vec![], addr)
}

fn connect_op(addr: SocketAddr) -> Op {
    Op::Connect(Box::new(addr.into()))
}

fn a_send() -> Op {
    Op::Send(SendOp::new(vec![Outgoing { payload: vec![1; 8], to: None }]))
}

#[test]
fn a_bind_that_fails_on_a_recycled_socket_is_answered_by_a_new_one() {
    let mut rig = Recycling::with_a_ready_socket(EVERYWHERE);
    let (slot, error) = rig.bind(None, bind_op(([192, 0, 2, 1], 0).into()));
    assert_eq!(error, Some(Errno(libc::EADDRNOTAVAIL)));
    assert_eq!(slot, SlotIndex(0), "it was the ready one's");
    let stats = rig.ring.snapshot();
    assert_eq!((stats.sockets_recycled, stats.closed_instead.error), (0, 1));
    assert_eq!(rig.bind(Some(slot), bind_op(EVERYWHERE)).1, None);
    rig.close(slot);
    assert_eq!(
        (rig.table.in_use(), rig.ring.snapshot().sockets_cached),
        (0, 0),
        "closed after an error"
    );
}

#[test]
fn a_guest_that_leaves_while_its_recycled_socket_binds_leaves_nothing() {
    for addr in [EVERYWHERE, ([192, 0, 2, 1], 0).into()] {
        let mut rig = Recycling::with_a_ready_socket(EVERYWHERE);
        assert!(rig.table.take());
        let (slot, key) = rig.ring.submit_bind(None, Box::new(bind_op(addr)));
        drop(rig.ring.detach(key));
        rig.close(slot);
        let stats = rig.ring.snapshot();
        assert_eq!(
            (rig.table.in_use(), stats.sockets_cached, stats.closed_instead.busy),
            (0, 0, 1)
        );
        assert!(rig.ring.ops.is_quiet());
    }
}

/// Kills: each mark of a taint that is not made.
#[test]
fn a_tainted_socket_is_closed_for_its_reason() {
    type Life = fn(&mut Recycling) -> SlotIndex;
    type Reason = fn(&ClosedInstead) -> u64;
    let lives: [(&str, Life, Reason); 8] = [
        (
            "a port by number",
            |rig| {
                let port = UdpSocket::bind(LOOPBACK).unwrap().local_addr().unwrap().port();
                rig.bound((Ipv4Addr::LOCALHOST, port).into())
            },
            |closed| closed.named_port,
        ),
        (
            "an option set later",
            |rig| {
                let slot = rig.bound(LOOPBACK);
                rig.run(slot, Op::SetOption(Box::new(TTL)));
                slot
            },
            |closed| closed.options,
        ),
        (
            "an option set with the bind",
            |rig| rig.bind(None, BindOp::new(Family::V4, vec![TTL], LOOPBACK)).0,
            |closed| closed.options,
        ),
        (
            "bursts taken in one message",
            |rig| {
                let slot = rig.bound(LOOPBACK);
                rig.ring.enable_gro(slot);
                enter(&mut rig.ring);
                slot
            },
            |closed| closed.options,
        ),
        (
            "a peer over IPv6",
            |rig| {
                let slot = rig.bound(LOOPBACK_6);
                rig.run(slot, connect_op((Ipv6Addr::LOCALHOST, 9).into()));
                slot
            },
            |closed| closed.connected,
        ),
        (
            "a refusal that was received",
            |rig| {
                let slot = rig.bound(LOOPBACK);
                let queue = Arc::new(ReceiveQueue::new(LIMITS, Account::of_sockets(1)));
                rig.ring.arm(slot, &queue);
                rig.run(slot, connect_op((Ipv4Addr::LOCALHOST, 9).into()));
                rig.run(slot, a_send());
                rig.until(|_| !queue.is_empty());
                slot
            },
            |closed| closed.error,
        ),
        (
            "an operation still going on",
            |rig| {
                let slot = rig.bound(LOOPBACK);
                let key = rig.ring.submit(slot, Op::Install);
                drop(rig.ring.detach(key));
                slot
            },
            |closed| closed.busy,
        ),
        (
            "a flood left unread",
            |rig| {
                let slot = rig.bound(LOOPBACK);
                let at = (Ipv4Addr::LOCALHOST, rig.port(slot));
                let peer = UdpSocket::bind(LOOPBACK).unwrap();
                for _ in 0..20 {
                    peer.send_to(&[0; 1000], at).unwrap();
                }
                slot
            },
            |closed| closed.unread,
        ),
    ];
    for (what, live, reason) in lives {
        let mut rig = Recycling::new();
        let slot = live(&mut rig);
        rig.close(slot);
        // A flood is found behind the grace period.
        rig.until(|ring| reason(&ring.snapshot().closed_instead) > 0 && ring.recycler.len() == 0);
        assert_eq!(reason(&rig.ring.snapshot().closed_instead), 1, "{what}");
        assert_eq!(rig.table.in_use(), 0, "{what}");
    }
}

const TTL: SocketOption = SocketOption { level: libc::IPPROTO_IP, name: libc::IP_TTL, value: 9 };

#[test]
fn an_untainted_socket_is_the_next_owners() {
    type Life = fn(&mut Recycling, SlotIndex);
    let lives: [(SocketAddr, Life); 4] = [
        (EVERYWHERE, |_, _| {}),
        (LOOPBACK_6, |_, _| {}),
        (LOOPBACK, |rig, slot| {
            let peer = UdpSocket::bind(LOOPBACK).unwrap();
            rig.run(slot, connect_op(peer.local_addr().unwrap()));
            rig.run(slot, a_send());
        }),
        (LOOPBACK, |rig, slot| {
            let queue = Arc::new(ReceiveQueue::new(LIMITS, Account::of_sockets(1)));
            rig.ring.arm(slot, &queue);
            let peer = UdpSocket::bind(LOOPBACK).unwrap();
            peer.send_to(b"unread", (Ipv4Addr::LOCALHOST, rig.port(slot))).unwrap();
        }),
    ];
    for (addr, live) in lives {
        let mut rig = Recycling::new();
        let slot = rig.bound(addr);
        live(&mut rig, slot);
        rig.close(slot);
        rig.until(|ring| ring.recycler.has_ready());
        assert_eq!(rig.bound(addr), slot);
        assert_eq!(rig.ring.snapshot().sockets_recycled, 1, "{addr}");
    }
}

/// The kernel leaves the source address of a socket that was bound to one as it is, when it is
/// bound to all (and later disconnects), and over IPv6 when it is bound to a group.
#[test]
fn a_source_address_does_not_reach_an_owner_who_names_none() {
    let everywhere_6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
    let group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let group = SocketAddr::V6(SocketAddrV6::new(group, 0, 0, 1));
    for (before, now) in [(LOOPBACK, EVERYWHERE), (LOOPBACK_6, everywhere_6), (LOOPBACK_6, group)] {
        let mut rig = Recycling::with_a_ready_socket(before);
        rig.bound(now);
        assert_eq!(rig.ring.snapshot().sockets_recycled, 0, "{before}, {now}");
    }
    let mut rig = Recycling::with_a_ready_socket(everywhere_6);
    rig.bound(group);
    assert_eq!(rig.ring.snapshot().sockets_recycled, 1, "it has none");
}

/// Kills: a grace period that is taken for over when an earlier one is.
#[test]
fn what_is_closed_during_a_grace_period_waits_for_the_next() {
    let mut rig = Recycling::new();
    let first = rig.bound(LOOPBACK);
    rig.close(first);
    // The first one's goes on, if it is not over; it is given up, and the second one's begins.
    rig.ring.close_cached();
    let second = rig.bound(LOOPBACK);
    rig.close(second);
    rig.until(|ring| ring.recycler.has_ready());
    assert!(rig.ring.recycler.is_quiet());
}

/// Nothing takes such events any more. Kills: a thread that enters for them, and again.
#[test]
fn a_ring_that_is_closed_has_no_event_of_its_cache_to_look_after() {
    let mut rig = Recycling::new();
    let slot = rig.bound(LOOPBACK);
    rig.close(slot);
    enter(&mut rig.ring);
    let deadline = Instant::now() + Duration::from_secs(30);
    while !rig.ring.has_event() {
        assert!(Instant::now() < deadline, "no grace period ends");
        std::thread::sleep(Duration::from_millis(1));
    }
    rig.ring.begin_shutdown();
    assert!(!rig.ring.has_event() && !rig.ring.has_cached_work());
}
