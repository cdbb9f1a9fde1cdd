//! Every bound of the crate, and the relations between them that the rest relies on.

use std::time::Duration;

/// Sockets of all guests that may be open at once unless the builder says otherwise.
pub const SOCKETS_DEFAULT: u32 = 4096;

/// Largest fixed-file table the kernel registers (`IORING_MAX_FIXED_FILES`).
pub const SOCKETS_MAX: u32 = 1 << 20;

/// Sockets one guest may hold unless its [`UdpCtxBuilder`](crate::UdpCtxBuilder) says otherwise.
pub const GUEST_SOCKETS_DEFAULT: u32 = 1024;

/// Submission queue entries. The binds of 64 guests fit; a chain that does not waits in a backlog.
pub(crate) const SQ_ENTRIES: u32 = 512;

/// Completion queue entries: every submission of a full queue and all that the buffers can hold.
pub(crate) const CQ_ENTRIES: u32 = 4096;

/// Payload of the largest UDP datagram: 65,535 less the UDP header over IPv6 (RFC 8200 counts no
/// IP header), 20 less over IPv4.
pub const DATAGRAM_BYTES_MAX: usize = 65_527;

/// Payload of the largest UDP datagram over IPv4, and of the largest message of several datagrams
/// over either family.
pub(crate) const DATAGRAM_BYTES_MAX_V4: usize = 65_507;

/// Datagrams in one message (`UDP_MAX_SEGMENTS`, which newer kernels have doubled).
pub(crate) const SEGMENTS_MAX: usize = 64;

/// Longest payload that `send` hands to the kernel, which answers `EMSGSIZE` to what is beyond the
/// family's maximum, as it does for wasmtime-wasi.
pub(crate) const PAYLOAD_BYTES_MAX: usize = u16::MAX as usize;

/// Datagrams per `send` or `receive`, the number wasmtime-wasi permits.
pub(crate) const BATCH_DATAGRAMS_MAX: usize = 16;

/// Datagrams a guest may take one by one without suspending, as many as of wasmtime-wasi, before it
/// yields to the other guests of its thread.
pub(crate) const BUDGET_DATAGRAMS: usize = 64;

/// The same for a guest that takes them in batches. (With 64, of 64 guests on one thread that each ask a
/// question per socket fewer share an enter: a fifth more enters.)
pub(crate) const BUDGET_BATCHED: usize = 32;

/// Bytes after which one `receive` returns what it has, as wasmtime-wasi's `MAX_READ_SIZE_ALLOC`.
pub(crate) const RECEIVE_BYTES_MAX: usize = 64 * 1024;

/// Entries of the longest linked chain: deferred datagrams of as many sizes, of which the last batch may be
/// beyond the bound. (A bind needs 6.)
pub(crate) const CHAIN_ENTRIES_MAX: usize = DEFERRED_DATAGRAMS_MAX + BATCH_DATAGRAMS_MAX;

/// Datagrams of a socket that may be deferred before they are submitted.
pub(crate) const DEFERRED_DATAGRAMS_MAX: usize = 64;

/// Payload bytes of a socket that may be deferred before they are submitted: more would not be in the
/// processor's cache any more.
pub(crate) const DEFERRED_BYTES_MAX: usize = 32 * 1024;

/// Default of [`UdpCtxBuilder::deferred_time`](crate::UdpCtxBuilder::deferred_time).
pub const DEFERRED_TIME_DEFAULT: Duration = Duration::from_millis(1);

/// What a guest sends on may follow its last send after as long as datagrams are deferred, and after this part of that
/// if it has heard something in between: one that takes longer to answer may compute as long for the next answer,
/// and this one would wait for it.
pub(crate) const ANSWERS_APART_PART: u32 = 4;

/// Peers that a socket is known to have reached: enough for a server whose clients have a few sockets each.
pub(crate) const REACHED_MAX: usize = 16;

/// Buffers shared by all receiving sockets of a ring. Few, so that they stay in the processor's
/// cache; each goes back to the kernel as soon as its completion is reaped.
pub(crate) const BUFFERS: u16 = 128;

/// Fewest of them that a bench gives a ring.
#[cfg(feature = "bare")]
pub(crate) const BUFFERS_MIN: u16 = 16;

/// Most of them: what the completion queue has entries for.
pub(crate) const BUFFERS_MAX: u16 = 1024;

/// Virtual size of one buffer; demand paging keeps the memory of small datagrams at 4 KiB.
pub(crate) const BUFFER_BYTES: usize = 68 * 1024;

/// `struct io_uring_recvmsg_out` before the name, the control data and the payload.
pub(crate) const RECEIVE_HEADER_BYTES: usize = 16;

/// Room for the sender's address: a `sockaddr_in6`.
pub(crate) const NAME_BYTES: usize = 28;

