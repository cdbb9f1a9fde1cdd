//! A guest of WASI 0.3 under remote control, and one of 0.2 beside it in the same store.
//!
//! Calls that wait can be begun, looked at, waited for and cancelled one by one. Those of the guest
//! only get further while something of its store is awaited: any call, or [`Rig3::settle`].

#![allow(dead_code, reason = "every test binary uses its own part of the rig")]
#![allow(clippy::needless_pass_by_value, reason = "scenarios are written where they are run")]

use std::fmt::Debug;
use std::net::SocketAddr;
use std::sync::OnceLock;

use wasi_uring::{Stats, Uring};
use wasmtime::component::{Component, Linker};
use wasmtime_wasi::p3::bindings::sockets::types::{IpAddressFamily, IpSocketAddress};

use crate::common::{
    self, Backend, Host, Rig, Setup, block_on, engine, host, on_each, within, yield_to_others,
};

mod driver {
    wasmtime::component::bindgen!({
        path: ["src/p3/udp.wit", "tests/guests/driver3.wit"],
        world: "test:driver3/driver",
        exports: { default: async },
        with: { "wasi:sockets/shared": wasmtime_wasi::p3::bindings::sockets::types },
        additional_derives: [PartialEq, Eq],
    });
}

pub(crate) use driver::Driver;
pub(crate) use driver::test::driver3::errors::ErrorCode;

pub(crate) const V4: IpAddressFamily = IpAddressFamily::Ipv4;
pub(crate) const V6: IpAddressFamily = IpAddressFamily::Ipv6;

/// What a `receive` answers.
pub(crate) type Received = Result<(Vec<u8>, SocketAddr), ErrorCode>;

/// How a call stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Started,
    Returned,
    Cancelled,
}

impl From<u32> for Status {
    fn from(status: u32) -> Self {
        match status {
            1 => Self::Started,
            2 => Self::Returned,
            // Before it returned; a host's call has always started.
            4 => Self::Cancelled,
            other => panic!("no call of a host's function stands at {other}"),
        }
    }
}

/// A call that the guest has made and whose answer it has not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct Call(u32);

pub(crate) struct Rig3 {
    /// The guest of 0.2, whose store it is.
    pub(crate) rig: Rig,
    pub(crate) guest: Driver,
}

/// The guest, compiled once per process.
pub(crate) fn component() -> &'static Component {
    static COMPONENT: OnceLock<Component> = OnceLock::new();
    COMPONENT
        .get_or_init(|| Component::new(engine(), include_str!("../guests/driver3.wat")).unwrap())
}

/// Both versions of WASI.
pub(crate) fn add_to_linker(backend: Backend, linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    match backend {
        Backend::Stock => wasmtime_wasi::p3::add_to_linker(linker),
        Backend::Uring => wasi_uring::p3::add_to_linker(linker),
    }
}

/// Runs a scenario on wasmtime-wasi's sockets and on the ring, each in a runtime of its own.
pub(crate) fn on_both(setup: Setup, scenario: impl AsyncFn(&mut Rig3)) {
    on_each(|backend| on(backend, setup.clone(), &scenario));
}

/// Runs a scenario on both backends, which must return the same.
#[track_caller]
pub(crate) fn alike<T: Debug + PartialEq>(
    setup: Setup,
    scenario: impl AsyncFn(&mut Rig3) -> T,
) -> T {
    common::same(|backend| on(backend, setup.clone(), &scenario))
}

/// Runs a scenario on one backend, on a current-thread runtime.
pub(crate) fn on<T>(backend: Backend, setup: Setup, scenario: impl AsyncFn(&mut Rig3) -> T) -> T {
    block_on(async {
        let mut rig = Rig3::new(backend, setup).await;
        scenario(&mut rig).await
    })
}

pub(crate) fn family(addr: SocketAddr) -> IpAddressFamily {
    if addr.is_ipv4() { V4 } else { V6 }
}

impl Rig3 {
    pub(crate) async fn new(backend: Backend, setup: Setup) -> Self {
        let version = setup.version;
        let (uring, mut linker, mut store) = host(engine(), backend, setup);
        add_to_linker(backend, &mut linker).unwrap();
        let guest = Driver::instantiate_async(&mut store, component(), &linker).await.unwrap();
        Self { rig: Rig::in_store(backend, version, uring, &linker, store).await, guest }
    }

    /// A guest on this ring.
    pub(crate) async fn on_ring(uring: &Uring) -> Self {
        Self::new(Backend::Uring, Setup::of(uring)).await
    }

