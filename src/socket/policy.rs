//! Which addresses a guest may use: the host's policy, and WASI's rules. Both are checked before any
//! operation is queued.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

pub use wasmtime_wasi::sockets::SocketAddrUse;

use crate::datagram::Family;
use crate::error::ErrorCode;

type AddrCheck = dyn Fn(SocketAddr, SocketAddrUse) -> bool + Send + Sync;

/// The address check of one guest. `None` refuses UDP as a whole.
#[derive(Clone, Default)]
pub(crate) struct Policy(Option<Arc<AddrCheck>>);

impl Policy {
    pub(crate) fn new(
        allow: impl Fn(SocketAddr, SocketAddrUse) -> bool + Send + Sync + 'static,
    ) -> Self {
        Self(Some(Arc::new(allow)))
    }

    /// Whether the guest may have UDP sockets at all.
    pub(crate) fn udp(&self) -> Result<(), ErrorCode> {
        self.0.as_ref().map(|_| ()).ok_or(ErrorCode::AccessDenied)
    }

    /// Runs the host's code, so not to be called under a lock.
    pub(crate) fn check(&self, addr: SocketAddr, use_: SocketAddrUse) -> Result<(), ErrorCode> {
        match &self.0 {
            Some(allow) if allow(addr, use_) => Ok(()),
            Some(_) | None => Err(ErrorCode::AccessDenied),
        }
    }
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Policy(checked)" } else { "Policy(denied)" })
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
        assert_eq!(Policy::default().udp(), Err(ErrorCode::AccessDenied));
        let addr = "127.0.0.1:1".parse().unwrap();
        assert!(Policy::default().check(addr, SocketAddrUse::UdpBind).is_err());
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
