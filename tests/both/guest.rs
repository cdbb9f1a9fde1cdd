//! The seam: a guest of either version, in the calls that both have in common.
//!
//! A socket of 0.3 is connected, sent through and received from by itself; one of 0.2 by its
//! streams, which [`Guest2`] makes when they are needed and exchanges when the peer changes.
//! Error codes are those of 0.2, which has one for all that these scenarios meet.

#![allow(clippy::needless_pass_by_value, reason = "scenarios are written where they are run")]

use std::collections::HashMap;
use std::fmt::Debug;
use std::net::{SocketAddr, UdpSocket};

use crate::common::{
    Backend, Check, Endpoint, ErrorCode, IpAddressFamily, LOOPBACK, LOOPBACK_6, Rig, Setup,
    block_on, on_each, same, sender, yield_to_others,
};
use crate::rig::{self, Call, Rig3, Status};

/// Makes a scenario two tests: `NAME::wasi2` and `NAME::wasi3`.
macro_rules! in_both {
    ($scenario:ident) => {
        mod $scenario {
            #[test]
            fn wasi2() {
                super::$scenario::<crate::guest::Guest2>();
            }

            #[test]
            fn wasi3() {
                super::$scenario::<crate::guest::Guest3>();
            }
        }
    };
}

/// What a receive answers.
pub(crate) type Received = Result<(Vec<u8>, SocketAddr), ErrorCode>;

pub(crate) trait Guest: Sized {
    async fn new(backend: Backend, setup: Setup) -> Self;

    /// The backend and the ring are here.
    fn rig(&self) -> &Rig;

    // ---- calls of both versions ----------------------------------------------------------------

    async fn create(&mut self, family: IpAddressFamily) -> Result<u32, ErrorCode>;
    async fn drop_socket(&mut self, socket: u32);
    async fn family(&mut self, socket: u32) -> IpAddressFamily;
    async fn local(&mut self, socket: u32) -> Result<SocketAddr, ErrorCode>;
    async fn remote(&mut self, socket: u32) -> Result<SocketAddr, ErrorCode>;
    async fn hop_limit(&mut self, socket: u32) -> Result<u8, ErrorCode>;
    async fn set_hop_limit(&mut self, socket: u32, value: u8) -> Result<(), ErrorCode>;
    async fn receive_buffer(&mut self, socket: u32) -> Result<u64, ErrorCode>;
    async fn set_receive_buffer(&mut self, socket: u32, bytes: u64) -> Result<(), ErrorCode>;
    async fn send_buffer(&mut self, socket: u32) -> Result<u64, ErrorCode>;
    async fn set_send_buffer(&mut self, socket: u32, bytes: u64) -> Result<(), ErrorCode>;

    // ---- bind ----------------------------------------------------------------------------------

    /// The first call of a bind: `start-bind` or `bind`. Errors that need no kernel come from here.
    async fn begin_bind(
        &mut self,
        socket: u32,
        addr: impl Into<SocketAddr>,
    ) -> Result<(), ErrorCode>;

    async fn bind(&mut self, socket: u32, addr: impl Into<SocketAddr>) -> Result<(), ErrorCode>;

    /// Where a bind has two calls: the second finds none begun.
    async fn assert_no_bind_begun(&mut self, socket: u32);

    // ---- connect, send, receive ----------------------------------------------------------------

    async fn connect(&mut self, socket: u32, peer: SocketAddr) -> Result<(), ErrorCode>;
    async fn disconnect(&mut self, socket: u32) -> Result<(), ErrorCode>;

    /// A new socket with a peer, bound by the connect where that does it.
    async fn connected(&mut self, peer: SocketAddr) -> u32;

    /// Sends one datagram. The socket is bound.
    async fn send(
        &mut self,
        socket: u32,
        data: &[u8],
        to: Option<SocketAddr>,
    ) -> Result<(), ErrorCode>;

    /// Waits for one datagram, or an error.
    async fn receive(&mut self, socket: u32) -> Received;

