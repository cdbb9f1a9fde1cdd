//! What may exist at once: a number of sockets, on each of some nested levels; and the bytes of datagrams
//! that wait, those received for a guest and those it sends for send buffer.

use std::sync::Arc;

use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// A number of sockets that guests may have open at once: those of a tenant, of an app, of a host, as far
/// as the host gives it to their configurations
/// ([`UdpCtxBuilder::quota`](crate::UdpCtxBuilder::quota)).
///
/// It refuses at once when it is used up, and never waits. A unit comes back when the guest drops the socket, or
/// when the last of its sends that wait for send buffer has ended; the kernel may take some more time to close it. (That is
/// counted in [`UringBuilder::sockets`](crate::UringBuilder::sockets).) Clones are the same quota.
///
/// ```
/// use wasi_uring::Quota;
///
/// let host = Quota::new(10_000);
/// let app = Quota::within(&host, 1_000); // no more than the host has left, either
/// assert_eq!((app.capacity(), app.in_use(), host.in_use()), (1_000, 0, 0));
/// ```
#[derive(Clone, Debug)]
pub struct Quota(Arc<Level>);

impl Quota {
    /// A quota of so many sockets; 0 refuses all.
    #[must_use]
    pub fn new(capacity: u32) -> Self {
        Self(Arc::new(Level::new(capacity, None)))
    }

    /// A quota of so many of another's sockets: what is taken from it is taken from both, or from none.
    #[must_use]
    pub fn within(parent: &Self, capacity: u32) -> Self {
        Self(Arc::new(Level::new(capacity, Some(parent.clone()))))
    }

    /// Sockets that it allows.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.0.capacity
    }

    /// Sockets open now, those included that are dropped and have sends that wait.
    #[must_use]
    pub fn in_use(&self) -> u64 {
        self.0.in_use()
    }

    /// Sockets that were refused because this quota, and none within it, was used up.
    #[must_use]
    pub fn refusals(&self) -> u64 {
        self.0.refusals.load(Ordering::Relaxed)
    }
}

/// One of the quotas that a socket is counted in.
///
/// Two counters that only grow, one for each side; the units in use are their difference.
#[derive(Debug)]
pub(crate) struct Level {
    taken: AtomicU64,
    returned: AtomicU64,
    capacity: u64,
    refusals: AtomicU64,
    parent: Option<Quota>,
}

impl Level {
    /// Whether sockets of other guests are counted in it.
    pub(crate) fn is_shared(&self) -> bool {
        self.parent.is_some()
    }

    pub(crate) fn new(capacity: u32, parent: Option<Quota>) -> Self {
        Self {
            taken: AtomicU64::new(0),
            returned: AtomicU64::new(0),
            capacity: capacity.into(),
            refusals: AtomicU64::new(0),
            parent,
        }
    }

    fn has_unit_beside(&self, taken: u64) -> bool {
        // Acquire: what the thread did that returned a unit is seen by the one that takes it.
        taken.saturating_sub(self.returned.load(Ordering::Acquire)) < self.capacity
    }

    /// Takes a unit of this level and of those around it; else the level that is used up. (A unit that is put
    /// back because of another level may refuse a third thread's, which that level would have refused.)
    fn take(&self) -> Result<(), &Self> {
        let one_more = |taken: u64| self.has_unit_beside(taken).then_some(taken + 1);
        let taken = self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more);
        taken.map_err(|_| self)?;
        self.take_around().inspect_err(|_| self.put_back_own())
    }

    fn take_around(&self) -> Result<(), &Self> {
        self.parent.as_ref().map_or(Ok(()), |parent| parent.0.take())
    }

    /// As `take`, without an atomic read-modify-write on this level: for a caller that is the only one to take
    /// from it. A guest's calls come one after the other, and each that creates a socket borrows its `UdpCtx`
    /// mutably.
    #[inline]
    pub(crate) fn take_exclusive(&self) -> Result<(), &Self> {
        let taken = self.taken.load(Ordering::Relaxed);
        if !self.has_unit_beside(taken) {
            return Err(self);
        }
        self.take_around()?;
        self.taken.store(taken + 1, Ordering::Relaxed);
        Ok(())
    }

    /// A socket is refused, because this level is used up.
    pub(crate) fn refuse(&self) {
        self.refusals.fetch_add(1, Ordering::Relaxed);
    }

    fn put_back_own(&self) {
        self.returned.fetch_add(1, Ordering::Release);
    }

    /// Returns a unit, on all levels.
    #[inline]
    pub(crate) fn put_back(&self) {
        self.put_back_own();
        let mut around = &self.parent;
        while let Some(Quota(level)) = around {
            level.put_back_own();
            around = &level.parent;
        }
    }

    /// Units in use now.
    pub(crate) fn in_use(&self) -> u64 {
        let returned = self.returned.load(Ordering::Acquire);
        self.taken.load(Ordering::Relaxed).saturating_sub(returned)
    }
}

