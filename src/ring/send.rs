//! A guest's `send`: which datagrams become one message (GSO), and what is tried again.

use std::sync::Arc;

use io_uring::opcode;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::Fixed;
use smallvec::SmallVec;

use crate::datagram::{GsoMessage, Outgoing, front_run};
use crate::error::Errno;
use crate::limits::{
    BATCH_DATAGRAMS_MAX, DEFERRED_BYTES_MAX, DEFERRED_DATAGRAMS_MAX, GSO_REFUSAL_SENDS,
    SEND_ATTEMPTS_MAX,
};
use crate::ring::account::{Account, Charge};

/// Datagrams that a guest sends with one call, or with several that were answered for: in order, as one
/// linked chain of messages.
pub(crate) struct SendOp {
    datagrams: Vec<Outgoing>,
    /// Payload bytes of all.
    bytes: usize,
    /// Datagrams from the front that the kernel has taken or, if they were answered for, refused.
    over: usize,
    /// Those of them that it has refused, and why the first.
    refused: usize,
    refusal: Option<Errno>,
    /// Those of them that were coalesced.
    coalesced: usize,
    /// The guest was told that they are sent: one that the kernel refuses does not keep back the others.
    is_answered: bool,
    /// This attempt's messages, of the datagrams behind those that are over.
    messages: SmallVec<[Message; 1]>,
    /// The kernel refused the last attempt's coalesced message. If this attempt, with datagrams of
    /// more than so many bytes apart, goes better, coalescing was the reason.
    suspected: Option<usize>,
    attempts: u32,
    /// What it takes of its guest's quota, once it waits for send buffer.
    charge: Option<Charge>,
}

/// A message of a `send`: one datagram, or several that the kernel takes apart.
struct Message {
    datagrams: usize,
    gso: Option<Box<GsoMessage>>,
}

/// What an attempt to send has come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Attempt {
    /// The rest is to be planned and submitted once more.
    pub(crate) again: bool,
    /// Learned from it: the largest datagram, in bytes, that may be coalesced.
    pub(crate) segment_max: Option<usize>,
}

/// The largest datagram of a socket that may be coalesced, in bytes, as the kernel's refusals have
/// shown, and for how many sends that is still assumed: the refusal was one path's, and the guest
/// may send over another later.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SegmentLimit(Option<(u16, u16)>);

impl SegmentLimit {
    /// Spends one of the sends.
    pub(crate) fn of_next_send(&mut self) -> usize {
        let Some((max, sends)) = &mut self.0 else { return usize::MAX };
        let max = usize::from(*max);
        *sends -= 1;
        if *sends == 0 {
            self.0 = None;
        }
        max
    }

    pub(crate) fn set(&mut self, segment_max: usize) {
        self.0 = Some((u16::try_from(segment_max).unwrap_or(u16::MAX), GSO_REFUSAL_SENDS));
    }
}

impl SendOp {
    pub(crate) fn new(datagrams: Vec<Outgoing>) -> Self {
        let bytes = datagrams.iter().map(|datagram| datagram.payload.len()).sum();
        Self {
            datagrams,
            bytes,
            over: 0,
            refused: 0,
            refusal: None,
            coalesced: 0,
            is_answered: false,
            messages: SmallVec::new(),
            suspected: None,
            attempts: 0,
            charge: None,
        }
    }

    /// One that its guest does not wait for, with room for what that sends next.
    pub(crate) fn answered(account: &Arc<Account>) -> Self {
        let mut send = Self::new(Vec::with_capacity(BATCH_DATAGRAMS_MAX));
        send.is_answered = true;
        send.charge(account);
        send
    }

    /// Adds a datagram, while no entry is queued.
    pub(crate) fn push(&mut self, datagram: Outgoing) {
        let bytes = datagram.payload.len();
        self.bytes += bytes;
        if let Some(charge) = &mut self.charge {
            charge.add(bytes);
        }
        self.datagrams.push(datagram);
    }

