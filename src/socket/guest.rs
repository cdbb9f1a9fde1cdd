//! What all sockets of one guest share: its ring, its name in that ring's batching, its policy, its
//! quotas of sockets and of bytes that wait, and its budget of datagrams.

use std::sync::Arc;

use tokio::task::yield_now;

use crate::driver::batching::Budget;
use crate::driver::{Driver, Guest, first_poll};
use crate::ring::quota::{ByteQuota, Quota};
use crate::socket::policy::Policy;

/// One guest's share of a ring. The host's `UdpCtx` and each of the guest's sockets hold it.
#[derive(Debug)]
pub(crate) struct GuestCtx {
    pub(crate) driver: Arc<Driver>,
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
        driver: Arc<Driver>,
        policy: Policy,
        sockets_max: u32,
        queue_bytes_max: usize,
        send_bytes_max: usize,
    ) -> Self {
        Self {
            driver,
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
        self.driver.forsake(&self.quota);
    }
}