/// Bytes that wait, of all sockets of a guest.
#[derive(Debug)]
pub(crate) struct ByteQuota {
    used: AtomicUsize,
    max: usize,
}

impl ByteQuota {
    pub(crate) fn new(max: usize) -> Self {
        Self { used: AtomicUsize::new(0), max }
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_quota_refuses_when_used_up_and_takes_units_back() {
        let level = Level::new(2, None);
        assert!(level.take_exclusive().is_ok() && level.take().is_ok());
        assert!(level.take_exclusive().is_err() && level.take().is_err());
        level.put_back();
        assert!(level.take().is_ok());
        assert_eq!(level.in_use(), 2);
    }

    #[test]
    fn the_level_that_is_used_up_refuses_and_those_within_it_keep_nothing() {
        let host = Quota::new(2);
        let (one, other) = (Quota::within(&host, 1), Quota::within(&host, 9));
        let guests = [&one, &other].map(|app| Level::new(9, Some(app.clone())));
        let refused_by = |guest: &Level, quota: &Quota| {
            guest.take_exclusive().is_err_and(|level| std::ptr::eq(level, &raw const *quota.0))
        };
        guests[0].take_exclusive().unwrap();
        assert!(refused_by(&guests[0], &one));
        guests[1].take_exclusive().unwrap();
        assert!(refused_by(&guests[1], &host));
        assert_eq!([&host, &one, &other].map(Quota::in_use), [2, 1, 1]);
        guests[0].put_back();
        guests[1].take_exclusive().unwrap();
        assert_eq!([&host, &one, &other].map(Quota::in_use), [2, 0, 2]);
    }

    proptest! {
        #![proptest_config(crate::regressions("tests/proptest-regressions/quota.txt"))]

        /// Kills: a level that keeps a unit that another has refused; one that is left out when units come back.
        #[test]
        fn every_level_counts_the_units_of_all_guests_within_it(
            capacities in proptest::array::uniform5(0_u32..4),
            steps in proptest::collection::vec((0..4_usize, any::<bool>()), 0..200),
        ) {
            let [host_max, app_maxes @ .., guest_max] = capacities;
            let host = Quota::new(host_max);
            let apps = app_maxes.map(|max| Quota::within(&host, max));
            // Two in one app, one in another, one in none.
            let parents = [Some(&apps[0]), Some(&apps[0]), Some(&apps[1]), None];
            let guests = parents.map(|parent| Level::new(guest_max, parent.cloned()));
            let mut held = [0_u64; 4];
            for (at, takes) in steps {
                if takes {
                    let has_room = held[at] < u64::from(guest_max)
                        && parents[at].is_none_or(|app| {
                            app.in_use() < app.capacity() && host.in_use() < host.capacity()
                        });
                    prop_assert_eq!(guests[at].take_exclusive().is_ok(), has_room);
                    held[at] += u64::from(has_room);
                } else if held[at] > 0 {
                    guests[at].put_back();
                    held[at] -= 1;
                }
                prop_assert_eq!(guests.each_ref().map(Level::in_use), held);
                let counted = [&host, &apps[0], &apps[1], &apps[2]].map(Quota::in_use);
                let [a, b, c, _] = held;
                prop_assert_eq!(counted, [a + b + c, a + b, c, 0]);
            }
        }
    }

    /// Kills: a nested unit that two threads have.
    #[test]
    fn threads_never_have_more_than_the_outermost_quota() {
        let host = Quota::new(2);
        let in_use = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let guest = Level::new(2, Some(Quota::within(&host, 2)));
                let in_use = &in_use;
                scope.spawn(move || {
                    for _ in 0..50_000 {
                        if guest.take_exclusive().is_ok() {
                            assert!(in_use.fetch_add(1, Ordering::SeqCst) < 2);
                            in_use.fetch_sub(1, Ordering::SeqCst);
                            guest.put_back();
                        }
                    }
                });
            }
        });
        assert_eq!(host.in_use(), 0);
    }
}
