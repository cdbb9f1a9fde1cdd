//! The CPU time of a thread, for other threads to read.

use std::io;
use std::mem::MaybeUninit;
use std::time::Duration;

/// How long a thread has run (`pthread_getcpuclockid(3)`).
#[derive(Clone, Copy, Debug)]
pub(crate) struct ThreadClock(libc::clockid_t);

impl ThreadClock {
    /// The calling thread's.
    #[expect(unsafe_code, reason = "pthread_self(3) and pthread_getcpuclockid(3)")]
    pub(crate) fn current() -> io::Result<Self> {
        let mut clock = 0;
        // SAFETY: it takes nothing.
        let thread = unsafe { libc::pthread_self() };
        // SAFETY: the thread runs, and `clock` is written to meanwhile only.
        let errno = unsafe { libc::pthread_getcpuclockid(thread, &raw mut clock) };
        if errno == 0 { Ok(Self(clock)) } else { Err(io::Error::from_raw_os_error(errno)) }
    }

    /// `None` if the thread has exited. (Its number may be a later thread's: that is of this process, too.)
    #[expect(unsafe_code, reason = "clock_gettime(2)")]
    pub(crate) fn time(self) -> Option<Duration> {
        let mut time = MaybeUninit::<libc::timespec>::uninit();
        // SAFETY: it writes to `time` alone.
        if unsafe { libc::clock_gettime(self.0, time.as_mut_ptr()) } != 0 {
            return None;
        }
        // SAFETY: it has succeeded, and so has written it. (`a_thread_that_computes_is_told_from_one_that_sleeps`
        // reads it.)
        let time = unsafe { time.assume_init() };
        Some(Duration::new(time.tv_sec.try_into().ok()?, time.tv_nsec.try_into().ok()?))
    }
}
