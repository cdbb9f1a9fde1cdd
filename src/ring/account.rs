//! What is booked for a guest, by the ring and by its sockets: what it has, in its quotas, and what it has
//! done, in counters. It outlives the guest for as long as something of it is left, or its host reads.

use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::quota::{ByteQuota, Level, Quota};
use crate::clock;
#[cfg(any(test, feature = "bare"))]
use crate::limits::DEFERRED_TIME_DEFAULT;
use crate::limits::{DENIAL_REASONS_MAX, OTHER_REASONS};
use crate::stats::{Denials, GuestStats};

/// What a guest may have at once.
#[derive(Clone, Debug)]
pub(crate) struct GuestLimits {
    pub(crate) sockets: u32,
    /// That its sockets are counted in, too.
    pub(crate) quota: Option<Quota>,
    pub(crate) queue_bytes: usize,
    pub(crate) send_bytes: usize,
    /// How long a datagram that it is told is sent may be deferred.
    pub(crate) deferred_time: Duration,
}

#[derive(Debug)]
pub(crate) struct Account {
    pub(crate) sockets: Level,
    /// Bytes that wait for the guest, of all its sockets.
    pub(crate) queued: ByteQuota,
    /// Bytes of sends that wait for send buffer.
    pub(crate) sending: ByteQuota,
    pub(crate) counters: Counters,
    pub(crate) deferred_time: Duration,
    /// When the guest was gone.
    forsaken: OnceLock<Instant>,
}

impl Account {
    pub(crate) fn new(limits: GuestLimits) -> Arc<Self> {
        Arc::new(Self {
            sockets: Level::new(limits.sockets, limits.quota),
            queued: ByteQuota::new(limits.queue_bytes),
            sending: ByteQuota::new(limits.send_bytes),
            counters: Counters::default(),
            deferred_time: limits.deferred_time,
            forsaken: OnceLock::new(),
        })
    }

    /// Of one that bounds sockets alone.
    #[cfg(any(test, feature = "bare"))]
    pub(crate) fn of_sockets(sockets: u32) -> Arc<Self> {
        let (queue_bytes, send_bytes) = (usize::MAX, usize::MAX);
        let deferred_time = DEFERRED_TIME_DEFAULT;
        Self::new(GuestLimits { sockets, quota: None, queue_bytes, send_bytes, deferred_time })
    }

    /// The guest is gone; the units in use are of what it has left.
    pub(crate) fn forsake(&self) {
        self.forsaken.get_or_init(clock::now);
    }

    /// How long the guest has been gone, if it is.
    pub(crate) fn forsaken_for(&self) -> Option<Duration> {
        self.forsaken.get().map(|then| clock::since(*then))
    }

    pub(crate) fn stats(&self) -> GuestStats {
        let Counters {
            sockets_created,
            sockets_beyond_quota,
            sockets_beyond_table,
            sent,
            received,
            dropped_by_policy,
            dropped_not_from_peer,
            dropped_at_close,
            dropped_by_queue,
            denials,
        } = &self.counters;
        GuestStats {
            sockets_created: sockets_created.get(),
            sockets_open: self.sockets.in_use(),
            sockets_beyond_quota: sockets_beyond_quota.get(),
            sockets_beyond_table: sockets_beyond_table.get(),
            datagrams_sent: sent.datagrams.get(),
            bytes_sent: sent.bytes.get(),
            datagrams_received: received.datagrams.get(),
            bytes_received: received.bytes.get(),
            dropped_by_policy: dropped_by_policy.get(),
            dropped_not_from_peer: dropped_not_from_peer.get(),
            dropped_at_close: dropped_at_close.get(),
            dropped_by_queue: dropped_by_queue.get(),
            denials: denials.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }
}

/// What a guest has done, and what was refused to it: totals.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) sockets_created: Counter,
    pub(crate) sockets_beyond_quota: Counter,
    pub(crate) sockets_beyond_table: Counter,
    pub(crate) sent: Datagrams,
    pub(crate) received: Datagrams,
    pub(crate) dropped_by_policy: Counter,
    pub(crate) dropped_not_from_peer: Counter,
    pub(crate) dropped_at_close: Counter,
    pub(crate) dropped_by_queue: Counter,
    /// A leaf lock.
    denials: Mutex<Vec<Denials>>,
}

impl Counters {
    /// A policy has denied something. A host's reasons may be made of what the guest does, so only so many
    /// are told apart.
    pub(crate) fn deny(&self, reason: Cow<'static, str>) {
        let mut denials = self.denials.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = denials.iter_mut().find(|known| known.reason == reason) {
            known.count += 1;
            return;
        }
        let reason = match denials.len() {
            0..DENIAL_REASONS_MAX => reason,
            DENIAL_REASONS_MAX => Cow::Borrowed(OTHER_REASONS),
            _ => {
                denials[DENIAL_REASONS_MAX].count += 1;
                return;
            }
        };
        denials.push(Denials { reason, count: 1 });
    }
}

/// Datagrams, and the bytes of their payloads.
#[derive(Debug, Default)]
pub(crate) struct Datagrams {
    datagrams: Counter,
    bytes: Counter,
}

impl Datagrams {
    pub(crate) fn count(&self, datagrams: u64, bytes: u64) {
        self.datagrams.add(datagrams);
        self.bytes.add(bytes);
    }
}

#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// As `add`, for a caller that is the only one to count.
    pub(crate) fn add_exclusive(&self, count: u64) {
        self.0.store(self.get() + count, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a send that waits takes of its guest's quota, for as long as this lives.
#[derive(Debug)]
pub(crate) struct Charge {
    account: Arc<Account>,
    bytes: usize,
}

impl Charge {
    pub(crate) fn new(account: &Arc<Account>, bytes: usize) -> Self {
        account.sending.take(bytes);
        Self { account: Arc::clone(account), bytes }
    }

    /// Takes so many more.
    pub(crate) fn add(&mut self, bytes: usize) {
        self.account.sending.take(bytes);
        self.bytes += bytes;
    }

    /// The kernel has taken so many datagrams of it, of so many bytes.
    pub(crate) fn count_sent(&self, datagrams: u64, bytes: u64) {
        self.account.counters.sent.count(datagrams, bytes);
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.account.sending.put_back(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kills: a reason of the guest's own making for each of its datagrams.
    #[test]
    fn only_so_many_reasons_are_told_apart() {
        let counters = Counters::default();
        let denials = |at: usize| counters.denials.lock().unwrap()[at].clone();
        for _ in 0..2 {
            for reason in 0..3 * DENIAL_REASONS_MAX as u64 {
                counters.deny(format!("reason {reason}").into());
            }
        }
        assert_eq!(denials(0), Denials { reason: "reason 0".into(), count: 2 });
        let others = 4 * DENIAL_REASONS_MAX as u64;
        let expected = Denials { reason: OTHER_REASONS.into(), count: others };
        assert_eq!(denials(DENIAL_REASONS_MAX), expected);
        assert_eq!(counters.denials.lock().unwrap().len(), DENIAL_REASONS_MAX + 1);
    }
}
