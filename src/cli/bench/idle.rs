//! `wasi-uring bench idle`: the memory of sockets that wait for datagrams.
//!
//! Each measurement is a process of its own, `wasi-uring run`, so that none finds memory that
//! another has left behind.

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use wasmtime::bail;
use wasmtime::error::Context;

use super::super::WasiArg;
use super::super::host::Backend;
use super::super::measure::{Summary, life};
use super::BACKENDS;

/// Sockets that one guest holds unless told otherwise, descriptors permitting.
pub(super) const SOCKETS_DEFAULT: usize = 10_000;

/// How long a guest may take to open its sockets.
const PATIENCE: Duration = Duration::from_mins(1);

/// Bytes per receiving socket.
pub(super) struct Figures {
    pub(super) backend: Backend,
    /// Resident memory of the process.
    pub(super) process: Summary,
    /// The kernel's slab.
    pub(super) kernel: Summary,
}

/// What some sockets took, in bytes.
struct Taken {
    process: f64,
    kernel: f64,
}

/// Measures both backends in turn, round by round: many sockets less one.
pub(super) fn measure(
    wasi: WasiArg,
    sockets: usize,
    rounds: usize,
    step: impl Fn(),
) -> wasmtime::Result<[Figures; 2]> {
    let mut per_socket = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        for (backend, per_socket) in BACKENDS.into_iter().zip(&mut per_socket) {
            let (one, many) = (hold(wasi, backend, 1)?, hold(wasi, backend, sockets)?);
            step();
            #[expect(clippy::cast_precision_loss, reason = "thousands")]
            let others = (sockets - 1) as f64;
            per_socket.push(Taken {
                process: (many.process - one.process) / others,
                kernel: (many.kernel - one.kernel) / others,
            });
        }
    }
    let figures = |backend, per_socket: &[Taken]| Figures {
        backend,
        process: Summary::of(per_socket.iter().map(|taken| taken.process)),
        kernel: Summary::of(per_socket.iter().map(|taken| taken.kernel)),
    };
    let [stock, uring] = per_socket;
    Ok([figures(Backend::Stock, &stock), figures(Backend::Uring, &uring)])
}

/// What a process with so many sockets takes.
fn hold(wasi: WasiArg, backend: Backend, sockets: usize) -> wasmtime::Result<Taken> {
    let host = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    host.set_read_timeout(Some(PATIENCE))?;
    let kernel_before = settled_slab()?;
    let mut child = Holder(
        Command::new(std::env::current_exe()?)
            .args(["run", "--threads", "1", "--backend", backend.name()])
            .args(["--sockets", &sockets.to_string(), "/dev/stdin", "hold"])
            .args([sockets.to_string(), host.local_addr()?.port().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?,
    );
    child.0.stdin.take().context("no stdin")?.write_all(life(wasi).as_bytes())?;
    if host.recv_from(&mut [0; 64]).is_err() {
        bail!("{} guest with {sockets} sockets did not get ready", backend.name());
    }
    let status = format!("/proc/{}/status", child.0.id());
    let (process, kernel) = (proc_bytes(&status, "RssAnon")?, proc_bytes("/proc/meminfo", "Slab")?);
    Ok(Taken { process, kernel: kernel - kernel_before })
}

/// The kernel's slab, once it has taken down what ended before: a ring goes after its process.
fn settled_slab() -> wasmtime::Result<f64> {
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

/// Ends with whoever measures it.
struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A field of a file in `/proc` that is given in kilobytes.
fn proc_bytes(path: &str, name: &str) -> wasmtime::Result<f64> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    let kilobytes = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.strip_suffix("kB"))
        .with_context(|| format!("{path} has no {name}"))?;
    Ok(kilobytes.trim().parse::<f64>()? * 1024.0)
}
