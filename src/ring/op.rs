//! The operations that sockets need. What one is stands in two places, side by side: [`Op::write`],
//! the entries that the kernel gets, and [`Op::complete`], what their completions come to. Beside
//! them, and as exhaustive: how many completions it has, and how it taints its socket. A new one is
//! added here, and where a socket submits it.
//!
//! Who may touch an operation's memory: before its entries are queued it moves into the operation
//! table; from then on it is the kernel's, at the addresses that the entries name, until the last
//! completion. `complete` runs after that, when it is ours again.

use std::cell::Cell;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use io_uring::opcode;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::Fixed;

use super::buffers::BUFFER_GROUP;
use super::port_order::Port;
use super::queues::{OpKey, SlotIndex};
use super::receive_queue::ReceiveQueue;
use super::recycle::taint::{Reason, Taint};
use super::send::{SegmentLimit, SendOp};
use crate::datagram::{Family, Outgoing, RawAddr, decode_addr};
use crate::error::Errno;
use crate::limits::{CACHED_BYTES_MAX, NAME_BYTES};
use crate::stats::Stats;

/// Every flag that entries here have.
pub(crate) const ENTRY_FLAGS: Flags =
    Flags::FIXED_FILE.union(Flags::IO_LINK).union(Flags::BUFFER_SELECT).union(Flags::SKIP_SUCCESS);

/// An operation and its memory.
pub(crate) enum Op {
    Bind(Box<BindOp>),
    Connect(Box<RawAddr>),
    SetOption(Box<SocketOption>),
    Send(SendOp),
    /// One datagram, if there is send buffer for it: completes when it is submitted.
    SendNow(Box<Outgoing>),
    /// Waits until there is send buffer, or an error.
    AwaitWritable,
    /// Multishot: completes once for each message, into this queue.
    Receive(Arc<ReceiveQueue>),
    /// The same without waiting: ends when nothing is left in the socket, at the latest.
    ReceiveNow(Arc<ReceiveQueue>),
    /// `FIXED_FD_INSTALL`: makes a file descriptor of the direct one.
    Install,
    /// Asks for an address of the socket (from Linux 6.19 on).
    QueryName(Box<SocketName>),
    /// Counts what the kernel has dropped because the socket's receive buffer was full.
    CountDrops(Box<SocketMemory>),
    /// CONNECT with `AF_UNSPEC`, which dissolves the association and gives up a port that bind(2)
    /// chose.
    Unbind,
    /// Receives and drops one thing that waits in the socket, a datagram or an error; and how much
    /// memory the socket still holds, if it had datagrams on their way out or some were left in it.
    Drain(Option<Box<SocketMemory>>),
    Close,
}

/// SOCKET, the options recorded so far and BIND: a socket's creation as one chain. BIND alone where
/// the slot holds the socket.
pub(crate) struct BindOp {
    pub(crate) family: Family,
    pub(crate) options: Vec<SocketOption>,
    pub(crate) addr: SocketAddr,
    /// The same, as the kernel reads it.
    raw: RawAddr,
    pub(crate) attempt: Attempt,
    /// Closes were on their way when it was queued, any of which may have held its port.
    pub(crate) is_behind_closes: bool,
    /// Entries queued up to and with its last.
    pub(crate) queued: u64,
}

/// Which attempt at a bind is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attempt {
    /// With a recycled socket.
    Recycled,
    /// With a new one.
    New,
    /// With the same again, after the closes that may have held its port.
    AfterCloses,
}

#[derive(Clone, Copy)]
pub(crate) struct SocketOption {
    pub(crate) level: libc::c_int,
    pub(crate) name: libc::c_int,
    pub(crate) value: libc::c_int,
}

/// What an operation has brought its caller.
#[derive(Debug)]
pub(crate) enum Output {
    Done,
    Sent(Sent),
    /// The socket's send buffer is full.
    Unsent(Box<Outgoing>),
    /// The caller closes it by dropping it.
    Descriptor(OwnedFd),
    Address(SocketAddr),
}

/// What a send has come to, of whose datagrams the kernel took at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sent {
    pub(crate) datagrams: u64,
    /// Of their payloads.
    pub(crate) bytes: u64,
    /// Why the kernel refused the next one, or, if they were answered for, the first that it refused.
    pub(crate) error: Option<Errno>,
}

pub(crate) type OpResult = Result<Output, Errno>;

