//! Set-up: builds the ring step by step, names what is missing, and learns what the running
//! kernel answers for sockets nobody has configured.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::{IoUring, Probe, opcode, types};

use super::Ring;
use super::arrivals::Arrivals;
use super::buffers::BufferRing;
use super::grace::Grace;
use super::recycle::{Recycle, Recycler, Soundness};
use super::slots::Room;
use super::trial;
use crate::datagram::{Family, RawAddr};
use crate::error::SetupError;
use crate::limits::{CQ_ENTRIES, IDLE_MIN, SOCKETS_MAX, SQ_ENTRIES};

/// Every operation a socket's life uses, with the kernel that brought it.
pub(crate) const OPERATIONS: &[(&str, u8, &str)] = &[
    ("IORING_OP_SOCKET", opcode::Socket::CODE, "5.19"),
    ("IORING_OP_BIND", opcode::Bind::CODE, "6.11"),
    ("IORING_OP_CONNECT", opcode::Connect::CODE, "5.5"),
    ("IORING_OP_SEND", opcode::Send::CODE, "5.6"),
    ("IORING_OP_RECVMSG", opcode::RecvMsgMulti::CODE, "6.0 (multishot)"),
    ("IORING_OP_URING_CMD", opcode::SetSockOpt::CODE, "6.7 (SETSOCKOPT)"),
    ("IORING_OP_FIXED_FD_INSTALL", opcode::FixedFdInstall::CODE, "6.8"),
    ("IORING_OP_ASYNC_CANCEL", opcode::AsyncCancel::CODE, "5.5"),
    ("IORING_OP_CLOSE", opcode::Close::CODE, "5.6"),
];

/// What the kernel answers for a new socket of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FamilyDefaults {
    pub(crate) hop_limit: u8,
    pub(crate) receive_buffer: BufferSizes,
    pub(crate) send_buffer: BufferSizes,
}

/// `SO_RCVBUF` or `SO_SNDBUF` as getsockopt reports them, doubled by the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BufferSizes {
    default: u32,
    min: u32,
    max: u32,
}

impl BufferSizes {
    /// What getsockopt will report once `value` has been set (`None`: nothing), halved as
    /// wasmtime-wasi halves it. The kernel clamps and doubles (socket(7)), so what a guest
    /// configures before it binds can be answered without the kernel.
    pub(crate) fn reported(self, value: Option<u32>) -> u64 {
        let doubled = value
            .map_or(self.default, |value| value.min(self.max / 2).saturating_mul(2).max(self.min));
        u64::from(doubled / 2)
    }
}

/// The two families; `None` where the kernel has no such family.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Defaults {
    pub(crate) v4: Option<FamilyDefaults>,
    pub(crate) v6: Option<FamilyDefaults>,
}

impl Defaults {
    pub(crate) fn of(&self, family: Family) -> Option<FamilyDefaults> {
        match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        }
    }

    /// Asks plain sockets, once per ring.
    pub(crate) fn probe() -> Result<Self, SetupError> {
        let ask = |family| match FamilyDefaults::ask(family) {
            Ok(defaults) => Ok(Some(defaults)),
            Err(errno) if errno.raw_os_error() == Some(libc::EAFNOSUPPORT) => Ok(None),
            Err(errno) => Err(SetupError::Io { step: "asking a socket for its defaults", errno }),
        };
        Ok(Self { v4: ask(Family::V4)?, v6: ask(Family::V6)? })
    }
}

impl FamilyDefaults {
    fn ask(family: Family) -> io::Result<Self> {
        let socket = plain_socket(family)?;
        let (level, name) = hop_limit_option(family);
        let hop_limit = get_option(&socket, level, name)?;
        Ok(Self {
            hop_limit: u8::try_from(hop_limit).unwrap_or(u8::MAX),
            receive_buffer: BufferSizes::ask(&socket, libc::SO_RCVBUF)?,
            send_buffer: BufferSizes::ask(&socket, libc::SO_SNDBUF)?,
        })
    }
}

