//! WASI 0.3: a socket takes a permit when it is created and gives it back when it is dropped; the rest
//! is passed on.

use wasi_uring::Udp;
use wasi_uring::p3::bindings::UdpSocket;
use wasi_uring::p3::bindings::sockets::types;
use wasmtime::Result;
use wasmtime::component::{Accessor, Resource};
use wasmtime_wasi::p3::bindings::sockets::types::{ErrorCode, IpAddressFamily, IpSocketAddress};

use super::{LimitedUdp, LimitedView, State};

type Socket = Resource<UdpSocket>;
/// A trap, or the guest's answer.
type Answer<T> = Result<Result<T, ErrorCode>>;

impl types::Host for LimitedView<'_> {}

impl types::HostUdpSocket for LimitedView<'_> {
    fn create(&mut self, family: IpAddressFamily) -> Answer<Socket> {
        let Some(permit) = self.limit.take() else {
            // WASI 0.3 has no code for it.
            return Ok(Err(ErrorCode::Other(Some("new-socket-limit".to_owned()))));
        };
        let created = self.udp.create(family)?;
        if let Ok(socket) = &created {
            self.limit.held.insert(socket.rep(), permit);
        }
        Ok(created)
    }
    fn drop(&mut self, this: Socket) -> Result<()> {
        self.limit.held.remove(&this.rep());
        self.udp.drop(this)
    }

    async fn bind(&mut self, this: Socket, local_address: IpSocketAddress) -> Answer<()> {
        self.udp.bind(this, local_address).await
    }
    async fn connect(&mut self, this: Socket, remote_address: IpSocketAddress) -> Answer<()> {
        self.udp.connect(this, remote_address).await
    }
    async fn disconnect(&mut self, this: Socket) -> Answer<()> {
        self.udp.disconnect(this).await
    }
    async fn get_local_address(&mut self, this: Socket) -> Answer<IpSocketAddress> {
        self.udp.get_local_address(this).await
    }
    async fn get_remote_address(&mut self, this: Socket) -> Answer<IpSocketAddress> {
        self.udp.get_remote_address(this).await
    }
    fn get_address_family(&mut self, this: Socket) -> Result<IpAddressFamily> {
        self.udp.get_address_family(this)
    }
    fn get_unicast_hop_limit(&mut self, this: Socket) -> Answer<u8> {
        self.udp.get_unicast_hop_limit(this)
    }
    async fn set_unicast_hop_limit(&mut self, this: Socket, value: u8) -> Answer<()> {
        self.udp.set_unicast_hop_limit(this, value).await
    }
    fn get_receive_buffer_size(&mut self, this: Socket) -> Answer<u64> {
        self.udp.get_receive_buffer_size(this)
    }
    async fn set_receive_buffer_size(&mut self, this: Socket, value: u64) -> Answer<()> {
        self.udp.set_receive_buffer_size(this, value).await
    }
    fn get_send_buffer_size(&mut self, this: Socket) -> Answer<u64> {
        self.udp.get_send_buffer_size(this)
    }
    async fn set_send_buffer_size(&mut self, this: Socket, value: u64) -> Answer<()> {
        self.udp.set_send_buffer_size(this, value).await
    }
}

/// What waits beside other calls gets at the store's data in between, by a getter.
impl<A: Send + 'static> types::HostUdpSocketWithStore<State<A>> for LimitedUdp {
    async fn send(
        store: &Accessor<State<A>, Self>,
        this: Socket,
        data: Vec<u8>,
        remote_address: Option<IpSocketAddress>,
    ) -> Answer<()> {
        let store = store.with_getter::<Udp>(State::udp);
        <Udp as types::HostUdpSocketWithStore<_>>::send(&store, this, data, remote_address).await
    }
    async fn receive(
        store: &Accessor<State<A>, Self>,
        this: Socket,
    ) -> Answer<(Vec<u8>, IpSocketAddress)> {
        let store = store.with_getter::<Udp>(State::udp);
        <Udp as types::HostUdpSocketWithStore<_>>::receive(&store, this).await
    }
}
