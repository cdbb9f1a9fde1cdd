//! The trial: before any ring keeps a socket, the leak is played on sockets of a ring of its own,
//! on the running kernel. What a former owner could leave behind is left behind on purpose.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use io_uring::IoUring;

use super::grace;
use super::op::{BindOp, Op, SocketOption};
use super::probe::run_alone;
use super::recycle::{Fitness, Soundness};
use super::slots::SlotIndex;
use crate::datagram::{Family, RawAddr};
use crate::limits::DRAINS_MAX;

/// How long what was sent over loopback may take.
const PATIENCE: Duration = Duration::from_secs(1);

/// What this kernel leaves of a socket's former owner. Tried once per process, unless something
/// else than the kernel has kept it from being tried: a namespace without loopback, say.
pub(crate) fn soundness() -> Soundness {
    static TRIED: Mutex<[Option<Fitness>; 2]> = Mutex::new([None, None]);
    let mut tried = TRIED.lock().unwrap_or_else(PoisonError::into_inner);
    let [v4, v6] = &mut *tried;
    Soundness { v4: fitness(Family::V4, v4), v6: fitness(Family::V6, v6) }
}

fn fitness(family: Family, tried: &mut Option<Fitness>) -> Fitness {
    if let Some(fitness) = tried {
        return fitness.clone();
    }
    let fitness = match Trial::of(family).map_err(Trace::from).and_then(|trial| trial.run()) {
        Ok(also_connected) => Fitness::Sound { also_connected },
        Err(Trace::Left(what)) => Fitness::Unsound(what.to_owned()),
        Err(Trace::Untried(error)) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            Fitness::Absent
        }
        Err(Trace::Untried(error)) => {
            return Fitness::Unsound(format!("could not be tried: {error}"));
        }
    };
    tried.insert(fitness).clone()
}

/// Why sockets of a family are not recycled.
#[derive(Debug)]
enum Trace {
    /// What the former owner has left.
    Left(&'static str),
    Untried(io::Error),
}

impl From<io::Error> for Trace {
    fn from(error: io::Error) -> Self {
        Self::Untried(error)
    }
}

fn unless(is_good: bool, left: &'static str) -> Result<(), Trace> {
    if is_good { Ok(()) } else { Err(Trace::Left(left)) }
}

/// Which steps of recycling are taken; all of them, but for the tests of the trial itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Steps {
    unbinds: bool,
    drains: bool,
}

struct Trial {
    io: IoUring,
    family: Family,
    loopback: IpAddr,
    everywhere: IpAddr,
    /// Somebody to talk to.
    peer: UdpSocket,
    steps: Steps,
}

/// A socket on the ring, and a descriptor of the same socket to look at it.
struct Subject {
    slot: SlotIndex,
    view: UdpSocket,
}

impl Trial {
    fn of(family: Family) -> io::Result<Self> {
        let io = IoUring::builder().dontfork().build(8)?;
        io.submitter().register_files_sparse(2)?;
        let (loopback, everywhere): (IpAddr, IpAddr) = match family {
            Family::V4 => (Ipv4Addr::LOCALHOST.into(), Ipv4Addr::UNSPECIFIED.into()),
            Family::V6 => (Ipv6Addr::LOCALHOST.into(), Ipv6Addr::UNSPECIFIED.into()),
        };
        let peer = UdpSocket::bind((loopback, 0))?;
        peer.set_read_timeout(Some(PATIENCE))?;
        let steps = Steps { unbinds: true, drains: true };
        Ok(Self { io, family, loopback, everywhere, peer, steps })
    }

    /// Whether sockets that were connected are as good as those that never were.
    fn run(&self) -> Result<bool, Trace> {
        let [read, connected] = [self.open(0, self.loopback)?, self.open(1, self.everywhere)?];
        self.leave_a_datagram(&read)?;
        self.leave_a_peer_and_an_error(&connected)?;
        self.unbind(&read)?;
        self.unbind(&connected)?;
        grace::wait()?;
        self.drain(&read)?;
        self.drain(&connected)?;
        self.is_like_new(&read, self.loopback)?;
        self.is_like_new(&connected, self.everywhere)?;
        Ok(self.has_forgotten_its_peer(&connected))
    }

    fn leave_a_datagram(&self, subject: &Subject) -> Result<(), Trace> {
        self.peer.send_to(b"late", subject.view.local_addr()?)?;
        // Is it there?
        subject.view.peek_from(&mut [0; 8])?;
        Ok(())
    }

