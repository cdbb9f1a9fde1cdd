//! Which CPUs measured threads run on.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use wasmtime::error::Context;

/// The CPUs this thread may use: guests get the first, what is not measured with them the last.
pub(super) struct Cpus {
    pub(super) all: CpuSet,
    pub(super) first: usize,
    pub(super) last: usize,
}

impl Cpus {
    pub(super) fn allowed() -> wasmtime::Result<Self> {
        let all = sched_getaffinity(Pid::from_raw(0))?;
        let mut allowed = (0..CpuSet::count()).filter(|cpu| all.is_set(*cpu).unwrap_or(false));
        let first = allowed.next().context("no CPU is allowed")?;
        let last = allowed.next_back().unwrap_or(first);
        Ok(Self { all, first, last })
    }
}

/// Keeps this thread on a CPU.
pub(super) fn pin(cpu: usize) -> nix::Result<()> {
    let mut only = CpuSet::new();
    only.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &only)
}
