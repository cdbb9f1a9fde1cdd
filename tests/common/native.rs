//! Plain sockets of the test itself: senders, witnesses, and the kernel's word on what a guest did.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::{Duration, Instant};

use super::BOUND;

/// A plain socket whose `recv` is bounded.
pub fn socket(ip: impl Into<IpAddr>) -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind((ip.into(), 0)).unwrap();
    socket.set_read_timeout(Some(BOUND)).unwrap();
    let addr = socket.local_addr().unwrap();
    (socket, addr)
}

/// Receives. (A completion that this thread is to take may interrupt it.)
pub fn receive_from(socket: &UdpSocket, buffer: &mut [u8]) -> (usize, SocketAddr) {
    loop {
        match socket.recv_from(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            received => return received.unwrap(),
        }
    }
}

pub fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> usize {
    receive_from(socket, buffer).0
}

/// A port to which no socket is bound: pass an `own_ip`, lest another test binds to it.
pub fn closed_port(ip: impl Into<IpAddr>) -> SocketAddr {
    socket(ip).1
}

/// Whether a route leads to an address that is not of this machine. What leaves from a loopback address is
/// refused for that where one does, and as unreachable where none does.
pub fn has_route(to: SocketAddr) -> bool {
    let (socket, _) = socket(Ipv4Addr::UNSPECIFIED);
    // Nothing is sent.
    match socket.connect(to) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::NetworkUnreachable => false,
        Err(error) => panic!("{to}: {error}"),
    }
}

/// Whether a socket is bound to an address.
pub fn is_taken(addr: SocketAddr) -> bool {
    match UdpSocket::bind(addr) {
        Ok(_) => false,
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => true,
        Err(error) => panic!("{addr}: {error}"),
    }
}

/// Whether a socket is bound to just this address, in a network of the test's own: by its table, which is
/// exact where nobody else opens and closes sockets. (A bind to see would get in the way of others, and
/// the test's socket is for a moment also that of a process that another test starts.)
pub fn is_bound(addr: SocketAddr) -> bool {
    // Words of four bytes, in the order that the machine reads them.
    let words = |octets: &[u8]| -> String {
        let words = octets.chunks(4).map(|word| word.iter().rev());
        words.flatten().map(|byte| format!("{byte:02X}")).collect::<Vec<_>>().concat()
    };
    let (table, ip) = match addr.ip() {
        IpAddr::V4(ip) => ("udp", words(&ip.octets())),
        IpAddr::V6(ip) => ("udp6", words(&ip.octets())),
    };
    let table = std::fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap();
    let local = format!("{ip}:{:04X}", addr.port());
    table.lines().any(|line| line.split_whitespace().nth(1) == Some(&*local))
}

/// As `is_bound`; waits until it is not, without a yield to the runtime.
pub fn wait_until_free(addr: SocketAddr) {
    let deadline = Instant::now() + BOUND / 2;
    while is_bound(addr) {
        assert!(Instant::now() < deadline, "{addr} is taken for good");
    }
}

/// Waits until a network device of this thread's network carries packets.
pub fn wait_until_up(device: &str) {
    let deadline = Instant::now() + BOUND / 2;
    loop {
        let shown = Command::new("ip").args(["-o", "link", "show", device]).output().unwrap();
        if String::from_utf8_lossy(&shown.stdout).contains("state UP") {
            return;
        }
        assert!(Instant::now() < deadline, "{device} does not come up");
    }
}

/// Waits until datagrams between these addresses arrive, each way: a new link loses some.
pub fn wait_until_carried(a: impl Into<SocketAddr>, b: impl Into<SocketAddr>) {
    let [a, b] = [a.into(), b.into()].map(|addr: SocketAddr| UdpSocket::bind(addr).unwrap());
    let deadline = Instant::now() + BOUND / 2;
    for (from, to) in [(&a, &b), (&b, &a)] {
        to.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        loop {
            let sent = from.send_to(b"", to.local_addr().unwrap());
            if sent.is_ok() && to.recv_from(&mut []).is_ok() {
                break;
            }
            assert!(Instant::now() < deadline, "the link carries nothing");
        }
    }
}

/// Receives a datagram; it, and the time to live (IPv4) with which it came.
#[expect(unsafe_code, reason = "std has no recvmsg(2)")]
pub fn receive_with_ttl(socket: &UdpSocket) -> (Vec<u8>, i32) {
    #[repr(align(8))]
    struct Control([u8; 64]);
    let on: libc::c_int = 1;
    // SAFETY: the option is an int, and the pointer is to one.
    let result = unsafe {
        let value = (&raw const on).cast();
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_IP, libc::IP_RECVTTL, value, 4)
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    let mut payload = vec![0_u8; 65_536];
    let mut control = Control([0; 64]);
    let mut part = libc::iovec { iov_base: payload.as_mut_ptr().cast(), iov_len: payload.len() };
    // SAFETY: all fields of a msghdr may be zero.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = control.0.len() as _;
    // SAFETY: the header's pointers are to locals of the sizes it gives.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, 0) };
    let len = usize::try_from(received).expect("a datagram within the read timeout");
    payload.truncate(len);
    // struct cmsghdr: a length, level and type, then the int.
    let int = |at: usize| i32::from_ne_bytes(control.0[at..at + 4].try_into().unwrap());
    assert_eq!((int(8), int(12)), (libc::IPPROTO_IP, libc::IP_TTL), "the only control message");
    (payload, int(16))
}