    /// Whether it is to be submitted although its guest goes on.
    pub(crate) fn is_full(&self) -> bool {
        self.datagrams.len() >= DEFERRED_DATAGRAMS_MAX || self.bytes >= DEFERRED_BYTES_MAX
    }

    /// It waits: from here on it counts.
    pub(crate) fn charge(&mut self, account: &Arc<Account>) {
        self.charge = Some(Charge::new(account, self.bytes));
    }

    /// Counts what the kernel has taken for the guest, if nobody else will.
    pub(crate) fn count_if_charged(&self, bytes: u64) {
        if let Some(charge) = &self.charge {
            charge.count_sent(self.sent(), bytes);
        }
    }

    /// Payload bytes in all.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn len(&self) -> usize {
        self.datagrams.len()
    }

    /// Makes messages of the datagrams that are not over. The kernel has completed the messages made
    /// before, so their memory is freed here. Datagrams of more than `segment_max` bytes are not
    /// coalesced.
    pub(crate) fn plan(&mut self, segment_max: usize) {
        self.messages.clear();
        let segment_max = self.suspected.unwrap_or(segment_max).min(segment_max);
        let mut rest = &self.datagrams[self.over..];
        while !rest.is_empty() {
            let (run, others) = rest.split_at(front_run(rest, segment_max));
            let gso = (run.len() > 1).then(|| GsoMessage::new(run));
            self.messages.push(Message { datagrams: run.len(), gso });
            rest = others;
        }
    }

    /// Records that the kernel took so many messages and refused the next with `error`, if any.
    pub(crate) fn settle(&mut self, messages: usize, error: Option<Errno>) -> Attempt {
        for message in self.messages.drain(..messages) {
            self.over += message.datagrams;
            self.coalesced += if message.gso.is_some() { message.datagrams } else { 0 };
        }
        let segment_max = if messages > 0 { self.suspected.take() } else { None };
        let refused = self.messages.first().filter(|message| message.gso.is_some());
        let segment = refused.and_then(|_| Some(self.datagrams.get(self.over)?.payload.len()));
        let again = match (error, segment) {
            // Beyond the path's MTU: the kernel fragments only what is not coalesced. Or the kernel
            // refuses whatever goes there, as the next attempt will show.
            (Some(Errno(libc::EMSGSIZE | libc::EINVAL)), Some(segment)) => {
                self.suspected = Some(segment - 1);
                true
            }
            // The device computes no checksums, or the socket has them off.
            (Some(Errno(libc::EIO)), Some(_)) => {
                self.suspected = Some(0);
                true
            }
            // The thread that submitted it has exited, and the kernel has cancelled its requests.
            (Some(Errno(libc::ECANCELED)), _) => true,
            _ => false,
        };
        self.attempts += 1;
        let again = again && self.attempts < SEND_ATTEMPTS_MAX;
        Attempt { again: again || error.is_some_and(|errno| self.skip(errno)), segment_max }
    }

    /// Leaves out the datagram that the kernel has refused; whether others follow that were answered for.
    fn skip(&mut self, errno: Errno) -> bool {
        self.refusal.get_or_insert(errno);
        let goes_on = self.is_answered && self.over + 1 < self.datagrams.len();
        if goes_on {
            self.over += 1;
            self.refused += 1;
            // As many for each datagram.
            self.attempts = 0;
        }
        goes_on
    }

    /// Why the kernel has refused the first datagram that it has refused.
    pub(crate) fn refusal(&self) -> Option<Errno> {
        self.refusal
    }

    /// Messages of this attempt.
    pub(super) fn messages(&self) -> usize {
        self.messages.len()
    }

    /// Writes this attempt's entries, linked: a failure stops those behind it, so the count of what
    /// was sent is exact.
    pub(super) fn write(&self, fd: Fixed, entries: &mut Vec<Entry>) {
        let mut rest = &self.datagrams[self.over..];
        for message in &self.messages {
            let entry = match (&message.gso, rest.first()) {
                (Some(gso), _) => opcode::SendMsg::new(fd, gso.as_ptr()).build(),
                (None, Some(alone)) => alone.entry(fd, 0),
                (None, None) => break,
            };
            rest = &rest[message.datagrams..];
            let link = if rest.is_empty() { Flags::empty() } else { Flags::IO_LINK };
            entries.push(entry.flags(link));
        }
    }

    /// Datagrams the kernel has taken.
    pub(crate) fn sent(&self) -> u64 {
        (self.over - self.refused) as u64
    }

    /// Those of them that were coalesced.
    pub(crate) fn coalesced(&self) -> u64 {
        self.coalesced as u64
    }
}

