//! A web service over hyper and tokio's sockets: `GET /name` asks a DNS server for the name's address,
//! as the guests do.

use std::cell::RefCell;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::rc::Rc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::{Response, StatusCode};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::net::TcpListener;
use tokio::task::spawn_local;
use tokio::time::timeout;

use super::dns::{self, Ids, MESSAGE_BYTES_MAX, TIMEOUT_MILLIS};
use super::{connected, random};
use crate::serve::connections;

/// Serves for ever.
pub(super) async fn run(listen: SocketAddrV4, resolver: SocketAddrV4) -> io::Result<()> {
    let listener = TcpListener::bind(listen).await?;
    let ids = Rc::new(RefCell::new(Ids::new(random)));
    let all = GracefulShutdown::new();
    let never = connections::accept(&listener, |stream| {
        let ids = Rc::clone(&ids);
        spawn_local(connections::serve(stream, all.watcher(), move |request| {
            let id = ids.borrow_mut().draw();
            async move { answer(request.uri().path(), id, resolver).await }
        }));
    });
    match never.await {}
}

async fn answer(path: &str, id: u16, resolver: SocketAddrV4) -> Response<Full<Bytes>> {
    let time = Duration::from_millis(TIMEOUT_MILLIS);
    let asking = resolve(path.trim_start_matches('/'), id, resolver);
    let address = timeout(time, asking).await.ok().and_then(Result::ok).flatten();
    let (status, text) = dns::told(address);
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = StatusCode::from_u16(status).expect("a valid status");
    response
}

async fn resolve(name: &str, id: u16, resolver: SocketAddrV4) -> io::Result<Option<Ipv4Addr>> {
    let Some(query) = dns::query(id, name) else { return Ok(None) };
    let socket = connected(resolver).await?;
    socket.send(&query).await?;
    let mut buffer = [0; MESSAGE_BYTES_MAX];
    loop {
        let len = socket.recv(&mut buffer).await?;
        if dns::is_answer(&buffer[..len], &query, id) {
            return Ok(dns::address(&buffer[..len]));
        }
    }
}
