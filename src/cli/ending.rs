//! How a process that is told to end ends: with its ports free.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use signal_hook::low_level::emulate_default_handler;
use wasi_uring::Uring;
use wasmtime::error::Context;

use crate::terminal::Failure;

/// Closes rings on SIGTERM and SIGINT, and then ends the process as these do; for as long as this lives.
/// A thread of its own does, because the guests may compute on all the others.
pub(crate) struct ClosesOnSignal {
    signals: Handle,
    thread: Option<JoinHandle<()>>,
    has_begun: Arc<AtomicBool>,
}

impl ClosesOnSignal {
    /// `None` where there is nothing to close.
    pub(crate) fn new(uring: Option<&Uring>) -> Result<Option<Self>, Failure> {
        let Some(uring) = uring.cloned() else { return Ok(None) };
        let mut signals = Signals::new([SIGINT, SIGTERM])
            .context("cannot watch for signals")
            .map_err(Failure::run)?;
        let handle = signals.handle();
        let has_begun = Arc::new(AtomicBool::new(false));
        let begins = Arc::clone(&has_begun);
        let thread = std::thread::spawn(move || {
            for signal in signals.forever() {
                begins.store(true, Ordering::Relaxed);
                uring.close();
                // It ends the process. If it cannot, the next signal tries.
                if emulate_default_handler(signal).is_err() {
                    begins.store(false, Ordering::Relaxed);
                }
            }
        });
        Ok(Some(Self { signals: handle, thread: Some(thread), has_begun }))
    }

    /// Waits for the end, if a signal has brought it: what guests then say of their ring is no news.
    pub(crate) fn wait_if_begun(&self) {
        while self.has_begun.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for ClosesOnSignal {
    /// The thread's handles are dropped when this returns: the rings end with those of the others.
    fn drop(&mut self) {
        self.signals.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
