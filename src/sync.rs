//! What threads share things by, and what they run as: the locks, atomics and threads of std and the
//! runtimes of tokio.
//!
//! Or those of a test that chooses how threads interleave (`driver::interleaved`): `shuttle`'s, which may let
//! another thread run at each of their operations. All such threads are one of the system's, so no lock of
//! std's may be held where one of these operations is. Only what is shared and decides something is of
//! these: a counter that is only read for statistics is std's.

#[cfg(all(test, shuttle))]
pub(crate) mod played;

#[cfg(not(all(test, shuttle)))]
pub(crate) use std::sync::{Mutex, MutexGuard, atomic};
#[cfg(not(all(test, shuttle)))]
pub(crate) use std::thread;

#[cfg(all(test, shuttle))]
pub(crate) use shuttle::sync::{Mutex, MutexGuard, atomic};
#[cfg(all(test, shuttle))]
pub(crate) use shuttle::thread;
#[cfg(not(all(test, shuttle)))]
pub(crate) use tokio::runtime;

#[cfg(all(test, shuttle))]
pub(crate) use self::played::runtime;
