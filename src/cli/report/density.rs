//! Many sockets in one process, and how many buffers of a ring they need: as JSON, on a terminal and as Markdown.

use serde::{Deserialize, Serialize};

use super::markdown::{number, shown, table};
use super::{Figure, P99_SPREAD_MAX, Report, SPREAD_MAX, nullable, plot, tables};
use crate::measure::density::{Figures, Outcome, REQUESTS_UNDER_WAY};
use crate::terminal::print;

/// Sockets of one process.
#[derive(Serialize, Deserialize)]
pub(super) struct Crowd {
    wasi: String,
    backend: String,
    sockets: usize,
    guests: usize,
    /// The limit of open files.
    open_files: u64,
    rings: u64,
    process_bytes: Figure,
    kernel_bytes: Figure,
    open_seconds: Figure,
    open_cpu_micros: Figure,
    close_seconds: Figure,
    close_cpu_micros: Figure,
    datagram_cpu_micros: Figure,
    #[serde(deserialize_with = "nullable")]
    client_cpu_micros: f64,
    requests: usize,
    lost: usize,
    dropped: u64,
}

/// Requests to sockets of a ring with so many buffers, or of wasmtime-wasi.
#[derive(Serialize, Deserialize)]
pub(super) struct Swept {
    wasi: String,
    backend: String,
    sockets: usize,
    buffers: Option<u16>,
    requests_per_second: Figure,
    p50_micros: Figure,
    p99_micros: Figure,
    cpu_micros: Figure,
    /// For each request.
    #[serde(deserialize_with = "nullable")]
    rearms: f64,
    requests: usize,
    lost: usize,
    dropped: u64,
}

impl Report {
    pub(crate) fn add_crowd(&mut self, figures: &Figures) {
        let judged = |summary| Figure::new(summary, SPREAD_MAX);
        let crowd = figures.crowd;
        let crowd = Crowd {
            wasi: crowd.wasi.version().to_owned(),
            backend: crowd.backend.name().to_owned(),
            sockets: crowd.sockets(),
            guests: crowd.guests,
            open_files: crowd.open_files,
            rings: figures.rounds.iter().map(|outcome| outcome.rings).max().unwrap_or(0),
            process_bytes: judged(figures.per_socket(|outcome| outcome.process_bytes)),
            kernel_bytes: judged(figures.per_socket(|outcome| outcome.kernel_bytes)),
            open_seconds: judged(figures.summary(|outcome| outcome.open.seconds)),
            open_cpu_micros: judged(figures.per_socket(|outcome| outcome.open.cpu_seconds * 1e6)),
            close_seconds: judged(figures.summary(|outcome| outcome.close.seconds)),
            close_cpu_micros: judged(figures.per_socket(|outcome| outcome.close.cpu_seconds * 1e6)),
            datagram_cpu_micros: judged(figures.per_request(cpu_micros)),
            client_cpu_micros: figures
                .per_request(|outcome| outcome.traffic.client_cpu_seconds * 1e6)
                .median,
            requests: figures.rounds.iter().map(|outcome| outcome.traffic.requests).sum(),
            lost: lost(figures),
            dropped: dropped(figures),
        };
        self.noisy |= crowd.datagram_cpu_micros.noisy || crowd.open_cpu_micros.noisy;
        self.crowds.push(crowd);
    }

    pub(crate) fn add_sweep(&mut self, figures: &Figures) {
        let swept = Swept {
            wasi: figures.crowd.wasi.version().to_owned(),
            backend: figures.crowd.backend.name().to_owned(),
            sockets: figures.crowd.sockets(),
            buffers: figures.crowd.buffers,
            requests_per_second: Figure::new(figures.summary(per_second), SPREAD_MAX),
            p50_micros: Figure::new(
                figures.summary(|outcome| outcome.traffic.p50_seconds * 1e6),
                SPREAD_MAX,
            ),
            p99_micros: Figure::new(
                figures.summary(|outcome| outcome.traffic.p99_seconds * 1e6),
                P99_SPREAD_MAX,
            ),
            cpu_micros: Figure::new(figures.per_request(cpu_micros), SPREAD_MAX),
            #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
            rearms: figures.per_request(|outcome| outcome.rearms as f64).median,
            requests: figures.rounds.iter().map(|outcome| outcome.traffic.requests).sum(),
            lost: lost(figures),
            dropped: dropped(figures),
        };
        self.noisy |= swept.requests_per_second.noisy || swept.p99_micros.noisy;
        self.sweep.push(swept);
    }
}

fn cpu_micros(outcome: &Outcome) -> f64 {
    outcome.traffic.cpu_seconds * 1e6
}

#[expect(clippy::cast_precision_loss, reason = "thousands")]
fn per_second(outcome: &Outcome) -> f64 {
    (outcome.traffic.requests - outcome.traffic.lost) as f64 / outcome.traffic.seconds
}

fn lost(figures: &Figures) -> usize {
    figures.rounds.iter().map(|outcome| outcome.traffic.lost).sum()
}

fn dropped(figures: &Figures) -> u64 {
    figures.rounds.iter().map(|outcome| outcome.dropped).sum()
}

