//! A client with many requests under way, each at a socket of its own: as soon as one is answered the
//! next leaves. It has a thread and a CPU beside the guests'.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use cpu_time::ThreadTime;
use nix::sys::socket::{setsockopt, sockopt};
use serde::{Deserialize, Serialize};

use super::super::Stopwatch;
use super::super::client::REQUEST_BYTES;

/// Requests under way.
pub(crate) const REQUESTS_UNDER_WAY: usize = 256;

/// Room for the answers to all of them, of which each counts some 800 bytes, and for the reports of thousands
/// of guests.
const RECEIVE_BUFFER_BYTES: usize = 2 << 20;

/// How long guests may take to open their sockets.
const START_TIME_MAX: Duration = Duration::from_mins(1);

/// After this time without an answer, those under way are lost.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(1);

pub(super) struct Flows {
    socket: UdpSocket,
    /// The last socket of each guest.
    guests: Vec<SocketAddr>,
    /// All sockets of all guests.
    sockets: Vec<SocketAddr>,
    epoch: Instant,
    /// Of the next request: an answer is known by it.
    number: u64,
}

/// What requests met, and cost.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Traffic {
    pub(crate) requests: usize,
    pub(crate) lost: usize,
    pub(crate) seconds: f64,
    /// Of the process, without this client.
    pub(crate) cpu_seconds: f64,
    /// Of this client, which has the kernel deliver its requests, too.
    pub(crate) client_cpu_seconds: f64,
    pub(crate) p50_seconds: f64,
    pub(crate) p99_seconds: f64,
}

/// Which socket a request goes to.
#[derive(Clone, Copy)]
pub(super) enum Choice {
    InTurn,
    AtRandom,
}

impl Flows {
    pub(super) fn new() -> io::Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        // As far as net.core.rmem_max allows.
        setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER_BYTES)?;
        socket.set_read_timeout(Some(START_TIME_MAX))?;
        Ok(Self {
            socket,
            guests: Vec::new(),
            sockets: Vec::new(),
            epoch: Instant::now(),
            number: 0,
        })
    }

    /// Where guests report.
    pub(super) fn addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Waits until so many guests have opened their sockets.
    pub(super) fn meet(&mut self, guests: usize) -> io::Result<()> {
        while self.guests.len() < guests {
            let (_, from) = self.socket.recv_from(&mut [0; REQUEST_BYTES]).map_err(|error| {
                let met = self.guests.len();
                io::Error::new(error.kind(), format!("{met} of {guests} guests are ready: {error}"))
            })?;
            self.guests.push(from);
        }
        Ok(())
    }

    /// Asks each guest for its sockets' ports; answers how many sockets there are.
    pub(super) fn learn_sockets(&mut self) -> io::Result<usize> {
        let mut ports = [0; 2048];
        for guest in &self.guests {
            self.socket.send_to(&[0; REQUEST_BYTES], guest)?;
            let (len, from) = self.socket.recv_from(&mut ports)?;
            let ports = ports[..len].chunks_exact(2);
            let ports = ports.map(|port| u16::from_le_bytes([port[0], port[1]]));
            self.sockets.extend(ports.map(|port| SocketAddr::from((from.ip(), port))));
        }
        self.socket.set_read_timeout(Some(ANSWER_TIME_MAX))?;
        Ok(self.sockets.len())
    }

    /// So many requests.
    pub(super) fn request(&mut self, requests: usize, choice: Choice) -> io::Result<Traffic> {
        let (stopwatch, client_cpu) = (Stopwatch::start(), ThreadTime::now());
        let mut latencies = Vec::with_capacity(requests);
        let (mut sent, mut under_way, mut lost) = (0, 0, 0);
        let mut first_under_way = self.number;
        let mut bytes = [0; REQUEST_BYTES];
        while sent < requests || under_way > 0 {
            while sent < requests && under_way < REQUESTS_UNDER_WAY {
                self.send(choice)?;
                sent += 1;
                under_way += 1;
            }
            match self.socket.recv_from(&mut bytes) {
                Ok(_) => {
                    let [number, since] = [0, 8].map(|at| {
                        let bytes: [u8; 8] = bytes[at..at + 8].try_into().expect("eight bytes");
                        u64::from_ne_bytes(bytes)
                    });
                    // One that came too late was counted as lost.
                    if number >= first_under_way {
                        latencies.push(self.nanoseconds().saturating_sub(since));
                        under_way -= 1;
                    }
                }
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    lost += under_way;
                    under_way = 0;
                    first_under_way = self.number;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let client_cpu = client_cpu.elapsed();
        let sample = stopwatch.sample();
        latencies.sort_unstable();
        let quantile = |of_hundred: usize| {
            let at = latencies.len().saturating_sub(1) * of_hundred / 100;
            Duration::from_nanos(latencies.get(at).copied().unwrap_or(0)).as_secs_f64()
        };
        Ok(Traffic {
            requests,
            lost,
            seconds: sample.wall.as_secs_f64(),
            cpu_seconds: sample.cpu.saturating_sub(client_cpu).as_secs_f64(),
            client_cpu_seconds: client_cpu.as_secs_f64(),
            p50_seconds: quantile(50),
            p99_seconds: quantile(99),
        })
    }

    fn send(&mut self, choice: Choice) -> io::Result<()> {
        let at = match choice {
            Choice::InTurn => self.number,
            Choice::AtRandom => mixed(self.number),
        };
        #[expect(clippy::cast_possible_truncation, reason = "below the number of sockets")]
        let to = self.sockets[(at % self.sockets.len() as u64) as usize];
        let mut bytes = [0; REQUEST_BYTES];
        for (field, value) in bytes.chunks_exact_mut(8).zip([self.number, self.nanoseconds()]) {
            field.copy_from_slice(&value.to_ne_bytes());
        }
        self.number += 1;
        self.socket.send_to(&bytes, to)?;
        Ok(())
    }

    fn nanoseconds(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// The same numbers in every run, without a pattern (`SplitMix64`).
fn mixed(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
