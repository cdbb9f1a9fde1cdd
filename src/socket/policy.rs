//! What a guest may do: the host's policy, and WASI's rules for addresses. Both are asked before any
//! operation is queued.

use std::borrow::Cow;
use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

pub use wasmtime_wasi::sockets::SocketAddrUse;

use crate::datagram::Family;
use crate::driver::Guest;

/// Why something is denied: the host's word, for its counters
/// ([`GuestStats::denials`](crate::GuestStats::denials)). The guest hears `access-denied`.
pub type Reason = Cow<'static, str>;

/// What a host decides about the sockets of its guests, where
/// [`allow`](crate::UdpCtxBuilder::allow) and
/// [`socket_addr_check`](crate::UdpCtxBuilder::socket_addr_check) do not know enough.
///
/// It is called inside the guest's calls, on the guest's thread, so it should decide and not wait; what has to
/// be waited for is a future ([`Verdict::ask`]). No lock of the rings is held meanwhile: it may read
/// counters and create sockets of other guests. One policy may serve many guests: an `Arc` of one is a policy.
pub trait Policy: Send + Sync {
    /// Whether the guest may use an address. Asked each time, for the uses and in the order that wasmtime-wasi's
    /// sockets have:
    ///
    /// - `UdpBind`: the address to bind to; unspecified, with port 0, where WASI 0.3 binds by itself.
    /// - `UdpSend`, then `UdpReceive`: the peer to connect to.
    /// - `UdpSend`: the destination of a datagram.
    /// - `UdpReceive`: the sender of a datagram, when the guest is about to get it. What is denied is
    ///   dropped, and nobody told.
    fn check(&self, event: &AddrEvent) -> Verdict;

    /// The guest is about to get a socket, for which there is room in all quotas.
    ///
    /// # Errors
    ///
    /// Why it gets none.
    fn socket_created(&self, socket: SocketId) -> Result<(), Reason> {
        let _ = socket;
        Ok(())
    }

    /// A socket that [`socket_created`](Self::socket_created) has let the guest have is dropped, by the guest or
    /// with its store: perhaps outside of any runtime, and while a panic unwinds. So it must not panic, which
    /// could abort the process. (Not called in a fork of the host's process.)
    fn socket_dropped(&self, socket: SocketId) {
        let _ = socket;
    }
}

impl<P: Policy + ?Sized> Policy for Arc<P> {
    fn check(&self, event: &AddrEvent) -> Verdict {
        (**self).check(event)
    }

    fn socket_created(&self, socket: SocketId) -> Result<(), Reason> {
        (**self).socket_created(socket)
    }

    fn socket_dropped(&self, socket: SocketId) {
        (**self).socket_dropped(socket);
    }
}

/// Names a socket among those of all guests of this process, ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SocketId {
    guest: Guest,
    number: u64,
}

impl SocketId {
    pub(crate) fn new(guest: Guest, number: u64) -> Self {
        Self { guest, number }
    }
}

impl fmt::Display for SocketId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.guest, self.number)
    }
}

/// The use of an address that a [`Policy`] is asked about.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct AddrEvent {
    /// Whose.
    pub socket: SocketId,
    /// What for.
    pub addr_use: SocketAddrUse,
    /// The address to bind to, or the other end's.
    pub addr: SocketAddr,
    /// Of a bind: the guest has not asked for it, but connects or sends without one (WASI 0.3).
    pub is_implicit: bool,
    /// Where the socket is bound, if it is, as far as the kernel need not be asked: what the guest has bound it to,
    /// with port 0 where the kernel has chosen one; or the address that the kernel has given it, if the guest has
    /// asked for that since its last connect.
    pub local_addr: Option<SocketAddr>,
}

/// What a [`Policy`] makes of an [`AddrEvent`].
pub enum Verdict {
    /// The guest may.
    Allow,
    /// It may not. At most [`DENIAL_REASONS_MAX`](crate::limits::DENIAL_REASONS_MAX) reasons are told apart, so they
    /// should name rules, not addresses.
    Deny(Reason),
    /// That is still to be found out: [`Verdict::ask`].
    Ask(Pin<Box<dyn Future<Output = Self> + Send>>),
}

