//! One thin function per WIT method of `wasi:sockets/udp`: handles in, results out. What the methods
//! do is in [`crate::socket`].

use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Waker};

use wasmtime::component::{Resource, ResourceTableError};
use wasmtime::format_err;
use wasmtime_wasi::async_trait;
use wasmtime_wasi::p2::Network;
use wasmtime_wasi::p2::bindings::sockets::network::{
    self, ErrorCode as WitCode, IpAddressFamily, IpSocketAddress,
};
use wasmtime_wasi::p2::{SocketError, SocketResult};
use wasmtime_wasi_io::poll::{DynPollable, Pollable, subscribe};

use super::bindings::sockets::{udp, udp_create_socket};
use super::bindings::{IncomingDatagramStream, OutgoingDatagramStream, UdpSocket};
use crate::ctx::UdpCtxView;
use crate::datagram::Family;
use crate::error::ErrorCode;
use crate::limits::BATCH_DATAGRAMS_MAX;
use crate::resource::Handle;
use crate::ring::receive_queue::Datagram;
use crate::socket::options::OptionValue;

impl udp_create_socket::Host for UdpCtxView<'_> {
    fn create_udp_socket(&mut self, family: IpAddressFamily) -> SocketResult<Resource<UdpSocket>> {
        let family = match family {
            IpAddressFamily::Ipv4 => Family::V4,
            IpAddressFamily::Ipv6 => Family::V6,
        };
        let socket = self.ctx.new_socket(family)?;
        match self.table.push(UdpSocket(Handle::new(socket))) {
            Err(ResourceTableError::Full) => Err(ErrorCode::NewSocketLimit.into()),
            pushed => Ok(pushed?),
        }
    }
}

impl udp::Host for UdpCtxView<'_> {}

