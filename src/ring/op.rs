//! The operations sockets need, with the memory the kernel reads while they run, and the one
//! switch that writes submission queue entries.

use std::sync::Arc;

use io_uring::squeue::{Entry, Flags};
use io_uring::{opcode, types};

use super::inbox::Inbox;
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

/// One `send` of a guest: its datagrams in order, as one linked chain.
pub(crate) struct SendOp {
    pub(crate) datagrams: Vec<Outgoing>,
}

/// One datagram; without an address it goes to the peer of a connected socket.
pub(crate) struct Outgoing {
    pub(crate) payload: Vec<u8>,
    pub(crate) to: Option<RawAddr>,
}

impl Op {
    /// Completions the operation ends after. Of a bind chain exactly one is seen: all entries but
    /// the last skip theirs on success, and a failing one hides those of the entries it cancels
    /// (`a_failing_socket_operation_completes_its_bind_once`).
    pub(crate) fn completions(&self) -> u32 {
        match self {
            Self::Send(send) => u32::try_from(send.datagrams.len()).unwrap_or(u32::MAX),
            Self::Bind(_)
            | Self::Connect(_)
            | Self::SetOption(_)
            | Self::Receive(_)
            | Self::Install
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
                let last = send.datagrams.len().saturating_sub(1);
                for (at, datagram) in send.datagrams.iter().enumerate() {
                    let link = if at < last { Flags::IO_LINK } else { Flags::empty() };
                    entries.push(datagram.entry(fd).flags(link));
                }
            }
            Self::Receive(_) => {
                entries.push(opcode::RecvMsgMulti::new(fd, receive_header, BUFFER_GROUP).build());
            }
            Self::Install => entries.push(opcode::FixedFdInstall::new(fd, 0).build()),
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
