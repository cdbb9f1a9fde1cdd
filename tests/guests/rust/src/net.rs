//! wasi:sockets in the shape this guest wants it: addresses, one socket with
//! its streams, and waits that end.

use std::fmt;

use wasip2::clocks::monotonic_clock::subscribe_duration;
use wasip2::io::poll::{Pollable, poll};
use wasip2::sockets::instance_network::instance_network;
use wasip2::sockets::network::{
    ErrorCode, IpAddressFamily, IpSocketAddress, Ipv4SocketAddress, Ipv6SocketAddress,
};
use wasip2::sockets::udp::{
    IncomingDatagram, IncomingDatagramStream, OutgoingDatagram, OutgoingDatagramStream, UdpSocket,
};
use wasip2::sockets::udp_create_socket::create_udp_socket;

/// For what must come: a host that loses a wake-up changes the transcript
/// instead of hanging.
pub const WAIT_NS: u64 = 10_000_000_000;
/// For what must not come.
pub const QUIET_NS: u64 = 100_000_000;
pub const ATTEMPTS_MAX: usize = 1000;

pub const FAMILIES: [IpAddressFamily; 2] = [IpAddressFamily::Ipv4, IpAddressFamily::Ipv6];

/// Who a socket is, as something that can be compared and kept in a set.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum Address {
    V4(u16, (u8, u8, u8, u8)),
    V6(u16, (u16, u16, u16, u16, u16, u16, u16, u16)),
}

impl Address {
    pub fn loopback(family: IpAddressFamily, port: u16) -> Self {
        match family {
            IpAddressFamily::Ipv4 => Self::V4(port, (127, 0, 0, 1)),
            IpAddressFamily::Ipv6 => Self::V6(port, (0, 0, 0, 0, 0, 0, 0, 1)),
        }
    }

    pub fn port(self) -> u16 {
        match self {
            Self::V4(port, _) | Self::V6(port, _) => port,
        }
    }
}

impl From<IpSocketAddress> for Address {
    fn from(address: IpSocketAddress) -> Self {
        match address {
            IpSocketAddress::Ipv4(v4) => Self::V4(v4.port, v4.address),
            IpSocketAddress::Ipv6(v6) => Self::V6(v6.port, v6.address),
        }
    }
}

impl From<Address> for IpSocketAddress {
    fn from(address: Address) -> Self {
        match address {
            Address::V4(port, address) => Self::Ipv4(Ipv4SocketAddress { port, address }),
            Address::V6(port, address) => {
                Self::Ipv6(Ipv6SocketAddress { port, flow_info: 0, address, scope_id: 0 })
            }
        }
    }
}

/// How an answer is told: `ok`, a value, or the error's name.
pub fn told<T: fmt::Debug>(answer: Result<T, ErrorCode>) -> String {
    match answer {
        Ok(value) => match format!("{value:?}") {
            unit if unit == "()" => "ok".into(),
            value => value,
        },
        Err(code) => format!("error {}", code.name()),
    }
}

/// Blocks until one of the events fires; the indices of those that did, none of
/// them when the deadline passed first.
pub fn wait_for_any(events: &[&Pollable], deadline_ns: u64) -> Vec<usize> {
    let timer = subscribe_duration(deadline_ns);
    let mut all = events.to_vec();
    all.push(&timer);
    let mut ready: Vec<usize> = poll(&all).into_iter().map(|index| index as usize).collect();
    ready.retain(|&index| index < events.len());
    ready
}

pub fn wait(event: &Pollable, deadline_ns: u64) -> bool {
    !wait_for_any(&[event], deadline_ns).is_empty()
}

/// Gives the host's runtime a turn. wasmtime-wasi goes on with a send in the
/// background, and tells its error at the next one, when the guest has kept the
/// runtime busy for long (tokio's cooperative budget); not after this.
pub fn pause() {
    subscribe_duration(1_000_000).block();
}

pub fn create(family: IpAddressFamily) -> UdpSocket {
    create_udp_socket(family).expect("create-udp-socket")
}

pub fn start_bind(socket: &UdpSocket, address: Address) -> Result<(), ErrorCode> {
    // The network need not outlive the call.
    socket.start_bind(&instance_network(), address.into())
}

pub fn finish_bind(socket: &UdpSocket) -> Result<(), ErrorCode> {
    for _ in 0..ATTEMPTS_MAX {
        match socket.finish_bind() {
            Err(ErrorCode::WouldBlock) => wait(&socket.subscribe(), WAIT_NS),
            answer => return answer,
        };
    }
    Err(ErrorCode::WouldBlock)
}

/// Start and finish as one: a failure may be told at either.
pub fn bind(socket: &UdpSocket, address: Address) -> Result<(), ErrorCode> {
    start_bind(socket, address)?;
    finish_bind(socket)
}

pub fn local_address(socket: &UdpSocket) -> Address {
    socket.local_address().expect("local-address").into()
}

/// A bound socket and its streams. Declared in an order in which they may be
/// dropped: the streams are children of the socket.
pub struct Peer {
    pub incoming: IncomingDatagramStream,
    pub outgoing: OutgoingDatagramStream,
    pub socket: UdpSocket,
    pub at: Address,
}