impl udp::HostUdpSocket for UdpCtxView<'_> {
    async fn start_bind(
        &mut self,
        this: Resource<UdpSocket>,
        network: Resource<Network>,
        local_address: IpSocketAddress,
    ) -> SocketResult<()> {
        // The handle is the capability; it has no content.
        self.table.get(&network)?;
        Ok(self.table.get(&this)?.0.socket().start_bind(local_address.into()).await?)
    }

    async fn finish_bind(&mut self, this: Resource<UdpSocket>) -> SocketResult<()> {
        Ok(self.table.get(&this)?.0.socket().finish_bind().await?)
    }

    async fn stream(
        &mut self,
        this: Resource<UdpSocket>,
        remote_address: Option<IpSocketAddress>,
    ) -> SocketResult<(Resource<IncomingDatagramStream>, Resource<OutgoingDatagramStream>)> {
        let has_streams = self.table.iter_children(&this)?.any(|child| {
            child.is::<IncomingDatagramStream>() || child.is::<OutgoingDatagramStream>()
        });
        if has_streams {
            // WIT: the streams of an earlier call must be dropped, else this traps.
            return Err(SocketError::trap(format_err!("UDP streams not dropped yet")));
        }
        let socket = self.table.get_mut(&this)?.0.share();
        socket.stream(remote_address.map(SocketAddr::from)).await?;
        let outgoing = OutgoingDatagramStream { socket: Arc::clone(&socket), permit: 0 };
        let incoming = match self.table.push_child(IncomingDatagramStream(socket), &this) {
            Err(ResourceTableError::Full) => return Err(ErrorCode::OutOfMemory.into()),
            pushed => pushed?,
        };
        match self.table.push_child(outgoing, &this) {
            Err(ResourceTableError::Full) => {
                self.table.delete(incoming)?;
                Err(ErrorCode::OutOfMemory.into())
            }
            pushed => Ok((incoming, pushed?)),
        }
    }

    async fn local_address(&mut self, this: Resource<UdpSocket>) -> SocketResult<IpSocketAddress> {
        Ok(self.table.get(&this)?.0.socket().local_address().await?.into())
    }

    async fn remote_address(&mut self, this: Resource<UdpSocket>) -> SocketResult<IpSocketAddress> {
        Ok(self.table.get(&this)?.0.socket().remote_address().await?.into())
    }

    fn address_family(&mut self, this: Resource<UdpSocket>) -> wasmtime::Result<IpAddressFamily> {
        Ok(match self.table.get(&this)?.0.socket().family() {
            Family::V4 => IpAddressFamily::Ipv4,
            Family::V6 => IpAddressFamily::Ipv6,
        })
    }

    fn unicast_hop_limit(&mut self, this: Resource<UdpSocket>) -> SocketResult<u8> {
        Ok(self.table.get(&this)?.0.socket().hop_limit())
    }

    async fn set_unicast_hop_limit(
        &mut self,
        this: Resource<UdpSocket>,
        value: u8,
    ) -> SocketResult<()> {
        Ok(self.table.get(&this)?.0.socket().set_option(OptionValue::HopLimit(value)).await?)
    }

    fn receive_buffer_size(&mut self, this: Resource<UdpSocket>) -> SocketResult<u64> {
        Ok(self.table.get(&this)?.0.socket().receive_buffer_size())
    }

    async fn set_receive_buffer_size(
        &mut self,
        this: Resource<UdpSocket>,
        value: u64,
    ) -> SocketResult<()> {
        Ok(self.table.get(&this)?.0.socket().set_option(OptionValue::ReceiveBuffer(value)).await?)
    }

    fn send_buffer_size(&mut self, this: Resource<UdpSocket>) -> SocketResult<u64> {
        Ok(self.table.get(&this)?.0.socket().send_buffer_size())
    }

    async fn set_send_buffer_size(
        &mut self,
        this: Resource<UdpSocket>,
        value: u64,
    ) -> SocketResult<()> {
        Ok(self.table.get(&this)?.0.socket().set_option(OptionValue::SendBuffer(value)).await?)
    }

    fn subscribe(&mut self, this: Resource<UdpSocket>) -> wasmtime::Result<Resource<DynPollable>> {
        subscribe(self.table, this)
    }

    fn drop(&mut self, this: Resource<UdpSocket>) -> wasmtime::Result<()> {
        self.table.delete(this)?;
        Ok(())
    }
}

#[async_trait]
impl Pollable for UdpSocket {
    /// At once: between `start-bind` and `finish-bind` there is nothing for a guest to wait for,
    /// since `finish-bind` waits by itself.
    async fn ready(&mut self) {}
}

impl udp::HostIncomingDatagramStream for UdpCtxView<'_> {
    async fn receive(
        &mut self,
        this: Resource<IncomingDatagramStream>,
        max_results: u64,
    ) -> SocketResult<Vec<udp::IncomingDatagram>> {
        let datagrams = self.table.get(&this)?.0.receive(max_results).await?;
        Ok(datagrams.into_iter().map(udp::IncomingDatagram::from).collect())
    }

    fn subscribe(
        &mut self,
        this: Resource<IncomingDatagramStream>,
    ) -> wasmtime::Result<Resource<DynPollable>> {
        subscribe(self.table, this)
    }

    fn drop(&mut self, this: Resource<IncomingDatagramStream>) -> wasmtime::Result<()> {
        self.table.delete(this)?;
        Ok(())
    }
}

impl From<Datagram> for udp::IncomingDatagram {
    fn from(datagram: Datagram) -> Self {
        Self { data: datagram.payload, remote_address: datagram.from.into() }
    }
}

#[async_trait]
impl Pollable for IncomingDatagramStream {
    async fn ready(&mut self) {
        self.0.receivable().await;
    }
}

