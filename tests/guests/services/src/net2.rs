//! A UDP socket in the style of `std::net`, over WASI 0.2.

#![allow(dead_code, reason = "each guest uses its own part of this")]

use std::net::{Ipv4Addr, SocketAddrV4};

use wasip2::io::poll::Pollable;
use wasip2::sockets::instance_network::instance_network;
use wasip2::sockets::network::{ErrorCode, IpAddressFamily, IpSocketAddress, Ipv4SocketAddress};
use wasip2::sockets::udp::{
    self, IncomingDatagram, IncomingDatagramStream, OutgoingDatagram, OutgoingDatagramStream,
};
use wasip2::sockets::udp_create_socket::create_udp_socket;

/// On a port that the host chooses.
pub const ANY: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);

pub fn address(addr: SocketAddrV4) -> IpSocketAddress {
    let [a, b, c, d] = addr.ip().octets();
    IpSocketAddress::Ipv4(Ipv4SocketAddress { port: addr.port(), address: (a, b, c, d) })
}

/// In an order in which it may be dropped: what is waited with is a child of the
/// stream, and the streams are of the socket.
pub struct UdpSocket {
    readable: Pollable,
    incoming: IncomingDatagramStream,
    outgoing: OutgoingDatagramStream,
    _socket: udp::UdpSocket,
}

impl UdpSocket {
    pub fn bind(local: SocketAddrV4) -> Result<Self, ErrorCode> {
        Self::open(local, None)
    }

    /// `bind`, then `connect`.
    pub fn connected(peer: SocketAddrV4) -> Result<Self, ErrorCode> {
        Self::open(ANY, Some(peer))
    }

    fn open(local: SocketAddrV4, peer: Option<SocketAddrV4>) -> Result<Self, ErrorCode> {
        let socket = create_udp_socket(IpAddressFamily::Ipv4)?;
        socket.start_bind(&instance_network(), address(local))?;
        loop {
            match socket.finish_bind() {
                Err(ErrorCode::WouldBlock) => socket.subscribe().block(),
                bound => break bound?,
            }
        }
        let (incoming, outgoing) = socket.stream(peer.map(address))?;
        Ok(Self { readable: incoming.subscribe(), incoming, outgoing, _socket: socket })
    }

    pub fn readable(&self) -> &Pollable {
        &self.readable
    }

    pub fn receive(&self, max: u64) -> Result<Vec<IncomingDatagram>, ErrorCode> {
        self.incoming.receive(max)
    }

    /// To the peer that it is connected to.
    pub fn send(&self, data: Vec<u8>) -> Result<(), ErrorCode> {
        self.send_all(&[OutgoingDatagram { data, remote_address: None }])
    }

    pub fn send_all(&self, mut datagrams: &[OutgoingDatagram]) -> Result<(), ErrorCode> {
        while !datagrams.is_empty() {
            let permitted = usize::try_from(self.outgoing.check_send()?).unwrap_or(usize::MAX);
            if permitted == 0 {
                self.outgoing.subscribe().block();
                continue;
            }
            let batch = &datagrams[..permitted.min(datagrams.len())];
            let sent = self.outgoing.send(batch)?;
            datagrams = &datagrams[usize::try_from(sent).unwrap_or(batch.len())..];
        }
        Ok(())
    }
}
