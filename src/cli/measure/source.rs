//! Who sends what one-way receivers receive: a thread, whose CPU time is not theirs.
//!
//! A receiver asks by a datagram, and has it back as many times over as a batch has datagrams. So
//! none has more of them under way than its receive buffer holds, however slow it is.

use std::io::{self, IoSlice, PipeReader, PipeWriter, pipe};
use std::mem::take;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::exit;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use cpu_time::ThreadTime;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg};

use super::{Operation, Work};
use crate::cli::say;

/// Receivers that ask one socket: what they ask at once fits a receive buffer of the usual 208 KiB.
const ASKERS_MAX: usize = 64;

/// Bytes of the longest datagram.
const BYTES_MAX: usize = 1200;

/// How long nobody asks before something must have gone wrong.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where receivers ask.
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
        let sockets = (0..work.guests.div_ceil(ASKERS_MAX))
            .map(|_| {
                let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
                socket.set_nonblocking(true)?;
                Ok(socket)
            })
            .collect::<io::Result<Vec<_>>>()?;
        let addrs = sockets.iter().map(UdpSocket::local_addr).collect::<io::Result<_>>()?;
        let (ended, end) = pipe()?;
        let copies = work.bench.datagrams;
        let thread = thread::spawn(move || {
            let cpu = ThreadTime::now();
            serve(&sockets, copies, &ended).inspect_err(|error| {
                // Whoever waits for datagrams now would wait for ever.
                say(format_args!("error: the source of datagrams has failed: {error}"));
                exit(1)
            })?;
            Ok(cpu.elapsed())
        });
        Ok(Self { addrs, running: Some(Running { end, thread }) })
    }

    /// Whom a receiver asks; port 0 where nobody does.
    pub(super) fn addr(&self, receiver: usize) -> SocketAddr {
        let addr = self.addrs.get(receiver / ASKERS_MAX);
        addr.copied().unwrap_or_else(|| (Ipv4Addr::LOCALHOST, 0).into())
    }

    /// The CPU time that it has taken.
    pub(super) fn end(mut self) -> io::Result<Duration> {
        let Some(Running { end, thread }) = take(&mut self.running) else {
            return Ok(Duration::ZERO);
        };
        drop(end);
        thread.join().map_err(|_| io::Error::other("the source of datagrams has panicked"))?
    }
}

/// Answers until the pipe is closed.
fn serve(sockets: &[UdpSocket], copies: usize, ended: &PipeReader) -> io::Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    for (at, socket) in sockets.iter().enumerate() {
        epoll.add(socket, EpollEvent::new(EpollFlags::EPOLLIN, at as u64))?;
    }
    epoll.add(ended, EpollEvent::new(EpollFlags::EPOLLIN, u64::MAX))?;
    let patience = EpollTimeout::try_from(PATIENCE).map_err(io::Error::other)?;
    let mut events = [EpollEvent::empty(); 64];
    let mut question = [0; BYTES_MAX];
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(copies, None);
    loop {
        let ready = epoll.wait(&mut events, patience)?;
        if ready == 0 {
            return Err(io::Error::other("nobody has asked for a long time: a datagram is lost"));
        }
        for event in &events[..ready] {
            let at = usize::try_from(event.data()).map_err(io::Error::other)?;
            let Some(socket) = sockets.get(at) else {
                return Ok(());
            };
            loop {
                let (len, asker) = match socket.recv_from(&mut question) {
                    Ok(asked) => asked,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                };
                let answer = vec![[IoSlice::new(&question[..len])]; copies];
                let to = vec![Some(SockaddrStorage::from(asker)); copies];
                let flags = MsgFlags::empty();
                let sent = sendmmsg(socket.as_raw_fd(), &mut headers, &answer, &to, [], flags)?;
                if sent.count() != copies {
                    return Err(io::Error::other("not all of an answer could be sent"));
                }
            }
        }
    }
}
