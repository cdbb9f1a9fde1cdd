//! membarrier(2): waiting for the kernel's other processors, and interrupting this process's threads.

use std::io;

#[expect(unsafe_code, reason = "membarrier(2)")]
fn membarrier(command: libc::c_int) -> io::Result<()> {
    let (flags, cpu_id) = (0, 0);
    // SAFETY: membarrier(2) takes no pointers.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, command, flags, cpu_id) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Waits until every read-side critical section of the kernel's RCU that has begun is over. A packet
/// that had found a socket before is delivered to it by then.
///
/// On a machine with one CPU the call does not wait: packets are delivered by softirqs, and none is
/// half-way there while a thread runs. (On a `PREEMPT_RT` kernel one may be: nothing is recycled there.)
pub(super) fn wait_for_grace_period() -> io::Result<()> {
    membarrier(libc::MEMBARRIER_CMD_GLOBAL)
}

/// Lets `kick` work in this process, for good. The first time it waits for a grace period, too.
pub(super) fn enable_kicks() {
    // Without it a kick does nothing, and threads get to their task work later.
    let _ = membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED);
}

/// Interrupts every thread of this process that runs on another processor. On its way back to user
/// space each runs its task work: completions that the kernel keeps for a thread until that enters it
/// (`IORING_SETUP_COOP_TASKRUN`), for as long as that computes
/// (`a_thread_that_computes_on_holds_no_port_up`).
pub(crate) fn kick() {
    let _ = membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED);
}