impl Verdict {
    /// The guest may not.
    pub fn deny(reason: impl Into<Reason>) -> Self {
        Self::Deny(reason.into())
    }

    /// A verdict that may have to be waited for. The guest's call goes on when the future is ready, and if it is
    /// ready at once costs no suspension.
    ///
    /// Datagrams that arrive wait for the verdict about their sender in the order in which they came: the first
    /// is asked about, the others wait in the socket's queue, within its bounds, and in the kernel's buffer. For
    /// WASI 0.2, where `receive` looks without waiting, one that is asked about is not there yet. The
    /// future is dropped before it is ready if the socket is dropped, or connected anew: then it is asked again.
    pub fn ask(verdict: impl Future<Output = Self> + Send + 'static) -> Self {
        Self::Ask(Box::pin(verdict))
    }
}

impl fmt::Debug for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allow => f.write_str("Allow"),
            Self::Deny(reason) => f.debug_tuple("Deny").field(reason).finish(),
            Self::Ask(_) => f.write_str("Ask(..)"),
        }
    }
}

type Allow = dyn Fn(SocketAddr, SocketAddrUse) -> bool + Send + Sync;
type AddrCheck = dyn Fn(SocketAddr, SocketAddrUse) -> AddrChecked + Send + Sync;

/// What wasmtime-wasi's address check returns.
type AddrChecked = Pin<Box<dyn Future<Output = bool> + Send + Sync>>;

/// Why a guest has no UDP to which its host has given no policy.
const NO_POLICY: Reason = Cow::Borrowed("no UDP");
/// What a check that only says no is counted as.
const BY_CHECK: Reason = Cow::Borrowed("address check");

/// Whom a guest's sockets ask.
#[derive(Clone, Default)]
pub(crate) enum Checks {
    /// UDP is refused as a whole.
    #[default]
    None,
    Allow(Arc<Allow>),
    AddrCheck(Arc<AddrCheck>),
    Policy(Arc<dyn Policy>),
}

/// An answer, or what will be one.
pub(crate) enum Judged {
    Now(Result<(), Reason>),
    Asked(Question),
}

/// A verdict that the host may still have to find. It is the host's code: no lock is held while it is polled
/// or dropped.
pub(crate) enum Question {
    AddrCheck(AddrChecked),
    Verdict(Pin<Box<dyn Future<Output = Verdict> + Send>>),
}

impl Judged {
    /// The answer, if the host finds it at once. Else the question is to be polled again: this wakes nobody.
    pub(crate) fn at_once(self) -> Self {
        self.poll_once(&mut Context::from_waker(Waker::noop()))
    }

    /// The answer, if the host has found it.
    pub(crate) fn poll_once(self, cx: &mut Context<'_>) -> Self {
        let Self::Asked(mut question) = self else { return self };
        match Pin::new(&mut question).poll(cx) {
            Poll::Ready(answer) => Self::Now(answer),
            Poll::Pending => Self::Asked(question),
        }
    }
}

impl Checks {
    pub(crate) fn allow(
        allow: impl Fn(SocketAddr, SocketAddrUse) -> bool + Send + Sync + 'static,
    ) -> Self {
        Self::Allow(Arc::new(allow))
    }

    pub(crate) fn addr_check(
        check: impl Fn(SocketAddr, SocketAddrUse) -> AddrChecked + Send + Sync + 'static,
    ) -> Self {
        Self::AddrCheck(Arc::new(check))
    }

    /// Whether the guest may have UDP sockets at all.
    pub(crate) fn udp(&self) -> Result<(), Reason> {
        if matches!(self, Self::None) { Err(NO_POLICY) } else { Ok(()) }
    }

    /// Whether it is told where sockets are bound.
    pub(crate) fn hears_local_addr(&self) -> bool {
        matches!(self, Self::Policy(_))
    }

    pub(crate) fn socket_created(&self, socket: SocketId) -> Result<(), Reason> {
        match self {
            Self::Policy(policy) => policy.socket_created(socket),
            Self::None | Self::Allow(_) | Self::AddrCheck(_) => Ok(()),
        }
    }

