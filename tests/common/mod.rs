//! A rig for tests: the driver guest on either backend, and Rust in place of its program.
//!
//! Every function of `wasi:sockets/udp` is a method of [`Rig`], so a scenario decides each call
//! and sees each answer as a guest would. [`on_both`] runs one on wasmtime-wasi's sockets and on
//! the ring: what it asserts holds for both, which is how "answers alike" is proved. [`alike`]
//! goes further where the right answer is the kernel's to know: both must return the same.
//!
//! # `Kills:`
//!
//! Where a test's name does not say which mistake it is there to find, the last paragraph of its
//! comment does, behind the tag `Kills:`. It names mutations of the library, separated by
//! semicolons: small wrong changes with each of which this test fails. A change of such a test is
//! checked by making the mutation again; `grep -rn 'Kills:' src tests` lists them all.

#![allow(dead_code, unreachable_pub, reason = "every test binary uses its own part of the rig")]
#![allow(clippy::needless_pass_by_value, reason = "scenarios are written where they are run")]

pub mod filter;
mod guest;
pub mod native;
pub mod network;
pub mod seen;
pub mod target;

use std::fmt::Debug;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use wasi_uring::{
    GuestCounters, Policy, Recycle, SocketAddrUse, Stats, UdpCtx, UdpCtxBuilder, UdpCtxView,
    UdpView, Uring,
};
use wasmtime::component::{Component, Linker, ResourceTable};
use wasmtime::{Engine, Store};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};

pub mod driver {
    wasmtime::component::bindgen!({
        path: "tests/guests/driver.wit",
        world: "driver",
        exports: { default: async },
        additional_derives: [PartialEq],
    });
}

pub use driver::{ErrorCode, IncomingDatagram, IpAddressFamily, IpSocketAddress, OutgoingDatagram};

/// Port 0 of the loopback interface, in either family.
pub const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
pub const LOOPBACK_6: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), 0);

/// Who serves the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    Stock,
    Uring,
}

pub struct Host {
    wasi: WasiCtx,
    table: ResourceTable,
    udp: UdpCtx,
}

impl WasiView for Host {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

impl UdpView for Host {
    fn udp(&mut self) -> UdpCtxView<'_> {
        UdpCtxView { ctx: &mut self.udp, table: &mut self.table }
    }
}

pub type Allow = Arc<dyn Fn(SocketAddr, SocketAddrUse) -> bool + Send + Sync>;

/// What else a guest of the ring is to have.
pub type Configure = Arc<dyn Fn(UdpCtxBuilder) -> UdpCtxBuilder + Send + Sync>;

/// How the ring is given the address policy. (wasmtime-wasi takes it as a closure whose future is ready.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// As a function.
    Allow,
    /// As wasmtime-wasi.
    Ready,
    /// As wasmtime-wasi, with a future that is not ready at once.
    Late,
}

impl Check {
    pub const ALL: [Self; 3] = [Self::Allow, Self::Ready, Self::Late];
}

/// How a rig is set up; start from `Setup::default()`.
#[derive(Clone)]
pub struct Setup {
    /// The 0.2.x the guest imports: 0.2.0 or 0.2.12.
    pub version: &'static str,
    /// The address policy; `None` refuses UDP.
    pub allow: Option<Allow>,
    pub check: Check,
    pub configure: Option<Configure>,
    pub sockets_max: u32,
    /// Bytes that may wait for send buffer.
    pub send_bytes_max: usize,
    /// The ring to use, or a new one.
    pub uring: Option<Uring>,
    /// The guest's arguments, after the first.
    pub args: Vec<String>,
    /// Resources that the guest may hold.
    pub resources_max: usize,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            version: "0.2.0",
            allow: Some(Arc::new(|_, _| true)),
            check: Check::Allow,
            configure: None,
            sockets_max: 1024,
            send_bytes_max: wasi_uring::limits::GUEST_SEND_BYTES_DEFAULT,
            uring: None,
            args: Vec::new(),
            resources_max: 1_000_000,
        }
    }
}

