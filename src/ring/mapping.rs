//! Anonymous memory of our own.

use std::{io, ptr};

/// Zeroed, and paged in on demand.
pub(super) struct Mapping {
    pub(super) start: *mut libc::c_void,
    len: usize,
}

impl Mapping {
    #[expect(unsafe_code, reason = "mmap(2)")]
    pub(super) fn anonymous(len: usize) -> io::Result<Self> {
        // SAFETY: a new anonymous mapping touches no existing memory.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start, len })
    }

    /// madvise(2), with an advice that changes no content here.
    #[expect(unsafe_code, reason = "madvise(2)")]
    pub(super) fn advise(&self, advice: libc::c_int) -> io::Result<()> {
        debug_assert!([libc::MADV_NOHUGEPAGE, libc::MADV_WIPEONFORK].contains(&advice));
        // SAFETY: the range is the mapping made above, and neither advice changes what is in it.
        let result = unsafe { libc::madvise(self.start, self.len, advice) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl Drop for Mapping {
    #[expect(unsafe_code, reason = "munmap(2)")]
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `anonymous` and no reference into it outlives `self`.
        unsafe { libc::munmap(self.start, self.len) };
    }
}

// SAFETY: the mapping is owned memory; nothing about it is tied to a thread.
#[expect(unsafe_code, reason = "a raw pointer to memory we own")]
unsafe impl Send for Mapping {}
