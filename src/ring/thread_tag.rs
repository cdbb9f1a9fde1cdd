//! Which thread this is, in two bytes: a ring has thousands of slots that remember one.

use std::num::NonZeroU16;
use std::sync::atomic::{AtomicU16, Ordering};

/// Tells a thread from the 65,534 that ask for one before it and after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ThreadTag(NonZeroU16);

static LAST: AtomicU16 = AtomicU16::new(0);

thread_local! {
    static TAG: ThreadTag = ThreadTag::next();
}

impl ThreadTag {
    fn next() -> Self {
        let number = LAST.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        NonZeroU16::new(number).map_or_else(Self::next, Self)
    }

    pub(crate) fn current() -> Self {
        TAG.with(|tag| *tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_told_apart() {
        let here = ThreadTag::current();
        assert_eq!(here, ThreadTag::current());
        assert_ne!(std::thread::spawn(ThreadTag::current).join().unwrap(), here);
    }
}
