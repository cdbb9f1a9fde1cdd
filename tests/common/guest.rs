//! What a guest can call, one method per function, and what scenarios do often.
//!
//! Each of these panics on a trap; call the guest itself to expect one.

use std::net::{SocketAddr, UdpSocket};

use super::{
    Endpoint, ErrorCode, IncomingDatagram, IpAddressFamily, OutgoingDatagram, Rig, datagram,
    from_wit, to_wit, within, yield_to_others,
};

impl Rig {
    // ---- wasi:sockets/udp-create-socket, wasi:sockets/udp.udp-socket --------------------------

    pub async fn create(&mut self, family: IpAddressFamily) -> Result<u32, ErrorCode> {
        self.guest.call_create_udp_socket(&mut self.store, family).await.unwrap()
    }

    pub async fn start_bind(
        &mut self,
        socket: u32,
        addr: impl Into<SocketAddr>,
    ) -> Result<(), ErrorCode> {
        let addr = to_wit(addr.into());
        self.guest.call_start_bind(&mut self.store, socket, self.network, addr).await.unwrap()
    }

    pub async fn finish_bind(&mut self, socket: u32) -> Result<(), ErrorCode> {
        self.guest.call_finish_bind(&mut self.store, socket).await.unwrap()
    }

    pub async fn stream(
        &mut self,
        socket: u32,
        remote: Option<SocketAddr>,
    ) -> Result<(u32, u32), ErrorCode> {
        self.guest.call_stream(&mut self.store, socket, remote.map(to_wit)).await.unwrap()
    }

    pub async fn local(&mut self, socket: u32) -> Result<SocketAddr, ErrorCode> {
        let answer = self.guest.call_local_address(&mut self.store, socket).await.unwrap();
        answer.map(from_wit)
    }

    pub async fn remote(&mut self, socket: u32) -> Result<SocketAddr, ErrorCode> {
        let answer = self.guest.call_remote_address(&mut self.store, socket).await.unwrap();
        answer.map(from_wit)
    }

    pub async fn family(&mut self, socket: u32) -> IpAddressFamily {
        self.guest.call_address_family(&mut self.store, socket).await.unwrap()
    }

    pub async fn hop_limit(&mut self, socket: u32) -> Result<u8, ErrorCode> {
        self.guest.call_unicast_hop_limit(&mut self.store, socket).await.unwrap()
    }

    pub async fn set_hop_limit(&mut self, socket: u32, value: u8) -> Result<(), ErrorCode> {
        self.guest.call_set_unicast_hop_limit(&mut self.store, socket, value).await.unwrap()
    }

    pub async fn receive_buffer(&mut self, socket: u32) -> Result<u64, ErrorCode> {
        self.guest.call_receive_buffer_size(&mut self.store, socket).await.unwrap()
    }

    pub async fn set_receive_buffer(&mut self, socket: u32, bytes: u64) -> Result<(), ErrorCode> {
        self.guest.call_set_receive_buffer_size(&mut self.store, socket, bytes).await.unwrap()
    }

    pub async fn send_buffer(&mut self, socket: u32) -> Result<u64, ErrorCode> {
        self.guest.call_send_buffer_size(&mut self.store, socket).await.unwrap()
    }

    pub async fn set_send_buffer(&mut self, socket: u32, bytes: u64) -> Result<(), ErrorCode> {
        self.guest.call_set_send_buffer_size(&mut self.store, socket, bytes).await.unwrap()
    }

    pub async fn subscribe_socket(&mut self, socket: u32) -> u32 {
        self.guest.call_subscribe_socket(&mut self.store, socket).await.unwrap()
    }

    pub async fn drop_socket(&mut self, socket: u32) {
        self.guest.call_drop_socket(&mut self.store, socket).await.unwrap();
    }

    // ---- incoming-datagram-stream, outgoing-datagram-stream -----------------------------------