    pub(crate) fn is_uring(&self) -> bool {
        self.rig.backend == Backend::Uring
    }

    pub(crate) fn stats(&self) -> Stats {
        self.rig.stats()
    }

    /// Lets the guest's calls and the rest of the runtime get further for a while.
    pub(crate) async fn settle(&mut self) {
        self.rig.store.run_concurrent(async |_| yield_to_others().await).await.unwrap();
    }

    // ---- wasi:sockets/types.udp-socket --------------------------------------------------------

    pub(crate) async fn create(&mut self, family: IpAddressFamily) -> Result<u32, ErrorCode> {
        self.guest.call_create(&mut self.rig.store, family).await.unwrap()
    }

    pub(crate) async fn bind(
        &mut self,
        socket: u32,
        addr: impl Into<SocketAddr>,
    ) -> Result<(), ErrorCode> {
        let addr = IpSocketAddress::from(addr.into());
        within(self.guest.call_bind(&mut self.rig.store, socket, addr)).await.unwrap()
    }

    pub(crate) async fn connect(&mut self, socket: u32, to: SocketAddr) -> Result<(), ErrorCode> {
        within(self.guest.call_connect(&mut self.rig.store, socket, to.into())).await.unwrap()
    }

    pub(crate) async fn disconnect(&mut self, socket: u32) -> Result<(), ErrorCode> {
        within(self.guest.call_disconnect(&mut self.rig.store, socket)).await.unwrap()
    }

    pub(crate) async fn local(&mut self, socket: u32) -> Result<SocketAddr, ErrorCode> {
        let call = self.guest.call_get_local_address(&mut self.rig.store, socket);
        within(call).await.unwrap().map(SocketAddr::from)
    }

    pub(crate) async fn remote(&mut self, socket: u32) -> Result<SocketAddr, ErrorCode> {
        let answer = self.guest.call_get_remote_address(&mut self.rig.store, socket).await;
        answer.unwrap().map(SocketAddr::from)
    }

    pub(crate) async fn family(&mut self, socket: u32) -> IpAddressFamily {
        self.guest.call_get_address_family(&mut self.rig.store, socket).await.unwrap()
    }

    pub(crate) async fn hop_limit(&mut self, socket: u32) -> Result<u8, ErrorCode> {
        self.guest.call_get_unicast_hop_limit(&mut self.rig.store, socket).await.unwrap()
    }

    pub(crate) async fn set_hop_limit(&mut self, socket: u32, value: u8) -> Result<(), ErrorCode> {
        let call = self.guest.call_set_unicast_hop_limit(&mut self.rig.store, socket, value);
        within(call).await.unwrap()
    }

    pub(crate) async fn receive_buffer(&mut self, socket: u32) -> Result<u64, ErrorCode> {
        self.guest.call_get_receive_buffer_size(&mut self.rig.store, socket).await.unwrap()
    }

    pub(crate) async fn set_receive_buffer(
        &mut self,
        socket: u32,
        bytes: u64,
    ) -> Result<(), ErrorCode> {
        let call = self.guest.call_set_receive_buffer_size(&mut self.rig.store, socket, bytes);
        within(call).await.unwrap()
    }

    pub(crate) async fn send_buffer(&mut self, socket: u32) -> Result<u64, ErrorCode> {
        self.guest.call_get_send_buffer_size(&mut self.rig.store, socket).await.unwrap()
    }

    pub(crate) async fn set_send_buffer(
        &mut self,
        socket: u32,
        bytes: u64,
    ) -> Result<(), ErrorCode> {
        let call = self.guest.call_set_send_buffer_size(&mut self.rig.store, socket, bytes);
        within(call).await.unwrap()
    }

    pub(crate) async fn drop_socket(&mut self, socket: u32) {
        self.guest.call_drop_socket(&mut self.rig.store, socket).await.unwrap();
    }

    // ---- send and receive, for which the guest waits ------------------------------------------

    pub(crate) async fn send(
        &mut self,
        socket: u32,
        data: &[u8],
        to: Option<SocketAddr>,
    ) -> Result<(), ErrorCode> {
        let Self { rig, guest } = self;
        let (data, to) = (data.to_vec(), to.map(IpSocketAddress::from));
        let sending = async move |store: &_| guest.call_send(store, socket, data, to).await;
        within(rig.store.run_concurrent(sending)).await.unwrap().unwrap()
    }