const CROWDS: [&str; 13] = [
    "sockets",
    "open files",
    "backend",
    "WASI",
    "rings",
    "process B",
    "kernel B",
    "open ms",
    "open µs each",
    "close ms",
    "close µs each",
    "datagram µs",
    "lost, dropped",
];

impl Crowd {
    fn cells(&self, shown: impl Fn(Figure, usize) -> String) -> [String; 13] {
        [
            self.sockets.to_string(),
            self.open_files.to_string(),
            self.backend.clone(),
            self.wasi.clone(),
            if self.rings == 0 { "–".to_owned() } else { self.rings.to_string() },
            shown(self.process_bytes, 0),
            shown(self.kernel_bytes, 0),
            shown(millis(self.open_seconds), 1),
            shown(self.open_cpu_micros, 1),
            shown(millis(self.close_seconds), 1),
            shown(self.close_cpu_micros, 1),
            shown(self.datagram_cpu_micros, 1),
            losses(self.lost, self.dropped, self.requests),
        ]
    }
}

const SWEEP: [&str; 9] = [
    "buffers",
    "backend",
    "WASI",
    "requests per s",
    "p50 µs",
    "p99 µs",
    "CPU µs",
    "rearms",
    "lost, dropped",
];

impl Swept {
    fn cells(&self, shown: impl Fn(Figure, usize) -> String) -> [String; 9] {
        [
            self.buffers.map_or_else(|| "–".to_owned(), |buffers| buffers.to_string()),
            self.backend.clone(),
            self.wasi.clone(),
            shown(self.requests_per_second, 0),
            shown(self.p50_micros, 0),
            shown(self.p99_micros, 0),
            shown(self.cpu_micros, 1),
            if self.buffers.is_some() { number(self.rearms, 3) } else { "–".to_owned() },
            losses(self.lost, self.dropped, self.requests),
        ]
    }
}

fn millis(seconds: Figure) -> Figure {
    Figure { median: seconds.median * 1e3, ..seconds }
}

fn losses(lost: usize, dropped: u64, requests: usize) -> String {
    format!("{lost}, {dropped} of {requests}")
}

impl From<&Swept> for plot::buffers::Swept {
    fn from(swept: &Swept) -> Self {
        let pair = |figure: Figure| (figure.median, figure.spread);
        Self {
            name: format!("{} {}", swept.backend, swept.wasi),
            buffers: swept.buffers,
            per_second: pair(swept.requests_per_second),
            p99_micros: pair(swept.p99_micros),
        }
    }
}

/// What the tables' columns are.
fn crowds_explained(crowds: &[Crowd]) -> String {
    let most = crowds.iter().map(|crowd| crowd.sockets / crowd.guests.max(1)).max().unwrap_or(0);
    format!(
        "Bound sockets that wait for datagrams, of guests with up to {most} each, in one process on one thread. \
         wasmtime-wasi's are at most as many as may be open files. Bytes, and CPU time to open and to close, are for \
         each socket, with its guest's share. open, close: until all are. datagram: CPU time to receive one at a \
         socket chosen at random and to send it back, with {REQUESTS_UNDER_WAY} under way; a guest of 0.2 polls all its \
         sockets each time. dropped: by full queues."
    )
}

fn sweep_explained(first: &Swept) -> String {
    format!(
        "{} sockets on one thread, {REQUESTS_UNDER_WAY} requests under way, at sockets chosen at random. rearms: \
         receives armed again for each request, because the ring had no buffer.",
        first.sockets
    )
}

/// On the terminal.
pub(crate) fn print_tables(report: &Report) {
    let shown = |figure: Figure, digits: usize| {
        format!("{} {}", number(figure.median, digits), tables::spread(figure))
    };
    if !report.crowds.is_empty() {
        let mut table = crate::terminal::table(CROWDS);
        table.add_rows(report.crowds.iter().map(|crowd| crowd.cells(shown)));
        print(table);
        print(crowds_explained(&report.crowds));
    }
    if let Some(first) = report.sweep.first() {
        let mut table = crate::terminal::table(SWEEP);
        table.add_rows(report.sweep.iter().map(|swept| swept.cells(shown)));
        print(table);
        print(sweep_explained(first));
    }
}

/// As sections; none of what was not measured.
pub(super) fn sections(report: &Report, source: String) -> Vec<String> {
    let mut sections = Vec::new();
    if !report.crowds.is_empty() {
        let rows = report.crowds.iter().map(|crowd| crowd.cells(shown).to_vec());
        sections.extend([
            "## Many sockets in one process".to_owned(),
            source,
            crowds_explained(&report.crowds),
            table(&CROWDS, rows),
        ]);
    }
    if let Some(first) = report.sweep.first() {
        let rows = report.sweep.iter().map(|swept| swept.cells(shown).to_vec());
        sections.extend([
            "## By the buffers of a ring".to_owned(),
            format!("From the same run: {}", sweep_explained(first)),
            table(&SWEEP, rows),
            "![Throughput and p99 against buffers](buffers.svg)".to_owned(),
        ]);
    }
    sections
}
