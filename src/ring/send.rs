//! A guest's `send`: which datagrams travel in one message, and what is tried again.

use io_uring::squeue::{Entry, Flags};
use io_uring::{opcode, types};

use crate::datagram::{GsoMessage, Outgoing, front_run};
use crate::error::Errno;
use crate::limits::SEND_ATTEMPTS_MAX;

/// One `send` of a guest: its datagrams in order, as one linked chain of messages.
pub(crate) struct SendOp {
    datagrams: Vec<Outgoing>,
    /// Datagrams from the front that the kernel has taken.
    sent: usize,
    /// Those of them that travelled in company.
    coalesced: usize,
    /// This attempt's messages, for the datagrams behind those sent.
    messages: Vec<Message>,
    /// The last attempt was refused in company. If this goes better, company was the reason, and
    /// so many bytes are the most for it.
    suspected: Option<usize>,
    attempts: u32,
    /// Its caller has given it up.
    is_cancelled: bool,
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
    /// Learned from it: no more than so many bytes a datagram may have to travel in company.
    pub(crate) segment_max: Option<usize>,
}

impl SendOp {
    pub(crate) fn new(datagrams: Vec<Outgoing>) -> Self {
        Self {
            datagrams,
            sent: 0,
            coalesced: 0,
            messages: Vec::new(),
            suspected: None,
            attempts: 0,
            is_cancelled: false,
        }
    }

    /// Payload bytes in all.
    pub(crate) fn bytes(&self) -> usize {
        self.datagrams.iter().map(|datagram| datagram.payload.len()).sum()
    }

    /// Makes messages of what is still to be sent; every completion of those made before has come,
    /// so the kernel has no use for their memory. Datagrams of more than `segment_max` bytes
    /// travel alone.
    pub(crate) fn plan(&mut self, segment_max: usize) {
        self.messages.clear();
        let segment_max = self.suspected.unwrap_or(segment_max).min(segment_max);
        let mut rest = &self.datagrams[self.sent..];
        while !rest.is_empty() {
            let (run, others) = rest.split_at(front_run(rest, segment_max));
            let gso = (run.len() > 1).then(|| GsoMessage::new(run));
            self.messages.push(Message { datagrams: run.len(), gso });
            rest = others;
        }
    }

    /// Books that the kernel took this many messages and refused the next with `error`, if any.
    pub(crate) fn settle(&mut self, messages: usize, error: Option<Errno>) -> Attempt {
        for message in self.messages.drain(..messages) {
            self.sent += message.datagrams;
            self.coalesced += if message.gso.is_some() { message.datagrams } else { 0 };
        }
        let segment_max = if messages > 0 { self.suspected.take() } else { None };
        let refused = self.messages.first().filter(|message| message.gso.is_some());
        let segment = refused.and_then(|_| Some(self.datagrams.get(self.sent)?.payload.len()));
        let again = match (error, segment) {
            // Beyond the path's MTU, where the kernel fragments only what travels alone. Or all
            // that goes there is refused, as the next attempt will show.
            (Some(Errno(libc::EMSGSIZE | libc::EINVAL)), Some(segment)) => {
                self.suspected = Some(segment - 1);
                true
            }
            // The device or the socket leaves checksums to us.
            (Some(Errno(libc::EIO)), Some(_)) => {
                self.suspected = Some(0);
                true
            }
            // The thread that submitted it has exited, and its requests with it.
            (Some(Errno(libc::ECANCELED)), _) => true,
            _ => false,
        };
        self.attempts += 1;
        let again = again && !self.is_cancelled && self.attempts < SEND_ATTEMPTS_MAX;
        Attempt { again, segment_max }
    }

    /// No attempt follows this one.
    pub(super) fn cancel(&mut self) {
        self.is_cancelled = true;
    }

    /// Messages of this attempt.
    pub(super) fn messages(&self) -> usize {
        self.messages.len()
    }

