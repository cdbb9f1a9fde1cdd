//! Which process this is. A ring's memory is shared with the kernel and not copied by fork(2)
//! (`MADV_DONTFORK`), and a lock may have been another thread's: so a fork of the process that built a ring
//! must touch neither.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::mapping::Mapping;

/// A process of all those that one became by forks.
#[derive(Clone, Copy)]
pub(crate) struct Process {
    /// The number of the process that reads it; 0 in a fork that has built no ring.
    current: &'static AtomicU64,
    number: u64,
}

impl Process {
    /// The running one.
    pub(crate) fn current() -> io::Result<Self> {
        /// Copied by forks, so a fork's number is another than its parent's.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let current = page()?;
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let number = match current.compare_exchange(0, next, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_none_before) => next,
            Err(number) => number,
        };
        Ok(Self { current, number })
    }

    /// Whether the process that runs is this one, and no fork of it.
    pub(crate) fn is_current(&self) -> bool {
        self.current.load(Ordering::Relaxed) == self.number
    }
}

/// A number that is 0 in every new process: the kernel wipes its page when it forks.
#[expect(unsafe_code, reason = "memory that lives as long as the process")]
fn page() -> io::Result<&'static AtomicU64> {
    static PAGE: OnceLock<&'static AtomicU64> = OnceLock::new();
    if let Some(page) = PAGE.get() {
        return Ok(page);
    }
    let mapping = Mapping::anonymous(size_of::<AtomicU64>())?;
    mapping.advise(libc::MADV_WIPEONFORK)?;
    let start = mapping.start.cast::<u64>();
    Ok(PAGE.get_or_init(|| {
        std::mem::forget(mapping);
        // SAFETY: the mapping is page-aligned, zeroed, never unmapped, and used by atomics alone.
        // (`a_fork_of_the_process_gets_errors_and_its_drops_are_harmless` is the test.)
        unsafe { AtomicU64::from_ptr(start) }
    }))
}
