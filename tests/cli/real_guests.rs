//! Guests of real toolchains print the same on wasmtime-wasi's sockets and on the ring: what is in
//! `tests/guests/*/expected.txt`. They come from `scripts/guests`.

mod tool;

use std::path::{Path, PathBuf};

use tool::{arg, has_rust_guests, run};

fn built(guest: &str) -> PathBuf {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    root.join("target/guests").join(guest).with_extension("wasm")
}

fn expected(guest: &str) -> String {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    let path = root.join("tests/guests").join(guest).join("expected.txt");
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[track_caller]
fn prints_the_same_on_both_backends(guest: &str) {
    let file = built(guest);
    let expected = expected(guest);
    assert!(file.exists(), "there is no {}: run scripts/guests", file.display());
    let stock = run(&["run", "--backend", "stock", arg(&file)]).with_code(0);
    assert_eq!(stock.stdout, expected, "on stock; stderr: {}", stock.stderr);
    let uring = run(&["run", "--backend", "uring", "--stats", arg(&file)]).with_code(0);
    assert_eq!(uring.stdout, expected, "on uring; stderr: {}", uring.stderr);
    let stats = uring.stats();
    assert!(stats["sockets_created"].as_u64() > Some(0), "{stats}");
    assert_eq!(stats["sockets_open"], 0, "{stats}");
}

#[test]
fn python_over_spins_bindings() {
    prints_the_same_on_both_backends("python-spin");
}

#[test]
fn pythons_socket_module() {
    prints_the_same_on_both_backends("python-socket");
}

#[test]
fn python_async_over_wasi_0_3() {
    prints_the_same_on_both_backends("python-async");
}

#[test]
fn rust_over_wit_bindgen() {
    if !has_rust_guests("the Rust guest") {
        assert!(!built("rust").exists(), "there is a Rust guest all the same");
        return;
    }
    prints_the_same_on_both_backends("rust");
}
