//! The guest program: compiled, linked, and run once for each request.

use hyper::Request;
use hyper::body::{Body, Bytes};
use wasi_uring::Uring;
use wasmtime::component::{Component, Linker};
use wasmtime::error::Context;
use wasmtime::{
    Config, Engine, InstanceAllocationStrategy, PoolingAllocationConfig, Result, Store, format_err,
};
use wasmtime_wasi::WasiCtx;
use wasmtime_wasi_http::p2::bindings::ProxyPre;
use wasmtime_wasi_http::p2::bindings::http::types as types_2;
use wasmtime_wasi_http::p3::bindings::ServicePre;
use wasmtime_wasi_http::p3::bindings::http::types as types_3;
use wasmtime_wasi_http::{Error, WasiHttpView, p2, p3};

use super::answer::Answers;
use super::state::State;
use crate::args::ServeArgs;
use crate::host::{self, Net};
use crate::terminal::Failure;

/// What the pool holds for each guest, beside memory. What a component has is known when it is compiled, and one that has
/// more does without the pool.
const CORE_INSTANCES: u32 = 64;
const MEMORIES: u32 = 4;
const TABLES: u32 = 16;
const TABLE_ELEMENTS: usize = 1 << 16;
/// A guest of 0.3 has one for each of its tasks that is suspended in the middle of a call.
const STACKS: u32 = 8;

/// A page of memory (WebAssembly core specification, "Memory Instances").
const PAGE_BYTES: u64 = 1 << 16;

/// What a program is loaded with.
pub(super) struct Settings<'a> {
    pub(super) args: &'a ServeArgs,
    /// `None` for stock.
    pub(super) uring: Option<&'a Uring>,
    /// For each guest.
    pub(super) sockets_max: u32,
}

/// A guest program, compiled and linked.
pub(super) struct Program {
    engine: Engine,
    pre: Pre,
    uring: Option<Uring>,
    sockets_max: u32,
    net: Net,
    envs: Vec<(String, String)>,
    memory_max: usize,
}

/// By the version of WASI whose handler it exports.
enum Pre {
    P2(ProxyPre<State>),
    P3(ServicePre<State>),
}

impl Program {
    pub(super) fn load(settings: &Settings<'_>) -> Result<Self, Failure> {
        let Settings { args, uring, sockets_max } = *settings;
        let binary = host::read(&args.file).map_err(Failure::usage)?;
        let (component, is_concurrent) = compile(&binary, args).map_err(|error| {
            Failure::usage(error.context(format!("{} cannot be served", args.file.display())))
        })?;
        let engine = component.engine().clone();
        let linker = linker(&engine, uring.is_some(), is_concurrent).map_err(Failure::run)?;
        let pre = linker.instantiate_pre(&component).map_err(|error| {
            Failure::usage(error.context(
                "the component cannot be linked: it imports what is not in WASI 0.2 or 0.3 with wasi:http, \
                 or not with this type",
            ))
        })?;
        let pre = match ServicePre::new(pre.clone()) {
            Ok(pre) => Pre::P3(pre),
            Err(_) => Pre::P2(ProxyPre::new(pre).map_err(|_| no_handler(&component))?),
        };
        Ok(Self {
            engine,
            pre,
            uring: uring.cloned(),
            sockets_max,
            net: Net::new(args.net),
            envs: args.envs.clone(),
            memory_max: args.memory_max(),
        })
    }

    pub(super) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// For one request.
    pub(super) fn new_store(&self) -> Store<State> {
        let mut wasi = WasiCtx::builder();
        wasi.inherit_stdout().inherit_stderr().envs(&self.envs);
        self.net.configure(&mut wasi);
        let udp = self.uring.as_ref().map(|uring| self.net.udp_ctx(uring, self.sockets_max));
        let state = State::new(wasi.build(), udp, self.memory_max);
        let mut store = Store::new(&self.engine, state);
        store.limiter(|state| &mut state.memory);
        store
    }

    /// Has an instance of its own in this store handle a request. It returns when all is done that the guest still does when
    /// it has answered, its answer's body included.
    pub(super) async fn handle<B>(
        &self,
        store: &mut Store<State>,
        request: Request<B>,
        answers: Answers,
    ) -> Result<()>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Error>,
    {
        match &self.pre {
            Pre::P2(pre) => handle_2(pre, store, request, answers).await,
            Pre::P3(pre) => handle_3(pre, store, request, answers).await,
        }
    }
}

async fn handle_2<B>(
    pre: &ProxyPre<State>,
    store: &mut Store<State>,
    request: Request<B>,
    answers: Answers,
) -> Result<()>
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Error>,
{
    let proxy = pre.instantiate_async(&mut *store).await.context("cannot be instantiated")?;
    let mut http = store.data_mut().http();
    let request = http.new_incoming_request(types_2::Scheme::Http, request)?;
    let out = http.new_response_outparam_from_callback(move |answer| match answer {
        Ok(response) => answers.begin(response),
        Err(code) => {
            let is_body_size = matches!(code, types_2::ErrorCode::HttpRequestBodySize(_));
            answers.give_up(&code, is_body_size);
        }
    })?;
    let handled = proxy.wasi_http_incoming_handler().call_handle(store, request, out);
    handled.await.context("trapped")
}

