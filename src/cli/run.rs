//! `wasi-uring run`: N instances of a component at once.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use indicatif::ProgressBar;
use tokio::task::JoinSet;
use wasi_uring::limits::SOCKETS_MAX;
use wasi_uring::{SetupError, Uring};
use wasmtime::error::Context;
use wasmtime_wasi::{WasiCtx, WasiCtxBuilder};

use crate::args::{RunArgs, RuntimeArg};
use crate::ending::ClosesOnSignal;
use crate::host::{self, Backend, GuestConfig, Net, Program};
use crate::open_files;
use crate::terminal::{Failure, say};

/// Failures worth a line each.
const FAILURES_TOLD_MAX: usize = 10;

pub(crate) fn run(args: &RunArgs) -> Result<ExitCode, Failure> {
    // First: a large guest takes a while to compile, in vain where there is no ring.
    let plan = Plan::new(args);
    let uring = host::choose(args.backend, || plan.build())?;
    let backend = if uring.is_some() { Backend::Uring } else { Backend::Stock };
    let progress = ProgressBar::new_spinner();
    progress.set_message(format!("compiling {}", args.file.display()));
    progress.enable_steady_tick(Duration::from_millis(100));
    let compiled = host::load(&args.file).map_err(Failure::usage);
    progress.finish_and_clear();
    let compiled = compiled?;

    let closes_on_signal = ClosesOnSignal::new(uring.as_ref())?;
    let program = Arc::new(Program::link(&compiled, backend)?);
    let failures = match args.runtime {
        RuntimeArg::MultiThread => {
            let all = (0..args.guests.get()).collect();
            tokio::runtime::Builder::new_multi_thread()
                .worker_threads(plan.threads)
                .enable_all()
                .build()
                .context("cannot start a runtime")
                .map_err(Failure::run)?
                .block_on(run_guests(&plan, &program, uring.as_ref(), &Net::new(args.net), all))
        }
        RuntimeArg::PerCore | RuntimeArg::TokioUring => {
            run_per_thread(&plan, &program, uring.as_ref())?
        }
    };
    closes_on_signal.as_ref().inspect(|closes| closes.wait_if_begun());
    for failure in failures.iter().take(FAILURES_TOLD_MAX) {
        say(failure);
    }
    if failures.len() > FAILURES_TOLD_MAX {
        say(format_args!("and {} more guests failed", failures.len() - FAILURES_TOLD_MAX));
    }
    if args.stats {
        // The line is for programs, so nothing stands before it; and stderr may be gone.
        let _ = writeln!(std::io::stderr(), "{}", stats_line(uring.as_ref()));
    }
    Ok(if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// How guests are spread over threads, and sockets over guests.
struct Plan<'a> {
    args: &'a RunArgs,
    /// And rings, one for each.
    threads: usize,
    sockets: u32,
    sockets_per_guest: u32,
}

impl<'a> Plan<'a> {
    fn new(args: &'a RunArgs) -> Self {
        let guests = u32::try_from(args.guests.get()).unwrap_or(u32::MAX);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = args.threads.map_or(cores, usize::from).min(args.guests.get());
        // Each of wasmtime-wasi's sockets is a file.
        open_files::raise_limit();
        let usual = || guests.saturating_mul(256).clamp(4096, SOCKETS_MAX / 2);
        let sockets = args.sockets.unwrap_or_else(usual);
        let sockets_per_guest = (sockets / guests).max(1);
        // A socket keeps its slot until the kernel has let go of it; in the meantime its guest may
        // open another.
        let with_closing = sockets.saturating_mul(2).min(SOCKETS_MAX);
        Self { args, threads, sockets: with_closing.max(sockets), sockets_per_guest }
    }

    fn build(&self) -> Result<Uring, SetupError> {
        let recycle = self.args.recycle.limits();
        Uring::builder().sockets(self.sockets).rings(self.threads).recycle(recycle).build()
    }

    fn wasi(&self, guest: usize) -> WasiCtxBuilder {
        let mut wasi = WasiCtx::builder();
        wasi.arg(self.args.file.to_string_lossy()).args(&self.args.args).envs(&self.args.envs);
        if guest == 0 {
            wasi.inherit_stdio();
        }
        wasi
    }
}

/// A thread and a current-thread runtime for each share of the guests.
fn run_per_thread(
    plan: &Plan<'_>,
    program: &Arc<Program>,
    uring: Option<&Uring>,
) -> Result<Vec<String>, Failure> {
    let net = Net::new(plan.args.net);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..plan.threads)
            .map(|thread| {
                let net = &net;
                let mine = (thread..plan.args.guests.get()).step_by(plan.threads).collect();
                scope.spawn(move || {
                    let guests = run_guests(plan, program, uring, net, mine);
                    if plan.args.runtime == RuntimeArg::TokioUring {
                        let runtime = tokio_uring::Runtime::new(&tokio_uring::builder()).context(
                            "cannot start a tokio-uring runtime, which is an io_uring itself; \
                             --runtime per-core needs none",
                        )?;
                        return Ok(runtime.block_on(guests));
                    }
                    let runtime = tokio::runtime::Builder::new_current_thread()
                        .enable_all()
                        .build()
                        .context("cannot start a runtime")?;
                    Ok(runtime.block_on(guests))
                })
            })
            .collect();
        let mut failures = Vec::new();
        for thread in threads {
            let ended: wasmtime::Result<Vec<String>> = thread
                .join()
                .map_err(|_| Failure::run(wasmtime::format_err!("a guest thread panicked")))?;
            failures.extend(ended.map_err(Failure::run)?);
        }
        Ok(failures)
    })
}

