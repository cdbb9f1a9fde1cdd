//! An adapter for an older WIT, as hosts have them that still serve guests of before WASI 0.2: the older
//! interfaces' functions, which have other shapes and are all async here, over this crate's bindings.
//!
//! What is here of the older version is cut down to what the guest calls. Its sockets have no streams:
//! they send and receive themselves, and are connected in two steps.

use wasi_uring::p2::bindings::sockets::udp::{
    self, HostIncomingDatagramStream, HostOutgoingDatagramStream, HostUdpSocket, OutgoingDatagram,
};
use wasi_uring::p2::bindings::sockets::udp_create_socket;
use wasi_uring::p2::bindings::{IncomingDatagramStream, OutgoingDatagramStream, UdpSocket};
use wasi_uring::{Udp, UdpCtxView, UdpView};
use wasmtime::component::{Component, Linker, Resource};
use wasmtime_wasi::p2::bindings::sockets::{instance_network, network};
use wasmtime_wasi::p2::{Network, SocketResult};
use wasmtime_wasi::sockets::{WasiSockets, WasiSocketsCtxView, WasiSocketsView};

use self::bindings::wasi::sockets as older;
use self::older::network::{ErrorCode, IpAddressFamily, IpSocketAddress};
use crate::common::{Backend, Host, Setup, block_on, engine, eventually, host, uring_with, within};

mod bindings {
    wasmtime::component::bindgen!({
        inline: "
            package test:older;

            world older {
                import wasi:sockets/instance-network@0.2.0-rc-2023-10-18;
                import wasi:sockets/udp-create-socket@0.2.0-rc-2023-10-18;
                export run: func() -> u32;
            }

            package wasi:sockets@0.2.0-rc-2023-10-18 {
                interface network {
                    resource network;
                    enum error-code {
                        unknown,
                        access-denied,
                        not-supported,
                        invalid-argument,
                        would-block,
                        invalid-state,
                        new-socket-limit,
                        address-not-bindable,
                        address-in-use,
                        remote-unreachable,
                        datagram-too-large,
                    }
                    enum ip-address-family { ipv4, ipv6 }
                    type ipv4-address = tuple<u8, u8, u8, u8>;
                    type ipv6-address = tuple<u16, u16, u16, u16, u16, u16, u16, u16>;
                    record ipv4-socket-address {
                        port: u16,
                        address: ipv4-address,
                    }
                    record ipv6-socket-address {
                        port: u16,
                        flow-info: u32,
                        address: ipv6-address,
                        scope-id: u32,
                    }
                    variant ip-socket-address {
                        ipv4(ipv4-socket-address),
                        ipv6(ipv6-socket-address),
                    }
                }
                interface instance-network {
                    use network.{network};
                    instance-network: func() -> network;
                }
                interface udp {
                    use network.{network, error-code, ip-socket-address};
                    record datagram {
                        data: list<u8>,
                        remote-address: ip-socket-address,
                    }
                    resource udp-socket {
                        start-bind: func(network: borrow<network>, local-address: ip-socket-address) -> result<_, error-code>;
                        finish-bind: func() -> result<_, error-code>;
                        start-connect: func(network: borrow<network>, remote-address: ip-socket-address) -> result<_, error-code>;
                        finish-connect: func() -> result<_, error-code>;
                        receive: func(max-results: u64) -> result<list<datagram>, error-code>;
                        send: func(datagrams: list<datagram>) -> result<u64, error-code>;
                        local-address: func() -> result<ip-socket-address, error-code>;
                    }
                }
                interface udp-create-socket {
                    use network.{error-code, ip-address-family};
                    use udp.{udp-socket};
                    create-udp-socket: func(address-family: ip-address-family) -> result<udp-socket, error-code>;
                }
            }
        ",
        imports: { default: async | trappable },
        exports: { default: async },
        with: {
            "wasi:sockets/network.network": wasmtime_wasi::p2::Network,
            "wasi:sockets/udp.udp-socket": super::OlderSocket,
        },
    });
}

/// The older interface's socket: this crate's, and what that has outside of itself.
#[allow(unreachable_pub, reason = "the bindings export it")]
pub struct OlderSocket {
    socket: Resource<UdpSocket>,
    streams: Option<(Resource<IncomingDatagramStream>, Resource<OutgoingDatagramStream>)>,
    connecting: Option<IpSocketAddress>,
}

/// A trap, or the guest's answer.
type Answer<T> = wasmtime::Result<Result<T, ErrorCode>>;

fn answer<T>(result: SocketResult<T>) -> Answer<T> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(error) => Ok(Err(error.downcast()?.into())),
    }
}

