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
use crate::ring::op::{Op, OpResult};
use crate::ring::queues::SlotIndex;
use crate::ring::send::SendOp;

pub(crate) struct SendNow {
    driver: Arc<Driver>,
    guest: Guest,
    slot: SlotIndex,
    /// Until it is submitted.
    datagram: Option<Box<Outgoing>>,
    may_queue: bool,
    /// If the kernel has not taken it at once after all.
    in_flight: Option<Box<InFlight>>,
}

/// Where a datagram is.
pub(crate) enum Given {
    /// The kernel has answered.
    Answered(OpResult),
    /// The thread that is inside submits it next.
    Queued(InFlight),
}

impl SendNow {
    /// `may_queue`: whether the datagram may be left to another thread, so that its error comes late.
    pub(crate) fn new(
        driver: &Arc<Driver>,
        guest: Guest,
        slot: SlotIndex,
        datagram: Box<Outgoing>,
        may_queue: bool,
    ) -> Self {
        let (driver, datagram) = (Arc::clone(driver), Some(datagram));
        Self { driver, guest, slot, datagram, may_queue, in_flight: None }
    }

    pub(crate) async fn given(mut self) -> Result<Given, Errno> {
        poll_fn(|cx| self.poll_given(cx)).await
    }

    fn poll_given(&mut self, cx: &mut Context<'_>) -> Poll<Result<Given, Errno>> {
        let Self { driver, guest, slot, datagram, may_queue, in_flight } = self;
        if let Some(in_flight) = in_flight {
            return in_flight.poll_result(cx).map(|result| Ok(Given::Answered(result)));
        }
        // Before the submission: what is done is told in the same poll.
        let coop = ready!(coop::poll_proceed(cx));
        let mut core =
            if *may_queue { driver.lock_to_queue()? } else { ready!(driver.poll_outside(cx))? };
        coop.made_progress();
        let datagram = datagram.take().expect("not submitted yet");
        core.batching.queue(*guest);
        if core.entering {
            let key = core.ring.submit(*slot, Op::Send(SendOp::new(vec![*datagram])));
            let queued = InFlight::new(driver, &core, *guest, key);
            return Poll::Ready(Ok(Given::Queued(queued)));
        }
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
