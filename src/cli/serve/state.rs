//! What a guest's store has: WASI, sockets, HTTP, and its bounds.

use std::sync::Once;

use hyper::{Request, Response};
use wasi_uring::{UdpCtx, UdpCtxView, UdpView};
use wasmtime::ResourceLimiter;
use wasmtime::component::ResourceTable;
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};
use wasmtime_wasi_http::{
    Error, RequestOptions, WasiBody, WasiHttpCtx, WasiHttpCtxView, WasiHttpHooks, WasiHttpView,
};

use crate::terminal::say;

/// Handles that a guest may hold: sockets, streams, pollables, fields of headers.
const HANDLES_MAX: usize = 1 << 14;

/// A store's data. Stores of the stock linker have no `udp`, and nothing there reads it.
pub(super) struct State {
    wasi: WasiCtx,
    udp: Option<UdpCtx>,
    http: WasiHttpCtx,
    hooks: Hooks,
    table: ResourceTable,
    pub(super) memory: Memory,
}

impl State {
    pub(super) fn new(wasi: WasiCtx, udp: Option<UdpCtx>, memory_max: usize) -> Self {
        let mut table = ResourceTable::new();
        table.set_max_capacity(HANDLES_MAX);
        let memory = Memory { bytes: 0, bytes_max: memory_max };
        Self { wasi, udp, http: WasiHttpCtx::new(), hooks: Hooks, table, memory }
    }
}

impl WasiView for State {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

impl UdpView for State {
    fn udp(&mut self) -> UdpCtxView<'_> {
        let ctx = self.udp.as_mut().expect("stores of the uring linker have a UdpCtx");
        UdpCtxView { ctx, table: &mut self.table }
    }
}

impl WasiHttpView for State {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        WasiHttpCtxView { hooks: &mut self.hooks, table: &mut self.table, ctx: &mut self.http }
    }
}

/// Guests answer requests; they do not make any.
struct Hooks;

/// A response, and what is left to do for its body.
type Received = (Response<WasiBody>, Box<dyn Future<Output = Result<(), Error>> + Send>);

impl WasiHttpHooks for Hooks {
    fn send_request(
        &mut self,
        request: Request<WasiBody>,
        _options: Option<RequestOptions>,
        _done: Box<dyn Future<Output = Result<(), Error>> + Send>,
    ) -> Box<dyn Future<Output = Result<Received, Error>> + Send> {
        static TOLD: Once = Once::new();
        TOLD.call_once(|| {
            say(format_args!(
                "refused a guest's request to {}; serve has no outgoing HTTP",
                request.uri(),
            ));
        });
        Box::new(async { Err(Error::HttpRequestDenied) })
    }
}

/// All that a guest's memories and tables have, together.
pub(super) struct Memory {
    bytes: usize,
    bytes_max: usize,
}

impl Memory {
    /// What is granted stays counted, even if the growth then fails for another reason: that cannot be told from a growth
    /// that was never granted.
    fn grant(&mut self, more: usize) -> bool {
        match self.bytes.checked_add(more) {
            Some(bytes) if bytes <= self.bytes_max => {
                self.bytes = bytes;
                true
            }
            _ => false,
        }
    }
}

impl ResourceLimiter for Memory {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        Ok(self.grant(desired.saturating_sub(current)))
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let elements = desired.saturating_sub(current);
        Ok(self.grant(elements.saturating_mul(size_of::<usize>())))
    }
}
