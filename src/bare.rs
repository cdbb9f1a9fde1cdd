//! A ring without WASI, driven by one thread: the floor of the benches, and no API to build on.
//!
//! It has no sockets for guests, no policy and no tasks. The caller queues operations, enters the
//! kernel, and takes their results; what WebAssembly, tokio and the library's upper layers cost is
//! the difference to a guest that does the same.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::task::Waker;

use crate::datagram::{Family, Outgoing, RawAddr};
use crate::error::Errno;
use crate::limits::BUFFERS;
use crate::ring::account::Account;
use crate::ring::op::{BindOp, Op, Output, SocketOption};
use crate::ring::queues::{Enter, OpKey, SlotIndex};
use crate::ring::receive_queue::{QueueLimits, ReceiveQueue};
use crate::ring::recycle::pool::Recycle;
use crate::ring::send::SendOp;
use crate::ring::share::Share;
use crate::ring::{Ring, setup};

/// A ring whose only thread is the caller's.
pub struct Bare {
    ring: Ring,
    kernel: Enter,
    /// All of them: there is no other ring.
    share: Arc<Share>,
    /// That of the one owner of all sockets.
    account: Arc<Account>,
}

/// A socket in the ring's table.
#[derive(Clone, Copy)]
pub struct Socket(SlotIndex);

/// An operation that was queued; [`Bare::finish`] has its result after [`Bare::enter`].
#[must_use = "an operation's result stays in the ring until it is finished"]
pub struct Queued(OpKey);

/// What arrives at a socket.
pub struct Incoming(Arc<ReceiveQueue>);

impl Incoming {
    /// The next datagram that was reaped, and its sender.
    ///
    /// # Errors
    ///
    /// That of the socket's receive.
    pub fn take(&self) -> io::Result<Option<(Vec<u8>, SocketAddr)>> {
        match self.0.take_first().arrivals {
            Some(Ok(datagram)) => Ok(Some((datagram.payload, datagram.from))),
            Some(Err(Errno(errno))) => Err(io::Error::from_raw_os_error(errno)),
            None => Ok(None),
        }
    }

    /// Has the next datagram hand this waker to [`Bare::take_wakers`].
    pub fn wake_on_arrival(&self, waker: &Waker) {
        drop(self.0.register(waker.clone()));
    }
}

impl Bare {
    /// A ring with a table of so many sockets.
    ///
    /// # Errors
    ///
    /// A [`SetupError`](crate::SetupError), as an [`io::Error`].
    pub fn new(sockets: u32, recycle: Recycle) -> io::Result<Self> {
        let setup::Built { mut ring, share, known, .. } =
            setup::build(sockets, BUFFERS, recycle).map_err(io::Error::other)?;
        share.gain(&Share::new(known.slots), |all| all);
        // The only thread sleeps in io_uring_enter, so the kernel need not notify an eventfd.
        ring.disable_notifications();
        Ok(Self { kernel: ring.kernel(), ring, share, account: Account::of_sockets(sockets) })
    }

    /// `io_uring_enter` calls so far.
    #[must_use]
    pub fn enters(&self) -> u64 {
        self.ring.stats.enters
    }

    /// Submits everything queued, and reaps the completions.
    ///
    /// # Errors
    ///
    /// Those of `io_uring_enter(2)`.
    pub fn enter(&mut self) -> io::Result<()> {
        loop {
            let entries = self.ring.flush();
            if entries == 0 {
                return Ok(());
            }
            self.enter_with(entries, None)?;
        }
    }

    /// Enters once, even with nothing queued, and waits for so many completions at least.
    ///
    /// # Errors
    ///
    /// Those of `io_uring_enter(2)`.
    pub fn enter_for(&mut self, completions: u32) -> io::Result<()> {
        let entries = self.ring.flush();
        self.enter_with(entries, Some(completions))
    }

    fn enter_with(&mut self, entries: u32, completions: Option<u32>) -> io::Result<()> {
        let taken = match self.kernel.enter(entries, completions) {
            // A debugger, or a stopped job that goes on.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            taken => taken?,
        };
        self.ring.stats.enters += 1;
        self.ring.end_submission(taken);
        self.ring.reap();
        Ok(())
    }

    /// The wakers of sockets that datagrams have been reaped for; waking is the caller's.
    pub fn take_wakers(&mut self, into: &mut Vec<Waker>) {
        into.extend(self.ring.take_wakers());
    }

    fn output(&mut self, Queued(key): Queued) -> io::Result<Output> {
        match self.ring.take_result(key) {
            Some(result) => result.map_err(|Errno(errno)| io::Error::from_raw_os_error(errno)),
            None => Err(io::Error::other("an operation was not done at once")),
        }
    }

    /// Takes an operation's result.
    ///
    /// # Errors
    ///
    /// The operation's, or that it has not completed.
    pub fn finish(&mut self, queued: Queued) -> io::Result<()> {
        self.output(queued).map(drop)
    }

    fn submit(&mut self, Socket(slot): Socket, op: Op) -> Queued {
        Queued(self.ring.submit(slot, op))
    }

    /// Queues the creation of a socket and its bind.
    ///
    /// # Errors
    ///
    /// If the table is full.
    pub fn bind(&mut self, addr: SocketAddr) -> io::Result<(Socket, Queued)> {
        if self.account.sockets.take_exclusive().is_err() || !self.share.take() {
            return Err(io::Error::other("the table is full"));
        }
        let (family, options) = match addr {
            SocketAddr::V4(_) => (Family::V4, Vec::new()),
            SocketAddr::V6(_) => (Family::V6, vec![SocketOption::V6ONLY]),
        };
        let op = Box::new(BindOp::new(family, options, addr));
        let (slot, key) = self.ring.submit_bind(None, op);
        Ok((Socket(slot), Queued(key)))
    }

    /// Queues a receive that goes on until the socket is closed.
    #[must_use]
    pub fn receive(&mut self, Socket(slot): Socket) -> Incoming {
        let unlimited = QueueLimits { datagrams: usize::MAX, bytes: usize::MAX };
        let queue = Arc::new(ReceiveQueue::new(unlimited, Arc::clone(&self.account)));
        self.ring.arm(slot, &queue);
        Incoming(queue)
    }

    /// Where a socket is bound; enters for it, as a guest's `local-address` does.
    ///
    /// # Errors
    ///
    /// Those of the descriptor's installation and of getsockname(2).
    pub fn local_addr(&mut self, socket: Socket) -> io::Result<SocketAddr> {
        let queued = self.submit(socket, Op::Install);
        self.enter()?;
        let Output::Descriptor(descriptor) = self.output(queued)? else {
            return Err(io::Error::other("no descriptor"));
        };
        UdpSocket::from(descriptor).local_addr()
    }

    /// Queues a connect.
    pub fn connect(&mut self, socket: Socket, to: SocketAddr) -> Queued {
        self.submit(socket, Op::Connect(Box::new(RawAddr::from(to))))
    }

    /// Queues datagrams to one address, or to the connected peer.
    pub fn send(
        &mut self,
        socket: Socket,
        payloads: impl IntoIterator<Item = Vec<u8>>,
        to: Option<SocketAddr>,
    ) -> Queued {
        let outgoing = |payload| Outgoing { payload, to: to.map(RawAddr::from) };
        let datagrams = payloads.into_iter().map(outgoing).collect();
        self.submit(socket, Op::Send(SendOp::new(datagrams)))
    }

    /// Queues a close, or recycles the socket.
    pub fn close(&mut self, Socket(slot): Socket) {
        self.ring.close(slot, &self.account, 0);
    }
}
