//! The memory that a socket takes which is bound, or waits for datagrams:
//! `idle/receiving/sockets_10000/uring_0.2/kernel`.

#[path = "support/figures.rs"]
mod figures;

use std::cell::OnceCell;
use std::path::Path;

use figures::{ROUNDS, Unit, criterion, give, group, is_test};
use wasi_uring_cli::measure::idle::{Idleness, SOCKETS_DEFAULT, Taken, measure};
use wasi_uring_cli::measure::{Backend, WasiArg};

/// Where `cargo test --benches` has each bench run once.
const SOCKETS_IN_TESTS: usize = 100;

fn main() {
    let mut criterion = criterion(Unit::Bytes);
    let (sockets, rounds) =
        if is_test() { (SOCKETS_IN_TESTS, 1) } else { (SOCKETS_DEFAULT, ROUNDS) };
    let command = Path::new(env!("CARGO_BIN_EXE_wasi-uring"));
    let measured = WasiArg::ALL.map(|wasi| (wasi, OnceCell::new()));
    for idleness in Idleness::ALL {
        let mut group =
            group(&mut criterion, format!("idle/{}/sockets_{sockets}", idleness.name()));
        for (wasi, measured) in &measured {
            for backend in Backend::ALL {
                for (part, of) in PARTS {
                    let name = format!("{}_{}/{part}", backend.name(), wasi.version());
                    give(&mut group, name, || {
                        let measured = measured.get_or_init(|| {
                            measure(command, *wasi, sockets, rounds, || ())
                                .expect("memory can be measured")
                        });
                        let one = measured
                            .iter()
                            .find(|idle| (idle.backend, idle.idleness) == (backend, idleness));
                        one.expect("all were measured").rounds.iter().map(of).collect()
                    });
                }
            }
        }
    }
    criterion.final_summary();
}

/// Whose memory, by name.
type Part = (&'static str, fn(&Taken) -> f64);

const PARTS: [Part; 2] = [("process", |taken| taken.process), ("kernel", |taken| taken.kernel)];