/// The handles of an older socket, to be borrowed by this crate's functions.
fn of(view: &UdpCtxView<'_>, this: &Resource<OlderSocket>) -> wasmtime::Result<OlderSocket> {
    let socket = view.table.get(this)?;
    let borrowed = |(incoming, outgoing): &(Resource<_>, Resource<_>)| {
        (Resource::new_borrow(incoming.rep()), Resource::new_borrow(outgoing.rep()))
    };
    Ok(OlderSocket {
        socket: Resource::new_borrow(socket.socket.rep()),
        streams: socket.streams.as_ref().map(borrowed),
        connecting: socket.connecting,
    })
}

/// Drops a socket's streams.
fn close(view: &mut UdpCtxView<'_>, this: &Resource<OlderSocket>) -> wasmtime::Result<()> {
    if let Some((incoming, outgoing)) = view.table.get_mut(this)?.streams.take() {
        HostIncomingDatagramStream::drop(view, incoming)?;
        HostOutgoingDatagramStream::drop(view, outgoing)?;
    }
    Ok(())
}

/// Opens a socket's streams, to a peer or to anyone.
async fn open(
    view: &mut UdpCtxView<'_>,
    this: &Resource<OlderSocket>,
    peer: Option<IpSocketAddress>,
) -> Answer<()> {
    close(view, this)?;
    let socket = of(view, this)?.socket;
    let opened = answer(view.stream(socket, peer.map(Into::into)).await)?;
    Ok(match opened {
        Ok(streams) => {
            view.table.get_mut(this)?.streams = Some(streams);
            Ok(())
        }
        Err(error) => Err(error),
    })
}

impl older::udp_create_socket::Host for UdpCtxView<'_> {
    async fn create_udp_socket(
        &mut self,
        family: IpAddressFamily,
    ) -> Answer<Resource<OlderSocket>> {
        let family = match family {
            IpAddressFamily::Ipv4 => network::IpAddressFamily::Ipv4,
            IpAddressFamily::Ipv6 => network::IpAddressFamily::Ipv6,
        };
        let created = udp_create_socket::Host::create_udp_socket(self, family);
        Ok(match answer(created)? {
            Ok(socket) => {
                Ok(self.table.push(OlderSocket { socket, streams: None, connecting: None })?)
            }
            Err(error) => Err(error),
        })
    }
}

impl older::udp::Host for UdpCtxView<'_> {}

impl older::udp::HostUdpSocket for UdpCtxView<'_> {
    async fn start_bind(
        &mut self,
        this: Resource<OlderSocket>,
        network: Resource<Network>,
        local_address: IpSocketAddress,
    ) -> Answer<()> {
        let socket = of(self, &this)?.socket;
        let bound = HostUdpSocket::start_bind(self, socket, network, local_address.into()).await;
        answer(bound)
    }

    async fn finish_bind(&mut self, this: Resource<OlderSocket>) -> Answer<()> {
        let socket = of(self, &this)?.socket;
        match answer(HostUdpSocket::finish_bind(self, socket).await)? {
            Ok(()) => open(self, &this, None).await,
            Err(error) => Ok(Err(error)),
        }
    }

    async fn start_connect(
        &mut self,
        this: Resource<OlderSocket>,
        _network: Resource<Network>,
        remote_address: IpSocketAddress,
    ) -> Answer<()> {
        self.table.get_mut(&this)?.connecting = Some(remote_address);
        Ok(Ok(()))
    }

    async fn finish_connect(&mut self, this: Resource<OlderSocket>) -> Answer<()> {
        match self.table.get_mut(&this)?.connecting.take() {
            Some(peer) => open(self, &this, Some(peer)).await,
            None => Ok(Err(ErrorCode::InvalidState)),
        }
    }

    async fn receive(
        &mut self,
        this: Resource<OlderSocket>,
        max_results: u64,
    ) -> Answer<Vec<older::udp::Datagram>> {
        let Some((incoming, _)) = of(self, &this)?.streams else {
            return Ok(Err(ErrorCode::InvalidState));
        };
        let received = HostIncomingDatagramStream::receive(self, incoming, max_results).await;
        Ok(match answer(received)? {
            Ok(datagrams) if datagrams.is_empty() => Err(ErrorCode::WouldBlock),
            Ok(datagrams) => Ok(datagrams.into_iter().map(Into::into).collect()),
            Err(error) => Err(error),
        })
    }

    async fn send(
        &mut self,
        this: Resource<OlderSocket>,
        datagrams: Vec<older::udp::Datagram>,
    ) -> Answer<u64> {
        let (Some((_, checked)), Some((_, outgoing))) =
            (of(self, &this)?.streams, of(self, &this)?.streams)
        else {
            return Ok(Err(ErrorCode::InvalidState));
        };
        let permitted = match answer(self.check_send(checked))? {
            Ok(0) => return Ok(Err(ErrorCode::WouldBlock)),
            Ok(permitted) => usize::try_from(permitted)?,
            Err(error) => return Ok(Err(error)),
        };
        let datagrams = datagrams.into_iter().take(permitted).map(Into::into).collect();
        answer(HostOutgoingDatagramStream::send(self, outgoing, datagrams).await)
    }

    async fn local_address(&mut self, this: Resource<OlderSocket>) -> Answer<IpSocketAddress> {
        let socket = of(self, &this)?.socket;
        let local = HostUdpSocket::local_address(self, socket).await;
        answer(local.map(IpSocketAddress::from))
    }

    async fn drop(&mut self, this: Resource<OlderSocket>) -> wasmtime::Result<()> {
        close(self, &this)?;
        let socket = self.table.delete(this)?.socket;
        HostUdpSocket::drop(self, socket)
    }
}

