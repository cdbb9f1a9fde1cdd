//! A DNS forwarder over WASI 0.2: `LISTEN UPSTREAM [one-socket]`, addresses with
//! ports. If another listens already, it takes one of the next ports.
//!
//! Each query gets an upstream socket of its own, and with it a port that cannot
//! be guessed (RFC 5452); with `one-socket` all share one, and their ids are all
//! that tells them apart.

mod net2;

use std::net::SocketAddrV4;
use std::time::Duration;

use net2::UdpSocket;
use services::dns::{self, IN_FLIGHT_MAX, Ids, TIMEOUT_MILLIS};
use wasip2::cli::environment::get_arguments;
use wasip2::clocks::monotonic_clock::{now, subscribe_duration};
use wasip2::io::poll::{Pollable, poll};
use wasip2::random::random::get_random_bytes;
use wasip2::sockets::network::{ErrorCode, IpSocketAddress};
use wasip2::sockets::udp::OutgoingDatagram;

/// Datagrams taken at once.
const BATCH_MAX: u64 = 32;
/// Between looks for queries that nobody has answered.
const TICK: Duration = Duration::from_millis(250);

struct Guest;

wasip2::cli::command::export!(Guest);

impl wasip2::exports::cli::run::Guest for Guest {
    fn run() -> Result<(), ()> {
        let arguments = get_arguments();
        let addresses: Vec<SocketAddrV4> =
            arguments.iter().skip(1).filter_map(|argument| argument.parse().ok()).collect();
        let &[listen, upstream] = addresses.as_slice() else { return Err(()) };
        let shares = arguments.last().is_some_and(|argument| argument == "one-socket");
        let mut forwarder = Forwarder::new(listen, upstream, shares).map_err(drop)?;
        loop {
            forwarder.turn();
        }
    }
}

/// A query that has been sent on.
struct Flight {
    /// `None`: on the socket that all share.
    socket: Option<UdpSocket>,
    query: Vec<u8>,
    id: u16,
    client: IpSocketAddress,
    deadline_ns: u64,
}

struct Forwarder {
    tick: Pollable,
    listener: UdpSocket,
    upstream: SocketAddrV4,
    shared: Option<UdpSocket>,
    flights: Vec<Flight>,
    answers: Vec<OutgoingDatagram>,
    ids: Ids,
}

impl Forwarder {
    fn new(listen: SocketAddrV4, upstream: SocketAddrV4, shares: bool) -> Result<Self, ErrorCode> {
        let bound = dns::listeners(listen)
            .map(UdpSocket::bind)
            .find(|bound| !matches!(bound, Err(ErrorCode::AddressInUse)));
        Ok(Self {
            tick: subscribe_duration(nanos(TICK)),
            listener: bound.unwrap_or(Err(ErrorCode::AddressInUse))?,
            upstream,
            shared: if shares { Some(UdpSocket::connected(upstream)?) } else { None },
            flights: Vec::new(),
            answers: Vec::new(),
            ids: Ids::new(|count| get_random_bytes(count as u64)),
        })
    }

    /// Waits, and does what there is to do.
    fn turn(&mut self) {
        let mut events = vec![&self.tick];
        let shared = self.shared.as_ref().map(|socket| place(&mut events, socket));
        let has_room = self.flights.len() < IN_FLIGHT_MAX;
        let listener = has_room.then(|| place(&mut events, &self.listener));
        let flights = events.len();
        let sockets = self.flights.iter().filter_map(|flight| flight.socket.as_ref());
        events.extend(sockets.map(UdpSocket::readable));
        let mut ready = poll(&events);
        // From the last, because a flight that ends gives its place to the last one.
        ready.sort_unstable_by_key(|event| std::cmp::Reverse(*event));
        for event in ready.into_iter().map(|event| event as usize) {
            match event {
                0 => self.end_overdue(),
                _ if Some(event) == shared => self.take_shared(),
                _ if Some(event) == listener => self.take_queries(),
                _ => self.take_answer(event - flights),
            }
        }
        // Nobody waits for what cannot be sent.
        let _ = self.listener.send_all(&self.answers);
        self.answers.clear();
    }

    fn take_queries(&mut self) {
        let room = (IN_FLIGHT_MAX - self.flights.len()) as u64;
        let deadline_ns = now() + TIMEOUT_MILLIS * 1_000_000;
        for datagram in self.listener.receive(room.min(BATCH_MAX)).unwrap_or_default() {
            if !dns::is_query(&datagram.data) {
                continue;
            }
            let id = self.draw_id();
            let mut message = datagram.data.clone();
            dns::set_id(&mut message, id);
            let mut flight = Flight {
                socket: None,
                query: datagram.data,
                id,
                client: datagram.remote_address,
                deadline_ns,
            };
            let sent = match &self.shared {
                Some(socket) => socket.send(message),
                None => UdpSocket::connected(self.upstream).and_then(|socket| {
                    let socket = flight.socket.insert(socket);
                    socket.send(message)
                }),
            };
            match sent {
                Ok(()) => self.flights.push(flight),
                Err(_) => self.fail(flight),
            }
        }
    }

    /// One that no other query on the same socket has.
    fn draw_id(&mut self) -> u16 {
        loop {
            let id = self.ids.draw();
            if self.shared.is_none() || self.flights.iter().all(|flight| flight.id != id) {
                return id;
            }
        }
    }

    fn take_answer(&mut self, at: usize) {
        let flight = &self.flights[at];
        let Some(socket) = &flight.socket else { return };
        match socket.receive(1) {
            Ok(datagrams) => {
                for datagram in datagrams {
                    if dns::is_answer(&datagram.data, &flight.query, flight.id) {
                        return self.answer(at, datagram.data);
                    }
                }
            }
            Err(_) => {
                let flight = self.flights.swap_remove(at);
                self.fail(flight);
            }
        }
    }

    fn take_shared(&mut self) {
        let Some(socket) = &self.shared else { return };
        // An error is of some query; which is not said, and its time will run out.
        for datagram in socket.receive(BATCH_MAX).unwrap_or_default() {
            let is_answered =
                |flight: &Flight| dns::is_answer(&datagram.data, &flight.query, flight.id);
            if let Some(at) = self.flights.iter().position(is_answered) {
                self.answer(at, datagram.data);
            }
        }
    }

    fn answer(&mut self, at: usize, mut data: Vec<u8>) {
        let flight = self.flights.swap_remove(at);
        dns::set_id(&mut data, dns::id(&flight.query));
        self.answers.push(OutgoingDatagram { data, remote_address: Some(flight.client) });
    }

    fn fail(&mut self, mut flight: Flight) {
        dns::fail(&mut flight.query);
        let (data, remote_address) = (flight.query, Some(flight.client));
        self.answers.push(OutgoingDatagram { data, remote_address });
    }

    fn end_overdue(&mut self) {
        let now_ns = now();
        let overdue = self.flights.extract_if(.., |flight| flight.deadline_ns <= now_ns);
        for flight in overdue.collect::<Vec<_>>() {
            self.fail(flight);
        }
        self.tick = subscribe_duration(nanos(TICK));
    }
}

/// Adds what a socket is waited with; returns where.
fn place<'a>(events: &mut Vec<&'a Pollable>, socket: &'a UdpSocket) -> usize {
    events.push(socket.readable());
    events.len() - 1
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