/// How the completions of an operation turned out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// Completions before the first failure.
    pub(crate) succeeded: u32,
    /// Sum of their results: bytes, for sends.
    pub(crate) sum: u64,
    /// Result of the last of them, e.g. an installed descriptor.
    pub(crate) value: u32,
    /// The first failure. Those that it cancelled are no failures of their own.
    pub(crate) error: Option<Errno>,
}

/// What the last completion of an operation's entries leads to.
pub(crate) enum Completed {
    Ended(OpResult),
    /// The rest of it is to be written and queued once more.
    Retry,
    /// As `Retry`, after the closes that may hold this port.
    RetryAfterCloses(Port),
}

/// What an operation's end changes: the counters, and what the ring remembers of the socket.
pub(crate) struct Record<'a> {
    pub(crate) stats: &'a mut Stats,
    pub(crate) taint: &'a mut Taint,
    pub(crate) segment_limit: &'a mut SegmentLimit,
    /// A guest still owns the socket.
    pub(crate) is_owned: bool,
    /// Sockets are being closed, which gives up their ports.
    pub(crate) is_closing: bool,
    /// The ring is being dropped, or the guest is gone: nothing is tried again.
    pub(crate) is_ending: bool,
}

impl Op {
    /// Completions that the operation ends after. Of a bind chain the kernel posts exactly one: all
    /// entries but the last skip theirs on success, and a failing one hides those of the entries it
    /// cancels (`a_failing_socket_operation_completes_its_bind_once`).
    pub(crate) fn completions(&self) -> u32 {
        match self {
            Self::Send(send) => u32::try_from(send.messages()).unwrap_or(u32::MAX),
            Self::Drain(Some(_)) => 2,
            Self::Drain(None)
            | Self::Unbind
            | Self::SendNow(_)
            | Self::AwaitWritable
            | Self::Bind(_)
            | Self::Connect(_)
            | Self::SetOption(_)
            | Self::Receive(_)
            | Self::ReceiveNow(_)
            | Self::Install
            | Self::QueryName(_)
            | Self::CountDrops(_)
            | Self::Close => 1,
        }
    }

    /// Whether it is a send that may wait for send buffer.
    pub(crate) fn is_send(&self) -> bool {
        matches!(self, Self::Send(_))
    }

    /// Notes what the operation will leave in its socket, whatever comes of it.
    pub(crate) fn mark(&self, taint: &mut Taint) {
        match self {
            Self::Bind(bind) => bind.mark(taint),
            Self::Send(_) | Self::SendNow(_) => taint.send(),
            Self::Connect(_) => taint.connect(),
            Self::SetOption(_) => taint.mark(Reason::Options),
            Self::AwaitWritable
            | Self::Receive(_)
            | Self::ReceiveNow(_)
            | Self::Install
            | Self::QueryName(_)
            | Self::CountDrops(_)
            | Self::Unbind
            | Self::Drain(_)
            | Self::Close => {}
        }
    }

    /// Writes the operation's entries. They point into `self`'s heap memory and to `receive_header`,
    /// which the caller keeps until the last completion.
    pub(crate) fn write(
        &self,
        slot: SlotIndex,
        user_data: u64,
        receive_header: *const libc::msghdr,
        entries: &mut Vec<Entry>,
    ) {
        let fd = slot.fd();
        match self {
            Self::Bind(bind) => bind.write(slot, entries),
            Self::Connect(addr) => {
                entries.push(opcode::Connect::new(fd, addr.as_ptr(), addr.len()).build());
            }
            Self::SetOption(option) => entries.push(option.entry(fd)),
            Self::Send(send) => send.write(fd, entries),
            Self::SendNow(datagram) => entries.push(datagram.entry(fd, libc::MSG_DONTWAIT)),
            Self::AwaitWritable => {
                let events = u32::from(libc::POLLOUT.cast_unsigned());
                entries.push(opcode::PollAdd::new(fd, events).build());
            }
            Self::Receive(_) => {
                entries.push(opcode::RecvMsgMulti::new(fd, receive_header, BUFFER_GROUP).build());
            }
            Self::ReceiveNow(_) => {
                let receive = opcode::RecvMsgMulti::new(fd, receive_header, BUFFER_GROUP);
                entries.push(receive.flags(libc::MSG_DONTWAIT.cast_unsigned()).build());
            }
            Self::Install => entries.push(opcode::FixedFdInstall::new(fd, 0).build()),
            Self::QueryName(name) => entries.push(name.entry(fd)),
            Self::CountDrops(memory) => entries.push(memory.entry(fd)),
            Self::Unbind => {
                entries.push(opcode::Connect::new(fd, UNSPEC.as_ptr(), UNSPEC.len()).build());
            }
            Self::Drain(memory) => {
                // Without room for a payload, which the kernel drops.
                let receive = opcode::Recv::new(fd, std::ptr::null_mut(), 0);
                entries.push(receive.flags(libc::MSG_DONTWAIT | libc::MSG_TRUNC).build());
                entries.extend(memory.iter().map(|memory| memory.entry(fd)));
            }
            Self::Close => entries.push(opcode::Close::new(fd).build()),
        }
        for entry in entries {
            entry.set_user_data(user_data);
        }
    }