    /// Has the host receive for the socket before anything is there.
    async fn arm(&mut self, socket: u32);

    /// Asserts that nothing is there.
    async fn assert_hears_nothing(&mut self, socket: u32);

    /// Takes whatever was sent to a socket so far, and proves that it was all: a last datagram from
    /// `native` comes behind it.
    async fn drain(&mut self, socket: u32, native: &UdpSocket) -> Vec<Vec<u8>>;

    // ---- what scenarios do often ---------------------------------------------------------------

    fn is_uring(&self) -> bool {
        self.rig().backend == Backend::Uring
    }

    /// A new socket bound to an address, and where it is bound.
    async fn bound(&mut self, addr: impl Into<SocketAddr>) -> (u32, SocketAddr) {
        let addr = addr.into();
        let socket = self.create(family(addr)).await.unwrap();
        self.bind(socket, addr).await.unwrap();
        let local = self.local(socket).await.unwrap();
        (socket, local)
    }
}

/// Runs a scenario on wasmtime-wasi's sockets and on the ring, each in a runtime of its own.
pub(crate) fn on_both<G: Guest>(setup: Setup, scenario: impl AsyncFn(&mut G)) {
    on_each(|backend| on::<G, ()>(backend, setup.clone(), &scenario));
}

/// As `on_both`, and once more for each other way to give the ring the policy.
pub(crate) fn on_both_by_each_check<G: Guest>(setup: Setup, scenario: impl AsyncFn(&mut G)) {
    on_both(setup.clone(), &scenario);
    for check in Check::ALL {
        eprintln!("{check:?}:");
        on::<G, ()>(Backend::Uring, Setup { check, ..setup.clone() }, &scenario);
    }
}

/// Runs a scenario on both backends, which must return the same.
#[track_caller]
pub(crate) fn alike<G: Guest, T: Debug + PartialEq>(
    setup: Setup,
    scenario: impl AsyncFn(&mut G) -> T,
) -> T {
    same(|backend| on::<G, T>(backend, setup.clone(), &scenario))
}

/// Runs a scenario on one backend, on a current-thread runtime.
pub(crate) fn on<G: Guest, T>(
    backend: Backend,
    setup: Setup,
    scenario: impl AsyncFn(&mut G) -> T,
) -> T {
    block_on(async {
        let mut guest = G::new(backend, setup).await;
        scenario(&mut guest).await
    })
}

pub(crate) fn family(addr: SocketAddr) -> IpAddressFamily {
    match addr {
        SocketAddr::V4(_) => IpAddressFamily::Ipv4,
        SocketAddr::V6(_) => IpAddressFamily::Ipv6,
    }
}

// ---- WASI 0.2 -----------------------------------------------------------------------------------

pub(crate) struct Guest2 {
    rig: Rig,
    /// By socket.
    streams: HashMap<u32, Streams>,
}

/// A socket's streams.
#[derive(Default)]
struct Streams {
    /// Incoming and outgoing.
    open: Option<(u32, u32)>,
    /// The peer of these, or of the last.
    peer: Option<SocketAddr>,
}

impl Guest2 {
    /// A socket's incoming and outgoing stream.
    async fn streams(&mut self, socket: u32) -> Result<(u32, u32), ErrorCode> {
        let streams = self.streams.entry(socket).or_default();
        if let Some(open) = streams.open {
            return Ok(open);
        }
        let open = self.rig.stream(socket, streams.peer).await?;
        streams.open = Some(open);
        Ok(open)
    }

    async fn drop_streams(&mut self, socket: u32) {
        if let Some(open) = self.streams.entry(socket).or_default().open.take() {
            self.rig.drop_streams(open).await;
            // wasmtime-wasi would trap otherwise: see `Rig::reconnect`.
            yield_to_others().await;
        }
    }

