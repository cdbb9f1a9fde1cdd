//! What all sockets of one guest share: the host's rings, its name in their batching, its policy, its
//! quotas of sockets and of bytes that wait, and its budget of datagrams.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::task::yield_now;

use crate::driver::batching::Budget;
use crate::driver::{Guest, first_poll};
use crate::pool::{Pool, RingIndex};
use crate::ring::quota::{ByteQuota, Quota};
use crate::socket::policy::Policy;

/// One guest's share of the rings. The host's `UdpCtx` and each of the guest's sockets hold it.
#[derive(Debug)]
pub(crate) struct GuestCtx {
    pub(crate) pool: Arc<Pool>,
    /// Those that it has had sockets in: one bit each, or for several.
    rings: AtomicU64,
    pub(crate) guest: Guest,
    pub(crate) policy: Policy,
    pub(crate) quota: Arc<Quota>,
    pub(crate) queued: Arc<ByteQuota>,
    /// Bytes of sends that wait for send buffer.
    pub(crate) sending: Arc<ByteQuota>,
    pub(crate) budget: Budget,
}

impl GuestCtx {
    pub(crate) fn new(
        pool: Arc<Pool>,
        policy: Policy,
        sockets_max: u32,
        queue_bytes_max: usize,
        send_bytes_max: usize,
    ) -> Self {
        Self {
            pool,
            rings: AtomicU64::new(0),
            guest: Guest::new(),
            policy,
            quota: Quota::new(sockets_max),
            queued: ByteQuota::new(queue_bytes_max),
            sending: ByteQuota::new(send_bytes_max),
            budget: Budget::default(),
        }
    }
}

impl GuestCtx {
    /// It has a socket in this ring.
    pub(crate) fn use_ring(&self, ring: RingIndex) {
        let rings = self.rings.load(Ordering::Relaxed);
        if rings & ring.bit() == 0 {
            // A guest's calls that create sockets come one after the other.
            self.rings.store(rings | ring.bit(), Ordering::Relaxed);
        }
    }

    /// Suspends a guest that has spent a budget of so many datagrams, so that the other tasks of its thread run.
    pub(crate) async fn yield_if_spent(&self, datagrams: usize) {
        if self.budget.is_spent(datagrams) {
            first_poll::over().await;
            // tokio polls its I/O driver before a task that has yielded by this, so tasks that a
            // packet has made ready run first, too.
            yield_now().await;
            self.budget.renew();
        }
    }
}

impl Drop for GuestCtx {
    /// The store and all the guest's sockets are dropped. The runtime whose flusher would submit
    /// their closes may be shut down, so this thread submits them.
    fn drop(&mut self) {
        self.pool.forsake(self.rings.load(Ordering::Relaxed), &self.quota);
    }
}
