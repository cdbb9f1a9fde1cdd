//! What a run of the benches has shown: as tables, as JSON, as pictures.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use wasmtime::error::Context;

use super::super::measure::{Backend, Contender, Peer, Row, Summary, WasiArg};
use super::super::print;
use super::{is_noisy, plot, table};

const STD: Contender = Contender::Native(Peer::Std);
const TOKIO: Contender = Contender::Native(Peer::Tokio);
const TOKIO_URING: Contender = Contender::Native(Peer::TokioUring);
const FLOOR: Contender = Contender::Native(Peer::Floor);

pub(super) struct Report {
    rounds: usize,
    rows: Vec<Row>,
    machine: Machine,
}

/// Where it was measured, and how.
struct Machine {
    date: String,
    kernel: String,
    cpu: String,
    commit: String,
    command: String,
}

impl Machine {
    fn here() -> Self {
        let line = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let cpus = line("/proc/cpuinfo");
        let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let output = |program: &str, args: &[&str]| {
            let output = std::process::Command::new(program).args(args).output().ok();
            let output = output.filter(|output| output.status.success());
            output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        let unknown = || "unknown".to_owned();
        Self {
            date: output("date", &["-u", "+%Y-%m-%d"]).unwrap_or_else(unknown),
            kernel: format!("Linux {}", line("/proc/sys/kernel/osrelease")),
            cpu: format!("{cores} × {}", model.map_or("unknown", |(_, model)| model.trim())),
            // Of the source that the command was built from, if that is still where it was.
            commit: output(
                "git",
                &["-C", env!("CARGO_MANIFEST_DIR"), "describe", "--always", "--dirty"],
            )
            .unwrap_or_else(unknown),
            command: std::env::args()
                .skip(1)
                .fold("wasi-uring".to_owned(), |line, arg| format!("{line} {arg}")),
        }
    }
}

/// A guest of one WASI version on both backends.
fn backends(wasi: WasiArg) -> [Contender; 2] {
    [Backend::Stock, Backend::Uring].map(|backend| Contender::Guest(wasi, backend))
}

impl Report {
    pub(super) fn new(rounds: usize, rows: Vec<Row>) -> Self {
        Self { rounds, rows, machine: Machine::here() }
    }

    /// The guests of each row, by WASI version.
    fn guests(&self) -> impl Iterator<Item = (&Row, WasiArg, [Contender; 2])> {
        self.rows.iter().flat_map(|row| {
            let wasi = WasiArg::ALL.into_iter();
            let took_part =
                move |wasi: &WasiArg| row.contenders().any(|one| one.wasi() == Some(*wasi));
            wasi.filter(took_part).map(move |wasi| (row, wasi, backends(wasi)))
        })
    }

    /// Whether some figure cannot be believed.
    pub(super) fn is_noisy(&self) -> bool {
        self.guests().any(|(row, _, [stock, uring])| is_noisy(&row.cpu_ratio(uring, stock)))
    }

    pub(super) fn print(&self) {
        let number = |value: f64, digits: usize| {
            if value.is_nan() { "–".to_owned() } else { format!("{value:.digits$}") }
        };
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
        for (row, wasi, [stock, uring]) in self.guests() {
            let ratio = row.cpu_ratio(uring, stock);
            guests.add_row([
                row.work().bench.name.to_owned(),
                wasi.version().to_owned(),
                row.work().guests.to_string(),
                number(row.micros(stock).median, 2),
                number(row.micros(uring).median, 2),
                number(ratio.median, 2),
                number(row.wall_ratio(uring, stock).median, 2),
                number(row.cpu_ratio(uring, STD).median, 2),
                number(row.cpu_ratio(uring, FLOOR).median, 2),
                number(row.enters(uring), 3),
                format!("{:.2}, {:.2}", row.suspensions(stock), row.suspensions(uring)),
                format!("±{:.0}%", ratio.spread * 100.0),
            ]);
        }
        print(guests);
        let natives = [STD, TOKIO, TOKIO_URING, FLOOR];
        let mut table =
            table(["bench", "guests", "std µs", "tokio µs", "tokio-uring µs", "floor µs"]);
        for row in &self.rows {
            let mut cells = vec![row.work().bench.name.to_owned(), row.work().guests.to_string()];
            cells.extend(natives.map(|native| number(row.micros(native).median, 2)));
            table.add_row(cells);
        }
        print(table);
        print(
            "µs: CPU time per operation, median. × stock, × std, × floor: how many times as fast as \
             wasmtime-wasi, as a plain Rust program and as the bare ring the guest on the ring is, \
             round by round, median. suspends/op: how often a guest gave its thread away, on stock \
             and on the ring.",
        );
    }