    async fn exchange(&mut self, socket: u32, peer: Option<SocketAddr>) -> Result<(), ErrorCode> {
        self.drop_streams(socket).await;
        let open = self.rig.stream(socket, peer).await?;
        self.streams.insert(socket, Streams { open: Some(open), peer });
        Ok(())
    }
}

impl Guest for Guest2 {
    async fn new(backend: Backend, setup: Setup) -> Self {
        Self { rig: Rig::new(backend, setup).await, streams: HashMap::new() }
    }

    fn rig(&self) -> &Rig {
        &self.rig
    }

    async fn create(&mut self, family: IpAddressFamily) -> Result<u32, ErrorCode> {
        self.rig.create(family).await
    }

    async fn drop_socket(&mut self, socket: u32) {
        if let Some(Streams { open: Some(open), .. }) = self.streams.remove(&socket) {
            self.rig.drop_streams(open).await;
        }
        self.rig.drop_socket(socket).await;
    }

    async fn family(&mut self, socket: u32) -> IpAddressFamily {
        self.rig.family(socket).await
    }

    async fn local(&mut self, socket: u32) -> Result<SocketAddr, ErrorCode> {
        self.rig.local(socket).await
    }

    async fn remote(&mut self, socket: u32) -> Result<SocketAddr, ErrorCode> {
        self.rig.remote(socket).await
    }

    async fn hop_limit(&mut self, socket: u32) -> Result<u8, ErrorCode> {
        self.rig.hop_limit(socket).await
    }

    async fn set_hop_limit(&mut self, socket: u32, value: u8) -> Result<(), ErrorCode> {
        self.rig.set_hop_limit(socket, value).await
    }

    async fn receive_buffer(&mut self, socket: u32) -> Result<u64, ErrorCode> {
        self.rig.receive_buffer(socket).await
    }

    async fn set_receive_buffer(&mut self, socket: u32, bytes: u64) -> Result<(), ErrorCode> {
        self.rig.set_receive_buffer(socket, bytes).await
    }

    async fn send_buffer(&mut self, socket: u32) -> Result<u64, ErrorCode> {
        self.rig.send_buffer(socket).await
    }

    async fn set_send_buffer(&mut self, socket: u32, bytes: u64) -> Result<(), ErrorCode> {
        self.rig.set_send_buffer(socket, bytes).await
    }

    async fn begin_bind(
        &mut self,
        socket: u32,
        addr: impl Into<SocketAddr>,
    ) -> Result<(), ErrorCode> {
        self.rig.start_bind(socket, addr).await
    }

    async fn bind(&mut self, socket: u32, addr: impl Into<SocketAddr>) -> Result<(), ErrorCode> {
        self.rig.bind(socket, addr).await
    }

    async fn assert_no_bind_begun(&mut self, socket: u32) {
        assert_eq!(self.rig.finish_bind(socket).await, Err(ErrorCode::NotInProgress));
    }

    async fn connect(&mut self, socket: u32, peer: SocketAddr) -> Result<(), ErrorCode> {
        self.exchange(socket, Some(peer)).await
    }

    async fn disconnect(&mut self, socket: u32) -> Result<(), ErrorCode> {
        self.exchange(socket, None).await
    }

    async fn connected(&mut self, peer: SocketAddr) -> u32 {
        let (socket, _) = self.bound(if peer.is_ipv4() { LOOPBACK } else { LOOPBACK_6 }).await;
        self.connect(socket, peer).await.unwrap();
        socket
    }

    async fn send(
        &mut self,
        socket: u32,
        data: &[u8],
        to: Option<SocketAddr>,
    ) -> Result<(), ErrorCode> {
        let (_, outgoing) = self.streams(socket).await.unwrap();
        let sent = self.rig.send_one(outgoing, data, to).await?;
        assert_eq!(sent, 1);
        Ok(())
    }