/// Room for one control message with a value of up to eight bytes.
pub(crate) const CONTROL_BYTES: usize = 24;

/// Sends of a socket for which a refusal of coalesced datagrams is remembered.
pub(crate) const GSO_REFUSAL_SENDS: u16 = 1000;

/// Attempts at one `send`, each of which ends with a refusal or with its thread.
pub(crate) const SEND_ATTEMPTS_MAX: u32 = 64;

/// Datagrams waiting in a receive queue from which on its socket is one that receives in bursts, and
/// gets GRO (`UDP_GRO`). The others are spared the operation.
pub(crate) const BURST_DATAGRAMS: usize = 4;

/// Datagrams queued for one socket before its receive is paused.
pub const QUEUE_DATAGRAMS_DEFAULT: usize = 64;

/// Bytes queued for one socket before its receive is paused.
pub const QUEUE_BYTES_DEFAULT: usize = 256 * 1024;

/// Bytes beyond those that a queue still takes, while the end of its receive is on its way.
pub const QUEUE_SLACK_BYTES: usize = 256 * 1024;

/// Bytes queued for all sockets of a guest together, unless its
/// [`UdpCtxBuilder`](crate::UdpCtxBuilder) says otherwise.
pub const GUEST_QUEUE_BYTES_DEFAULT: usize = 16 << 20;

/// Bytes of sends that may wait for send buffer for all sockets of a guest together, unless its
/// [`UdpCtxBuilder`](crate::UdpCtxBuilder) says otherwise.
pub const GUEST_SEND_BYTES_DEFAULT: usize = 4 << 20;

/// Reasons of a guest's policy that [`GuestStats::denials`](crate::GuestStats::denials) tells apart.
pub const DENIAL_REASONS_MAX: usize = 16;

/// What the others are counted as there.
pub const OTHER_REASONS: &str = "other reasons";

/// What a queued datagram counts beside its payload: its place in the queue, whose memory grows by
/// doubling, and what the allocator needs.
pub const QUEUED_DATAGRAM_BYTES: usize = 128;

/// Shortest interval at which a ring looks for cached sockets that no bind has needed.
pub(crate) const IDLE_MIN: Duration = Duration::from_millis(1);

/// Closed sockets cached for new owners unless the builder says otherwise: in quarantine, and ready.
pub const CACHED_SOCKETS_DEFAULT: u32 = 8192;

/// Cached sockets that are drained, and closed, per tick.
pub(crate) const TICK_BATCH: usize = 64;

/// Ready sockets of a kind that an interval without binds leaves, at most.
pub(crate) const KEPT_IDLE_MAX: usize = 64;

/// Kernel memory of unread datagrams that is worth draining: with more of them a socket is closed, right
/// behind its grace period.
pub(crate) const CACHED_BYTES_MAX: u32 = 4096;

/// Datagrams and errors drained before a cached socket is closed instead.
pub(crate) const DRAINS_MAX: u32 = 64;

/// Retries at a full table or quota, while another thread is in the kernel, before a socket is
/// refused.
pub(crate) const QUOTA_RETRIES_MAX: u32 = 1000;

/// Shortest time between two attempts at a self-test that could not be run.
pub(crate) const RETEST_INTERVAL: Duration = Duration::from_secs(1);

/// Longest that a bind waits for closes that may hold its port.
pub(crate) const BIND_PATIENCE: Duration = Duration::from_millis(5);

/// How long the drop of a socket bound by number waits until its port is free, if it has looked
/// `CLOSE_LOOKS_MIN` times by then.
pub(crate) const CLOSE_PATIENCE: Duration = Duration::from_millis(10);

/// Looks of that drop, between which it yields to other threads.
pub(crate) const CLOSE_LOOKS_MIN: u32 = 32;

/// Longest that it waits.
pub(crate) const CLOSE_PATIENCE_MAX: Duration = Duration::from_millis(100);

/// Longest that a thread waits for another that is inside the kernel, before its guest suspends.
pub(crate) const OUTSIDE_PATIENCE: Duration = Duration::from_millis(2);

/// Longest that `Uring::close` waits until the kernel has let go of all sockets.
pub(crate) const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(1);

/// How long closed sockets keep what their guests have not read, where no guest and no reaper enters.
pub(crate) const DRAIN_PATIENCE: Duration = Duration::from_millis(250);

/// How long a close may take before the ring's own thread gets on with it, and the longest interval at
/// which that tries again: a guest that computes on keeps a port for no longer. (To wake it costs up to 20 µs of
/// CPU in a virtual machine.)
pub(crate) const OVERDUE: Duration = Duration::from_micros(1700);

/// Guests that go at shorter intervals leave its timer as it is. To set it for a close and back costs up to 11 µs in
/// a virtual machine, and to wake the thread each [`OVERDUE`] less than 12 ms a second.
pub(crate) const RESTS_APART: Duration = Duration::from_micros(400);

