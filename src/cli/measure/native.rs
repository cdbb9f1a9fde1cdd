//! Native programs that do what the built-in guest does: the baselines without WebAssembly.

mod floor;
mod on_std;
mod on_tokio;
mod on_tokio_uring;

use std::io;

use tokio::task::JoinHandle;

use super::source::{Source, wait};
use super::{Bench, Named, Sample, Stopwatch};
use crate::benches::{BYTES_MAX, Operation, REQUEST_BYTES};
use wasi_uring::Recycle;

/// What a native program is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Native {
    /// The standard library's sockets, epoll(7), sendmmsg(2) and recvmmsg(2).
    Std,
    /// tokio's `UdpSocket`, a task per guest.
    Tokio,
    /// tokio-uring's `UdpSocket`, a task per guest.
    TokioUring,
    /// This crate's ring by itself.
    Floor,
}

impl Native {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Std => "std",
            Self::Tokio => "tokio",
            Self::TokioUring => "tokio-uring",
            Self::Floor => "floor",
        }
    }

    /// Measures a program that does something so often for each guest; `None` if there is none.
    pub(super) fn run(self, setting: &Setting<'_>, count: usize) -> io::Result<Option<Sample>> {
        let Some(mut program) = self.program(setting)? else {
            return Ok(None);
        };
        let enters = program.enters();
        let named = Named::after(self.name());
        let stopwatch = Stopwatch::start();
        program.run(count)?;
        let mut sample = stopwatch.sample();
        drop(named);
        sample.enters = program.enters().zip(enters).map(|(after, before)| after - before);
        Ok(Some(sample))
    }

    /// What guests do once, before they begin to count, is done when this returns.
    fn program(self, setting: &Setting<'_>) -> io::Result<Option<Box<dyn Program>>> {
        match self {
            Self::Std => on_std::program(setting),
            Self::Tokio => on_tokio::program(setting),
            Self::TokioUring => on_tokio_uring::program(setting),
            Self::Floor => floor::program(setting),
        }
    }
}

/// What a program is to do, and with what.
pub(super) struct Setting<'a> {
    pub(super) bench: &'a Bench,
    pub(super) guests: usize,
    /// Of the floor.
    pub(super) ring: RingArgs,
    /// Of what is only received.
    pub(super) source: &'a Source,
}

/// The ring that the floor is to have.
#[derive(Clone, Copy, Debug)]
pub(super) struct RingArgs {
    pub(super) sockets: u32,
    pub(super) recycle: Recycle,
}

trait Program {
    /// As often for each guest.
    fn run(&mut self, count: usize) -> io::Result<()>;

    /// `io_uring_enter` calls so far, if they are counted.
    fn enters(&self) -> Option<u64> {
        None
    }
}

/// What is sent. The kernel may read it where it lies, and it lies there for ever.
static ZEROS: [u8; BYTES_MAX] = [0; BYTES_MAX];

/// The error of a datagram that is not as long as it was sent.
fn expect_bytes(received: usize, sent: usize) -> io::Result<()> {
    if received == sent {
        return Ok(());
    }
    Err(io::Error::other(format!("{received} of a datagram's {sent} bytes")))
}

/// So many guests, prepared one after the other.
async fn prepare_all<G>(
    guests: usize,
    guest: impl AsyncFn(usize) -> io::Result<G>,
) -> io::Result<Vec<G>> {
    let mut prepared = Vec::with_capacity(guests);
    for at in 0..guests {
        prepared.push(guest(at).await?);
    }
    Ok(prepared)
}

/// Waits for the guests of some tasks, which come back so that taking them down is not measured.
async fn join_all<G>(tasks: Vec<JoinHandle<io::Result<G>>>) -> io::Result<Vec<G>> {
    let mut guests = Vec::with_capacity(tasks.len());
    for task in tasks {
        guests.push(task.await??);
    }
    Ok(guests)
}
