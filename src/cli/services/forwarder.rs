//! A DNS forwarder over tokio's sockets: a task and an upstream socket for each query, as guests have.

use std::cell::RefCell;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, SocketAddrV4};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::Semaphore;
use tokio::task::spawn_local;
use tokio::time::timeout;

use super::dns::{self, IN_FLIGHT_MAX, Ids, MESSAGE_BYTES_MAX, TIMEOUT_MILLIS};
use super::{connected, random};

struct Forwarder {
    listener: UdpSocket,
    upstream: SocketAddrV4,
    ids: RefCell<Ids>,
}

/// Forwards what comes to an address, or with the next free port, for ever.
pub(super) async fn run(listen: SocketAddrV4, upstream: SocketAddrV4) -> io::Result<()> {
    let listener = listen_from(listen).await?;
    let forwarder = Rc::new(Forwarder { listener, upstream, ids: RefCell::new(Ids::new(random)) });
    let room = Arc::new(Semaphore::new(IN_FLIGHT_MAX));
    let mut buffer = [0; MESSAGE_BYTES_MAX];
    loop {
        let permit = Arc::clone(&room).acquire_owned().await.map_err(io::Error::other)?;
        let (len, client) = forwarder.listener.recv_from(&mut buffer).await?;
        if !dns::is_query(&buffer[..len]) {
            continue;
        }
        let (forwarder, query) = (Rc::clone(&forwarder), buffer[..len].to_vec());
        spawn_local(async move {
            forwarder.forward(query, client).await;
            drop(permit);
        });
    }
}

async fn listen_from(listen: SocketAddrV4) -> io::Result<UdpSocket> {
    let mut bound = Err(ErrorKind::AddrInUse.into());
    for listen in dns::listeners(listen) {
        bound = UdpSocket::bind(listen).await;
        if !bound.as_ref().is_err_and(|error| error.kind() == ErrorKind::AddrInUse) {
            break;
        }
    }
    bound
}

impl Forwarder {
    async fn forward(&self, mut query: Vec<u8>, client: SocketAddr) {
        let time = Duration::from_millis(TIMEOUT_MILLIS);
        let answer = if let Ok(Ok(mut answer)) = timeout(time, self.ask(&query)).await {
            dns::set_id(&mut answer, dns::id(&query));
            answer
        } else {
            dns::fail(&mut query);
            query
        };
        // Nobody waits for what cannot be sent.
        let _ = self.listener.send_to(&answer, client).await;
    }

    async fn ask(&self, query: &[u8]) -> io::Result<Vec<u8>> {
        let id = self.ids.borrow_mut().draw();
        let mut message = query.to_vec();
        dns::set_id(&mut message, id);
        let socket = connected(self.upstream).await?;
        socket.send(&message).await?;
        let mut buffer = [0; MESSAGE_BYTES_MAX];
        loop {
            let len = socket.recv(&mut buffer).await?;
            if dns::is_answer(&buffer[..len], query, id) {
                return Ok(buffer[..len].to_vec());
            }
        }
    }
}
