//! Set-up: builds a ring step by step, and names what is missing.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::register::Restriction;
use io_uring::{IoUring, Probe};

use super::Ring;
use super::buffers::BufferRing;
use super::eventfd::EventFd;
use super::kernel_defaults::Defaults;
use super::membarrier;
use super::op::{BindOp, ENTRY_FLAGS, OPERATIONS, Op, SocketName, SocketOption, Whose};
use super::process::Process;
use super::queues::{Queues, SlotIndex};
use super::quota::Quota;
use super::recycle::Recycler;
use super::recycle::pool::Recycle;
use super::recycle::rcu::Rcu;
use super::recycle::self_test::{self, Support};
use super::socket_filter;
use crate::datagram::Family;
use crate::error::SetupError;
use crate::limits::{CQ_ENTRIES, IDLE_MIN, SOCKETS_MAX, SQ_ENTRIES};

/// A ring that has been through every check.
pub(crate) struct Built {
    /// The only one that may use the ring.
    pub(crate) process: Process,
    pub(crate) ring: Ring,
    /// The sockets that guests may have open at once.
    pub(crate) quota: Arc<Quota>,
    pub(crate) defaults: Defaults,
    /// The kernel signals it for completions.
    pub(crate) eventfd: EventFd,
    /// Sockets can be asked for their addresses on the ring.
    pub(crate) has_names: bool,
}

/// Builds a ring with a table of `sockets` slots and some for cached sockets, or says which
/// requirement failed.
pub(crate) fn build(sockets: u32, recycle: Recycle) -> Result<Built, SetupError> {
    if !(1..=SOCKETS_MAX).contains(&sockets) {
        return Err(SetupError::OutOfRange {
            option: "sockets",
            value: sockets.into(),
            min: 1,
            max: SOCKETS_MAX.into(),
        });
    }
    let process =
        Process::current().map_err(|errno| SetupError::Io { step: "mapping a page", errno })?;
    let io = set_up()?;
    check_operations(&io)?;
    let (recycle, support) = match recycle.quarantined_max {
        0 => (recycle, Support::none("turned off")),
        _ => recyclable(sockets, recycle),
    };
    register_table(&io, sockets + recycle.quarantined_max)?;
    let buffers = BufferRing::register(&io).map_err(step("registering the buffer ring"))?;
    let eventfd = EventFd::new().map_err(|errno| SetupError::Io { step: "eventfd", errno })?;
    io.submitter()
        .register_eventfd(eventfd.as_raw_fd())
        .map_err(step("registering the eventfd"))?;
    restrict(&io)?;
    let mut queues = Queues::new(io);
    check_socket_operations(&mut queues)?;
    let has_names = answers_names(&mut queues)?;
    let defaults = Defaults::query()?;
    membarrier::enable_kicks();
    let quota = Quota::new(sockets);
    let recycler = Recycler::new(recycle, support, Rcu::new(eventfd.clone()));
    let ring = Ring::new(process, queues, buffers, Arc::clone(&quota), recycler);
    Ok(Built { process, ring, quota, defaults, eventfd, has_names })
}

/// `io_uring_setup`, with the flags a ring entered from any thread can have: not SINGLE_ISSUER and
/// not DEFER_TASKRUN (which a ring of one thread's own could have, and gains nothing from).
///
/// COOP_TASKRUN: a datagram does not interrupt the thread that armed the receive, but waits for it
/// to enter the kernel, at most a timer tick (measured: 3 ms in the median beside a thread that
/// only computes, 0.2 ms without the flag). The interrupts cost more: on two worker threads 64
/// guests' echo round trips took 33 µs of CPU each with them, 11 without.
///
/// It is disabled until it is restricted.
pub(crate) fn set_up() -> Result<IoUring, SetupError> {
    IoUring::builder()
        .setup_cqsize(CQ_ENTRIES)
        // An entry the kernel refuses must not keep those behind it from being submitted.
        .setup_submit_all()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .setup_r_disabled()
        .dontfork()
        .build(SQ_ENTRIES)
        .map_err(refusal)
}

/// The error of a failing step, where its errno has no meaning of its own.
fn step(step: &'static str) -> impl Fn(io::Error) -> SetupError {
    move |errno| match errno.raw_os_error() {
        Some(libc::EPERM | libc::EACCES | libc::ENOSYS | libc::ENOMEM) => refusal(errno),
        _ => SetupError::Io { step, errno },
    }
}

