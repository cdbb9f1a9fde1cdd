//! What a host configures and provides for each guest: its [`UdpCtx`], and the [`UdpView`] by which
//! the linker functions find it in a store.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use wasmtime::component::{HasData, ResourceTable};

use crate::datagram::Family;
use crate::error::ErrorCode;
use crate::limits::{
    DEFERRED_TIME_DEFAULT, GUEST_QUEUE_BYTES_DEFAULT, GUEST_SEND_BYTES_DEFAULT,
    GUEST_SOCKETS_DEFAULT,
};
use crate::ring::account::{Account, GuestLimits};
use crate::ring::quota::Quota;
use crate::socket::UdpSocket;
use crate::socket::guest::GuestCtx;
use crate::socket::policy::{Checks, Policy, SocketAddrUse};
use crate::stats::GuestStats;
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
///
/// A store that opens no socket pays for no more than a clone of its configuration: make a
/// [`UdpCtxBuilder`] once, and [`build`](UdpCtxBuilder::build) a clone of it for each store. That neither
/// allocates nor takes a lock, and nor does dropping it. What a guest's sockets share is made with the first.
#[derive(Debug)]
pub struct UdpCtx {
    template: UdpCtxBuilder,
    /// Made when it is first needed.
    guest: OnceLock<Arc<GuestCtx>>,
}

impl UdpCtx {
    /// Starts configuring a guest of this ring.
    ///
    /// Without [`allow`](UdpCtxBuilder::allow), [`socket_addr_check`](UdpCtxBuilder::socket_addr_check) or
    /// [`policy`](UdpCtxBuilder::policy) the guest has no UDP: `access-denied` is the answer to its creating
    /// a socket.
    pub fn builder(uring: &Uring) -> UdpCtxBuilder {
        UdpCtxBuilder {
            uring: uring.clone(),
            checks: Checks::default(),
            limits: GuestLimits {
                sockets: GUEST_SOCKETS_DEFAULT,
                quota: None,
                queue_bytes: GUEST_QUEUE_BYTES_DEFAULT,
                send_bytes: GUEST_SEND_BYTES_DEFAULT,
                deferred_time: DEFERRED_TIME_DEFAULT,
            },
        }
    }

    /// The guest's counters so far. They are read and nothing else: what the kernel has completed, and no call
    /// has taken note of, is counted when one does ([`Uring::stats`](crate::Uring::stats) does that for all).
    #[must_use]
    pub fn stats(&self) -> GuestStats {
        self.guest.get().map_or_else(GuestStats::default, |guest| guest.account.stats())
    }

    /// A handle of the guest's counters, which can be read also when its store is gone. (The guest of a store
    /// that has one costs two allocations, with a socket or without.)
    #[must_use]
    pub fn counters(&self) -> GuestCounters {
        GuestCounters(Arc::clone(&self.guest().account))
    }

    fn guest(&self) -> &Arc<GuestCtx> {
        self.guest.get_or_init(|| {
            let UdpCtxBuilder { uring, checks, limits } = self.template.clone();
            Arc::new(GuestCtx::new(Arc::clone(uring.pool()), checks, limits))
        })
    }

    pub(crate) fn new_socket(&mut self, family: Family) -> Result<UdpSocket, ErrorCode> {
        UdpSocket::new(self.guest(), family)
    }
}

/// The counters of one guest; [`UdpCtx::counters`]. Clones are of the same guest.
#[derive(Clone, Debug)]
pub struct GuestCounters(Arc<Account>);

impl GuestCounters {
    /// The counters so far, as [`UdpCtx::stats`] has them.
    #[must_use]
    pub fn stats(&self) -> GuestStats {
        self.0.stats()
    }
}

/// Configures a [`UdpCtx`], or those of many stores: to clone it allocates nothing.
#[derive(Clone, Debug)]
#[must_use]
pub struct UdpCtxBuilder {
    uring: Uring,
    checks: Checks,
    limits: GuestLimits,
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
    ///
    /// Of this, [`socket_addr_check`](Self::socket_addr_check) and [`policy`](Self::policy) the last counts.
    pub fn allow(
        mut self,
        allow: impl Fn(SocketAddr, SocketAddrUse) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.checks = Checks::allow(allow);
        self
    }