impl Setup {
    /// A guest of this ring.
    pub fn of(uring: &Uring) -> Self {
        Self { uring: Some(uring.clone()), ..Self::default() }
    }

    /// A guest whose sends may be deferred for so long.
    pub fn deferring(self, deferred_time: Duration) -> Self {
        let configure = move |udp: UdpCtxBuilder| {
            let udp = udp.allow(|_addr, _use| true);
            udp.deferred_time(deferred_time)
        };
        Self { configure: Some(Arc::new(configure)), ..self }
    }

    /// A guest of the ring with this policy.
    pub fn policy(policy: impl Policy + Clone + 'static) -> Self {
        Self { configure: Some(Arc::new(move |udp| udp.policy(policy.clone()))), ..Self::default() }
    }

    pub fn allow(
        allow: impl Fn(SocketAddr, SocketAddrUse) -> bool + Send + Sync + 'static,
    ) -> Self {
        Self { allow: Some(Arc::new(allow)), ..Self::default() }
    }
}

/// A guest under remote control.
pub struct Rig {
    pub backend: Backend,
    pub uring: Uring,
    pub store: Store<Host>,
    pub guest: driver::Driver,
    /// A network handle.
    pub network: u32,
}

/// A bound socket and its streams.
#[derive(Clone, Copy, Debug)]
pub struct Endpoint {
    pub socket: u32,
    pub incoming: u32,
    pub outgoing: u32,
    /// Where it was bound.
    pub local: SocketAddr,
}

/// A ring for tests.
pub fn uring() -> Uring {
    uring_with(1024)
}

/// A ring with a table of that many sockets.
pub fn uring_with(sockets: u32) -> Uring {
    Uring::builder()
        .sockets(sockets)
        .build()
        .expect("these tests need io_uring: see wasi-uring doctor")
}

/// A ring that closes every socket for good.
pub fn uring_without_recycling() -> Uring {
    Uring::builder().recycle(Recycle::OFF).build().unwrap()
}

/// The engine of all guests.
pub fn engine() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(Engine::default)
}

/// The driver guest, compiled once per process.
fn component(version: &str) -> Component {
    static OLDEST: OnceLock<Component> = OnceLock::new();
    static NEWEST: OnceLock<Component> = OnceLock::new();
    let cell = match version {
        "0.2.0" => &OLDEST,
        "0.2.12" => &NEWEST,
        other => panic!("no test asks for {other}"),
    };
    let component = cell.get_or_init(|| {
        let text = include_str!("../guests/driver.wat").replace("@0.2.0", &format!("@{version}"));
        Component::new(engine(), text).unwrap()
    });
    component.clone()
}

/// A store whose guest has what the setup gives it, with the ring it is served by.
pub fn host(engine: &Engine, backend: Backend, setup: Setup) -> (Uring, Linker<Host>, Store<Host>) {
    let uring = setup.uring.unwrap_or_else(uring);
    let mut linker = Linker::new(engine);
    match backend {
        Backend::Stock => wasmtime_wasi::p2::add_to_linker_async(&mut linker).unwrap(),
        Backend::Uring => wasi_uring::p2::add_to_linker(&mut linker).unwrap(),
    }
    let mut wasi = WasiCtx::builder();
    wasi.arg("guest").args(&setup.args);
    let mut udp =
        UdpCtx::builder(&uring).sockets_max(setup.sockets_max).send_bytes_max(setup.send_bytes_max);
    if let Some(allow) = setup.allow {
        let same = Arc::clone(&allow);
        wasi.allow_udp(true).socket_addr_check(move |addr, use_| {
            let allowed = same(addr, use_);
            Box::pin(async move { allowed })
        });
        udp = match setup.check {
            Check::Allow => udp.allow(move |addr, use_| allow(addr, use_)),
            Check::Ready => udp.socket_addr_check(move |addr, use_| {
                let allowed = allow(addr, use_);
                Box::pin(async move { allowed })
            }),
            Check::Late => udp.socket_addr_check(move |addr, use_| {
                let allow = Arc::clone(&allow);
                Box::pin(async move {
                    // Twice: Wasmtime polls a concurrent call twice at once.
                    for _ in 0..2 {
                        tokio::task::yield_now().await;
                    }
                    allow(addr, use_)
                })
            }),
        };
    }
    if let Some(configure) = setup.configure {
        udp = configure(udp);
    }
    let mut table = ResourceTable::new();
    table.set_max_capacity(setup.resources_max);
    let host = Host { wasi: wasi.build(), table, udp: udp.build() };
    let store = Store::new(engine, host);
    (uring, linker, store)
}

