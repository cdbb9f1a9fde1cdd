//! The socket as a resource table holds it, for the resources of either WASI version.

use std::sync::Arc;

use crate::socket::UdpSocket;

/// A socket in a resource table. Each WASI version has a resource of its own around it: a call of
/// one version must not find a socket that a call of the other has left half bound.
pub(crate) struct Handle(Owner);

/// Who owns the socket: the table alone, whose memory it then is in, or the table and streams or
/// calls beside it.
enum Owner {
    Table(Option<UdpSocket>),
    Shared(Arc<UdpSocket>),
}

impl Handle {
    pub(crate) fn new(socket: UdpSocket) -> Self {
        Self(Owner::Table(Some(socket)))
    }

    pub(crate) fn socket(&self) -> &UdpSocket {
        match &self.0 {
            Owner::Table(socket) => socket.as_ref().expect("taken only by `share`"),
            Owner::Shared(socket) => socket,
        }
    }

    /// The socket for a stream, or for a call that goes on without the store. It is closed when the
    /// last of its owners is dropped.
    pub(crate) fn share(&mut self) -> Arc<UdpSocket> {
        match &mut self.0 {
            Owner::Shared(socket) => Arc::clone(socket),
            Owner::Table(socket) => {
                // From the table's memory into memory of its own.
                let socket = Arc::new(socket.take().expect("taken only here"));
                self.0 = Owner::Shared(Arc::clone(&socket));
                socket
            }
        }
    }
}