    pub async fn receive(
        &mut self,
        incoming: u32,
        max: u64,
    ) -> Result<Vec<IncomingDatagram>, ErrorCode> {
        self.guest.call_receive(&mut self.store, incoming, max).await.unwrap()
    }

    pub async fn subscribe_incoming(&mut self, incoming: u32) -> u32 {
        self.guest.call_subscribe_incoming(&mut self.store, incoming).await.unwrap()
    }

    pub async fn drop_incoming(&mut self, incoming: u32) {
        self.guest.call_drop_incoming(&mut self.store, incoming).await.unwrap();
    }

    pub async fn check_send(&mut self, outgoing: u32) -> Result<u64, ErrorCode> {
        self.guest.call_check_send(&mut self.store, outgoing).await.unwrap()
    }

    pub async fn send(
        &mut self,
        outgoing: u32,
        datagrams: &[OutgoingDatagram],
    ) -> Result<u64, ErrorCode> {
        self.guest.call_send(&mut self.store, outgoing, datagrams).await.unwrap()
    }

    pub async fn subscribe_outgoing(&mut self, outgoing: u32) -> u32 {
        self.guest.call_subscribe_outgoing(&mut self.store, outgoing).await.unwrap()
    }

    pub async fn drop_outgoing(&mut self, outgoing: u32) {
        self.guest.call_drop_outgoing(&mut self.store, outgoing).await.unwrap();
    }

    // ---- wasi:io/poll -------------------------------------------------------------------------

    pub async fn is_ready(&mut self, pollable: u32) -> bool {
        self.guest.call_pollable_ready(&mut self.store, pollable).await.unwrap()
    }

    pub async fn block(&mut self, pollable: u32) {
        within(self.guest.call_pollable_block(&mut self.store, pollable)).await.unwrap();
    }

    /// Blocks until one is ready; the positions of those that are, ascending (WIT leaves it open).
    pub async fn poll(&mut self, pollables: &[u32]) -> Vec<u32> {
        let mut ready = within(self.guest.call_poll(&mut self.store, pollables)).await.unwrap();
        ready.sort_unstable();
        ready
    }

    pub async fn drop_pollable(&mut self, pollable: u32) {
        self.guest.call_drop_pollable(&mut self.store, pollable).await.unwrap();
    }

    // ---- several calls ------------------------------------------------------------------------

    /// `start-bind` and `finish-bind`, whichever of the two has the error.
    pub async fn bind(
        &mut self,
        socket: u32,
        addr: impl Into<SocketAddr>,
    ) -> Result<(), ErrorCode> {
        self.start_bind(socket, addr).await?;
        self.finish_bind(socket).await
    }

    /// A new socket bound to an address, and where it is bound.
    pub async fn bound(&mut self, addr: impl Into<SocketAddr>) -> (u32, SocketAddr) {
        let addr = addr.into();
        let family = match addr {
            SocketAddr::V4(_) => IpAddressFamily::Ipv4,
            SocketAddr::V6(_) => IpAddressFamily::Ipv6,
        };
        let socket = self.create(family).await.unwrap();
        self.bind(socket, addr).await.unwrap();
        let local = self.local(socket).await.unwrap();
        (socket, local)
    }

    /// A new socket bound to an address, with streams.
    pub async fn endpoint(&mut self, addr: impl Into<SocketAddr>) -> Endpoint {
        let (socket, local) = self.bound(addr).await;
        let (incoming, outgoing) = self.stream(socket, None).await.unwrap();
        Endpoint { socket, incoming, outgoing, local }
    }

    /// Exchanges an endpoint's streams for connected or unconnected ones.
    pub async fn reconnect(
        &mut self,
        endpoint: &mut Endpoint,
        remote: Option<SocketAddr>,
    ) -> Result<(), ErrorCode> {
        self.drop_streams((endpoint.incoming, endpoint.outgoing)).await;
        // wasmtime-wasi traps ("`connect` needs exclusive access") while a receive of the dropped
        // stream is still being aborted in the background.
        yield_to_others().await;
        (endpoint.incoming, endpoint.outgoing) = self.stream(endpoint.socket, remote).await?;
        Ok(())
    }

