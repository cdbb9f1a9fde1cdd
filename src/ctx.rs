//! What a host configures and provides for each guest: its [`UdpCtx`], and the [`UdpView`] by which
//! the linker functions find it in a store.

use std::net::SocketAddr;
use std::sync::Arc;

use wasmtime::component::{HasData, ResourceTable};

use crate::datagram::Family;
use crate::error::ErrorCode;
use crate::limits::{GUEST_QUEUE_BYTES_DEFAULT, GUEST_SEND_BYTES_DEFAULT, GUEST_SOCKETS_DEFAULT};
use crate::socket::UdpSocket;
use crate::socket::guest::GuestCtx;
use crate::socket::policy::{Policy, SocketAddrUse};
use crate::uring::Uring;

/// What a store's data must provide: its guest's [`UdpCtx`] and resource table.
pub trait UdpView: Send {
    /// Both, borrowed together.
    fn udp(&mut self) -> UdpCtxView<'_>;
}

/// What [`UdpView`] provides.
#[derive(Debug)]
pub struct UdpCtxView<'a> {
    /// The guest's UDP configuration and ring.
    pub ctx: &'a mut UdpCtx,
    /// The guest's resources, the same table as [`WasiView`](wasmtime_wasi::WasiView)'s.
    pub table: &'a mut ResourceTable,
}

/// Names [`UdpCtxView`] where Wasmtime wants a type without a lifetime: the `D` of the bindings'
/// `add_to_linker::<T, D>(linker, getter)` (`p2::bindings`, `p3::bindings`).
#[derive(Clone, Copy, Debug)]
pub struct Udp;

impl HasData for Udp {
    type Data<'a> = UdpCtxView<'a>;
}

/// The UDP configuration of one guest. Make one per store, as one makes a
/// [`WasiCtx`](wasmtime_wasi::WasiCtx).
#[derive(Debug)]
pub struct UdpCtx(Arc<GuestCtx>);

impl UdpCtx {
    /// Starts configuring a guest of this ring.
    ///
    /// Without [`allow`](UdpCtxBuilder::allow) the guest has no UDP: `access-denied` is the answer
    /// to its creating a socket.
    pub fn builder(uring: &Uring) -> UdpCtxBuilder {
        UdpCtxBuilder {
            uring: uring.clone(),
            policy: Policy::default(),
            sockets_max: GUEST_SOCKETS_DEFAULT,
            queue_bytes_max: GUEST_QUEUE_BYTES_DEFAULT,
            send_bytes_max: GUEST_SEND_BYTES_DEFAULT,
        }
    }

    pub(crate) fn new_socket(&self, family: Family) -> Result<UdpSocket, ErrorCode> {
        UdpSocket::new(&self.0, family)
    }
}

/// Configures a [`UdpCtx`].
#[derive(Debug)]
#[must_use]
pub struct UdpCtxBuilder {
    uring: Uring,
    policy: Policy,
    sockets_max: u32,
    queue_bytes_max: usize,
    send_bytes_max: usize,
}

impl UdpCtxBuilder {
    /// Lets the guest have UDP sockets, and calls `allow` with every address before it is used;
    /// `false` answers `access-denied`, or drops the datagram on receipt. Without it UDP is refused.
    ///
    /// The check sees what wasmtime-wasi's
    /// [`socket_addr_check`](wasmtime_wasi::WasiCtxBuilder::socket_addr_check) sees: `UdpBind` with
    /// the address to bind (unspecified, with port 0, where WASI 0.3 binds by itself), `UdpSend` and
    /// `UdpReceive` with the peer to connect to, `UdpSend` with every datagram's destination, and
    /// `UdpReceive` with every datagram's sender. It runs inside the guest's call, on the guest's
    /// thread, so it should decide and not wait. No lock of the ring is held meanwhile.
    pub fn allow(
        mut self,
        allow: impl Fn(SocketAddr, SocketAddrUse) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.policy = Policy::new(allow);
        self
    }

    /// Sockets the guest may hold at once; the next answers `new-socket-limit` (WASI 0.3:
    /// `other(some("new-socket-limit"))`). Any number, by default [`GUEST_SOCKETS_DEFAULT`]; 0 lets
    /// the guest create none.
    ///
    /// The sockets of all guests of a ring together are bounded by its table
    /// ([`UringBuilder::sockets`](crate::UringBuilder::sockets)), whatever the sum of these.
    pub fn sockets_max(mut self, sockets_max: u32) -> Self {
        self.sockets_max = sockets_max;
        self
    }

    /// Bytes of received datagrams that may wait for the guest, in the queues of all its sockets together;
    /// any number, by default [`GUEST_QUEUE_BYTES_DEFAULT`]. A datagram counts its payload and
    /// [`QUEUED_DATAGRAM_BYTES`](crate::limits::QUEUED_DATAGRAM_BYTES).
    ///
    /// From half of it on the sockets that get something are paused, so that the kernel's buffers
    /// (`SO_RCVBUF`) take over; beyond it what comes is dropped and counted
    /// ([`Stats::dropped_by_queue`](crate::Stats)), but for one message (up to 64 datagrams and 65,507
    /// bytes) of each socket. So that is what a guest can have a host hold: so many bytes, and for each
    /// socket it may have one message and one that `poll` has found. One socket's own bound is
    /// [`UringBuilder::queue_bytes`](crate::UringBuilder::queue_bytes).
    pub fn queue_bytes_max(mut self, queue_bytes_max: usize) -> Self {
        self.queue_bytes_max = queue_bytes_max;
        self
    }

    /// Payload bytes that may wait for send buffer, of all sends of the guest's sockets together; any number,
    /// by default [`GUEST_SEND_BYTES_DEFAULT`].
    ///
    /// What a `send` of WASI 0.2 has accepted and the kernel has no room for (`SO_SNDBUF`) waits in the host,
    /// up to 16 datagrams of 65,507 bytes for each socket. When so many bytes wait, one `send` may still
    /// add its own (up to a mebibyte); from then on each accepts only what the kernel takes at once,
    /// as wasmtime-wasi's do, and `check-send` answers 0 until there is room.
    ///
    /// A `send` of WASI 0.3 returns when the kernel has taken its datagram, which it holds until then, as
    /// wasmtime-wasi's does: how many such calls a guest may have is Wasmtime's to bound
    /// ([`ResourceTable::set_max_capacity`] does not). Once so many bytes wait, none is left to another
    /// thread to submit.
    pub fn send_bytes_max(mut self, send_bytes_max: usize) -> Self {
        self.send_bytes_max = send_bytes_max;
        self
    }

    /// The finished configuration.
    #[must_use]
    pub fn build(self) -> UdpCtx {
        UdpCtx(Arc::new(GuestCtx::new(
            Arc::clone(self.uring.pool()),
            self.policy,
            self.sockets_max,
            self.queue_bytes_max,
            self.send_bytes_max,
        )))
    }
}
