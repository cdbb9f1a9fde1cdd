//! The self-test: before any ring caches a socket, sockets of a ring of its own leave behind on
//! purpose what a former owner could, on the running kernel; and it looks for what only new sockets have.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use io_uring::IoUring;

use crate::datagram::Family;
use crate::limits::DRAINS_MAX;
use crate::ring::kernel_defaults::get_option;
use crate::ring::membarrier::wait_for_grace_period;
use crate::ring::op::{Attempt, BindOp, Op, SocketOption};
use crate::ring::queues::{Queues, SlotIndex};

/// Of the loopback network, and not the family's loopback address.
const STRANGER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// How long what was sent over loopback may take.
const PATIENCE: Duration = Duration::from_secs(1);

/// What recycling may rely on in the sockets of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum FamilySupport {
    /// A disconnect restores every socket, or only those that were never connected.
    Works { also_connected: bool },
    /// Why not.
    Unsupported(String),
    /// Why it could not be tested, which says nothing of the kernel: ports were few, say. It is tried
    /// again when a ring could use it.
    Untested(String),
    /// This kernel has no such family.
    NoFamily,
}

/// What was found out about each family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Support {
    pub(crate) v4: FamilySupport,
    pub(crate) v6: FamilySupport,
}

impl Support {
    pub(crate) fn of(&self, family: Family) -> &FamilySupport {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    /// Whether anything is recycled.
    pub(crate) fn is_any(&self) -> bool {
        [&self.v4, &self.v6].iter().any(|support| matches!(support, FamilySupport::Works { .. }))
    }

    /// Whether anything may be, now or later.
    pub(crate) fn may_be_any(&self) -> bool {
        let is_untested = |support: &&FamilySupport| matches!(support, FamilySupport::Untested(_));
        self.is_any() || [&self.v4, &self.v6].iter().any(is_untested)
    }

    /// Logs what is not recycled, and why.
    pub(crate) fn log(&self) {
        for (family, support) in [("IPv4", &self.v4), ("IPv6", &self.v6)] {
            match support {
                FamilySupport::Works { also_connected } => {
                    tracing::debug!(family, also_connected, "closed sockets are recycled");
                }
                FamilySupport::NoFamily => {}
                FamilySupport::Unsupported(reason) => {
                    tracing::warn!(family, %reason, "closed sockets are not recycled");
                }
                FamilySupport::Untested(reason) => {
                    tracing::warn!(family, %reason, "closed sockets are not recycled yet");
                }
            }
        }
    }

    /// No family is recycled.
    pub(crate) fn none(why: &str) -> Self {
        let unsupported = FamilySupport::Unsupported(why.to_owned());
        Self { v4: unsupported.clone(), v6: unsupported }
    }
}

/// What this kernel leaves of a socket's former owner. Tested once per process, unless something
/// else than the kernel has prevented the test: a namespace without loopback, say.
pub(crate) fn support() -> Support {
    /// Not held while a test runs: a fork of the process must not find it locked for ever.
    static TESTED: Mutex<[Option<FamilySupport>; 2]> = Mutex::new([None, None]);
    let tested = || TESTED.lock().unwrap_or_else(PoisonError::into_inner);
    let of = |at: usize, family| {
        if let Some(support) = &tested()[at] {
            return support.clone();
        }
        let support = family_support(family, &kernel_version());
        if !matches!(support, FamilySupport::Untested(_)) {
            tested()[at] = Some(support.clone());
        }
        support
    };
    Support { v4: of(0, Family::V4), v6: of(1, Family::V6) }
}

fn family_support(family: Family, kernel_version: &str) -> FamilySupport {
    // There the delivery of a packet can be interrupted by any thread, and what is said of grace periods
    // (`wait_for_grace_period`) was not shown.
    if kernel_version.contains("PREEMPT_RT") {
        return FamilySupport::Unsupported("this is a PREEMPT_RT kernel".to_owned());
    }
    let ran = SelfTest::of(family).map_err(Trace::from).and_then(|mut test| test.run());
    match ran {
        Ok(also_connected) => FamilySupport::Works { also_connected },
        Err(Trace::Left(what)) => FamilySupport::Unsupported(what.to_owned()),
        Err(Trace::Untested(error)) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            FamilySupport::NoFamily
        }
        Err(Trace::Untested(error)) => {
            FamilySupport::Untested(format!("could not be tested: {error}"))
        }
    }
}