    pub(crate) async fn receive(&mut self, socket: u32) -> Received {
        let Self { rig, guest } = self;
        let receiving = async |store: &_| guest.call_receive(store, socket).await;
        let answer = within(rig.store.run_concurrent(receiving)).await.unwrap().unwrap();
        answer.map(|(data, from)| (data, from.into()))
    }

    // ---- and one by one -----------------------------------------------------------------------

    pub(crate) async fn start_send(
        &mut self,
        socket: u32,
        data: &[u8],
        to: Option<SocketAddr>,
    ) -> (Status, Call) {
        let (store, to) = (&mut self.rig.store, to.map(IpSocketAddress::from));
        let begun = within(self.guest.call_start_send(store, socket, data, to, 0)).await;
        let (status, call) = begun.unwrap();
        (status.into(), Call(call))
    }

    pub(crate) async fn start_receive(&mut self, socket: u32) -> (Status, Call) {
        let begun = within(self.guest.call_start_receive(&mut self.rig.store, socket)).await;
        let (status, call) = begun.unwrap();
        (status.into(), Call(call))
    }

    /// How a call stands, without waiting for it.
    pub(crate) async fn poll(&mut self, call: Call) -> Status {
        within(self.guest.call_poll(&mut self.rig.store, call.0)).await.unwrap().into()
    }

    /// Cancels a call that has not been seen to return, and waits until it has ended.
    pub(crate) async fn cancel(&mut self, call: Call) -> Status {
        let Self { rig, guest } = self;
        let cancelling = async |store: &_| guest.call_cancel(store, call.0).await;
        within(rig.store.run_concurrent(cancelling)).await.unwrap().unwrap().into()
    }

    async fn wait(&mut self, call: Call) {
        let Self { rig, guest } = self;
        let waiting = async |store: &_| guest.call_wait(store, call.0).await;
        let status = within(rig.store.run_concurrent(waiting)).await.unwrap().unwrap();
        assert_eq!(Status::from(status), Status::Returned);
    }

    /// Waits until a send has returned.
    pub(crate) async fn sent(&mut self, call: Call) -> Result<(), ErrorCode> {
        self.wait(call).await;
        self.guest.call_sent(&mut self.rig.store, call.0).await.unwrap()
    }

    /// Waits until a receive has returned.
    pub(crate) async fn received(&mut self, call: Call) -> Received {
        self.wait(call).await;
        let answer = self.guest.call_received(&mut self.rig.store, call.0).await.unwrap();
        answer.map(|(data, from)| (data, from.into()))
    }

    // ---- what scenarios do often --------------------------------------------------------------

    /// A new socket bound to an address, and where it is bound.
    pub(crate) async fn bound(&mut self, addr: impl Into<SocketAddr>) -> (u32, SocketAddr) {
        let addr = addr.into();
        let socket = self.create(family(addr)).await.unwrap();
        self.bind(socket, addr).await.unwrap();
        let local = self.local(socket).await.unwrap();
        (socket, local)
    }

    /// A receive for which nothing is there.
    pub(crate) async fn waiting_receive(&mut self, socket: u32) -> Call {
        let (status, call) = self.start_receive(socket).await;
        assert_eq!(status, Status::Started, "nothing is there");
        call
    }

    /// The payload of the next datagram. On the ring, a call returns at once what is queued: the
    /// guest neither makes a subtask nor waits. (Fewer than 32 in a row: then the task yields.)
    pub(crate) async fn receive_queued(&mut self, socket: u32) -> Vec<u8> {
        let (status, call) = self.start_receive(socket).await;
        if self.is_uring() {
            assert_eq!(status, Status::Returned, "it is queued");
        }
        self.received(call).await.unwrap().0
    }

    /// Those of the calls that have returned.
    pub(crate) async fn returned(&mut self, calls: &[Call]) -> Vec<Call> {
        let mut returned = Vec::new();
        for call in calls {
            if self.poll(*call).await == Status::Returned {
                returned.push(*call);
            }
        }
        returned
    }

    /// What those calls have received that have returned, once so many have.
    pub(crate) async fn returned_exactly(&mut self, calls: &[Call], count: usize) -> Vec<Call> {
        let deadline = tokio::time::Instant::now() + common::BOUND / 2;
        loop {
            self.settle().await;
            let returned = self.returned(calls).await;
            if returned.len() >= count {
                assert_eq!(returned.len(), count, "{returned:?}");
                return returned;
            }
            assert!(tokio::time::Instant::now() < deadline, "only {returned:?} of {calls:?}");
        }
    }
}
