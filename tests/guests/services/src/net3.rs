//! A UDP socket in the style of `std::net`, over WASI 0.3.

#![allow(dead_code, reason = "each guest uses its own part of this")]

use std::net::{Ipv4Addr, SocketAddrV4};

use wasip3::sockets::types::{
    ErrorCode, IpAddressFamily, IpSocketAddress, Ipv4SocketAddress, UdpSocket,
};

/// On a port that the host chooses.
const ANY: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);

fn address(addr: SocketAddrV4) -> IpSocketAddress {
    let [a, b, c, d] = addr.ip().octets();
    IpSocketAddress::Ipv4(Ipv4SocketAddress { port: addr.port(), address: (a, b, c, d) })
}

pub fn bind(local: SocketAddrV4) -> Result<UdpSocket, ErrorCode> {
    let socket = UdpSocket::create(IpAddressFamily::Ipv4)?;
    socket.bind(address(local))?;
    Ok(socket)
}

/// `bind`, then `connect`.
pub fn connected(peer: SocketAddrV4) -> Result<UdpSocket, ErrorCode> {
    let socket = bind(ANY)?;
    socket.connect(address(peer))?;
    Ok(socket)
}
