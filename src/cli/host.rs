//! A Wasmtime host with either backend: engine, linker, and a store per guest.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use wasi_uring::{SetupError, SocketAddrUse, UdpCtx, UdpCtxView, UdpView, Uring};
use wasmtime::component::{Component, Linker, ResourceTable};
use wasmtime::error::Context;
use wasmtime::{Config, Engine, Store};
use wasmtime::{bail, format_err};
use wasmtime_wasi::p2;
use wasmtime_wasi::p3;
use wasmtime_wasi::{I32Exit, WasiCtx, WasiCtxBuilder, WasiCtxView, WasiView};

use crate::args::{BackendArg, NetArg};
use crate::terminal::{Failure, say};

/// A store's data. Stores of the stock linker have no `udp`, and nothing there reads it.
pub(crate) struct Host {
    wasi: WasiCtx,
    table: ResourceTable,
    udp: Option<UdpCtx>,
}

impl WasiView for Host {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

impl UdpView for Host {
    fn udp(&mut self) -> UdpCtxView<'_> {
        let ctx = self.udp.as_mut().expect("stores of the uring linker have a UdpCtx");
        UdpCtxView { ctx, table: &mut self.table }
    }
}

/// A backend that has been decided on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backend {
    /// The ring.
    Uring,
    /// wasmtime-wasi's own sockets.
    Stock,
}

impl Backend {
    /// Both, the baseline first.
    pub const ALL: [Self; 2] = [Self::Stock, Self::Uring];

    /// Its name in options.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Uring => "uring",
            Self::Stock => "stock",
        }
    }
}

/// A compiled component, and the engine it runs on.
pub(crate) struct Compiled {
    engine: Engine,
    component: Component,
    /// It may use WASI 0.3.
    is_concurrent: bool,
}

impl Compiled {
    /// Compiles a component, binary or text.
    pub(crate) fn new(bytes: &[u8]) -> wasmtime::Result<Self> {
        // What WASI 0.3 needs of an engine costs every call into the host some 0.1 µs, so a
        // component that is valid without it does without.
        let compile = |is_concurrent| {
            let engine = Engine::new(Config::new().concurrency_support(is_concurrent))?;
            let component = Component::new(&engine, bytes)?;
            Ok(Self { engine, component, is_concurrent })
        };
        compile(false).or_else(|_: wasmtime::Error| compile(true))
    }
}

/// A guest program, compiled and linked: instances are made from it.
pub(crate) struct Program {
    engine: Engine,
    pre: Pre,
    backend: Backend,
}

/// By the version of WASI whose `wasi:cli/run` it exports.
enum Pre {
    P2(p2::bindings::CommandPre<Host>),
    P3(p3::bindings::CommandPre<Host>),
}

impl Program {
    pub(crate) fn link(compiled: &Compiled, backend: Backend) -> Result<Self, Failure> {
        let Compiled { engine, component, is_concurrent } = compiled;
        let mut linker = Linker::new(engine);
        match backend {
            Backend::Uring => wasi_uring::p2::add_to_linker(&mut linker),
            Backend::Stock => p2::add_to_linker_async(&mut linker),
        }
        .map_err(Failure::run)?;
        if *is_concurrent {
            match backend {
                Backend::Uring => wasi_uring::p3::add_to_linker(&mut linker),
                Backend::Stock => p3::add_to_linker(&mut linker),
            }
            .map_err(Failure::run)?;
        }
        let pre = linker.instantiate_pre(component).map_err(|error| {
            Failure::usage(error.context(
                "the component cannot be linked: it imports what is not in WASI 0.2 or 0.3, or not \
                 with this type",
            ))
        })?;
        let pre = match p3::bindings::CommandPre::new(pre.clone()) {
            Ok(pre) => Pre::P3(pre),
            Err(_) => Pre::P2(p2::bindings::CommandPre::new(pre).map_err(|error| {
                Failure::usage(error.context(
                    "the component does not export wasi:cli/run@0.2 or @0.3: it is no command \
                     (build it as one, or give another file)",
                ))
            })?),
        };
        Ok(Self { engine: engine.clone(), pre, backend })
    }

    /// A new instance in a store of its own.
    pub(crate) async fn instantiate(&self, mut guest: GuestConfig<'_>) -> wasmtime::Result<Guest> {
        let udp = match (self.backend, guest.uring) {
            (Backend::Uring, Some(uring)) => Some(guest.net.udp_ctx(uring, guest.sockets_max)),
            (Backend::Uring | Backend::Stock, _) => None,
        };
        let host = Host { wasi: guest.wasi.build(), table: ResourceTable::new(), udp };
        let mut store = Store::new(&self.engine, host);
        let command = match &self.pre {
            Pre::P2(pre) => Command::P2(pre.instantiate_async(&mut store).await?),
            Pre::P3(pre) => Command::P3(pre.instantiate_async(&mut store).await?),
        };
        Ok(Guest { store, command })
    }
}

/// What one instance gets.
pub(crate) struct GuestConfig<'a> {
    pub(crate) wasi: WasiCtxBuilder,
    pub(crate) net: &'a Net,
    pub(crate) uring: Option<&'a Uring>,
    pub(crate) sockets_max: u32,
}

pub(crate) struct Guest {
    store: Store<Host>,
    command: Command,
}

enum Command {
    P2(p2::bindings::Command),
    P3(p3::bindings::Command),
}

