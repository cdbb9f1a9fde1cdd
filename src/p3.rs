//! WASI 0.3: UDP on the ring, and all else as wasmtime-wasi has it.
//!
//! A guest that calls [`p3`](self)'s functions pays for what Wasmtime needs to run its calls
//! concurrently. An engine whose guests are all of WASI 0.2 should spare them that cost:
//! [`Config::concurrency_support`](wasmtime::Config::concurrency_support)`(false)`.
//!
//! # Where the answers differ from wasmtime-wasi 48
//!
//! As for WASI 0.2 (see `p2`): buffer sizes, the hop limit, addresses without a spare descriptor, and a peer
//! that is named as it was asked for. And:
//!
//! | function | wasmtime-wasi | here | why |
//! |---|---|---|---|
//! | `create`, and what binds | `other(none)` when the process has no descriptors left | `other(some("new-socket-limit"))` when the table or the guest's quota is full | WASI 0.3 has no code for it |
//! | `connect`, `send` of an unbound socket | when no port is left `other(none)`, and `send` waits | `address-in-use` | WIT names this code |
//! | `send` to a peer that was just reached, by a guest that goes on sending, or while another thread is inside the ring | the kernel has the datagram when it returns | it is deferred: it leaves with the others when the guest suspends or receives, after 2 ms at the latest (or what [`deferred_time`](crate::UdpCtxBuilder::deferred_time) says); the first error of theirs is the next `send`'s, and the others are sent | many datagrams are one message, and the call is done at once |
//! | `connect` behind such sends, while there is no send buffer | does not wait | waits until they are sent | they are for the peer of their time |
//! | `send`s that wait for send buffer | leave in the order of the calls, most often | in the order of the calls | the first of them waits, the others behind it |
//! | `receive`, several at once | the last call is served first | in the order of the calls | fair, and as one would expect |
//! | `receive`, several at once, while an address check of the first datagram is not ready | another one is served with the next datagram | all wait for the verdict | the order holds |
//! | `receive` of a connected socket | datagrams of others that came before the `connect` too | only the peer's | WIT: "the sender address is guaranteed to match" |

pub mod bindings;
mod host;

use wasmtime::component::Linker;
use wasmtime_wasi::WasiView;
use wasmtime_wasi::p3::bindings::LinkOptions;

use self::bindings::sockets::types;
use crate::ctx::{Udp, UdpView};

/// Adds all of WASI 0.3, UDP on the ring: takes the place of
/// [`wasmtime_wasi::p3::add_to_linker`]. A linker, and a store, can have WASI 0.2 as well.
///
/// # Errors
///
/// If the linker already has one of the interfaces, or its engine no
/// [`concurrency_support`](wasmtime::Config::concurrency_support).
pub fn add_to_linker<T: WasiView + UdpView>(linker: &mut Linker<T>) -> wasmtime::Result<()> {
    add_to_linker_with_options(linker, &LinkOptions::default())
}

/// As [`add_to_linker`], with WASI's unstable functions that the options name: takes the place of
/// [`wasmtime_wasi::p3::add_to_linker_with_options`]. UDP has none.
///
/// # Errors
///
/// As [`add_to_linker`]'s.
pub fn add_to_linker_with_options<T: WasiView + UdpView>(
    linker: &mut Linker<T>,
    options: &LinkOptions,
) -> wasmtime::Result<()> {
    wasmtime_wasi::p3::add_to_linker_with_options(linker, options)?;
    // UDP shares an interface with TCP, so this crate's shadows wasmtime-wasi's. Whether a linker
    // allows shadowing cannot be read. If it does not, it refuses, and is left as it was.
    if add_udp_to_linker(linker).is_err() {
        linker.allow_shadowing(true);
        let added = add_udp_to_linker(linker);
        linker.allow_shadowing(false);
        added?;
    }
    Ok(())
}

/// Adds only the resource `udp-socket` of `wasi:sockets/types`, for hosts that assemble their
/// linker themselves. One that has wasmtime-wasi's already must
/// [allow shadowing](Linker::allow_shadowing) for it. Those whose store's data does not implement
/// [`UdpView`] use the function of [`bindings`].
///
/// # Errors
///
/// If the linker already has it and does not allow shadowing, or its engine has no
/// [`concurrency_support`](wasmtime::Config::concurrency_support).
pub fn add_udp_to_linker<T: UdpView + 'static>(linker: &mut Linker<T>) -> wasmtime::Result<()> {
    types::add_to_linker::<T, Udp>(linker, T::udp)
}