    /// As [`allow`](Self::allow), with a check that may have to be waited for: the very closure that
    /// wasmtime-wasi's [`socket_addr_check`](wasmtime_wasi::WasiCtxBuilder::socket_addr_check) takes (without
    /// its uses for TCP).
    ///
    /// Its future is polled at once, and costs no suspension if it is ready then. [`Verdict::ask`](crate::Verdict::ask) says what
    /// happens to datagrams whose sender it is asked about for longer.
    pub fn socket_addr_check<F>(mut self, check: F) -> Self
    where
        F: Fn(SocketAddr, SocketAddrUse) -> Pin<Box<dyn Future<Output = bool> + Send + Sync>>
            + Send
            + Sync
            + 'static,
    {
        self.checks = Checks::addr_check(check);
        self
    }

    /// Lets the guest have UDP sockets, as far as a [`Policy`] allows: one that is told which socket an address
    /// is used by, gives reasons, and hears when sockets come and go.
    pub fn policy(mut self, policy: impl Policy + 'static) -> Self {
        self.checks = Checks::Policy(Arc::new(policy));
        self
    }

    /// A quota that the guest's sockets are counted in beside its own ([`sockets_max`](Self::sockets_max)), with
    /// those of all other guests that have a clone of it: of a tenant, an app, the host. When it is used
    /// up, or one that it is [within](Quota::within), the next socket is refused as beyond the guest's own.
    pub fn quota(mut self, quota: &Quota) -> Self {
        self.limits.quota = Some(quota.clone());
        self
    }

    /// Sockets the guest may hold at once; the next answers `new-socket-limit` (WASI 0.3:
    /// `other(some("new-socket-limit"))`). Any number, by default [`GUEST_SOCKETS_DEFAULT`]; 0 lets
    /// the guest create none.
    ///
    /// The sockets of all guests of a ring together are bounded by its table
    /// ([`UringBuilder::sockets`](crate::UringBuilder::sockets)), whatever the sum of these.
    pub fn sockets_max(mut self, sockets_max: u32) -> Self {
        self.limits.sockets = sockets_max;
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
        self.limits.queue_bytes = queue_bytes_max;
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
        self.limits.send_bytes = send_bytes_max;
        self
    }

    /// How long a datagram that the guest is told is sent may wait for others that go the same way; any time, by
    /// default [`DEFERRED_TIME_DEFAULT`]. With 0 none does: each `send` has reached the kernel when it returns, as
    /// wasmtime-wasi's has, and a guest that sends datagrams one by one pays for an enter each.
    ///
    /// What a guest sends on to a peer that its socket has reached lately is deferred; so is what it answers or
    /// hands on, if it takes at most a quarter of this time for each, and if no two of its own sockets ask each other.
    /// All of it leaves before, as soon as the guest suspends or finds nothing to receive, with what any other guest
    /// of its ring submits, and when the socket has 64 datagrams or 32 KiB of it; what is left of this time counts
    /// only for a guest that computes on. One that has not sent for so long counts as having suspended meanwhile.
    pub fn deferred_time(mut self, deferred_time: Duration) -> Self {
        self.limits.deferred_time = deferred_time;
        self
    }

    /// The finished configuration.
    #[must_use]
    pub fn build(self) -> UdpCtx {
        UdpCtx { template: self, guest: OnceLock::new() }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    /// Kills: a drop that has a ring see to what the guest has left.
    #[test]
    fn a_context_that_creates_no_socket_takes_no_lock() {
        let uring = Uring::builder().sockets(1).build().unwrap();
        let template = UdpCtx::builder(&uring).allow(|_, _| true).quota(&Quota::new(1));
        uring.pool().while_locked(|| {
            let (done, is_done) = channel();
            thread::spawn(move || {
                let ctx = template.clone().build();
                let stats = ctx.stats();
                drop(ctx);
                done.send(stats)
            });
            let stats = is_done.recv_timeout(Duration::from_mins(1));
            assert_eq!(stats, Ok(GuestStats::default()), "it waits for a lock");
        });
    }
}
