//! Wasmtime polls a concurrent call for the first time with a waker that wakes nobody, and if it is
//! not ready at once again with its own. So a call that is ready costs no suspension; but a yield, or
//! a wait for others, must not be spent on that poll.

use std::future::poll_fn;
use std::task::{Context, Poll};

/// Whether this is that poll.
///
/// `Waker::noop` has no data. It cannot be told by `will_wake`, for each crate has a vtable of its
/// own for it; so a waker that has no data either but wakes somebody is taken for it, too.
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
        // Whoever has a waker that only looks like none polls again, too.
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
