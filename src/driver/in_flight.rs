//! The future of an operation.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::task::coop;

use super::batching::Guest;
use super::enter::{Core, Driver};
use super::flush::{Flush, is_current_thread, is_worker};
use crate::ring::account::Account;
use crate::ring::op::OpResult;
use crate::ring::queues::OpKey;
use crate::ring::send::SendOp;

/// An operation on its way, and the guest that waits for it. Its memory is the operation table's
/// until its last completion. To drop this before detaches the operation: the kernel finishes it,
/// unless it is a wait that ends with its caller, and the ring then frees the memory.
pub(crate) struct InFlight {
    driver: Arc<Driver>,
    key: OpKey,
    flush: Flush,
    pub(super) is_taken: bool,
    ends_with_caller: bool,
    answered: Answered,
}

/// Whether a send was answered before it has ended, and why.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answered {
    No,
    /// It waits for send buffer.
    Waiting,
    Deferred,
    /// It was deferred, and is submitted because it has all that it may have.
    Full,
}

impl InFlight {
    /// For an operation that `guest` has just queued.
    pub(super) fn new(driver: &Arc<Driver>, core: &Core, guest: Guest, key: OpKey) -> Self {
        Self {
            driver: Arc::clone(driver),
            key,
            flush: Flush::new(core, guest),
            is_taken: false,
            ends_with_caller: false,
            answered: Answered::No,
        }
    }

    /// For a send that `guest` has just deferred, and that has all that it may have or not. Only the end of it can
    /// be waited for.
    pub(super) fn deferred(driver: &Arc<Driver>, guest: Guest, key: OpKey, is_full: bool) -> Self {
        Self {
            driver: Arc::clone(driver),
            key,
            flush: Flush::deferred(guest),
            is_taken: false,
            ends_with_caller: false,
            answered: if is_full { Answered::Full } else { Answered::Deferred },
        }
    }

    /// For a wait that is not to go on without its caller.
    pub(crate) fn cancelled_with_caller(mut self) -> Self {
        self.ends_with_caller = true;
        self
    }

    /// Waits for the last completion.
    pub(crate) async fn result(mut self) -> OpResult {
        poll_fn(|cx| self.poll_result(cx)).await
    }

    /// Ready with the operation's result after its last completion.
    pub(crate) fn poll_result(&mut self, cx: &mut Context<'_>) -> Poll<OpResult> {
        let coop = ready!(coop::poll_proceed(cx));
        let Self { driver, key, flush, is_taken, .. } = self;
        let mut core = match driver.lock_open() {
            Ok(core) => core,
            Err(gone) => return Poll::Ready(Err(gone.into())),
        };
        flush.end_yield(&mut core);
        let mut result = core.ring.take_result(*key);
        if result.is_none() {
            // On a multi-thread runtime the flusher would come first, which a worker runs before the guests that
            // are ready.
            core = ready!(flush.submit(driver, core, cx, is_current_thread));
            result = core.ring.take_result(*key);
        }
        if result.is_none()
            && let Some(refusal) = flush.refusal(&core)
        {
            return Poll::Ready(Err(refusal));
        }
        if result.is_none() {
            let waker;
            (core, waker) = core.unlocked(|| cx.waker().clone());
            if !core.register(*key, waker) {
                result = core.ring.take_result(*key);
            }
        }
        drop(core);
        if let Some(result) = result {
            // Its place in the table is another operation's from here on.
            *is_taken = true;
            coop.made_progress();
            return Poll::Ready(result);
        }
        driver.ensure_reaper();
        Poll::Pending
    }

    /// Whether its result was taken: what was told before is why it is not in the kernel yet.
    pub(crate) fn has_ended(&self) -> bool {
        self.is_taken
    }

    /// The operation's result, if its last completion is in.
    pub(crate) fn try_result(&mut self) -> Option<OpResult> {
        match self.progress() {
            Progress::Ended(result) => Some(result),
            Progress::Deferred | Progress::OnItsWay => None,
        }
    }

    /// How far it is; its result is taken if its last completion is in.
    pub(crate) fn progress(&mut self) -> Progress {
        let Some(mut core) = self.driver.lock() else { return Progress::OnItsWay };
        let result = core.ring.take_result(self.key);
        self.is_taken |= result.is_some();
        match result.or_else(|| self.flush.refusal(&core).map(Err)) {
            Some(result) => Progress::Ended(result),
            None if core.ring.is_deferred(self.key) => Progress::Deferred,
            None => Progress::OnItsWay,
        }
    }

    /// Whether it is a send that is still deferred.
    pub(crate) fn is_deferred(&self) -> bool {
        self.driver.lock().is_some_and(|mut core| core.ring.is_deferred(self.key))
    }

    /// Adds to a deferred send, and submits it if it is full; `false` if it is deferred no longer.
    pub(crate) fn append(&mut self, append: impl FnOnce(&mut SendOp)) -> bool {
        let Ok(mut core) = self.driver.lock_to_queue() else { return false };
        let is_full = core.ring.append(self.key, append);
        if is_full == Some(true) {
            self.answered = Answered::Full;
            drop(self.driver.combine(core));
        }
        is_full.is_some()
    }

    /// Whether it is a deferred send that was submitted because it had all that it may have: its guest goes on.
    pub(crate) fn was_full(&self) -> bool {
        self.answered == Answered::Full
    }

    /// Ready when the last completion is in.
    pub(crate) fn poll_is_done(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.driver.reap(Some(self.flush.guest()));
        let waker = cx.waker().clone();
        let is_waiting = self.driver.lock_open().is_ok_and(|mut core| {
            self.flush.refusal(&core).is_none() && core.register(self.key, waker)
        });
        if !is_waiting {
            return Poll::Ready(());
        }
        self.driver.ensure_reaper();
        Poll::Pending
    }

    /// Ready when the operation has reached the kernel, with its result if it has ended by then.
    pub(crate) fn poll_submitted(&mut self, cx: &mut Context<'_>) -> Poll<Option<OpResult>> {
        let coop = ready!(coop::poll_proceed(cx));
        let Self { driver, key, flush, is_taken, .. } = self;
        let result = match ready!(flush.poll_submitted(driver, cx, is_worker)) {
            Ok(mut core) => core.ring.take_result(*key),
            Err(errno) => return Poll::Ready(Some(Err(errno))),
        };
        *is_taken = result.is_some();
        coop.made_progress();
        Poll::Ready(result)
    }

    /// For a send that waits: it counts from now on, for as long as the ring holds its datagrams.
    pub(crate) fn charge(&mut self, account: &Arc<Account>) {
        let Some(mut core) = self.driver.lock() else { return };
        if core.ring.charge(self.key, account) {
            self.answered = Answered::Waiting;
        }
    }

    /// Whether the ring counts what the kernel takes of it.
    pub(crate) fn is_charged(&self) -> bool {
        self.answered != Answered::No
    }

    /// Whether its guest has yielded before it entered.
    pub(crate) fn has_yielded(&self) -> bool {
        self.flush.has_yielded()
    }
}

/// How far an operation is.
pub(crate) enum Progress {
    /// No entry of it is queued.
    Deferred,
    OnItsWay,
    Ended(OpResult),
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.is_taken {
            return;
        }
        // Declared first, so dropped after the lock is released.
        let _result;
        let Some(mut core) = self.driver.lock() else { return };
        if self.ends_with_caller {
            core.ring.cancel(self.key);
        }
        // Memory and duty change hands: the ring frees the operation at its last completion.
        _result = core.detach(self.key);
        if self.ends_with_caller {
            self.driver.leave_to_flusher(core);
        }
    }
}