fn refusal(errno: io::Error) -> SetupError {
    match errno.raw_os_error() {
        Some(libc::ENOSYS) => SetupError::NoIoUring,
        Some(libc::ENOMEM) => memlock(),
        Some(libc::EPERM | libc::EACCES) => match io_uring_disabled() {
            Some(value @ 1..) => SetupError::DisabledBySysctl { value },
            _ if seccomp_is_filtering() => SetupError::DeniedBySeccomp { errno },
            _ => SetupError::Denied { errno },
        },
        // A set-up flag the kernel does not know; the newest came with 5.19.
        Some(libc::EINVAL) => {
            SetupError::MissingOperation { operation: "IORING_SETUP_COOP_TASKRUN" }
        }
        _ => SetupError::Io { step: "io_uring_setup", errno },
    }
}

/// The sysctl `kernel.io_uring_disabled`; `None` before Linux 6.6 or without `/proc`.
pub(crate) fn io_uring_disabled() -> Option<u8> {
    let text = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok()?;
    text.trim().parse().ok()
}

/// Whether this thread runs under a seccomp filter.
pub(crate) fn seccomp_is_filtering() -> bool {
    std::fs::read_to_string("/proc/thread-self/status")
        .is_ok_and(|status| status.lines().any(|line| line == "Seccomp:\t2"))
}

fn memlock() -> SetupError {
    SetupError::Memlock { limit: soft_limit(libc::RLIMIT_MEMLOCK) }
}

fn check_operations(io: &IoUring) -> Result<(), SetupError> {
    let mut probe = Probe::new();
    io.submitter().register_probe(&mut probe).map_err(step("probing io_uring's operations"))?;
    match OPERATIONS.iter().find(|(_, code, _)| !probe.is_supported(*code)) {
        Some((operation, ..)) => Err(SetupError::MissingOperation { operation }),
        None => Ok(()),
    }
}

/// What can be recycled here, with as many slots for it as the kernel's limits leave beside those of
/// the guests' sockets.
fn recyclable(sockets: u32, recycle: Recycle) -> (Recycle, Support) {
    let nofile = u32::try_from(soft_limit(libc::RLIMIT_NOFILE)).unwrap_or(u32::MAX);
    let left = nofile.min(SOCKETS_MAX).saturating_sub(sockets);
    let quarantined_max = recycle.quarantined_max.min(left);
    let idle = recycle.idle.max(IDLE_MIN);
    if quarantined_max == 0 {
        const WHY: &str = "RLIMIT_NOFILE leaves the table no room for sockets in quarantine";
        tracing::info!(nofile, sockets, "closed sockets are not recycled: {WHY}");
        return (Recycle::OFF, Support::none(WHY));
    }
    let support = self_test::support();
    support.log();
    let may_be = support.may_be_any();
    (
        Recycle { quarantined_max: if may_be { quarantined_max } else { 0 }, idle, ..recycle },
        support,
    )
}

/// `IORING_REGISTER_SYNC_CANCEL`, the one registration of a ring at work.
const SYNC_CANCEL: u8 = 24;

/// Enables the ring for what sockets need, and nothing else: the kernel refuses all other operations, flags
/// of entries and registrations from now on, with `EACCES`. And all sockets but UDP's, if the result is
/// `true`: from Linux 7.0 on.
pub(crate) fn restrict(io: &IoUring) -> Result<bool, SetupError> {
    let is_udp_only = match socket_filter::register(io) {
        Ok(()) => true,
        Err(errno) => {
            if errno.raw_os_error() != Some(libc::EINVAL) {
                tracing::warn!(%errno, "no filter for SOCKET entries");
            }
            // Before Linux 7.0, or built without.
            false
        }
    };
    let operations = OPERATIONS.iter().map(|(_, code, _)| Restriction::sqe_op(*code));
    let others =
        [Restriction::sqe_flags_allowed(ENTRY_FLAGS.bits()), Restriction::register_op(SYNC_CANCEL)];
    let mut allowed: Vec<_> = operations.chain(others).collect();
    io.submitter().register_restrictions(&mut allowed).map_err(step("restricting the ring"))?;
    io.submitter().register_enable_rings().map_err(step("enabling the ring"))?;
    Ok(is_udp_only)
}

fn register_table(io: &IoUring, sockets: u32) -> Result<(), SetupError> {
    io.submitter().register_files_sparse(sockets).map_err(|errno| match errno.raw_os_error() {
        Some(libc::EMFILE) => {
            SetupError::TableBeyondNofile { sockets, limit: soft_limit(libc::RLIMIT_NOFILE) }
        }
        _ => step("registering the fixed-file table")(errno),
    })
}