/// As `uname -v` has it: how the kernel was built.
#[expect(unsafe_code, reason = "uname(2)")]
fn kernel_version() -> String {
    // SAFETY: all fields are arrays of numbers, which may be zero.
    let mut name: libc::utsname = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a local of the type that uname(2) writes.
    unsafe { libc::uname(&raw mut name) };
    let bytes = name.version.map(|byte| byte.to_ne_bytes()[0]);
    String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned()
}

/// Why sockets of a family are not recycled.
#[derive(Debug)]
enum Trace {
    /// What the former owner has left.
    Left(&'static str),
    Untested(io::Error),
}

impl From<io::Error> for Trace {
    fn from(error: io::Error) -> Self {
        Self::Untested(error)
    }
}

fn unless(is_good: bool, left: &'static str) -> Result<(), Trace> {
    if is_good { Ok(()) } else { Err(Trace::Left(left)) }
}

/// Which steps of recycling are taken: all of them, save in the unit test below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Steps {
    unbinds: bool,
    drains: bool,
}

struct SelfTest {
    queues: Queues,
    family: Family,
    loopback: IpAddr,
    everywhere: IpAddr,
    /// Another socket to exchange datagrams with.
    peer: UdpSocket,
    steps: Steps,
}

/// A socket on the ring, and a descriptor of the same socket to look at it.
struct Subject {
    slot: SlotIndex,
    view: UdpSocket,
    imposed: Imposed,
}

/// What a program of the cgroup (`sock_create`) can give a socket when it is made, and so only then. A
/// disconnect takes the device away, and with it a confinement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Imposed {
    device: libc::c_int,
    mark: libc::c_int,
    priority: libc::c_int,
}

impl Imposed {
    const NOTHING: Self = Self { device: 0, mark: 0, priority: 0 };

    fn on(socket: &UdpSocket) -> io::Result<Self> {
        let option = |name| get_option(socket, libc::SOL_SOCKET, name);
        Ok(Self {
            device: option(libc::SO_BINDTOIFINDEX)?,
            mark: option(libc::SO_MARK)?,
            priority: option(libc::SO_PRIORITY)?,
        })
    }
}

impl SelfTest {
    fn of(family: Family) -> io::Result<Self> {
        let io = IoUring::builder().dontfork().build(8)?;
        io.submitter().register_files_sparse(2)?;
        let (loopback, everywhere) = (family.loopback(), family.unspecified());
        let peer = UdpSocket::bind((loopback, 0))?;
        peer.set_read_timeout(Some(PATIENCE))?;
        let steps = Steps { unbinds: true, drains: true };
        Ok(Self { queues: Queues::new(io), family, loopback, everywhere, peer, steps })
    }

    /// Whether sockets that were connected are as good as those that never were.
    fn run(&mut self) -> Result<bool, Trace> {
        let [read, connected] = [self.open(0, self.loopback)?, self.open(1, self.everywhere)?];
        for new in [&read, &connected] {
            let is_free = new.imposed == Imposed::NOTHING;
            unless(is_free, "new sockets are given a device, a mark or a priority here")?;
        }
        self.leave_a_datagram(&read)?;
        self.leave_a_peer_and_an_error(&connected)?;
        self.unbind(&read)?;
        self.unbind(&connected)?;
        wait_for_grace_period()?;
        self.drain(&read)?;
        self.drain(&connected)?;
        self.is_like_new(&read, self.loopback)?;
        self.is_like_new(&connected, self.everywhere)?;
        self.has_forgotten_its_peer(&connected)
    }

