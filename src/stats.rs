//! Counters: of rings, what went through them since they were built; and of one guest.

use std::borrow::Cow;

/// A snapshot of the counters of a host's rings together, by [`Uring::stats`](crate::Uring::stats).
///
/// All are totals, except `rings`, `sockets_open` and `sockets_cached`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Rings that have been built.
    pub rings: u64,
    /// `io_uring_enter` calls.
    pub enters: u64,
    /// Those of them that the ring's own thread made, for what guests had left for a millisecond, closes and
    /// deferred datagrams: they computed on, or their runtime did not run.
    pub enters_overdue: u64,
    /// How often threads were interrupted because one of them computed while guests of others waited for
    /// datagrams that it may have held up. Of a multi-thread runtime's threads, or where runtimes share rings.
    pub interrupts: u64,
    /// Submission queue entries the kernel consumed.
    pub submissions: u64,
    /// Completion queue entries seen.
    pub completions: u64,
    /// Slots handed out: one for every `create-udp-socket` that succeeded.
    pub sockets_created: u64,
    /// Slots in use now, those of sockets still closing included. (Up to 64 too many for a moment, while a
    /// ring that has none left gets some from another.)
    pub sockets_open: u64,
    /// Sockets that were another guest's (or the same one's) before:
    /// [`UringBuilder::recycle`](crate::UringBuilder::recycle).
    pub sockets_recycled: u64,
    /// Closed sockets cached for new owners now, in any stage.
    pub sockets_cached: u64,
    /// Sockets that were closed for good although the ring recycles, by reason.
    pub closed_instead: ClosedInstead,
    /// Datagrams the kernel took from guests.
    pub datagrams_sent: u64,
    /// Those of them that were coalesced with others of their size in one message (`UDP_SEGMENT`).
    pub datagrams_coalesced: u64,
    /// Datagrams whose `send` was answered before they were submitted, because their guest had sent to the same
    /// peer before and went on: they leave together.
    pub datagrams_deferred: u64,
    /// Messages of several datagrams that the kernel refused and took apart: the datagrams were
    /// larger than the path's MTU, or the device computes no checksums.
    pub gso_refusals: u64,
    /// Payload bytes the kernel took from guests.
    pub bytes_sent: u64,
    /// Datagrams moved from the buffer ring to a socket's queue.
    pub datagrams_received: u64,
    /// Those of them that the kernel handed over with others in one message (`UDP_GRO`), which was
    /// split again.
    pub datagrams_split: u64,
    /// Payload bytes moved from the buffer ring to a socket's queue.
    pub bytes_received: u64,
    /// Multishot receives armed again after a completion without `IORING_CQE_F_MORE`.
    pub rearms: u64,
    /// Receives paused because the socket's queue was full; the kernel's buffer holds the rest.
    pub pauses: u64,
    /// Datagrams withheld because the policy refused their sender, or panicked.
    pub dropped_by_policy: u64,
    /// Datagrams withheld because a connected socket's peer did not send them.
    pub dropped_not_from_peer: u64,
    /// Datagrams still queued when their socket was closed.
    pub dropped_at_close: u64,
    /// Datagrams (or several in one message) that the kernel dropped because a socket's receive
    /// buffer was full (`SO_MEMINFO`). Asked when the socket is closed, and only if it was seen to
    /// receive in bursts: what a socket lost that no guest received from is not in here, unless
    /// it was recycled and a later owner's drops were counted.
    pub dropped_by_kernel: u64,
    /// Datagrams dropped because the socket's queue was full, or those of all the guest's sockets together
    /// ([`UdpCtxBuilder::queue_bytes_max`](crate::UdpCtxBuilder::queue_bytes_max)), before the kernel
    /// had ended the receive.
    pub dropped_by_queue: u64,
    /// Messages that could not be read: cut, or without an IP sender.
    pub dropped_malformed: u64,
}

