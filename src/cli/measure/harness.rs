//! Every implementation that is measured, ready to run.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::future::poll_fn;
use std::num::NonZeroUsize;
use std::pin::pin;
use std::sync::Arc;

use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use wasi_uring::{Recycle, Uring};
use wasmtime::format_err;
use wasmtime_wasi::WasiCtx;

use super::native::{RingArgs, Setting};
use super::source::Source;
use super::{
    Backend, Bench, Implementation, Named, Sample, Stopwatch, WasiArg, Work, built_in_guest,
};
use crate::args::NetArg;
use crate::host::{Compiled, GuestConfig, Net, Program};
use crate::open_files;
use crate::terminal::{Failure, say};

/// Slots of the ring measured: room for ten thousand guests with a socket each, files permitting,
/// and some files are left for recycled sockets.
const SOCKETS_MAX: u32 = 11_264;

/// All implementations, ready to run.
pub struct Harness {
    p2: Guests,
    p3: Guests,
    uring: Uring,
    args: RingArgs,
}

/// The guest of one WASI version, on each backend.
struct Guests {
    stock: Arc<Program>,
    uring: Arc<Program>,
}

impl Guests {
    fn new(wasi: WasiArg) -> wasmtime::Result<Self> {
        let compiled = Compiled::new(built_in_guest(wasi).as_bytes())?;
        let link = |backend| Ok::<_, Failure>(Arc::new(Program::link(&compiled, backend)?));
        Ok(Self { stock: link(Backend::Stock)?, uring: link(Backend::Uring)? })
    }
}

impl Harness {
    /// Compiles the guests and builds rings for so many threads.
    ///
    /// # Errors
    ///
    /// If no ring can be built here.
    pub fn new(recycle: Recycle, threads: NonZeroUsize) -> wasmtime::Result<Self> {
        if Backtrace::capture().status() == BacktraceStatus::Captured {
            say(
                "with backtraces on, stock is slower than it need be: set RUST_BACKTRACE=0 and RUST_LIB_BACKTRACE=0",
            );
        }
        let files = u32::try_from(open_files::raise_limit()).unwrap_or(u32::MAX);
        let sockets = SOCKETS_MAX.min(files);
        let uring =
            Uring::builder().sockets(sockets).rings(threads.get()).recycle(recycle).build()?;
        Ok(Self {
            p2: Guests::new(WasiArg::P2)?,
            p3: Guests::new(WasiArg::P3)?,
            uring,
            args: RingArgs { sockets, recycle },
        })
    }

    pub(crate) fn uring(&self) -> &Uring {
        &self.uring
    }

    fn enters(&self) -> u64 {
        self.uring.stats().enters
    }

    pub(crate) fn program(&self, wasi: WasiArg, backend: Backend) -> &Arc<Program> {
        let guests = match wasi {
            WasiArg::P2 => &self.p2,
            WasiArg::P3 => &self.p3,
        };
        match backend {
            Backend::Stock => &guests.stock,
            Backend::Uring => &guests.uring,
        }
    }

    /// Has a implementation do some work; `None` if it has no such operation.
    ///
    /// # Errors
    ///
    /// Those of its sockets.
    pub fn run(
        &self,
        runtime: &Runtime,
        implementation: Implementation,
        work: &Work,
    ) -> wasmtime::Result<Option<Sample>> {
        let source = Source::start(work)?;
        let sample = match implementation {
            Implementation::Guest(wasi, backend) => {
                runtime.block_on(self.run_guests(wasi, backend, work, &source)).map(Some)
            }
            Implementation::Native(native) => {
                let Work { bench, guests, count } = *work;
                let setting = Setting { bench, guests, ring: self.args, source: &source };
                native.run(&setting, count).map_err(wasmtime::Error::from)
            }
        };
        // Its failure is why the others failed.
        let source = source.end()?;
        let sample = sample?;
        Ok(sample.map(|sample| Sample { cpu: sample.cpu.saturating_sub(source), source, ..sample }))
    }

    /// Instantiates the guests, then measures how long they run.
    async fn run_guests(
        &self,
        version: WasiArg,
        backend: Backend,
        work: &Work,
        source: &Source,
    ) -> wasmtime::Result<Sample> {
        let program = self.program(version, backend);
        let net = Net::new(NetArg::Loopback);
        let Bench { operation, bytes, datagrams, .. } = work.bench;
        let mut guests = Vec::new();
        for guest in 0..work.guests {
            let mut wasi = WasiCtx::builder();
            net.configure(&mut wasi);
            let port = usize::from(source.addr(guest).port());
            wasi.args(&["cycle", operation.mode()]);
            wasi.args(&[work.count, port, *bytes, *datagrams].map(|number| number.to_string()));
            let uring = Some(&self.uring);
            let config = GuestConfig { wasi, net: &net, uring, sockets_max: self.args.sockets };
            guests.push(program.instantiate(config).await?);
        }
        let enters = self.enters();
        let named = Named::after(Implementation::Guest(version, backend));
        let stopwatch = Stopwatch::start();
        let mut tasks = JoinSet::new();
        for mut guest in guests {
            // The store comes back, so that taking it down is not measured.
            tasks.spawn(async move {
                let (result, suspensions) = counting_suspensions(guest.run()).await;
                (result, suspensions, guest)
            });
        }
        let mut ended = Vec::new();
        while let Some(guest) = tasks.join_next().await {
            ended.push(guest);
        }
        let mut sample = stopwatch.sample();
        drop(named);
        sample.enters = (backend == Backend::Uring).then(|| self.enters() - enters);
        let mut all = 0;
        for guest in ended {
            let (result, suspensions, _store) = guest.map_err(|error| format_err!("{error}"))?;
            result?;
            all += suspensions;
        }
        sample.suspensions = Some(all);
        Ok(sample)
    }
}

/// A future's output, and how often it was not ready before.
async fn counting_suspensions<T>(future: impl Future<Output = T>) -> (T, u64) {
    let mut future = pin!(future);
    let mut suspensions = 0;
    let output = poll_fn(|cx| {
        let poll = future.as_mut().poll(cx);
        suspensions += u64::from(poll.is_pending());
        poll
    })
    .await;
    (output, suspensions)
}