impl BufferSizes {
    fn ask(socket: &OwnedFd, name: libc::c_int) -> io::Result<Self> {
        let get = || get_option(socket, libc::SOL_SOCKET, name).map(i32::unsigned_abs);
        let default = get()?;
        set_option(socket, libc::SOL_SOCKET, name, 1)?;
        let min = get()?;
        set_option(socket, libc::SOL_SOCKET, name, i32::MAX)?;
        Ok(Self { default, min, max: get()? })
    }
}

/// Level and name of the option that WASI calls the unicast hop limit.
pub(crate) fn hop_limit_option(family: Family) -> (libc::c_int, libc::c_int) {
    match family {
        Family::V4 => (libc::IPPROTO_IP, libc::IP_TTL),
        Family::V6 => (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
    }
}

/// A ring that has been through every check.
pub(crate) struct Built {
    pub(crate) ring: Ring,
    pub(crate) room: Arc<Room>,
    pub(crate) defaults: Defaults,
    /// Signalled by completions that come while nobody looks.
    pub(crate) arrivals: Arrivals,
}

/// Builds a ring with a table of `sockets` slots and some for kept sockets, or says which
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
    let io = set_up()?;
    check_operations(&io)?;
    let (recycle, soundness) = match recycle.quarantined_max {
        0 => (recycle, Soundness::unsound("turned off")),
        _ => recyclable(sockets, recycle),
    };
    register_table(&io, sockets + recycle.quarantined_max)?;
    let buffers = BufferRing::register(&io).map_err(step("registering the buffer ring"))?;
    check_options(&io)?;
    let arrivals = Arrivals::new().map_err(|errno| SetupError::Io { step: "eventfd", errno })?;
    io.submitter()
        .register_eventfd(arrivals.as_raw_fd())
        .map_err(step("registering the eventfd"))?;
    let defaults = Defaults::probe()?;
    let room = Room::new(sockets);
    let grace = arrivals
        .try_clone()
        .map(Grace::new)
        .map_err(|errno| SetupError::Io { step: "duplicating the eventfd", errno })?;
    let recycler = Recycler::new(recycle, soundness);
    let ring = Ring::new(io, buffers, Arc::clone(&room), recycler, grace);
    Ok(Built { ring, room, defaults, arrivals })
}

/// `io_uring_setup`, with the flags a ring entered from any thread can have: not SINGLE_ISSUER and
/// not DEFER_TASKRUN (which a ring of one thread's own could have, and gains nothing from).
///
/// COOP_TASKRUN: a datagram does not interrupt the thread that armed the receive, but waits for it
/// to enter the kernel, at most a timer tick (measured: 3 ms in the median beside a thread that
/// only computes, 0.2 ms without the flag). The interrupts cost more: on two worker threads 64
/// guests' echo round trips took 33 µs of CPU each with them, 11 without.
pub(crate) fn set_up() -> Result<IoUring, SetupError> {
    IoUring::builder()
        .setup_cqsize(CQ_ENTRIES)
        // An entry the kernel refuses must not keep those behind it from being submitted.
        .setup_submit_all()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .dontfork()
        .build(SQ_ENTRIES)
        .map_err(refusal)
}

/// What a failing step says, where its errno has no meaning of its own.
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

/// What can be recycled here, with as many places for it as the kernel's limits leave beside the
/// sockets' own.
fn recyclable(sockets: u32, recycle: Recycle) -> (Recycle, Soundness) {
    let nofile = u32::try_from(soft_limit(libc::RLIMIT_NOFILE)).unwrap_or(u32::MAX);
    let left = nofile.min(SOCKETS_MAX).saturating_sub(sockets);
    let quarantined_max = recycle.quarantined_max.min(left);
    let idle = recycle.idle.max(IDLE_MIN);
    if quarantined_max == 0 {
        const WHY: &str = "RLIMIT_NOFILE leaves the table no room for sockets in quarantine";
        tracing::info!(nofile, sockets, "closed sockets are not recycled: {WHY}");
        return (Recycle::OFF, Soundness::unsound(WHY));
    }
    let soundness = trial::soundness();
    soundness.log();
    let is_of_use = soundness.is_of_use();
    (
        Recycle { quarantined_max: if is_of_use { quarantined_max } else { 0 }, idle, ..recycle },
        soundness,
    )
}

