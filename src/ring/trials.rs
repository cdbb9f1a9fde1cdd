//! What sockets need of a ring, each tried by itself. The kernel's list of its operations (the probe)
//! does not say what they can do: URING_CMD is older than SETSOCKOPT by it, RECVMSG than its multishot,
//! CLOSE than direct descriptors.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::ptr;

use io_uring::opcode;

use super::buffers::BUFFER_GROUP;
use super::op::{
    Attempt, BindOp, Op, SocketMemory, SocketName, SocketOption, Whose, descriptor, socket,
};
use super::queues::{Queues, SlotIndex};
use crate::datagram::{Family, RawAddr, empty_header, receive_header};

/// One thing that sockets need.
pub(crate) struct Trial {
    pub(crate) name: &'static str,
    /// The operation's number.
    pub(super) code: u8,
    /// The kernel that brought it.
    pub(super) since: &'static str,
    attempt: fn(&mut Queues) -> io::Result<i32>,
    /// Errors that only a kernel which has it answers.
    answers: &'static [i32],
}

/// How a trial came out.
#[derive(Debug)]
pub(crate) enum Tried {
    Works,
    /// There is no socket to try it on.
    NoSocket,
    /// This kernel does not have it.
    Missing,
    Failed(io::Error),
}

const SLOT: SlotIndex = SlotIndex(0);

/// There is nobody to send to; and a socket that could not be bound before cannot be now.
const UNSENT: &[libc::c_int] = &[libc::EDESTADDRREQ, libc::EAGAIN];

/// In this order, on the socket that the first makes in slot 0 and the last closes. Nothing is sent, and
/// nothing can have come before it is bound. What the newest kernel brought stands before all others that
/// an older one does not know by number: so a ring that cannot be built names the version that would do.
pub(crate) const TRIALS: &[Trial] = &[
    Trial {
        name: "IORING_OP_SOCKET with a fixed-file slot",
        code: opcode::Socket::CODE,
        since: "5.19",
        attempt: |queues| queues.run_alone(&[socket(Family::V4, SLOT)]),
        answers: &[],
    },
    Trial {
        name: "multishot IORING_OP_RECVMSG with a buffer ring",
        code: opcode::RecvMsgMulti::CODE,
        since: "6.0",
        attempt: |queues| {
            let header = receive_header();
            let receive = opcode::RecvMsgMulti::new(SLOT.fd(), &raw const header, BUFFER_GROUP);
            let receive = receive.flags(libc::MSG_DONTWAIT.cast_unsigned());
            queues.run_alone(&[receive.build()])
        },
        answers: &[libc::EAGAIN],
    },
    Trial {
        name: "IORING_OP_RECV",
        code: opcode::Recv::CODE,
        since: "5.6",
        attempt: |queues| alone(queues, &Op::Drain(None)),
        answers: &[libc::EAGAIN],
    },
    Trial {
        name: "IORING_OP_BIND",
        code: opcode::Bind::CODE,
        since: "6.11",
        attempt: |queues| {
            let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
            let mut bind = BindOp::new(Family::V4, Vec::new(), loopback);
            // The socket is there.
            bind.attempt = Attempt::Recycled;
            alone(queues, &Op::Bind(Box::new(bind)))
        },
        // No port is free just now, or the namespace has no loopback.
        answers: &[libc::EADDRINUSE, libc::EADDRNOTAVAIL],
    },
    Trial {
        name: "IORING_OP_FIXED_FD_INSTALL",
        code: opcode::FixedFdInstall::CODE,
        since: "6.8",
        attempt: |queues| {
            let result = alone(queues, &Op::Install)?;
            drop(u32::try_from(result).map(descriptor));
            Ok(result)
        },
        answers: &[],
    },
    Trial {
        name: "IORING_OP_URING_CMD with SOCKET_URING_OP_SETSOCKOPT",
        code: opcode::SetSockOpt::CODE,
        since: "6.7",
        attempt: |queues| {
            let receive_buffer =
                SocketOption { level: libc::SOL_SOCKET, name: libc::SO_RCVBUF, value: 4096 };
            alone(queues, &Op::SetOption(Box::new(receive_buffer)))
        },
        answers: &[],
    },
    Trial {
        name: "IORING_OP_URING_CMD with SOCKET_URING_OP_GETSOCKOPT",
        code: opcode::SetSockOpt::CODE,
        since: "6.7",
        attempt: |queues| alone(queues, &Op::CountDrops(Box::new(SocketMemory::unknown()))),
        answers: &[],
    },
    Trial {
        name: "IORING_OP_SEND",
        code: opcode::Send::CODE,
        since: "5.6",
        attempt: |queues| queues.run_alone(&[opcode::Send::new(SLOT.fd(), ptr::null(), 0).build()]),
        answers: UNSENT,
    },
    Trial {
        name: "IORING_OP_SENDMSG",
        code: opcode::SendMsg::CODE,
        since: "5.3",
        attempt: |queues| {
            let header = empty_header();
            queues.run_alone(&[opcode::SendMsg::new(SLOT.fd(), &raw const header).build()])
        },
        answers: UNSENT,
    },
    Trial {
        name: "IORING_OP_POLL_ADD",
        code: opcode::PollAdd::CODE,
        since: "5.1",
        attempt: |queues| alone(queues, &Op::AwaitWritable),
        answers: &[],
    },
    Trial {
        name: "IORING_OP_CONNECT",
        code: opcode::Connect::CODE,
        since: "5.5",
        attempt: |queues| alone(queues, &Op::Connect(Box::new(RawAddr::unspec()))),
        answers: &[],
    },
    Trial {
        name: "IORING_OP_ASYNC_CANCEL",
        code: opcode::AsyncCancel::CODE,
        since: "5.5",
        attempt: |queues| queues.run_alone(&[opcode::AsyncCancel::new(u64::MAX).build()]),
        answers: &[libc::ENOENT],
    },
    Trial {
        name: "IORING_OP_CLOSE of a fixed-file slot",
        code: opcode::Close::CODE,
        since: "5.15",
        attempt: |queues| alone(queues, &Op::Close),
        answers: &[],
    },
];

