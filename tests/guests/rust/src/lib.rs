//! A WASI 0.2 guest that asks much at a time: a hundred binds before the first
//! is finished, two hundred sockets open, bursts of sixteen datagrams.
//!
//! Speaks to itself over loopback and prints a transcript that is the same on
//! every host and backend: ports and sizes are told by how they compare, errors
//! by name, many of a kind by their count. Where the interface lets a host
//! choose when to report, only that it reports is told.

mod net;

use std::collections::HashSet;
use std::io::Write as _;

use net::{
    Address, FAMILIES, Peer, QUIET_NS, WAIT_NS, bind, create, finish_bind, local_address, pause,
    receive_on_all, start_bind, told, wait, wait_for_any,
};
use wasip2::io::poll::Pollable;
use wasip2::sockets::network::{ErrorCode, IpAddressFamily};

const BINDS: usize = 100;
const SOCKETS: usize = 200;
const BURST: usize = 16;

macro_rules! say {
    ($($line:tt)*) => {
        writeln!(wasip2::cli::stdout::get_stdout(), $($line)*).expect("stdout")
    };
}

struct Guest;

wasip2::cli::command::export!(Guest);

impl wasip2::exports::cli::run::Guest for Guest {
    fn run() -> Result<(), ()> {
        std::panic::set_hook(Box::new(|info| {
            _ = writeln!(wasip2::cli::stderr::get_stderr(), "guest: {info}");
        }));
        for family in FAMILIES {
            say!("== {}", if family == IpAddressFamily::Ipv4 { "ipv4" } else { "ipv6" });
            life(family);
            many_binds(family);
            taken_port(family);
            dropped_early(family);
            bursts(family);
            fan_in(family);
            flood(family);
            restream(family);
            pairs(family);
            largest(family);
            churn(family);
        }
        say!("== both");
        ring();
        FAMILIES.map(refused);
        say!("done");
        Ok(())
    }
}

/// One socket's life, told step by step.
fn life(family: IpAddressFamily) {
    say!("-- life");
    let socket = create(family);
    say!("local-address: {}", told(socket.local_address().map(|_| "bound")));
    say!("hop limit 0: {}", told(socket.set_unicast_hop_limit(0)));
    say!("hop limit 3: {}", told(socket.set_unicast_hop_limit(3)));
    say!("receive buffer 0: {}", told(socket.set_receive_buffer_size(0)));
    say!("receive buffer 49152: {}", told(socket.set_receive_buffer_size(49152)));
    say!("bind: {}", told(bind(&socket, Address::loopback(family, 0))));
    say!("bind again: {}", told(bind(&socket, Address::loopback(family, 0))));
    say!("hop limit: {}", told(socket.unicast_hop_limit()));
    say!("receive buffer: {}", told(socket.receive_buffer_size()));
    say!("port is not 0: {}", local_address(&socket).port() != 0);
    say!("remote-address: {}", told(socket.remote_address().map(|_| "connected")));
    drop(socket);

    let other = Peer::new(family);
    let peer = Peer::on_a_port_of_its_own(family);
    let at = peer.at;
    say!("send: {}", told(peer.send_one(b"hello", Some(other.at))));
    say!("received: {}", other.receive() == Some((b"hello".to_vec(), at)));
    say!("send to nobody: {}", told(peer.send_one(b"hello", None)));

    let peer = peer.restream(Some(other.at));
    say!(
        "remote-address is the other's: {}",
        peer.socket.remote_address().is_ok_and(|it| Address::from(it) == other.at)
    );
    say!("send: {}", told(peer.send_one(b"connected", None)));
    say!("received: {}", other.receive() == Some((b"connected".to_vec(), at)));
    say!("send to itself: {}", told(peer.send_one(b"hello", Some(at))));

    let peer = peer.restream(None);
    say!("remote-address: {}", told(peer.socket.remote_address().map(|_| "connected")));
    say!("local-address is kept: {}", peer.at == at);
    say!("send to itself: {}", told(peer.send_one(b"hello", Some(at))));
    say!("received: {}", peer.receive() == Some((b"hello".to_vec(), at)));

    // The other legal order: the outgoing stream first.
    let Peer { incoming, outgoing, socket, .. } = peer;
    drop(outgoing);
    drop(incoming);
    say!("bound without streams: {}", local_address(&socket) == at);
}

