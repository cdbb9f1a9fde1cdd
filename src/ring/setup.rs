//! Set-up: builds a ring step by step, and names what is missing.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::register::Restriction;
use io_uring::{IoUring, Probe};

use super::Ring;
use super::buffers::BufferRing;
use super::eventfd::EventFd;
use super::kernel_defaults::Defaults;
use super::membarrier;
use super::op::ENTRY_FLAGS;
use super::process::Process;
use super::queues::Queues;
use super::recycle::Recycler;
use super::recycle::pool::Recycle;
use super::recycle::rcu::Rcu;
use super::recycle::self_test::{self, Support};
use super::rlimits::{are_rings_charged_to_memlock, soft_limit};
use super::share::Share;
use super::socket_filter;
use super::timer::Timer;
use super::trials::{TRIALS, Trial, Tried, answers_names};
use crate::error::SetupError;
use crate::limits::{BUFFERS, CQ_ENTRIES, IDLE_MIN, SOCKETS_MAX, SQ_ENTRIES};

/// A ring that has been through every check.
pub(crate) struct Built {
    /// The only one that may use the ring.
    pub(crate) process: Process,
    pub(crate) ring: Ring,
    /// The sockets that guests may have open at once: to begin with, none.
    pub(crate) share: Arc<Share>,
    /// The kernel signals it for completions.
    pub(crate) eventfd: EventFd,
    /// Of the ring's own thread.
    pub(crate) timer: Timer,
    pub(crate) known: Known,
}

/// What holds for all rings of a pool, and is found out with the first.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    /// Of a table, for the sockets of guests.
    pub(crate) slots: u32,
    buffers: u16,
    recycle: Recycle,
    support: Support,
    pub(crate) defaults: Defaults,
    /// Sockets can be asked for their addresses on the ring.
    pub(crate) has_names: bool,
}

#[cfg(test)]
impl Known {
    /// Of a kernel that a test plays.
    pub(crate) fn played(
        slots: u32,
        recycle: Recycle,
        support: Support,
        defaults: Defaults,
    ) -> Self {
        Self { slots, buffers: BUFFERS, recycle, support, defaults, has_names: true }
    }
}

/// Builds the first ring of a pool, with a table of `sockets` slots, or as many as the kernel lets a
/// table have, and some for cached sockets; or says which requirement failed.
pub(crate) fn build(sockets: u32, buffers: u16, recycle: Recycle) -> Result<Built, SetupError> {
    if !(1..=SOCKETS_MAX).contains(&sockets) {
        return Err(SetupError::OutOfRange {
            option: "sockets",
            value: sockets.into(),
            min: 1,
            max: SOCKETS_MAX.into(),
        });
    }
    let (process, io, codes) = begin()?;
    if let Some(trial) = TRIALS.iter().find(|trial| !codes.is_supported(trial.code)) {
        return Err(missing(trial));
    }
    let (recycle, support) = recyclable(recycle);
    let (slots, recycle) = fit(sockets, recycle);
    let (mut queues, buffer_ring, signals) =
        equip(io, &codes, slots + recycle.quarantined_max, buffers)?;
    for trial in TRIALS {
        try_out(trial, &mut queues)?;
    }
    let has_names = answers_names(&mut queues).map_err(step("trying getsockname"))?;
    let defaults = Defaults::query()?;
    membarrier::enable_kicks();
    let known = Known { slots, buffers, recycle, support, defaults, has_names };
    Ok(assemble(process, queues, buffer_ring, signals, known))
}

/// Builds another ring of the pool, for which nothing is tried that the first has shown.
pub(crate) fn build_another(known: &Known) -> Result<Built, SetupError> {
    let (process, io, codes) = begin()?;
    let slots = known.slots + known.recycle.quarantined_max;
    let (queues, buffers, signals) = equip(io, &codes, slots, known.buffers)?;
    Ok(assemble(process, queues, buffers, signals, known.clone()))
}

