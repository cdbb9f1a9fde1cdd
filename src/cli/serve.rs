//! `wasi-uring serve`: an HTTP server whose answers are a guest's, each in a store of its own.

mod answer;
pub(crate) mod connections;
mod epochs;
mod measured;
mod program;
mod request;
mod signals;
mod state;

use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::server::graceful::GracefulShutdown;
use indicatif::ProgressBar;
use wasi_uring::limits::{SOCKETS_DEFAULT, SOCKETS_MAX};
use wasi_uring::{SetupError, Uring};
use wasmtime::error::Context;
use wasmtime::format_err;

use crate::args::ServeArgs;
use crate::host;
use crate::open_files;
use crate::run;
use crate::terminal::{Failure, say};

use measured::Measured;
use program::{Program, Settings};
use request::Server;
use signals::ToldToEnd;

/// How long the runtime's threads may take to stop when all is over. Guests' tasks stop within a tick; what
/// blocks a thread of its own, such as a guest's read of a file, is left behind.
const THREADS_END: Duration = Duration::from_secs(1);

pub(crate) fn serve(args: &ServeArgs) -> Result<ExitCode, Failure> {
    // What fails at once is tried before the guest is compiled, which may take a while.
    let listener = listen("--addr", args.addr)?;
    let measured = match args.metrics_addr {
        Some(addr) => Some((Measured::new()?, listen("--metrics-addr", addr)?)),
        None => None,
    };
    let sockets = Sockets::new(args);
    let uring = host::choose(args.backend, || build(args, &sockets))?;
    let uring = uring.as_ref();

    let progress = ProgressBar::new_spinner();
    progress.set_message(format!("compiling {}", args.file.display()));
    progress.enable_steady_tick(Duration::from_millis(100));
    let program = Program::load(&Settings { args, uring, sockets_max: sockets.per_guest });
    progress.finish_and_clear();
    let server = Arc::new(Server::new(program?, args)?);

    let told = ToldToEnd::new(uring)?;
    let second_signal = told.second();
    let mut threads = tokio::runtime::Builder::new_multi_thread();
    if let Some(number) = args.threads {
        threads.worker_threads(number.get());
    }
    let runtime =
        threads.enable_all().build().context("cannot start a runtime").map_err(Failure::run)?;
    let guard = runtime.enter();
    if let Some((measured, listener)) = measured {
        announce("metrics at", &listener, "/metrics")?;
        let (server, uring) = (Arc::clone(&server), uring.cloned());
        runtime.spawn(measured.serve(into_tokio(listener)?, server, uring));
    }
    announce("serving", &listener, "/")?;
    let listener = into_tokio(listener)?;
    drop(guard);
    // On a worker, where what it spawns is at hand.
    let serving = runtime.spawn(until_told(listener, Arc::clone(&server), told, args.grace.0));
    let ended = runtime
        .block_on(serving)
        .map_err(|panic| Failure::run(format_err!("the server ended: {panic}")))?;
    second_signal.wait_if_come();
    runtime.shutdown_timeout(THREADS_END);

    let code = match ended {
        Ended::Finished => ExitCode::SUCCESS,
        Ended::Cut(guests) => {
            say(format_args!(
                "{guests} guests were ended, and what else was asked for, after {}; --grace gives longer",
                args.grace,
            ));
            ExitCode::from(1)
        }
    };
    if args.stats {
        let mut line = run::stats_line(uring);
        line["requests"] = server.counts();
        // The line is for programs, so nothing stands before it; and stderr may be gone.
        let _ = writeln!(std::io::stderr(), "{line}");
    }
    if let Some(uring) = uring {
        uring.close();
    }
    Ok(code)
}

/// How the server came to its end.
enum Ended {
    /// Everyone who had asked was answered.
    Finished,
    /// Time ran out for so many guests.
    Cut(usize),
}

/// Serves connections until this process is told to end, and then what they have asked for, if that does not take too
/// long.
async fn until_told(
    listener: tokio::net::TcpListener,
    server: Arc<Server>,
    told: ToldToEnd,
    grace: Duration,
) -> Ended {
    let connections = GracefulShutdown::new();
    let accepting = connections::accept(&listener, |stream| {
        let server = Arc::clone(&server);
        let serving = connections::serve(stream, connections.watcher(), move |request| {
            let server = Arc::clone(&server);
            async move { server.answer(request).await }
        });
        tokio::spawn(serving);
    });
    told.interrupts(accepting).await;
    // From now on nobody can connect. Connections close when they are idle.
    drop(listener);
    let finishing = async {
        connections.shutdown().await;
        // A guest may go on when it has answered.
        server.without_guests().await;
    };
    match tokio::time::timeout(grace, finishing).await {
        Ok(()) => Ended::Finished,
        Err(_) => Ended::Cut(server.guests()),
    }
}

/// How many sockets there may be.
struct Sockets {
    per_guest: u32,
    /// Of the ring's tables. A socket that is closed keeps its slot until the kernel has let go of it; in the meantime its
    /// guest may open another.
    slots: u32,
}

impl Sockets {
    fn new(args: &ServeArgs) -> Self {
        // Connections are files, and so is each of wasmtime-wasi's sockets.
        open_files::raise_limit();
        let sockets = args.sockets.unwrap_or(SOCKETS_DEFAULT);
        let per_guest = (sockets / args.requests_max).max(1);
        Self { per_guest, slots: sockets.saturating_mul(2).min(SOCKETS_MAX) }
    }
}

fn build(args: &ServeArgs, sockets: &Sockets) -> Result<Uring, SetupError> {
    let mut uring = Uring::builder().sockets(sockets.slots).recycle(args.recycle.limits());
    // A ring for each worker, if they are not as many as processors.
    if let Some(threads) = args.threads {
        uring = uring.rings(threads.get());
    }
    uring.build()
}

fn listen(option: &str, addr: SocketAddr) -> Result<TcpListener, Failure> {
    TcpListener::bind(addr).map_err(|error| {
        let kind = error.kind();
        let remedy = if kind == ErrorKind::AddrInUse {
            "another process listens there; end it, or listen elsewhere"
        } else if kind == ErrorKind::AddrNotAvailable {
            "this machine does not have this address; give one that it has"
        } else if kind == ErrorKind::PermissionDenied {
            "ports below 1024 take CAP_NET_BIND_SERVICE; give a higher one"
        } else {
            "give another one"
        };
        Failure::usage(format_err!("cannot listen on {addr}: {error}; {remedy} ({option})"))
    })
}

/// Says where a listener is, because its port may have been left to the kernel.
fn announce(what: &str, listener: &TcpListener, path: &str) -> Result<(), Failure> {
    let addr = listener.local_addr().context("cannot tell its own address");
    say(format_args!("{what} http://{}{path}", addr.map_err(Failure::run)?));
    Ok(())
}

/// Takes a runtime to be entered.
fn into_tokio(listener: TcpListener) -> Result<tokio::net::TcpListener, Failure> {
    listener
        .set_nonblocking(true)
        .and_then(|()| tokio::net::TcpListener::from_std(listener))
        .context("cannot listen")
        .map_err(Failure::run)
}
