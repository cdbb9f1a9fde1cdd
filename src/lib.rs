//! UDP sockets of WebAssembly guests on an io_uring: a backend for `wasi:sockets` in Wasmtime 48
//! hosts on Linux.
//!
//! A guest's socket is created by an io_uring operation straight into the ring's fixed-file table,
//! without a file descriptor, and the system calls of many guests are one.
//!
//! ```
//! use wasi_uring::{UdpCtx, UdpCtxView, UdpView, Uring};
//! use wasmtime::component::{Linker, ResourceTable};
//! use wasmtime::{Engine, Store};
//! use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};
//!
//! struct Guest {
//!     wasi: WasiCtx,
//!     udp: UdpCtx,
//!     table: ResourceTable,
//! }
//!
//! impl WasiView for Guest {
//!     fn ctx(&mut self) -> WasiCtxView<'_> {
//!         WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
//!     }
//! }
//!
//! impl UdpView for Guest {
//!     fn udp(&mut self) -> UdpCtxView<'_> {
//!         UdpCtxView { ctx: &mut self.udp, table: &mut self.table }
//!     }
//! }
//!
//! # fn main() -> wasmtime::Result<()> {
//! let uring = Uring::builder().sockets(1024).build()?; // one for each thread
//!
//! let engine = Engine::default();
//! let mut linker = Linker::<Guest>::new(&engine);
//! wasi_uring::p2::add_to_linker(&mut linker)?; // instead of wasmtime_wasi::p2::add_to_linker_async
//! wasi_uring::p3::add_to_linker(&mut linker)?; // instead of wasmtime_wasi::p3::add_to_linker
//!
//! let udp = UdpCtx::builder(&uring).allow(|addr, _use| addr.ip().is_loopback()).sockets_max(64);
//! let guest =
//!     Guest { wasi: WasiCtx::default(), udp: udp.build(), table: ResourceTable::new() };
//! let store = Store::new(&engine, guest);
//! # let _ = store;
//! # Ok(())
//! # }
//! ```
//!
//! Guests run as before, with Wasmtime's async calls on any tokio runtime that has I/O enabled.
//!
//! # Where a datagram goes
//!
//! From a guest: [`p2`] or [`p3`] hands the call's data to `socket`, which checks each datagram and asks
//! `policy`; the payloads move into an operation of the `ring`, where those of one size to one
//! peer become one message (GSO, `UDP_SEGMENT`); the `driver` brings its entries to the kernel
//! together with those of other guests. What a path or a device does not take in one message is
//! sent apart, at once and from then on.
//!
//! To a guest: the kernel fills one of the ring's shared buffers and posts a completion; the ring
//! copies each payload into memory of its own size, queues it in the socket's inbox and gives the
//! buffer back; `socket` asks the policy about the sender when the guest takes it, and Wasmtime
//! copies it into the guest. A socket that is seen to receive in bursts is handed equal datagrams
//! of one sender in one message (GRO, `UDP_GRO`), which is split before it is queued.
//!
//! # Where datagrams can be lost, and who is served when
//!
//! A full inbox pauses its receive; what comes then waits in the kernel's receive buffer, and what
//! that cannot hold the kernel drops. So a flood costs the flooded socket alone: no buffer of the
//! ring is held by anybody for longer than it takes to copy. A guest that always finds datagrams
//! lets all others have their turn after every 32, and so does, now and then, one that asks
//! without end. [`Stats`] tells what was withheld or lost, and why.
//!
//! # Where a closed socket goes
//!
//! A kernel socket costs more to make and to free than the rest of a short life. One that its guest
//! has only bound to port 0, connected, sent and received with is unbound instead of closed, and is
//! the next guest's that binds to port 0; its table slot is its own all the while. In between no
//! packet finds it any more, an RCU grace period lets those through that had found it before, and
//! what they and the former owner have left is drained. `ring::recycle` has the rules,
//! `ring::trial` tries them on the running kernel before a ring relies on them,
//! [`UringBuilder::recycle`] sets limits or turns it off, and [`Stats`] counts.
//!
//! | module | its one job |
//! |---|---|
//! | [`p2`], [`p3`] | WASI 0.2 and 0.3: one thin function per WIT method; the linker functions |
//! | `view` | what both need of a store; the socket as a resource |
//! | `ctx` | one guest's share: policy, quota, ring |
//! | `socket` | a socket's life cycle, options, sending and receiving |
//! | `policy` | address checks, before any operation |
//! | `driver` | who enters the kernel and when; the [`Uring`] handle; the reaper |
//! | `ring` | queues, operations and their memory, slots, recycled sockets, buffers, set-up |
//! | `datagram` | socket addresses, control data and messages as bytes |
//! | `cli` | the command |
//! | [`doctor`] | what this kernel and these limits allow |
//! | `stats` | what went through a ring |
//! | [`limits`] | every bound, and how they relate |
//! | `first_poll` | what is peculiar to how Wasmtime polls concurrent calls |
//! | `error` | [`SetupError`] for hosts; one errno table for guests |
//!
//! Dependencies point down the path of a datagram, and of the library's modules only the first two
//! know Wasmtime's linker and tables.

#![cfg_attr(
    not(all(feature = "p2", feature = "p3")),
    allow(dead_code, reason = "each version of WASI uses its part of what both share")
)]

/// The command, and what its benches share with those of criterion. Nothing for embedders.
#[cfg(feature = "cli")]
#[doc(hidden)]
pub mod cli;
pub mod doctor;
pub mod limits;
#[cfg(feature = "p2")]
pub mod p2;
#[cfg(feature = "p3")]
pub mod p3;

mod ctx;
mod datagram;
mod driver;
mod error;
mod first_poll;
mod policy;
mod ring;
mod socket;
mod stats;
#[cfg(any(feature = "p2", feature = "p3"))]
mod view;

pub use ctx::{UdpCtx, UdpCtxBuilder};
pub use driver::{Uring, UringBuilder};
pub use error::{KERNEL_MIN, SetupError};
pub use policy::SocketAddrUse;
pub use ring::recycle::Recycle;
pub use stats::{ClosedInstead, Stats};
#[cfg(any(feature = "p2", feature = "p3"))]
pub use view::{UdpCtxView, UdpView};

/// The README's example is compiled with the tests.
#[cfg(all(doctest, feature = "p2", feature = "p3"))]
#[doc = include_str!("../README.md")]
struct ReadmeExample;
