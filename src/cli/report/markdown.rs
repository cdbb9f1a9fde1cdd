//! Results as Markdown: the long tables, and the few rows of the README.

use super::files::Kept;
use super::{Figure, Flood, Latency, Memory, Neighbour, Report, Speed, density};
use crate::benches::Bench;
use crate::measure::{FLOOR, Implementation, STD, TOKIO, TOKIO_URING, percent};

/// A document with other text between two marks, such as `<!-- bench -->` and `<!-- /bench -->`, if it
/// has them.
pub(super) fn replace_marked(document: &str, mark: &str, text: &str) -> Option<String> {
    let (begin, end) = (format!("<!-- {mark} -->"), format!("<!-- /{mark} -->"));
    let (before, rest) = document.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}\n\n{}\n\n{end}{after}", text.trim()))
}

/// The headline benches at the most guests; `all` is where the other figures are.
pub(super) fn headline(results: &Report, all: &str) -> String {
    let guests = results.results.iter().map(|speed| speed.guests).max().unwrap_or(0);
    let is_headline = |speed: &&Speed| {
        speed.guests == guests && Bench::named(&speed.bench).is_some_and(|bench| bench.is_headline)
    };
    let rows = results.results.iter().filter(is_headline).map(|speed| {
        let mut row = vec![speed.what().to_owned()];
        for (ring, stock) in Implementation::AGAINST_STOCK {
            row.extend([stock, ring].map(|one| number(speed.micros(one), 2)));
            row.push(format!("**{}**", shown(speed.cpu_ratio(ring, stock), 2)));
        }
        row.extend([STD, FLOOR].map(|native| number(speed.micros(native), 2)));
        row
    });
    let header = [
        "one operation",
        "stock 0.2",
        "uring 0.2",
        "× stock",
        "stock 0.3",
        "uring 0.3",
        "× stock",
        "std",
        "floor",
    ];
    format!(
        "Microseconds of CPU per operation, {guests} guests on one thread; × stock: how many times \
         as fast the ring is.\n\n{}\n\n{}\nAll figures: [{all}]({all}).",
        table(&header, rows),
        machine(results),
    )
}

/// All tables.
pub(super) fn document(kept: &Kept) -> String {
    let Kept { results, multi_thread, guests, others, density: dense } = kept;
    let memory_sockets = others.idle.first().map_or(0, |memory| memory.sockets);
    let flood_sockets = others.floods.first().map_or(0, |flood| flood.sockets.saturating_sub(1));
    let sections = [
        "# Results".to_owned(),
        "Written by `wasi-uring report` from the JSON files beside it, which `scripts/bench` \
         measures.\n\n\
         stock and uring are the same guest, of WASI 0.2 or 0.3, on wasmtime-wasi's sockets and on \
         the ring; std, tokio and\ntokio-uring are native programs that do the same; floor is the \
         ring by itself, without WebAssembly. Figures are\nmicroseconds of CPU per operation. × \
         stock and × floor: how many times as fast as these the ring's guest is, round by\nround; \
         enters: `io_uring_enter` calls per operation; ±: half the distance between the quartiles; \
         !: too noisy to\nbelieve. To open is to create and bind."
            .to_owned(),
        "## Speed".to_owned(),
        source(results),
        speed(&results.results),
        "## By the number of guests".to_owned(),
        source(guests),
        speed(&guests.results),
        "## On a multi-thread runtime".to_owned(),
        "A ring for each worker.".to_owned(),
        source(multi_thread),
        speed(&multi_thread.results),
        "## Where stock is faster".to_owned(),
        slower(
            &compared(results, "one thread")
                .chain(compared(multi_thread, "multi-thread"))
                .collect::<Vec<_>>(),
        ),
        "## Memory".to_owned(),
        source(others),
        format!("Bytes per socket of a guest that holds {memory_sockets}."),
        memory(&others.idle),
        "## Latency under a flood".to_owned(),
        format!(
            "From the same run: the 99th percentile of a request's time in microseconds. \
             {flood_sockets} sockets answer 10,000 requests\nper second while no socket is flooded \
             (calm), while a plain socket is (elsewhere), and while one more guest's is,\nfrom \
             another core where there is one. Requests that other programs held up by taking the \
             guests' CPU are counted apart.\nA median of ratios is not the ratio of the medians."
        ),
        floods(&others.floods),
    ];
    let sections = sections.into_iter().chain(beside_neighbours(others));
    let sections = sections.chain(density::sections(dense, source(dense)));
    sections.collect::<Vec<_>>().join("\n\n") + "\n"
}

