//! What all sockets of one guest share: the host's rings, its name in their batching, its policy, its
//! account with its quotas and counters, and what it has done since it last suspended. It is made at the guest's
//! first socket.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::yield_now;

use crate::driver::batching::Stretch;
use crate::driver::{Guest, first_poll};
use crate::error::ErrorCode;
use crate::pool::{Pool, RingIndex};
use crate::ring::account::{Account, GuestLimits};
use crate::socket::policy::{Checks, Reason, SocketId};

/// One guest's share of the rings. The host's `UdpCtx` and each of the guest's sockets hold it.
#[derive(Debug)]
pub(crate) struct GuestCtx {
    pub(crate) pool: Arc<Pool>,
    /// Those that it has had sockets in: one bit each, or for several.
    rings: AtomicU64,
    pub(crate) guest: Guest,
    /// Sockets that have numbers.
    numbered: AtomicU64,
    pub(crate) checks: Checks,
    pub(crate) account: Arc<Account>,
    pub(crate) stretch: Stretch,
    /// Of its sockets, in order, as far as it knows them.
    ports: Mutex<Vec<u16>>,
}

impl GuestCtx {
    pub(crate) fn new(pool: Arc<Pool>, checks: Checks, limits: GuestLimits) -> Self {
        Self {
            pool,
            rings: AtomicU64::new(0),
            guest: Guest::new(),
            numbered: AtomicU64::new(0),
            checks,
            stretch: Stretch::new(),
            ports: Mutex::default(),
            account: Account::new(limits),
        }
    }

    /// The number of the next socket. (A guest's calls that create sockets come one after the other.)
    pub(crate) fn number_socket(&self) -> u64 {
        let number = self.numbered.load(Ordering::Relaxed);
        self.numbered.store(number + 1, Ordering::Relaxed);
        number
    }

    pub(crate) fn socket_id(&self, number: u64) -> SocketId {
        SocketId::new(self.guest, number)
    }

    /// The guest hears of a denial, and its counters why.
    pub(crate) fn deny(&self, reason: Reason) -> ErrorCode {
        self.account.counters.deny(reason);
        ErrorCode::AccessDenied
    }

    /// Those that it has had sockets in.
    pub(crate) fn rings(&self) -> u64 {
        self.rings.load(Ordering::Relaxed)
    }

    /// It has a socket in this ring.
    pub(crate) fn use_ring(&self, ring: RingIndex) {
        let rings = self.rings.load(Ordering::Relaxed);
        if rings & ring.bit() == 0 {
            // A guest's calls that create sockets come one after the other.
            self.rings.store(rings | ring.bit(), Ordering::Relaxed);
        }
    }

    /// The guest sends, to this peer among others: whether it goes on sending, so that this may be deferred.
    pub(crate) fn sends_on(&self, peer: Option<SocketAddr>) -> bool {
        let is_to_itself =
            || peer.is_some_and(|peer| self.ports().binary_search(&peer.port()).is_ok());
        self.stretch.send(self.account.deferred_time, is_to_itself)
    }

    /// The guest knows that one of its sockets has this port, and may send there.
    pub(crate) fn know_port(&self, port: u16) {
        let mut ports = self.ports();
        if let Err(at) = ports.binary_search(&port) {
            ports.insert(at, port);
        }
    }

    /// A socket has the port no longer, or never had one. (If another has it, what the guest sends there may be
    /// deferred.)
    pub(crate) fn forget_port(&self, port: u16) {
        if port == 0 {
            return;
        }
        let mut ports = self.ports();
        if let Ok(at) = ports.binary_search(&port) {
            ports.remove(at);
        }
    }

    fn ports(&self) -> MutexGuard<'_, Vec<u16>> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Suspends a guest that has spent a budget of so many datagrams, so that the other tasks of its thread run.
    pub(crate) async fn yield_if_spent(&self, datagrams: usize) {
        if self.stretch.is_budget_spent(datagrams) {
            first_poll::over().await;
            // tokio polls its I/O driver before a task that has yielded by this, so tasks that a
            // packet has made ready run first, too.
            yield_now().await;
            self.stretch.end();
        }
    }
}

impl Drop for GuestCtx {
    /// The store and all the guest's sockets are dropped. The runtime whose flusher would submit
    /// their closes may be shut down, so this thread submits them.
    fn drop(&mut self) {
        self.pool.forsake(self.rings.load(Ordering::Relaxed), &self.account);
    }
}