impl Outgoing {
    /// The entry that sends it, with flags of send(2).
    pub(super) fn entry(&self, fd: Fixed, flags: libc::c_int) -> Entry {
        let bytes = u32::try_from(self.payload.len()).expect("checked against PAYLOAD_BYTES_MAX");
        let send = opcode::Send::new(fd, self.payload.as_ptr(), bytes).flags(flags);
        match &self.to {
            Some(addr) => send.dest_addr(addr.as_ptr()).dest_addr_len(addr.len()).build(),
            None => send.build(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn datagrams(sizes: &[usize]) -> Vec<Outgoing> {
        sizes.iter().map(|bytes| Outgoing { payload: vec![0; *bytes], to: None }).collect()
    }

    fn send(sizes: &[usize]) -> SendOp {
        let mut send = SendOp::new(datagrams(sizes));
        send.plan(usize::MAX);
        send
    }

    /// Datagrams per message of the current attempt.
    fn planned(send: &SendOp) -> Vec<usize> {
        send.messages.iter().map(|message| message.datagrams).collect()
    }

    const ENDED: Attempt = Attempt { again: false, segment_max: None };
    const AGAIN: Attempt = Attempt { again: true, segment_max: None };

    #[test]
    fn what_is_refused_coalesced_is_tried_apart_and_only_there() {
        for (errno, learned) in [
            (libc::EMSGSIZE, Some(99)),
            (libc::EINVAL, Some(99)),
            (libc::EIO, Some(0)),
            (libc::EPERM, None),
        ] {
            let mut coalesced = send(&[7, 100, 100, 50]);
            assert_eq!(planned(&coalesced), [1, 3]);
            let attempt = coalesced.settle(1, Some(Errno(errno)));
            assert_eq!(attempt, if learned.is_some() { AGAIN } else { ENDED }, "{errno}");
            assert_eq!((coalesced.sent(), coalesced.coalesced()), (1, 0));
            if learned.is_some() {
                coalesced.plan(usize::MAX);
                assert_eq!(planned(&coalesced), [1, 1, 1]);
                let ended = Attempt { again: false, segment_max: learned };
                assert_eq!(coalesced.settle(3, None), ended, "{errno}");
            }
            let mut alone = send(&[100, 100, 7, 200]);
            assert_eq!(planned(&alone), [3, 1]);
            assert_eq!(alone.settle(1, Some(Errno(errno))), ENDED, "{errno}");
            assert_eq!((alone.sent(), alone.coalesced()), (3, 3));
        }
    }

    #[test]
    fn nothing_is_learned_from_what_is_refused_apart_as_well() {
        let mut send = send(&[100; 3]);
        assert_eq!(send.settle(0, Some(Errno(libc::EINVAL))), AGAIN);
        send.plan(usize::MAX);
        assert_eq!(send.settle(0, Some(Errno(libc::EINVAL))), ENDED);
        assert_eq!(send.sent(), 0);
    }

    #[test]
    fn what_an_exiting_thread_has_cancelled_is_tried_again() {
        let mut send = send(&[9, 9, 0, 9]);
        assert_eq!(send.settle(1, Some(Errno(libc::ECANCELED))), AGAIN);
        send.plan(usize::MAX);
        assert_eq!(planned(&send), [1, 1], "without what was sent");
        assert_eq!(send.settle(2, None), ENDED);
        assert_eq!((send.sent(), send.coalesced()), (4, 2));
    }

    /// Kills: a refused datagram of several that were answered for, behind which the others are forgotten.
    #[test]
    fn of_what_was_answered_only_what_is_refused_is_not_sent() {
        let account = Account::of_sockets(1);
        let mut send = SendOp::answered(&account);
        for datagram in datagrams(&[100, 100, 100, 200, 300]) {
            send.push(datagram);
        }
        send.plan(usize::MAX);
        assert_eq!(planned(&send), [3, 1, 1]);
        // The error was pending, and is the message's: one datagram of it is what would have met it alone.
        assert_eq!(send.settle(0, Some(Errno(libc::ECONNREFUSED))), AGAIN);
        send.plan(usize::MAX);
        assert_eq!(planned(&send), [2, 1, 1]);
        assert_eq!(send.settle(1, Some(Errno(libc::EPERM))), AGAIN);
        send.plan(usize::MAX);
        assert_eq!(planned(&send), [1]);
        assert_eq!(send.settle(0, Some(Errno(libc::EPERM))), ENDED, "none is left");
        assert_eq!((send.sent(), send.refusal()), (2, Some(Errno(libc::ECONNREFUSED))));
        assert_eq!(account.sending.used(), 800);
        drop(send);
        assert_eq!(account.sending.used(), 0);
    }

    #[test]
    fn a_segment_limit_is_forgotten_after_so_many_sends() {
        let mut limit = SegmentLimit::default();
        assert_eq!(limit.of_next_send(), usize::MAX);
        limit.set(1200);
        for _ in 0..GSO_REFUSAL_SENDS {
            assert_eq!(limit.of_next_send(), 1200);
        }
        assert_eq!(limit.of_next_send(), usize::MAX);
    }

    proptest! {
        #![proptest_config(crate::regressions("tests/proptest-regressions/send.txt"))]

        /// The test plays the kernel, attempt by attempt: a path that takes datagrams of up to
        /// `path_max` bytes coalesced, datagrams that are refused whatever comes, and a thread
        /// that exits now and then.
        #[test]
        fn every_datagram_before_the_first_bad_one_is_sent_once(
            sizes in proptest::collection::vec(prop::sample::select(vec![0, 1, 9, 10, 11]), 1..17),
            path_max in 0..13_usize,
            refusal in prop::sample::select(vec![libc::EMSGSIZE, libc::EINVAL, libc::EIO]),
            bad in proptest::option::of(0..16_usize),
            exits in proptest::collection::vec(0..8_usize, 0..4),
        ) {
            let mut send = SendOp::new(datagrams(&sizes));
            let (mut segment_max, mut exits) = (usize::from(u16::MAX), exits.into_iter());
            let (mut taken, mut coalesced) = (0, 0);
            for attempt in 0.. {
                prop_assert!(attempt < 16, "each attempt settles something");
                send.plan(segment_max);
                let exit = exits.next();
                let (mut messages, mut error) = (0, None);
                for message in &send.messages {
                    let range = taken..taken + message.datagrams;
                    let is_coalesced = message.gso.is_some();
                    prop_assert_eq!(is_coalesced, message.datagrams > 1);
                    error = if exit == Some(messages) {
                        Some(Errno(libc::ECANCELED))
                    } else if is_coalesced && sizes[taken] > path_max {
                        Some(Errno(refusal))
                    } else if bad.is_some_and(|bad| range.contains(&bad)) {
                        // What is wrong with one is wrong with all that go where it goes.
                        Some(Errno(libc::EINVAL))
                    } else {
                        None
                    };
                    if error.is_some() {
                        break;
                    }
                    messages += 1;
                    taken = range.end;
                    coalesced += if is_coalesced { message.datagrams } else { 0 };
                }
                let attempt = send.settle(messages, error);
                if let Some(learned) = attempt.segment_max {
                    prop_assert!(learned < segment_max);
                    segment_max = learned;
                }
                if !attempt.again {
                    break;
                }
            }
            let good = bad.map_or(sizes.len(), |bad| bad.min(sizes.len()));
            prop_assert_eq!(taken, good);
            prop_assert_eq!((send.sent(), send.coalesced()), (good as u64, coalesced as u64));
        }
    }
}