/// A ring that is disabled and has nothing yet, and the operations that it knows.
fn begin() -> Result<(Process, IoUring, Probe), SetupError> {
    let process =
        Process::current().map_err(|errno| SetupError::Io { step: "mapping a page", errno })?;
    let io = set_up()?;
    let codes = probe(&io)?;
    Ok((process, io, codes))
}

/// Gives a new ring what it works with, and enables it.
fn equip(
    io: IoUring,
    codes: &Probe,
    slots: u32,
    buffers: u16,
) -> Result<(Queues, BufferRing, (EventFd, Timer)), SetupError> {
    register_table(&io, slots)?;
    let buffers = register_buffers(&io, buffers)?;
    let eventfd = EventFd::new().map_err(|errno| SetupError::Io { step: "eventfd", errno })?;
    io.submitter()
        .register_eventfd(eventfd.as_raw_fd())
        .map_err(step("registering the eventfd"))?;
    restrict(&io, codes)?;
    let timer = Timer::new().map_err(|errno| SetupError::Io { step: "timerfd_create", errno })?;
    Ok((Queues::new(io), buffers, (eventfd, timer)))
}

fn assemble(
    process: Process,
    queues: Queues,
    buffers: BufferRing,
    (eventfd, timer): (EventFd, Timer),
    known: Known,
) -> Built {
    let share = Share::new(0);
    let recycler = Recycler::new(known.recycle, known.support.clone(), Rcu::new(eventfd.clone()));
    let ring = Ring::new(process, queues, buffers, known.slots, Arc::clone(&share), recycler);
    Built { process, ring, share, eventfd, timer, known }
}

/// How many slots of a table are for guests' sockets, and how many sockets are cached beside them: the
/// kernel registers no table that is larger than `RLIMIT_NOFILE`.
fn fit(sockets: u32, recycle: Recycle) -> (u32, Recycle) {
    let nofile = u32::try_from(soft_limit(libc::RLIMIT_NOFILE)).unwrap_or(u32::MAX);
    let largest = nofile.min(SOCKETS_MAX);
    let beside = largest.saturating_sub(sockets).max(largest / 2);
    let quarantined_max = recycle.quarantined_max.min(beside);
    let slots = sockets.min(largest - quarantined_max).max(1);
    (slots, Recycle { quarantined_max, idle: recycle.idle.max(IDLE_MIN), ..recycle })
}

