//! Many sockets in one process, and how many receive buffers they need between them.
//!
//! Each measurement is a process of its own, so that none finds memory that another has left behind, and
//! each sets itself a limit of open files, which bounds wasmtime-wasi's sockets and a ring's table.

mod crowd;
mod flows;

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use wasmtime::error::Context;
use wasmtime::{bail, format_err};

pub(crate) use self::crowd::{Crowd, Outcome};
pub(crate) use self::flows::REQUESTS_UNDER_WAY;
use super::idle::settled_slab;
use super::{Backend, Summary, WasiArg};
use crate::args::CrowdArgs;
use crate::open_files;
use crate::terminal::{Failure, print};

/// Sockets by default of the most that one process has; others have a hundredth, and the sweep of buffers a tenth.
pub(crate) const SOCKETS_DEFAULT: usize = 100_000;

/// Sockets for each open file that the limit allows.
const SOCKETS_PER_FILE: usize = 5;

/// Sockets of a guest.
const SOCKETS_PER_GUEST: usize = 100;

/// Receive buffers of a ring.
pub(crate) const BUFFERS: [u16; 6] = [16, 64, 128, 256, 512, 1024];

/// What some processes with the same sockets took, round by round.
pub(crate) struct Figures {
    pub(crate) crowd: Crowd,
    pub(crate) rounds: Vec<Outcome>,
}

impl Figures {
    /// Some quantity of a round.
    pub(crate) fn summary(&self, of: impl Fn(&Outcome) -> f64) -> Summary {
        Summary::of(self.rounds.iter().map(of))
    }

    /// The same for each socket.
    pub(crate) fn per_socket(&self, of: impl Fn(&Outcome) -> f64) -> Summary {
        #[expect(clippy::cast_precision_loss, reason = "thousands")]
        let sockets = self.crowd.sockets() as f64;
        self.summary(|outcome| of(outcome) / sockets)
    }

    /// The same for each request that was answered.
    pub(crate) fn per_request(&self, of: impl Fn(&Outcome) -> f64) -> Summary {
        #[expect(clippy::cast_precision_loss, reason = "thousands")]
        self.summary(|outcome| {
            of(outcome) / (outcome.traffic.requests - outcome.traffic.lost) as f64
        })
    }
}

/// So many sockets of guests with at most a hundred each.
fn crowd(wasi: WasiArg, backend: Backend, sockets: usize, open_files: u64) -> Crowd {
    let sockets_per_guest = sockets.clamp(1, SOCKETS_PER_GUEST);
    let guests = sockets / sockets_per_guest;
    Crowd { wasi, backend, guests, sockets_per_guest, open_files, buffers: None, requests: 0 }
}

/// Both backends with few sockets, and with as many as wasmtime-wasi can have; the ring with all; and wasmtime-wasi
/// with what the hard limit allows, if that is more.
pub(crate) fn crowds(wasi: WasiArg, sockets: usize) -> Vec<Crowd> {
    let hard = open_files::raise_limit();
    let limit = ((sockets / SOCKETS_PER_FILE) as u64).max(open_files::SPARE * 2).min(hard);
    let reached = |limit: u64| {
        let most = usize::try_from(limit - open_files::SPARE).unwrap_or(usize::MAX);
        sockets.min(most)
    };
    let few = (sockets / 100).max(1);
    let mut crowds = vec![
        crowd(wasi, Backend::Stock, few, limit),
        crowd(wasi, Backend::Uring, few, limit),
        crowd(wasi, Backend::Stock, reached(limit), limit),
        crowd(wasi, Backend::Uring, reached(limit), limit),
    ];
    if reached(hard) > reached(limit) {
        crowds.push(crowd(wasi, Backend::Stock, reached(hard), hard));
    }
    crowds.push(crowd(wasi, Backend::Uring, sockets, limit));
    for crowd in &mut crowds {
        crowd.requests = sockets / 2;
    }
    crowds
}

/// Rings with few and many buffers, and wasmtime-wasi.
pub(crate) fn sweep(wasi: WasiArg, sockets: usize) -> Vec<Crowd> {
    let limit = open_files::raise_limit();
    let of = |backend, buffers| Crowd {
        buffers,
        requests: sockets / 2,
        ..crowd(wasi, backend, (sockets / 10).max(1), limit)
    };
    let rings = BUFFERS.into_iter().map(|buffers| of(Backend::Uring, Some(buffers)));
    std::iter::once(of(Backend::Stock, None)).chain(rings).collect()
}

/// Measures each in turn, round by round, every other one backwards. `command` is `wasi-uring`; `step` is called
/// after each.
pub(crate) fn measure(
    command: &Path,
    crowds: Vec<Crowd>,
    rounds: usize,
    step: impl Fn(),
) -> wasmtime::Result<Vec<Figures>> {
    let none = |crowd| Figures { crowd, rounds: Vec::new() };
    let mut figures: Vec<_> = crowds.into_iter().map(none).collect();
    for round in 0..rounds {
        let mut in_turn: Vec<_> = figures.iter_mut().collect();
        if round % 2 == 1 {
            in_turn.reverse();
        }
        for Figures { crowd, rounds } in in_turn {
            let outcome = apart(command, crowd)?;
            tracing::debug!(?crowd, ?outcome);
            rounds.push(outcome);
            step();
        }
    }
    Ok(figures)
}

/// What a process of its own takes.
fn apart(command: &Path, crowd: &Crowd) -> wasmtime::Result<Outcome> {
    // What the last one leaves goes after its end.
    settled_slab()?;
    let said = Command::new(command)
        .args(["crowd", &serde_json::to_string(crowd)?])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {}", command.display()))?;
    let (name, sockets) = (crowd.backend.name(), crowd.sockets());
    if !said.status.success() {
        bail!("{sockets} sockets of {name} {} failed", crowd.wasi.version());
    }
    serde_json::from_slice(&said.stdout)
        .with_context(|| format!("{sockets} sockets of {name} gave no figures"))
}

/// `wasi-uring crowd`, which [`apart`] runs.
pub(crate) fn print_outcome(args: &CrowdArgs) -> Result<ExitCode, Failure> {
    let crowd: Crowd = serde_json::from_str(&args.crowd)
        .context("crowd takes JSON that `bench density` makes")
        .map_err(Failure::usage)?;
    // As hosts' guests are, on a thread that is not the first: there wasmtime-wasi's 64 KiB for a receive come from
    // memory of malloc's that is zero already, and are not touched.
    let outcome = std::thread::spawn(move || crowd.run()).join();
    let outcome = outcome.map_err(|_| Failure::run(format_err!("the guests' thread panicked")))?;
    let outcome = outcome.map_err(Failure::run)?;
    print(serde_json::to_string(&outcome).map_err(Failure::run)?);
    Ok(ExitCode::SUCCESS)
}
