//! A timer that can be set while another thread waits for it, without waking that thread.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd};
use std::time::Duration;

/// A timerfd(2), of which one expiry is waited for at a time.
#[derive(Debug)]
pub(crate) struct Timer(File);

impl Timer {
    #[expect(unsafe_code, reason = "timerfd_create(2)")]
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: timerfd_create(2) takes no pointers.
        let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: timerfd_create(2) has just made this descriptor, and nothing else owns it.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// Has it expire after this time, or not at all, instead of when it was to before.
    #[expect(unsafe_code, reason = "timerfd_settime(2)")]
    pub(crate) fn set(&self, after: Option<Duration>) {
        // Zero would stop it.
        let after = after.map_or(Duration::ZERO, |after| after.max(Duration::from_nanos(1)));
        let it_value = libc::timespec {
            tv_sec: after.as_secs().try_into().unwrap_or(libc::time_t::MAX),
            tv_nsec: after.subsec_nanos().into(),
        };
        let once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let spec = libc::itimerspec { it_interval: once, it_value };
        // SAFETY: `spec` is read during the call, and the old value has nowhere to go.
        unsafe {
            libc::timerfd_settime(self.0.as_raw_fd(), 0, &raw const spec, std::ptr::null_mut())
        };
    }

    /// Waits until it has expired.
    pub(crate) fn wait(&self) -> io::Result<()> {
        (&self.0).read_exact(&mut [0; size_of::<u64>()])
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_timer_that_is_waited_for_can_be_set_to_expire_sooner_and_to_not_expire() {
        let timer = Timer::new().unwrap();
        timer.set(Some(Duration::from_hours(1)));
        let (expired, has_expired) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let begun = Instant::now();
                timer.wait().unwrap();
                expired.send(begun.elapsed()).unwrap();
            });
            timer.set(None);
            timer.set(Some(Duration::ZERO));
            let after = has_expired.recv_timeout(Duration::from_mins(1)).unwrap();
            assert!(after < Duration::from_mins(1));
        });
        timer.set(Some(Duration::ZERO));
        timer.wait().unwrap();
        timer.set(Some(Duration::ZERO));
        timer.set(None);
        timer.set(Some(Duration::from_millis(1)));
        timer.wait().unwrap();
    }
}