/// Runs guests as tasks of the current runtime; what went wrong, one line each.
async fn run_guests(
    plan: &Plan<'_>,
    program: &Arc<Program>,
    uring: Option<&Uring>,
    net: &Net,
    guests: Vec<usize>,
) -> Vec<String> {
    let mut tasks = JoinSet::new();
    for guest in guests {
        let (program, uring, net) = (Arc::clone(program), uring.cloned(), net.clone());
        let mut wasi = plan.wasi(guest);
        net.configure(&mut wasi);
        let sockets_max = plan.sockets_per_guest;
        tasks.spawn(async move {
            let config = GuestConfig { wasi, net: &net, uring: uring.as_ref(), sockets_max };
            let ended = match program.instantiate(config).await {
                Ok(mut instance) => instance.run().await,
                Err(error) => Err(error.context("cannot be instantiated")),
            };
            ended.map_err(|error| format!("guest {guest} {error:#}"))
        });
    }
    let mut failures = Vec::new();
    while let Some(ended) = tasks.join_next().await {
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(failure)) => failures.push(failure),
            Err(panic) => failures.push(format!("a guest's task ended: {panic}")),
        }
    }
    failures
}

pub(crate) fn stats_line(uring: Option<&Uring>) -> serde_json::Value {
    let Some(stats) = uring.map(Uring::stats) else {
        return serde_json::json!({ "backend": Backend::Stock.name() });
    };
    let closed = stats.closed_instead;
    serde_json::json!({
                "backend": Backend::Uring.name(),
                "rings": stats.rings,
                "enters": stats.enters,
                "enters_overdue": stats.enters_overdue,
                "interrupts": stats.interrupts,
                "submissions": stats.submissions,
                "completions": stats.completions,
                "sockets_created": stats.sockets_created,
                "sockets_open": stats.sockets_open,
                "sockets_recycled": stats.sockets_recycled,
                "sockets_cached": stats.sockets_cached,
                "closed_instead": {
                    "named_port": closed.named_port,
                    "options": closed.options,
                    "connected": closed.connected,
                    "error": closed.error,
                    "busy": closed.busy,
                    "no_room": closed.no_room,
                    "unread": closed.unread,
                    "unclean": closed.unclean,
                    "idle": closed.idle,
                },
                "datagrams_sent": stats.datagrams_sent,
                "datagrams_coalesced": stats.datagrams_coalesced,
                "datagrams_deferred": stats.datagrams_deferred,
                "gso_refusals": stats.gso_refusals,
                "bytes_sent": stats.bytes_sent,
                "datagrams_received": stats.datagrams_received,
                "datagrams_split": stats.datagrams_split,
                "bytes_received": stats.bytes_received,
                "rearms": stats.rearms,
                "pauses": stats.pauses,
                "drops": {
                    "policy": stats.dropped_by_policy,
                    "not_from_peer": stats.dropped_not_from_peer,
                    "at_close": stats.dropped_at_close,
                    "kernel": stats.dropped_by_kernel,
                    "queue": stats.dropped_by_queue,
                    "malformed": stats.dropped_malformed,
                },
    })
}