impl Peer {
    pub fn new(family: IpAddressFamily) -> Self {
        let socket = create(family);
        bind(&socket, Address::loopback(family, 0)).expect("bind");
        Self::of(socket, None)
    }

    /// On a port asked for by number. Linux takes a port it chose itself back
    /// when a socket is disconnected, and wasmtime-wasi lets it; this one
    /// outlives `stream(none)` everywhere.
    pub fn on_a_port_of_its_own(family: IpAddressFamily) -> Self {
        for _ in 0..ATTEMPTS_MAX {
            let finder = create(family);
            bind(&finder, Address::loopback(family, 0)).expect("bind");
            let free = local_address(&finder);
            drop(finder);
            let socket = create(family);
            match bind(&socket, free) {
                Ok(()) => return Self::of(socket, None),
                Err(ErrorCode::AddressInUse) => {}
                Err(code) => panic!("bind to a free port: {}", code.name()),
            }
        }
        panic!("found no port that stays free");
    }

    fn of(socket: UdpSocket, remote: Option<Address>) -> Self {
        let at = local_address(&socket);
        let (incoming, outgoing) = socket.stream(remote.map(Into::into)).expect("stream");
        Self { incoming, outgoing, socket, at }
    }

    /// New streams for the same socket; the old ones go first, or the host traps.
    ///
    /// No read may be pending on the old ones: wasmtime-wasi waits in the
    /// background once a stream has found its socket empty, and traps in
    /// `stream` while it does. So this guest takes what has come, one by one.
    pub fn restream(self, remote: Option<Address>) -> Self {
        let Self { incoming, outgoing, socket, .. } = self;
        drop((outgoing, incoming));
        Self::of(socket, remote)
    }

    /// Sends all of it, in as few calls as the host permits.
    pub fn send(&self, datagrams: &[(&[u8], Option<Address>)]) -> Result<usize, ErrorCode> {
        let mut sent = 0;
        for _ in 0..ATTEMPTS_MAX {
            if sent == datagrams.len() {
                break;
            }
            let permit = self.outgoing.check_send()? as usize;
            if permit == 0 {
                wait(&self.outgoing.subscribe(), WAIT_NS);
                continue;
            }
            let batch: Vec<OutgoingDatagram> = datagrams[sent..]
                .iter()
                .take(permit)
                .map(|&(data, to)| OutgoingDatagram {
                    data: data.to_vec(),
                    remote_address: to.map(Into::into),
                })
                .collect();
            sent += self.outgoing.send(&batch)? as usize;
        }
        Ok(sent)
    }

    pub fn send_one(&self, data: &[u8], to: Option<Address>) -> Result<usize, ErrorCode> {
        self.send(&[(data, to)])
    }

    /// The next datagram, `None` once the deadline has passed.
    pub fn receive(&self) -> Option<(Vec<u8>, Address)> {
        for _ in 0..ATTEMPTS_MAX {
            if !wait(&self.incoming.subscribe(), WAIT_NS) {
                return None;
            }
            let got = self.incoming.receive(1).expect("receive").pop();
            if let Some(IncomingDatagram { data, remote_address }) = got {
                return Some((data, remote_address.into()));
            }
        }
        None
    }

    /// Up to `count` datagrams, sixteen at a time, ending when none comes for
    /// `patience_ns`. Leaves a read pending: not before `restream`.
    pub fn receive_many(&self, count: usize, patience_ns: u64) -> Vec<(Vec<u8>, Address)> {
        let mut all = Vec::new();
        while all.len() < count {
            let want = (count - all.len()).min(16) as u64;
            let got = self.incoming.receive(want).expect("receive");
            assert!(got.len() as u64 <= want, "receive answered more than asked");
            if got.is_empty() && !wait(&self.incoming.subscribe(), patience_ns) {
                break;
            }
            all.extend(got.into_iter().map(|it| (it.data, it.remote_address.into())));
        }
        all
    }
}

/// Receives one datagram on each of many sockets, whichever is first, through
/// one list of pollables. Answers in the order of `peers`.
pub fn receive_on_all(peers: &[Peer]) -> Vec<Option<(Vec<u8>, Address)>> {
    let mut got: Vec<Option<(Vec<u8>, Address)>> = peers.iter().map(|_| None).collect();
    for _ in 0..ATTEMPTS_MAX {
        let missing: Vec<usize> = (0..peers.len()).filter(|&at| got[at].is_none()).collect();
        if missing.is_empty() {
            break;
        }
        let events: Vec<Pollable> =
            missing.iter().map(|&at| peers[at].incoming.subscribe()).collect();
        let ready = wait_for_any(&events.iter().collect::<Vec<_>>(), WAIT_NS);
        if ready.is_empty() {
            break;
        }
        for at in ready.into_iter().map(|index| missing[index]) {
            let datagram = peers[at].incoming.receive(1).expect("receive").pop();
            got[at] = datagram.map(|it| (it.data, it.remote_address.into()));
        }
    }
    got
}
