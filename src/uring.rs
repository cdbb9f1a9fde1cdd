//! What a host holds: the handle of its rings, and how they are configured.

use std::sync::Arc;

use crate::error::SetupError;
use crate::limits::{BUFFERS, QUEUE_BYTES_DEFAULT, QUEUE_DATAGRAMS_DEFAULT, SOCKETS_DEFAULT};
#[cfg(feature = "bare")]
use crate::limits::{BUFFERS_MAX, BUFFERS_MIN};
use crate::pool::{Plan, Pool};
use crate::ring::receive_queue::QueueLimits;
use crate::ring::recycle::pool::Recycle;
use crate::stats::Stats;

/// Rings and their fixed-file tables: the one handle that all guests' sockets of a process are made through.
///
/// Cheap to clone, and usable from any thread under any tokio runtime with I/O enabled
/// (`enable_io`), several at once included. The rings go away with its last handle, and sockets
/// hold handles of their own.
///
/// Threads that share a ring wait for each other, so there are several: a socket takes the ring of the
/// thread that creates it, and stays there when its guest moves. Each worker of a multi-thread runtime has one, by its
/// number; other threads (of current-thread runtimes, those that `block_on`) take them in turn. Each is
/// built when it is first needed, in about a millisecond.
///
/// All threads must be in one network namespace (and one cgroup, and under one security label): a
/// socket is made in those of the thread that enters the kernel for it, and recycled with them.
#[derive(Clone, Debug)]
pub struct Uring {
    pool: Arc<Pool>,
}

impl Uring {
    /// Starts configuring.
    pub fn builder() -> UringBuilder {
        UringBuilder(Plan {
            sockets: SOCKETS_DEFAULT,
            rings: None,
            are_built_at_once: false,
            buffers: BUFFERS,
            queue: QueueLimits { datagrams: QUEUE_DATAGRAMS_DEFAULT, bytes: QUEUE_BYTES_DEFAULT },
            recycle: Recycle::default(),
        })
    }

    /// Closes the sockets that are cached for new owners now. Those that guests close from now on
    /// are cached as before.
    ///
    /// When it returns they are closed, unless another thread is inside the kernel for their ring:
    /// then that thread closes them, and a task of a runtime whose guests use the ring those that it
    /// leaves.
    pub fn close_cached(&self) {
        self.pool.close_cached();
    }

    /// Closes the rings: the sockets of all guests, and with them their ports, for a host that is about
    /// to end. When this returns the ports are free, unless a thread that is blocked in the kernel holds
    /// one up for longer than a second, which is logged. Blocks the thread for as long, most often some
    /// milliseconds.
    ///
    /// Calls of guests that still run trap from now on, those that wait included; the error is a
    /// [`RingGone`](crate::RingGone). Every handle names the same rings.
    ///
    /// A process that ends without this, or without dropping its last handle and socket, leaves that to
    /// the kernel, which clears a ring's table in the background: 20 to 470 ms after the end of the process
    /// its ports are still taken, and datagrams for them are lost. So it is after `SIGKILL`. A host
    /// that is ended by a signal calls this before it ends.
    pub fn close(&self) {
        self.pool.shut_down();
    }

    /// The counters of all rings so far, completions that no thread has reaped yet included.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.pool.stats()
    }

    /// What the sockets of a guest go through.
    pub(crate) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }
}

/// Configures a [`Uring`].
#[derive(Clone, Debug)]
#[must_use]
pub struct UringBuilder(Plan);

impl UringBuilder {
    /// Sockets that may be open at once over all guests and rings: 1 to
    /// [`SOCKETS_MAX`](crate::limits::SOCKETS_MAX), by default [`SOCKETS_DEFAULT`]. With a number
    /// out of that range, [`build`](Self::build) fails.
    ///
    /// A closed socket keeps its place until the kernel has let go of it, which takes a moment when
    /// the receive was armed by another thread; leave some capacity for those.
    ///
    /// They do not count against the soft `RLIMIT_NOFILE`, but the kernel registers no table that is larger, one
    /// for each ring. What does not fit a ring's table goes to the others, and to more rings if it must:
    /// 100,000 sockets under a limit of 20,000 take nine.
    pub fn sockets(mut self, sockets: u32) -> Self {
        self.0.sockets = sockets;
        self
    }

    /// Rings that threads have: 1 to 1024 (other numbers count as the nearest), by default as many as processors.
    ///
    /// As many as there are worker threads are best, if fewer than processors. A thread's is built when it first
    /// has a guest that creates a socket, unless [`build_all`](Self::build_all) is called.
    pub fn rings(mut self, rings: usize) -> Self {
        self.0.rings = Some(rings);
        self
    }

