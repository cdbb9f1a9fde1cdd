//! The kernel's keys for `UDP_GRO`, kept on.
//!
//! They are static keys, one for IPv4 and one for IPv6, in all network namespaces together. The first socket
//! that sets the option and the close of the last rewrite kernel text, for which every processor is
//! interrupted: measured, the life of a socket with it takes 104 µs then (204 with IPv6), and 6 while
//! there is another. So a process whose guests receive in bursts has one more socket with it, which is
//! bound to nothing. One of IPv6 keeps both keys on.
//!
//! It is a descriptor, shared by all rings of the process. A slot of a ring's table would need none, but
//! one for each ring, and a table as large as `RLIMIT_NOFILE` has none to spare.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, TryLockError, Weak};

use super::kernel_defaults::{plain_socket, set_option};
use crate::datagram::Family;

/// A ring's share in that socket, once it has one. The last share closes it. (Until then it keeps the network
/// namespace alive of the thread that has had the first burst.)
#[derive(Debug, Default)]
pub(super) struct GroKey(Option<Arc<OwnedFd>>);

impl GroKey {
    /// Keeps the keys on, from now on. Where no socket can be had (no descriptor left, socket(2) forbidden
    /// since the ring was built), they go on and off with the guests' own, until the next time this is called.
    pub(super) fn hold(&mut self) {
        if self.0.is_none() {
            self.0 = share();
        }
    }
}

fn share() -> Option<Arc<OwnedFd>> {
    static SHARED: Mutex<Weak<OwnedFd>> = Mutex::new(Weak::new());
    let mut shared = match SHARED.try_lock() {
        Ok(shared) => shared,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        // Another ring's thread makes it now; or, in a fork, did so when the process was duplicated.
        Err(TryLockError::WouldBlock) => return None,
    };
    if let Some(socket) = shared.upgrade() {
        return Some(socket);
    }
    let made = plain_socket(Family::V6).or_else(|_no_ipv6| plain_socket(Family::V4));
    let on = made.and_then(|socket| {
        set_option(&socket, libc::SOL_UDP, libc::UDP_GRO, 1)?;
        Ok(Arc::new(socket))
    });
    let socket = on.ok()?;
    *shared = Arc::downgrade(&socket);
    Some(socket)
}
