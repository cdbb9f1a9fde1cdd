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
//! let uring = Uring::builder().sockets(1024).build()?; // one for each process
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
//! A host that assembles its linker itself, or whose store has a type that implements no foreign trait, adds
//! UDP with a getter ([`p2::bindings`], [`p3::bindings`]). The Cargo examples are whole hosts: `one_line` is
//! wasmtime-wasi's usual program, `generic_store` has a store and a limit of its own, `multi_thread` serves
//! many guests, and `fallback` goes on without a ring.
//!
//! Guests run as before, with Wasmtime's async calls on any tokio runtime that has I/O enabled.
//!
//! # A datagram's path
//!
//! From a guest: [`p2`] or [`p3`] hands the call's data to `socket::send`, which checks each datagram
//! against WASI's rules and the guest's policy. A guest's first one leaves at once; those that it sends on to
//! a peer it has reached are deferred, to leave together. The payloads move into an operation (`ring::op`,
//! `ring::send`), where those of one size to one peer become one message (GSO, `UDP_SEGMENT`), and the
//! operation moves into `ring::op_table`: from there on the kernel may read its memory. `ring::queues`
//! takes its entries, and the `driver` submits them together with those of other guests. What a path or
//! a device does not take in one message is sent apart, at once and from then on.
//!
//! To a guest: the kernel fills one of `ring::buffers` and posts a completion. `ring::receive` copies
//! each payload into memory of its own size, queues it in the socket's `ring::receive_queue` and gives
//! the buffer back. `socket::receive` asks the policy about the sender when the guest takes it (while a policy
//! ponders, the datagram stays in front of its queue), and Wasmtime copies it into the guest. The kernel hands a socket that was seen to receive in bursts equal
//! datagrams of one sender in one message (GRO, `UDP_GRO`), which is split before it is queued.
//!
//! A bind: `socket::bind` → `driver` → `ring` (a slot) → `ring::op_table` → `ring::op` (`write`) →
//! `ring::queues`. `driver::enter` brings it into the kernel, for the `finish-bind` that polls
//! `driver::in_flight` (`driver::flush`) or, if the guest does something else first, for the flusher
//! (`driver::tasks`). And back: `ring::queues` → `ring` → `ring::op` (`complete`) → `ring::op_table` →
//! `driver::in_flight` → `socket`.
//!
//! # Where datagrams can be lost, and which guest runs when
//!
//! A full receive queue pauses its receive: what comes then waits in the kernel's receive buffer, and
//! what that cannot hold the kernel drops. A queue is bounded in bytes, and so are all queues of a guest
//! together ([`UdpCtxBuilder::queue_bytes_max`]); what the kernel still delivers beyond that is dropped.
//! So a flood costs the flooded socket alone, because a buffer
//! of the ring is ours for no longer than it takes to copy. A guest that always finds datagrams yields
//! to the other tasks of its thread after every 64 (32 in batches), and so does, now and then, one that
//! calls again and again. [`Stats`] counts what was withheld or lost, by reason.
//!
//! An enter that the kernel refuses is tried again by the ring's own thread; if that goes on for 100 ms,
//! the calls that wait for it answer with the error (`driver::refusals`). Sends that wait for send buffer
//! go on without their socket, and for a second without their guest.
//!
//! # Where a closed socket goes
//!
//! A kernel socket costs more to make and to free than the rest of a short life. One that its guest
//! has only bound to port 0, connected, sent and received with is unbound instead of closed, and is
//! cached for the next guest that binds to port 0; it keeps its slot all the while. `ring::recycle`
//! has the rules, `ring::recycle::self_test` tests them on the running kernel before a ring relies on
//! them, [`UringBuilder::recycle`] sets limits or turns it off, and [`Stats`] counts.
//!
//! # Glossary
//!
//! - *slot*: an entry of the ring's fixed-file table, which holds a socket without a file descriptor
//!   (a direct descriptor);
//! - *queue* entries: put them into the submission queue; *flush*: count them for the kernel; *submit*:
//!   `io_uring_enter`; *reap*: take completions from the completion queue;
//!   a `Flush` is the future of a guest that waits until what it has queued is submitted;
//! - *in flight*: from the operation's storing in the table until its last completion; *detached*: in
//!   flight without a caller;
//! - *pool*: the rings of a host; *share*: how many of its sockets a ring may have;
//! - *driver*: the rules and the lock by which threads share a ring; *reaper* and *flusher*: its two
//!   tasks in each runtime;
//! - *overdue*: a close that takes longer than it should, because its guest computes on; *paused*: a receive whose queue is
//!   full; *coalesced*: sent with other datagrams in one message;
//! - *deferred*: a datagram whose `send` was answered, and that leaves with others when its guest suspends;
//! - *recycled*: a socket that had another owner; *cached*: one between two owners; *taint*: what the
//!   last owner has left in it;
//! - *refusal*: an `io_uring_enter` that fails; *forsaken*: what a guest that is gone has left in flight;
//! - *budget*: datagrams that a guest may take before it yields; *quota*: sockets that a guest, or all guests
//!   of a tenant, may have open at once, or bytes that may wait for a guest; *account*: a guest's quotas and
//!   counters; *asked*: about what a host's policy has yet to decide; *held up*: datagrams whose receive a
//!   computing thread has armed.
//!
//! # The map
//!
//! Each file imports only from those below it; `scripts/check-layers` has the floors and checks them.
//!
//! | file | its one job |
//! |---|---|
//! | [`p2`], [`p3`] | WASI 0.2 and 0.3: the linker functions, and where answers differ from stock's |
//! | `p2::host`, `p3::host` | one thin function per WIT method |
//! | [`p2::bindings`], [`p3::bindings`] | what `bindgen!` makes of the WIT, and the resources' types |
//! | [`doctor`] | what this kernel and these limits allow |
//! | `metrics` | feature `metrics`: the rings' counters for the facade of that name |
//! | `bare` | feature `bare`: a ring without WASI, the floor of the benches |
//! | `fuzzed::{calls, datagram}` | what fuzz targets (`tests/fuzz`) and tests do with any bytes |
//! | `ctx` | what a host configures per guest ([`UdpCtx`]), provides per store ([`UdpView`]) and reads |
//! | `resource` | the socket in a resource table |
//! | `socket::{bind, connect, options, send, receive}` | what guests do with a socket |
//! | `socket` | a guest's socket: its state, create, addresses, drop |
//! | `socket::guest` | what a guest's sockets share: rings, policy, account, budget |
//! | `socket::policy` | whom sockets ask, and what they are told ([`Policy`]), before any operation |
//! | `uring` | what a host holds: [`Uring`] and its builder |
//! | `pool` | the rings behind it: which a new socket goes to, and how many each may have |
//! | `driver` | what sockets call; the order of the locks |
//! | `driver::in_flight` | the future of an operation |
//! | `driver::send_now` | the future of one datagram, which is over, or not begun, when it is dropped |
//! | `driver::flush` | waiting until entries are in the kernel, or no thread is inside |
//! | `driver::tasks` | each runtime's reaper and flusher; `driver::runtimes`: their wakers |
//! | `driver::held_up` | which threads compute, which are interrupted so that datagrams do not wait for them |
//! | `driver::overdue` | a thread of the ring's own gets on with what the guests' threads leave |
//! | `driver::refusals` | enters that fail: when they are tried again, and guests told |
//! | `driver::enter` | one thread calls `io_uring_enter` for all |
//! | `driver::batching` | every rule of sharing and fairness |
//! | `driver::first_poll` | Wasmtime's first poll of a concurrent call |
//! | `driver::lifo_slot` | where a worker of tokio's keeps what it has woken |
//! | `driver::lock` | a lock, and what runs after the unlock |
//! | `ring::setup` | builds a ring, restricts it, and names what is missing; `ring::trials`: all that it needs, tried; `ring::socket_filter`: UDP alone |
//! | `ring` | submit, flush, complete |
//! | `ring::recycle` | the cache of closed sockets: its door; `pool`, `taint`, `rcu`, `self_test` behind it |
//! | `ring::op_table` | who may touch an operation's memory |
//! | `ring::slots` | whose each slot is |
//! | `ring::receive` | from the kernel's buffers to the sockets' queues |
//! | `ring::op` | each operation: its entries, and what their completions come to |
//! | `ring::send` | which datagrams become one message |
//! | `ring::port_order` | closes on their way, and binds that wait for their ports |
//! | `ring::queues` | the submission and the completion queue |
//! | `ring::buffers`, `ring::receive_queue` | datagrams on their way to the guest |
//! | `ring::kernel_defaults`, `ring::eventfd` | options' defaults; notifications |
//! | `ring::account`, `ring::quota` | what a guest has and has done; counts of sockets, nested ([`Quota`]), and of bytes |
//! | `ring::share` | how many of the host's sockets a ring may have |
//! | `ring::gro_key` | one socket for all rings, so that `UDP_GRO` stays on in the kernel |
//! | `ring::process`, `ring::mapping` | which process this is, after a fork; memory of our own |
//! | `ring::membarrier` | waiting for the kernel's other processors, and interrupting threads |
//! | `ring::thread_clock`, `ring::thread_tag`, `ring::timer` | how long a thread has run, and which it is; what the ring's own thread waits for |
//! | `ring::rlimits` | the process's limits, and whether rings are charged to that of locked memory |
//! | `datagram` | socket addresses, control data and messages as bytes |
//! | `error` | [`SetupError`] for hosts; one errno table for guests |
//! | [`limits`] | every bound, and how they relate |
//! | `stats` | the rings' counters |
//! | `clock` | what time it is |
//! | `sync` | locks, atomics, threads and runtimes: the system's, or a test's that orders them |