    fn leave_a_peer_and_an_error(&self, subject: &Subject) -> Result<(), Trace> {
        let nobody = UdpSocket::bind((self.loopback, 0))?.local_addr()?;
        subject.view.connect(nobody)?;
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
    fn is_like_new(&self, subject: &Subject, ip: IpAddr) -> Result<(), Trace> {
        self.run_op(subject.slot, &Op::Bind(Box::new(self.bind_op(ip, true))))
            .map_err(|_| Trace::Left("an unbound socket cannot be bound again"))?;
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

    /// IPv6 sockets have been seen to hear nobody but their former peer. `/proc` tells, where a
    /// loopback with one address cannot.
    fn has_forgotten_its_peer(&self, subject: &Subject) -> bool {
        let table = match self.family {
            Family::V4 => "/proc/thread-self/net/udp",
            Family::V6 => "/proc/thread-self/net/udp6",
        };
        let bind = Op::Bind(Box::new(self.bind_op(self.everywhere, true)));
        if self.run_op(subject.slot, &bind).is_err() {
            return false;
        }
        let Ok(at) = subject.view.local_addr() else { return false };
        let Ok(table) = std::fs::read_to_string(table) else { return false };
        // Number, local and remote address.
        let (local, none) = (format!(":{:04X}", at.port()), ":0000");
        table.lines().any(|line| {
            let mut fields = line.split_whitespace().skip(1);
            let is_ours = fields.next().is_some_and(|field| field.ends_with(&local));
            let remote = fields.next().and_then(|field| field.strip_suffix(none));
            is_ours && remote.is_some_and(|ip| ip.bytes().all(|digit| digit == b'0'))
        })
    }

    // ---- what recycling does ----------------------------------------------------------------

    fn unbind(&self, subject: &Subject) -> Result<(), Trace> {
        if !self.steps.unbinds {
            return Ok(());
        }
        self.disconnect(subject)?;
        unless(subject.view.local_addr()?.port() == 0, "a disconnect does not give up the port")
    }

    fn disconnect(&self, subject: &Subject) -> io::Result<()> {
        let nobody = Op::Connect(Box::new(RawAddr::unspec()));
        self.run_op(subject.slot, &nobody).map(drop)
    }

    fn drain(&self, subject: &Subject) -> Result<(), Trace> {
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

    fn bind_op(&self, ip: IpAddr, is_recycled: bool) -> BindOp {
        let options =
            if self.family == Family::V6 { vec![SocketOption::V6ONLY] } else { Vec::new() };
        let mut bind = BindOp::new(self.family, options, SocketAddr::new(ip, 0));
        bind.is_recycled = is_recycled;
        bind
    }

    #[expect(unsafe_code, reason = "a descriptor number becomes an owner")]
    fn open(&self, slot: u32, ip: IpAddr) -> io::Result<Subject> {
        let slot = SlotIndex(slot);
        self.run_op(slot, &Op::Bind(Box::new(self.bind_op(ip, false))))?;
        let fd = self.run_op(slot, &Op::Install)?;
        // SAFETY: a descriptor just made for us alone.
        let view = UdpSocket::from(unsafe { OwnedFd::from_raw_fd(fd) });
        view.set_read_timeout(Some(PATIENCE))?;
        Ok(Subject { slot, view })
    }

    /// Runs an operation that completes once.
    fn run_op(&self, slot: SlotIndex, op: &Op) -> io::Result<i32> {
        let mut entries = Vec::new();
        op.write(slot, 0, std::ptr::null(), &mut entries);
        let result = run_alone(&self.io, &entries)?;
        if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial(family: Family, steps: Steps) -> Result<bool, Trace> {
        Trial { steps, ..Trial::of(family).unwrap() }.run()
    }

    #[test]
    fn every_step_of_recycling_is_needed_and_together_they_leave_nothing() {
        for family in [Family::V4, Family::V6] {
            let all = Steps { unbinds: true, drains: true };
            assert!(trial(family, all).is_ok());
            let undrained = trial(family, Steps { drains: false, ..all });
            assert!(matches!(undrained, Err(Trace::Left(_))), "{undrained:?}");
            let bound = trial(family, Steps { unbinds: false, ..all });
            assert!(matches!(bound, Err(Trace::Left(_))), "{bound:?}");
        }
    }
}