    pub async fn drop_streams(&mut self, (incoming, outgoing): (u32, u32)) {
        self.drop_incoming(incoming).await;
        self.drop_outgoing(outgoing).await;
    }

    /// Opens a socket, receives that many datagrams at once, and closes it.
    pub async fn receiving_life(
        &mut self,
        any: std::net::SocketAddr,
        native: &std::net::UdpSocket,
        datagrams: usize,
    ) {
        let endpoint = self.endpoint(any).await;
        assert_eq!(self.receive(endpoint.incoming, 1).await, Ok(vec![]), "armed");
        for _ in 0..datagrams {
            native.send_to(b"at once", endpoint.local).unwrap();
        }
        let received = self.receive_exactly(endpoint.incoming, datagrams).await;
        assert_eq!(received.len(), datagrams);
        self.close(endpoint).await;
    }

    pub async fn close(&mut self, endpoint: Endpoint) {
        self.drop_streams((endpoint.incoming, endpoint.outgoing)).await;
        self.drop_socket(endpoint.socket).await;
    }

    /// `check-send`, then `send` of datagrams.
    pub async fn send_all(
        &mut self,
        outgoing: u32,
        datagrams: &[OutgoingDatagram],
    ) -> Result<u64, ErrorCode> {
        let mut permit = self.check_send(outgoing).await?;
        // On a busy machine the thread that submits what was sent before may be held up.
        for _ in 0..100 {
            if permit > 0 {
                break;
            }
            tokio::task::yield_now().await;
            permit = self.check_send(outgoing).await?;
        }
        assert!(datagrams.len() as u64 <= permit, "permits {permit}");
        self.send(outgoing, datagrams).await
    }

    /// `check-send`, then `send` of one datagram.
    pub async fn send_one(
        &mut self,
        outgoing: u32,
        data: &[u8],
        to: Option<SocketAddr>,
    ) -> Result<u64, ErrorCode> {
        self.send_all(outgoing, &[datagram(data, to)]).await
    }

    /// Blocks on the stream's pollable until a datagram or an error is there.
    pub async fn wait_readable(&mut self, incoming: u32) {
        let pollable = self.subscribe_incoming(incoming).await;
        self.block(pollable).await;
        self.drop_pollable(pollable).await;
    }

    /// Waits for datagrams and takes them.
    pub async fn receive_blocking(
        &mut self,
        incoming: u32,
    ) -> Result<Vec<IncomingDatagram>, ErrorCode> {
        self.wait_readable(incoming).await;
        self.receive(incoming, 16).await
    }

    /// Waits until that many datagrams have come, and takes no more.
    pub async fn receive_exactly(&mut self, incoming: u32, count: usize) -> Vec<IncomingDatagram> {
        let mut all = Vec::new();
        while all.len() < count {
            self.wait_readable(incoming).await;
            all.extend(self.receive(incoming, (count - all.len()) as u64).await.unwrap());
        }
        all
    }

    /// Takes whatever was sent to an endpoint so far, and proves that it was all: a last datagram
    /// from `native` comes behind it.
    pub async fn drain(&mut self, endpoint: Endpoint, native: &UdpSocket) -> Vec<Vec<u8>> {
        const LAST: &[u8] = b"the last";
        let mut all = Vec::new();
        loop {
            let received = self.receive(endpoint.incoming, 16).await.unwrap();
            if received.is_empty() {
                // Again, should the kernel's buffer have been too full for the one before.
                native.send_to(LAST, endpoint.local).unwrap();
                self.wait_readable(endpoint.incoming).await;
            }
            for datagram in received {
                if datagram.data == LAST {
                    return all;
                }
                all.push(datagram.data);
            }
        }
    }
}
