//! The future of a `send` of one datagram that is over, or not begun, when it is dropped.
//!
//! A caller may give the call up if it is not done at once, and must not find later that it was sent all the
//! same. So the datagram is submitted only by a thread that enters for it at once, and answers at once
//! whether there is send buffer; or it is left to the thread that is inside, and is the caller's no more.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::task::coop;

use super::batching::Guest;
use super::enter::Driver;
use super::in_flight::InFlight;
use crate::datagram::Outgoing;
use crate::error::Errno;
use crate::limits::COMBINE_ROUNDS_MAX;
use crate::ring::account::Account;
use crate::ring::op::{Op, OpResult};
use crate::ring::queues::SlotIndex;
use crate::ring::send::SendOp;

pub(crate) struct SendNow<'socket> {
    driver: &'socket Arc<Driver>,
    guest: Guest,
    slot: SlotIndex,
    /// Until it is submitted.
    datagram: Option<Box<Outgoing>>,
    /// Whom it is charged to if it is deferred, which it may be then.
    may_defer: Option<&'socket Arc<Account>>,
    /// If the kernel has not taken it at once after all.
    in_flight: Option<Box<InFlight>>,
}

/// Where a datagram is.
pub(crate) enum Given {
    /// The kernel has answered.
    Answered(OpResult),
    /// The thread that is inside submits it next.
    Deferred(InFlight),
}

impl<'socket> SendNow<'socket> {
    /// `may_defer`: whether the datagram may be left to another thread, so that its error comes late.
    pub(crate) fn new(
        driver: &'socket Arc<Driver>,
        guest: Guest,
        slot: SlotIndex,
        datagram: Box<Outgoing>,
        may_defer: Option<&'socket Arc<Account>>,
    ) -> Self {
        Self { driver, guest, slot, datagram: Some(datagram), may_defer, in_flight: None }
    }

    pub(crate) async fn given(mut self) -> Result<Given, Errno> {
        poll_fn(|cx| self.poll_given(cx)).await
    }

    fn poll_given(&mut self, cx: &mut Context<'_>) -> Poll<Result<Given, Errno>> {
        let Self { driver, guest, slot, datagram, may_defer, in_flight } = self;
        if let Some(in_flight) = in_flight {
            return in_flight.poll_result(cx).map(|result| Ok(Given::Answered(result)));
        }
        // Before the submission: what is done is told in the same poll.
        let coop = ready!(coop::poll_proceed(cx));
        let mut core = match may_defer {
            Some(_) => driver.lock_to_queue()?,
            None => ready!(driver.poll_outside(cx))?,
        };
        coop.made_progress();
        let datagram = datagram.take().expect("not submitted yet");
        if let (true, Some(account)) = (core.entering, may_defer) {
            let append = |send: &mut SendOp| send.push(*datagram);
            let deferred = driver.defer_with(core, *guest, *slot, account, append);
            return Poll::Ready(Ok(Given::Deferred(deferred)));
        }
        core.batching.queue(*guest);
        let key = core.ring.submit(*slot, Op::SendNow(datagram));
        let mut submitted = InFlight::new(driver, &core, *guest, key);
        core = driver.combine(core);
        let mut result = core.ring.take_result(key);
        // A flood may have kept its completion from being reaped.
        for _ in 0..COMBINE_ROUNDS_MAX {
            if result.is_some() || !core.may_enter() {
                break;
            }
            core = driver.combine_with(core, true);
            result = core.ring.take_result(key);
        }
        drop(core);
        if let Some(result) = result {
            submitted.is_taken = true;
            return Poll::Ready(Ok(Given::Answered(result)));
        }
        let submitted = in_flight.insert(Box::new(submitted));
        submitted.poll_result(cx).map(|result| Ok(Given::Answered(result)))
    }
}