/// Every bind is started before the first is finished.
fn many_binds(family: IpAddressFamily) {
    say!("-- {BINDS} binds at a time");
    let sockets: Vec<_> = (0..BINDS).map(|_| create(family)).collect();
    let started =
        sockets.iter().filter(|it| start_bind(it, Address::loopback(family, 0)).is_ok()).count();
    say!("started: {started}");
    let conflicts = sockets
        .iter()
        .filter(|it| {
            start_bind(it, Address::loopback(family, 0)) == Err(ErrorCode::ConcurrencyConflict)
        })
        .count();
    say!("cannot be started twice: {conflicts}");
    let set = sockets
        .iter()
        .zip(1..)
        .filter(|(it, hops)| it.set_unicast_hop_limit(*hops).is_ok())
        .count();
    say!("hop limit set meanwhile: {set}");

    let events: Vec<Pollable> = sockets.iter().map(|it| it.subscribe()).collect();
    say!("one is ready: {}", !wait_for_any(&events.iter().collect::<Vec<_>>(), WAIT_NS).is_empty());
    drop(events);
    // Last come, first served.
    let finished = sockets.iter().rev().filter(|it| finish_bind(it).is_ok()).count();
    say!("finished: {finished}");
    let again =
        sockets.iter().filter(|it| it.finish_bind() == Err(ErrorCode::NotInProgress)).count();
    say!("cannot be finished twice: {again}");
    let ports: HashSet<u16> = sockets.iter().map(|it| local_address(it).port()).collect();
    say!("ports: {}, none of them 0: {}", ports.len(), !ports.contains(&0));
    let kept =
        sockets.iter().zip(1..).filter(|(it, hops)| it.unicast_hop_limit() == Ok(*hops)).count();
    say!("hop limit kept: {kept}");
}

/// Binds that fail must fail alone, and leave their socket as it was.
fn taken_port(family: IpAddressFamily) {
    say!("-- a taken port");
    let owner = Peer::new(family);
    let sockets: Vec<_> = (0..32).map(|_| create(family)).collect();
    // Every second one asks for what it cannot have.
    let answers: Vec<_> = sockets
        .iter()
        .zip(0..)
        .map(|(it, index)| {
            let taken = index % 2 == 0;
            start_bind(it, if taken { owner.at } else { Address::loopback(family, 0) })
        })
        .collect();
    let answers: Vec<_> = sockets
        .iter()
        .zip(answers)
        .map(|(it, started)| started.and_then(|()| finish_bind(it)))
        .collect();
    let of = |want: Result<(), ErrorCode>| answers.iter().filter(|it| **it == want).count();
    say!("ok: {}, address-in-use: {}", of(Ok(())), of(Err(ErrorCode::AddressInUse)));
    let again = sockets
        .iter()
        .step_by(2)
        .filter(|it| bind(it, Address::loopback(family, 0)).is_ok())
        .count();
    say!("bound elsewhere after that: {again}");
}

/// What is in flight when its handle goes away is nobody's trouble.
fn dropped_early(family: IpAddressFamily) {
    say!("-- dropped early");
    for _ in 0..50 {
        drop(create(family));
        let socket = create(family);
        start_bind(&socket, Address::loopback(family, 0)).expect("start-bind");
        drop(socket);
    }
    let peer = Peer::new(family);
    for _ in 0..50 {
        drop(peer.incoming.subscribe());
        drop(peer.outgoing.subscribe());
    }
    let (read, write) = (peer.incoming.subscribe(), peer.outgoing.subscribe());
    say!("readable: {}", wait(&read, QUIET_NS));
    say!("writable: {}", wait(&write, WAIT_NS));
    drop((read, write));
    say!("send to itself: {}", told(peer.send_one(b"still here", Some(peer.at))));
    say!("received: {}", peer.receive() == Some((b"still here".to_vec(), peer.at)));
    // Sent, never received.
    say!("send to itself: {}", told(peer.send_one(b"too late", Some(peer.at))));
}

/// Content that tells which datagram it is, `size` bytes of it.
fn numbered(index: usize, size: usize) -> Vec<u8> {
    index.to_le_bytes().into_iter().cycle().take(size).collect()
}

fn bursts(family: IpAddressFamily) {
    say!("-- bursts of {BURST}");
    let (one, two) = (Peer::new(family), Peer::new(family));
    for size in [0, 4, 64, 512, 1472] {
        let (mut sent, mut in_order, mut from_one) = (0, 0, 0);
        for round in 0..32 {
            let burst: Vec<_> =
                (0..BURST).map(|index| numbered(round * BURST + index, size)).collect();
            let datagrams: Vec<_> = burst.iter().map(|it| (it.as_slice(), Some(two.at))).collect();
            sent += one.send(&datagrams).expect("send");
            let got = two.receive_many(BURST, WAIT_NS);
            in_order += got.iter().zip(&burst).filter(|(got, sent)| got.0 == **sent).count();
            from_one += got.iter().filter(|it| it.1 == one.at).count();
        }
        say!("{size} bytes: sent {sent}, in order {in_order}, from their sender {from_one}");
    }
    // The third cannot be sent; it ends the burst, and says why when it leads one.
    let good = (b"good".as_slice(), Some(two.at));
    let bad = (b"bad".as_slice(), Some(Address::loopback(family, 0)));
    say!("bad among good: {}", told(one.send(&[good, good, bad, good])));
    say!("the good before it came: {}", two.receive_many(2, WAIT_NS).len());
    say!("nothing after it: {}", two.receive_many(1, QUIET_NS).is_empty());
}

