//! Connections: accepted, and served with HTTP/1.1.

use std::convert::Infallible;
use std::io::{Error, ErrorKind};
use std::time::Duration;

use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::Watcher;
use tokio::net::{TcpListener, TcpStream};

/// A connection that has not sent a request's head for so long is closed, idle ones included.
const HEAD_WAITS: Duration = Duration::from_mins(1);
/// After an error that is not of one connection: most often the process has no descriptor left, and others' ends
/// bring some.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Accepts connections for ever.
pub(crate) async fn accept(listener: &TcpListener, mut serve: impl FnMut(TcpStream)) -> Infallible {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => serve(stream),
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// The client has gone before we came (accept(2), "Error handling").
fn is_of_one_connection(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset | ErrorKind::ConnectionRefused
    )
}

/// Answers a connection's requests to its end. If the watched end comes first, it answers the request that it has begun
/// to read, and closes.
pub(crate) async fn serve<A, B>(
    stream: TcpStream,
    end: Watcher,
    answer: impl Fn(Request<Incoming>) -> A,
) where
    A: Future<Output = Response<B>>,
    B: Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    // An answer's last bytes must not wait for the client's acknowledgement of the first.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "no TCP_NODELAY");
    }
    let answer = service_fn(|request| {
        let answer = answer(request);
        async { Ok::<_, Infallible>(answer.await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WAITS)
        .serve_connection(TokioIo::new(stream), answer);
    // It is the client's doing, or has been reported where it happened.
    if let Err(error) = end.watch(connection).await {
        tracing::debug!(%error, "a connection ended");
    }
}
