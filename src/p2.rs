//! WASI 0.2: UDP on the ring, and all else as wasmtime-wasi has it.
//!
//! # Where the answers differ from wasmtime-wasi 48
//!
//! | function | wasmtime-wasi | here | why |
//! |---|---|---|---|
//! | `start-bind` | the kernel binds; `address-in-use`, `address-not-bindable` and what else it says come from here | these come from `finish-bind` | WIT lists them as finish errors |
//! | `create-udp-socket` | `unknown` when the process has no descriptors left | `new-socket-limit` when the table or the guest's quota is full | WIT names this code |
//! | `send` | the first datagram that must wait for room ends the batch | the rest of the batch is accepted too, and waits with it | a batch is one chain |
//! | `send` | a peer that refuses is heard of after the first datagram, which ends the batch | after the message: datagrams of one size travel together | the kernel takes a message as a whole |
//! | `send` | under load, a send may be finished by a background task, and its error comes with the next `send` | comes with the `send` itself unless the socket's buffer is full | the ring's completion is waited for |
//! | `stream` | traps when an earlier stream of the socket has waited for a datagram in vain | connects | WIT asks only that earlier streams be dropped |
//! | `send` | asks the policy about each datagram when its turn comes | asks about the whole batch first | one chain goes to the kernel |
//! | `drop` of an outgoing stream | waits for a send in the background | does not wait; the next `stream` and `check-send` do | what was accepted outlives the stream, and its socket |
//! | `start-bind` after a failed one | can be called again at once | `concurrency-conflict` until `finish-bind` has told the error | the error is the finish's |
//! | datagrams seen by `poll` and not taken | the first is lost when the streams are dropped | they wait for the next streams | nothing that arrived is lost |
//! | `receive` and `send` on a refusing peer | whichever comes first tells `connection-refused`; a refusal comes before datagrams | once the receive is armed, `receive` tells it, after the datagrams before it | the armed receive takes the error |
//! | buffer sizes | asks the kernel | as the kernel's limits were when the ring was built | no system call |
//! | `local-address` | never fails on a bound socket | `out-of-memory` when the process has no descriptor left | getsockname needs one for a moment |
//! | `unicast-hop-limit` | asks the kernel, which for a connected IPv6 socket answers its route's | the limit that was set, or the system's default when the ring was built | no system call |

mod host;

use wasmtime::component::Linker;
use wasmtime_wasi::WasiView;
use wasmtime_wasi::cli::{WasiCli, WasiCliView};
use wasmtime_wasi::filesystem::{WasiFilesystem, WasiFilesystemView};
use wasmtime_wasi::p2::bindings::{self as stock, LinkOptions};
use wasmtime_wasi::random::WasiRandom;
use wasmtime_wasi::sockets::{WasiSockets, WasiSocketsView};

use crate::view::{Udp, UdpView};

pub use self::host::{IncomingDatagramStream, OutgoingDatagramStream, UdpSocket};

mod bindings {
    wasmtime::component::bindgen!({
        path: "src/p2/udp.wit",
        interfaces: "import wasi:sockets/udp@0.2.12; import wasi:sockets/udp-create-socket@0.2.12;",
        imports: {
            // What may wait for the ring; all else answers from memory.
            "wasi:sockets/udp.[method]udp-socket.finish-bind": async | trappable,
            "wasi:sockets/udp.[method]udp-socket.stream": async | trappable,
            "wasi:sockets/udp.[method]udp-socket.local-address": async | trappable,
            "wasi:sockets/udp.[method]udp-socket.set-unicast-hop-limit": async | trappable,
            "wasi:sockets/udp.[method]udp-socket.set-receive-buffer-size": async | trappable,
            "wasi:sockets/udp.[method]udp-socket.set-send-buffer-size": async | trappable,
            "wasi:sockets/udp.[method]incoming-datagram-stream.receive": async | trappable,
            "wasi:sockets/udp.[method]outgoing-datagram-stream.send": async | trappable,
            default: trappable,
        },
        trappable_error_type: {
            "wasi:sockets/network.error-code" => wasmtime_wasi::p2::SocketError,
        },
        with: {
            "wasi:io/poll": wasmtime_wasi_io::bindings::wasi::io::poll,
            "wasi:sockets/network": wasmtime_wasi::p2::bindings::sockets::network,
            "wasi:sockets/udp.udp-socket": super::UdpSocket,
            "wasi:sockets/udp.incoming-datagram-stream": super::IncomingDatagramStream,
            "wasi:sockets/udp.outgoing-datagram-stream": super::OutgoingDatagramStream,
        },
    });
}

use self::bindings::wasi::sockets::{udp, udp_create_socket};

/// Adds all of WASI 0.2, UDP on the ring: takes the place of
/// [`wasmtime_wasi::p2::add_to_linker_async`].
///
/// # Errors
///
/// If the linker already has one of the interfaces.
pub fn add_to_linker<T: WasiView + UdpView>(linker: &mut Linker<T>) -> wasmtime::Result<()> {
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
    let options = (&LinkOptions::default()).into();
    stock::sockets::network::add_to_linker::<T, WasiSockets>(l, &options, T::sockets)?;
    stock::sockets::ip_name_lookup::add_to_linker::<T, WasiSockets>(l, T::sockets)?;
    add_udp_to_linker(l)
}

/// Adds only `wasi:sockets/udp` and `wasi:sockets/udp-create-socket`, for hosts that assemble
/// their linker themselves.
///
/// # Errors
///
/// If the linker already has one of the two.
pub fn add_udp_to_linker<T: UdpView>(linker: &mut Linker<T>) -> wasmtime::Result<()> {
    udp::add_to_linker::<T, Udp>(linker, T::udp)?;
    udp_create_socket::add_to_linker::<T, Udp>(linker, T::udp)
}
