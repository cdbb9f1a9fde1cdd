//! Guests of each toolchain and both versions, through each host, all at once on a multi-thread
//! runtime. wasmtime-wasi's own UDP is not allowed in these hosts, so what works is the ring's.

use std::cell::RefCell;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};

use opentelemetry::metrics::MeterProvider;
use tokio::sync::Semaphore;
use wasi_uring::{Quota, Uring};
use wasmtime::Store;
use wasmtime::component::Component;
use wasmtime_wasi::p2::pipe::MemoryOutputPipe;
use wasmtime_wasi::{I32Exit, WasiCtx, WasiCtxBuilder};

use crate::common::filter::with_filter;
use crate::common::{block_on, engine, eventually, uring_with, within};
use crate::policies::exported;
use crate::{fallback, generic_store, multi_thread, one_line, otel, tenants};

/// A command, and what it prints.
struct Program {
    component: Component,
    args: &'static [&'static str],
    expected: String,
    /// How many run at once.
    guests: usize,
}

/// Set by scripts/test where the Rust guest's compiler cannot be had.
const WITHOUT_RUST: &str = "WASI_URING_WITHOUT_RUST_GUEST";

/// More than any guest prints.
const PRINTED_BYTES_MAX: usize = 1 << 20;

/// The guests that `scripts/guests` builds.
const BUILT: [&str; 4] = ["python-spin", "python-socket", "python-async", "rust"];

/// Compiled once for all tests.
fn programs() -> &'static [Program] {
    static PROGRAMS: OnceLock<Vec<Program>> = OnceLock::new();
    PROGRAMS.get_or_init(|| {
        let cycle2 = include_str!("../../src/cli/guests/cycle2.wat");
        let cycle3 = include_str!("../../src/cli/guests/cycle3.wat");
        let mut programs = Vec::new();
        for text in [cycle2, cycle3] {
            let component = Component::new(engine(), text).unwrap();
            let args: [&[&str]; 3] =
                [&["cycle", "dns", "20"], &["cycle", "echo", "100"], &["cycle", "batch", "20"]];
            programs.extend(args.map(|args| {
                let component = component.clone();
                Program { component, args, expected: String::new(), guests: 8 }
            }));
        }
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        for name in BUILT {
            if name == "rust" && std::env::var_os(WITHOUT_RUST).is_some() {
                continue; // the command's tests say so
            }
            let file = root.join("target/guests").join(name).with_extension("wasm");
            assert!(file.exists(), "there is no {}: run scripts/guests", file.display());
            let component = Component::from_file(engine(), file).unwrap();
            let expected = root.join("tests/guests").join(name).join("expected.txt");
            let expected = std::fs::read_to_string(expected).unwrap();
            programs.push(Program { component, args: &["guest"], expected, guests: 1 });
        }
        programs
    })
}

