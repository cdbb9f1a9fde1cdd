//! Guests of real toolchains print the same on wasmtime-wasi's sockets and on the ring: what is in
//! `tests/guests/*/expected.txt`. They come from `scripts/guests`.

mod tool;

use std::io::Write;
use std::path::{Path, PathBuf};

use tool::{arg, run};

/// Set by scripts/test where the Rust guest's compiler cannot be had.
const WITHOUT_RUST: &str = "WASI_URING_WITHOUT_RUST_GUEST";

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
    if std::env::var_os(WITHOUT_RUST).is_some() {
        assert!(!built("rust").exists(), "{WITHOUT_RUST} is set, but there is a Rust guest");
        // Past the test runner, which keeps a passing test's output to itself.
        let note = "\nNOT TESTED: the Rust guest, whose compiler cannot be had here \
                    (scripts/guests says why)\n";
        std::io::stderr().write_all(note.as_bytes()).unwrap();
        return;
    }
    prints_the_same_on_both_backends("rust");
}