    /// What the completions of all entries come to. The kernel has let go of the operation's memory.
    /// (Those of a multishot receive are `receive`'s.)
    pub(crate) fn complete(&mut self, outcome: Outcome, record: &mut Record<'_>) -> Completed {
        let Outcome { error, .. } = outcome;
        let result = error.map_or(Ok(Output::Done), Err);
        match self {
            Self::Bind(bind) => {
                if let Some(again) = bind.complete(error, record) {
                    return again;
                }
            }
            Self::Send(send) => {
                let attempt = send.settle(outcome.succeeded as usize, error);
                if let Some(segment_max) = attempt.segment_max {
                    record.segment_limit.set(segment_max);
                    record.stats.gso_refusals += 1;
                }
                if attempt.again && !record.is_ending {
                    send.plan(record.segment_limit.of_next_send());
                    return Completed::Retry;
                }
                record.stats.datagrams_sent += send.sent();
                record.stats.datagrams_coalesced += send.coalesced();
                record.stats.bytes_sent += outcome.sum;
                send.count_if_charged(outcome.sum);
                // (One that is not tried again because its guest is gone has been refused as well.)
                let error = send.refusal().or(error);
                if error.is_some() {
                    record.taint.mark(Reason::Error);
                }
                return Completed::Ended(match (send.sent(), error) {
                    (0, Some(errno)) => Err(errno),
                    (datagrams, error) => {
                        Ok(Output::Sent(Sent { datagrams, bytes: outcome.sum, error }))
                    }
                });
            }
            Self::SendNow(datagram) => match error {
                None => {
                    record.stats.datagrams_sent += 1;
                    record.stats.bytes_sent += outcome.sum;
                }
                Some(Errno(libc::EAGAIN)) => {
                    let unsent = Box::new(Outgoing { payload: Vec::new(), to: None });
                    let unsent = std::mem::replace(datagram, unsent);
                    return Completed::Ended(Ok(Output::Unsent(unsent)));
                }
                Some(_) => {}
            },
            // Also after an error, or the exit of its thread: the next attempt to send shows.
            Self::AwaitWritable => return Completed::Ended(Ok(Output::Done)),
            Self::Install if error.is_none() => {
                return Completed::Ended(Ok(Output::Descriptor(descriptor(outcome.value))));
            }
            Self::QueryName(name) if error.is_none() => {
                return Completed::Ended(
                    name.addr().map(Output::Address).ok_or(Errno(libc::EINVAL)),
                );
            }
            Self::CountDrops(memory) if error.is_none() => {
                record.stats.dropped_by_kernel += u64::from(memory.drops());
            }
            Self::Drain(memory) => {
                if let Some(memory) = memory {
                    let is_measured = matches!(error, None | Some(Errno(libc::EAGAIN)));
                    if is_measured && memory.unread() > CACHED_BYTES_MAX {
                        record.taint.mark(Reason::Unread);
                    }
                    if memory.is_all_sent() {
                        record.taint.sent_all();
                    }
                }
                // EAGAIN ends a drain, and an error that was pending is drained like a datagram.
                return Completed::Ended(result);
            }
            Self::Connect(_)
            | Self::SetOption(_)
            | Self::Receive(_)
            | Self::ReceiveNow(_)
            | Self::Install
            | Self::QueryName(_)
            | Self::CountDrops(_)
            | Self::Unbind
            | Self::Close => {}
        }
        if error.is_some() {
            record.taint.mark(Reason::Error);
        }
        Completed::Ended(result)
    }
}

/// The entry that ends an operation, a receive or a send of one message. Only its failure completes.
/// It names the operation and never the slot: a cancel by file scans every armed receive of the ring
/// (80 times as expensive at 10,000).
pub(super) fn cancel(key: OpKey) -> Entry {
    let cancel = opcode::AsyncCancel::new(key.user_data()).build();
    cancel.flags(Flags::SKIP_SUCCESS).user_data(key.cancel_user_data())
}