/// Eight burst at one; each one's order is kept.
fn fan_in(family: IpAddressFamily) {
    say!("-- eight to one");
    let sink = Peer::new(family);
    let sources: Vec<_> = (0..8).map(|_| Peer::new(family)).collect();
    let burst: Vec<_> = (0..BURST).map(|index| numbered(index, 64)).collect();
    let datagrams: Vec<_> = burst.iter().map(|it| (it.as_slice(), Some(sink.at))).collect();
    let sent: usize = sources.iter().map(|it| it.send(&datagrams).expect("send")).sum();
    let got = sink.receive_many(sent, WAIT_NS);
    let in_order = sources
        .iter()
        .filter(|source| {
            let its = got.iter().filter(|it| it.1 == source.at).map(|it| &it.0);
            its.eq(&burst)
        })
        .count();
    say!("sent {sent}, received {}, senders in order {in_order}", got.len());
}

/// A socket nobody reads is flooded; it may lose, its neighbour may not.
fn flood(family: IpAddressFamily) {
    say!("-- flood");
    let (source, flooded, neighbour) = (Peer::new(family), Peer::new(family), Peer::new(family));
    // The host has been told that somebody reads here.
    _ = wait(&flooded.incoming.subscribe(), 0);
    let data: Vec<_> = (0..1024).map(|index| numbered(index, 1472)).collect();
    let mut sent = 0;
    let mut unharmed = 0;
    for (round, burst) in data.chunks(BURST).enumerate() {
        let datagrams: Vec<_> = burst.iter().map(|it| (it.as_slice(), Some(flooded.at))).collect();
        sent += source.send(&datagrams).expect("send");
        let greeting = numbered(round, 8);
        source.send_one(&greeting, Some(neighbour.at)).expect("send");
        unharmed += usize::from(neighbour.receive() == Some((greeting, source.at)));
    }
    say!("sent {sent}, neighbour received {unharmed}");
    let got = flooded.receive_many(data.len(), QUIET_NS);
    let mut expected = data.iter();
    say!("flooded received some: {}", !got.is_empty());
    say!("intact and in order: {}", got.iter().all(|it| expected.any(|sent| *sent == it.0)));
}

/// What is queued when the streams change.
fn restream(family: IpAddressFamily) {
    say!("-- new streams");
    let (one, two) = (Peer::new(family), Peer::new(family));
    let peer = Peer::on_a_port_of_its_own(family);
    let at = peer.at;
    one.send_one(b"first", Some(at)).expect("send");
    say!("received: {}", peer.receive() == Some((b"first".to_vec(), one.at)));
    one.send_one(b"queued", Some(at)).expect("send");
    let peer = peer.restream(None);
    say!("queued one is kept: {}", peer.receive() == Some((b"queued".to_vec(), one.at)));

    // A stranger never becomes the peer: what it has sent may come late.
    let stranger = Peer::new(family);
    stranger.send_one(b"from a stranger", Some(at)).expect("send");
    let mut peer = peer.restream(Some(two.at));
    two.send_one(b"from the peer", Some(at)).expect("send");
    say!("stranger's is dropped: {}", peer.receive() == Some((b"from the peer".to_vec(), two.at)));

    let mut heard = 0;
    for round in 0..50 {
        let friend = if round % 2 == 0 { &one } else { &two };
        peer = peer.restream(Some(friend.at));
        stranger.send_one(b"no", Some(at)).expect("send");
        friend.send_one(&[round], Some(at)).expect("send");
        heard += usize::from(peer.receive() == Some((vec![round], friend.at)));
    }
    say!("heard its peer, of 50: {heard}");
}

/// Fifty sockets, each connected to one after another.
fn pairs(family: IpAddressFamily) {
    const PEERS: usize = 50;
    say!("-- {PEERS} connected");
    let mut peers: Vec<_> = (0..PEERS).map(|_| Peer::new(family)).collect();
    let at: Vec<Address> = peers.iter().map(|it| it.at).collect();
    for step in [1, 3, 7] {
        // Pairs (a, b) with a + b = step, so that each is its partner's partner.
        let partner = |index: usize| (PEERS + step - index) % PEERS;
        peers = peers
            .into_iter()
            .zip(0..)
            .map(|(it, index)| it.restream(Some(at[partner(index)])))
            .collect();
        let connected = (0..PEERS)
            .filter(|&index| {
                let remote = peers[index].socket.remote_address().map(Address::from);
                remote == Ok(at[partner(index)])
            })
            .count();
        let (mut sent, mut received) = (0, 0);
        for round in 0..4 {
            for peer in &peers {
                sent += peer.send_one(&numbered(round, 32), None).expect("send");
            }
            received += receive_on_all(&peers)
                .into_iter()
                .enumerate()
                .filter(|(index, it)| *it == Some((numbered(round, 32), at[partner(*index)])))
                .count();
        }
        say!("step {step}: connected {connected}, sent {sent}, received {received}");
    }
}

