//! A ring's share of its pool's sockets: so many may its guests have open at once.
//!
//! A share that is used up gains units that are nobody's, or that others do not use. No unit is ever in
//! two shares: one that is ceded was taken before, and so cannot be taken by its former holder.

use std::sync::Arc;

use crate::sync::atomic::{AtomicU64, Ordering};

/// Refuses at once when it is used up, and never waits.
///
/// Counters that only grow; the units in use are their difference.
#[derive(Debug)]
pub(crate) struct Share {
    gained: AtomicU64,
    taken: AtomicU64,
    returned: AtomicU64,
    /// Of those taken, by other shares.
    ceded: AtomicU64,
    /// Sockets that units were taken for, and that guests have got.
    created: AtomicU64,
}

impl Share {
    pub(crate) fn new(units: u32) -> Arc<Self> {
        Arc::new(Self {
            gained: AtomicU64::new(units.into()),
            taken: AtomicU64::new(0),
            returned: AtomicU64::new(0),
            ceded: AtomicU64::new(0),
            created: AtomicU64::new(0),
        })
    }

    /// Takes a unit; `false` if all are in use.
    #[inline]
    pub(crate) fn take(&self) -> bool {
        self.take_up_to(|unused| unused.min(1)) == 1
    }

    /// Takes as many as `wanted` makes of those not in use.
    fn take_up_to(&self, wanted: impl Fn(u64) -> u64) -> u64 {
        let mut taken = self.taken.load(Ordering::Relaxed);
        loop {
            // Acquire: what the thread did that returned a unit is seen by the one that takes it.
            let there = self.returned.load(Ordering::Acquire) + self.gained.load(Ordering::Acquire);
            let units = wanted(there.saturating_sub(taken));
            if units == 0 {
                return 0;
            }
            match self.taken.compare_exchange_weak(
                taken,
                taken + units,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => return units,
                Err(now) => taken = now,
            }
        }
    }

    /// Returns a unit.
    pub(crate) fn put_back(&self) {
        self.returned.fetch_add(1, Ordering::Release);
    }

    /// Gains units, as many as `wanted` makes of those that another share does not use; how many.
    pub(crate) fn gain(&self, from: &Self, wanted: impl Fn(u64) -> u64) -> u64 {
        let units = from.take_up_to(wanted);
        from.ceded.fetch_add(units, Ordering::Relaxed);
        self.gained.fetch_add(units, Ordering::Release);
        units
    }

    pub(crate) fn has_unused(&self) -> bool {
        self.held() > self.in_use()
    }

    /// Units that are this share's, in use or not.
    pub(crate) fn held(&self) -> u64 {
        self.gained.load(Ordering::Relaxed).saturating_sub(self.ceded.load(Ordering::Relaxed))
    }

    /// Units in use now. (Some more while another share gains some.)
    pub(crate) fn in_use(&self) -> u64 {
        let returned = self.returned.load(Ordering::Acquire);
        let ceded = self.ceded.load(Ordering::Relaxed);
        self.taken.load(Ordering::Relaxed).saturating_sub(returned + ceded)
    }

    /// A guest has got a socket for a unit.
    pub(crate) fn count_created(&self) {
        self.created.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn created(&self) -> u64 {
        self.created.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn a_share_refuses_when_used_up_and_takes_units_back() {
        let share = Share::new(2);
        assert!(share.take() && share.take());
        assert!(!share.take() && !share.take());
        share.put_back();
        assert!(share.take());
        assert_eq!((share.in_use(), share.held()), (2, 2));
    }

    #[test]
    fn what_is_ceded_was_not_in_use_and_cannot_be_taken_any_more() {
        let (from, to) = (Share::new(4), Share::new(0));
        assert!(from.take());
        assert_eq!(to.gain(&from, |unused| unused), 3);
        assert!(!from.take());
        assert_eq!((from.in_use(), from.held()), (1, 1));
        assert!(to.take() && to.take() && to.take() && !to.take());
        from.put_back();
        assert_eq!(to.gain(&from, |unused| unused), 1);
        assert_eq!((from.in_use(), from.held(), to.held()), (0, 0, 4));
    }

    /// Kills: a unit that two shares have, or none.
    #[test]
    fn threads_that_gain_from_each_other_never_have_more_than_there_is() {
        const UNITS: u64 = 3;
        let shares = [Share::new(3), Share::new(0)];
        let in_use = AtomicU64::new(0);
        thread::scope(|scope| {
            for (own, other) in [(0, 1), (1, 0)] {
                let (own, other, in_use) = (&shares[own], &shares[other], &in_use);
                scope.spawn(move || {
                    for _ in 0..100_000 {
                        if own.take()
                            || own.gain(other, |unused| unused.div_ceil(2)) > 0 && own.take()
                        {
                            assert!(in_use.fetch_add(1, Ordering::SeqCst) < UNITS);
                            in_use.fetch_sub(1, Ordering::SeqCst);
                            own.put_back();
                        }
                    }
                });
            }
        });
        assert_eq!(shares.iter().map(|share| share.held()).sum::<u64>(), UNITS);
        assert_eq!(shares.iter().map(|share| share.in_use()).sum::<u64>(), 0);
    }
}