impl std::ops::AddAssign for Stats {
    /// Adds up the counters of several rings.
    fn add_assign(&mut self, other: Self) {
        let Self {
            rings,
            enters,
            enters_overdue,
            interrupts,
            submissions,
            completions,
            sockets_created,
            sockets_open,
            sockets_recycled,
            sockets_cached,
            closed_instead,
            datagrams_sent,
            datagrams_coalesced,
            datagrams_deferred,
            gso_refusals,
            bytes_sent,
            datagrams_received,
            datagrams_split,
            bytes_received,
            rearms,
            pauses,
            dropped_by_policy,
            dropped_not_from_peer,
            dropped_at_close,
            dropped_by_kernel,
            dropped_by_queue,
            dropped_malformed,
        } = other;
        self.rings += rings;
        self.enters += enters;
        self.enters_overdue += enters_overdue;
        self.interrupts += interrupts;
        self.submissions += submissions;
        self.completions += completions;
        self.sockets_created += sockets_created;
        self.sockets_open += sockets_open;
        self.sockets_recycled += sockets_recycled;
        self.sockets_cached += sockets_cached;
        self.closed_instead += closed_instead;
        self.datagrams_sent += datagrams_sent;
        self.datagrams_coalesced += datagrams_coalesced;
        self.datagrams_deferred += datagrams_deferred;
        self.gso_refusals += gso_refusals;
        self.bytes_sent += bytes_sent;
        self.datagrams_received += datagrams_received;
        self.datagrams_split += datagrams_split;
        self.bytes_received += bytes_received;
        self.rearms += rearms;
        self.pauses += pauses;
        self.dropped_by_policy += dropped_by_policy;
        self.dropped_not_from_peer += dropped_not_from_peer;
        self.dropped_at_close += dropped_at_close;
        self.dropped_by_kernel += dropped_by_kernel;
        self.dropped_by_queue += dropped_by_queue;
        self.dropped_malformed += dropped_malformed;
    }
}

/// Why sockets were closed for good and not cached for new owners.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClosedInstead {
    /// Bound to a port by its number, which a disconnect does not give up.
    pub named_port: u64,
    /// A guest had set an option, or the socket received in bursts (`UDP_GRO`).
    pub options: u64,
    /// Connected, of a family that does not forget its peers.
    pub connected: u64,
    /// An operation had failed: a refused send, an unreachable peer, a bind to a foreign address.
    pub error: u64,
    /// An operation was in flight when the guest dropped the socket.
    pub busy: u64,
    /// [`Recycle`](crate::Recycle)'s limits were reached, or the slot was needed.
    pub no_room: u64,
    /// More unread datagrams waited in it than 4 KiB of kernel memory hold.
    pub unread: u64,
    /// It did not behave on the way: it could not be unbound, or not be drained.
    pub unclean: u64,
    /// No bind has needed it for a while, or the host [closed](crate::Uring::close_cached) what was
    /// cached.
    pub idle: u64,
}

impl std::ops::AddAssign for ClosedInstead {
    fn add_assign(&mut self, other: Self) {
        let Self { named_port, options, connected, error, busy, no_room, unread, unclean, idle } =
            other;
        self.named_port += named_port;
        self.options += options;
        self.connected += connected;
        self.error += error;
        self.busy += busy;
        self.no_room += no_room;
        self.unread += unread;
        self.unclean += unclean;
        self.idle += idle;
    }
}

/// A snapshot of a guest's counters, by [`UdpCtx::stats`](crate::UdpCtx::stats) or
/// [`GuestCounters::stats`](crate::GuestCounters::stats).
///
/// All are totals, except `sockets_open`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct GuestStats {
    /// Sockets it was given, and those that the store's resource table had no room for.
    pub sockets_created: u64,
    /// Those it has now, those still closing included.
    pub sockets_open: u64,
    /// Sockets it was refused because it has as many as it may, or its tenants' quotas
    /// ([`Quota`](crate::Quota)) are used up.
    pub sockets_beyond_quota: u64,
    /// Sockets it was refused because all guests together have as many as they may.
    pub sockets_beyond_table: u64,
    /// Datagrams the kernel took from it. (What it took in calls that were given up may be missing.)
    pub datagrams_sent: u64,
    /// The bytes of their payloads.
    pub bytes_sent: u64,
    /// Datagrams moved to its sockets' queues.
    pub datagrams_received: u64,
    /// The bytes of their payloads.
    pub bytes_received: u64,
    /// Datagrams withheld because the policy refused their sender, or panicked.
    pub dropped_by_policy: u64,
    /// Datagrams withheld because a connected socket's peer did not send them.
    pub dropped_not_from_peer: u64,
    /// Datagrams still queued when their socket was closed.
    pub dropped_at_close: u64,
    /// Datagrams dropped because a queue, or all of the guest's together, were full.
    pub dropped_by_queue: u64,
    /// What its policy has denied, by reason, in the order of their first time: sockets, addresses, and
    /// the senders of datagrams. [`DENIAL_REASONS_MAX`](crate::limits::DENIAL_REASONS_MAX) are told apart,
    /// the rest is counted as [`OTHER_REASONS`](crate::limits::OTHER_REASONS).
    pub denials: Vec<Denials>,
}

/// What a policy has denied for one reason.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Denials {
    /// As the policy has it.
    pub reason: Cow<'static, str>,
    /// How often.
    pub count: u64,
}
