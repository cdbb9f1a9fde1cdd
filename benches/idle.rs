//! The memory that a socket takes which is bound, or waits for datagrams:
//! `idle/receiving/sockets_10000/uring_0.2/kernel`.

use criterion::measurement::{Measurement, ValueFormatter};
use criterion::{Criterion, SamplingMode, Throughput};
use std::path::Path;
use std::time::Duration;
use wasi_uring::cli::measure::{Backend, Idleness, Taken, WasiArg, per_idle_socket};

const SOCKETS: usize = 10_000;

/// Where `cargo test --benches` has each bench run once.
const SOCKETS_IN_TESTS: usize = 100;

/// Bytes; nothing is timed.
struct Bytes;

impl Measurement for Bytes {
    type Intermediate = ();
    type Value = f64;

    fn start(&self) {}

    fn end(&self, (): ()) -> f64 {
        f64::NAN
    }

    fn add(&self, a: &f64, b: &f64) -> f64 {
        a + b
    }

    fn zero(&self) -> f64 {
        0.0
    }

    fn to_f64(&self, value: &f64) -> f64 {
        *value
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        self
    }
}

impl ValueFormatter for Bytes {
    fn scale_values(&self, _typical: f64, _values: &mut [f64]) -> &'static str {
        "B"
    }

    fn scale_throughputs(
        &self,
        _typical: f64,
        _throughput: &Throughput,
        _values: &mut [f64],
    ) -> &'static str {
        "B"
    }

    fn scale_for_machines(&self, _values: &mut [f64]) -> &'static str {
        "B"
    }
}

fn main() {
    let mut criterion = Criterion::default().with_measurement(Bytes).configure_from_args();
    let is_test = !std::env::args().any(|arg| arg == "--bench");
    let sockets = if is_test { SOCKETS_IN_TESTS } else { SOCKETS };
    for idleness in Idleness::ALL {
        let group = format!("idle/{}/sockets_{sockets}", idleness.name());
        let mut group = criterion.benchmark_group(group);
        // Each sample is a measurement however long it takes.
        group.sample_size(10).sampling_mode(SamplingMode::Flat);
        group.warm_up_time(Duration::from_nanos(1)).measurement_time(Duration::from_nanos(1));
        for wasi in WasiArg::ALL {
            for backend in [Backend::Stock, Backend::Uring] {
                for (part, of) in PARTS {
                    let name = format!("{}_{}/{part}", backend.name(), wasi.version());
                    group.bench_function(name, |bencher| {
                        bencher.iter_custom(|times| {
                            let command = Path::new(env!("CARGO_BIN_EXE_wasi-uring"));
                            let taken = per_idle_socket(command, wasi, backend, idleness, sockets);
                            #[expect(clippy::cast_precision_loss, reason = "few")]
                            let times = times as f64;
                            of(taken.expect("memory can be measured")) * times
                        });
                    });
                }
            }
        }
    }
    criterion.final_summary();
}

/// Whose memory, by name.
type Part = (&'static str, fn(Taken) -> f64);

const PARTS: [Part; 2] = [("process", |taken| taken.process), ("kernel", |taken| taken.kernel)];
