//! What is received: from the buffers that the kernel fills to the sockets' queues.

use super::buffers::{BufferId, BufferRing};
use super::queues::Completion;
use super::receive_queue::{Datagram, Pushed, ReceiveQueue};
use crate::datagram::{parse_received, receive_header};
use crate::error::Errno;
use crate::stats::Stats;

/// The memory of all receives of a ring.
pub(super) struct Receives {
    /// `None` once leaked.
    buffers: Option<BufferRing>,
    header: Header,
}

/// What every receive is armed with; boxed, because the kernel reads it by its address.
struct Header(Box<libc::msghdr>);

// SAFETY: the header's pointers are null, and it is never written.
#[expect(unsafe_code, reason = "msghdr holds raw pointers")]
unsafe impl Send for Header {}

/// What a receive's completion has brought to its socket's queue.
pub(super) enum Delivered {
    Message(Pushed),
    /// An error that was pending in the socket.
    Error(Pushed),
    /// The end of the receive alone: no buffer was free (one is when it is armed again), it was cancelled, by
    /// the ring or because the thread that armed it has exited, or it does not wait.
    Nothing,
}

impl Receives {
    pub(super) fn new(buffers: BufferRing) -> Self {
        Self { buffers: Some(buffers), header: Header(Box::new(receive_header())) }
    }

    /// Where the kernel reads how to receive.
    pub(super) fn header(&self) -> *const libc::msghdr {
        &raw const *self.header.0
    }

    /// Moves what a completion has brought into the socket's queue.
    pub(super) fn deliver(
        &mut self,
        completion: Completion,
        queue: &ReceiveQueue,
        stats: &mut Stats,
    ) -> Delivered {
        let errno = -completion.result;
        if let Some(id) = completion.buffer() {
            return self.deliver_message(id, completion.result, queue, stats);
        }
        if errno <= 0 || matches!(errno, libc::ENOBUFS | libc::ECANCELED | libc::EAGAIN) {
            return Delivered::Nothing;
        }
        Delivered::Error(queue.push_error(Errno(errno)))
    }

    /// Copies each datagram of a message into memory of its own size and queues it, and gives the
    /// buffer back to the kernel.
    fn deliver_message(
        &mut self,
        id: BufferId,
        result: i32,
        queue: &ReceiveQueue,
        stats: &mut Stats,
    ) -> Delivered {
        let Some(buffers) = &mut self.buffers else { return Delivered::Nothing };
        // The completion named the buffer, so it is ours until `publish`.
        let received = usize::try_from(result)
            .ok()
            .and_then(|len| buffers.filled(id, len))
            .and_then(parse_received);
        let delivered = if let Some(received) = received {
            let payloads = received.payloads();
            let count = payloads.len() as u64;
            let from = received.from;
            let datagrams = payloads.map(|payload| Datagram { payload: payload.to_vec(), from });
            let pushed = queue.push(datagrams);
            if pushed.is_dropped {
                stats.dropped_by_queue += count;
            } else {
                stats.datagrams_received += count;
                stats.datagrams_split += if count > 1 { count } else { 0 };
                stats.bytes_received += received.bytes() as u64;
            }
            Delivered::Message(pushed)
        } else {
            stats.dropped_malformed += u64::from(result >= 0);
            Delivered::Nothing
        };
        buffers.publish(id);
        delivered
    }

    /// Gives the kernel a buffer back that a completion without an operation has named.
    pub(super) fn put_back(&mut self, completion: Completion) {
        if let (Some(id), Some(buffers)) = (completion.buffer(), &mut self.buffers) {
            buffers.publish(id);
        }
    }

    /// Leaves the memory to the kernel for good.
    pub(super) fn leak(&mut self) {
        std::mem::forget(std::mem::replace(&mut self.header.0, Box::new(receive_header())));
        if let Some(buffers) = self.buffers.take() {
            buffers.leak();
        }
    }

    #[cfg(test)]
    pub(super) fn buffers(&mut self) -> &mut BufferRing {
        self.buffers.as_mut().expect("not leaked")
    }
}
