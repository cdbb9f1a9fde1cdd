//! A host that assembles its linker itself: its store is generic and implements no view of wasmtime-wasi's
//! or wasi-uring's, so every interface is added with a getter. And its guests share an app-wide limit
//! of sockets, for which it wraps what makes and drops them.
//!
//! ```sh
//! cargo run --example generic_store -- guest.wasm
//! ```
//!
//! - here: the store's data, its getters, the limit;
//! - `p2`, `p3`: wasi-uring's UDP with the limit around it. A wrapper has to pass on every function of a
//!   trait, so these two also are the list of what there is, and of what is async;
//! - `stock`: the rest of WASI, which stays wasmtime-wasi's.

mod p2;
mod p3;
mod stock;

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use wasi_uring::{SocketAddrUse, UdpCtx, UdpCtxView, Uring};
use wasmtime::component::{Component, HasData, Linker, ResourceTable};
use wasmtime::{Engine, Result, Store, bail};
use wasmtime_wasi::WasiCtx;

/// A store's data: what all guests have, and what this kind of app keeps for each.
pub(crate) struct State<A> {
    pub(crate) app: A,
    wasi: WasiCtx,
    udp: UdpCtx,
    table: ResourceTable,
    limit: Limit,
}

impl<A> State<A> {
    /// `sockets` has a permit for each socket that the app's guests may have at once.
    pub(crate) fn new(app: A, wasi: WasiCtx, uring: &Uring, sockets: &Arc<Semaphore>) -> Self {
        let udp = UdpCtx::builder(uring).allow(|addr, use_| {
            let ip = addr.ip().to_canonical();
            ip.is_loopback() || (ip.is_unspecified() && matches!(use_, SocketAddrUse::UdpBind))
        });
        let limit = Limit { permits: Arc::clone(sockets), held: HashMap::new() };
        Self { app, wasi, udp: udp.build(), table: ResourceTable::new(), limit }
    }

    fn udp(&mut self) -> UdpCtxView<'_> {
        UdpCtxView { ctx: &mut self.udp, table: &mut self.table }
    }

    fn limited_udp(&mut self) -> LimitedView<'_> {
        let Self { udp, table, limit, .. } = self;
        LimitedView { udp: UdpCtxView { ctx: udp, table }, limit }
    }
}

/// The app's permits, and those that a guest's sockets hold, by the socket's place in the table.
pub(crate) struct Limit {
    permits: Arc<Semaphore>,
    held: HashMap<u32, OwnedSemaphorePermit>,
}

impl Limit {
    /// A permit, or none at once: a guest that waited for one might be the guest that has it.
    fn take(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.permits).try_acquire_owned().ok()
    }
}

/// What the linker calls in place of `UdpCtxView`.
pub(crate) struct LimitedView<'a> {
    udp: UdpCtxView<'a>,
    limit: &'a mut Limit,
}

/// Names it where a type without a lifetime is wanted.
pub(crate) struct LimitedUdp;

impl HasData for LimitedUdp {
    type Data<'a> = LimitedView<'a>;
}

/// A linker for apps of one kind.
pub(crate) fn linker<A: Send + 'static>(engine: &Engine) -> Result<Linker<State<A>>> {
    use wasi_uring::p2::bindings::sockets::{udp, udp_create_socket};
    use wasi_uring::p3::bindings::sockets::types;

    let mut linker = Linker::new(engine);
    stock::add_p2_but_udp(&mut linker)?;
    udp::add_to_linker::<_, LimitedUdp>(&mut linker, State::limited_udp)?;
    udp_create_socket::add_to_linker::<_, LimitedUdp>(&mut linker, State::limited_udp)?;

    stock::add_p3(&mut linker)?;
    // WASI 0.3 has TCP and UDP in one interface: this takes UDP's part of it over.
    linker.allow_shadowing(true);
    types::add_to_linker::<_, LimitedUdp>(&mut linker, State::limited_udp)?;
    linker.allow_shadowing(false);
    Ok(linker)
}

/// Runs a command to its end.
pub(crate) async fn run<A: Send + 'static>(
    linker: &Linker<State<A>>,
    component: &Component,
    state: State<A>,
) -> Result<Result<(), ()>> {
    use wasmtime_wasi::{p2, p3};

    let mut store = Store::new(linker.engine(), state);
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
    let args: Vec<_> = std::env::args().skip(1).collect();
    let Some(file) = args.first() else { bail!("usage: generic_store GUEST [ARGUMENT...]") };
    let uring = Uring::builder().build()?;
    let sockets = Arc::new(Semaphore::new(256));
    let engine = Engine::default();
    let component = Component::from_file(&engine, file)?;
    let wasi = WasiCtx::builder().inherit_stdio().args(&args).build();
    let state = State::new("an app", wasi, &uring, &sockets);
    println!("{} runs {file}", state.app);
    let ended = run(&linker(&engine)?, &component, state).await?;
    println!("{ended:?}, sockets: {}", uring.stats().sockets_created);
    Ok(())
}
