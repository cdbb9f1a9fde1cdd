//! The operations sockets need, with the memory the kernel reads while they run, and the one
//! switch that writes submission queue entries.

use std::cell::Cell;
use std::net::SocketAddr;
use std::sync::Arc;

use io_uring::squeue::{Entry, Flags};
use io_uring::{opcode, types};

use super::inbox::Inbox;
use super::send::SendOp;
use super::slots::SlotIndex;
use crate::datagram::{Family, RawAddr};

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
    /// CONNECT with `AF_UNSPEC`: dissolves the association and gives up a port that bind(2) chose;
    /// and what the socket then still holds.
    Unbind(Box<SocketMemory>),
    /// Takes and drops one thing that waits to be received, a datagram or an error; and once more
    /// what the socket holds, if it had datagrams on their way out.
    Drain(Option<Box<SocketMemory>>),
    Close,
}

/// SOCKET, the options recorded so far and BIND: the whole birth of a socket in one chain. For a
/// recycled socket BIND alone.
pub(crate) struct BindOp {
    pub(crate) family: Family,
    pub(crate) options: Vec<SocketOption>,
    pub(crate) addr: SocketAddr,
    /// As the kernel reads it.
    raw: RawAddr,
    /// The slot holds a recycled socket.
    pub(crate) is_recycled: bool,
}

impl BindOp {
    pub(crate) fn new(family: Family, options: Vec<SocketOption>, addr: SocketAddr) -> Self {
        Self { family, options, addr, raw: addr.into(), is_recycled: false }
    }

    /// Whether it is to one address and not to all.
    pub(crate) fn is_addressed(&self) -> bool {
        !self.addr.ip().is_unspecified()
    }

    /// Whether the kernel sets the socket's source address by it. Bound to all addresses or to a
    /// group, a socket keeps the one it has.
    pub(crate) fn sets_source(&self) -> bool {
        self.is_addressed() && !self.addr.ip().is_multicast()
    }

    /// Whether it sets more than what every socket of its family is told.
    pub(crate) fn sets_options(&self) -> bool {
        self.options.iter().any(|option| !option.is_v6only())
    }
}

#[derive(Clone, Copy)]
pub(crate) struct SocketOption {
    pub(crate) level: libc::c_int,
    pub(crate) name: libc::c_int,
    pub(crate) value: libc::c_int,
}

impl Op {
    /// Completions the operation ends after. Of a bind chain exactly one is seen: all entries but
    /// the last skip theirs on success, and a failing one hides those of the entries it cancels
    /// (`a_failing_socket_operation_completes_its_bind_once`).
    pub(crate) fn completions(&self) -> u32 {
        match self {
            Self::Send(send) => u32::try_from(send.messages()).unwrap_or(u32::MAX),
            Self::Unbind(_) | Self::Drain(Some(_)) => 2,
            Self::Drain(None)
            | Self::Bind(_)
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
            Self::Bind(bind) if bind.is_recycled => entries.push(bind.entry(fd)),
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
                entries.push(bind.entry(fd));
            }
            Self::Connect(addr) => {
                entries.push(opcode::Connect::new(fd, addr.as_ptr(), addr.len()).build());
            }
            Self::SetOption(option) => entries.push(option.entry(fd)),
            Self::Send(send) => send.write(fd, entries),
            Self::Receive(_) => {
                entries.push(opcode::RecvMsgMulti::new(fd, receive_header, BUFFER_GROUP).build());
            }
            Self::Install => entries.push(opcode::FixedFdInstall::new(fd, 0).build()),
            Self::CountDrops(memory) => entries.push(memory.entry(fd)),
            Self::Unbind(memory) => {
                entries.push(opcode::Connect::new(fd, UNSPEC.as_ptr(), UNSPEC.len()).build());
                entries.push(memory.entry(fd));
            }
            Self::Drain(memory) => {
                // Without room for a payload, which is dropped.
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
}

/// Nobody's address, as long-lived as the kernel may want it.
static UNSPEC: RawAddr = RawAddr::unspec();

impl BindOp {
    fn entry(&self, fd: types::Fixed) -> Entry {
        opcode::Bind::new(fd, self.raw.as_ptr(), self.raw.len()).build()
    }
}

impl SocketOption {
    /// What every IPv6 socket is told: WASI sockets are never dual-stack.
    pub(crate) const V6ONLY: Self =
        Self { level: libc::IPPROTO_IPV6, name: libc::IPV6_V6ONLY, value: 1 };

    pub(crate) fn is_v6only(&self) -> bool {
        (self.level, self.name) == (Self::V6ONLY.level, Self::V6ONLY.name)
    }

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
pub(crate) struct SocketMemory(Cell<[u32; 9]>);

/// `SO_MEMINFO`, which libc does not have (asm-generic/socket.h).
const SO_MEMINFO: libc::c_int = 55;

/// `SOCKET_URING_OP_GETSOCKOPT`.
const GETSOCKOPT: u32 = 2;

impl SocketMemory {
    /// To be asked. Says the worst until it is answered.
    pub(crate) fn unknown() -> Self {
        Self(Cell::new([u32::MAX; 9]))
    }

    pub(crate) fn drops(&self) -> u32 {
        let [.., drops] = self.0.get();
        drops
    }

    /// Bytes of kernel memory that what waits to be received takes (`SK_MEMINFO_RMEM_ALLOC` in
    /// `linux/sock_diag.h`).
    pub(crate) fn unread(&self) -> u32 {
        let [unread, ..] = self.0.get();
        unread
    }

    /// Whether the kernel is through with all that was sent (`SK_MEMINFO_WMEM_ALLOC`).
    pub(crate) fn is_all_sent(&self) -> bool {
        let [_, _, sending, ..] = self.0.get();
        sending == 0
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

/// Marks the `user_data` of a cancel: the top bit of a table index, which is never that large.
const CANCEL: u64 = 1 << 31;

/// Ends the receive, or the send of one message, with this `user_data`. Named by it and never by
/// slot: a cancel by file scans every armed receive of the ring (80 times as dear at 10,000).
pub(crate) fn cancel(target: u64) -> Entry {
    opcode::AsyncCancel::new(target).build().flags(Flags::SKIP_SUCCESS).user_data(target | CANCEL)
}

/// What a cancel was meant for, if this `user_data` is a cancel's.
pub(crate) fn cancelled_by(user_data: u64) -> Option<u64> {
    (user_data & CANCEL != 0).then_some(user_data & !CANCEL)
}
