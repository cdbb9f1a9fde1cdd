//! One thin function per WIT method of `wasi:sockets/types.udp-socket`: handles in, results out. What
//! the methods do is in [`crate::socket`].

use std::net::SocketAddr;
use std::sync::Arc;

use wasmtime::component::{Accessor, Resource, ResourceTableError};
use wasmtime_wasi::p3::bindings::sockets::types::{
    ErrorCode as WitCode, IpAddressFamily, IpSocketAddress,
};

use super::bindings::UdpSocket;
use super::bindings::sockets::types;
use crate::ctx::{Udp, UdpCtxView};
use crate::datagram::Family;
use crate::error::ErrorCode;
use crate::resource::Handle;
use crate::socket;
use crate::socket::options::OptionValue;

/// A trap, or the guest's answer.
type Answer<T> = wasmtime::Result<Result<T, WitCode>>;

fn answer<T>(result: Result<T, ErrorCode>) -> Answer<T> {
    match result {
        Err(ErrorCode::Gone(gone)) => Err(gone.into()),
        result => Ok(result.map_err(WitCode::from)),
    }
}

impl types::Host for UdpCtxView<'_> {}

impl types::HostUdpSocket for UdpCtxView<'_> {
    fn create(&mut self, family: IpAddressFamily) -> Answer<Resource<UdpSocket>> {
        let family = match family {
            IpAddressFamily::Ipv4 => Family::V4,
            IpAddressFamily::Ipv6 => Family::V6,
        };
        let socket = match self.ctx.new_socket(family) {
            Ok(socket) => UdpSocket(Handle::new(socket)),
            Err(error) => return answer(Err(error)),
        };
        match self.table.push(socket) {
            Err(ResourceTableError::Full) => answer(Err(ErrorCode::NewSocketLimit)),
            pushed => Ok(Ok(pushed?)),
        }
    }

    async fn bind(&mut self, this: Resource<UdpSocket>, addr: IpSocketAddress) -> Answer<()> {
        answer(self.table.get(&this)?.0.socket().bind(addr.into()).await)
    }

    async fn connect(&mut self, this: Resource<UdpSocket>, addr: IpSocketAddress) -> Answer<()> {
        answer(self.table.get(&this)?.0.socket().connect(addr.into()).await)
    }

    async fn disconnect(&mut self, this: Resource<UdpSocket>) -> Answer<()> {
        answer(self.table.get(&this)?.0.socket().disconnect().await)
    }

    async fn get_local_address(&mut self, this: Resource<UdpSocket>) -> Answer<IpSocketAddress> {
        answer(self.table.get(&this)?.0.socket().local_address().await.map(IpSocketAddress::from))
    }

    async fn get_remote_address(&mut self, this: Resource<UdpSocket>) -> Answer<IpSocketAddress> {
        answer(self.table.get(&this)?.0.socket().remote_address().await.map(IpSocketAddress::from))
    }

    fn get_address_family(
        &mut self,
        this: Resource<UdpSocket>,
    ) -> wasmtime::Result<IpAddressFamily> {
        Ok(match self.table.get(&this)?.0.socket().family() {
            Family::V4 => IpAddressFamily::Ipv4,
            Family::V6 => IpAddressFamily::Ipv6,
        })
    }

    fn get_unicast_hop_limit(&mut self, this: Resource<UdpSocket>) -> Answer<u8> {
        answer(Ok(self.table.get(&this)?.0.socket().hop_limit()))
    }

    async fn set_unicast_hop_limit(&mut self, this: Resource<UdpSocket>, value: u8) -> Answer<()> {
        let option = OptionValue::HopLimit(value);
        answer(self.table.get(&this)?.0.socket().set_option(option).await)
    }

    fn get_receive_buffer_size(&mut self, this: Resource<UdpSocket>) -> Answer<u64> {
        answer(Ok(self.table.get(&this)?.0.socket().receive_buffer_size()))
    }

    async fn set_receive_buffer_size(
        &mut self,
        this: Resource<UdpSocket>,
        value: u64,
    ) -> Answer<()> {
        let option = OptionValue::ReceiveBuffer(value);
        answer(self.table.get(&this)?.0.socket().set_option(option).await)
    }

    fn get_send_buffer_size(&mut self, this: Resource<UdpSocket>) -> Answer<u64> {
        answer(Ok(self.table.get(&this)?.0.socket().send_buffer_size()))
    }

    async fn set_send_buffer_size(&mut self, this: Resource<UdpSocket>, value: u64) -> Answer<()> {
        let option = OptionValue::SendBuffer(value);
        answer(self.table.get(&this)?.0.socket().set_option(option).await)
    }

    fn drop(&mut self, this: Resource<UdpSocket>) -> wasmtime::Result<()> {
        self.table.delete(this)?;
        Ok(())
    }
}

/// The socket of a call that does not keep the store while it waits.
fn share<T>(
    store: &Accessor<T, Udp>,
    this: &Resource<UdpSocket>,
) -> wasmtime::Result<Arc<socket::UdpSocket>> {
    store.with(|mut access| Ok(access.get().table.get_mut(this)?.0.share()))
}

impl<T> types::HostUdpSocketWithStore<T> for Udp {
    async fn send(
        store: &Accessor<T, Self>,
        this: Resource<UdpSocket>,
        data: Vec<u8>,
        to: Option<IpSocketAddress>,
    ) -> Answer<()> {
        let socket = share(store, &this)?;
        answer(socket.send_one(data, to.map(SocketAddr::from)).await)
    }

    async fn receive(
        store: &Accessor<T, Self>,
        this: Resource<UdpSocket>,
    ) -> Answer<(Vec<u8>, IpSocketAddress)> {
        let socket = share(store, &this)?;
        let received = socket.receive_one().await;
        answer(received.map(|datagram| (datagram.payload, datagram.from.into())))
    }
}

impl From<ErrorCode> for WitCode {
    fn from(error: ErrorCode) -> Self {
        match error {
            ErrorCode::AccessDenied => Self::AccessDenied,
            ErrorCode::AddressInUse => Self::AddressInUse,
            ErrorCode::AddressNotBindable => Self::AddressNotBindable,
            ErrorCode::ConnectionAborted => Self::ConnectionAborted,
            ErrorCode::ConnectionRefused => Self::ConnectionRefused,
            ErrorCode::ConnectionReset => Self::ConnectionReset,
            ErrorCode::DatagramTooLarge => Self::DatagramTooLarge,
            ErrorCode::InvalidArgument => Self::InvalidArgument,
            // WASI 0.3 binds in one step, so it has no names for what can go wrong between two.
            ErrorCode::ConcurrencyConflict | ErrorCode::NotInProgress | ErrorCode::InvalidState => {
                Self::InvalidState
            }
            ErrorCode::NewSocketLimit => Self::Other(Some("new-socket-limit".to_owned())),
            ErrorCode::NotSupported => Self::NotSupported,
            ErrorCode::OutOfMemory => Self::OutOfMemory,
            ErrorCode::RemoteUnreachable => Self::RemoteUnreachable,
            ErrorCode::Timeout => Self::Timeout,
            ErrorCode::Unknown | ErrorCode::Gone(_) => Self::Other(None),
        }
    }
}
