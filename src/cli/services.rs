//! Services without WebAssembly, which `scripts/services` measures beside guests that do the same
//! (tests/guests/services), and the collector that both send their statistics to.

mod collector;
#[expect(unreachable_pub, reason = "guests are built with this file, too, as one of another crate")]
mod dns;
mod forwarder;
#[expect(unreachable_pub, reason = "guests are built with this file, too, as one of another crate")]
mod line;
mod source;
mod web;

use std::fs::File;
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::ExitCode;
use std::thread;

use tokio::net::UdpSocket;
use wasmtime::error::Context;

use crate::args::NativeService;
use crate::open_files;
use crate::terminal::Failure;

/// On a port that the kernel chooses.
const ANY: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);

/// Runs one, most of them until they are killed.
pub(crate) fn run(service: &NativeService) -> Result<ExitCode, Failure> {
    open_files::raise_limit();
    let ended = match *service {
        NativeService::Forward { listen, upstream, threads } => {
            on_threads(threads, || forwarder::run(listen, upstream))
        }
        NativeService::Web { listen, resolver } => on_threads(1, || web::run(listen, resolver)),
        NativeService::Source { collector, sources, bursts, lines, pause_millis } => {
            let load = line::Load { bursts, lines, pause_millis };
            on_threads(1, || source::run(collector, sources, load))
        }
        NativeService::Collect { listen } => collector::run(listen),
    };
    let ended: wasmtime::Result<()> = ended.context("a native service ended");
    ended.map(|()| ExitCode::SUCCESS).map_err(Failure::run)
}

/// Has each of so many threads do the same on a current-thread runtime of its own, as `run` has
/// guests.
fn on_threads<F>(threads: u16, service: impl Fn() -> F + Sync) -> io::Result<()>
where
    F: Future<Output = io::Result<()>>,
{
    let on_this = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(tokio::task::LocalSet::new().run_until(service()))
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(on_this)).collect();
        threads.into_iter().try_for_each(|thread| {
            thread.join().map_err(|_| io::Error::other("a thread panicked"))?
        })
    })
}

async fn connected(peer: SocketAddrV4) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(ANY).await?;
    socket.connect(peer).await?;
    Ok(socket)
}

/// So many bytes that cannot be guessed.
fn random(count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.unwrap_or_else(|error| panic!("no randomness for ids: {error}"));
    bytes
}
