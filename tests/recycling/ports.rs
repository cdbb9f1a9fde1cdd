//! The ports of successive owners.
//!
//! The kernel draws each from its range as if the ones before had not been. So do these tests
//! expect it of native sockets, of new ones and of recycled ones alike, each within bounds that
//! such draws leave less often than once in 10^9 runs: seven standard deviations, where what is
//! counted is as good as normally distributed.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Instant;

use wasi_uring::{Recycle, Uring};

use crate::common::network::in_a_network;
use crate::common::{BOUND, Rig, block_on};

/// Ports drawn from each kind of socket.
const DRAWS: usize = 6000;
#[expect(clippy::cast_precision_loss, reason = "thousands")]
const DRAWN: f64 = DRAWS as f64;

const DEVIATIONS: f64 = 7.0;

/// `ip_local_port_range`.
fn range() -> (u16, u16) {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap();
    let mut ports = text.split_whitespace().map(|port| port.parse().unwrap());
    (ports.next().unwrap(), ports.next().unwrap())
}

/// Ports of successive sockets. Each is closed when the next is open, so that the kernel always has
/// more than one that it could draw again.
fn native(any: SocketAddr) -> Vec<u16> {
    let mut last = None;
    let draw = |_| {
        let socket = UdpSocket::bind(any).unwrap();
        let port = socket.local_addr().unwrap().port();
        last = Some(socket);
        port
    };
    (0..DRAWS).map(draw).collect()
}

/// The same from two guests in alternation; of recycled sockets only, unless none are. In IPv4 every
/// other socket is connected before it is closed, which does not taint it.
fn guests(any: SocketAddr, recycle: Recycle) -> Vec<u16> {
    block_on(async {
        let uring = Uring::builder().sockets(64).recycle(recycle).build().unwrap();
        let mut rigs = [Rig::on_ring(&uring).await, Rig::on_ring(&uring).await];
        let peer = (Ipv4Addr::LOCALHOST, 9).into();
        let mut last = [None, None];
        let mut ports = Vec::new();
        let deadline = Instant::now() + 2 * BOUND;
        for draw in 0.. {
            if ports.len() == DRAWS {
                break;
            }
            assert!(Instant::now() < deadline, "{} of {draw} sockets were recycled", ports.len());
            let rig = &mut rigs[draw % 2];
            let before = uring.stats().sockets_recycled;
            let (socket, local) = rig.bound(any).await;
            let is_recycled = uring.stats().sockets_recycled > before;
            if is_recycled == (recycle != Recycle::OFF) {
                ports.push(local.port());
            }
            if any.is_ipv4() && draw % 4 < 2 {
                let streams = rig.stream(socket, Some(peer)).await.unwrap();
                rig.drop_streams(streams).await;
            }
            if let Some(last) = last[draw % 2].replace(socket) {
                rig.drop_socket(last).await;
            }
        }
        ports
    })
}

/// Fails unless all are alike in what would help to guess the next.
fn assert_unpredictable(ports: &[u16], whose: &str) {
    let (low, high) = range();
    assert!(ports.iter().all(|port| (low..=high).contains(port)), "{whose}");
    let choices = f64::from(high - low) + 1.0;

    // Spread: each of sixteen parts of the range has its share.
    let mut shares = [0.0; 16];
    for port in ports {
        shares[usize::from(port - low) * 16 / (usize::from(high - low) + 1)] += 1.0;
    }
    let (expected, probability) = (DRAWN / 16.0, 1.0 / 16.0);
    let deviation = (expected * (1.0 - probability)).sqrt();
    for share in shares {
        assert!((share - expected).abs() < DEVIATIONS * deviation, "{whose}: {shares:?}");
    }

    // Order: a port says nothing about those after it. The correlation of what is independent is
    // normally distributed, its deviation the root of the number of pairs.
    let mean = f64::from(low) + (choices - 1.0) / 2.0;
    let variance = (choices * choices - 1.0) / 12.0;
    for lag in 1..=8 {
        let pairs = ports.iter().zip(&ports[lag..]);
        let products = pairs.map(|(a, b)| (f64::from(*a) - mean) * (f64::from(*b) - mean));
        let correlation = products.sum::<f64>() / variance / DRAWN;
        assert!(correlation.abs() < DEVIATIONS / DRAWN.sqrt(), "{whose}: {correlation} at {lag}");
    }

    // Repeats: of any earlier port, as many as there are between independent draws.
    let mut sorted = ports.to_vec();
    sorted.sort_unstable();
    let pairs_of = |same: &[u16]| same.len() * (same.len() - 1) / 2;
    let repeats: usize = sorted.chunk_by(|a, b| a == b).map(pairs_of).sum();
    let repeats = u32::try_from(repeats).map(f64::from).unwrap();
    let expected = DRAWN * (DRAWN - 1.0) / 2.0 / choices;
    let deviation = expected.sqrt();
    assert!((repeats - expected).abs() < DEVIATIONS * deviation, "{whose}: {repeats} repeats");
}

/// Kills: a recycled socket that keeps its port, or is bound to the former one.
#[test]
fn ports_of_successive_owners_are_as_unpredictable_as_the_kernels_own() {
    in_a_network(65_536, || {
        for any in [
            SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
            (Ipv4Addr::LOCALHOST, 0).into(),
            (Ipv6Addr::UNSPECIFIED, 0).into(),
        ] {
            assert_unpredictable(&native(any), &format!("native, {any}"));
            assert_unpredictable(&guests(any, Recycle::OFF), &format!("new, {any}"));
            let ports = guests(any, Recycle::default());
            assert_unpredictable(&ports, &format!("recycled, {any}"));
        }
    });
}
