//! A timer for `driver::interleaved`: once it is set it expires whenever its thread comes to run, and it is
//! then as late.

use std::io;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use shuttle::sync::{Condvar, Mutex};
use shuttle::thread;

use crate::clock;

#[derive(Debug)]
pub(crate) struct Timer {
    expires_at: Mutex<Option<Instant>>,
    is_set: Condvar,
}

impl Timer {
    #[expect(clippy::unnecessary_wraps, reason = "as the system's")]
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { expires_at: Mutex::new(None), is_set: Condvar::new() })
    }

    pub(crate) fn set(&self, after: Option<Duration>) {
        let expires_at = after.map(|after| clock::now() + after);
        *self.expires_at.lock().unwrap_or_else(PoisonError::into_inner) = expires_at;
        self.is_set.notify_all();
    }

    #[expect(clippy::unnecessary_wraps, reason = "as the system's")]
    pub(crate) fn wait(&self) -> io::Result<()> {
        // A thread that waits again and again leaves the others some time.
        thread::yield_now();
        let mut expires_at = self.expires_at.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(at) = expires_at.take() {
                clock::played::pass(at.saturating_duration_since(clock::now()));
                return Ok(());
            }
            expires_at = self.is_set.wait(expires_at).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