/// The entry that makes a socket in a slot.
pub(super) fn socket(family: Family, slot: SlotIndex) -> Entry {
    // SOCK_CLOEXEC is EINVAL for a direct descriptor, and SOCK_NONBLOCK would answer EAGAIN where an
    // armed receive should wait.
    opcode::Socket::new(family.domain(), libc::SOCK_DGRAM, 0)
        .file_index(Some(slot.destination()))
        .build()
}

/// A descriptor that `FIXED_FD_INSTALL` has made. A caller that does not want it drops it
/// (`dropped_calls_leave_no_descriptors_behind`).
#[expect(unsafe_code, reason = "a descriptor number becomes an owner")]
pub(super) fn descriptor(value: u32) -> OwnedFd {
    let fd: RawFd = value.cast_signed();
    // SAFETY: the kernel has just made this descriptor for this operation, and `complete` runs once
    // for its last completion, so there is no second owner.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// The address of no peer. Static, so it outlives every operation.
static UNSPEC: RawAddr = RawAddr::unspec();

impl BindOp {
    pub(crate) fn new(family: Family, options: Vec<SocketOption>, addr: SocketAddr) -> Self {
        let raw = addr.into();
        let attempt = Attempt::New;
        Self { family, options, addr, raw, attempt, is_behind_closes: false, queued: 0 }
    }

    pub(crate) fn port(&self) -> Port {
        Port { family: self.family, number: NonZeroU16::new(self.addr.port()) }
    }

    fn names_port(&self) -> bool {
        self.addr.port() != 0
    }

    /// Whether it is to one address and not to all.
    fn is_addressed(&self) -> bool {
        !self.addr.ip().is_unspecified()
    }

    /// Whether the kernel sets the socket's source address by it. Bound to all addresses or to a
    /// group, a socket keeps the one it has.
    fn sets_source(&self) -> bool {
        self.is_addressed() && !self.addr.ip().is_multicast()
    }

    /// Whether it sets options that not every socket of its family has.
    fn sets_options(&self) -> bool {
        self.options.iter().any(|option| !option.is_v6only())
    }

    /// `Some` if a recycled socket may serve it: whether it sets that one's source address.
    pub(crate) fn recyclable(&self) -> Option<bool> {
        (!self.names_port() && !self.sets_options()).then(|| self.sets_source())
    }

    fn mark(&self, taint: &mut Taint) {
        taint.bind(self.is_addressed());
        if self.names_port() {
            taint.mark(Reason::NamedPort);
        }
        if self.sets_options() {
            taint.mark(Reason::Options);
        }
    }

    /// `Some` if the kernel's answer is not the guest's yet.
    fn complete(&mut self, error: Option<Errno>, record: &mut Record<'_>) -> Option<Completed> {
        let is_recycled = self.attempt == Attempt::Recycled;
        let Some(error) = error else {
            record.stats.sockets_recycled += u64::from(is_recycled);
            return None;
        };
        if !record.is_owned || record.is_ending {
            return None;
        }
        if is_recycled {
            // The error must not be the former owner's: a new socket in the same slot decides.
            record.stats.closed_instead.error += 1;
            self.attempt = Attempt::New;
            *record.taint = Taint::new(self.family);
            self.mark(record.taint);
            return Some(Completed::Retry);
        }
        let may_be_freed = self.is_behind_closes || record.is_closing;
        if error == Errno(libc::EADDRINUSE) && self.attempt == Attempt::New && may_be_freed {
            self.attempt = Attempt::AfterCloses;
            return Some(Completed::RetryAfterCloses(self.port()));
        }
        None
    }

    fn write(&self, slot: SlotIndex, entries: &mut Vec<Entry>) {
        let fd = slot.fd();
        if self.attempt == Attempt::New {
            let socket = socket(self.family, slot);
            entries.push(socket.flags(Flags::IO_LINK | Flags::SKIP_SUCCESS));
            for option in &self.options {
                entries.push(option.entry(fd).flags(Flags::IO_LINK | Flags::SKIP_SUCCESS));
            }
        }
        entries.push(opcode::Bind::new(fd, self.raw.as_ptr(), self.raw.len()).build());
    }
}

impl SocketOption {
    /// Set on every IPv6 socket: WASI sockets are never dual-stack.
    pub(crate) const V6ONLY: Self =
        Self { level: libc::IPPROTO_IPV6, name: libc::IPV6_V6ONLY, value: 1 };

    /// GRO on: equal datagrams of one sender come in one message (udp(7)).
    pub(crate) const GRO: Self = Self { level: libc::SOL_UDP, name: libc::UDP_GRO, value: 1 };

    pub(crate) fn is_v6only(&self) -> bool {
        (self.level, self.name) == (Self::V6ONLY.level, Self::V6ONLY.name)
    }

    fn entry(&self, fd: Fixed) -> Entry {
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

/// What `SO_MEMINFO` (socket(7)) answers: an array that the kernel writes.
pub(crate) struct SocketMemory(Cell<[u32; 9]>);

/// `SO_MEMINFO`, which libc does not have (asm-generic/socket.h).
const SO_MEMINFO: libc::c_int = 55;

impl SocketMemory {
    /// Until the kernel has written it: the worst.
    pub(crate) fn unknown() -> Self {
        Self(Cell::new([u32::MAX; 9]))
    }

    fn drops(&self) -> u32 {
        let [.., drops] = self.0.get();
        drops
    }

    /// Bytes of kernel memory taken by what waits to be received (`SK_MEMINFO_RMEM_ALLOC` in
    /// `linux/sock_diag.h`).
    fn unread(&self) -> u32 {
        let [unread, ..] = self.0.get();
        unread
    }

    /// Whether the kernel is through with all that was sent (`SK_MEMINFO_WMEM_ALLOC`).
    fn is_all_sent(&self) -> bool {
        let [_, _, sending, ..] = self.0.get();
        sending == 0
    }

    fn entry(&self, fd: Fixed) -> Entry {
        let set = opcode::SetSockOpt::new(
            fd,
            libc::SOL_SOCKET.cast_unsigned(),
            SO_MEMINFO.cast_unsigned(),
            self.0.as_ptr().cast_const().cast(),
            u32::try_from(size_of_val(&self.0)).expect("36"),
        );
        Command::GetSockOpt.entry(set)
    }
}

/// Which of a socket's addresses is asked for; the numbers are the kernel's.
#[derive(Clone, Copy)]
pub(crate) enum Whose {
    /// As getsockname(2).
    Own = 0,
    /// As getpeername(2).
    Peers = 1,
}

/// What `SOCKET_URING_OP_GETSOCKNAME` answers: an address that the kernel writes, and its length.
pub(crate) struct SocketName {
    whose: Whose,
    addr: Cell<[u8; NAME_BYTES]>,
    len: Cell<libc::c_int>,
}

impl SocketName {
    pub(crate) fn new(whose: Whose) -> Self {
        let len = libc::c_int::try_from(NAME_BYTES).expect("28");
        Self { whose, addr: Cell::new([0; NAME_BYTES]), len: Cell::new(len) }
    }

    pub(super) fn addr(&self) -> Option<SocketAddr> {
        let len = usize::try_from(self.len.get()).ok()?;
        decode_addr(self.addr.get().get(..len)?)
    }

    /// The address's pointer takes the place of level and name, the length's that of the value.
    fn entry(&self, fd: Fixed) -> Entry {
        let bytes = self.addr.as_ptr().expose_provenance().to_ne_bytes();
        let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|byte| bytes[at + byte]));
        let set = opcode::SetSockOpt::new(
            fd,
            word(0),
            word(4),
            self.len.as_ptr().cast_const().cast(),
            self.whose as u32,
        );
        Command::GetSockName.entry(set)
    }
}

/// Commands of a socket beside SETSOCKOPT (`linux/io_uring.h`), which io-uring has no builders for.
#[derive(Clone, Copy)]
enum Command {
    GetSockOpt = 2,
    GetSockName = 5,
}

impl Command {
    /// Where an entry names its command, in words.
    const AT: usize = 2;

    /// SETSOCKOPT with another command.
    #[expect(unsafe_code, reason = "an entry as the words it consists of")]
    fn entry(self, set: opcode::SetSockOpt) -> Entry {
        // SAFETY: an entry is 64 bytes of plain integers (`struct io_uring_sqe`), and so are 16
        // words. (`what_the_kernel_drops_is_counted_when_the_socket_closes` reads what this asks
        // for.)
        let mut words: [u32; 16] = unsafe { std::mem::transmute(set.build()) };
        words[Self::AT] = self as u32;
        // SAFETY: as above, the other way round.
        unsafe { std::mem::transmute(words) }
    }
}
