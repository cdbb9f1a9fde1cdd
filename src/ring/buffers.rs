//! The ring's receive buffers: the kernel takes one per message, and gets each back as soon as its
//! completion is reaped.
//!
//! Ownership: a buffer belongs to the kernel from `publish` until the completion that names its
//! id, and to us from there until the next `publish`. The API is safe because `filled` borrows
//! the ring mutably, so no buffer is published while it is read. That a completion names a buffer
//! which the kernel has let go of is the kernel's contract; the id and the length that it names are
//! checked against the bounds here.

use std::io;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::IoUring;
use io_uring::types::BufRingEntry;

use super::mapping::Mapping;
use crate::limits::BUFFER_BYTES;

/// The group that the ring's receive buffers are registered under.
pub(super) const BUFFER_GROUP: u16 = 0;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BufferId(pub(crate) u16);

pub(crate) struct BufferRing {
    /// `struct io_uring_buf_ring`: entries shared with the kernel, the tail within the first.
    entries: Mapping,
    bytes: Mapping,
    /// A power of two.
    count: u16,
    /// Our tail; the kernel reads its published copy.
    tail: u16,
}

impl BufferRing {
    /// Maps so many buffers, a power of two, registers them with the ring and gives all to the kernel.
    #[expect(unsafe_code, reason = "the kernel reads the entries from now on")]
    pub(crate) fn register(io: &IoUring, count: u16) -> io::Result<Self> {
        let mut ring = Self::map(count)?;
        // Huge pages would make every small datagram cost 2 MiB; if the advice fails, it may.
        let _ = ring.bytes.advise(libc::MADV_NOHUGEPAGE);
        // SAFETY: `entries` is page-aligned, holds `count` entries and lives as long as the ring:
        // `Ring` drops its buffers only when the kernel holds no operation, and leaks them else.
        // (`whatever_the_kernel_does_datagrams_reach_their_own_socket_in_order` reads what would be
        // overwritten.)
        unsafe {
            io.submitter().register_buf_ring_with_flags(
                ring.entries.start.expose_provenance() as u64,
                count,
                BUFFER_GROUP,
                0,
            )?;
        }
        ring.publish_all();
        Ok(ring)
    }

    fn map(count: u16) -> io::Result<Self> {
        let entries = Mapping::anonymous(usize::from(count) * size_of::<BufRingEntry>())?;
        let bytes = Mapping::anonymous(usize::from(count) * BUFFER_BYTES)?;
        Ok(Self { entries, bytes, count, tail: 0 })
    }

    fn publish_all(&mut self) {
        (0..self.count).for_each(|id| self.publish(BufferId(id)));
    }

    /// Gives a buffer to the kernel.
    #[expect(unsafe_code, reason = "writes memory the kernel reads")]
    pub(crate) fn publish(&mut self, id: BufferId) {
        let at = usize::from(self.tail & (self.count - 1));
        let entry = self.entries.start.cast::<BufRingEntry>().wrapping_add(at);
        // SAFETY: `at` is below `count`, so the entry is inside the mapping. The kernel only reads
        // entries, and this one not before the tail moves past it below.
        let entry = unsafe { &mut *entry };
        entry.set_addr(self.buffer_start(id).expose_provenance() as u64);
        entry.set_len(u32::try_from(BUFFER_BYTES).expect("68 KiB"));
        entry.set_bid(id.0);
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the entries start with a valid first entry, whose `resv` field is the tail.
        let tail = unsafe { BufRingEntry::tail(self.entries.start.cast::<BufRingEntry>()) };
        // SAFETY: the tail is an aligned u16 inside the mapping, and both sides use it atomically.
        let tail = unsafe { AtomicU16::from_ptr(tail.cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }

    /// What the kernel wrote into a buffer that a completion has named; `None` if the completion
    /// names a buffer or a length that cannot be.
    #[expect(unsafe_code, reason = "reads memory the kernel wrote")]
    pub(crate) fn filled(&mut self, id: BufferId, len: usize) -> Option<&[u8]> {
        if id.0 >= self.count || len > BUFFER_BYTES {
            return None;
        }
        let start = self.buffer_start(id);
        // SAFETY: inside the mapping by the check above, and ours since its completion came;
        // `&mut self` keeps it from being published while it is read.
        Some(unsafe { std::slice::from_raw_parts(start, len) })
    }

    fn buffer_start(&self, id: BufferId) -> *mut u8 {
        let at = usize::from(id.0 & (self.count - 1));
        self.bytes.start.cast::<u8>().wrapping_add(at * BUFFER_BYTES)
    }

    /// For a kernel that a test plays: all is as after `register`, and where the entries are.
    #[cfg(test)]
    pub(super) fn played() -> io::Result<(Self, *const BufRingEntry)> {
        let mut ring = Self::map(crate::limits::BUFFERS)?;
        ring.publish_all();
        let start = ring.entries.start.cast_const().cast();
        Ok((ring, start))
    }

    /// How often a buffer was given to the kernel, modulo 2^16.
    #[cfg(test)]
    pub(crate) fn published(&self) -> u16 {
        self.tail
    }

    /// Plays the kernel: writes into a buffer it holds.
    #[cfg(test)]
    #[expect(unsafe_code, reason = "writes a buffer as the kernel would")]
    pub(crate) fn fill(&mut self, id: BufferId, bytes: &[u8]) {
        assert!(id.0 < self.count && bytes.len() <= BUFFER_BYTES);
        // SAFETY: inside the mapping, and no slice of it is alive under `&mut self`.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.buffer_start(id), bytes.len());
        };
    }

    /// Leaves the memory to the kernel for good.
    pub(crate) fn leak(self) {
        std::mem::forget(self);
    }
}