impl Rig {
    pub async fn new(backend: Backend, setup: Setup) -> Self {
        let version = setup.version;
        let (uring, linker, store) = host(engine(), backend, setup);
        Self::in_store(backend, version, uring, &linker, store).await
    }

    /// A guest in a store that may have others.
    pub async fn in_store(
        backend: Backend,
        version: &str,
        uring: Uring,
        linker: &Linker<Host>,
        mut store: Store<Host>,
    ) -> Self {
        let component = component(version);
        let guest =
            driver::Driver::instantiate_async(&mut store, &component, linker).await.unwrap();
        let network = guest.call_instance_network(&mut store).await.unwrap();
        Self { backend, uring, store, guest, network }
    }

    /// A guest on this ring.
    pub async fn on_ring(uring: &Uring) -> Self {
        Self::new(Backend::Uring, Setup::of(uring)).await
    }

    pub fn stats(&self) -> Stats {
        self.uring.stats()
    }

    /// The guest's counters on the ring.
    pub fn counters(&self) -> GuestCounters {
        self.store.data().udp.counters()
    }
}

/// Runs a scenario on wasmtime-wasi's sockets and on the ring, each in a runtime of its own.
pub fn on_both(setup: Setup, scenario: impl AsyncFn(&mut Rig)) {
    on_each(|backend| on(backend, setup.clone(), &scenario));
}

pub fn on_each(run: impl Fn(Backend)) {
    for backend in [Backend::Stock, Backend::Uring] {
        eprintln!("on {backend:?}:");
        run(backend);
    }
}

/// Runs a scenario on both backends, which must return the same.
#[track_caller]
pub fn alike<T: Debug + PartialEq>(setup: Setup, scenario: impl AsyncFn(&mut Rig) -> T) -> T {
    same(|backend| on(backend, setup.clone(), &scenario))
}

#[track_caller]
pub fn same<T: Debug + PartialEq>(run: impl Fn(Backend) -> T) -> T {
    let [stock, ring] = [Backend::Stock, Backend::Uring].map(run);
    assert_eq!(ring, stock, "the ring (left) does not answer as wasmtime-wasi (right)");
    ring
}

/// Runs a scenario on one backend, on a current-thread runtime.
pub fn on<T>(backend: Backend, setup: Setup, scenario: impl AsyncFn(&mut Rig) -> T) -> T {
    block_on(async {
        let mut rig = Rig::new(backend, setup).await;
        scenario(&mut rig).await
    })
}

/// Runs a future on a current-thread runtime, with a bound.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(within(future))
}

/// Longest that anything in a test may take: on an emulated processor most take ten times as long as on
/// a real one, some twenty.
pub const BOUND: Duration = Duration::from_mins(5);

/// A future's output, or a panic if it is not there in time.
pub async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(BOUND, future).await.expect("done in five minutes")
}

