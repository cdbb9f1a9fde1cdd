//! A host of tenants: a store holds several components, each with a context of its own, of which the one that
//! runs is active; a tenant's rules give reasons; and its quota counts the sockets of all its stores.
//!
//! ```sh
//! cargo run --example tenants -- one.wasm two.wasm
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use wasi_uring::{
    AddrEvent, Policy, Quota, SocketAddrUse, UdpCtx, UdpCtxBuilder, UdpCtxView, UdpView, Uring,
    Verdict,
};
use wasmtime::component::{Component, Linker, ResourceTable};
use wasmtime::{Engine, Result, Store};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView, p2, p3};

/// What all components of a tenant share, in whichever stores they are.
pub(crate) struct Tenant {
    rules: Arc<Rules>,
    pub(crate) quota: Quota,
    /// Cloned for each component, which costs nothing until that opens a socket.
    udp: UdpCtxBuilder,
}

/// Its rules, which can change while its guests run.
#[derive(Default)]
pub(crate) struct Rules {
    is_suspended: AtomicBool,
}

impl Policy for Rules {
    fn check(&self, event: &AddrEvent) -> Verdict {
        if self.is_suspended.load(Ordering::Relaxed) {
            return Verdict::deny("tenant is suspended");
        }
        if event.addr.ip().to_canonical().is_loopback() {
            return Verdict::Allow;
        }
        if matches!(event.addr_use, SocketAddrUse::UdpBind) {
            // A port of the kernel's choice is a client's. Whom it hears there is asked about.
            let is_client = event.is_implicit || event.addr.port() == 0;
            let denied = Verdict::deny("listens on all addresses");
            return if is_client { Verdict::Allow } else { denied };
        }
        // Only this is worth a look elsewhere. Datagrams that came to the same socket behind one that is looked
        // up wait with it, so a look-up should have a time-out.
        let port = event.addr.port();
        Verdict::ask(async move {
            // Stands for a directory of what tenants may reach.
            tokio::task::yield_now().await;
            if port == 53 { Verdict::Allow } else { Verdict::deny("not in the directory") }
        })
    }
}

impl Tenant {
    pub(crate) fn new(uring: &Uring, host: &Quota) -> Self {
        let rules = Arc::new(Rules::default());
        let quota = Quota::within(host, 512);
        let udp = UdpCtx::builder(uring).policy(Arc::clone(&rules)).quota(&quota);
        Self { rules, quota, udp }
    }

    /// From now on its guests may use no address.
    pub(crate) fn suspend(&self) {
        self.rules.is_suspended.store(true, Ordering::Relaxed);
    }
}

/// One component's part of a store.
pub(crate) struct Part {
    wasi: WasiCtx,
    pub(crate) udp: UdpCtx,
}

/// A store's data: what components have each, and have together.
#[derive(Default)]
pub(crate) struct Workload {
    pub(crate) parts: Vec<Part>,
    /// Whose calls the linker's functions serve now.
    active: usize,
    table: ResourceTable,
}

impl Workload {
    pub(crate) fn add(&mut self, tenant: &Tenant, wasi: WasiCtx) -> usize {
        self.parts.push(Part { wasi, udp: tenant.udp.clone().build() });
        self.parts.len() - 1
    }
}

impl WasiView for Workload {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.parts[self.active].wasi, table: &mut self.table }
    }
}

impl UdpView for Workload {
    fn udp(&mut self) -> UdpCtxView<'_> {
        UdpCtxView { ctx: &mut self.parts[self.active].udp, table: &mut self.table }
    }
}

/// Runs a component of the store, of WASI 0.2 or 0.3, to its end, with its own part active.
pub(crate) async fn run(
    store: &mut Store<Workload>,
    linker: &Linker<Workload>,
    component: &Component,
    part: usize,
) -> Result<Result<(), ()>> {
    store.data_mut().active = part;
    let pre = linker.instantiate_pre(component)?;
    if let Ok(pre) = p3::bindings::CommandPre::new(pre.clone()) {
        let command = pre.instantiate_async(&mut *store).await?;
        let run = async |store: &_| command.wasi_cli_run().call_run(store).await;
        store.run_concurrent(run).await?
    } else {
        let command = p2::bindings::CommandPre::new(pre)?.instantiate_async(&mut *store).await?;
        command.wasi_cli_run().call_run(store).await
    }
}

pub(crate) fn linker(engine: &Engine) -> Result<Linker<Workload>> {
    let mut linker = Linker::new(engine);
    wasi_uring::p2::add_to_linker(&mut linker)?;
    wasi_uring::p3::add_to_linker(&mut linker)?;
    Ok(linker)
}

#[tokio::main]
async fn main() -> Result<()> {
    let engine = Engine::default();
    let (uring, host) = (Uring::builder().build()?, Quota::new(10_000));
    let (linker, tenant) = (linker(&engine)?, Tenant::new(&uring, &host));
    let mut store = Store::new(&engine, Workload::default());
    for file in std::env::args().skip(1) {
        let component = Component::from_file(&engine, file)?;
        let part = store.data_mut().add(&tenant, WasiCtx::builder().inherit_stdio().build());
        let ended = run(&mut store, &linker, &component, part).await;
        let stats = store.data().parts[part].udp.stats();
        println!("{ended:?}: {stats:#?}, {} of {}", tenant.quota.in_use(), tenant.quota.capacity());
        if tenant.quota.refusals() > 0 {
            tenant.suspend();
        }
    }
    Ok(())
}
