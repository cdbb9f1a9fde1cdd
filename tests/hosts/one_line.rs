//! The usual program around wasmtime-wasi, with UDP on an io_uring: what differs is marked with `<--`.
//!
//! ```sh
//! cargo run --example one_line -- guest.wasm
//! ```
//!
//! It runs a command of WASI 0.2 or 0.3, on a multi-thread runtime, with a network of loopback alone.

use std::net::SocketAddr;

use wasi_uring::{SocketAddrUse, UdpCtx, UdpCtxView, UdpView, Uring}; // <--
use wasmtime::component::{Component, Linker, ResourceTable};
use wasmtime::{Engine, Result, Store, bail};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView, p2, p3};

/// A store's data.
pub(crate) struct Guest {
    wasi: WasiCtx,
    udp: UdpCtx, // <--
    table: ResourceTable,
}

impl WasiView for Guest {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

// <--
impl UdpView for Guest {
    fn udp(&mut self) -> UdpCtxView<'_> {
        UdpCtxView { ctx: &mut self.udp, table: &mut self.table }
    }
}

impl Guest {
    pub(crate) fn new(wasi: WasiCtx, uring: &Uring) -> Self {
        let udp = UdpCtx::builder(uring).allow(is_local).sockets_max(512).build(); // <--
        Self { wasi, udp, table: ResourceTable::new() }
    }
}

/// Who a guest may deal with. Whatever a bind to all addresses lets in is checked by its sender.
fn is_local(addr: SocketAddr, use_: SocketAddrUse) -> bool {
    let ip = addr.ip().to_canonical();
    ip.is_loopback() || (ip.is_unspecified() && matches!(use_, SocketAddrUse::UdpBind))
}

/// Both versions: a guest's imports decide which it gets.
pub(crate) fn linker(engine: &Engine) -> Result<Linker<Guest>> {
    let mut linker = Linker::new(engine);
    wasi_uring::p2::add_to_linker(&mut linker)?; // <-- wasmtime_wasi::p2::add_to_linker_async
    wasi_uring::p3::add_to_linker(&mut linker)?; // <-- wasmtime_wasi::p3::add_to_linker
    Ok(linker)
}

/// Runs a command to its end.
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
    let Some(file) = std::env::args().nth(1) else { bail!("usage: one_line GUEST [ARGUMENT...]") };
    let uring = Uring::builder().build()?; // <-- one for the process
    let engine = Engine::default();
    let component = Component::from_file(&engine, file)?;
    let args: Vec<_> = std::env::args().skip(1).collect();
    let wasi = WasiCtx::builder().inherit_stdio().args(&args).build();
    let ended = run(&linker(&engine)?, &component, Guest::new(wasi, &uring)).await?;
    println!("{ended:?}, sockets: {}", uring.stats().sockets_created);
    Ok(())
}