    fn json(&self) -> Value {
        let Machine { date, kernel, cpu, commit, command } = &self.machine;
        let summary =
            |Summary { median, spread }: Summary| json!({ "median": median, "spread": spread });
        let contender = |row: &Row, one: Contender| {
            json!({
                "name": one.to_string(),
                "cpu_micros": summary(row.micros(one)),
                "operations_per_second": row.per_second(one),
                "enters_per_operation": row.enters(one),
                "suspensions_per_operation": row.suspensions(one),
            })
        };
        let ratio = |row: &Row, one: Contender, other: Contender| {
            json!({
                "of": one.to_string(),
                "to": other.to_string(),
                "cpu": summary(row.cpu_ratio(one, other)),
                "wall": summary(row.wall_ratio(one, other)),
            })
        };
        let results = self.rows.iter().map(|row| {
            json!({
                "bench": row.work().bench.name,
                "guests": row.work().guests,
                "operations_per_round": row.work().operations(),
                "contenders": row.contenders().map(|one| contender(row, one)).collect::<Vec<_>>(),
                "times_as_fast": row
                    .contenders()
                    .flat_map(|one| row.yardsticks(one).map(move |other| (one, other)))
                    .map(|(one, other)| ratio(row, one, other))
                    .collect::<Vec<_>>(),
            })
        });
        json!({
            "date": date,
            "kernel": kernel,
            "cpu": cpu,
            "commit": commit,
            "command": command,
            "rounds": self.rounds,
            "noisy": self.is_noisy(),
            "results": results.collect::<Vec<_>>(),
        })
    }

    pub(super) fn write_json(&self, file: &Path) -> wasmtime::Result<()> {
        let text = serde_json::to_string_pretty(&self.json())?;
        fs::write(file, text + "\n").with_context(|| format!("cannot write {}", file.display()))
    }

    /// Draws pictures into a directory.
    pub(super) fn plot(&self, dir: &Path) -> wasmtime::Result<Vec<PathBuf>> {
        let Machine { date, kernel, cpu, commit, .. } = &self.machine;
        let rows: Vec<_> = self
            .rows
            .iter()
            .map(|row| plot::Row {
                bench: row.work().bench.name.to_owned(),
                guests: row.work().guests,
                contenders: row.contenders().map(|one| bar(row, one)).collect(),
            })
            .collect();
        let caption = format!("{date}, {kernel}, {cpu}, {commit}");
        plot::draw(&rows, &caption, dir)
            .with_context(|| format!("cannot draw into {}", dir.display()))
    }
}

fn bar(row: &Row, one: Contender) -> plot::Bar {
    let Summary { median, spread } = row.micros(one);
    let times_stock = match one {
        Contender::Guest(wasi, Backend::Uring) => {
            let Summary { median, spread } = row.cpu_ratio(one, backends(wasi)[0]);
            Some((median, spread))
        }
        Contender::Guest(_, Backend::Stock) | Contender::Native(_) => None,
    };
    let (name, per_second) = (one.to_string(), row.per_second(one));
    plot::Bar { name, micros: median, spread, per_second, times_stock }
}
