//! What the linker functions of either WASI version need of a store: its guest's UDP
//! configuration, and the socket as the resource table holds it.

use std::sync::Arc;

use wasmtime::component::{HasData, ResourceTable};

use crate::UdpCtx;
use crate::datagram::Family;
use crate::error::ErrorCode;
use crate::socket;

/// What a store's data must provide: its guest's [`UdpCtx`] and resource table.
pub trait UdpView: Send {
    /// Both, borrowed together.
    fn udp(&mut self) -> UdpCtxView<'_>;
}

/// What [`UdpView`] provides.
#[derive(Debug)]
pub struct UdpCtxView<'a> {
    /// The guest's UDP configuration and ring.
    pub ctx: &'a mut UdpCtx,
    /// The guest's resources, the same table as [`WasiView`](wasmtime_wasi::WasiView)'s.
    pub table: &'a mut ResourceTable,
}

/// Whose methods the bindings call.
pub(crate) struct Udp;

impl HasData for Udp {
    type Data<'a> = UdpCtxView<'a>;
}

/// A socket in a resource table. Each WASI version has a resource of its own around it, for the
/// calls of one would meet those of the other half way.
pub(crate) struct Handle(Held);

/// A socket that nobody shares needs no memory of its own beside the resource table's.
enum Held {
    Alone(Option<socket::UdpSocket>),
    Shared(Arc<socket::UdpSocket>),
}

impl Handle {
    pub(crate) fn new(ctx: &mut UdpCtx, family: Family) -> Result<Self, ErrorCode> {
        Ok(Self(Held::Alone(Some(ctx.new_socket(family)?))))
    }

    pub(crate) fn socket(&self) -> &socket::UdpSocket {
        match &self.0 {
            Held::Alone(socket) => socket.as_ref().expect("taken only by `share`"),
            Held::Shared(socket) => socket,
        }
    }

    /// The socket for a stream, or for a call that goes on without the store.
    pub(crate) fn share(&mut self) -> Arc<socket::UdpSocket> {
        match &mut self.0 {
            Held::Shared(socket) => Arc::clone(socket),
            Held::Alone(socket) => {
                let socket = Arc::new(socket.take().expect("taken only here"));
                self.0 = Held::Shared(Arc::clone(&socket));
                socket
            }
        }
    }
}
