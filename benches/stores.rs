//! What a store costs whose guest opens no socket, on a host that has a ring and on one that has not:
//! `cargo bench -p wasi-uring --bench stores`. Of a hundred stores one opens a socket, which is not
//! measured: most stores of a server live for one request, and never open one.

use std::time::Instant;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use wasi_uring::{UdpCtx, UdpCtxBuilder, UdpCtxView, UdpView, Uring};
use wasmtime::component::{Component, Linker, ResourceTable};
use wasmtime::{Config, Engine, Store};
use wasmtime_wasi::p2::bindings::CommandPre;
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};

/// Opens as many sockets as its second argument says.
const GUEST: &str = include_str!("../src/cli/guests/cycle2.wat");

/// Stores between two that open a socket.
const WITHOUT: usize = 99;

/// A store's data on a host without a ring.
struct Plain {
    wasi: WasiCtx,
    table: ResourceTable,
}

impl WasiView for Plain {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

/// And on one that has one.
struct WithUdp {
    plain: Plain,
    udp: UdpCtx,
}

impl WasiView for WithUdp {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        self.plain.ctx()
    }
}

impl UdpView for WithUdp {
    fn udp(&mut self) -> UdpCtxView<'_> {
        UdpCtxView { ctx: &mut self.udp, table: &mut self.plain.table }
    }
}

/// A host: the guest linked, and what a new store gets.
struct Host<T: 'static> {
    pre: CommandPre<T>,
    data: Box<dyn Fn(Plain) -> T>,
}

impl<T: WasiView> Host<T> {
    /// The life of a store whose guest opens so many sockets.
    async fn store(&self, sockets: &str) {
        let mut wasi = WasiCtx::builder();
        wasi.args(&["cycle", "bind", sockets])
            .allow_udp(true)
            .socket_addr_check(|addr, _use| Box::pin(std::future::ready(addr.ip().is_loopback())));
        let data = (self.data)(Plain { wasi: wasi.build(), table: ResourceTable::new() });
        let mut store = Store::new(self.pre.engine(), data);
        let command = self.pre.instantiate_async(&mut store).await.expect("the guest is linked");
        let ended = command.wasi_cli_run().call_run(&mut store).await.expect("the guest returns");
        ended.expect("the guest can open sockets");
    }

    /// Microseconds of the process's CPU time for each of the stores that open none.
    async fn cost(&self, hundreds: usize) -> f64 {
        let mut cpu = 0;
        for _ in 0..hundreds {
            let before = cpu_micros();
            for _ in 0..WITHOUT {
                self.store("0").await;
            }
            cpu += cpu_micros() - before;
            self.store("1").await;
        }
        #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
        let each = cpu as f64 / (hundreds * WITHOUT) as f64;
        each
    }
}

fn cpu_micros() -> u64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("getrusage(2)");
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    micros.unsigned_abs()
}

fn hosts(template: UdpCtxBuilder) -> wasmtime::Result<(Host<Plain>, Host<WithUdp>)> {
    let mut config = Config::new();
    config.concurrency_support(false);
    let engine = Engine::new(&config)?;
    let component = Component::new(&engine, GUEST)?;

    let mut linker = Linker::new(&engine);
    wasmtime_wasi::p2::add_to_linker_async(&mut linker)?;
    let pre = CommandPre::new(linker.instantiate_pre(&component)?)?;
    let plain = Host { pre, data: Box::new(|plain| plain) };

    let mut linker = Linker::new(&engine);
    wasi_uring::p2::add_to_linker(&mut linker)?;
    let pre = CommandPre::new(linker.instantiate_pre(&component)?)?;
    let data = move |plain| WithUdp { plain, udp: template.clone().build() };
    Ok((plain, Host { pre, data: Box::new(data) }))
}

fn main() -> wasmtime::Result<()> {
    // `cargo test --benches` only wants to see it run.
    let is_bench = std::env::args().any(|arg| arg == "--bench");
    let (rounds, hundreds) = if is_bench { (31, 50) } else { (1, 1) };
    let uring = Uring::builder().sockets(1024).build()?;
    let template = UdpCtx::builder(&uring).allow(|addr, _use| addr.ip().is_loopback());
    let (plain, with_udp) = hosts(template)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let rounds: Vec<_> = runtime.block_on(async {
        let mut measured = Vec::new();
        let begin = Instant::now();
        for round in 0..rounds {
            // Who is first may find the caches of the other.
            let pair = if round % 2 == 0 {
                let stock = plain.cost(hundreds).await;
                (stock, with_udp.cost(hundreds).await)
            } else {
                let uring = with_udp.cost(hundreds).await;
                (plain.cost(hundreds).await, uring)
            };
            measured.push(pair);
        }
        let stores = 2 * rounds * hundreds * (WITHOUT + 1);
        #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
        let rate = stores as f64 / begin.elapsed().as_secs_f64();
        println!("{stores} stores, {rate:.0} each second");
        measured
    });
    let sorted = |of: fn(&(f64, f64)) -> f64| {
        let mut values: Vec<_> = rounds.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let middle = |values: &[f64]| values[values.len() / 2];
    let (stock, uring) = (sorted(|(stock, _)| *stock), sorted(|(_, uring)| *uring));
    let ratios = sorted(|(stock, uring)| uring / stock);
    println!(
        "µs of CPU for a store without a socket: {:.2} without a ring, {:.2} with one",
        middle(&stock),
        middle(&uring),
    );
    let [low, high] = [1, 3].map(|quarter| ratios[ratios.len() * quarter / 4]);
    println!("ratio {:.3} (quartiles {low:.3} to {high:.3})", middle(&ratios));
    Ok(())
}
