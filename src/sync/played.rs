//! What `shuttle` has not: runtimes, and what threads wait for of the system's.

pub(crate) mod eventfd;
pub(crate) mod timer;

/// Runtimes as tokio has them, whose tasks `shuttle` runs, each as a thread of its own: more may happen at a
/// time than in tokio's.
pub(crate) mod runtime {
    use std::cell::Cell;
    use std::future::Future;

    use shuttle::rand::{RngCore, thread_rng};

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) enum RuntimeFlavor {
        CurrentThread,
        MultiThread,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub(crate) struct Id(u64);

    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Handle {
        id: Id,
        flavor: RuntimeFlavor,
    }

    shuttle::thread_local! {
        static CURRENT: Cell<Option<Handle>> = Cell::new(None);
    }

    impl Handle {
        pub(crate) fn new(flavor: RuntimeFlavor) -> Self {
            Self { id: Id(thread_rng().next_u64()), flavor }
        }

        /// This thread is one of the runtime's from now on.
        pub(crate) fn enter(self) {
            CURRENT.with(|current| current.set(Some(self)));
        }

        pub(crate) fn try_current() -> Result<Self, ()> {
            CURRENT.with(Cell::get).ok_or(())
        }

        pub(crate) fn id(self) -> Id {
            self.id
        }

        pub(crate) fn runtime_flavor(self) -> RuntimeFlavor {
            self.flavor
        }

        pub(crate) fn spawn(
            self,
            task: impl Future<Output = ()> + Send + 'static,
        ) -> shuttle::future::JoinHandle<()> {
            shuttle::future::spawn(async move {
                self.enter();
                task.await;
            })
        }
    }

    pub(crate) fn worker_index() -> Option<usize> {
        let current = Handle::try_current().ok()?;
        (current.flavor == RuntimeFlavor::MultiThread).then_some(0)
    }
}
