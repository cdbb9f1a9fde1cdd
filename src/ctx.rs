//! One guest's share of a ring: its policy, its quota, its name.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::task::yield_now;

use crate::datagram::Family;
use crate::driver::{Guest, Uring};
use crate::error::ErrorCode;
use crate::first_poll;
use crate::limits::{GUEST_SOCKETS_DEFAULT, TURN_DATAGRAMS};
use crate::policy::{Policy, SocketAddrUse};
use crate::ring::slots::Room;
use crate::socket::UdpSocket;

/// The UDP configuration of one guest. Make one per store, as one makes a
/// [`WasiCtx`](wasmtime_wasi::WasiCtx).
#[derive(Debug)]
pub struct UdpCtx(Arc<GuestCtx>);

/// What a guest's sockets share.
#[derive(Debug)]
pub(crate) struct GuestCtx {
    pub(crate) uring: Uring,
    pub(crate) guest: Guest,
    pub(crate) policy: Policy,
    pub(crate) quota: Arc<Room>,
    pub(crate) turn: Turn,
}

/// What a guest has had since it last suspended: one that always finds datagrams never does by
/// itself.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    datagrams: AtomicUsize,
}

impl Turn {
    pub(crate) fn begin(&self) {
        self.datagrams.store(0, Ordering::Relaxed);
    }

    pub(crate) fn count(&self, datagrams: usize) {
        self.datagrams.fetch_add(datagrams, Ordering::Relaxed);
    }

    pub(crate) async fn give_up_if_over(&self) {
        if self.datagrams.load(Ordering::Relaxed) >= TURN_DATAGRAMS {
            first_poll::over().await;
            // Not only behind the others that are ready: also behind a look at who else is.
            yield_now().await;
            self.begin();
        }
    }
}

/// Configures a [`UdpCtx`].
#[derive(Debug)]
#[must_use]
pub struct UdpCtxBuilder {
    uring: Uring,
    policy: Policy,
    sockets_max: u32,
}

impl Drop for GuestCtx {
    /// The guest and all its sockets are gone; the runtime that would close them may be, too.
    fn drop(&mut self) {
        self.uring.carry_out_now();
    }
}

impl UdpCtx {
    /// Starts configuring a guest of this ring.
    ///
    /// Without [`allow`](UdpCtxBuilder::allow) the guest has no UDP: to create a socket answers
    /// `access-denied`.
    pub fn builder(uring: &Uring) -> UdpCtxBuilder {
        UdpCtxBuilder {
            uring: uring.clone(),
            policy: Policy::default(),
            sockets_max: GUEST_SOCKETS_DEFAULT,
        }
    }

    pub(crate) fn new_socket(&mut self, family: Family) -> Result<UdpSocket, ErrorCode> {
        UdpSocket::new(&mut self.0, family)
    }
}

impl UdpCtxBuilder {
    /// Lets the guest have UDP sockets, and asks `allow` about every address before it is used;
    /// `false` answers `access-denied`, or drops the datagram on receipt.
    ///
    /// The check sees what wasmtime-wasi's
    /// [`socket_addr_check`](wasmtime_wasi::WasiCtxBuilder::socket_addr_check) sees: `UdpBind` with
    /// the address to bind (unspecified, with port 0, where WASI 0.3 binds by itself), `UdpSend` and
    /// `UdpReceive` with the peer to connect to, `UdpSend` with every datagram's destination, and
    /// `UdpReceive` with every datagram's sender. It runs inside the guest's call, so it should
    /// decide and not wait.
    pub fn allow(
        mut self,
        allow: impl Fn(SocketAddr, SocketAddrUse) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.policy = Policy::new(allow);
        self
    }

    /// Sockets the guest may hold at once; the next answers `new-socket-limit` (WASI 0.3:
    /// `other(some("new-socket-limit"))`). By default [`GUEST_SOCKETS_DEFAULT`].
    pub fn sockets_max(mut self, sockets_max: u32) -> Self {
        self.sockets_max = sockets_max;
        self
    }

    /// The finished configuration.
    #[must_use]
    pub fn build(self) -> UdpCtx {
        UdpCtx(Arc::new(GuestCtx {
            uring: self.uring,
            guest: Guest::new(),
            policy: self.policy,
            quota: Room::new(self.sockets_max),
            turn: Turn::default(),
        }))
    }
}
