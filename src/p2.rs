//! WASI 0.2: UDP on the ring, and all else as wasmtime-wasi has it.
//!
//! # Where the answers differ from wasmtime-wasi 48
//!
//! | function | wasmtime-wasi | here | why |
//! |---|---|---|---|
//! | `start-bind` | the kernel binds; `address-in-use`, `address-not-bindable` and what else it says come from here | these come from `finish-bind` | WIT lists them as finish errors |
//! | `create-udp-socket`, `stream` | trap when the host's bound of the resource table is reached | `new-socket-limit`, `out-of-memory` | the guest can go on |
//! | `create-udp-socket` | `unknown` when the process has no descriptors left | `new-socket-limit` when the table or the guest's quota is full | WIT names this code |
//! | `send` | the first datagram that finds the send buffer full ends the batch | the rest of the batch is accepted too, and waits with it, until [`send_bytes_max`](crate::UdpCtxBuilder::send_bytes_max) wait | a batch is one chain |
//! | `send` | a peer's refusal of the first datagram ends the batch | it ends the batch after the message: datagrams of one size are one message | the kernel takes a message as a whole |
//! | `send` | under load, a send may be finished by a background task, and its error comes with the next `send` | comes with the `send` itself, unless the socket's send buffer is full, or the guest goes on sending to a peer that it has just reached: then its datagrams are deferred, leave together when it suspends or receives, after 2 ms at the latest (or what [`deferred_time`](crate::UdpCtxBuilder::deferred_time) says), and the first error of theirs comes with the next `send`; the others are sent | WIT: "or queued for sending" |
//! | `stream` | traps when an earlier stream of the socket has waited for a datagram in vain | connects | WIT asks only that earlier streams be dropped |
//! | `send` | checks the policy for each datagram just before it is sent | checks it for the whole batch first | one chain goes to the kernel |
//! | `send`, while an address check is not ready | accepted; the verdict is the next call's | waits for the verdict | the answer is that of the datagrams it is about |
//! | `drop` of an outgoing stream | waits for a send in the background | does not wait; the next `stream` and `check-send` do | what was accepted outlives the stream, and its socket |
//! | `start-bind` after a failed one | can be called again at once | `concurrency-conflict` until `finish-bind` has returned the error | it is an error of `finish-bind` |
//! | datagrams that made `poll` ready and were not received | the first is lost when the streams are dropped | they wait for the next streams | nothing that arrived is lost |
//! | buffer sizes | getsockopt | computed from the kernel's limits when the ring was built | no system call |
//! | `local-address`, `remote-address` | never fail on a bound, connected socket | `out-of-memory` when the process has no descriptor left | getsockname and getpeername need one for a moment, when they are first wanted |
//! | `send` of a connected socket that names the peer as it was asked for, where the kernel has another (a scope, a load balancer) | `invalid-argument` | sent to the peer | the guest means that one; the kernel is not asked for each connect |
//! | `unicast-hop-limit` | getsockopt, which for a connected IPv6 socket returns its route's | the limit that was set, or the system's default when the ring was built | no system call |

pub mod bindings;
mod host;

use wasmtime::component::Linker;
use wasmtime_wasi::WasiView;
use wasmtime_wasi::cli::{WasiCli, WasiCliView};
use wasmtime_wasi::filesystem::{WasiFilesystem, WasiFilesystemView};
use wasmtime_wasi::p2::bindings::{self as stock, LinkOptions};
use wasmtime_wasi::random::WasiRandom;
use wasmtime_wasi::sockets::{WasiSockets, WasiSocketsView};

use self::bindings::sockets::{udp, udp_create_socket};
use crate::ctx::{Udp, UdpView};

/// Adds all of WASI 0.2, UDP on the ring: takes the place of
/// [`wasmtime_wasi::p2::add_to_linker_async`].
///
/// # Errors
///
/// If the linker already has one of the interfaces.
pub fn add_to_linker<T: WasiView + UdpView>(linker: &mut Linker<T>) -> wasmtime::Result<()> {
    add_to_linker_with_options(linker, &LinkOptions::default())
}

/// As [`add_to_linker`], with WASI's unstable functions that the options name: takes the place of
/// [`wasmtime_wasi::p2::add_to_linker_with_options_async`]. UDP has none.
///
/// # Errors
///
/// If the linker already has one of the interfaces.
pub fn add_to_linker_with_options<T: WasiView + UdpView>(
    linker: &mut Linker<T>,
    options: &LinkOptions,
) -> wasmtime::Result<()> {
    // Added one by one, not shadowed: a definition at another patch version would stand beside
    // wasmtime-wasi's, and an import could resolve to either.
    let l = linker;
    wasmtime_wasi::p2::add_to_linker_proxy_interfaces_async(l)?;
    stock::filesystem::types::add_to_linker::<T, WasiFilesystem>(l, T::filesystem)?;
    stock::filesystem::preopens::add_to_linker::<T, WasiFilesystem>(l, T::filesystem)?;
    stock::random::insecure::add_to_linker::<T, WasiRandom>(l, |t| t.ctx().ctx.random())?;
    stock::random::insecure_seed::add_to_linker::<T, WasiRandom>(l, |t| t.ctx().ctx.random())?;
    stock::cli::exit::add_to_linker::<T, WasiCli>(l, T::cli)?;
    stock::cli::environment::add_to_linker::<T, WasiCli>(l, T::cli)?;
    stock::cli::terminal_input::add_to_linker::<T, WasiCli>(l, T::cli)?;
    stock::cli::terminal_output::add_to_linker::<T, WasiCli>(l, T::cli)?;
    stock::cli::terminal_stdin::add_to_linker::<T, WasiCli>(l, T::cli)?;
    stock::cli::terminal_stdout::add_to_linker::<T, WasiCli>(l, T::cli)?;
    stock::cli::terminal_stderr::add_to_linker::<T, WasiCli>(l, T::cli)?;
    stock::sockets::tcp::add_to_linker::<T, WasiSockets>(l, T::sockets)?;
    stock::sockets::tcp_create_socket::add_to_linker::<T, WasiSockets>(l, T::sockets)?;
    stock::sockets::instance_network::add_to_linker::<T, WasiSockets>(l, T::sockets)?;
    stock::sockets::network::add_to_linker::<T, WasiSockets>(l, &options.into(), T::sockets)?;
    stock::sockets::ip_name_lookup::add_to_linker::<T, WasiSockets>(l, T::sockets)?;
    add_udp_to_linker(l)
}

/// Adds only `wasi:sockets/udp` and `wasi:sockets/udp-create-socket`, for hosts that assemble
/// their linker themselves. Those whose store's data does not implement [`UdpView`] use the
/// functions of [`bindings`].
///
/// # Errors
///
/// If the linker already has one of the two.
pub fn add_udp_to_linker<T: UdpView>(linker: &mut Linker<T>) -> wasmtime::Result<()> {
    udp::add_to_linker::<T, Udp>(linker, T::udp)?;
    udp_create_socket::add_to_linker::<T, Udp>(linker, T::udp)
}
