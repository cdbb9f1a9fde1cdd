//! What can go wrong: [`SetupError`] for the host that builds a ring, [`ErrorCode`] for the guest,
//! and the one table from the kernel's errnos to it.

use std::io;

/// A `wasi:sockets` error code: one for all that WASI 0.2 and 0.3 have names for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{self:?}")]
pub(crate) enum ErrorCode {
    AccessDenied,
    AddressInUse,
    AddressNotBindable,
    ConcurrencyConflict,
    ConnectionAborted,
    ConnectionRefused,
    ConnectionReset,
    DatagramTooLarge,
    InvalidArgument,
    InvalidState,
    NewSocketLimit,
    NotInProgress,
    NotSupported,
    OutOfMemory,
    RemoteUnreachable,
    Timeout,
    Unknown,
    /// No answer for a guest: its call traps.
    Gone(RingGone),
}

/// Why a guest's ring serves it no more. Its calls trap with this, which a host can
/// [`downcast`](wasmtime::Error::downcast_ref) their error to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingGone {
    /// The host has closed it.
    #[error("the host has closed the ring that this UDP socket is of (Uring::close)")]
    Closed,

    /// The process is a fork of the one that built it.
    #[error(
        "this process is a fork of the one that built the ring, and cannot use it: build one after \
         the fork"
    )]
    Forked,
}

impl From<RingGone> for Errno {
    /// Two errnos that the kernel does not answer to a UDP socket's operations.
    fn from(gone: RingGone) -> Self {
        match gone {
            RingGone::Closed => Self(libc::ESHUTDOWN),
            RingGone::Forked => Self(libc::EOWNERDEAD),
        }
    }
}

impl From<RingGone> for ErrorCode {
    fn from(gone: RingGone) -> Self {
        Self::Gone(gone)
    }
}

/// A positive errno of the kernel, or of this crate ([`RingGone`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Errno(pub(crate) i32);

impl From<Errno> for ErrorCode {
    /// The one errno table: wasmtime-wasi 48's (`sockets/mod.rs`), and `new-socket-limit` where the
    /// system's own limits are reached, which WASI 0.2 has a name for. It traces, so it is not to be
    /// called under a lock.
    fn from(Errno(errno): Errno) -> Self {
        match errno {
            libc::ESHUTDOWN => Self::Gone(RingGone::Closed),
            libc::EOWNERDEAD => Self::Gone(RingGone::Forked),
            libc::EPERM | libc::EACCES => Self::AccessDenied,
            libc::EADDRINUSE => Self::AddressInUse,
            libc::EADDRNOTAVAIL => Self::AddressNotBindable,
            libc::ETIMEDOUT => Self::Timeout,
            libc::ECONNREFUSED => Self::ConnectionRefused,
            libc::ECONNRESET => Self::ConnectionReset,
            libc::ECONNABORTED => Self::ConnectionAborted,
            libc::EINVAL => Self::InvalidArgument,
            libc::EHOSTUNREACH
            | libc::EHOSTDOWN
            | libc::ENETDOWN
            | libc::ENETUNREACH
            | libc::ENONET => Self::RemoteUnreachable,
            libc::EISCONN | libc::ENOTCONN | libc::EDESTADDRREQ => Self::InvalidState,
            libc::EMSGSIZE => Self::DatagramTooLarge,
            libc::ENOMEM | libc::ENOBUFS => Self::OutOfMemory,
            libc::ENFILE | libc::EMFILE => Self::NewSocketLimit,
            libc::EOPNOTSUPP
            | libc::ENOPROTOOPT
            | libc::EPFNOSUPPORT
            | libc::EPROTONOSUPPORT
            | libc::EPROTOTYPE
            | libc::ESOCKTNOSUPPORT
            | libc::EAFNOSUPPORT => Self::NotSupported,
            _ => {
                tracing::debug!(errno, "errno without a WASI error code");
                Self::Unknown
            }
        }
    }
}

