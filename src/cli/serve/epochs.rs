//! The clock of guests that compute: it has them yield to others, and to their own deadline.

use std::sync::Arc;
use std::thread::Thread;
use std::time::Duration;

use tokio::sync::Semaphore;
use wasmtime::error::Context;
use wasmtime::{Engine, Store, UpdateDeadline};

use crate::terminal::Failure;

/// Between two ticks. A guest that computes gives its thread to others as often.
const TICK: Duration = Duration::from_millis(5);

/// Ticks while there are guests.
pub(super) struct Epochs {
    thread: Thread,
}

impl Epochs {
    /// Each guest has one of so many permits. The thread ends with the engine, at its next tick.
    pub(super) fn new(
        engine: &Engine,
        permits: Arc<Semaphore>,
        permits_max: usize,
    ) -> Result<Self, Failure> {
        let engine = engine.weak();
        let ticks = move || {
            loop {
                if permits.available_permits() == permits_max {
                    std::thread::park();
                }
                std::thread::sleep(TICK);
                match engine.upgrade() {
                    Some(engine) => engine.increment_epoch(),
                    None => return,
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("epochs".to_owned())
            .spawn(ticks)
            .context("cannot start a thread")
            .map_err(Failure::run)?;
        Ok(Self { thread: thread.thread().clone() })
    }

    /// There is a guest, which has its permit already.
    pub(super) fn wake(&self) {
        self.thread.unpark();
    }
}

/// From now on the store's guest yields at every tick.
pub(super) fn yields<T: 'static>(store: &mut Store<T>) {
    // By tokio's own yield: the runtime looks at sockets and timers before it goes on. By Wasmtime's the guest is only put
    // behind those that are ready, and tokio looks every 61 polls: with two guests that computed on one thread, others were
    // answered after 500 ms instead of 13.
    store.epoch_deadline_callback(|_| {
        Ok(UpdateDeadline::YieldCustom(1, Box::pin(tokio::task::yield_now())))
    });
    store.set_epoch_deadline(1);
}