    fn leave_a_datagram(&mut self, subject: &Subject) -> Result<(), Trace> {
        self.peer.send_to(b"late", subject.view.local_addr()?)?;
        // Is it there?
        subject.view.peek_from(&mut [0; 8])?;
        Ok(())
    }

    fn leave_a_peer_and_an_error(&mut self, subject: &Subject) -> Result<(), Trace> {
        let closed = UdpSocket::bind((self.loopback, 0))?.local_addr()?;
        subject.view.connect(closed)?;
        // The first error shows that they come; the second is left.
        subject.view.send(b"anybody?")?;
        let refused = subject.view.peek(&mut [0; 8]).map_err(|error| error.kind());
        if refused != Err(ErrorKind::ConnectionRefused) {
            return Err(io::Error::other("a closed port of loopback does not refuse").into());
        }
        subject.view.send(b"anybody?")?;
        Ok(())
    }

    /// Whether the next owner finds nothing but a new socket.
    fn is_like_new(&mut self, subject: &Subject, ip: IpAddr) -> Result<(), Trace> {
        let bind = Op::Bind(Box::new(self.bind_op(ip, Attempt::Recycled)));
        self.run_op(subject.slot, &bind)
            .map_err(|_| Trace::Left("an unbound socket cannot be bound again"))?;
        let is_as_new = Imposed::on(&subject.view)? == subject.imposed;
        unless(is_as_new, "its device, mark or priority is not that of a new socket")?;
        let error = subject.view.take_error()?;
        unless(error.is_none(), "a pending error is left")?;
        unless(subject.view.peer_addr().is_err(), "the peer is left")?;
        unless(subject.view.local_addr()?.ip() == ip, "the former address is left")?;
        let at = SocketAddr::new(self.loopback, subject.view.local_addr()?.port());
        self.peer.send_to(b"mine", at)?;
        let mut bytes = [0; 8];
        let (len, _) = subject.view.recv_from(&mut bytes)?;
        unless(&bytes[..len] == b"mine", "a datagram is left")?;
        // An owner that connects and disconnects leaves what it had bound to.
        subject.view.connect(self.peer.local_addr()?)?;
        self.disconnect(subject)?;
        unless(subject.view.local_addr()?.ip() == ip, "a disconnect does not restore the address")?;
        unless(subject.view.local_addr()?.port() == 0, "a disconnect does not give up the port")
    }

    /// Whether it hears others than the peer that it was connected to. IPv6 sockets do not: a disconnect leaves
    /// them the peer's address, which a loopback with one address cannot show, and `/proc/net/udp6` only at a
    /// cost that grows with the square of the machine's sockets.
    fn has_forgotten_its_peer(&mut self, subject: &Subject) -> Result<bool, Trace> {
        let IpAddr::V4(_) = self.loopback else { return Ok(false) };
        // A machine may have no more of the loopback network than one address.
        let Ok(stranger) = UdpSocket::bind((STRANGER, 0)) else { return Ok(false) };
        let bind = Op::Bind(Box::new(self.bind_op(self.everywhere, Attempt::Recycled)));
        self.run_op(subject.slot, &bind)?;
        let at = SocketAddr::new(self.loopback, subject.view.local_addr()?.port());
        if stranger.send_to(b"hello", at).is_err() {
            // A filter, say, that lets no more through than needs be.
            return Ok(false);
        }
        let heard = subject.view.recv_from(&mut [0; 8]);
        Ok(heard.is_ok_and(|(_, from)| Some(from) == stranger.local_addr().ok()))
    }

    // ---- what recycling does ----------------------------------------------------------------

    fn unbind(&mut self, subject: &Subject) -> Result<(), Trace> {
        if !self.steps.unbinds {
            return Ok(());
        }
        self.disconnect(subject)?;
        unless(subject.view.local_addr()?.port() == 0, "a disconnect does not give up the port")
    }

    fn disconnect(&mut self, subject: &Subject) -> io::Result<()> {
        self.run_op(subject.slot, &Op::Unbind).map(drop)
    }

