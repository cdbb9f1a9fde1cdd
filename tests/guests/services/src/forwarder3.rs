//! A DNS forwarder over WASI 0.3: `LISTEN UPSTREAM`, addresses with ports. If
//! another listens already, it takes one of the next ports.
//!
//! Each query is a future with an upstream socket of its own, and with it a port
//! that cannot be guessed (RFC 5452).

mod net3;

use std::cell::RefCell;
use std::net::SocketAddrV4;
use std::pin::pin;

use futures_util::StreamExt as _;
use futures_util::future::{Either, select};
use futures_util::stream::FuturesUnordered;
use services::dns::{self, IN_FLIGHT_MAX, Ids, TIMEOUT_MILLIS};
use wasip3::cli::environment::get_arguments;
use wasip3::clocks::monotonic_clock::wait_for;
use wasip3::random::random::get_random_bytes;
use wasip3::sockets::types::{ErrorCode, IpSocketAddress, UdpSocket};

struct Guest;

wasip3::cli::command::export!(Guest);

impl wasip3::exports::cli::run::Guest for Guest {
    async fn run() -> Result<(), ()> {
        let arguments = get_arguments();
        let addresses: Vec<SocketAddrV4> =
            arguments.iter().skip(1).filter_map(|argument| argument.parse().ok()).collect();
        let &[listen, upstream] = addresses.as_slice() else { return Err(()) };
        let listener = listen_from(listen).map_err(drop)?;
        let forwarder = Forwarder {
            listener,
            upstream,
            ids: RefCell::new(Ids::new(|count| get_random_bytes(count as u64))),
        };
        forwarder.run().await;
        Ok(())
    }
}

fn listen_from(listen: SocketAddrV4) -> Result<UdpSocket, ErrorCode> {
    let bound = dns::listeners(listen)
        .map(net3::bind)
        .find(|bound| !matches!(bound, Err(ErrorCode::AddressInUse)));
    bound.unwrap_or(Err(ErrorCode::AddressInUse))
}

struct Forwarder {
    listener: UdpSocket,
    upstream: SocketAddrV4,
    ids: RefCell<Ids>,
}

impl Forwarder {
    async fn run(&self) {
        let mut flights = FuturesUnordered::new();
        let mut received = pin!(self.listener.receive());
        loop {
            while flights.len() >= IN_FLIGHT_MAX {
                flights.next().await;
            }
            // An empty set of flights would be ready at once.
            let datagram = if flights.is_empty() {
                received.as_mut().await
            } else {
                match select(received.as_mut(), flights.next()).await {
                    Either::Left((datagram, _)) => datagram,
                    Either::Right(_) => continue,
                }
            };
            received.set(self.listener.receive());
            if let Ok((query, client)) = datagram
                && dns::is_query(&query)
            {
                flights.push(self.forward(query, client));
            }
        }
    }

    async fn forward(&self, mut query: Vec<u8>, client: IpSocketAddress) {
        let answer = if let Some(mut answer) = self.ask(&query).await {
            dns::set_id(&mut answer, dns::id(&query));
            answer
        } else {
            dns::fail(&mut query);
            query
        };
        // Nobody waits for what cannot be sent.
        let _ = self.listener.send(answer, Some(client)).await;
    }

    async fn ask(&self, query: &[u8]) -> Option<Vec<u8>> {
        let id = self.ids.borrow_mut().draw();
        let mut message = query.to_vec();
        dns::set_id(&mut message, id);
        let socket = net3::connected(self.upstream).ok()?;
        socket.send(message, None).await.ok()?;
        let answered = async {
            loop {
                let (answer, _) = socket.receive().await.ok()?;
                if dns::is_answer(&answer, query, id) {
                    return Some(answer);
                }
            }
        };
        match select(pin!(answered), pin!(wait_for(TIMEOUT_MILLIS * 1_000_000))).await {
            Either::Left((answer, _)) => answer,
            Either::Right(_) => None,
        }
    }
}
