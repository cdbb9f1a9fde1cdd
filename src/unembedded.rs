//! Another root of the library: all that knows nothing of Wasmtime, for tools that compile everything anew
//! (sanitizers, Miri, fuzz targets: `tests/fuzz`, `scripts/verify`). `lib.rs` is the library's.

#![allow(dead_code, reason = "Wasmtime's adapters use the rest")]

// The two names of Wasmtime that the layers below its adapters mention.
extern crate self as wasmtime;
extern crate self as wasmtime_wasi;

/// As `wasmtime::component`.
pub mod component {
    /// What bindings take their methods' receivers from.
    pub trait HasData {
        /// The receiver.
        type Data<'a>;
    }

    /// A store's resources.
    #[derive(Debug, Default)]
    pub struct ResourceTable;
}

/// As `wasmtime_wasi::sockets`.
pub mod sockets {
    /// What an address is used for.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum SocketAddrUse {
        /// To bind to it.
        UdpBind,
        /// To receive from it.
        UdpReceive,
        /// To send to it.
        UdpSend,
    }
}

#[cfg(any(test, feature = "fuzz"))]
pub mod fuzzed;
pub mod limits;

mod clock;
mod ctx;
mod datagram;
mod driver;
mod error;
mod pool;
mod ring;
#[cfg(test)]
mod simulation;
mod socket;
mod stats;
mod sync;
mod uring;

pub use ctx::{GuestCounters, UdpCtx, UdpCtxBuilder, UdpCtxView, UdpView};
pub use error::{KERNEL_MIN, RingGone, SetupError};
pub use ring::quota::Quota;
pub use ring::recycle::pool::Recycle;
pub use socket::policy::{AddrEvent, Policy, Reason, SocketAddrUse, SocketId, Verdict};
pub use stats::{ClosedInstead, Denials, GuestStats, Stats};
pub use uring::{Uring, UringBuilder};

#[cfg(test)]
fn regressions(_: &'static str) -> proptest::test_runner::Config {
    proptest::test_runner::Config { failure_persistence: None, ..Default::default() }
}