/// Runs every program in hosts, each with a ring handle of its own, so that what its guests open is told
/// apart.
fn all_run<H, F>(host: impl Fn(Uring) -> H)
where
    H: Fn(&'static Component, WasiCtxBuilder) -> F,
    F: Future<Output = wasmtime::Result<Result<(), ()>>> + Send + 'static,
{
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
    runtime.block_on(async {
        let rings: Vec<_> = programs().iter().map(|_| uring_with(1024)).collect();
        let mut guests = Vec::new();
        for (program, uring) in programs().iter().zip(&rings) {
            let run = host(uring.clone());
            for _ in 0..program.guests {
                let stdout = MemoryOutputPipe::new(PRINTED_BYTES_MAX);
                let mut wasi = WasiCtx::builder();
                wasi.args(program.args).stdout(stdout.clone());
                let ran = tokio::spawn(run(&program.component, wasi));
                guests.push((program, stdout, ran));
            }
        }
        for (program, stdout, ran) in guests {
            let printed = || String::from_utf8(stdout.contents().to_vec()).unwrap();
            match within(ran).await.unwrap() {
                Ok(ended) => assert_eq!(ended, Ok(()), "{:?}: {}", program.args, printed()),
                Err(error) => {
                    let exited = matches!(error.downcast_ref(), Some(I32Exit(0)));
                    assert!(exited, "{:?}: {error:?}; printed: {}", program.args, printed());
                }
            }
            assert_eq!(printed(), program.expected);
        }
        for uring in &rings {
            assert!(uring.stats().sockets_created > 0, "its guests had other sockets");
            eventually("all are closed", || uring.stats().sockets_open == 0).await;
        }
    });
}

#[test]
fn one_line_serves_guests_of_every_kind() {
    let linker = Arc::new(one_line::linker(engine()).unwrap());
    all_run(|uring| {
        let linker = Arc::clone(&linker);
        move |component, mut wasi| {
            let linker = Arc::clone(&linker);
            let guest = one_line::Guest::new(wasi.build(), &uring);
            async move { one_line::run(&linker, component, guest).await }
        }
    });
}

#[test]
fn generic_store_serves_guests_of_every_kind() {
    let linker = Arc::new(generic_store::linker(engine()).unwrap());
    let sockets = Arc::new(Semaphore::new(4096));
    let limit = Arc::clone(&sockets);
    all_run(|uring| {
        let (linker, sockets) = (Arc::clone(&linker), Arc::clone(&sockets));
        move |component, mut wasi| {
            let linker = Arc::clone(&linker);
            let state = generic_store::State::new(48_u32, wasi.build(), &uring, &sockets);
            async move { generic_store::run(&linker, component, state).await }
        }
    });
    assert_eq!(limit.available_permits(), 4096, "every permit is back");
}

/// As a host that serves many guests does it.
fn server(uring: Uring) -> impl Fn(&'static Component, WasiCtxBuilder) -> Ran {
    move |component, mut wasi| {
        let server = multi_thread::Server::new(component, &uring).unwrap();
        Box::pin(server.run(wasi.build()))
    }
}

type Ran = Pin<Box<dyn Future<Output = wasmtime::Result<Result<(), ()>>> + Send>>;

#[test]
fn multi_thread_serves_guests_of_every_kind() {
    all_run(server);
}

#[test]
fn tenants_serves_guests_of_every_kind() {
    let linker = Arc::new(tenants::linker(engine()).unwrap());
    let host = Quota::new(4096);
    all_run(|uring| {
        let (linker, tenant) = (Arc::clone(&linker), tenants::Tenant::new(&uring, &host));
        move |component, mut wasi| {
            let mut workload = tenants::Workload::default();
            let part = workload.add(&tenant, wasi.build());
            let (linker, mut store) = (Arc::clone(&linker), Store::new(engine(), workload));
            async move { tenants::run(&mut store, &linker, component, part).await }
        }
    });
    assert_eq!((host.in_use(), host.refusals()), (0, 0));
}

#[test]
fn otel_sees_guests_of_every_kind() {
    let observed = RefCell::new(Vec::new());
    all_run(|uring| {
        let (provider, exporter) = otel::provider();
        otel::observe(&provider.meter("guests"), &uring);
        observed.borrow_mut().push((uring.clone(), provider, exporter));
        server(uring)
    });
    for (uring, provider, exporter) in observed.take() {
        provider.force_flush().unwrap();
        let stats = uring.stats();
        let created = exported(&exporter, "wasi_uring.sockets.created");
        assert_eq!(created, [stats.sockets_created]);
        assert_eq!(exported(&exporter, "wasi_uring.datagrams.sent"), [stats.datagrams_sent]);
        provider.shutdown().unwrap();
    }
}

#[test]
fn fallback_serves_guests_of_every_kind_where_there_are_rings() {
    all_run(|uring| {
        let sockets = fallback::Sockets::of(Ok(uring));
        move |component, mut wasi| {
            let (linker, guest) = (sockets.linker(engine()).unwrap(), sockets.guest(&mut wasi));
            async move { fallback::run(&linker, component, guest).await }
        }
    });
}

#[test]
fn fallback_serves_guests_without_rings_too() {
    let sockets = with_filter(libc::SYS_io_uring_setup, libc::EPERM, || {
        fallback::Sockets::of(Uring::builder().build())
    });
    assert!(!sockets.are_on_rings());
    let linker = sockets.linker(engine()).unwrap();
    for program in programs().iter().filter(|program| program.expected.is_empty()) {
        let guest = sockets.guest(WasiCtx::builder().args(program.args));
        let ended = block_on(fallback::run(&linker, &program.component, guest));
        assert_eq!(ended.unwrap(), Ok(()), "{:?}", program.args);
    }
}