/// Yields to the runtime until a condition holds, with a bound.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + BOUND / 2;
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// How many steps another task makes while a guest is at work; it makes one whenever the guest lets
/// it.
pub async fn steps_beside(guest: impl Future<Output = ()>) -> usize {
    let mut steps = 0;
    let stepping = async {
        loop {
            steps += 1;
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        biased;
        () = guest => {}
        () = stepping => {}
    }
    steps
}

/// How often a ring's guests enter the kernel while that runs. (What the ring's own thread does depends
/// on how fast the machine is.)
pub async fn enters_while(uring: &Uring, work: impl Future<Output = ()>) -> u64 {
    let before = guests_enters(uring);
    work.await;
    guests_enters(uring) - before
}

fn guests_enters(uring: &Uring) -> u64 {
    let stats = uring.stats();
    stats.enters - stats.enters_overdue
}

/// As `enters_while`, of guests that share theirs. Where a round of all of them takes longer than the ring's
/// own thread waits, as on a slow machine, that parts them each time, and some enter alone: those are not
/// counted, but for no more than half of all.
pub async fn shared_enters_while(uring: &Uring, work: impl Future<Output = ()>) -> u64 {
    let before = uring.stats().enters_overdue;
    let enters = enters_while(uring, work).await;
    enters - (PARTED * (uring.stats().enters_overdue - before)).min(enters / 2)
}

/// Enters of guests that were parted once.
const PARTED: u64 = 10;

/// Runs guests as tasks, all at once.
pub async fn side_by_side(guests: impl IntoIterator<Item: Future<Output = ()> + Send + 'static>) {
    let tasks: Vec<_> = guests.into_iter().map(tokio::spawn).collect();
    for task in tasks {
        task.await.unwrap();
    }
}

/// Lets every other task of a current-thread runtime run a few times.
pub async fn yield_to_others() {
    for _ in 0..8 {
        tokio::task::yield_now().await;
    }
}

/// A guest is at something else for as long: what it has sent leaves, and its next send is not one of many.
pub async fn rest() {
    tokio::time::sleep(Duration::from_millis(2)).await;
}

/// A guest with a socket whose receive is armed, made in a runtime that has ended since.
pub fn armed_in_a_former_runtime(uring: &Uring) -> (Rig, Endpoint) {
    block_on(async {
        let mut rig = Rig::on_ring(uring).await;
        let endpoint = rig.endpoint(LOOPBACK).await;
        assert_eq!(rig.receive(endpoint.incoming, 1).await, Ok(vec![]));
        (rig, endpoint)
    })
}

/// The message of a call that must trap.
#[track_caller]
pub fn trap<T: Debug>(answer: wasmtime::Result<T>) -> String {
    format!("{:?}", answer.expect_err("must trap"))
}

/// A loopback address of the caller's own, so that no other test, binding to port 0, gets a port
/// that the caller has freed.
pub fn own_ip() -> Ipv4Addr {
    static NEXT: AtomicU16 = AtomicU16::new(1);
    let [beyond, next] = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    let [.., high, low] = std::process::id().to_be_bytes();
    // Beyond 255 of them another process's, which is hardly at work now.
    Ipv4Addr::new(127, next, high ^ beyond, low)
}

/// An address from its text.
pub fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

pub fn datagram(data: &[u8], to: Option<SocketAddr>) -> OutgoingDatagram {
    OutgoingDatagram { data: data.to_vec(), remote_address: to.map(to_wit) }
}

/// What datagrams carry.
pub fn payloads(datagrams: &[IncomingDatagram]) -> Vec<&[u8]> {
    datagrams.iter().map(|datagram| &*datagram.data).collect()
}

/// Who sent a datagram.
pub fn sender(datagram: &IncomingDatagram) -> SocketAddr {
    from_wit(datagram.remote_address)
}

pub fn to_wit(addr: SocketAddr) -> IpSocketAddress {
    match addr {
        SocketAddr::V4(addr) => IpSocketAddress::Ipv4(driver::Ipv4SocketAddress {
            port: addr.port(),
            address: addr.ip().octets().into(),
        }),
        SocketAddr::V6(addr) => IpSocketAddress::Ipv6(driver::Ipv6SocketAddress {
            port: addr.port(),
            flow_info: addr.flowinfo(),
            address: addr.ip().segments().into(),
            scope_id: addr.scope_id(),
        }),
    }
}

pub fn from_wit(addr: IpSocketAddress) -> SocketAddr {
    match addr {
        IpSocketAddress::Ipv4(addr) => {
            SocketAddrV4::new(<[u8; 4]>::from(addr.address).into(), addr.port).into()
        }
        IpSocketAddress::Ipv6(addr) => {
            let ip = <[u16; 8]>::from(addr.address).into();
            SocketAddrV6::new(ip, addr.port, addr.flow_info, addr.scope_id).into()
        }
    }
}