/// Why a ring could not be built, and what to change. `wasi-uring doctor` checks every requirement
/// and shows the same for each.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// `io_uring_setup` is unknown to the kernel (`ENOSYS`).
    #[error(
        "this kernel has no io_uring (ENOSYS): it is older than 5.1, built without \
         CONFIG_IO_URING, or a sandbox hides it; use Linux {KERNEL_MIN} or newer"
    )]
    NoIoUring,

    /// The sysctl `kernel.io_uring_disabled` forbids it (`EPERM`).
    #[error(
        "io_uring is switched off by sysctl (EPERM): kernel.io_uring_disabled is {value}; \
         set it to 0, or with 1 add this process to the group in kernel.io_uring_group"
    )]
    DisabledBySysctl {
        /// The content of `/proc/sys/kernel/io_uring_disabled`: 1 or 2.
        value: u8,
    },

    /// A seccomp filter forbids it: `EPERM` or `EACCES` while a filter is in force, or `ENOSYS` of a kernel
    /// that has io_uring. Docker's profile answers the first, podman's the last.
    #[error(
        "io_uring is refused by a seccomp filter ({errno}): container runtimes block it by \
         default; allow io_uring_setup, io_uring_enter and io_uring_register in the profile \
         (`wasi-uring doctor --seccomp` does)"
    )]
    DeniedBySeccomp {
        /// The errno the filter returned.
        errno: io::Error,
    },

    /// Refused for another reason (`EPERM`, `EACCES`): a security module.
    #[error(
        "io_uring is refused ({errno}): look for a security module's policy (SELinux, AppArmor)"
    )]
    Denied {
        /// The errno of `io_uring_setup`.
        errno: io::Error,
    },

    /// The kernel has io_uring but not an operation that sockets need.
    #[error(
        "this kernel has io_uring, but not {operation}, which came with Linux {since}: use Linux \
         {KERNEL_MIN} or newer"
    )]
    MissingOperation {
        /// What is missing, by its name in the kernel's header.
        operation: &'static str,
        /// The first kernel that has it.
        since: &'static str,
    },

    /// The fixed-file tables of all rings that may be together are too small: none is larger than the soft
    /// `RLIMIT_NOFILE`.
    #[error(
        "{sockets} sockets do not fit the tables of {rings} rings under the soft open-files limit of \
         {limit}: raise it (`ulimit -n`, LimitNOFILE=, setrlimit) or ask for fewer sockets"
    )]
    TablesBeyondNofile {
        /// Sockets the builder was given.
        sockets: u32,
        /// Rings that may be.
        rings: usize,
        /// The soft `RLIMIT_NOFILE`.
        limit: u64,
    },

    /// Ring memory is charged to `RLIMIT_MEMLOCK`, and it is used up (`ENOMEM`).
    #[error(
        "no memory for the ring (ENOMEM): it is charged to the locked-memory limit of {limit} \
         bytes; raise it (`ulimit -l`, LimitMEMLOCK=) or grant CAP_IPC_LOCK"
    )]
    Memlock {
        /// The soft `RLIMIT_MEMLOCK` in bytes.
        limit: u64,
    },

    /// A builder value outside its range.
    #[error("{option} must be between {min} and {max}, not {value}")]
    OutOfRange {
        /// The builder's method.
        option: &'static str,
        /// The value it was given.
        value: u64,
        /// Smallest accepted value.
        min: u64,
        /// Largest accepted value.
        max: u64,
    },

    /// Any other failure of a set-up step.
    #[error("{step} failed: {errno}")]
    Io {
        /// The step.
        step: &'static str,
        /// The kernel's errno.
        errno: io::Error,
    },
}

/// The oldest kernel with every operation used: `IORING_OP_BIND` came with it.
pub const KERNEL_MIN: &str = "6.11";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errnos_that_guests_meet_have_their_wasi_names() {
        let code = |errno| ErrorCode::from(Errno(errno));
        assert_eq!(code(libc::EADDRINUSE), ErrorCode::AddressInUse);
        assert_eq!(code(libc::EADDRNOTAVAIL), ErrorCode::AddressNotBindable);
        assert_eq!(code(libc::EACCES), ErrorCode::AccessDenied);
        assert_eq!(code(libc::EMSGSIZE), ErrorCode::DatagramTooLarge);
        assert_eq!(code(libc::ECONNREFUSED), ErrorCode::ConnectionRefused);
        assert_eq!(code(libc::ENETUNREACH), ErrorCode::RemoteUnreachable);
        assert_eq!(code(libc::ENFILE), ErrorCode::NewSocketLimit);
        assert_eq!(code(libc::EAFNOSUPPORT), ErrorCode::NotSupported);
        assert_eq!(code(libc::EXDEV), ErrorCode::Unknown);
    }
}
