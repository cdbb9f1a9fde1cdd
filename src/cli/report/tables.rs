//! What a run of the benches has shown, as tables.

use super::{FLOOD_SPREAD_MAX, SPREAD_MAX};
use crate::measure::idle::Idle;
use crate::measure::{Contender, FLOOR, Row, STD, Summary, TOKIO, TOKIO_URING, flood, percent};
use crate::{print, table};

/// Speed, bench by bench.
pub(crate) fn contests(rows: &[Row]) {
    if rows.is_empty() {
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
    for row in rows {
        for (uring, stock) in row.duels() {
            let ratio = row.cpu_ratio(uring, stock);
            guests.add_row([
                row.work().bench.name.to_owned(),
                uring.wasi().map_or_else(String::new, |wasi| wasi.version().to_owned()),
                row.work().guests.to_string(),
                number(row.micros(stock).median, 2),
                number(row.micros(uring).median, 2),
                number(ratio.median, 2),
                number(row.wall_ratio(uring, stock).median, 2),
                number(row.cpu_ratio(uring, STD).median, 2),
                number(row.cpu_ratio(uring, FLOOR).median, 2),
                number(row.enters(uring), 3),
                format!("{:.2}, {:.2}", row.suspensions(stock), row.suspensions(uring)),
                spread(ratio, SPREAD_MAX),
            ]);
        }
    }
    print(guests);
    let mut natives =
        table(["bench", "guests", "std µs", "tokio µs", "tokio-uring µs", "floor µs"]);
    for row in rows {
        let micros = |native: Contender| number(row.micros(native).median, 2);
        let [std, tokio, tokio_uring, floor] = [STD, TOKIO, TOKIO_URING, FLOOR].map(micros);
        let (bench, guests) = (row.work().bench.name.to_owned(), row.work().guests.to_string());
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

/// Latency of the others while one socket is flooded.
pub(crate) fn floods(floods: &[flood::Figures]) {
    if floods.is_empty() {
        return;
    }
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
    for flood in floods {
        let [calm, elsewhere, flooded, in_bulk] = flood.p99;
        let [single, bulk] = flood.flood_per_second;
        let times =
            |ratio: Summary| format!("{:.2} {}", ratio.median, spread(ratio, FLOOD_SPREAD_MAX));
        table.add_row([
            flood.backend.name().to_owned(),
            flood.wasi.version().to_owned(),
            format!("{:.0} µs", flood.calm_p50),
            format!("{calm:.0} µs"),
            format!("{elsewhere:.0} µs"),
            format!("{flooded:.0} µs"),
            format!("{in_bulk:.0} µs"),
            times(flood.flooded),
            times(flood.flooded_in_bulk),
            format!("{} of {}", flood.lost, flood.asked),
            flood.held_up.to_string(),
            format!("{single:.0}, {bulk:.0}"),
        ]);
    }
    print(table);
    print(format_args!(
        "{} sockets answer a paced client; one more is flooded from another thread, by single \
         datagrams or in bulk, or a plain socket is (elsewhere). Medians of the rounds' p99, without \
         the questions held up by other programs that had the guests' CPU.",
        floods[0].sockets - 1,
    ));
}

/// Memory of sockets at rest.
pub(crate) fn idles(idles: &[Idle]) {
    if idles.is_empty() {
        return;
    }
    let mut table = table(["idle", "WASI", "sockets", "process", "kernel", "together", "spread"]);
    for idle in idles {
        let (process, kernel) = (idle.process(), idle.kernel());
        table.add_row([
            idle.backend.name().to_owned(),
            idle.wasi.version().to_owned(),
            idle.idleness.name().to_owned(),
            format!("{:.0} B", process.median),
            format!("{:.0} B", kernel.median),
            format!("{:.0} B", process.median + kernel.median),
            format!("{}, {}", spread(process, SPREAD_MAX), spread(kernel, SPREAD_MAX)),
        ]);
    }
    print(table);
    print(format_args!(
        "Memory per socket of one guest that holds {}: the process's own, and the growth of the \
         kernel's slab.",
        idles[0].sockets,
    ));
}

/// A figure's spread, with a mark if the figure cannot be believed.
fn spread(summary: Summary, most: f64) -> String {
    percent(summary.spread) + if summary.is_noisy(most) { " !" } else { "" }
}

fn number(value: f64, digits: usize) -> String {
    if value.is_nan() { "–".to_owned() } else { format!("{value:.digits$}") }
}
