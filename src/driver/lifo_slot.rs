//! tokio's LIFO slot, in which a worker of a multi-thread runtime keeps the task that it has woken last.
//!
//! It runs that task next, which suits a guest that asks another and then waits; and no other worker can
//! take it from there, so that it waits for as long as the guest computes that has woken it. (wasmtime-wasi's
//! guests are woken by tokio's I/O driver, most often from a worker that has nothing else to run.)

use crate::sync::runtime::{Handle, RuntimeFlavor, worker_index};

/// Has a task that lies in this worker's slot lie where others find it.
pub(super) fn vacate() {
    if cfg!(all(test, shuttle)) {
        // The workers are played, and have none.
        return;
    }
    let Ok(handle) = Handle::try_current() else { return };
    if handle.runtime_flavor() == RuntimeFlavor::MultiThread && worker_index().is_some() {
        // It takes the slot itself, and wakes a worker that has nothing to do.
        drop(handle.spawn(async {}));
    }
}
