//! The bindings of `wasi:sockets/udp`, and the resources that a guest's handles name.

use std::sync::Arc;

use crate::resource::Handle;
use crate::socket;

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

wasmtime::component::bindgen!({
    path: "src/p2/udp.wit",
    interfaces: "import wasi:sockets/udp@0.2.12; import wasi:sockets/udp-create-socket@0.2.12;",
    imports: {
        // What may wait for the ring; all else answers from memory.
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
        "wasi:sockets/udp.udp-socket": self::UdpSocket,
        "wasi:sockets/udp.incoming-datagram-stream": self::IncomingDatagramStream,
        "wasi:sockets/udp.outgoing-datagram-stream": self::OutgoingDatagramStream,
    },
});