    /// Writes this attempt's entries, linked, so that a failure stops what follows it: a guest
    /// learns the exact count.
    pub(super) fn write(&self, fd: types::Fixed, entries: &mut Vec<Entry>) {
        let mut rest = &self.datagrams[self.sent..];
        for message in &self.messages {
            let entry = match (&message.gso, rest.first()) {
                (Some(gso), _) => opcode::SendMsg::new(fd, gso.as_ptr()).build(),
                (None, Some(alone)) => alone.entry(fd),
                (None, None) => break,
            };
            rest = &rest[message.datagrams..];
            let link = if rest.is_empty() { Flags::empty() } else { Flags::IO_LINK };
            entries.push(entry.flags(link));
        }
    }

    /// Datagrams the kernel has taken.
    pub(crate) fn sent(&self) -> u64 {
        self.sent as u64
    }

    /// Those of them that travelled in company.
    pub(crate) fn coalesced(&self) -> u64 {
        self.coalesced as u64
    }
}

impl Outgoing {
    fn entry(&self, fd: types::Fixed) -> Entry {
        let bytes = u32::try_from(self.payload.len()).expect("checked against PAYLOAD_BYTES_MAX");
        let send = opcode::Send::new(fd, self.payload.as_ptr(), bytes);
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
    fn what_is_refused_in_company_is_tried_apart_and_only_there() {
        for (errno, learned) in [
            (libc::EMSGSIZE, Some(99)),
            (libc::EINVAL, Some(99)),
            (libc::EIO, Some(0)),
            (libc::EPERM, None),
        ] {
            let mut in_company = send(&[7, 100, 100, 50]);
            assert_eq!(planned(&in_company), [1, 3]);
            let attempt = in_company.settle(1, Some(Errno(errno)));
            assert_eq!(attempt, if learned.is_some() { AGAIN } else { ENDED }, "{errno}");
            assert_eq!((in_company.sent(), in_company.coalesced()), (1, 0));
            if learned.is_some() {
                in_company.plan(usize::MAX);
                assert_eq!(planned(&in_company), [1, 1, 1]);
                let ended = Attempt { again: false, segment_max: learned };
                assert_eq!(in_company.settle(3, None), ended, "{errno}");
            }
            let mut alone = send(&[100, 100, 7, 200]);
            assert_eq!(planned(&alone), [3, 1]);
            assert_eq!(alone.settle(1, Some(Errno(errno))), ENDED, "{errno}");
            assert_eq!((alone.sent(), alone.coalesced()), (3, 3));
        }
    }

    #[test]
    fn nothing_is_learned_from_what_is_refused_alone_as_well() {
        let mut send = send(&[100; 3]);
        assert_eq!(send.settle(0, Some(Errno(libc::EINVAL))), AGAIN);
        send.plan(usize::MAX);
        assert_eq!(send.settle(0, Some(Errno(libc::EINVAL))), ENDED);
        assert_eq!(send.sent(), 0);
    }

    #[test]
    fn what_an_exiting_thread_takes_along_is_tried_again() {
        let mut send = send(&[9, 9, 0, 9]);
        assert_eq!(send.settle(1, Some(Errno(libc::ECANCELED))), AGAIN);
        send.plan(usize::MAX);
        assert_eq!(planned(&send), [1, 1], "without what was sent");
        assert_eq!(send.settle(2, None), ENDED);
        assert_eq!((send.sent(), send.coalesced()), (4, 2));
    }

    proptest! {
        /// The test plays the kernel, attempt by attempt: a path that takes datagrams of up to
        /// `path_max` bytes in company, datagrams that are refused whatever comes, and a thread
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
            let (mut taken, mut in_company) = (0, 0);
            for attempt in 0.. {
                prop_assert!(attempt < 16, "each attempt settles something");
                send.plan(segment_max);
                let exit = exits.next();
                let (mut messages, mut error) = (0, None);
                for message in &send.messages {
                    let range = taken..taken + message.datagrams;
                    let company = message.gso.is_some();
                    prop_assert_eq!(company, message.datagrams > 1);
                    error = if exit == Some(messages) {
                        Some(Errno(libc::ECANCELED))
                    } else if company && sizes[taken] > path_max {
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
                    in_company += if company { message.datagrams } else { 0 };
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
            prop_assert_eq!((send.sent(), send.coalesced()), (good as u64, in_company as u64));
        }
    }
}