    async fn receive(&mut self, socket: u32) -> Received {
        let (incoming, _) = self.streams(socket).await.unwrap();
        self.rig.wait_readable(incoming).await;
        let received = self.rig.receive(incoming, 1).await?;
        let [datagram] = &received[..] else { panic!("readable, but {received:?}") };
        Ok((datagram.data.clone(), sender(datagram)))
    }

    async fn arm(&mut self, socket: u32) {
        let (incoming, _) = self.streams(socket).await.unwrap();
        assert_eq!(self.rig.receive(incoming, 1).await, Ok(vec![]));
    }

    async fn assert_hears_nothing(&mut self, socket: u32) {
        let (incoming, _) = self.streams(socket).await.unwrap();
        let pollable = self.rig.subscribe_incoming(incoming).await;
        assert!(!self.rig.is_ready(pollable).await, "nothing that the guest could have");
        self.rig.drop_pollable(pollable).await;
        assert_eq!(self.rig.receive(incoming, 16).await, Ok(vec![]));
    }

    async fn drain(&mut self, socket: u32, native: &UdpSocket) -> Vec<Vec<u8>> {
        let (incoming, outgoing) = self.streams(socket).await.unwrap();
        let local = self.local(socket).await.unwrap();
        self.rig.drain(Endpoint { socket, incoming, outgoing, local }, native).await
    }
}

// ---- WASI 0.3 -----------------------------------------------------------------------------------

pub(crate) struct Guest3 {
    rig: Rig3,
    /// By socket: a receive that waits.
    armed: HashMap<u32, Call>,
}

/// The code of 0.2.
fn code(error: rig::ErrorCode) -> ErrorCode {
    use rig::ErrorCode as New;
    match error {
        New::AccessDenied => ErrorCode::AccessDenied,
        New::NotSupported => ErrorCode::NotSupported,
        New::InvalidArgument => ErrorCode::InvalidArgument,
        New::OutOfMemory => ErrorCode::OutOfMemory,
        New::Timeout => ErrorCode::Timeout,
        New::InvalidState => ErrorCode::InvalidState,
        New::AddressNotBindable => ErrorCode::AddressNotBindable,
        New::AddressInUse => ErrorCode::AddressInUse,
        New::RemoteUnreachable => ErrorCode::RemoteUnreachable,
        New::ConnectionRefused => ErrorCode::ConnectionRefused,
        New::ConnectionReset => ErrorCode::ConnectionReset,
        New::ConnectionAborted => ErrorCode::ConnectionAborted,
        New::DatagramTooLarge => ErrorCode::DatagramTooLarge,
        New::Other(Some(other)) if other == "new-socket-limit" => ErrorCode::NewSocketLimit,
        New::ConnectionBroken | New::Other(_) => panic!("0.2 has no such code: {error:?}"),
    }
}

impl Guest for Guest3 {
    async fn new(backend: Backend, setup: Setup) -> Self {
        Self { rig: Rig3::new(backend, setup).await, armed: HashMap::new() }
    }

    fn rig(&self) -> &Rig {
        &self.rig.rig
    }

    async fn create(&mut self, family: IpAddressFamily) -> Result<u32, ErrorCode> {
        let family = match family {
            IpAddressFamily::Ipv4 => rig::V4,
            IpAddressFamily::Ipv6 => rig::V6,
        };
        self.rig.create(family).await.map_err(code)
    }

    async fn drop_socket(&mut self, socket: u32) {
        if let Some(call) = self.armed.remove(&socket) {
            assert_eq!(self.rig.cancel(call).await, Status::Cancelled);
        }
        self.rig.drop_socket(socket).await;
    }

    async fn family(&mut self, socket: u32) -> IpAddressFamily {
        if self.rig.family(socket).await == rig::V4 {
            IpAddressFamily::Ipv4
        } else {
            IpAddressFamily::Ipv6
        }
    }

    async fn local(&mut self, socket: u32) -> Result<SocketAddr, ErrorCode> {
        self.rig.local(socket).await.map_err(code)
    }