impl Trial {
    /// Tries it on a ring without other operations, with the buffer ring and a table of one slot at
    /// least. The error is the enter's.
    pub(super) fn run(&self, queues: &mut Queues) -> io::Result<Tried> {
        Ok(match -(self.attempt)(queues)? {
            ..=0 => Tried::Works,
            errno if self.answers.contains(&errno) => Tried::Works,
            libc::EBADF | libc::EAFNOSUPPORT => Tried::NoSocket,
            libc::EINVAL | libc::EOPNOTSUPP => Tried::Missing,
            errno => Tried::Failed(io::Error::from_raw_os_error(errno)),
        })
    }
}

/// Whether a socket answers on the ring what its addresses are: from Linux 6.19 on. Sockets can do
/// without.
pub(super) fn answers_names(queues: &mut Queues) -> io::Result<bool> {
    let query = Op::QueryName(Box::new(SocketName::new(Whose::Own)));
    let _may_fail = queues.run_alone(&[socket(Family::V4, SLOT)])?;
    let result = alone(queues, &query)?;
    alone(queues, &Op::Close)?;
    Ok(result == 0 && matches!(query, Op::QueryName(name) if name.addr().is_some()))
}

/// Runs an operation; the result of its first completion.
fn alone(queues: &mut Queues, op: &Op) -> io::Result<i32> {
    let mut entries = Vec::new();
    op.write(SLOT, 0, ptr::null(), &mut entries);
    queues.run_alone(&entries)
}

#[cfg(test)]
mod tests {
    use io_uring::IoUring;

    use super::*;

    /// On an older kernel all of them may be missing.
    #[test]
    fn a_command_that_no_kernel_knows_is_missing_and_without_a_socket_nothing_is() {
        let io = IoUring::new(8).unwrap();
        io.submitter().register_files_sparse(1).unwrap();
        let mut queues = Queues::new(io);
        let unknown = Trial {
            name: "a command",
            code: opcode::UringCmd16::CODE,
            since: "99.0",
            attempt: |queues| {
                queues.run_alone(&[opcode::UringCmd16::new(SLOT.fd(), 0xffff).build()])
            },
            answers: &[libc::EAGAIN],
        };
        assert!(matches!(unknown.run(&mut queues), Ok(Tried::NoSocket)));
        assert_eq!(queues.run_alone(&[socket(Family::V4, SLOT)]).unwrap(), 0);
        assert!(matches!(unknown.run(&mut queues), Ok(Tried::Missing)));
    }
}
