//! The runtimes that have tasks for the ring, and how those are woken.

use std::task::Waker;

use crate::sync::runtime::{self, Handle, RuntimeFlavor};
use crate::sync::thread::{self, ThreadId};

/// The runtimes that have tasks for the ring.
#[derive(Default)]
pub(super) struct Runtimes {
    tasks: Vec<RuntimeTasks>,
    /// Where a flusher was woken that has not run.
    pub(super) flusher_due: Option<(ThreadId, runtime::Id)>,
    /// The reaper of one could not watch the eventfd, and tries again when it is woken.
    pub(super) have_unwatched: bool,
}

/// The tasks of one runtime. A waker is missing from when its task was spawned or woken until it
/// runs: then it need not be woken.
pub(super) struct RuntimeTasks {
    id: runtime::Id,
    flavor: RuntimeFlavor,
    pub(super) reaper: Option<Waker>,
    pub(super) flusher: Option<Waker>,
}

impl Runtimes {
    pub(super) fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Its tasks are spawned next.
    pub(super) fn add(&mut self, id: runtime::Id, flavor: RuntimeFlavor) {
        self.tasks.push(RuntimeTasks { id, flavor, reaper: None, flusher: None });
    }

    /// Whether a guest may wait for what another thread than its own has armed.
    pub(super) fn are_shared(&self) -> bool {
        self.tasks.len() > 1
            || self.tasks.iter().any(|tasks| tasks.flavor != RuntimeFlavor::CurrentThread)
    }

    /// Whether a flusher runs when this thread's guest suspends.
    pub(super) fn is_flusher_due_here(&self) -> bool {
        self.flusher_due.is_some_and(|(thread, runtime)| {
            thread == thread::current().id()
                && Handle::try_current().is_ok_and(|here| here.id() == runtime)
        })
    }

    pub(super) fn get(&mut self, id: runtime::Id) -> Option<&mut RuntimeTasks> {
        self.tasks.iter_mut().find(|tasks| tasks.id == id)
    }

    pub(super) fn remove(&mut self, id: runtime::Id) -> Option<RuntimeTasks> {
        let at = self.tasks.iter().position(|tasks| tasks.id == id)?;
        Some(self.tasks.swap_remove(at))
    }

    pub(super) fn take_reapers(&mut self) -> impl Iterator<Item = Waker> {
        self.tasks.iter_mut().filter_map(|tasks| tasks.reaper.take())
    }

    pub(super) fn take_all(&mut self) -> impl Iterator<Item = Waker> {
        self.tasks.drain(..).flat_map(|tasks| [tasks.reaper, tasks.flusher]).flatten()
    }
}
