//! What `bindgen!` makes of `wasi:sockets/udp` and `udp-create-socket` of WASI 0.2.12, for hosts that
//! assemble their linker themselves.
//!
//! [`sockets::udp::add_to_linker`] and [`sockets::udp_create_socket::add_to_linker`] take a getter, so a
//! store's data needs no trait of this crate, and may be generic:
//!
//! ```
//! use wasi_uring::p2::bindings::sockets::{udp, udp_create_socket};
//! use wasi_uring::{Udp, UdpCtx, UdpCtxView};
//! use wasmtime::component::{Linker, ResourceTable};
//!
//! struct State<A> { app: A, udp: UdpCtx, table: ResourceTable }
//!
//! fn udp_of<A>(state: &mut State<A>) -> UdpCtxView<'_> {
//!     UdpCtxView { ctx: &mut state.udp, table: &mut state.table }
//! }
//!
//! fn add_udp<A: Send + 'static>(linker: &mut Linker<State<A>>) -> wasmtime::Result<()> {
//!     udp::add_to_linker::<State<A>, Udp>(linker, udp_of)?;
//!     udp_create_socket::add_to_linker::<State<A>, Udp>(linker, udp_of)
//! }
//! ```
//!
//! All else of `wasi:sockets`, the types of `network` among them, is in
//! [`wasmtime_wasi::p2::bindings::sockets`]. Resources are this crate's own: a socket that
//! wasmtime-wasi's `create-udp-socket` made is none of these functions', so add both interfaces from
//! here, or both from there.
//!
//! # To delegate to
//!
//! [`UdpCtxView`](crate::UdpCtxView) implements every trait that these functions require, and
//! [`Udp`](crate::Udp) is its [`HasData`](wasmtime::component::HasData). A host that does something of its
//! own on some calls (takes a permit, logs, serves an older WIT) implements the traits for a type of its own,
//! with a `HasData` of its own, and calls the view's functions. The example `generic_store` delegates
//! each.
//!
//! Which functions are async is a promise of this version: a change of it is a breaking one. (It is not
//! wasmtime-wasi's choice, which makes `create-udp-socket`, `start-bind`, `stream` and the drop of an
//! outgoing stream async.)
//!
//! | trait | async: may wait for the ring, or for the host's policy | answer from memory |
//! |---|---|---|
//! | [`udp_create_socket::Host`](sockets::udp_create_socket::Host) | | `create_udp_socket` |
//! | [`udp::HostUdpSocket`](sockets::udp::HostUdpSocket) | `start_bind`, `finish_bind`, `stream`, `local_address`, `remote_address`, `set_unicast_hop_limit`, `set_receive_buffer_size`, `set_send_buffer_size` | `address_family`, `unicast_hop_limit`, `receive_buffer_size`, `send_buffer_size`, `subscribe`, `drop` |
//! | [`udp::HostIncomingDatagramStream`](sockets::udp::HostIncomingDatagramStream) | `receive` | `subscribe`, `drop` |
//! | [`udp::HostOutgoingDatagramStream`](sockets::udp::HostOutgoingDatagramStream) | `send` | `check_send`, `subscribe`, `drop` |
//! | [`network::Host`](wasmtime_wasi::p2::bindings::sockets::network::Host), required because errors are its | | `convert_error_code`, `network_error_code` |
//! | [`network::HostNetwork`](wasmtime_wasi::p2::bindings::sockets::network::HostNetwork) | | `drop` |
//!
//! Each future can be dropped before it is done, as when the guest's store is: what it began ends by
//! itself.

use std::sync::Arc;

use crate::resource::Handle;
use crate::socket;

pub use self::generated::wasi::sockets;

/// `wasi:sockets/udp.udp-socket`.
pub struct UdpSocket(pub(super) Handle);

/// `wasi:sockets/udp.incoming-datagram-stream`.
pub struct IncomingDatagramStream(pub(super) Arc<socket::UdpSocket>);

/// `wasi:sockets/udp.outgoing-datagram-stream`.
pub struct OutgoingDatagramStream {
    pub(super) socket: Arc<socket::UdpSocket>,
    /// Datagrams the last `check-send` permitted.
    pub(super) permit: usize,
}

#[allow(missing_docs, clippy::pedantic, reason = "WIT documents what is generated from it")]
mod generated {
    wasmtime::component::bindgen!({
        path: "src/p2/udp.wit",
        interfaces: "import wasi:sockets/udp@0.2.12; import wasi:sockets/udp-create-socket@0.2.12;",
        imports: {
            // What may wait for the ring, or for the host's policy; all else answers from memory. Hosts
            // rely on it: see above.
            "wasi:sockets/udp.[method]udp-socket.start-bind": async | trappable,
            "wasi:sockets/udp.[method]udp-socket.finish-bind": async | trappable,
            "wasi:sockets/udp.[method]udp-socket.stream": async | trappable,
            "wasi:sockets/udp.[method]udp-socket.local-address": async | trappable,
            "wasi:sockets/udp.[method]udp-socket.remote-address": async | trappable,
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
