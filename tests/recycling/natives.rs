//! The natives that the churning guests (`guests/churn.wat`) deal with, on threads of their own,
//! in a network where all of 127.0.0.0/8 and `fd00::/64` is local.

use std::collections::VecDeque;
use std::fmt::Write;
use std::io::IoSliceMut;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt,
};

use crate::common::network::{run, run_with};

const CHASER: u16 = 1;
const ANSWERER: u16 = 53;

/// Hosts of the natives' addresses.
const FIRST: u8 = 1;
const SECOND: u8 = 2;
const SLOW: u8 = 3;

/// The number of the first cycle. A cycle's address is made of its number; the natives' lie below.
pub(crate) const FIRST_CYCLE: u32 = 0x1_0000;

const TAG_HELLO: u32 = 1;
const TAG_QUESTION: u32 = 2;
const TAG_ANSWER: u32 = 3;
const TAG_BLAST: u32 = 4;

/// How many of the newest cycles the chaser sends to, and how often to each at most. That is less
/// than the receive buffer of a socket holds, so an owner that happens to have the port of its
/// predecessor loses nothing; and less than is drained from a socket (`DRAINS_MAX`).
const CHASED: usize = 8;
const TURNS: u32 = 16;

/// Policies (xfrm) that the kernel compares with each packet from the slow address, none of which
/// matches. It does so between looking the socket up and queueing the packet there, and needs some
/// 200 µs for so many: time enough for the socket to be recycled and bound by another guest.
const POLICIES: u16 = 6000;

/// Bytes of all that natives send.
const BYTES: usize = 32;

/// Makes every address of a cycle local, and the third address of the natives a slow one.
pub(crate) fn settle() {
    for line in [
        "sysctl -q -w net.ipv6.ip_nonlocal_bind=1",
        "sysctl -q -w net.ipv4.conf.lo.disable_policy=0",
        "sysctl -q -w net.ipv6.conf.lo.disable_policy=0",
        "ip -6 addr add fd00::1/128 dev lo",
        "ip -6 addr add fd00::2/128 dev lo",
        "ip -6 route add local fd00::/64 dev lo",
    ] {
        run(line);
    }
    let mut policies = String::new();
    for (from, to) in [(native(false, SLOW), "0.0.0.0/0"), (native(true, SLOW), "::/0")] {
        for port in 1..=POLICIES {
            let of = format!("src {from} dst {to} proto udp sport {port} dport 1");
            writeln!(policies, "xfrm policy add {of} dir in action allow").unwrap();
        }
    }
    run_with("ip -batch -", &policies);
}

/// A datagram of a cycle, or to one: words, as the guest lays them out.
struct Words([u32; 8]);

