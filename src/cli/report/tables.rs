//! Results as tables on a terminal.

use super::{Figure, Flood, Latency, Memory, Neighbour, Report, Speed};
use crate::measure::{FLOOR, Implementation, STD, TOKIO, TOKIO_URING, percent};
use crate::terminal::{print, table};

/// Speed, bench by bench.
pub(crate) fn speed(report: &Report) {
    let results = &report.results;
    if results.is_empty() {
        return;
    }
    let mut guests = table([
        "bench",
        "WASI",
        "guests",
        "stock µs",
        "uring µs",
        "× stock",
        "× stock, wall",
        "× std",
        "× floor",
        "enters/op",
        "suspends/op",
        "spread",
    ]);
    for speed in results {
        for (uring, stock) in speed.against_stock() {
            guests.add_row(guest_row(speed, uring, stock));
        }
    }
    print(guests);
    let mut natives =
        table(["bench", "guests", "std µs", "tokio µs", "tokio-uring µs", "floor µs"]);
    for speed in results {
        let micros = |native: Implementation| number(speed.micros(native), 2);
        let [std, tokio, tokio_uring, floor] = [STD, TOKIO, TOKIO_URING, FLOOR].map(micros);
        let (bench, guests) = (speed.bench.clone(), speed.guests.to_string());
        natives.add_row([bench, guests, std, tokio, tokio_uring, floor]);
    }
    print(natives);
    print(
        "µs: CPU time per operation, median. × stock, × std, × floor: how many times as fast as \
         wasmtime-wasi, as a plain Rust program and as the bare ring the guest on the ring is, \
         round by round, median. suspends/op: how often a guest gave its thread away, on stock \
         and on the ring. !: too noisy to believe.",
    );
}

fn guest_row(speed: &Speed, uring: Implementation, stock: Implementation) -> [String; 12] {
    let ratio = speed.cpu_ratio(uring, stock);
    let wall = speed.ratio(uring, stock).map_or(f64::NAN, |ratio| ratio.wall.median);
    let measured = [uring, stock].map(|one| speed.measured(one));
    let [enters, _] = measured.map(|one| one.map_or(f64::NAN, |one| one.enters_per_operation));
    let [suspensions, on_stock] =
        measured.map(|one| one.map_or(f64::NAN, |one| one.suspensions_per_operation));
    [
        speed.bench.clone(),
        uring.wasi().map_or_else(String::new, |wasi| wasi.version().to_owned()),
        speed.guests.to_string(),
        number(speed.micros(stock), 2),
        number(speed.micros(uring), 2),
        number(ratio.median, 2),
        number(wall, 2),
        number(speed.cpu_ratio(uring, STD).median, 2),
        number(speed.cpu_ratio(uring, FLOOR).median, 2),
        number(enters, 3),
        format!("{on_stock:.2}, {suspensions:.2}"),
        spread(ratio),
    ]
}

/// Latency of the others while one socket is flooded.
pub(crate) fn floods(report: &Report) {
    let Some(first) = report.floods.first() else { return };
    let mut table = table([
        "flood",
        "WASI",
        "p50 calm",
        "p99 calm",
        "elsewhere",
        "flooded",
        "in bulk",
        "flooded / calm",
        "in bulk / calm",
        "lost",
        "held up",
        "flood, bulk per s",
    ]);
    for flood in &report.floods {
        table.add_row(flood_row(flood));
    }
    print(table);
    print(format_args!(
        "{} sockets answer a paced client; one more is flooded from another thread, by single \
         datagrams or in bulk, or a plain socket is (elsewhere). Medians of the rounds' p99, without \
         the requests held up by other programs that had the guests' CPU.",
        first.sockets - 1,
    ));
}

/// A ratio and its spread.
fn times(ratio: Figure) -> String {
    format!("{:.2} {}", ratio.median, spread(ratio))
}

fn flood_row(flood: &Flood) -> [String; 12] {
    let p99 = &flood.p99_micros;
    let rates = &flood.datagrams_per_second;
    [
        flood.backend.clone(),
        flood.wasi.clone(),
        format!("{:.0} µs", flood.calm_p50_micros),
        format!("{:.0} µs", p99.calm),
        format!("{:.0} µs", p99.elsewhere),
        format!("{:.0} µs", p99.flooded),
        format!("{:.0} µs", p99.flooded_in_bulk),
        times(flood.flooded_to_calm),
        times(flood.flooded_in_bulk_to_calm),
        format!("{} of {}", flood.lost, flood.requests),
        flood.held_up.to_string(),
        format!("{:.0}, {:.0}", rates.single, rates.in_bulk),
    ]
}

/// Latency of guests while another on the same runtime computes.
pub(crate) fn neighbours(report: &Report) {
    let Some(first) = report.neighbours.first() else { return };
    let mut table = table([
        "neighbour",
        "WASI",
        "calm: p50, p99, max",
        "computing",
        "p99 / stock",
        "asking",
        "p99 / stock",
        "lost",
        "held up",
    ]);
    for neighbour in &report.neighbours {
        table.add_row(neighbour_row(neighbour));
    }
    print(table);
    print(format_args!(
        "{} sockets answer a paced client on a runtime of {} workers: alone, beside {} that compute on \
         and on, and that ask a question every 10 ms. Medians of the rounds' figures, without the requests held up by other \
         programs that had the client's CPU.",
        first.sockets,
        first.workers,
        first.workers - 1,
    ));
}

fn neighbour_row(neighbour: &Neighbour) -> [String; 9] {
    let latency = |Latency { p50, p99, max }: &Latency| format!("{p50:.0}, {p99:.0}, {max:.0} µs");
    [
        neighbour.backend.clone(),
        neighbour.wasi.clone(),
        latency(&neighbour.calm_micros),
        latency(&neighbour.computing_micros),
        times(neighbour.computing_to_stock),
        latency(&neighbour.asking_micros),
        times(neighbour.asking_to_stock),
        format!("{} of {}", neighbour.lost, neighbour.requests),
        neighbour.held_up.to_string(),
    ]
}

/// Memory of sockets at rest.
pub(crate) fn idle(report: &Report) {
    let Some(first) = report.idle.first() else { return };
    let mut table = table(["idle", "WASI", "sockets", "process", "kernel", "together", "spread"]);
    for memory in &report.idle {
        table.add_row(memory_row(memory));
    }
    print(table);
    print(format_args!(
        "Memory per socket of one guest that holds {}: the process's own, and the growth of the \
         kernel's slab.",
        first.sockets,
    ));
}

fn memory_row(memory: &Memory) -> [String; 7] {
    let (process, kernel) = (memory.process_bytes, memory.kernel_bytes);
    [
        memory.backend.clone(),
        memory.wasi.clone(),
        memory.idleness.clone(),
        format!("{:.0} B", process.median),
        format!("{:.0} B", kernel.median),
        format!("{:.0} B", process.median + kernel.median),
        format!("{}, {}", spread(process), spread(kernel)),
    ]
}

/// A figure's spread, with a mark if the figure cannot be believed.
pub(super) fn spread(figure: Figure) -> String {
    percent(figure.spread) + if figure.noisy { " !" } else { "" }
}

pub(super) fn number(value: f64, digits: usize) -> String {
    if value.is_nan() { "–".to_owned() } else { format!("{value:.digits$}") }
}
