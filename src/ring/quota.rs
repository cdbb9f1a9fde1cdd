//! What may exist at once: a number of sockets, of which a ring's table has one and every guest; and the
//! bytes of datagrams that wait, those received for a guest and those it sends for send buffer.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::clock;

/// Refuses at once when it is used up, and never waits.
///
/// Two counters that only grow, one for each side; the units in use are their difference.
#[derive(Debug)]
pub(crate) struct Quota {
    taken: AtomicU64,
    returned: AtomicU64,
    capacity: u64,
    /// When its guest was gone.
    forsaken: OnceLock<Instant>,
}

impl Quota {
    pub(crate) fn new(capacity: u32) -> Arc<Self> {
        Arc::new(Self {
            taken: AtomicU64::new(0),
            returned: AtomicU64::new(0),
            capacity: capacity.into(),
            forsaken: OnceLock::new(),
        })
    }

    /// Takes a unit; `false` if all are in use.
    pub(crate) fn take(&self) -> bool {
        let one_more = |taken: u64| {
            // Acquire: what the thread did that returned a unit is seen by the one that takes it.
            let in_use = taken.saturating_sub(self.returned.load(Ordering::Acquire));
            (in_use < self.capacity).then_some(taken + 1)
        };
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).is_ok()
    }

    /// As `take`, without an atomic read-modify-write: for a caller that is the only one to take. A
    /// guest's calls come one after the other, and each that creates a socket borrows its `UdpCtx`
    /// mutably.
    pub(crate) fn take_exclusive(&self) -> bool {
        let taken = self.taken.load(Ordering::Relaxed);
        let has_unit = taken.saturating_sub(self.returned.load(Ordering::Acquire)) < self.capacity;
        if has_unit {
            self.taken.store(taken + 1, Ordering::Relaxed);
        }
        has_unit
    }

    /// Returns a unit.
    pub(crate) fn put_back(&self) {
        self.returned.fetch_add(1, Ordering::Release);
    }

    /// Its guest is gone; the units in use are of what it has left.
    pub(crate) fn forsake(&self) {
        self.forsaken.get_or_init(clock::now);
    }

    /// How long its guest has been gone, if it is.
    pub(crate) fn forsaken_for(&self) -> Option<Duration> {
        self.forsaken.get().map(|then| clock::since(*then))
    }

    /// Units in use now.
    pub(crate) fn in_use(&self) -> u64 {
        let returned = self.returned.load(Ordering::Acquire);
        self.taken().saturating_sub(returned)
    }

    /// Units ever taken.
    pub(crate) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }
}

/// Bytes that wait, of all sockets of a guest.
#[derive(Debug)]
pub(crate) struct ByteQuota {
    pub(super) used: AtomicUsize,
    max: usize,
}

impl ByteQuota {
    pub(crate) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), max })
    }

    /// Takes bytes, be they there or not: the caller has asked before.
    pub(crate) fn take(&self, bytes: usize) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn put_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    #[cfg(test)]
    pub(crate) fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// From here on no more should come.
    pub(crate) fn is_half_used(&self) -> bool {
        self.used.load(Ordering::Relaxed) >= self.max.div_ceil(2)
    }

    /// From here on no more is taken.
    pub(crate) fn is_used_up(&self) -> bool {
        self.used.load(Ordering::Relaxed) >= self.max
    }
}

/// Bytes taken, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Charge {
    quota: Arc<ByteQuota>,
    bytes: usize,
}

impl Charge {
    pub(crate) fn new(quota: &Arc<ByteQuota>, bytes: usize) -> Self {
        quota.take(bytes);
        Self { quota: Arc::clone(quota), bytes }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.quota.put_back(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_refuses_when_used_up_and_takes_units_back() {
        let quota = Quota::new(2);
        assert!(quota.take() && quota.take());
        assert!(!quota.take() && !quota.take());
        quota.put_back();
        assert!(quota.take());
        assert_eq!((quota.in_use(), quota.taken()), (2, 3));
    }
}
