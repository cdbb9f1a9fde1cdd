//! What `bindgen!` makes of the resource `udp-socket` of `wasi:sockets/types` of WASI 0.3.0, for hosts that
//! assemble their linker themselves.
//!
//! [`sockets::types::add_to_linker`] takes a getter, so a store's data needs no trait of this crate, and
//! may be generic. WASI 0.3 has TCP and UDP in one interface, of which this is UDP's part: it is added
//! behind wasmtime-wasi's, and the linker must allow shadowing meanwhile, or it refuses:
//!
//! ```
//! use wasi_uring::p3::bindings::sockets::types;
//! use wasi_uring::{Udp, UdpCtx, UdpCtxView};
//! use wasmtime::component::{Linker, ResourceTable};
//!
//! struct State<A> { app: A, udp: UdpCtx, table: ResourceTable }
//!
//! fn add_udp<A: Send + 'static>(linker: &mut Linker<State<A>>) -> wasmtime::Result<()> {
//!     linker.allow_shadowing(true);
//!     types::add_to_linker::<State<A>, Udp>(linker, |state| UdpCtxView {
//!         ctx: &mut state.udp,
//!         table: &mut state.table,
//!     })?;
//!     linker.allow_shadowing(false);
//!     Ok(())
//! }
//! ```
//!
//! The types that TCP and UDP share are those of [`wasmtime_wasi::p3::bindings::sockets::types`].
//!
//! # To delegate to
//!
//! [`UdpCtxView`](crate::UdpCtxView) implements [`types::Host`](sockets::types::Host) and
//! [`types::HostUdpSocket`](sockets::types::HostUdpSocket), and [`Udp`](crate::Udp), its
//! [`HasData`](wasmtime::component::HasData),
//! [`types::HostUdpSocketWithStore`](sockets::types::HostUdpSocketWithStore) for stores of any data. A host
//! that does something of its own on some calls implements them for types of its own and calls these.
//! What it needs to call the last is an accessor for `Udp`, which
//! [`Accessor::with_getter`](wasmtime::component::Accessor::with_getter) makes of its own. The example
//! `generic_store` delegates each function.
//!
//! Which functions are async is a promise of this version: a change of it is a breaking one. (It is not
//! wasmtime-wasi's choice, which makes `create`, `bind` and `connect` async, and beside them what WIT does.)
//!
//! | trait | async: may wait for the ring, or for the host's policy | answer from memory |
//! |---|---|---|
//! | [`types::HostUdpSocket`](sockets::types::HostUdpSocket) | `bind`, `connect`, `disconnect`, `get_local_address`, `get_remote_address`, `set_unicast_hop_limit`, `set_receive_buffer_size`, `set_send_buffer_size` | `create`, `get_address_family`, `get_unicast_hop_limit`, `get_receive_buffer_size`, `get_send_buffer_size`, `drop` |
//! | [`types::HostUdpSocketWithStore`](sockets::types::HostUdpSocketWithStore): other calls go on meanwhile | `send`, `receive` | |
//!
//! Each future can be dropped before it is done, as when a guest cancels its call: what it began ends by
//! itself.

use crate::resource::Handle;

pub use self::generated::wasi::sockets;

/// `wasi:sockets/types.udp-socket`.
pub struct UdpSocket(pub(super) Handle);

#[allow(missing_docs, clippy::pedantic, reason = "WIT documents what is generated from it")]
mod generated {
    wasmtime::component::bindgen!({
        path: "src/p3/udp.wit",
        interfaces: "import wasi:sockets/types@0.3.0;",
        imports: {
            // What may wait for the ring while it holds the store; `send` and `receive`, which WIT
            // declares async, wait beside it. All else answers from memory. Hosts rely on it: see above.
            "wasi:sockets/types.[method]udp-socket.bind": async | trappable,
            "wasi:sockets/types.[method]udp-socket.connect": async | trappable,
            "wasi:sockets/types.[method]udp-socket.disconnect": async | trappable,
            "wasi:sockets/types.[method]udp-socket.get-local-address": async | trappable,
            "wasi:sockets/types.[method]udp-socket.get-remote-address": async | trappable,
            "wasi:sockets/types.[method]udp-socket.set-unicast-hop-limit": async | trappable,
            "wasi:sockets/types.[method]udp-socket.set-receive-buffer-size": async | trappable,
            "wasi:sockets/types.[method]udp-socket.set-send-buffer-size": async | trappable,
            default: trappable,
        },
        with: {
            "wasi:sockets/shared": wasmtime_wasi::p3::bindings::sockets::types,
            "wasi:sockets/types.udp-socket": super::UdpSocket,
        },
    });
}
