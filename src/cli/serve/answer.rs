//! The answer to a request, on its way from a guest to its client.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Bytes, Frame, SizeHint};
use hyper::header::{HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};
use tokio::sync::oneshot;
use tokio::time::error::Elapsed;
use wasi_uring::RingGone;
use wasmtime::PoolConcurrencyLimitError;
use wasmtime_wasi_http::{Error, WasiBody};

/// Why a client has no answer of a guest's.
pub(super) enum Refusal {
    /// The request says nowhere which host it is for.
    NoHost,
    /// Its body is longer than allowed.
    TooLarge,
    /// As many guests as may run are running.
    Busy,
    /// The guest was ended by its deadline.
    TimedOut,
    /// The guest was ended with the ring.
    Ending,
    /// What the guest did instead: a clause for the log.
    Failed(String),
}

impl Refusal {
    /// What a guest's end means to its client.
    fn of(error: &wasmtime::Error) -> Self {
        if error.is::<RingGone>() {
            Self::Ending
        } else if error.is::<PoolConcurrencyLimitError>() {
            Self::Busy
        } else {
            Self::Failed(format!("{error:#}"))
        }
    }

    /// Its name in counters.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::NoHost => "no_host",
            Self::TooLarge => "too_large",
            Self::Busy => "busy",
            Self::TimedOut => "timed_out",
            Self::Ending => "ending",
            Self::Failed(_) => "failed",
        }
    }

    /// A guest's failure is for the log, and no business of clients'.
    pub(super) fn response(&self) -> Response<WasiBody> {
        let (status, text) = match self {
            Self::NoHost => (StatusCode::BAD_REQUEST, "the request names no valid host\n"),
            Self::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "the request's body is too large\n"),
            Self::Busy => (StatusCode::SERVICE_UNAVAILABLE, "too many requests at once\n"),
            Self::TimedOut => (StatusCode::GATEWAY_TIMEOUT, "the guest took too long\n"),
            Self::Ending => (StatusCode::SERVICE_UNAVAILABLE, "the server ends\n"),
            Self::Failed(_) => (StatusCode::INTERNAL_SERVER_ERROR, "the guest failed\n"),
        };
        let body = Full::from(text).map_err(|never| match never {}).boxed_unsync();
        let mut response = Response::new(body);
        *response.status_mut() = status;
        if matches!(self, Self::Busy) {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

pub(super) type Answer = Result<Response<WasiBody>, Refusal>;

/// What a guest answers with, once.
#[derive(Clone)]
pub(super) struct Answers {
    first: Arc<Mutex<Option<oneshot::Sender<Answer>>>>,
    is_cut: Arc<AtomicBool>,
}

impl Answers {
    pub(super) fn new() -> (Self, oneshot::Receiver<Answer>) {
        let (sender, receiver) = oneshot::channel();
        let first = Arc::new(Mutex::new(Some(sender)));
        (Self { first, is_cut: Arc::default() }, receiver)
    }

    /// Begins the answer, whose body may take longer. The client may have gone.
    pub(super) fn begin(&self, response: Response<WasiBody>) {
        let is_cut = Arc::clone(&self.is_cut);
        self.send(Ok(response.map(|body| Cuttable { body, is_cut }.boxed_unsync())));
    }

    /// The guest has said itself that it cannot answer: with one of WASI's error codes, or because the request's body
    /// was too large for us.
    pub(super) fn give_up(&self, code: &impl std::fmt::Debug, is_body_size: bool) {
        let failed = || Refusal::Failed(format!("answered with the error {code:?}"));
        self.send(Err(if is_body_size { Refusal::TooLarge } else { failed() }));
    }

    /// The guest has come to its end; its store must still be there, and with it the other end of the answer's body. An
    /// error if the client has had only a part of its answer.
    pub(super) fn end(&self, ended: Result<wasmtime::Result<()>, Elapsed>) -> Result<(), Refusal> {
        let refusal = match ended {
            Ok(Ok(())) => {
                self.send(Err(Refusal::Failed("returned without an answer".to_owned())));
                return Ok(());
            }
            Ok(Err(error)) => Refusal::of(&error),
            Err(Elapsed { .. }) => Refusal::TimedOut,
        };
        self.is_cut.store(true, Ordering::Release);
        self.send(Err(refusal)).map_or(Ok(()), Err)
    }

    /// Gives a refusal back if there has been an answer already.
    fn send(&self, answer: Answer) -> Option<Refusal> {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).take();
        match first {
            Some(first) => {
                let _ = first.send(answer);
                None
            }
            None => answer.err(),
        }
    }
}

/// A body that does not pretend to be whole when its guest was ended: wasmtime-wasi-http's own ends as if it were.
struct Cuttable {
    body: WasiBody,
    is_cut: Arc<AtomicBool>,
}

impl Body for Cuttable {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        // A guest that traps when its body is complete cuts it, too, if that is not written out yet.
        let is_cut = frame.is_none() && this.is_cut.load(Ordering::Acquire);
        Poll::Ready(if is_cut { Some(Err(Error::HttpResponseIncomplete)) } else { frame })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream() && !self.is_cut.load(Ordering::Acquire)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