/// The largest datagram each family has, and one byte more.
fn largest(family: IpAddressFamily) {
    say!("-- largest");
    let (one, two) = (Peer::new(family), Peer::new(family));
    let most = if family == IpAddressFamily::Ipv4 { 65507 } else { 65527 };
    for size in [9000, 65507, most] {
        let data = numbered(size, size);
        say!("send {size} bytes: {}", told(one.send_one(&data, Some(two.at))));
        say!("received: {}", two.receive() == Some((data, one.at)));
    }
    pause();
    say!("send {} bytes: {}", most + 1, told(one.send_one(&vec![0; most + 1], Some(two.at))));
    say!("send 65536 bytes: {}", told(one.send_one(&vec![0; 65536], Some(two.at))));
    say!("send 1 byte: {}", told(one.send_one(b"1", Some(two.at))));
    say!("received: {}", two.receive() == Some((b"1".to_vec(), one.at)));
}

/// Many lives, one after another: what one leaves must not reach the next.
fn churn(family: IpAddressFamily) {
    const LIVES: usize = 300;
    say!("-- {LIVES} lives");
    let (mut alive, mut clean) = (0, 0);
    for life in 0..LIVES {
        let peer = Peer::new(family);
        let hops = peer.socket.unicast_hop_limit();
        clean += usize::from(hops.is_ok_and(|it| it != 201));
        peer.socket.set_unicast_hop_limit(201).expect("hop limit");
        let data = numbered(life, 24);
        peer.send_one(&data, Some(peer.at)).expect("send");
        alive += usize::from(peer.receive() == Some((data, peer.at)));
        // Left behind, for the next one not to find.
        peer.send_one(b"stale", Some(peer.at)).expect("send");
    }
    say!("spoke to itself: {alive}, began with a hop limit of its own: {clean}");
}

/// All sockets open at the same time, half of them of each family; a datagram
/// goes from each to the next.
fn ring() {
    say!("-- {SOCKETS} sockets");
    let peers: Vec<_> = (0..SOCKETS).map(|index| Peer::new(FAMILIES[index % 2])).collect();
    let distinct: HashSet<Address> = peers.iter().map(|it| it.at).collect();
    say!("open: {}", distinct.len());
    let next = |index: usize| (index + 2) % SOCKETS;
    for round in 0..3 {
        let sent: usize = (0..SOCKETS)
            .map(|index| {
                let to = Some(peers[next(index)].at);
                peers[index].send_one(&numbered(index, 100), to).expect("send")
            })
            .sum();
        let got = receive_on_all(&peers);
        let right = (0..SOCKETS)
            .filter(|&index| got[next(index)] == Some((numbered(index, 100), peers[index].at)))
            .count();
        say!("round {round}: sent {sent}, received by the next {right}");
    }

    // Every second one goes; the others do not notice.
    let rest: Vec<_> = peers
        .into_iter()
        .enumerate()
        .filter_map(|(index, it)| (index % 4 < 2).then_some(it))
        .collect();
    let sent: usize = rest.iter().map(|it| it.send_one(b"left", Some(it.at)).expect("send")).sum();
    let heard = receive_on_all(&rest)
        .into_iter()
        .zip(&rest)
        .filter(|(got, it)| *got == Some((b"left".to_vec(), it.at)))
        .count();
    say!("left: {}, sent {sent}, received {heard}", rest.len());
}

/// A port that was just closed answers to who is connected to it, at the next
/// send or the next receive.
fn refused(family: IpAddressFamily) {
    let gone = create(family);
    bind(&gone, Address::loopback(family, 0)).expect("bind");
    let gone_at = local_address(&gone);
    drop(gone);
    let peer = Peer::new(family).restream(Some(gone_at));
    // The port may close a bit later than its socket.
    let answer = (0..100).find_map(|_| {
        let sent = peer.send_one(b"anyone?", None);
        let received = sent.and_then(|_| {
            wait(&peer.incoming.subscribe(), QUIET_NS);
            peer.incoming.receive(1)
        });
        received.err()
    });
    say!("a closed port answers: {}", told(answer.map_or(Ok("nothing"), Err)));
}
