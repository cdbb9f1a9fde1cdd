//! The thread that sends what one-way receivers receive.
//!
//! A receiver sends a request of a few bytes, and the reply is a batch of datagrams. So none has more of them
//! under way than its receive buffer holds, however slow it is. The batch is one sendmmsg(2), within
//! which the kernel delivers one datagram after the other: how many a receiver finds waiting depends
//! on how fast it is, as with traffic from elsewhere.

use std::collections::HashMap;
use std::io::{self, IoSlice, PipeReader, PipeWriter, pipe};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use cpu_time::ThreadTime;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg};

use super::{Bench, Work};
use crate::benches::{Operation, REQUEST_BYTES};

/// Receivers for each socket: their requests fit a receive buffer of the usual 208 KiB.
const RECEIVERS_MAX: usize = 64;

/// Longer than one round of all receivers takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// The thread, and the sockets that receivers send their requests to.
pub(super) struct Source {
    addrs: Vec<SocketAddr>,
    running: Option<Running>,
}

struct Running {
    /// Closed, it ends the thread.
    end: PipeWriter,
    thread: JoinHandle<io::Result<Duration>>,
}

impl Source {
    /// Starts one if there is need of it.
    pub(super) fn start(work: &Work) -> io::Result<Self> {
        if work.bench.operation != Operation::Receive {
            return Ok(Self { addrs: Vec::new(), running: None });
        }
        let sockets = (0..work.guests.div_ceil(RECEIVERS_MAX))
            .map(|_| {
                let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
                socket.set_nonblocking(true)?;
                Ok(socket)
            })
            .collect::<io::Result<Vec<_>>>()?;
        let addrs = sockets.iter().map(UdpSocket::local_addr).collect::<io::Result<_>>()?;
        let (ended, end) = pipe()?;
        let bench = work.bench;
        let thread = thread::spawn(move || {
            let cpu = ThreadTime::now();
            let mut requested = HashMap::new();
            let served = serve(&sockets, Reply::of(bench), &ended, &mut requested);
            if served.is_err() {
                // Lest receivers wait for ever, those of later requests too: a datagram too short fails them.
                for (receiver, at) in &requested {
                    let _ = sockets[*at].send_to(&[], receiver);
                }
                let _ = serve(&sockets, Reply::REFUSAL, &ended, &mut requested);
            }
            served.map(|()| cpu.elapsed())
        });
        Ok(Self { addrs, running: Some(Running { end, thread }) })
    }

    /// The address for a receiver's requests; port 0 where the operation has none.
    pub(super) fn addr(&self, receiver: usize) -> SocketAddr {
        let addr = self.addrs.get(receiver / RECEIVERS_MAX);
        addr.copied().unwrap_or_else(|| (Ipv4Addr::LOCALHOST, 0).into())
    }

    /// The CPU time that it has taken.
    pub(super) fn end(mut self) -> io::Result<Duration> {
        let Some(Running { end, thread }) = self.running.take() else {
            return Ok(Duration::ZERO);
        };
        drop(end);
        thread
            .join()
            .map_err(|_| io::Error::other("the thread that sends datagrams has panicked"))?
    }
}

/// What is sent for a request.
#[derive(Clone, Copy)]
struct Reply {
    bytes: usize,
    datagrams: usize,
    /// After this time without a request, once there has been one, a datagram must have been lost.
    patience: Option<Duration>,
}

impl Reply {
    /// Shorter than any datagram that is waited for, so that the receiver fails.
    const REFUSAL: Self = Self { bytes: 0, datagrams: 1, patience: None };

    fn of(bench: &Bench) -> Self {
        Self { bytes: bench.bytes, datagrams: bench.datagrams, patience: Some(PATIENCE) }
    }
}

/// Replies until the pipe is closed; records which receiver has sent requests to which socket.
fn serve(
    sockets: &[UdpSocket],
    reply: Reply,
    ended: &PipeReader,
    requested: &mut HashMap<SocketAddr, usize>,
) -> io::Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    for (at, socket) in sockets.iter().enumerate() {
        epoll.add(socket, EpollEvent::new(EpollFlags::EPOLLIN, at as u64))?;
    }
    epoll.add(ended, EpollEvent::new(EpollFlags::EPOLLIN, u64::MAX))?;
    let mut patience = EpollTimeout::NONE;
    let mut events = [EpollEvent::empty(); 64];
    let mut datagram = vec![0; reply.bytes.max(REQUEST_BYTES)];
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(reply.datagrams, None);
    loop {
        let ready = wait(&epoll, &mut events, patience)?;
        if ready == 0 {
            return Err(io::Error::other("a receiver waits in vain: a datagram was lost"));
        }
        for event in &events[..ready] {
            let at = usize::try_from(event.data()).map_err(io::Error::other)?;
            let Some(socket) = sockets.get(at) else {
                return Ok(());
            };
            loop {
                let receiver = match socket.recv_from(&mut datagram[..REQUEST_BYTES]) {
                    Ok((_, receiver)) => receiver,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                };
                requested.insert(receiver, at);
                let datagrams = vec![[IoSlice::new(&datagram[..reply.bytes])]; reply.datagrams];
                let to = vec![Some(SockaddrStorage::from(receiver)); reply.datagrams];
                let flags = MsgFlags::empty();
                let sent = sendmmsg(socket.as_raw_fd(), &mut headers, &datagrams, &to, [], flags)?;
                if sent.count() != reply.datagrams {
                    return Err(io::Error::other("a part of a reply could not be sent"));
                }
            }
        }
        if let Some(time) = reply.patience {
            patience = EpollTimeout::try_from(time).map_err(io::Error::other)?;
        }
    }
}

/// How many of the events have come; none once patience is at its end.
pub(super) fn wait(
    epoll: &Epoll,
    events: &mut [EpollEvent],
    patience: EpollTimeout,
) -> io::Result<usize> {
    loop {
        match epoll.wait(events, patience) {
            // A debugger, or a stopped job that goes on.
            Err(Errno::EINTR) => {}
            ready => return Ok(ready?),
        }
    }
}