/// `io_uring_setup`, with the flags a ring entered from any thread can have: not SINGLE_ISSUER and
/// not DEFER_TASKRUN (which a ring of one thread's own could have, and gains nothing from).
///
/// COOP_TASKRUN: a datagram does not interrupt the thread that armed the receive, but waits for it
/// to enter the kernel; `driver::held_up` interrupts threads that compute. Interrupts by all datagrams
/// cost more: on two worker threads 64 guests' echo round trips took 40 µs of CPU each with them, 31
/// without.
///
/// It is disabled until it is restricted.
fn set_up() -> Result<IoUring, SetupError> {
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
        // A kernel with the sysctl has io_uring.
        Some(libc::ENOSYS) if io_uring_disabled().is_some() && seccomp_is_filtering() => {
            SetupError::DeniedBySeccomp { errno }
        }
        Some(libc::ENOSYS) => SetupError::NoIoUring,
        Some(libc::ENOMEM) => match soft_limit(libc::RLIMIT_MEMLOCK) {
            limit
                if limit != libc::RLIM_INFINITY
                    && are_rings_charged_to_memlock() != Some(false) =>
            {
                SetupError::Memlock { limit }
            }
            _ => SetupError::Io { step: "making the ring", errno },
        },
        Some(libc::EPERM | libc::EACCES) => match io_uring_disabled() {
            Some(value @ 1..) => SetupError::DisabledBySysctl { value },
            _ if seccomp_is_filtering() => SetupError::DeniedBySeccomp { errno },
            _ => SetupError::Denied { errno },
        },
        // A set-up flag the kernel does not know; the newest came with 5.19.
        Some(libc::EINVAL) => {
            SetupError::MissingOperation { operation: "IORING_SETUP_COOP_TASKRUN", since: "5.19" }
        }
        _ => SetupError::Io { step: "making the ring", errno },
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

/// The operations that the kernel knows by their numbers.
fn probe(io: &IoUring) -> Result<Probe, SetupError> {
    let mut known = Probe::new();
    io.submitter().register_probe(&mut known).map_err(step("probing io_uring's operations"))?;
    Ok(known)
}

fn register_buffers(io: &IoUring, count: u16) -> Result<BufferRing, SetupError> {
    BufferRing::register(io, count).map_err(step("registering the buffer ring"))
}

/// What of it can be recycled here.
fn recyclable(recycle: Recycle) -> (Recycle, Support) {
    if recycle.quarantined_max == 0 {
        return (recycle, Support::none("turned off"));
    }
    let support = self_test::support();
    support.log();
    if support.may_be_any() { (recycle, support) } else { (Recycle::OFF, support) }
}

/// `IORING_REGISTER_SYNC_CANCEL`, the one registration of a ring at work.
const SYNC_CANCEL: u8 = 24;

/// Enables the ring for what sockets need, and nothing else: the kernel refuses all other operations, flags
/// of entries and registrations from now on, with `EACCES`. And all sockets but UDP's, if the result is
/// `true`: from Linux 7.0 on.
///
/// `codes`: the kernel takes no list with operations that it does not know.
fn restrict(io: &IoUring, codes: &Probe) -> Result<bool, SetupError> {
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
    let known = TRIALS.iter().map(|trial| trial.code).filter(|code| codes.is_supported(*code));
    let operations = known.map(Restriction::sqe_op);
    let others =
        [Restriction::sqe_flags_allowed(ENTRY_FLAGS.bits()), Restriction::register_op(SYNC_CANCEL)];
    let mut allowed: Vec<_> = operations.chain(others).collect();
    io.submitter().register_restrictions(&mut allowed).map_err(step("restricting the ring"))?;
    io.submitter().register_enable_rings().map_err(step("enabling the ring"))?;
    Ok(is_udp_only)
}

fn register_table(io: &IoUring, sockets: u32) -> Result<(), SetupError> {
    io.submitter().register_files_sparse(sockets).map_err(step("registering the fixed-file table"))
}

/// Tries one thing that sockets need, on a ring without other operations.
fn try_out(trial: &Trial, queues: &mut Queues) -> Result<Tried, SetupError> {
    match trial.run(queues).map_err(step("trying io_uring's operations"))? {
        Tried::Missing => Err(missing(trial)),
        Tried::Failed(errno) => Err(SetupError::Io { step: trial.name, errno }),
        tried @ (Tried::Works | Tried::NoSocket) => Ok(tried),
    }
}

fn missing(trial: &Trial) -> SetupError {
    SetupError::MissingOperation { operation: trial.name, since: trial.since }
}

/// A ring that is thrown away, to try things on: with the least that they need.
pub(crate) struct ThrowAway {
    queues: Queues,
    /// Sockets of UDP alone.
    pub(crate) is_udp_only: bool,
    _buffers: BufferRing,
}

impl ThrowAway {
    pub(crate) fn build() -> Result<Self, SetupError> {
        let io = set_up()?;
        register_table(&io, 1)?;
        let buffers = register_buffers(&io, BUFFERS)?;
        let is_udp_only = restrict(&io, &probe(&io)?)?;
        Ok(Self { queues: Queues::new(io), is_udp_only, _buffers: buffers })
    }

    pub(crate) fn try_out(&mut self, trial: &Trial) -> Result<Tried, SetupError> {
        try_out(trial, &mut self.queues)
    }
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
        let is_udp_only = restrict(&io, &probe(&io).unwrap()).unwrap();
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
