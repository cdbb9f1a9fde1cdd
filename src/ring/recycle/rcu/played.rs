//! The thread of the grace periods, played by a test.

use super::{Arc, EventFd, Instant, Ordering, Rcu, Receiver, Request, State, channel};

pub(crate) struct PlayedThread {
    requests: Receiver<Request>,
    state: Arc<State>,
    eventfd: EventFd,
    timer: Option<Instant>,
}

impl Rcu {
    pub(crate) fn played(eventfd: EventFd) -> (Self, PlayedThread) {
        let (sender, requests) = channel();
        let mut rcu = Self::new(eventfd.clone());
        // Nothing to start a thread with.
        rcu.eventfd = None;
        rcu.requests = Some(sender);
        let thread = PlayedThread { requests, state: Arc::clone(&rcu.state), eventfd, timer: None };
        (rcu, thread)
    }
}

impl PlayedThread {
    /// Does what it was asked for, and `grace` before a grace period is over; whether there was something.
    pub(crate) fn serve(&mut self, now: Instant, mut grace: impl FnMut()) -> bool {
        let mut has_served = false;
        while let Ok(request) = self.requests.try_recv() {
            match request {
                Request::Grace => {
                    grace();
                    self.state.over.fetch_add(1, Ordering::Release);
                }
                Request::Task(task) => {
                    task();
                    self.state.has_run.store(true, Ordering::Relaxed);
                }
                Request::Timer(after) => {
                    self.timer = now.checked_add(after);
                    continue;
                }
            }
            has_served = true;
            self.eventfd.signal();
        }
        if self.timer.take_if(|at| *at <= now).is_some() {
            self.state.has_expired.store(true, Ordering::Relaxed);
            self.eventfd.signal();
        }
        has_served
    }

    /// There are no grace periods any more.
    pub(crate) fn fail(&mut self) {
        self.state.has_failed.store(true, Ordering::Relaxed);
        self.eventfd.signal();
    }
}
