//! A host that runs wherever wasmtime-wasi does: with rings where there are some, and else on wasmtime-wasi's
//! own sockets, which it says once. Off is a state here, and no error.
//!
//! ```sh
//! cargo run --example fallback -- guest.wasm
//! ```
//!
//! Try it where io_uring is forbidden: `sysctl kernel.io_uring_disabled=2`, or in a container.

use std::net::SocketAddr;

use wasi_uring::{SetupError, SocketAddrUse, UdpCtx, UdpCtxView, UdpView, Uring};
use wasmtime::component::{Component, Linker, ResourceTable};
use wasmtime::{Engine, Result, Store, bail};
use wasmtime_wasi::{WasiCtx, WasiCtxBuilder, WasiCtxView, WasiView, p2, p3};

pub(crate) struct Guest {
    wasi: WasiCtx,
    /// `None` on wasmtime-wasi's sockets.
    udp: Option<UdpCtx>,
    table: ResourceTable,
}

impl WasiView for Guest {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

impl UdpView for Guest {
    fn udp(&mut self) -> UdpCtxView<'_> {
        let ctx = self.udp.as_mut().expect("linked only where there are rings");
        UdpCtxView { ctx, table: &mut self.table }
    }
}

/// Where guests' sockets are. Decided once, when the host starts: a linker is for one or the other.
#[derive(Clone)]
pub(crate) struct Sockets(Option<Uring>);

impl Sockets {
    pub(crate) fn of(built: Result<Uring, SetupError>) -> Self {
        match built {
            Ok(uring) => Self(Some(uring)),
            Err(error) => {
                // It names what is missing, and what to change.
                eprintln!("UDP without io_uring: {error}");
                Self(None)
            }
        }
    }

    pub(crate) fn are_on_rings(&self) -> bool {
        self.0.is_some()
    }

    pub(crate) fn linker(&self, engine: &Engine) -> Result<Linker<Guest>> {
        let mut linker = Linker::new(engine);
        if self.are_on_rings() {
            wasi_uring::p2::add_to_linker(&mut linker)?;
            wasi_uring::p3::add_to_linker(&mut linker)?;
        } else {
            wasmtime_wasi::p2::add_to_linker_async(&mut linker)?;
            wasmtime_wasi::p3::add_to_linker(&mut linker)?;
        }
        Ok(linker)
    }

    /// A store's data. The same rules for both: TCP and name look-up are wasmtime-wasi's anyway.
    pub(crate) fn guest(&self, wasi: &mut WasiCtxBuilder) -> Guest {
        let check = |addr, use_| Box::pin(std::future::ready(is_local(addr, use_))) as _;
        let wasi = wasi.allow_udp(true).socket_addr_check(check).build();
        let udp = |uring| UdpCtx::builder(uring).socket_addr_check(check).build();
        Guest { wasi, udp: self.0.as_ref().map(udp), table: ResourceTable::new() }
    }
}

/// Who a guest may deal with.
fn is_local(addr: SocketAddr, use_: SocketAddrUse) -> bool {
    let ip = addr.ip().to_canonical();
    ip.is_loopback() || (ip.is_unspecified() && matches!(use_, SocketAddrUse::UdpBind))
}

/// Runs a command of either version to its end.
pub(crate) async fn run(
    linker: &Linker<Guest>,
    component: &Component,
    guest: Guest,
) -> Result<Result<(), ()>> {
    let mut store = Store::new(linker.engine(), guest);
    let pre = linker.instantiate_pre(component)?;
    if let Ok(pre) = p3::bindings::CommandPre::new(pre.clone()) {
        let command = pre.instantiate_async(&mut store).await?;
        let run = async |store: &_| command.wasi_cli_run().call_run(store).await;
        store.run_concurrent(run).await?
    } else {
        let command = p2::bindings::CommandPre::new(pre)?.instantiate_async(&mut store).await?;
        command.wasi_cli_run().call_run(&mut store).await
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let Some(file) = std::env::args().nth(1) else { bail!("usage: fallback GUEST [ARGUMENT...]") };
    let sockets = Sockets::of(Uring::builder().sockets(16_384).build());
    let engine = Engine::default();
    let component = Component::from_file(&engine, file)?;
    let mut wasi = WasiCtx::builder();
    wasi.inherit_stdio().args(&std::env::args().skip(1).collect::<Vec<_>>());
    let ended = run(&sockets.linker(&engine)?, &component, sockets.guest(&mut wasi)).await?;
    println!("{ended:?}, on rings: {}", sockets.are_on_rings());
    Ok(())
}
