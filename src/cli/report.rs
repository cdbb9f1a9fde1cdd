//! What a run of the benches has shown, with where and how: as JSON, as pictures.

mod plot;
pub(crate) mod tables;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use wasmtime::error::Context;

use crate::measure::idle::Idle;
use crate::measure::{Contender, Row, Summary, flood};

/// A spread above this says that the machine was too busy to believe the median.
pub(crate) const SPREAD_MAX: f64 = 0.15;

/// The same for ratios of p99, which are loose by nature.
pub(crate) const FLOOD_SPREAD_MAX: f64 = 0.5;

/// Whether malloc gives memory back (mallopt(3)), which wasmtime-wasi's batches depend on.
const MALLOC_VARIABLE: &str = "MALLOC_TRIM_THRESHOLD_";

/// What was measured.
pub(crate) struct Report {
    rounds: usize,
    machine: Machine,
    pub(crate) rows: Vec<Row>,
    pub(crate) floods: Vec<flood::Figures>,
    pub(crate) idles: Vec<Idle>,
    /// Nothing failed, and all is in it.
    pub(crate) is_complete: bool,
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
            command: std::env::var(MALLOC_VARIABLE)
                .ok()
                .map(|value| format!("{MALLOC_VARIABLE}={value}"))
                .into_iter()
                .chain(["wasi-uring".to_owned()])
                .chain(std::env::args_os().skip(1).map(|arg| arg.to_string_lossy().into_owned()))
                .collect::<Vec<_>>()
                .join(" "),
        }
    }
}

impl Report {
    pub(crate) fn new(rounds: usize) -> Self {
        let machine = Machine::here();
        let (rows, floods, idles) = (Vec::new(), Vec::new(), Vec::new());
        Self { rounds, machine, rows, floods, idles, is_complete: false }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.floods.is_empty() && self.idles.is_empty()
    }

    /// Whether some figure cannot be believed.
    pub(crate) fn is_noisy(&self) -> bool {
        let ratios = self
            .rows
            .iter()
            .flat_map(|row| row.duels().map(|(one, stock)| row.cpu_ratio(one, stock)));
        let idles = self.idles.iter().flat_map(|idle| [idle.process(), idle.kernel()]);
        let floods = self.floods.iter().flat_map(|one| [one.flooded, one.flooded_in_bulk]);
        ratios.chain(idles).any(|figure| figure.is_noisy(SPREAD_MAX))
            || floods.into_iter().any(|figure| figure.is_noisy(FLOOD_SPREAD_MAX))
    }

    fn json(&self) -> Value {
        let Machine { date, kernel, cpu, commit, command } = &self.machine;
        let summary =
            |Summary { median, spread }: Summary| json!({ "median": median, "spread": spread });
        let judged = |figure: Summary, spread_max: f64| {
            let Summary { median, spread } = figure;
            json!({ "median": median, "spread": spread, "noisy": figure.is_noisy(spread_max) })
        };
        let contender = |row: &Row, one: Contender| {
            json!({
                "name": one.to_string(),
                "cpu_micros": summary(row.micros(one)),
                "source_cpu_micros": row.source_micros(one),
                "operations_per_second": row.per_second(one),
                "enters_per_operation": row.enters(one),
                "suspensions_per_operation": row.suspensions(one),
            })
        };
        let ratio = |row: &Row, one: Contender, other: Contender| {
            json!({
                "of": one.to_string(),
                "to": other.to_string(),
                "cpu": judged(row.cpu_ratio(one, other), SPREAD_MAX),
                "wall": judged(row.wall_ratio(one, other), SPREAD_MAX),
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
        let floods = self.floods.iter().map(|flood| {
            let [calm, elsewhere, flooded, in_bulk] = flood.p99;
            let [datagrams, datagrams_in_bulk] = flood.flood_per_second;
            json!({
                "wasi": flood.wasi.version(),
                "backend": flood.backend.name(),
                "sockets": flood.sockets,
                "calm_p50_micros": flood.calm_p50,
                "p99_micros": {
                    "calm": calm,
                    "elsewhere": elsewhere,
                    "flooded": flooded,
                    "flooded_in_bulk": in_bulk,
                },
                "flooded_to_calm": judged(flood.flooded, FLOOD_SPREAD_MAX),
                "flooded_in_bulk_to_calm": judged(flood.flooded_in_bulk, FLOOD_SPREAD_MAX),
                "asked": flood.asked,
                "lost": flood.lost,
                "held_up": flood.held_up,
                "flood_per_second": { "single": datagrams, "in_bulk": datagrams_in_bulk },
            })
        });
        let idles = self.idles.iter().map(|idle| {
            json!({
                "wasi": idle.wasi.version(),
                "backend": idle.backend.name(),
                "idleness": idle.idleness.name(),
                "sockets": idle.sockets,
                "process_bytes": judged(idle.process(), SPREAD_MAX),
                "kernel_bytes": judged(idle.kernel(), SPREAD_MAX),
            })
        });
        json!({
            "date": date,
            "kernel": kernel,
            "cpu": cpu,
            "commit": commit,
            "command": command,
            "rounds": self.rounds,
            "complete": self.is_complete,
            "noisy": self.is_noisy(),
            "results": results.collect::<Vec<_>>(),
            "floods": floods.collect::<Vec<_>>(),
            "idle": idles.collect::<Vec<_>>(),
        })
    }

    /// Replaces a file at once, so that no half of one is left; anything else is written to.
    pub(crate) fn write_json(&self, file: &Path) -> wasmtime::Result<()> {
        let text = serde_json::to_string_pretty(&self.json())? + "\n";
        let write = || {
            if !file.is_file() {
                return fs::write(file, &text);
            }
            let mut beside = file.as_os_str().to_owned();
            beside.push(".part");
            fs::write(&beside, &text)?;
            fs::rename(&beside, file)
        };
        write().with_context(|| format!("cannot write {}", file.display()))
    }

    /// Draws pictures into a directory.
    pub(crate) fn plot(&self, dir: &Path) -> wasmtime::Result<Vec<PathBuf>> {
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
    let times_stock = row.stock_of(one).map(|stock| {
        let Summary { median, spread } = row.cpu_ratio(one, stock);
        (median, spread)
    });
    let (name, per_second) = (one.to_string(), row.per_second(one));
    plot::Bar { name, micros: median, spread, per_second, times_stock }
}
