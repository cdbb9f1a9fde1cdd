//! What the running kernel answers for sockets whose options no guest has set.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::datagram::Family;
use crate::error::SetupError;

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

    /// Queries plain sockets, once per ring.
    pub(crate) fn query() -> Result<Self, SetupError> {
        let query = |family| match FamilyDefaults::query(family) {
            Ok(defaults) => Ok(Some(defaults)),
            Err(errno) if errno.raw_os_error() == Some(libc::EAFNOSUPPORT) => Ok(None),
            Err(errno) => Err(SetupError::Io { step: "querying a socket's defaults", errno }),
        };
        Ok(Self { v4: query(Family::V4)?, v6: query(Family::V6)? })
    }
}

impl FamilyDefaults {
    fn query(family: Family) -> io::Result<Self> {
        let socket = plain_socket(family)?;
        let (level, name) = hop_limit_option(family);
        let hop_limit = get_option(&socket, level, name)?;
        Ok(Self {
            hop_limit: u8::try_from(hop_limit).unwrap_or(u8::MAX),
            receive_buffer: BufferSizes::query(&socket, libc::SO_RCVBUF)?,
            send_buffer: BufferSizes::query(&socket, libc::SO_SNDBUF)?,
        })
    }
}

impl BufferSizes {
    fn query(socket: &OwnedFd, name: libc::c_int) -> io::Result<Self> {
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

#[expect(unsafe_code, reason = "socket(2)")]
pub(super) fn plain_socket(family: Family) -> io::Result<OwnedFd> {
    // SAFETY: socket(2) takes no pointers.
    let fd = unsafe { libc::socket(family.domain(), libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: socket(2) has just made this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[expect(unsafe_code, reason = "getsockopt(2)")]
pub(super) fn get_option(
    socket: &impl AsRawFd,
    level: libc::c_int,
    name: libc::c_int,
) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len: libc::socklen_t = 4;
    // SAFETY: both pointers are to locals, of the size and type that getsockopt(2) writes.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut len)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

#[expect(unsafe_code, reason = "setsockopt(2)")]
pub(super) fn set_option(
    socket: &impl AsRawFd,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    // SAFETY: the pointer is to a local of the four bytes that setsockopt(2) reads.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), 4) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recorded_buffer_sizes_are_answered_as_the_kernel_would() {
        let socket = plain_socket(Family::V4).unwrap();
        for name in [libc::SO_RCVBUF, libc::SO_SNDBUF] {
            let sizes = BufferSizes::query(&plain_socket(Family::V4).unwrap(), name).unwrap();
            for value in [1, 100, 4096, 4097, 65_536, 1_000_000, i32::MAX] {
                set_option(&socket, libc::SOL_SOCKET, name, value).unwrap();
                let kernel = get_option(&socket, libc::SOL_SOCKET, name).unwrap();
                let ours = sizes.reported(Some(value.unsigned_abs()));
                assert_eq!(ours, u64::from(kernel.unsigned_abs() / 2), "{name} {value}");
            }
        }
    }
}
