//! The bindings of `wasi:sockets/types`, and the resource that a guest's handles name.

use crate::resource::Handle;

/// `wasi:sockets/types.udp-socket`.
pub struct UdpSocket(pub(super) Handle);

wasmtime::component::bindgen!({
    path: "src/p3/udp.wit",
    interfaces: "import wasi:sockets/types@0.3.0;",
    imports: {
        // What may wait for the ring while it holds the store; `send` and `receive`, which WIT
        // declares async, wait beside it. All else answers from memory.
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
        "wasi:sockets/types.udp-socket": self::UdpSocket,
    },
});