/// Nothing, if that was not measured.
fn beside_neighbours(others: &Report) -> Vec<String> {
    let Some(Neighbour { sockets, workers, .. }) = others.neighbours.first() else {
        return Vec::new();
    };
    vec![
        "## Latency beside a guest that computes".to_owned(),
        format!(
            "From the same run: a request's time in microseconds, its median, 99th percentile and longest. \
             {sockets} sockets\nanswer 2,000 requests per second on a multi-thread runtime of {workers} \
             workers: alone, beside {} that compute on and on, and\nbeside as many that ask a question every \
             10 ms; all share one ring.",
            workers - 1
        ),
        neighbours(&others.neighbours),
    ]
}

/// How something was measured.
fn source(report: &Report) -> String {
    format!("`{}`\n\n{}", report.command, machine(report))
}

fn machine(report: &Report) -> String {
    let Report { date, kernel, cpu, commit, rounds, .. } = report;
    format!("{date}, {kernel}, {cpu}, commit {commit}; medians of {rounds} rounds in alternation.")
}

fn speed(results: &[Speed]) -> String {
    let header = [
        "bench",
        "one operation",
        "guests",
        "WASI",
        "stock",
        "uring",
        "× stock",
        "× floor",
        "enters",
        "std",
        "tokio",
        "tokio-uring",
        "floor",
    ];
    let rows = results.iter().flat_map(|speed| {
        speed.against_stock().map(move |(ring, stock)| {
            let enters = speed.measured(ring).map_or(f64::NAN, |one| one.enters_per_operation);
            let mut row = vec![
                speed.bench.clone(),
                speed.what().to_owned(),
                speed.guests.to_string(),
                ring.wasi().map_or("", |wasi| wasi.version()).to_owned(),
                number(speed.micros(stock), 2),
                number(speed.micros(ring), 2),
                format!("**{}**", shown(speed.cpu_ratio(ring, stock), 2)),
                number(speed.cpu_ratio(ring, FLOOR).median, 2),
                number(enters, 3),
            ];
            let natives = [STD, TOKIO, TOKIO_URING, FLOOR];
            row.extend(natives.map(|native| number(speed.micros(native), 2)));
            row
        })
    });
    table(&header, rows)
}

/// The ring against stock in one combination.
struct Compared {
    bench: String,
    guests: usize,
    runtime: &'static str,
    wasi: &'static str,
    times_stock: Figure,
}

fn compared(report: &Report, runtime: &'static str) -> impl Iterator<Item = Compared> {
    report.results.iter().flat_map(move |speed| {
        speed.against_stock().map(move |(ring, stock)| Compared {
            bench: speed.bench.clone(),
            guests: speed.guests,
            runtime,
            wasi: ring.wasi().map_or("", |wasi| wasi.version()),
            times_stock: speed.cpu_ratio(ring, stock),
        })
    })
}

/// What the ring is to be improved in.
fn slower(all: &[Compared]) -> String {
    let is_slower = |compared: &&Compared| compared.times_stock.median < 1.0;
    let is_clearly = |Figure { median, spread, .. }: Figure| median * (1.0 + spread.max(0.0)) < 1.0;
    let rows = all.iter().filter(is_slower).map(|compared| {
        let Compared { bench, guests, runtime, wasi, times_stock } = compared;
        let clearly = if is_clearly(*times_stock) { "▼" } else { "" };
        let times_stock = format!("**{}**", shown(*times_stock, 2));
        let [guests, runtime, wasi] = [guests.to_string(), (*runtime).into(), (*wasi).into()];
        vec![bench.clone(), guests, runtime, wasi, times_stock, clearly.to_owned()]
    });
    let rows: Vec<_> = rows.collect();
    let count = format!(
        "In {} of {} combinations of bench, guests, runtime and version; ▼: by more than the spread.",
        rows.len(),
        all.len()
    );
    if rows.is_empty() {
        return count;
    }
    format!(
        "{count}\n\n{}",
        table(&["bench", "guests", "runtime", "WASI", "× stock", "▼"], rows.into_iter())
    )
}

fn memory(idle: &[Memory]) -> String {
    let header = ["sockets", "backend", "WASI", "process", "kernel", "together"];
    let rows = idle.iter().map(|memory| {
        let (process, kernel) = (memory.process_bytes, memory.kernel_bytes);
        vec![
            memory.idleness.clone(),
            memory.backend.clone(),
            memory.wasi.clone(),
            shown(process, 0),
            shown(kernel, 0),
            number(process.median + kernel.median, 0),
        ]
    });
    table(&header, rows)
}