impl udp::HostOutgoingDatagramStream for UdpCtxView<'_> {
    fn check_send(&mut self, this: Resource<OutgoingDatagramStream>) -> SocketResult<u64> {
        let stream = self.table.get_mut(&this)?;
        let mut now = Context::from_waker(Waker::noop());
        let is_ready = stream.socket.poll_sendable(&mut now).is_ready();
        stream.permit = if is_ready { BATCH_DATAGRAMS_MAX } else { 0 };
        Ok(stream.permit as u64)
    }

    async fn send(
        &mut self,
        this: Resource<OutgoingDatagramStream>,
        datagrams: Vec<udp::OutgoingDatagram>,
    ) -> SocketResult<u64> {
        let stream = self.table.get_mut(&this)?;
        if datagrams.is_empty() {
            return Ok(0);
        }
        if datagrams.len() > stream.permit {
            return Err(SocketError::trap(format_err!(
                "unpermitted: argument exceeds permitted size"
            )));
        }
        // WIT: "Each call to `send` must be permitted by a preceding `check-send`."
        stream.permit = 0;
        let datagrams = datagrams
            .into_iter()
            .map(|datagram| (datagram.data, datagram.remote_address.map(SocketAddr::from)));
        Ok(stream.socket.send(datagrams).await?)
    }

    fn subscribe(
        &mut self,
        this: Resource<OutgoingDatagramStream>,
    ) -> wasmtime::Result<Resource<DynPollable>> {
        subscribe(self.table, this)
    }

    /// Does not wait: the kernel sends what `send` accepted even if stream and socket are dropped.
    fn drop(&mut self, this: Resource<OutgoingDatagramStream>) -> wasmtime::Result<()> {
        self.table.delete(this)?;
        Ok(())
    }
}

#[async_trait]
impl Pollable for OutgoingDatagramStream {
    async fn ready(&mut self) {
        self.socket.sendable().await;
    }
}

/// UDP's error codes are the network interface's, and the bindings require its traits.
impl network::Host for UdpCtxView<'_> {
    fn convert_error_code(&mut self, error: SocketError) -> wasmtime::Result<WitCode> {
        error.downcast()
    }

    fn network_error_code(
        &mut self,
        error: Resource<wasmtime::Error>,
    ) -> wasmtime::Result<Option<WitCode>> {
        Ok(self.table.get(&error)?.downcast_ref::<std::io::Error>().map(WitCode::from))
    }
}

impl network::HostNetwork for UdpCtxView<'_> {
    fn drop(&mut self, this: Resource<Network>) -> wasmtime::Result<()> {
        self.table.delete(this)?;
        Ok(())
    }
}

impl From<ErrorCode> for SocketError {
    fn from(error: ErrorCode) -> Self {
        if let ErrorCode::Gone(gone) = error {
            Self::trap(gone)
        } else {
            WitCode::from(error).into()
        }
    }
}

impl From<ErrorCode> for WitCode {
    fn from(error: ErrorCode) -> Self {
        match error {
            ErrorCode::AccessDenied => Self::AccessDenied,
            ErrorCode::AddressInUse => Self::AddressInUse,
            ErrorCode::AddressNotBindable => Self::AddressNotBindable,
            ErrorCode::ConcurrencyConflict => Self::ConcurrencyConflict,
            ErrorCode::ConnectionAborted => Self::ConnectionAborted,
            ErrorCode::ConnectionRefused => Self::ConnectionRefused,
            ErrorCode::ConnectionReset => Self::ConnectionReset,
            ErrorCode::DatagramTooLarge => Self::DatagramTooLarge,
            ErrorCode::InvalidArgument => Self::InvalidArgument,
            ErrorCode::InvalidState => Self::InvalidState,
            ErrorCode::NewSocketLimit => Self::NewSocketLimit,
            ErrorCode::NotInProgress => Self::NotInProgress,
            ErrorCode::NotSupported => Self::NotSupported,
            ErrorCode::OutOfMemory => Self::OutOfMemory,
            ErrorCode::RemoteUnreachable => Self::RemoteUnreachable,
            ErrorCode::Timeout => Self::Timeout,
            ErrorCode::Unknown | ErrorCode::Gone(_) => Self::Unknown,
        }
    }
}