#![cfg_attr(
    not(all(feature = "p2", feature = "p3")),
    allow(dead_code, reason = "each version of WASI uses its part of what both share")
)]

#[cfg(feature = "bare")]
pub mod bare;
pub mod doctor;
#[cfg(test)]
pub mod fuzzed;
pub mod limits;
#[cfg(feature = "metrics")]
mod metrics;
#[cfg(feature = "p2")]
pub mod p2;
#[cfg(feature = "p3")]
pub mod p3;

mod clock;
mod ctx;
mod datagram;
mod driver;
mod error;
mod pool;
mod resource;
mod ring;
#[cfg(test)]
mod simulation;
mod socket;
mod stats;
mod sync;
mod uring;

pub use ctx::{GuestCounters, Udp, UdpCtx, UdpCtxBuilder, UdpCtxView, UdpView};
pub use error::{KERNEL_MIN, RingGone, SetupError};
pub use ring::quota::Quota;
pub use ring::recycle::pool::Recycle;
pub use socket::policy::{AddrEvent, Policy, Reason, SocketAddrUse, SocketId, Verdict};
pub use stats::{ClosedInstead, Denials, GuestStats, Stats};
pub use uring::{Uring, UringBuilder};

/// The README's example is compiled with the tests.
#[cfg(all(doctest, feature = "p2", feature = "p3"))]
#[doc = include_str!("../README.md")]
struct ReadmeExample;

/// Failing cases go into `file`, a path from the package's directory, as regressions to commit.
#[cfg(test)]
fn regressions(file: &'static str) -> proptest::test_runner::Config {
    use proptest::test_runner::{Config, FileFailurePersistence};

    let persistence = FileFailurePersistence::Direct(file);
    Config { failure_persistence: Some(Box::new(persistence)), ..Config::default() }
}
