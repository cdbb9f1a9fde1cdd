//! WASI 0.2: a socket takes a permit when it is created and gives it back when it is dropped; the rest
//! is passed on.

use wasi_uring::p2::bindings::sockets::{udp, udp_create_socket};
use wasi_uring::p2::bindings::{IncomingDatagramStream, OutgoingDatagramStream, UdpSocket};
use wasmtime::Result;
use wasmtime::component::Resource;
use wasmtime_wasi::p2::bindings::sockets::network::{
    self, ErrorCode, IpAddressFamily, IpSocketAddress,
};
use wasmtime_wasi::p2::{DynPollable, Network, SocketError, SocketResult};

use super::LimitedView;

type Socket = Resource<UdpSocket>;
type Incoming = Resource<IncomingDatagramStream>;
type Outgoing = Resource<OutgoingDatagramStream>;

impl udp_create_socket::Host for LimitedView<'_> {
    fn create_udp_socket(&mut self, family: IpAddressFamily) -> SocketResult<Socket> {
        let permit = self.limit.take().ok_or(ErrorCode::NewSocketLimit)?;
        let socket = self.udp.create_udp_socket(family)?;
        self.limit.held.insert(socket.rep(), permit);
        Ok(socket)
    }
}

impl udp::Host for LimitedView<'_> {}

impl udp::HostUdpSocket for LimitedView<'_> {
    fn drop(&mut self, this: Socket) -> Result<()> {
        self.limit.held.remove(&this.rep());
        udp::HostUdpSocket::drop(&mut self.udp, this)
    }

    async fn start_bind(
        &mut self,
        this: Socket,
        network: Resource<Network>,
        local_address: IpSocketAddress,
    ) -> SocketResult<()> {
        self.udp.start_bind(this, network, local_address).await
    }
    async fn finish_bind(&mut self, this: Socket) -> SocketResult<()> {
        self.udp.finish_bind(this).await
    }
    async fn stream(
        &mut self,
        this: Socket,
        remote_address: Option<IpSocketAddress>,
    ) -> SocketResult<(Incoming, Outgoing)> {
        self.udp.stream(this, remote_address).await
    }
    async fn local_address(&mut self, this: Socket) -> SocketResult<IpSocketAddress> {
        self.udp.local_address(this).await
    }
    async fn remote_address(&mut self, this: Socket) -> SocketResult<IpSocketAddress> {
        self.udp.remote_address(this).await
    }
    fn address_family(&mut self, this: Socket) -> Result<IpAddressFamily> {
        self.udp.address_family(this)
    }
    fn unicast_hop_limit(&mut self, this: Socket) -> SocketResult<u8> {
        self.udp.unicast_hop_limit(this)
    }
    async fn set_unicast_hop_limit(&mut self, this: Socket, value: u8) -> SocketResult<()> {
        self.udp.set_unicast_hop_limit(this, value).await
    }
    fn receive_buffer_size(&mut self, this: Socket) -> SocketResult<u64> {
        self.udp.receive_buffer_size(this)
    }
    async fn set_receive_buffer_size(&mut self, this: Socket, value: u64) -> SocketResult<()> {
        self.udp.set_receive_buffer_size(this, value).await
    }
    fn send_buffer_size(&mut self, this: Socket) -> SocketResult<u64> {
        self.udp.send_buffer_size(this)
    }
    async fn set_send_buffer_size(&mut self, this: Socket, value: u64) -> SocketResult<()> {
        self.udp.set_send_buffer_size(this, value).await
    }
    fn subscribe(&mut self, this: Socket) -> Result<Resource<DynPollable>> {
        udp::HostUdpSocket::subscribe(&mut self.udp, this)
    }
}

impl udp::HostIncomingDatagramStream for LimitedView<'_> {
    async fn receive(
        &mut self,
        this: Incoming,
        max_results: u64,
    ) -> SocketResult<Vec<udp::IncomingDatagram>> {
        self.udp.receive(this, max_results).await
    }
    fn subscribe(&mut self, this: Incoming) -> Result<Resource<DynPollable>> {
        udp::HostIncomingDatagramStream::subscribe(&mut self.udp, this)
    }
    fn drop(&mut self, this: Incoming) -> Result<()> {
        udp::HostIncomingDatagramStream::drop(&mut self.udp, this)
    }
}

impl udp::HostOutgoingDatagramStream for LimitedView<'_> {
    fn check_send(&mut self, this: Outgoing) -> SocketResult<u64> {
        self.udp.check_send(this)
    }
    async fn send(
        &mut self,
        this: Outgoing,
        datagrams: Vec<udp::OutgoingDatagram>,
    ) -> SocketResult<u64> {
        self.udp.send(this, datagrams).await
    }
    fn subscribe(&mut self, this: Outgoing) -> Result<Resource<DynPollable>> {
        udp::HostOutgoingDatagramStream::subscribe(&mut self.udp, this)
    }
    fn drop(&mut self, this: Outgoing) -> Result<()> {
        udp::HostOutgoingDatagramStream::drop(&mut self.udp, this)
    }
}

/// UDP's errors are the network interface's, so its traits are required too.
impl network::Host for LimitedView<'_> {
    fn convert_error_code(&mut self, error: SocketError) -> Result<ErrorCode> {
        self.udp.convert_error_code(error)
    }
    fn network_error_code(
        &mut self,
        error: Resource<wasmtime::Error>,
    ) -> Result<Option<ErrorCode>> {
        self.udp.network_error_code(error)
    }
}

impl network::HostNetwork for LimitedView<'_> {
    fn drop(&mut self, this: Resource<Network>) -> Result<()> {
        network::HostNetwork::drop(&mut self.udp, this)
    }
}