async fn handle_3<B>(
    pre: &ServicePre<State>,
    store: &mut Store<State>,
    request: Request<B>,
    answers: Answers,
) -> Result<()>
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Error>,
{
    let service = pre.instantiate_async(&mut *store).await.context("cannot be instantiated")?;
    let hooks = store.data_mut().http().hooks;
    let (request, request_done) = p3::Request::from_http(hooks, request);
    let handled = store.run_concurrent(async |store| {
        match service.handle(store, request).await? {
            Ok(response) => {
                answers.begin(store.with(|store| response.into_http(store, request_done))?);
            }
            Err(code) => {
                let is_body_size = matches!(code, types_3::ErrorCode::HttpRequestBodySize(_));
                answers.give_up(&code, is_body_size);
            }
        }
        // The store runs the guest's tasks, and hands its body on, only in here.
        std::future::poll_fn(|cx| store.poll_no_interesting_tasks(cx)).await;
        Ok(())
    });
    handled.await.flatten().context("trapped")
}

/// Compiles a component, for a pool if it fits; and whether it may use WASI 0.3.
fn compile(binary: &[u8], args: &ServeArgs) -> Result<(Component, bool)> {
    let attempt = |is_pooled| {
        // As for `run`: what WASI 0.3 needs of an engine costs every call.
        let compile = |is_concurrent| {
            let engine = Engine::new(&config(args, is_pooled, is_concurrent))?;
            Ok((Component::new(&engine, binary)?, is_concurrent))
        };
        compile(false).or_else(|_: wasmtime::Error| compile(true))
    };
    let pooled = attempt(true);
    let no_pool = match pooled {
        Ok(compiled) => return Ok(compiled),
        Err(error) => error,
    };
    let (component, is_concurrent) = attempt(false)?;
    // The pool has refused it for that, and the bound of its store would each time.
    let pages = component.resources_required().and_then(|all| all.max_initial_memory_size);
    let needed = pages.unwrap_or(0).saturating_mul(PAGE_BYTES);
    if needed > args.memory_max() as u64 {
        return Err(format_err!(
            "it begins with {} MiB of memory; --memory-max allows {}",
            needed.div_ceil(1 << 20),
            args.memory_max_mib,
        ));
    }
    tracing::warn!("no pool of instances, each request makes and frees its memory: {no_pool:#}");
    Ok((component, is_concurrent))
}

fn config(args: &ServeArgs, is_pooled: bool, is_concurrent: bool) -> Config {
    let mut config = Config::new();
    config.concurrency_support(is_concurrent).epoch_interruption(true);
    if is_pooled {
        let guests = args.requests_max;
        let mut pool = PoolingAllocationConfig::new();
        pool.total_component_instances(guests)
            .total_core_instances(guests.saturating_mul(CORE_INSTANCES))
            .max_core_instances_per_component(CORE_INSTANCES)
            .total_memories(guests.saturating_mul(MEMORIES))
            .max_memories_per_component(MEMORIES)
            .max_memory_size(args.memory_max())
            .total_tables(guests.saturating_mul(TABLES))
            .max_tables_per_component(TABLES)
            .table_elements(TABLE_ELEMENTS)
            .total_stacks(guests.saturating_mul(STACKS));
        config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    }
    config
}

fn linker(engine: &Engine, has_uring: bool, is_concurrent: bool) -> Result<Linker<State>> {
    let mut linker = Linker::new(engine);
    if has_uring {
        wasi_uring::p2::add_to_linker(&mut linker)?;
    } else {
        wasmtime_wasi::p2::add_to_linker_async(&mut linker)?;
    }
    p2::add_only_http_to_linker_async(&mut linker)?;
    if is_concurrent {
        if has_uring {
            wasi_uring::p3::add_to_linker(&mut linker)?;
        } else {
            wasmtime_wasi::p3::add_to_linker(&mut linker)?;
        }
        p3::add_to_linker(&mut linker)?;
    }
    Ok(linker)
}

fn no_handler(component: &Component) -> Failure {
    let ty = component.component_type();
    let exports: Vec<_> = ty.exports(component.engine()).map(|(name, _)| name).collect();
    let exported = match exports.as_slice() {
        [] => "nothing".to_owned(),
        names => names.join(", "),
    };
    let remedy = if exports.iter().any(|name| name.starts_with("wasi:cli/run@")) {
        "`wasi-uring run` runs such commands"
    } else {
        "build it for the world wasi:http/proxy or wasi:http/service, or give another file"
    };
    Failure::usage(format_err!(
        "the component exports neither wasi:http/incoming-handler@0.2 nor wasi:http/handler@0.3, but \
         {exported}; {remedy}"
    ))
}