/// The probe lists opcodes only; whether URING_CMD knows SETSOCKOPT, and BIND and SOCKET know direct
/// descriptors, shows in use: a socket is made in slot 0, configured and closed again.
fn check_socket_operations(queues: &mut Queues) -> Result<(), SetupError> {
    let receive_buffer =
        SocketOption { level: libc::SOL_SOCKET, name: libc::SO_RCVBUF, value: 4096 };
    let steps = [
        ("IORING_OP_SOCKET and IORING_OP_BIND with a fixed-file slot", trial_bind()),
        (
            "IORING_OP_URING_CMD with SOCKET_URING_OP_SETSOCKOPT",
            Op::SetOption(Box::new(receive_buffer)),
        ),
        ("IORING_OP_CLOSE of a fixed-file slot", Op::Close),
    ];
    for (operation, op) in steps {
        match try_alone(queues, &op)? {
            0 => {}
            // BIND is there, and no port is free just now.
            result if result == -libc::EADDRINUSE => {}
            // A machine without IPv4 has nothing to try it on.
            result if result == -libc::EAFNOSUPPORT => return Ok(()),
            result if [-libc::EINVAL, -libc::EOPNOTSUPP].contains(&result) => {
                return Err(SetupError::MissingOperation { operation });
            }
            result => {
                let errno = io::Error::from_raw_os_error(-result);
                return Err(SetupError::Io { step: operation, errno });
            }
        }
    }
    Ok(())
}

/// Whether a socket answers on the ring what its addresses are: from Linux 6.19 on.
fn answers_names(queues: &mut Queues) -> Result<bool, SetupError> {
    let query = Op::QueryName(Box::new(SocketName::new(Whose::Own)));
    let _may_fail = try_alone(queues, &trial_bind())?;
    let result = try_alone(queues, &query)?;
    try_alone(queues, &Op::Close)?;
    Ok(result == 0 && matches!(query, Op::QueryName(name) if name.addr().is_some()))
}

fn trial_bind() -> Op {
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    Op::Bind(Box::new(BindOp::new(Family::V4, Vec::new(), loopback)))
}

/// Runs an operation on slot 0; the result of its first completion.
fn try_alone(queues: &mut Queues, op: &Op) -> Result<i32, SetupError> {
    let mut entries = Vec::new();
    op.write(SlotIndex(0), 0, std::ptr::null(), &mut entries);
    queues.run_alone(&entries).map_err(step("a trial operation"))
}

#[expect(unsafe_code, reason = "getrlimit(2)")]
pub(crate) fn soft_limit(resource: libc::__rlimit_resource_t) -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a local of the type that getrlimit(2) writes.
    unsafe { libc::getrlimit(resource, &raw mut limit) };
    limit.rlim_cur
}

#[cfg(test)]
mod tests {
    use io_uring::opcode::{AsyncCancel, Nop, OpenAt, Read, Socket};
    use io_uring::squeue::Flags;
    use io_uring::types::Fd;

    use super::*;

    /// Kills: a ring that a stray entry can have do anything.
    #[test]
    fn the_kernel_refuses_operations_flags_and_registrations_that_sockets_do_not_need() {
        let io = set_up().unwrap();
        let is_udp_only = restrict(&io).unwrap();
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let major: u32 = release.split('.').next().unwrap().parse().unwrap();
        // A distribution's: whoever builds one without CONFIG_IO_URING_BPF has no filter.
        assert!(is_udp_only || major < 7 || !release.contains("deb"), "{release}");
        let refused = io.submitter().register_files_sparse(1).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EACCES));

        let mut queues = Queues::new(io);
        let mut byte = 0;
        let path = c"/".as_ptr();
        for entry in [
            Nop::new().build(),
            OpenAt::new(Fd(libc::AT_FDCWD), path).build(),
            Read::new(Fd(0), &raw mut byte, 0).build(),
            Socket::new(libc::AF_INET, libc::SOCK_DGRAM, 0).build().flags(Flags::ASYNC),
            Socket::new(libc::AF_INET, libc::SOCK_DGRAM, 0).build().flags(Flags::IO_DRAIN),
        ] {
            assert_eq!(queues.run_alone(&[entry]).unwrap(), -libc::EACCES);
        }
        for (family, kind, protocol) in [
            (libc::AF_UNIX, libc::SOCK_DGRAM, 0),
            (libc::AF_INET, libc::SOCK_STREAM, 0),
            (libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_UDP),
            (libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE),
        ] {
            let socket = Socket::new(family, kind, protocol).build();
            let result = queues.run_alone(&[socket]).unwrap();
            assert!(!is_udp_only || result == -libc::EACCES, "{family} {kind}: {result}");
        }
        let allowed = AsyncCancel::new(1).build();
        assert_eq!(queues.run_alone(&[allowed]).unwrap(), -libc::ENOENT);
    }
}