fn floods(floods: &[Flood]) -> String {
    let header = [
        "backend",
        "WASI",
        "calm",
        "elsewhere",
        "flooded",
        "in bulk (GSO)",
        "flooded / calm",
        "in bulk / calm",
        "flood, M/s",
        "bulk, M/s",
        "held up",
        "lost",
    ];
    let rows = floods.iter().map(|flood| {
        let (p99, rates) = (&flood.p99_micros, &flood.datagrams_per_second);
        let windows = [p99.calm, p99.elsewhere, p99.flooded, p99.flooded_in_bulk];
        let mut row = vec![flood.backend.clone(), flood.wasi.clone()];
        row.extend(windows.map(|micros| number(micros, 0)));
        row.extend([flood.flooded_to_calm, flood.flooded_in_bulk_to_calm].map(|one| shown(one, 2)));
        row.extend([rates.single, rates.in_bulk].map(|rate| number(rate / 1e6, 1)));
        row.push(flood.held_up.to_string());
        row.push(format!("{} of {}", flood.lost, flood.requests));
        row
    });
    table(&header, rows)
}

fn neighbours(neighbours: &[Neighbour]) -> String {
    let header = [
        "backend",
        "WASI",
        "alone",
        "computing",
        "p99 / stock",
        "asking",
        "p99 / stock",
        "held up",
        "lost",
    ];
    let latency = |Latency { p50, p99, max }: &Latency| {
        [p50, p99, max].map(|micros| number(*micros, 0)).join(", ")
    };
    let rows = neighbours.iter().map(|neighbour| {
        vec![
            neighbour.backend.clone(),
            neighbour.wasi.clone(),
            latency(&neighbour.calm_micros),
            latency(&neighbour.computing_micros),
            shown(neighbour.computing_to_stock, 2),
            latency(&neighbour.asking_micros),
            shown(neighbour.asking_to_stock, 2),
            neighbour.held_up.to_string(),
            format!("{} of {}", neighbour.lost, neighbour.requests),
        ]
    });
    table(&header, rows)
}

pub(super) fn table(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let line = |cells: &[String]| format!("| {} |", cells.join(" | "));
    let header: Vec<_> = header.iter().map(|&name| name.to_owned()).collect();
    let rule = vec!["---".to_owned(); header.len()];
    let lines: Vec<_> = [header, rule].into_iter().chain(rows).map(|cells| line(&cells)).collect();
    lines.join("\n")
}

pub(super) fn number(value: f64, digits: usize) -> String {
    if value.is_nan() { "–".to_owned() } else { format!("{value:.digits$}") }
}

/// A median and its spread, where there is one, with a mark if it is too noisy to believe.
pub(super) fn shown(figure: Figure, digits: usize) -> String {
    let Figure { median, spread, noisy } = figure;
    let spread = if spread.is_nan() { String::new() } else { format!(" {}", percent(spread)) };
    number(median, digits) + &spread + if noisy { " !" } else { "" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_slower_than_stock_is_listed_and_marked_if_by_more_than_its_spread() {
        let compared = |bench: &str, median, spread| Compared {
            bench: bench.to_owned(),
            guests: 64,
            runtime: "one thread",
            wasi: "0.2",
            times_stock: Figure { median, spread, noisy: false },
        };
        let all =
            [compared("echo", 0.9, 0.05), compared("dns", 0.97, 0.05), compared("bind", 2.0, 0.1)];
        let text = slower(&all);
        assert!(text.starts_with("In 2 of 3 "), "{text}");
        let row = |bench: &str| text.lines().find(|line| line.contains(bench)).map(str::to_owned);
        assert!(row("echo").is_some_and(|row| row.contains('▼')), "{text}");
        assert!(row("dns").is_some_and(|row| !row.contains('▼')), "{text}");
        assert_eq!(row("bind "), None);
        assert!(!slower(&all[2..]).contains('|'), "no table of nothing");
    }

    #[test]
    fn only_what_stands_between_the_marks_is_replaced() {
        let document = "before\n<!-- bench -->\nyesterday\n<!-- /bench -->\nafter\n";
        let new = replace_marked(document, "bench", "today\n").unwrap();
        assert_eq!(new, "before\n<!-- bench -->\n\ntoday\n\n<!-- /bench -->\nafter\n");
        assert_eq!(replace_marked(&new, "bench", "today"), Some(new.clone()));
        assert_eq!(replace_marked("before\n<!-- bench -->\n", "bench", "today"), None);
    }
}
