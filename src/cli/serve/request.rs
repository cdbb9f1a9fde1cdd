//! A request, from its connection to its guest.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::HOST;
use hyper::http::uri::{Authority, PathAndQuery, Scheme};
use hyper::{Method, Request, Response, Uri};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};
use wasmtime_wasi_http::{Error, WasiBody};

use super::answer::{Answer, Answers, Refusal};
use super::epochs::{self, Epochs};
use super::program::Program;
use crate::args::ServeArgs;
use crate::terminal::Failure;

/// What the connections share.
pub(super) struct Server {
    program: Program,
    /// One for each guest that runs, for as long as its store is there.
    permits: Arc<Semaphore>,
    guests_max: u32,
    epochs: Epochs,
    timeout: Duration,
    body_max: usize,
    counts: Mutex<BTreeMap<&'static str, u64>>,
}

impl Server {
    pub(super) fn new(program: Program, args: &ServeArgs) -> Result<Self, Failure> {
        let guests_max = args.requests_max;
        let permits = Arc::new(Semaphore::new(guests_max as usize));
        let epochs = Epochs::new(program.engine(), Arc::clone(&permits), guests_max as usize)?;
        let timeout = args.timeout.0;
        let body_max = args.body_max();
        let counts = Mutex::default();
        Ok(Self { program, permits, guests_max, epochs, timeout, body_max, counts })
    }

    /// How many guests run.
    pub(super) fn guests(&self) -> usize {
        (self.guests_max as usize).saturating_sub(self.permits.available_permits())
    }

    /// Waits until none runs.
    pub(super) async fn without_guests(&self) {
        // An error would say that they were closed, which nobody does.
        let _ = self.permits.acquire_many(self.guests_max).await;
    }

    /// Requests so far, by what came of them.
    pub(super) fn counts(&self) -> serde_json::Value {
        serde_json::json!(*self.counts.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn count(&self, outcome: &'static str) {
        metrics::counter!("wasi_uring_requests_total", "outcome" => outcome).increment(1);
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner).entry(outcome).or_default() +=
            1;
    }

    /// A guest's answer, or why there is none.
    pub(super) async fn answer(self: &Arc<Self>, request: Request<Incoming>) -> Response<WasiBody> {
        let what = What { method: request.method().clone(), path: request.uri().path().to_owned() };
        let mut outcome = Outcome { server: self, name: "client_gone" };
        match self.ask_guest(request).await {
            Ok(response) => {
                outcome.name = "answered";
                response
            }
            Err(refusal) => {
                outcome.name = refusal.name();
                if let Refusal::Failed(why) = &refusal {
                    tracing::warn!("{what}: the guest {why}");
                }
                refusal.response()
            }
        }
    }

    async fn ask_guest(self: &Arc<Self>, request: Request<Incoming>) -> Answer {
        let request = with_host(request).ok_or(Refusal::NoHost)?;
        // One that does not say its length is stopped on its way.
        if request.body().size_hint().lower() > self.body_max as u64 {
            return Err(Refusal::TooLarge);
        }
        let permit = Arc::clone(&self.permits).try_acquire_owned().map_err(|_| Refusal::Busy)?;
        self.epochs.wake();
        let request = request.map(|body| Limited::new(body, self.body_max).map_err(body_error));
        let (answers, answer) = Answers::new();
        // A task of its own, because it may go on when it has answered, and when its client has gone.
        tokio::spawn(Arc::clone(self).run_guest(request, answers, permit));
        let panicked = |_| Err(Refusal::Failed("brought its task to panic".to_owned()));
        answer.await.unwrap_or_else(panicked)
    }

    async fn run_guest<B>(
        self: Arc<Self>,
        request: Request<B>,
        answers: Answers,
        permit: OwnedSemaphorePermit,
    ) where
        B: Body<Data = Bytes, Error = Error> + Send + 'static,
    {
        let deadline = Instant::now() + self.timeout;
        let mut store = self.program.new_store();
        epochs::yields(&mut store);
        let handled = self.program.handle(&mut store, request, answers.clone());
        let ended = timeout_at(deadline, handled).await;
        if let Err(why) = answers.end(ended) {
            self.count("cut");
            if let Refusal::Failed(why) = why {
                tracing::warn!("a guest that had begun to answer {why}");
            }
        }
        drop(store);
        drop(permit);
    }
}

/// What comes of a request, counted when that is known: when this is dropped, as it is when the client goes.
struct Outcome<'a> {
    server: &'a Server,
    name: &'static str,
}

impl Drop for Outcome<'_> {
    fn drop(&mut self) {
        self.server.count(self.name);
    }
}

/// A request's first line, as far as a log wants it.
struct What {
    method: Method,
    path: String,
}

impl std::fmt::Display for What {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.method, self.path)
    }
}

/// The request with scheme and authority in its URI, where guests look for them. `None` if it does not say which host it is
/// for (RFC 9110, section 7.2).
fn with_host<B>(mut request: Request<B>) -> Option<Request<B>> {
    let mut uri = std::mem::take(request.uri_mut()).into_parts();
    if uri.authority.is_none() {
        let mut hosts = request.headers().get_all(HOST).iter();
        let (Some(host), None) = (hosts.next(), hosts.next()) else { return None };
        uri.authority = Some(Authority::try_from(host.as_bytes()).ok()?);
    }
    uri.scheme = Some(Scheme::HTTP);
    uri.path_and_query.get_or_insert(PathAndQuery::from_static("/"));
    *request.uri_mut() = Uri::from_parts(uri).ok()?;
    Some(request)
}

/// What a guest is told when it reads a body that breaks off.
fn body_error(error: Box<dyn std::error::Error + Send + Sync>) -> Error {
    if error.is::<LengthLimitError>() {
        return Error::HttpRequestBodySize(None);
    }
    match error.downcast::<hyper::Error>() {
        Ok(error) => Error::Hyper(*error),
        Err(error) => Error::InternalError(Some(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(target: &str, hosts: &[&str]) -> Option<String> {
        let request = hosts
            .iter()
            .fold(Request::builder().uri(target), |request, host| request.header(HOST, *host));
        let request = with_host(request.body(()).expect("a request"))?;
        Some(request.uri().to_string())
    }

    #[test]
    fn a_request_without_one_valid_host_is_none() {
        let given = Some("http://a:80/b?c".to_owned());
        assert_eq!(uri("/b?c", &["a:80"]), given);
        assert_eq!(uri("http://a:80/b?c", &["other"]), given);
        assert_eq!(uri("/b?c", &[]), None);
        assert_eq!(uri("/b?c", &["a:80", "b"]), None);
        assert_eq!(uri("/b?c", &["no host"]), None);
    }
}
