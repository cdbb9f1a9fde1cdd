//! To the guest: what has arrived, past the policy and the peer filter.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::task::{Poll, ready};

use tokio::task::coop::consume_budget;

use super::{Listening, UdpSocket};
use crate::ctx::GuestCtx;
use crate::error::ErrorCode;
use crate::first_poll;
use crate::limits::{BATCH_DATAGRAMS_MAX, RECEIVE_BYTES_MAX};
use crate::policy::SocketAddrUse;
use crate::ring::inbox::{Datagram, Inbox, InboxLimits, Taken};

/// Datagrams kept from a guest.
#[derive(Default)]
struct Withheld {
    by_policy: u64,
    not_from_peer: u64,
}

impl UdpSocket {
    /// Arms the receive if nobody has; afterwards what the kernel has queued is in the inbox.
    async fn listening(&self) -> &Listening {
        poll_fn(|cx| {
            let GuestCtx { uring, guest, .. } = &*self.ctx;
            let mut state = self.lock();
            let listening = self.listening.get_or_init(|| {
                let (inbox, flush) = uring.arm(*guest, self.bound_slot());
                state.arming = Some(Box::new(flush));
                Box::new(Listening { inbox, line: tokio::sync::Mutex::const_new(()) })
            });
            // Kept until it is done, for a guest may look once and come back.
            if let Some(flush) = &mut state.arming {
                ready!(flush.poll(uring, cx));
                state.arming = None;
            }
            Poll::Ready(listening)
        })
        .await
    }

    /// Up to `max` datagrams that are there already, at most as many as wasmtime-wasi hands out.
    pub(crate) async fn receive(&self, max: u64) -> Result<Vec<Datagram>, ErrorCode> {
        let max = usize::try_from(max).unwrap_or(usize::MAX).min(BATCH_DATAGRAMS_MAX);
        if max == 0 {
            return Ok(Vec::new());
        }
        // A guest that asks without end does not suspend by itself.
        consume_budget().await;
        let Listening { inbox, .. } = self.listening().await;
        let most = InboxLimits { datagrams: max, bytes: RECEIVE_BYTES_MAX };
        let mut has_looked = false;
        loop {
            self.ctx.turn.give_up_if_over().await;
            let Taken { mut datagrams, first_is_admitted, resume } = inbox.take(most)?;
            if resume {
                self.resume();
            }
            if datagrams.is_empty() {
                if std::mem::replace(&mut has_looked, true) {
                    return Ok(datagrams);
                }
                self.ctx.uring.look();
                continue;
            }
            self.ctx.turn.count(datagrams.len());
            let mut is_admitted = first_is_admitted;
            let remote = self.remote();
            let mut withheld = Withheld::default();
            datagrams.retain(|datagram| {
                std::mem::take(&mut is_admitted)
                    || self.may_hear(datagram.from, remote, &mut withheld)
            });
            self.count(withheld);
            if !datagrams.is_empty() {
                return Ok(datagrams);
            }
        }
    }

    /// The next datagram, waited for; those who wait are served in the order they came. Given up,
    /// the call leaves every datagram where it is.
    pub(crate) async fn receive_one(&self) -> Result<Datagram, ErrorCode> {
        if !self.lock().is_bound() {
            let is_binding = self.lock().is_binding();
            if !(is_binding && self.first_in_line(self.is_bound()).await) {
                return Err(ErrorCode::InvalidState);
            }
        }
        let Listening { inbox, line } = self.listening().await;
        let _line = line.lock().await;
        self.ctx.turn.give_up_if_over().await;
        loop {
            self.receivable().await;
            // From here on nothing waits.
            let (arrival, resume) = inbox.take_first();
            if resume {
                self.resume();
            }
            if let Some(arrival) = arrival {
                self.ctx.turn.count(1);
                return Ok(arrival?);
            }
        }
    }

    /// Ready when `receive` would return a datagram or an error.
    pub(crate) async fn receivable(&self) {
        let Listening { inbox, .. } = self.listening().await;
        poll_fn(|cx| {
            if self.admit(inbox) {
                return Poll::Ready(());
            }
            // Not registered yet: what the look brings would wake the very task that looks.
            self.ctx.uring.look_and_listen();
            if self.admit(inbox) {
                return Poll::Ready(());
            }
            inbox.wake_on_arrival(cx.waker());
            // Another thread may have booked something in between.
            if self.admit(inbox) {
                return Poll::Ready(());
            }
            if !first_poll::is_first(cx) {
                self.ctx.turn.begin();
            }
            Poll::Pending
        })
        .await;
    }

    /// Whether an arrival is there that the guest may see; those it may not are dropped.
    fn admit(&self, inbox: &Inbox) -> bool {
        let remote = self.remote();
        let mut withheld = Withheld::default();
        let admitted = inbox.admit(|from| self.may_hear(from, remote, &mut withheld));
        self.count(withheld);
        if !admitted && inbox.resume_if_drained() {
            // What was dropped had filled it.
            self.resume();
        }
        admitted
    }

    /// Whether the guest may see a datagram of this sender.
    fn may_hear(
        &self,
        from: SocketAddr,
        remote: Option<SocketAddr>,
        withheld: &mut Withheld,
    ) -> bool {
        let allowed = self.ctx.policy.check(from, SocketAddrUse::UdpReceive).is_ok();
        // The kernel filters what arrives after the connect, not what was queued before.
        let is_peer = remote.is_none_or(|remote| remote == from);
        withheld.by_policy += u64::from(!allowed);
        withheld.not_from_peer += u64::from(allowed && !is_peer);
        allowed && is_peer
    }

    fn count(&self, Withheld { by_policy, not_from_peer }: Withheld) {
        if by_policy + not_from_peer > 0 {
            self.ctx.uring.count(|stats| {
                stats.dropped_by_policy += by_policy;
                stats.dropped_not_from_peer += not_from_peer;
            });
        }
    }

    fn resume(&self) {
        self.ctx.uring.resume(self.ctx.guest, self.bound_slot());
    }
}
