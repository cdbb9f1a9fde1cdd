//! A server's shape: many guests at once as tasks of a multi-thread runtime, which move between its workers.
//! One handle serves them all: each worker has a ring of its own behind it.
//!
//! ```sh
//! cargo run --example multi_thread -- guest.wasm 1000
//! ```
//!
//! It runs a command of WASI 0.2 or 0.3 so many times at once.

use std::net::SocketAddr;

use wasi_uring::{SocketAddrUse, UdpCtx, UdpCtxBuilder, UdpCtxView, UdpView, Uring};
use wasmtime::component::{Component, InstancePre, Linker, ResourceTable};
use wasmtime::{Engine, Result, Store, bail, format_err};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView, p2, p3};

pub(crate) struct Guest {
    wasi: WasiCtx,
    udp: UdpCtx,
    table: ResourceTable,
}

impl WasiView for Guest {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

impl UdpView for Guest {
    fn udp(&mut self) -> UdpCtxView<'_> {
        UdpCtxView { ctx: &mut self.udp, table: &mut self.table }
    }
}

/// What all stores have in common: everything that need not be done for each.
#[derive(Clone)]
pub(crate) struct Server {
    guest: InstancePre<Guest>,
    /// A clone of it is a guest's context, which costs nothing until the guest opens a socket.
    udp: UdpCtxBuilder,
}

impl Server {
    pub(crate) fn new(component: &Component, uring: &Uring) -> Result<Self> {
        let mut linker = Linker::new(component.engine());
        wasi_uring::p2::add_to_linker(&mut linker)?;
        wasi_uring::p3::add_to_linker(&mut linker)?;
        let udp = UdpCtx::builder(uring).allow(is_local).sockets_max(512);
        Ok(Self { guest: linker.instantiate_pre(component)?, udp })
    }

    /// Runs one guest, on whichever workers have time.
    pub(crate) async fn run(self, wasi: WasiCtx) -> Result<Result<(), ()>> {
        let data = Guest { wasi, udp: self.udp.build(), table: ResourceTable::new() };
        let mut store = Store::new(self.guest.engine(), data);
        if let Ok(pre) = p3::bindings::CommandPre::new(self.guest.clone()) {
            let command = pre.instantiate_async(&mut store).await?;
            let run = async |store: &_| command.wasi_cli_run().call_run(store).await;
            store.run_concurrent(run).await?
        } else {
            let pre = p2::bindings::CommandPre::new(self.guest)?;
            let command = pre.instantiate_async(&mut store).await?;
            command.wasi_cli_run().call_run(&mut store).await
        }
    }
}

/// Who a guest may deal with.
fn is_local(addr: SocketAddr, use_: SocketAddrUse) -> bool {
    let ip = addr.ip().to_canonical();
    ip.is_loopback() || (ip.is_unspecified() && matches!(use_, SocketAddrUse::UdpBind))
}

/// Not `tokio::main`, so that the rings are as many as its workers.
fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let Some(file) = args.next() else { bail!("usage: multi_thread GUEST [COUNT]") };
    let count: usize = args.next().map_or(Ok(100), |count| count.parse())?;
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    // The sockets of all guests together, wherever they are. Built before the guests come, so that the
    // first of them need not wait for that.
    let uring = Uring::builder().sockets(16_384).rings(workers).build_all().build()?;
    let server = Server::new(&Component::from_file(&Engine::default(), &file)?, &uring)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        // The rings need its I/O.
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let guests: Vec<_> = (0..count)
            .map(|_| {
                let wasi = WasiCtx::builder().args(&[&file]).inherit_stdio().build();
                tokio::spawn(server.clone().run(wasi))
            })
            .collect();
        for guest in guests {
            guest.await??.map_err(|()| format_err!("a guest has failed"))?;
        }
        let stats = uring.stats();
        println!(
            "{} sockets in {} rings, {} enters",
            stats.sockets_created, stats.rings, stats.enters
        );
        Ok(())
    })
}
