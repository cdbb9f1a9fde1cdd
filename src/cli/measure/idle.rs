//! The memory of sockets that are bound, and of those that wait for datagrams.
//!
//! Each measurement is a process of its own, `wasi-uring run`, so that none finds memory that
//! another has left behind.

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use wasmtime::bail;
use wasmtime::error::Context;

use super::{Backend, Summary, WasiArg, built_in_guest};

/// Sockets that one guest holds by default, open files permitting.
pub const SOCKETS_DEFAULT: usize = 10_000;

/// How long a guest may take to open its sockets.
const PATIENCE: Duration = Duration::from_mins(1);

/// What the sockets do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idleness {
    /// They are bound, and that is all.
    Bound,
    /// A receive is armed on each.
    Receiving,
}

impl Idleness {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Bound, Self::Receiving];

    /// As a table or a bench has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bound => "bound",
            Self::Receiving => "receiving",
        }
    }

    /// The mode of the built-in guest.
    fn mode(self) -> &'static str {
        match self {
            Self::Bound => "bound",
            Self::Receiving => "await",
        }
    }
}

/// What sockets take, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    /// Resident memory of the process.
    pub process: f64,
    /// The kernel's slab, of the whole machine.
    pub kernel: f64,
}

/// What a socket of either backend takes, round by round.
#[derive(Debug)]
pub struct Idle {
    /// The version of its guest.
    pub wasi: WasiArg,
    /// Whose it is.
    pub backend: Backend,
    /// How many the guest has of them.
    pub sockets: usize,
    /// What it does.
    pub idleness: Idleness,
    /// What it takes.
    pub rounds: Vec<Taken>,
}

impl Idle {
    /// Resident memory of the process.
    pub(crate) fn process(&self) -> Summary {
        Summary::of(self.rounds.iter().map(|taken| taken.process))
    }

    /// The kernel's slab.
    pub(crate) fn kernel(&self) -> Summary {
        Summary::of(self.rounds.iter().map(|taken| taken.kernel))
    }

    /// What a socket takes of a guest that has so many: theirs less those of a guest with one.
    fn per_socket(&self, command: &Path) -> wasmtime::Result<Taken> {
        let (one, many) = (self.hold(command, 1)?, self.hold(command, self.sockets)?);
        #[expect(clippy::cast_precision_loss, reason = "thousands")]
        let others = (self.sockets - 1) as f64;
        Ok(Taken {
            process: (many.process - one.process) / others,
            kernel: (many.kernel - one.kernel) / others,
        })
    }

    /// What a process with so many sockets takes.
    fn hold(&self, command: &Path, sockets: usize) -> wasmtime::Result<Taken> {
        let host = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        host.set_read_timeout(Some(PATIENCE))?;
        let kernel_before = settled_slab()?;
        let mut child = Holder(
            Command::new(command)
                .args(["run", "--threads", "1", "--backend", self.backend.name()])
                .args(["--sockets", &sockets.to_string(), "/dev/stdin", self.idleness.mode()])
                .args([sockets.to_string(), host.local_addr()?.port().to_string()])
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .spawn()?,
        );
        child
            .0
            .stdin
            .take()
            .context("no stdin")?
            .write_all(built_in_guest(self.wasi).as_bytes())?;
        if host.recv_from(&mut [0; 64]).is_err() {
            bail!("{} guest with {sockets} sockets did not get ready", self.backend.name());
        }
        let status = format!("/proc/{}/status", child.0.id());
        let (process, kernel) =
            (proc_bytes(&status, "RssAnon")?, proc_bytes("/proc/meminfo", "Slab")?);
        Ok(Taken { process, kernel: kernel - kernel_before })
    }
}

/// Measures both backends in turn. `command` is `wasi-uring`; `step` is called after each.
///
/// # Errors
///
/// If `command` does not run, or `/proc` cannot be read.
pub fn measure(
    command: &Path,
    wasi: WasiArg,
    sockets: usize,
    rounds: usize,
    step: impl Fn(),
) -> wasmtime::Result<Vec<Idle>> {
    let mut idle = Vec::new();
    for idleness in Idleness::ALL {
        let none = |backend| Idle { wasi, backend, sockets, idleness, rounds: Vec::new() };
        idle.extend(Backend::ALL.map(none));
    }
    for _ in 0..rounds {
        for one in &mut idle {
            let taken = one.per_socket(command)?;
            one.rounds.push(taken);
            step();
        }
    }
    Ok(idle)
}

/// The kernel's slab, once it has taken down what ended before: a ring goes after its process.
pub(super) fn settled_slab() -> wasmtime::Result<f64> {
    let mut before = proc_bytes("/proc/meminfo", "Slab")?;
    for _ in 0..SETTLE_ROUNDS_MAX {
        std::thread::sleep(SETTLE);
        let now = proc_bytes("/proc/meminfo", "Slab")?;
        if now + SETTLED_BYTES > before {
            return Ok(now);
        }
        before = now;
    }
    Ok(before)
}

const SETTLE: Duration = Duration::from_millis(100);
const SETTLE_ROUNDS_MAX: u32 = 50;
const SETTLED_BYTES: f64 = 65_536.0;

/// A process that holds the sockets, killed when its measurement ends.
struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A field of a file in `/proc` that is given in kilobytes.
pub(super) fn proc_bytes(path: &str, name: &str) -> wasmtime::Result<f64> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    let kilobytes = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.strip_suffix("kB"))
        .with_context(|| format!("{path} has no {name}"))?;
    Ok(kilobytes.trim().parse::<f64>()? * 1024.0)
}