fn register_table(io: &IoUring, sockets: u32) -> Result<(), SetupError> {
    io.submitter().register_files_sparse(sockets).map_err(|errno| match errno.raw_os_error() {
        Some(libc::EMFILE) => {
            SetupError::TableBeyondNofile { sockets, limit: soft_limit(libc::RLIMIT_NOFILE) }
        }
        _ => step("registering the fixed-file table")(errno),
    })
}

/// The probe lists opcodes only; whether URING_CMD knows SETSOCKOPT, and BIND and SOCKET know
/// direct descriptors, shows in use: a socket is made in slot 0, configured and closed again.
fn check_options(io: &IoUring) -> Result<(), SetupError> {
    let fd = types::Fixed(0);
    let slot = super::slots::SlotIndex(0);
    let on: libc::c_int = 1;
    let addr = RawAddr::from(std::net::SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
    let steps: [(&'static str, io_uring::squeue::Entry); 4] = [
        (
            "IORING_OP_SOCKET into a fixed-file slot",
            opcode::Socket::new(libc::AF_INET, libc::SOCK_DGRAM, 0)
                .file_index(Some(slot.destination()))
                .build(),
        ),
        (
            "IORING_OP_URING_CMD with SOCKET_URING_OP_SETSOCKOPT",
            opcode::SetSockOpt::new(
                fd,
                libc::SOL_SOCKET.cast_unsigned(),
                libc::SO_RCVBUF.cast_unsigned(),
                std::ptr::from_ref(&on).cast(),
                4,
            )
            .build(),
        ),
        ("IORING_OP_BIND", opcode::Bind::new(fd, addr.as_ptr(), addr.len()).build()),
        ("IORING_OP_CLOSE of a fixed-file slot", opcode::Close::new(fd).build()),
    ];
    for (operation, entry) in steps {
        match run_alone(io, &[entry]).map_err(step("a trial operation"))? {
            0 => {}
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

/// Runs an operation that completes once to its end, on a ring that nobody else uses (yet).
#[expect(unsafe_code, reason = "pushes entries whose memory the caller borrows to us")]
pub(super) fn run_alone(io: &IoUring, entries: &[io_uring::squeue::Entry]) -> io::Result<i32> {
    {
        // SAFETY: nobody else uses the ring; no other queue object exists.
        let mut queue = unsafe { io.submission_shared() };
        // SAFETY: the entries' memory is alive in the caller, and we return after the completion.
        unsafe { queue.push_multiple(entries) }.map_err(io::Error::other)?;
    }
    io.submit_and_wait(1)?;
    // SAFETY: nobody else uses the ring; no other queue object exists.
    let mut queue = unsafe { io.completion_shared() };
    queue.next().map(|completion| completion.result()).ok_or_else(|| io::Error::other("no result"))
}

#[expect(unsafe_code, reason = "socket(2)")]
fn plain_socket(family: Family) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(family.domain(), libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[expect(unsafe_code, reason = "getsockopt(2)")]
fn get_option(socket: &OwnedFd, level: libc::c_int, name: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len: libc::socklen_t = 4;
    // SAFETY: both pointers are to locals of the sizes they claim.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut len)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

#[expect(unsafe_code, reason = "setsockopt(2)")]
fn set_option(
    socket: &OwnedFd,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the pointer is to a local of the size it claims.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), 4) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[expect(unsafe_code, reason = "getrlimit(2)")]
pub(crate) fn soft_limit(resource: libc::__rlimit_resource_t) -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a local of the type it claims.
    unsafe { libc::getrlimit(resource, &raw mut limit) };
    limit.rlim_cur
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recorded_buffer_sizes_are_answered_as_the_kernel_would() {
        let socket = plain_socket(Family::V4).unwrap();
        for name in [libc::SO_RCVBUF, libc::SO_SNDBUF] {
            let sizes = BufferSizes::ask(&plain_socket(Family::V4).unwrap(), name).unwrap();
            for value in [1, 100, 4096, 4097, 65_536, 1_000_000, i32::MAX] {
                set_option(&socket, libc::SOL_SOCKET, name, value).unwrap();
                let kernel = get_option(&socket, libc::SOL_SOCKET, name).unwrap();
                let ours = sizes.reported(Some(value.unsigned_abs()));
                assert_eq!(ours, u64::from(kernel.unsigned_abs() / 2), "{name} {value}");
            }
        }
    }
}
