//! An io_uring backend for `wasi:sockets` UDP in Wasmtime hosts on Linux.

pub mod limits;

mod ctx;
mod datagram;
pub mod doctor;
mod driver;
mod error;
#[cfg(feature = "p2")]
pub mod p2;
mod policy;
mod ring;
mod socket;
mod stats;

pub use ctx::{UdpCtx, UdpCtxBuilder};
pub use driver::{Uring, UringBuilder};
pub use error::{KERNEL_MIN, SetupError};
#[cfg(feature = "p2")]
pub use p2::{UdpCtxView, UdpView};
pub use policy::SocketAddrUse;
pub use stats::Stats;