    pub(crate) fn socket_dropped(&self, socket: SocketId) {
        match self {
            Self::Policy(policy) => policy.socket_dropped(socket),
            Self::None | Self::Allow(_) | Self::AddrCheck(_) => {}
        }
    }

    /// Runs the host's code, so not to be called under a lock. `event`: only made for a policy.
    #[inline]
    pub(crate) fn judge(
        &self,
        addr: SocketAddr,
        addr_use: SocketAddrUse,
        event: impl FnOnce() -> AddrEvent,
    ) -> Judged {
        match self {
            Self::None => Judged::Now(Err(NO_POLICY)),
            Self::Allow(allow) => {
                Judged::Now(if allow(addr, addr_use) { Ok(()) } else { Err(BY_CHECK) })
            }
            Self::AddrCheck(check) => Judged::Asked(Question::AddrCheck(check(addr, addr_use))),
            Self::Policy(policy) => match policy.check(&event()) {
                Verdict::Allow => Judged::Now(Ok(())),
                Verdict::Deny(reason) => Judged::Now(Err(reason)),
                Verdict::Ask(verdict) => Judged::Asked(Question::Verdict(verdict)),
            },
        }
    }
}

impl fmt::Debug for Checks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Allow(_) => "Allow",
            Self::AddrCheck(_) => "AddrCheck",
            Self::Policy(_) => "Policy",
        })
    }
}

impl Future for Question {
    type Output = Result<(), Reason>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        loop {
            let verdict = match &mut *self {
                Self::AddrCheck(check) => {
                    let is_allowed = ready!(check.as_mut().poll(cx));
                    return Poll::Ready(if is_allowed { Ok(()) } else { Err(BY_CHECK) });
                }
                Self::Verdict(verdict) => ready!(verdict.as_mut().poll(cx)),
            };
            match verdict {
                Verdict::Allow => return Poll::Ready(Ok(())),
                Verdict::Deny(reason) => return Poll::Ready(Err(reason)),
                Verdict::Ask(verdict) => *self = Self::Verdict(verdict),
            }
        }
    }
}

/// Whether a socket of this family may use the address at all. IPv4-mapped addresses would
/// leave the family, and IPv4-compatible ones were deprecated by RFC 4291.
pub(crate) fn is_of_family(addr: SocketAddr, family: Family) -> bool {
    match (family, addr) {
        (Family::V4, SocketAddr::V4(_)) => true,
        (Family::V6, SocketAddr::V6(addr)) => {
            let ip = addr.ip();
            let compatible =
                ip.segments()[..6] == [0; 6] && !ip.is_unspecified() && !ip.is_loopback();
            !compatible && ip.to_ipv4_mapped().is_none()
        }
        (Family::V4, SocketAddr::V6(_)) | (Family::V6, SocketAddr::V4(_)) => false,
    }
}

/// Whether a datagram can be sent there: a real address and a real port.
pub(crate) fn is_remote(addr: SocketAddr) -> bool {
    !addr.ip().to_canonical().is_unspecified() && addr.port() != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_that_was_never_given_refuses_udp() {
        assert_eq!(Checks::default().udp(), Err(NO_POLICY));
        let addr = "127.0.0.1:1".parse().unwrap();
        let judged = Checks::default().judge(addr, SocketAddrUse::UdpBind, || unreachable!());
        assert!(matches!(judged, Judged::Now(Err(_))));
    }

    #[test]
    fn addresses_that_would_leave_the_family_are_refused() {
        let of = |text: &str, family| is_of_family(text.parse().unwrap(), family);
        assert!(of("127.0.0.1:1", Family::V4) && !of("127.0.0.1:1", Family::V6));
        assert!(
            of("[::1]:1", Family::V6) && of("[::]:0", Family::V6) && !of("[::1]:1", Family::V4)
        );
        assert!(!of("[::ffff:127.0.0.1]:1", Family::V6) && !of("[::127.0.0.1]:1", Family::V6));
        assert!(!is_remote("0.0.0.0:1".parse().unwrap()));
        assert!(!is_remote("127.0.0.1:0".parse().unwrap()));
    }
}
