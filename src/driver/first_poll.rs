//! Wasmtime polls a concurrent call for the first time with a waker that wakes no task, and if it is
//! not ready polls it again at once with its own. So a call that is ready costs no suspension; but a
//! yield, or a wait for other guests, must not be spent on that poll.

use std::future::poll_fn;
use std::task::{Context, Poll};

/// Whether this is that poll.
///
/// `Waker::noop` has no data. `will_wake` does not recognize it, because each crate has a vtable of
/// its own for it; so a waker without data that does wake a task is taken for it, too.
pub(crate) fn is_first(cx: &Context<'_>) -> bool {
    cx.waker().data().is_null()
}

/// Ready when there is a waker to wait by.
pub(crate) async fn over() {
    let mut has_waited = false;
    poll_fn(|cx| {
        if has_waited || !is_first(cx) {
            return Poll::Ready(());
        }
        has_waited = true;
        // A waker that only looks like none has its task poll again, too.
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