    fn drain(&mut self, subject: &Subject) -> Result<(), Trace> {
        for _ in 0..DRAINS_MAX {
            if !self.steps.drains {
                return Ok(());
            }
            match self.run_op(subject.slot, &Op::Drain(None)) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                _ => {}
            }
        }
        Err(Trace::Left("a socket cannot be drained"))
    }

    // ---- operations -------------------------------------------------------------------------

    fn bind_op(&self, ip: IpAddr, attempt: Attempt) -> BindOp {
        let options =
            if self.family == Family::V6 { vec![SocketOption::V6ONLY] } else { Vec::new() };
        let mut bind = BindOp::new(self.family, options, SocketAddr::new(ip, 0));
        bind.attempt = attempt;
        bind
    }

    #[expect(unsafe_code, reason = "a descriptor number becomes an owner")]
    fn open(&mut self, slot: u32, ip: IpAddr) -> io::Result<Subject> {
        let slot = SlotIndex(slot);
        let bind = Op::Bind(Box::new(self.bind_op(ip, Attempt::New)));
        self.run_op(slot, &bind)?;
        let fd = self.run_op(slot, &Op::Install)?;
        // SAFETY: FIXED_FD_INSTALL has just made this descriptor, and nothing else owns it.
        let view = UdpSocket::from(unsafe { OwnedFd::from_raw_fd(fd) });
        view.set_read_timeout(Some(PATIENCE))?;
        let imposed = Imposed::on(&view)?;
        Ok(Subject { slot, view, imposed })
    }

    /// Runs an operation that completes once.
    fn run_op(&mut self, slot: SlotIndex, op: &Op) -> io::Result<i32> {
        let mut entries = Vec::new();
        op.write(slot, 0, std::ptr::null(), &mut entries);
        let result = self.queues.run_alone(&entries)?;
        if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::kernel_defaults::set_option;

    fn run(family: Family, steps: Steps) -> Result<bool, Trace> {
        SelfTest { steps, ..SelfTest::of(family).unwrap() }.run()
    }

    #[test]
    fn every_step_of_recycling_is_needed_and_together_they_leave_nothing() {
        for family in [Family::V4, Family::V6] {
            let all = Steps { unbinds: true, drains: true };
            assert_eq!(run(family, all).unwrap(), family == Family::V4, "also if connected");
            let undrained = run(family, Steps { drains: false, ..all });
            assert!(matches!(undrained, Err(Trace::Left(_))), "{undrained:?}");
            let bound = run(family, Steps { unbinds: false, ..all });
            assert!(matches!(bound, Err(Trace::Left(_))), "{bound:?}");
        }
    }

    #[test]
    fn a_device_a_mark_or_a_priority_that_a_new_socket_has_not_is_found() {
        let loopback = 1;
        for (name, value) in
            [(libc::SO_BINDTOIFINDEX, loopback), (libc::SO_MARK, 7), (libc::SO_PRIORITY, 7)]
        {
            let mut test = SelfTest::of(Family::V4).unwrap();
            let subject = test.open(0, test.loopback).unwrap();
            test.unbind(&subject).unwrap();
            set_option(&subject.view, libc::SOL_SOCKET, name, value).expect("tests are root's");
            let found = test.is_like_new(&subject, test.loopback);
            assert!(
                matches!(found, Err(Trace::Left(what)) if what.contains("device")),
                "{found:?}"
            );
        }
    }

    #[test]
    fn nothing_is_recycled_on_a_preempt_rt_kernel() {
        let here = kernel_version();
        assert!(here.starts_with('#') && !here.ends_with('\0'), "{here:?}");
        let support = family_support(Family::V4, "#1 SMP PREEMPT_RT Debian 6.12.48-1");
        assert_eq!(support, FamilySupport::Unsupported("this is a PREEMPT_RT kernel".to_owned()));
        let support = family_support(Family::V4, "#1 SMP PREEMPT_DYNAMIC Debian 6.12.48-1");
        let is_refused = |why: &str| why.contains("PREEMPT_RT");
        assert!(
            !matches!(&support, FamilySupport::Unsupported(why) if is_refused(why)),
            "{support:?}"
        );
    }
}
