//! The eventfd that the kernel signals for a completion, while notifications are enabled.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// One that a runtime watches.
pub(crate) type WatchedEventFd = AsyncFd<Arc<File>>;

#[derive(Clone, Debug)]
pub(crate) struct EventFd(Arc<File>);

impl EventFd {
    #[expect(unsafe_code, reason = "eventfd(2)")]
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: eventfd(2) takes no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: eventfd(2) has just made this descriptor, and nothing else owns it.
        let file = unsafe { File::from_raw_fd(fd) };
        Ok(Self(Arc::new(file)))
    }

    /// Signals it as a completion does.
    pub(crate) fn signal(&self) {
        // It fails only where the counter is at its limit, which is signal enough.
        let _ = (&*self.0).write(&1_u64.to_ne_bytes());
    }

    /// Registers it with the current runtime, edge-triggered: the counter need not be read. (No duplicate,
    /// for which the process may have no descriptor left when a runtime's first guest comes.)
    #[expect(unsafe_code, reason = "tokio watches a descriptor number")]
    pub(crate) fn watch(&self) -> io::Result<WatchedEventFd> {
        // SAFETY: the `AsyncFd` shares in the descriptor, so its number stays open while it is watched.
        Ok(unsafe { AsyncFd::register_with_interest(Arc::clone(&self.0), Interest::READABLE) }?)
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
