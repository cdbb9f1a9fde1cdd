//! The wire between Rust and the kernel's C structures: socket addresses out and in, and the
//! layout of a received message. Pure functions over bytes; nothing here makes a system call.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::ptr;

use crate::limits::{NAME_BYTES, RECEIVE_HEADER_BYTES};

/// The two families WASI knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) fn domain(self) -> libc::c_int {
        match self {
            Self::V4 => libc::AF_INET,
            Self::V6 => libc::AF_INET6,
        }
    }
}

/// A socket address as the kernel reads it.
pub(crate) enum RawAddr {
    V4(libc::sockaddr_in),
    V6(libc::sockaddr_in6),
    /// `AF_UNSPEC`: a connect to it dissolves the association (connect(2)).
    Unspec(libc::sockaddr_in),
}

impl RawAddr {
    pub(crate) fn unspec() -> Self {
        Self::Unspec(sockaddr_in(libc::AF_UNSPEC, SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0)))
    }

    pub(crate) fn as_ptr(&self) -> *const libc::sockaddr {
        match self {
            Self::V4(raw) | Self::Unspec(raw) => ptr::from_ref(raw).cast(),
            Self::V6(raw) => ptr::from_ref(raw).cast(),
        }
    }

    pub(crate) fn len(&self) -> libc::socklen_t {
        let bytes = match self {
            Self::V4(raw) | Self::Unspec(raw) => size_of_val(raw),
            Self::V6(raw) => size_of_val(raw),
        };
        libc::socklen_t::try_from(bytes).expect("a sockaddr is tens of bytes")
    }
}

impl From<SocketAddr> for RawAddr {
    fn from(addr: SocketAddr) -> Self {
        match addr {
            SocketAddr::V4(addr) => Self::V4(sockaddr_in(libc::AF_INET, addr)),
            SocketAddr::V6(addr) => Self::V6(libc::sockaddr_in6 {
                sin6_family: family_field(libc::AF_INET6),
                sin6_port: addr.port().to_be(),
                sin6_flowinfo: addr.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: addr.ip().octets() },
                sin6_scope_id: addr.scope_id(),
            }),
        }
    }
}

fn sockaddr_in(family: libc::c_int, addr: SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: family_field(family),
        sin_port: addr.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(addr.ip().octets()) },
        sin_zero: [0; 8],
    }
}

fn family_field(family: libc::c_int) -> libc::sa_family_t {
    libc::sa_family_t::try_from(family).expect("address families are small")
}

/// Reads the sender's address out of a received message.
///
/// `None` for anything that is not a whole IPv4 or IPv6 address: the bytes are the kernel's, but
/// reading them needs no trust.
pub(crate) fn decode_addr(name: &[u8]) -> Option<SocketAddr> {
    let family = u16::from_ne_bytes(field(name, 0)?);
    let port = u16::from_be_bytes(field(name, 2)?);
    match libc::c_int::from(family) {
        libc::AF_INET => {
            let ip: [u8; 4] = field(name, 4)?;
            Some(SocketAddr::V4(SocketAddrV4::new(ip.into(), port)))
        }
        libc::AF_INET6 => {
            let flowinfo = u32::from_ne_bytes(field(name, 4)?);
            let ip: [u8; 16] = field(name, 8)?;
            let scope_id = u32::from_ne_bytes(field(name, 24)?);
            Some(SocketAddr::V6(SocketAddrV6::new(ip.into(), port, flowinfo, scope_id)))
        }
        _ => None,
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// A received message, still in the ring's buffer.
#[derive(Debug)]
pub(crate) struct Received<'buffer> {
    pub(crate) from: SocketAddr,
    pub(crate) payload: &'buffer [u8],
}

/// The header a multishot recvmsg is armed with: it asks for the sender's address and for no
/// control data. The kernel copies it when the entry is prepared.
pub(crate) fn receive_header() -> libc::msghdr {
    libc::msghdr {
        msg_name: ptr::null_mut(),
        msg_namelen: libc::socklen_t::try_from(NAME_BYTES).expect("28"),
        msg_iov: ptr::null_mut(),
        msg_iovlen: 0,
        msg_control: ptr::null_mut(),
        msg_controllen: 0,
        msg_flags: 0,
    }
}

/// Splits a filled buffer into sender and payload: `struct io_uring_recvmsg_out`, room for the
/// name, the payload (`io_uring_prep_recvmsg_multishot(3)`).
///
/// `None` if the message was cut or its sender is not an IP address, neither of which a ring with
/// whole-datagram buffers should ever see.
pub(crate) fn parse_received(filled: &[u8]) -> Option<Received<'_>> {
    let name_len = u32::from_ne_bytes(field(filled, 0)?);
    let payload_len = u32::from_ne_bytes(field(filled, 8)?);
    let flags = u32::from_ne_bytes(field(filled, 12)?);
    if flags & libc::MSG_TRUNC.cast_unsigned() != 0 {
        return None;
    }
    let (name, payload) = filled.get(RECEIVE_HEADER_BYTES..)?.split_at_checked(NAME_BYTES)?;
    let from = decode_addr(name.get(..usize::try_from(name_len).ok()?)?)?;
    let payload = payload.get(..usize::try_from(payload_len).ok()?)?;
    Some(Received { from, payload })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes_of(raw: &RawAddr) -> Vec<u8> {
        // The same fields the kernel would copy, without reading through the raw pointer.
        match raw {
            RawAddr::V4(a) | RawAddr::Unspec(a) => [
                &a.sin_family.to_ne_bytes()[..],
                &a.sin_port.to_ne_bytes(),
                &a.sin_addr.s_addr.to_ne_bytes(),
                &a.sin_zero,
            ]
            .concat(),
            RawAddr::V6(a) => [
                &a.sin6_family.to_ne_bytes()[..],
                &a.sin6_port.to_ne_bytes(),
                &a.sin6_flowinfo.to_ne_bytes(),
                &a.sin6_addr.s6_addr,
                &a.sin6_scope_id.to_ne_bytes(),
            ]
            .concat(),
        }
    }

    proptest! {
        #[test]
        fn an_address_survives_the_kernels_layout(addr: SocketAddr) {
            let raw = RawAddr::from(addr);
            let bytes = bytes_of(&raw);
            prop_assert_eq!(bytes.len(), usize::try_from(raw.len()).unwrap());
            prop_assert_eq!(decode_addr(&bytes), Some(addr));
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_addr(&bytes);
            let _ = parse_received(&bytes);
        }
    }

    #[test]
    fn a_cut_message_is_refused() {
        let mut bytes = vec![0_u8; 16 + NAME_BYTES];
        bytes[0] = 16; // namelen
        bytes[16..18].copy_from_slice(&2_u16.to_ne_bytes()); // AF_INET
        assert!(parse_received(&bytes).is_some());
        bytes[12] = u8::try_from(libc::MSG_TRUNC).unwrap(); // flags
        assert!(parse_received(&bytes).is_none());
    }
}
