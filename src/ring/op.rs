//! The operations sockets need, with the memory the kernel reads while they run, and the one
//! switch that writes submission queue entries.

use std::cell::Cell;
use std::sync::Arc;

use io_uring::squeue::{Entry, Flags};
use io_uring::{opcode, types};

use super::inbox::Inbox;
use super::slots::SlotIndex;
use crate::datagram::{Family, GsoMessage, Outgoing, RawAddr, front_run};
use crate::error::Errno;
use crate::limits::SEND_ATTEMPTS_MAX;

/// The group that the ring's receive buffers are registered under.
pub(crate) const BUFFER_GROUP: u16 = 0;

/// An operation and its memory. It is stored in the operation table before its entries are
/// pushed and leaves it after its last completion, so the pointers in the entries stay good.
pub(crate) enum Op {
    Bind(Box<BindOp>),
    Connect(Box<RawAddr>),
    SetOption(Box<SocketOption>),
    Send(SendOp),
    Receive(Arc<Inbox>),
    /// `FIXED_FD_INSTALL`: its result is a file descriptor that somebody must close.
    Install,
    /// What the kernel has dropped for want of room in the socket's receive buffer.
    CountDrops(Box<SocketMemory>),
    Close,
}

/// SOCKET, the options recorded so far and BIND: the whole birth of a socket in one chain.
pub(crate) struct BindOp {
    pub(crate) family: Family,
    pub(crate) options: Vec<SocketOption>,
    pub(crate) addr: RawAddr,
}

#[derive(Clone, Copy)]
pub(crate) struct SocketOption {
    pub(crate) level: libc::c_int,
    pub(crate) name: libc::c_int,
    pub(crate) value: libc::c_int,
}

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
        Attempt { again: again && self.attempts < SEND_ATTEMPTS_MAX, segment_max }
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

impl Op {
    /// Completions the operation ends after. Of a bind chain exactly one is seen: all entries but
    /// the last skip theirs on success, and a failing one hides those of the entries it cancels
    /// (`a_failing_socket_operation_completes_its_bind_once`).
    pub(crate) fn completions(&self) -> u32 {
        match self {
            Self::Send(send) => u32::try_from(send.messages.len()).unwrap_or(u32::MAX),
            Self::Bind(_)
            | Self::Connect(_)
            | Self::SetOption(_)
            | Self::Receive(_)
            | Self::Install
            | Self::CountDrops(_)
            | Self::Close => 1,
        }
    }

    /// Writes the operation's entries. They point into `self`'s heap memory and into
    /// `receive_header`, which the caller keeps until the last completion.
    pub(crate) fn write(
        &self,
        slot: SlotIndex,
        user_data: u64,
        receive_header: *const libc::msghdr,
        entries: &mut Vec<Entry>,
    ) {
        let fd = types::Fixed(slot.0);
        match self {
            Self::Bind(bind) => {
                // SOCK_CLOEXEC is EINVAL for a direct descriptor, and SOCK_NONBLOCK would answer
                // EAGAIN where an armed receive should wait.
                let socket = opcode::Socket::new(bind.family.domain(), libc::SOCK_DGRAM, 0)
                    .file_index(Some(slot.destination()))
                    .build();
                entries.push(socket.flags(Flags::IO_LINK | Flags::SKIP_SUCCESS));
                for option in &bind.options {
                    entries.push(option.entry(fd).flags(Flags::IO_LINK | Flags::SKIP_SUCCESS));
                }
                entries.push(opcode::Bind::new(fd, bind.addr.as_ptr(), bind.addr.len()).build());
            }
            Self::Connect(addr) => {
                entries.push(opcode::Connect::new(fd, addr.as_ptr(), addr.len()).build());
            }
            Self::SetOption(option) => entries.push(option.entry(fd)),
            Self::Send(send) => {
                // Linked, so that a failure stops what follows it: a guest learns the exact count.
                let mut rest = &send.datagrams[send.sent..];
                for message in &send.messages {
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
            Self::Receive(_) => {
                entries.push(opcode::RecvMsgMulti::new(fd, receive_header, BUFFER_GROUP).build());
            }
            Self::Install => entries.push(opcode::FixedFdInstall::new(fd, 0).build()),
            Self::CountDrops(memory) => entries.push(memory.entry(fd)),
            Self::Close => entries.push(opcode::Close::new(fd).build()),
        }
        for entry in entries {
            entry.set_user_data(user_data);
        }
    }
}

impl SocketOption {
    fn entry(&self, fd: types::Fixed) -> Entry {
        opcode::SetSockOpt::new(
            fd,
            self.level.cast_unsigned(),
            self.name.cast_unsigned(),
            std::ptr::from_ref(&self.value).cast(),
            u32::try_from(size_of_val(&self.value)).expect("an int"),
        )
        .build()
    }
}

/// What `SO_MEMINFO` (socket(7)) tells: an array that the kernel writes.
#[derive(Default)]
pub(crate) struct SocketMemory(Cell<[u32; 9]>);

/// `SO_MEMINFO`, which libc does not have (asm-generic/socket.h).
const SO_MEMINFO: libc::c_int = 55;

/// `SOCKET_URING_OP_GETSOCKOPT`.
const GETSOCKOPT: u32 = 2;

impl SocketMemory {
    pub(crate) fn drops(&self) -> u32 {
        let [.., drops] = self.0.get();
        drops
    }

    /// GETSOCKOPT is SETSOCKOPT by another command, for which io-uring has no builder of its own.
    #[expect(unsafe_code, reason = "an entry as the words it consists of")]
    fn entry(&self, fd: types::Fixed) -> Entry {
        let set = opcode::SetSockOpt::new(
            fd,
            libc::SOL_SOCKET.cast_unsigned(),
            SO_MEMINFO.cast_unsigned(),
            self.0.as_ptr().cast_const().cast(),
            u32::try_from(size_of_val(&self.0)).expect("36"),
        );
        // SAFETY: an entry is 64 bytes of plain integers (`struct io_uring_sqe`).
        // (`what_the_kernel_drops_is_counted_when_the_socket_closes` reads what it asks for.)
        let mut words: [u32; 16] = unsafe { std::mem::transmute(set.build()) };
        words[CMD_OP] = GETSOCKOPT;
        // SAFETY: as above, the other way round.
        unsafe { std::mem::transmute(words) }
    }
}

/// Where an entry names its command, in words.
const CMD_OP: usize = 2;

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

/// Marks the `user_data` of a cancel: the top bit of a table index, which is never that large.
const CANCEL: u64 = 1 << 31;

/// Ends the receive with this `user_data`. Named by it and never by slot: a cancel by file scans
/// every armed receive of the ring (80 times as dear at 10,000).
pub(crate) fn cancel(receive: u64) -> Entry {
    opcode::AsyncCancel::new(receive).build().flags(Flags::SKIP_SUCCESS).user_data(receive | CANCEL)
}

/// The receive that a cancel was meant for, if this `user_data` is a cancel's.
pub(crate) fn cancelled_by(user_data: u64) -> Option<u64> {
    (user_data & CANCEL != 0).then_some(user_data & !CANCEL)
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
