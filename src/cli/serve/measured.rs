//! The counters of this process, for Prometheus.

use std::sync::Arc;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::server::graceful::GracefulShutdown;
use metrics::gauge;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio::net::TcpListener;
use wasi_uring::Uring;
use wasmtime::format_err;

use super::connections;
use super::request::Server;
use crate::terminal::Failure;

/// The process's recorder, and where its text can be had.
pub(super) struct Measured {
    text: PrometheusHandle,
}

impl Measured {
    /// From now on what this process counts is kept.
    pub(super) fn new() -> Result<Self, Failure> {
        let recorder = PrometheusBuilder::new().build_recorder();
        let text = recorder.handle();
        metrics::set_global_recorder(recorder)
            .map_err(|error| Failure::run(format_err!("cannot keep metrics: {error}")))?;
        Uring::describe_metrics();
        Ok(Self { text })
    }

    /// Answers scrapes for ever; what is not counted as it happens is asked for at each.
    pub(super) async fn serve(
        self,
        listener: TcpListener,
        server: Arc<Server>,
        uring: Option<Uring>,
    ) {
        // Never told: scrapes end with the process.
        let connections = GracefulShutdown::new();
        let accepting = connections::accept(&listener, |stream| {
            let (text, server, uring) = (self.text.clone(), Arc::clone(&server), uring.clone());
            let serving = connections::serve(stream, connections.watcher(), move |request| {
                let answer = answer(&request, || {
                    set_gauge("wasi_uring_guests", server.guests() as u64);
                    if let Some(uring) = &uring {
                        uring.record_metrics();
                    }
                    text.render()
                });
                async { answer }
            });
            tokio::spawn(serving);
        });
        match accepting.await {}
    }
}

fn answer(request: &Request<Incoming>, scrape: impl FnOnce() -> String) -> Response<Full<Bytes>> {
    if request.uri().path() != "/metrics" {
        return refusal(StatusCode::NOT_FOUND, "metrics are at /metrics\n");
    }
    if *request.method() != Method::GET {
        return refusal(StatusCode::METHOD_NOT_ALLOWED, "metrics can only be got\n");
    }
    let mut response = Response::new(Full::from(scrape()));
    // Prometheus, "Text-based format".
    let kind = hyper::header::HeaderValue::from_static("text/plain; version=0.0.4");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

fn refusal(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response
}

#[expect(clippy::cast_precision_loss, reason = "sockets and guests are fewer than 2^53")]
fn set_gauge(name: &'static str, now: u64) {
    gauge!(name).set(now as f64);
}
