//! SIGTERM and SIGINT: the first asks for a graceful end, the second has it at once.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;
use tokio::sync::oneshot;
use wasi_uring::Uring;
use wasmtime::error::Context;

use crate::terminal::{Failure, say};

/// Is told when the first signal comes.
pub(super) struct ToldToEnd {
    first: oneshot::Receiver<()>,
    has_second: Arc<AtomicBool>,
}

impl ToldToEnd {
    /// At the second signal the ring is closed before the process ends, so that its ports are free. A thread of its own
    /// waits for signals; it is there until the process ends.
    pub(super) fn new(uring: Option<&Uring>) -> Result<Self, Failure> {
        let mut signals = Signals::new([SIGINT, SIGTERM])
            .context("cannot watch for signals")
            .map_err(Failure::run)?;
        let uring = uring.cloned();
        let (sender, receiver) = oneshot::channel();
        let mut first = Some(sender);
        let has_second = Arc::new(AtomicBool::new(false));
        let comes = Arc::clone(&has_second);
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                for signal in signals.forever() {
                    if let Some(first) = first.take() {
                        say("finishing what was asked for; a second signal ends it");
                        let _ = first.send(());
                        continue;
                    }
                    comes.store(true, Ordering::Relaxed);
                    if let Some(uring) = &uring {
                        uring.close();
                    }
                    // It ends the process. If it cannot, the next signal tries.
                    if emulate_default_handler(signal).is_err() {
                        comes.store(false, Ordering::Relaxed);
                    }
                }
            })
            .context("cannot start a thread")
            .map_err(Failure::run)?;
        Ok(Self { first: receiver, has_second })
    }

    /// Whether the second signal has come.
    pub(super) fn second(&self) -> SecondSignal {
        SecondSignal(Arc::clone(&self.has_second))
    }

    /// Waits for the first signal, and does what has no end meanwhile.
    pub(super) async fn interrupts(mut self, endless: impl Future<Output = Infallible>) {
        let mut endless = pin!(endless);
        std::future::poll_fn(|cx| {
            if pin!(&mut self.first).poll(cx).is_ready() {
                return Poll::Ready(());
            }
            match endless.as_mut().poll(cx) {
                Poll::Ready(never) => match never {},
                Poll::Pending => Poll::Pending,
            }
        })
        .await;
    }
}

/// The end of this process, if it is on its way.
pub(super) struct SecondSignal(Arc<AtomicBool>);

impl SecondSignal {
    /// Waits for it: with their ring the guests have come to an end as well, which looks like a graceful one.
    pub(super) fn wait_if_come(&self) {
        while self.0.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