impl Words {
    fn of(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; BYTES] = bytes.try_into().ok()?;
        let mut words = [0; 8];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
            *word = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        }
        Some(Self(words))
    }

    /// To a cycle at an address.
    fn to(tag: u32, cycle: u32, at: SocketAddr) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        for (at, word) in [tag, cycle, at.port().into()].into_iter().enumerate() {
            bytes[4 * at..4 * at + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// What a cycle has sent, and from where.
struct Said {
    tag: u32,
    cycle: u32,
    wanted: u32,
    at_second: bool,
    from: SocketAddr,
}

/// A native's socket.
struct Ear {
    socket: UdpSocket,
    control: Vec<u8>,
}

impl Ear {
    fn new(ip: IpAddr, port: u16) -> Self {
        let socket = UdpSocket::bind((ip, port)).unwrap();
        // Every hello is counted, so none may be lost.
        setsockopt(&socket, sockopt::RcvBufForce, &(64 << 20)).unwrap();
        if ip.is_ipv4() {
            setsockopt(&socket, sockopt::Ipv4RecvTtl, &true).unwrap();
        } else {
            setsockopt(&socket, sockopt::Ipv6RecvHopLimit, &true).unwrap();
        }
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        Self { socket, control: nix::cmsg_space!(libc::c_int) }
    }

    /// The next datagram of a cycle, if one comes: within the read timeout, or without waiting.
    fn hear(&mut self, flags: MsgFlags) -> Result<Option<Said>, String> {
        let mut bytes = [0; BYTES + 1];
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let fd = self.socket.as_raw_fd();
        let (len, from, hops) = match recvmsg(fd, &mut parts, Some(&mut self.control), flags) {
            Ok(message) => {
                let from: SockaddrStorage = message.address.expect("UDP names the sender");
                let hops = message.cmsgs().unwrap().find_map(|message| {
                    let (ControlMessageOwned::Ipv4Ttl(hops)
                    | ControlMessageOwned::Ipv6HopLimit(hops)) = message
                    else {
                        return None;
                    };
                    Some(hops)
                });
                let from = from
                    .as_sockaddr_in()
                    .map(|from| SocketAddr::from((from.ip(), from.port())))
                    .or_else(|| from.as_sockaddr_in6().map(|from| (from.ip(), from.port()).into()));
                (message.bytes, from.unwrap(), hops.expect("asked for"))
            }
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
            Err(errno) => panic!("{errno}"),
        };
        let Some(Words([tag, cycle, kind, hops_set, v6, to_all, wanted, at_second])) =
            Words::of(&bytes[..len])
        else {
            return Err(format!("{len} bytes from {from}"));
        };
        let expected = match (v6, to_all) {
            (0, 0) => IpAddr::from(Ipv4Addr::from_bits(0x7f00_0000 + cycle)),
            (0, _) => Ipv4Addr::LOCALHOST.into(),
            (_, 0) => Ipv6Addr::from_bits((0xfd00 << 112) + u128::from(cycle)).into(),
            (_, _) => native(true, FIRST),
        };
        let cycle_is = format!("cycle {cycle} of kind {kind}");
        if from.ip() != expected {
            return Err(format!("{cycle_is} sends from {from}, and is at {expected}"));
        }
        if hops.cast_unsigned() != hops_set {
            return Err(format!("{cycle_is} sends {hops} hops far, and has set {hops_set}"));
        }
        Ok(Some(Said { tag, cycle, wanted, at_second: at_second != 0, from }))
    }
}

fn native(v6: bool, host: u8) -> IpAddr {
    if v6 {
        Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, host.into()).into()
    } else {
        Ipv4Addr::new(127, 0, 0, host).into()
    }
}

/// A cycle that is being chased.
struct Chased {
    at: SocketAddr,
    blast: [u8; BYTES],
    turns: u32,
}

/// Learns the addresses of cycles and sends to them as fast as it can, during a cycle and after it.
/// Returns how many hellos it has heard.
fn chase(common: &Common) -> u64 {
    let mut ears = [false, true].map(|v6| Ear::new(native(v6, FIRST), CHASER));
    let slow = [false, true].map(|v6| UdpSocket::bind((native(v6, SLOW), CHASER)).unwrap());
    let mut chased = VecDeque::<Chased>::new();
    let mut hellos = 0;
    loop {
        let is_ending = common.stop.load(Ordering::Relaxed);
        let before = hellos;
        for ear in &mut ears {
            for _ in 0..64 {
                let said = common.check(ear.hear(MsgFlags::MSG_DONTWAIT));
                let Some(Said { tag, cycle, from: at, .. }) = said else { break };
                assert_eq!(tag, TAG_HELLO);
                hellos += 1;
                let blast = Words::to(TAG_BLAST, cycle, at);
                chased.push_front(Chased { at, blast, turns: TURNS });
            }
        }
        if is_ending && hellos == before {
            return hellos;
        }
        // Refused, or the send buffer full: the chaser goes on.
        for Chased { at, blast, turns } in &mut chased {
            *turns -= 1;
            let _ = ears[usize::from(at.is_ipv6())].socket.send_to(blast, *at);
        }
        chased.truncate(CHASED);
        if let Some(Chased { at, blast, .. }) = chased.front() {
            let _ = slow[usize::from(at.is_ipv6())].send_to(blast, at);
        }
        chased.retain(|chased| chased.turns > 0);
    }
}

/// Answers questions. Returns how many answers it has sent.
fn answer(v6: bool, common: &Common) -> u64 {
    let mut first = Ear::new(native(v6, FIRST), ANSWERER);
    let second = Ear::new(native(v6, SECOND), ANSWERER);
    let mut answers = 0;
    while !common.stop.load(Ordering::Relaxed) {
        let Some(said) = common.check(first.hear(MsgFlags::empty())) else { continue };
        assert_eq!(said.tag, TAG_QUESTION);
        let mut to = said.from;
        if said.at_second {
            to.set_ip(native(v6, SECOND));
        }
        let datagram = Words::to(TAG_ANSWER, said.cycle, to);
        for n in 0..said.wanted {
            // The second of two comes from another address.
            let ear = if said.wanted == 2 && n == 1 { &second } else { &first };
            ear.socket.send_to(&datagram, to).unwrap();
            answers += 1;
        }
    }
    answers
}

/// What natives share.
#[derive(Default)]
struct Common {
    stop: AtomicBool,
    wrong: OnceLock<String>,
}

impl Common {
    fn check(&self, said: Result<Option<Said>, String>) -> Option<Said> {
        said.unwrap_or_else(|wrong| {
            let _ = self.wrong.set(wrong);
            None
        })
    }
}

/// All natives, at work until `stop`.
pub(crate) struct Natives {
    common: Arc<Common>,
    chaser: JoinHandle<u64>,
    answerers: [JoinHandle<u64>; 2],
}

/// What they have counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Heard {
    pub hellos: u64,
    pub answers: u64,
}

impl Natives {
    pub(crate) fn start() -> Self {
        let common = Arc::<Common>::default();
        let chaser = std::thread::spawn({
            let common = Arc::clone(&common);
            move || chase(&common)
        });
        let answerers = [false, true].map(|v6| {
            let common = Arc::clone(&common);
            std::thread::spawn(move || answer(v6, &common))
        });
        Self { common, chaser, answerers }
    }

    /// Stops them; what they have counted, or what one of them has found to be wrong.
    pub(crate) fn stop(self) -> Result<Heard, String> {
        self.common.stop.store(true, Ordering::Relaxed);
        let hellos = self.chaser.join().unwrap();
        let answers = self.answerers.map(|thread| thread.join().unwrap()).iter().sum();
        self.common.wrong.get().cloned().map_or(Ok(Heard { hellos, answers }), Err)
    }
}