/// When that tries again with a close which did not end at once; later each time.
pub(crate) const OVERDUE_AGAIN: Duration = Duration::from_micros(50);

/// Rings that a pool may have: each has some descriptors and, in virtual memory, 8.5 MiB of buffers.
pub(crate) const RINGS_MAX: usize = 1024;

/// When a ring is tried again that could not be built.
pub(crate) const RING_RETRY: Duration = Duration::from_secs(1);

/// Sockets that a ring's share gains at a time.
pub(crate) const UNITS_GAINED_MAX: u64 = 64;

/// How much of the time between two looks a thread must have run to count as computing.
pub(crate) const COMPUTES_PERCENT_MIN: u32 = 75;

/// How often a thread that computes is interrupted while datagrams come: as long may one wait for it. (An
/// interrupt costs some 30 µs of CPU in a virtual machine, of which the timer has 20.)
pub(crate) const INTERRUPT_EVERY: Duration = Duration::from_micros(175);

/// The same when none has come for long: as often as the kernel's timer does, at 250 Hz.
pub(crate) const INTERRUPT_EVERY_MAX: Duration = Duration::from_millis(4);

/// How often the thread that interrupts looks for threads that compute, when one has just ceased to: guests
/// that compute now and then are soon found again.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(1);

/// The same when none has computed for long: a datagram that comes without a reaper hearing of it waits as
/// long where there is no timer tick (`nohz_full`).
pub(crate) const LOOK_EVERY_MAX: Duration = Duration::from_millis(160);

/// Looks without datagrams, or without a thread that computes, after which half as many are made.
pub(crate) const LOOKS_WITHOUT_DATAGRAMS: u32 = 8;

/// Completions taken from the queue at a time.
pub(crate) const COMPLETIONS_BATCH: usize = 64;

/// Guests that share an enter. With more, a guest that has yielded finds its cache cold, which costs
/// more than it saves. (With 500 guests 9 µs became 14 per echo round trip, with 4,500 28.)
pub(crate) const BATCH_GUESTS_MAX: u64 = 128;

/// Enters that guests make without a yield, once one has yielded to more than `BATCH_GUESTS_MAX`.
pub(crate) const DIRECT_SUBMITS: u32 = 32;

/// Payload bytes queued since the last enter from which on a guest enters without a yield.
pub(crate) const BATCH_BYTES_MAX: usize = 16 * 1024;

/// Rounds that one thread enters the kernel for all guests before the reapers take over.
pub(crate) const COMBINE_ROUNDS_MAX: u32 = 16;

/// When an enter that the kernel has refused is tried again: twice as late each time, up to
/// `REFUSAL_PAUSE_MAX`.
pub(crate) const REFUSAL_PAUSE: Duration = Duration::from_millis(1);

/// Longest time between two tries.
pub(crate) const REFUSAL_PAUSE_MAX: Duration = Duration::from_millis(100);

/// How long the kernel may refuse enters before guests whose operations wait for one are told.
pub(crate) const REFUSAL_PATIENCE: Duration = Duration::from_millis(100);

/// How long sends go on to wait for send buffer when their guest is gone.
pub(crate) const LINGER: Duration = Duration::from_secs(1);

/// Rounds without progress that teardown waits for the kernel to give memory back before it
/// leaks it.
pub(crate) const TEARDOWN_ROUNDS_MAX: u32 = 64;

const _: () = {
    assert!(CHAIN_ENTRIES_MAX <= SQ_ENTRIES as usize, "a chain fits one submission");
    assert!(BATCH_DATAGRAMS_MAX <= CHAIN_ENTRIES_MAX, "a batch is one chain");
    assert!(CQ_ENTRIES >= 2 * SQ_ENTRIES + BUFFERS_MAX as u32, "submissions and arrivals both fit");
    assert!(BATCH_DATAGRAMS_MAX <= SEGMENTS_MAX, "no run is longer than a message");
    assert!(BUFFERS.is_power_of_two(), "the kernel masks the buffer ring's tail");
    assert!(BUFFERS_MAX.is_power_of_two() && BUFFERS <= BUFFERS_MAX);
    assert!(
        RECEIVE_HEADER_BYTES + NAME_BYTES + CONTROL_BYTES + DATAGRAM_BYTES_MAX <= BUFFER_BYTES,
        "a whole datagram fits one buffer",
    );
    assert!(BUFFER_BYTES.is_multiple_of(4096), "buffers start on pages");
    assert!(OVERDUE.as_micros() < 2000, "documented: within 2 ms");
    assert!(BIND_PATIENCE.as_micros() > 2 * OVERDUE.as_micros(), "a held-up close gets on");
    assert!(SOCKETS_DEFAULT <= SOCKETS_MAX);
};