impl Guest {
    /// Runs the guest to its end; an error if it returned one, exited with one or trapped.
    pub(crate) async fn run(&mut self) -> wasmtime::Result<()> {
        let Self { store, command } = self;
        let ended = match command {
            Command::P2(command) => command.wasi_cli_run().call_run(store).await,
            Command::P3(command) => store
                .run_concurrent(async |store| command.wasi_cli_run().call_run(store).await)
                .await
                .flatten(),
        };
        match ended {
            Ok(Ok(())) => Ok(()),
            Ok(Err(())) => bail!("returned an error"),
            Err(error) => match error.downcast_ref::<I32Exit>() {
                Some(I32Exit(0)) => Ok(()),
                Some(I32Exit(code)) => bail!("exited with code {code}"),
                None => Err(error.context("trapped")),
            },
        }
    }
}

/// The addresses guests may use, and those they were refused.
#[derive(Clone)]
pub(crate) struct Net {
    allowed: NetArg,
    refused: Arc<Mutex<HashSet<SocketAddr>>>,
}

/// Refused addresses worth a line each; a guest can try millions.
const REFUSALS_TOLD_MAX: usize = 20;

impl Net {
    pub(crate) fn new(allowed: NetArg) -> Self {
        Self { allowed, refused: Arc::default() }
    }

    fn allows(&self, addr: SocketAddr, use_: SocketAddrUse) -> bool {
        let ip = addr.ip().to_canonical();
        let allowed = match self.allowed {
            NetArg::None => false,
            NetArg::All => true,
            // Whatever a wildcard bind lets in is checked by its sender.
            NetArg::Loopback => ip.is_loopback() || (ip.is_unspecified() && is_local(use_)),
        };
        // A datagram from an address that is not allowed is dropped silently: the guest has not requested it.
        if !allowed && !matches!(use_, SocketAddrUse::UdpReceive | SocketAddrUse::TcpAccept) {
            self.report(addr, use_);
        }
        allowed
    }

    fn report(&self, addr: SocketAddr, use_: SocketAddrUse) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        if refused.len() < REFUSALS_TOLD_MAX && refused.insert(addr) {
            say(format_args!("refused {use_:?} {addr}; --net all would allow it"));
        }
    }

    /// The same rules for what stays wasmtime-wasi's.
    pub(crate) fn configure(&self, wasi: &mut WasiCtxBuilder) {
        let any = self.allowed != NetArg::None;
        let net = self.clone();
        wasi.allow_udp(any)
            .allow_tcp(any)
            .allow_ip_name_lookup(self.allowed == NetArg::All)
            .socket_addr_check(move |addr, use_| {
                let allowed = net.allows(addr, use_);
                Box::pin(async move { allowed })
            });
    }

    pub(crate) fn udp_ctx(&self, uring: &Uring, sockets_max: u32) -> UdpCtx {
        let mut builder = UdpCtx::builder(uring).sockets_max(sockets_max);
        if self.allowed != NetArg::None {
            let net = self.clone();
            builder = builder.allow(move |addr, use_| net.allows(addr, use_));
        }
        builder.build()
    }
}

/// Whether the address checked is the socket's own.
fn is_local(use_: SocketAddrUse) -> bool {
    matches!(use_, SocketAddrUse::UdpBind | SocketAddrUse::TcpBind | SocketAddrUse::TcpListen)
}

/// Decides on a backend, of which `None` is stock: tries to build the ring, and for `auto` falls back and says so once.
pub(crate) fn choose(
    wanted: BackendArg,
    build: impl FnOnce() -> Result<Uring, SetupError>,
) -> Result<Option<Uring>, Failure> {
    if wanted == BackendArg::Stock {
        return Ok(None);
    }
    match build() {
        Ok(uring) => Ok(Some(uring)),
        Err(error) if wanted == BackendArg::Auto => {
            metrics::counter!("wasi_uring_fallbacks_total").increment(1);
            tracing::warn!(%error, "no ring: UDP sockets are wasmtime-wasi's");
            Ok(None)
        }
        Err(error) => {
            let hint = "`wasi-uring doctor` shows all that this machine lacks";
            Err(Failure::usage(wasmtime::Error::from(error).context(hint)))
        }
    }
}

/// Reads and compiles a component, binary or text.
pub(crate) fn load(path: &Path) -> wasmtime::Result<Compiled> {
    let binary = read(path)?;
    let compiled = Compiled::new(&binary);
    compiled.with_context(|| format!("{} is not a valid component", path.display()))
}

/// Reads a component, binary or text; what it returns is binary, and no core module.
pub(crate) fn read(path: &Path) -> wasmtime::Result<Vec<u8>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(_) if path.is_dir() => bail!("{} is a directory, not a component", path.display()),
        Err(error) => return Err(error).context(format!("cannot read {}", path.display())),
    };
    let binary = wat::parse_bytes(&bytes).map_err(|error| {
        format_err!("{} is neither a component nor its text form: {error}", path.display())
    })?;
    match binary.get(4..8) {
        // Version 1, layer 0 (WebAssembly core specification, binary format).
        Some([1, 0, 0, 0]) => bail!(
            "{} is a core module; make it a component first (`wasm-tools component new`)",
            path.display()
        ),
        // Layer 1 is a component; anything else Wasmtime can judge.
        _ => Ok(binary.into_owned()),
    }
}