impl older::network::Host for UdpCtxView<'_> {}

impl older::network::HostNetwork for UdpCtxView<'_> {
    async fn drop(&mut self, this: Resource<Network>) -> wasmtime::Result<()> {
        network::HostNetwork::drop(self, this)
    }
}

impl older::instance_network::Host for WasiSocketsCtxView<'_> {
    async fn instance_network(&mut self) -> wasmtime::Result<Resource<Network>> {
        instance_network::Host::instance_network(self)
    }
}

// ---- the older version's types ------------------------------------------------------------------

impl From<network::ErrorCode> for ErrorCode {
    fn from(error: network::ErrorCode) -> Self {
        use network::ErrorCode as New;
        #[expect(
            clippy::wildcard_enum_match_arm,
            reason = "all that the older one has no code for"
        )]
        match error {
            New::AccessDenied => Self::AccessDenied,
            New::NotSupported => Self::NotSupported,
            New::InvalidArgument => Self::InvalidArgument,
            New::WouldBlock => Self::WouldBlock,
            New::InvalidState => Self::InvalidState,
            New::NewSocketLimit => Self::NewSocketLimit,
            New::AddressNotBindable => Self::AddressNotBindable,
            New::AddressInUse => Self::AddressInUse,
            New::RemoteUnreachable => Self::RemoteUnreachable,
            New::DatagramTooLarge => Self::DatagramTooLarge,
            _ => Self::Unknown,
        }
    }
}

impl From<IpSocketAddress> for network::IpSocketAddress {
    fn from(address: IpSocketAddress) -> Self {
        match address {
            IpSocketAddress::Ipv4(v4) => {
                Self::Ipv4(network::Ipv4SocketAddress { port: v4.port, address: v4.address })
            }
            IpSocketAddress::Ipv6(v6) => Self::Ipv6(network::Ipv6SocketAddress {
                port: v6.port,
                flow_info: v6.flow_info,
                address: v6.address,
                scope_id: v6.scope_id,
            }),
        }
    }
}

impl From<network::IpSocketAddress> for IpSocketAddress {
    fn from(address: network::IpSocketAddress) -> Self {
        match address {
            network::IpSocketAddress::Ipv4(v4) => {
                Self::Ipv4(older::network::Ipv4SocketAddress { port: v4.port, address: v4.address })
            }
            network::IpSocketAddress::Ipv6(v6) => Self::Ipv6(older::network::Ipv6SocketAddress {
                port: v6.port,
                flow_info: v6.flow_info,
                address: v6.address,
                scope_id: v6.scope_id,
            }),
        }
    }
}

impl From<udp::IncomingDatagram> for older::udp::Datagram {
    fn from(datagram: udp::IncomingDatagram) -> Self {
        Self { data: datagram.data, remote_address: datagram.remote_address.into() }
    }
}

impl From<older::udp::Datagram> for OutgoingDatagram {
    fn from(datagram: older::udp::Datagram) -> Self {
        Self { data: datagram.data, remote_address: Some(datagram.remote_address.into()) }
    }
}

// ---- the host -----------------------------------------------------------------------------------

/// Adds the older version beside the one that the linker has.
fn add_to_linker(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    older::network::add_to_linker::<_, Udp>(linker, Host::udp)?;
    older::instance_network::add_to_linker::<_, WasiSockets>(linker, Host::sockets)?;
    older::udp::add_to_linker::<_, Udp>(linker, Host::udp)?;
    older::udp_create_socket::add_to_linker::<_, Udp>(linker, Host::udp)
}

#[test]
fn a_guest_of_an_older_wit_is_served_by_an_adapter_over_the_public_bindings() {
    block_on(async {
        let uring = uring_with(4);
        let (_, mut linker, mut store) = host(engine(), Backend::Uring, Setup::of(&uring));
        add_to_linker(&mut linker).unwrap();
        let component = Component::new(engine(), include_str!("../guests/older.wat")).unwrap();
        let guest =
            bindings::Older::instantiate_async(&mut store, &component, &linker).await.unwrap();
        assert_eq!(within(guest.call_run(&mut store)).await.unwrap(), 0, "the step that failed");
        assert_eq!(uring.stats().sockets_created, 1);
        eventually("its socket is closed", || uring.stats().sockets_open == 0).await;
    });
}
