//! Enters that the kernel refuses: what is logged of them, when the next is tried, and when the guests that
//! wait are told.

use std::time::{Duration, Instant};

use crate::error::Errno;
use crate::limits::{REFUSAL_PATIENCE, REFUSAL_PAUSE, REFUSAL_PAUSE_MAX};

/// Refusals since the kernel has last taken entries.
#[derive(Default)]
pub(super) struct Refusals {
    in_a_row: u32,
    /// When the first of them was.
    since: Option<Instant>,
    told: Option<Errno>,
    /// Errnos that were logged, ever.
    logged: Vec<Errno>,
}

/// What a refusal leads to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) is_new: bool,
    pub(super) again_after: Duration,
    /// Guests that wait are to be woken and told: this has gone on for too long.
    pub(super) tells: bool,
}

impl Refusals {
    pub(super) fn count(&mut self, errno: Errno, now: Instant) -> Refused {
        let is_new = !self.logged.contains(&errno);
        if is_new {
            self.logged.push(errno);
        }
        let pause = REFUSAL_PAUSE.saturating_mul(1 << self.in_a_row.min(16));
        self.in_a_row += 1;
        let since = *self.since.get_or_insert(now);
        let tells = now.duration_since(since) >= REFUSAL_PATIENCE;
        if tells {
            self.told = Some(errno);
        }
        Refused { is_new, again_after: pause.min(REFUSAL_PAUSE_MAX), tells }
    }

    /// The kernel has taken entries.
    pub(super) fn end(&mut self) {
        if self.in_a_row > 0 {
            let logged = std::mem::take(&mut self.logged);
            *self = Self { logged, ..Self::default() };
        }
    }

    /// Whether the last enter was refused.
    pub(super) fn go_on(&self) -> bool {
        self.in_a_row > 0
    }

    /// What guests hear whose entries the kernel has not taken.
    pub(super) fn told(&self) -> Option<Errno> {
        self.told
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_MEMORY: Errno = Errno(libc::ENOMEM);

    #[test]
    fn the_next_try_is_later_each_time_up_to_a_tenth_of_a_second() {
        let mut refusals = Refusals::default();
        let now = Instant::now();
        let pauses: Vec<_> =
            (0..40).map(|_| refusals.count(NO_MEMORY, now).again_after.as_millis()).collect();
        assert_eq!(pauses[..8], [1, 2, 4, 8, 16, 32, 64, 100]);
        assert!(pauses[8..].iter().all(|pause| *pause == 100));
        refusals.end();
        assert_eq!(refusals.count(NO_MEMORY, now).again_after.as_millis(), 1);
    }

    /// Kills: guests that are told of four refusals within microseconds.
    #[test]
    fn guests_are_told_what_has_gone_on_for_a_tenth_of_a_second_and_until_it_ends() {
        let mut refusals = Refusals::default();
        let now = Instant::now();
        for millis in 0..100 {
            assert!(!refusals.count(NO_MEMORY, now + Duration::from_millis(millis)).tells);
        }
        assert_eq!((refusals.told(), refusals.go_on()), (None, true));
        assert!(refusals.count(NO_MEMORY, now + Duration::from_millis(100)).tells);
        assert_eq!(refusals.told(), Some(NO_MEMORY));
        refusals.end();
        assert_eq!((refusals.told(), refusals.go_on()), (None, false));
    }

    #[test]
    fn each_errno_is_logged_once() {
        let mut refusals = Refusals::default();
        let mut is_new = |errno| refusals.count(Errno(errno), Instant::now()).is_new;
        assert!(is_new(libc::ENOMEM) && is_new(libc::EPERM));
        assert!(!is_new(libc::ENOMEM) && !is_new(libc::EPERM));
    }
}