    /// Has [`build`](Self::build) build the rings of all threads at once: for a host that gives up
    /// `io_uring_setup` afterwards (by a seccomp filter, or `kernel.io_uring_disabled`), or that would rather not have a
    /// guest's first socket take a millisecond.
    ///
    /// Without it threads whose ring cannot be built share those that are there, which is logged, and try again
    /// a second later.
    pub fn build_all(mut self) -> Self {
        self.0.are_built_at_once = true;
        self
    }

    /// Datagrams that may wait in one socket's queue before its receive is paused and the kernel's
    /// own buffer (`SO_RCVBUF`) takes over: 1 to `usize::MAX` (0 counts as 1), by default
    /// [`QUEUE_DATAGRAMS_DEFAULT`].
    ///
    /// What the kernel delivers before it ends the receive of a full queue is still queued, up to
    /// [`QUEUE_SLACK_BYTES`](crate::limits::QUEUE_SLACK_BYTES) beyond
    /// [`queue_bytes`](Self::queue_bytes) and one message (up to 64 datagrams and 65,507 bytes). The rest
    /// is dropped, and counted by [`Stats::dropped_by_queue`].
    pub fn queue_datagrams(mut self, datagrams: usize) -> Self {
        self.0.queue.datagrams = datagrams.max(1);
        self
    }

    /// Bytes that may wait in one socket's queue before its receive is paused, as with
    /// [`queue_datagrams`](Self::queue_datagrams): 1 to `usize::MAX` (0 counts as 1), by default
    /// [`QUEUE_BYTES_DEFAULT`]. A datagram counts its payload and
    /// [`QUEUED_DATAGRAM_BYTES`](crate::limits::QUEUED_DATAGRAM_BYTES). Whichever limit is reached first
    /// pauses it; those of a guest's sockets together are bounded too
    /// ([`UdpCtxBuilder::queue_bytes_max`](crate::UdpCtxBuilder::queue_bytes_max)).
    pub fn queue_bytes(mut self, bytes: usize) -> Self {
        self.0.queue.bytes = bytes.max(1);
        self
    }

    /// How closed sockets are cached for new owners, which is cheaper than to make and free them:
    /// by default [`Recycle::default`], and not at all with [`Recycle::OFF`].
    ///
    /// A socket is cached if its guest has only bound it to port 0, connected it, sent and received;
    /// the next owner of its family cannot distinguish it from a new one. The first `build` of a
    /// process tests on the running kernel what that rests on (some 20 ms). Where something of the
    /// former owner is left in a family's sockets, or in connected ones, those are not cached, and
    /// the log and [`doctor`](crate::doctor) say why. [`Stats::closed_instead`] counts the sockets
    /// that were not cached. The limits are each ring's. A ring that caches some has a thread that waits for the kernel.
    ///
    /// Nothing is cached where new sockets are given something that a recycled one would not have: a device,
    /// a mark or a priority, by a BPF program of the cgroup (`sock_create`, as `ip vrf exec` has one). Nor on
    /// a `PREEMPT_RT` kernel, in which threads can interrupt the delivery of a packet.
    ///
    /// Turn it off on a host
    ///
    /// - that holds received packets back behind the kernel's socket look-up (netfilter's NFQUEUE in the
    ///   INPUT hook): one that is let go after the quarantine could still reach the socket of a connected
    ///   predecessor;
    /// - whose BPF programs keep state for each socket (`sk_storage`, or by a socket's cookie), or count on
    ///   `sock_create` and `sock_release` for each owner: all owners of a socket are one to them;
    /// - that attaches a `sock_create` program to its cgroup, or moves to another cgroup, after the first
    ///   `build`: the test is not made again.
    pub fn recycle(mut self, recycle: Recycle) -> Self {
        self.0.recycle = recycle;
        self
    }

    /// Receive buffers of each ring: 16 to 1024, a power of two (other numbers count as the next larger), by default
    /// 128. For the benches, which show what it changes, and no API to build on.
    #[cfg(feature = "bare")]
    #[doc(hidden)]
    pub fn buffers(mut self, buffers: u16) -> Self {
        self.0.buffers = buffers.clamp(BUFFERS_MIN, BUFFERS_MAX).next_power_of_two();
        self
    }

    /// Builds the first ring and checks that this kernel does everything sockets need.
    ///
    /// The rings are this process's alone. In a fork of it the calls of their guests trap
    /// ([`RingGone::Forked`](crate::RingGone)), counters are 0, and what is dropped there leaves the
    /// parent unharmed; but until a fork drops its handles, or ends, it keeps the rings and their
    /// ports alive. So a host that becomes a daemon builds afterwards.
    ///
    /// # Errors
    ///
    /// A [`SetupError`] that names what is missing and what to change.
    pub fn build(self) -> Result<Uring, SetupError> {
        Ok(Uring { pool: Pool::build(self.0)? })
    }
}