    async fn remote(&mut self, socket: u32) -> Result<SocketAddr, ErrorCode> {
        self.rig.remote(socket).await.map_err(code)
    }

    async fn hop_limit(&mut self, socket: u32) -> Result<u8, ErrorCode> {
        self.rig.hop_limit(socket).await.map_err(code)
    }

    async fn set_hop_limit(&mut self, socket: u32, value: u8) -> Result<(), ErrorCode> {
        self.rig.set_hop_limit(socket, value).await.map_err(code)
    }

    async fn receive_buffer(&mut self, socket: u32) -> Result<u64, ErrorCode> {
        self.rig.receive_buffer(socket).await.map_err(code)
    }

    async fn set_receive_buffer(&mut self, socket: u32, bytes: u64) -> Result<(), ErrorCode> {
        self.rig.set_receive_buffer(socket, bytes).await.map_err(code)
    }

    async fn send_buffer(&mut self, socket: u32) -> Result<u64, ErrorCode> {
        self.rig.send_buffer(socket).await.map_err(code)
    }

    async fn set_send_buffer(&mut self, socket: u32, bytes: u64) -> Result<(), ErrorCode> {
        self.rig.set_send_buffer(socket, bytes).await.map_err(code)
    }

    async fn begin_bind(
        &mut self,
        socket: u32,
        addr: impl Into<SocketAddr>,
    ) -> Result<(), ErrorCode> {
        self.bind(socket, addr).await
    }

    async fn bind(&mut self, socket: u32, addr: impl Into<SocketAddr>) -> Result<(), ErrorCode> {
        self.rig.bind(socket, addr).await.map_err(code)
    }

    async fn assert_no_bind_begun(&mut self, _socket: u32) {}

    async fn connect(&mut self, socket: u32, peer: SocketAddr) -> Result<(), ErrorCode> {
        self.rig.connect(socket, peer).await.map_err(code)
    }

    async fn disconnect(&mut self, socket: u32) -> Result<(), ErrorCode> {
        self.rig.disconnect(socket).await.map_err(code)
    }

    async fn connected(&mut self, peer: SocketAddr) -> u32 {
        let socket = self.create(family(peer)).await.unwrap();
        self.connect(socket, peer).await.unwrap();
        socket
    }

    async fn send(
        &mut self,
        socket: u32,
        data: &[u8],
        to: Option<SocketAddr>,
    ) -> Result<(), ErrorCode> {
        self.rig.send(socket, data, to).await.map_err(code)
    }

    async fn receive(&mut self, socket: u32) -> Received {
        let received = match self.armed.remove(&socket) {
            Some(call) => self.rig.received(call).await,
            None => self.rig.receive(socket).await,
        };
        received.map_err(code)
    }

    async fn arm(&mut self, socket: u32) {
        let call = self.rig.waiting_receive(socket).await;
        assert_eq!(self.armed.insert(socket, call), None, "armed twice");
        self.rig.settle().await;
    }

    async fn assert_hears_nothing(&mut self, socket: u32) {
        let armed = self.armed.get(&socket).copied();
        let call = match armed {
            Some(call) => call,
            None => self.rig.waiting_receive(socket).await,
        };
        self.rig.settle().await;
        assert_eq!(self.rig.poll(call).await, Status::Started);
        if armed.is_none() {
            assert_eq!(self.rig.cancel(call).await, Status::Cancelled);
        }
    }

    async fn drain(&mut self, socket: u32, native: &UdpSocket) -> Vec<Vec<u8>> {
        const LAST: &[u8] = b"the last";
        let local = self.local(socket).await.unwrap();
        let mut all = Vec::new();
        loop {
            let (status, call) = self.rig.start_receive(socket).await;
            if status == Status::Started {
                // Again, should the kernel's buffer have been too full for the one before.
                native.send_to(LAST, local).unwrap();
            }
            let (data, _) = self.rig.received(call).await.unwrap();
            if data == LAST {
                return all;
            }
            all.push(data);
        }
    }
}
