//! What a run of the benches has shown, with where and how it was measured. JSON keeps it; tables,
//! Markdown and pictures are made of it, at once or later by `wasi-uring report`.

pub(crate) mod density;
mod files;
mod markdown;
mod plot;
mod services;
pub(crate) mod tables;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Deserializer, Serialize};
use wasmtime::bail;
use wasmtime::error::Context;

use self::density::{Crowd, Swept};
use self::files::replace;
pub(crate) use self::files::report;
use self::plot::Picture;
use crate::benches::Bench;
use crate::measure::idle::Idle;
use crate::measure::{Implementation, Row, Summary, flood, neighbour};

/// A spread above this says that the machine was too busy to believe the median.
const SPREAD_MAX: f64 = 0.15;

/// The same for ratios of p99, which are loose by nature.
const P99_SPREAD_MAX: f64 = 0.5;

/// What wasmtime-wasi's figures depend on: whether malloc gives memory back (mallopt(3)), for batches, and
/// whether errors take backtraces (`std::backtrace`), for 0.2's streams.
const VARIABLES: [&str; 3] = ["MALLOC_TRIM_THRESHOLD_", "RUST_BACKTRACE", "RUST_LIB_BACKTRACE"];

/// What was measured, where and how.
#[derive(Serialize, Deserialize)]
pub(crate) struct Report {
    date: String,
    kernel: String,
    cpu: String,
    commit: String,
    command: String,
    rounds: usize,
    /// Nothing failed, and all is in it.
    pub(crate) complete: bool,
    /// Some figure cannot be believed.
    pub(crate) noisy: bool,
    results: Vec<Speed>,
    floods: Vec<Flood>,
    #[serde(default)]
    neighbours: Vec<Neighbour>,
    idle: Vec<Memory>,
    /// Many sockets in one process.
    #[serde(default)]
    crowds: Vec<Crowd>,
    /// By the buffers of a ring.
    #[serde(default)]
    sweep: Vec<Swept>,
}

/// A bench at one number of guests.
#[derive(Serialize, Deserialize)]
struct Speed {
    bench: String,
    /// What one operation does.
    #[serde(default)]
    what: String,
    guests: usize,
    operations_per_round: usize,
    implementations: Vec<Measured>,
    times_as_fast: Vec<Ratio>,
}

#[derive(Serialize, Deserialize)]
struct Measured {
    name: String,
    cpu_micros: Figure,
    #[serde(deserialize_with = "nullable")]
    source_cpu_micros: f64,
    #[serde(deserialize_with = "nullable")]
    operations_per_second: f64,
    #[serde(deserialize_with = "nullable")]
    enters_per_operation: f64,
    #[serde(deserialize_with = "nullable")]
    suspensions_per_operation: f64,
}

/// How many times as fast one implementation is as another.
#[derive(Serialize, Deserialize)]
struct Ratio {
    of: String,
    to: String,
    cpu: Figure,
    wall: Figure,
}

/// The latency of sockets while another is flooded.
#[derive(Serialize, Deserialize)]
struct Flood {
    wasi: String,
    backend: String,
    sockets: usize,
    #[serde(deserialize_with = "nullable")]
    calm_p50_micros: f64,
    p99_micros: Windows,
    flooded_to_calm: Figure,
    flooded_in_bulk_to_calm: Figure,
    requests: usize,
    lost: usize,
    held_up: usize,
    #[serde(rename = "flood_per_second")]
    datagrams_per_second: Rates,
}

#[derive(Serialize, Deserialize)]
struct Windows {
    #[serde(deserialize_with = "nullable")]
    calm: f64,
    #[serde(deserialize_with = "nullable")]
    elsewhere: f64,
    #[serde(deserialize_with = "nullable")]
    flooded: f64,
    #[serde(deserialize_with = "nullable")]
    flooded_in_bulk: f64,
}

/// Datagrams per second.
#[derive(Serialize, Deserialize)]
struct Rates {
    #[serde(deserialize_with = "nullable")]
    single: f64,
    #[serde(deserialize_with = "nullable")]
    in_bulk: f64,
}

/// The latency of sockets while a guest on the same runtime computes.
#[derive(Serialize, Deserialize)]
struct Neighbour {
    wasi: String,
    backend: String,
    sockets: usize,
    workers: usize,
    calm_micros: Latency,
    computing_micros: Latency,
    asking_micros: Latency,
    /// The p99 beside guests that compute.
    computing_to_stock: Figure,
    asking_to_stock: Figure,
    requests: usize,
    lost: usize,
    held_up: usize,
}

#[derive(Serialize, Deserialize)]
struct Latency {
    #[serde(deserialize_with = "nullable")]
    p50: f64,
    #[serde(deserialize_with = "nullable")]
    p99: f64,
    #[serde(deserialize_with = "nullable")]
    max: f64,
}

/// The memory of a socket at rest.
#[derive(Serialize, Deserialize)]
struct Memory {
    wasi: String,
    backend: String,
    idleness: String,
    sockets: usize,
    process_bytes: Figure,
    kernel_bytes: Figure,
}

/// A median over the rounds, with its spread.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Figure {
    #[serde(deserialize_with = "nullable")]
    median: f64,
    #[serde(deserialize_with = "nullable")]
    spread: f64,
    /// Too noisy to believe.
    #[serde(default)]
    noisy: bool,
}

impl Figure {
    const UNKNOWN: Self = Self { median: f64::NAN, spread: f64::NAN, noisy: false };

    fn new(summary: Summary, spread_max: f64) -> Self {
        let Summary { median, spread } = summary;
        Self { median, spread, noisy: spread > spread_max }
    }
}

/// JSON has no NaN, which is what an unknown number is here.
fn nullable<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

impl Speed {
    fn new(row: &Row) -> Self {
        let judged = |summary| Figure::new(summary, SPREAD_MAX);
        let measured = |one: Implementation| Measured {
            name: one.to_string(),
            cpu_micros: judged(row.micros(one)),
            source_cpu_micros: row.source_micros(one),
            operations_per_second: row.per_second(one),
            enters_per_operation: row.enters(one),
            suspensions_per_operation: row.suspensions(one),
        };
        let ratio = |(one, other): (Implementation, Implementation)| Ratio {
            of: one.to_string(),
            to: other.to_string(),
            cpu: judged(row.cpu_ratio(one, other)),
            wall: judged(row.wall_ratio(one, other)),
        };
        let pairs = row
            .implementations()
            .flat_map(|one| row.baselines(one).map(move |baseline| (one, baseline)));
        Self {
            bench: row.work().bench.name.to_owned(),
            what: row.work().bench.what.to_owned(),
            guests: row.work().guests,
            operations_per_round: row.work().operations(),
            implementations: row.implementations().map(measured).collect(),
            times_as_fast: pairs.map(ratio).collect(),
        }
    }

    fn measured(&self, one: Implementation) -> Option<&Measured> {
        let name = one.to_string();
        self.implementations.iter().find(|measured| measured.name == name)
    }

    /// CPU time per operation; not a number if the implementation was not measured.
    fn micros(&self, one: Implementation) -> f64 {
        self.measured(one).map_or(f64::NAN, |measured| measured.cpu_micros.median)
    }

    fn ratio(&self, one: Implementation, other: Implementation) -> Option<&Ratio> {
        let (one, other) = (one.to_string(), other.to_string());
        self.times_as_fast.iter().find(|ratio| ratio.of == one && ratio.to == other)
    }

    fn cpu_ratio(&self, one: Implementation, other: Implementation) -> Figure {
        self.ratio(one, other).map_or(Figure::UNKNOWN, |ratio| ratio.cpu)
    }

    /// Guests on the ring and the same on stock, where both were measured.
    fn against_stock(&self) -> impl Iterator<Item = (Implementation, Implementation)> {
        Implementation::AGAINST_STOCK
            .into_iter()
            .filter(|(ring, stock)| self.ratio(*ring, *stock).is_some())
    }

    /// The bench's words of today, or its name if the table no longer has it.
    fn what(&self) -> &str {
        Bench::named(&self.bench).map_or(&self.bench, |bench| bench.what)
    }
}

impl Report {
    /// An empty one of this machine and this command line.
    pub(crate) fn new(rounds: usize) -> Self {
        let line = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let cpus = line("/proc/cpuinfo");
        let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let output = |program: &str, args: &[&str]| {
            let output = Command::new(program).args(args).output().ok();
            let output = output.filter(|output| output.status.success());
            output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        let unknown = || "unknown".to_owned();
        // Of the source that the command was built from, if that is still where it was.
        let describe = ["-C", env!("CARGO_MANIFEST_DIR"), "describe", "--always", "--dirty"];
        Self {
            date: output("date", &["-u", "+%Y-%m-%d"]).unwrap_or_else(unknown),
            kernel: format!("Linux {}", line("/proc/sys/kernel/osrelease")),
            cpu: format!("{cores} × {}", model.map_or("unknown", |(_, model)| model.trim())),
            commit: output("git", &describe).unwrap_or_else(unknown),
            command: VARIABLES
                .into_iter()
                .filter_map(|name| Some(format!("{name}={}", std::env::var(name).ok()?)))
                .chain(["wasi-uring".to_owned()])
                .chain(std::env::args_os().skip(1).map(|arg| arg.to_string_lossy().into_owned()))
                .collect::<Vec<_>>()
                .join(" "),
            rounds,
            complete: false,
            noisy: false,
            results: Vec::new(),
            floods: Vec::new(),
            neighbours: Vec::new(),
            idle: Vec::new(),
            crowds: Vec::new(),
            sweep: Vec::new(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.results.is_empty()
            && self.floods.is_empty()
            && self.neighbours.is_empty()
            && self.idle.is_empty()
            && self.crowds.is_empty()
    }

    pub(crate) fn add_speed(&mut self, row: &Row) {
        let speed = Speed::new(row);
        let is_noisy = |(ring, stock)| speed.cpu_ratio(ring, stock).noisy;
        self.noisy |= speed.against_stock().any(is_noisy);
        self.results.push(speed);
    }

    pub(crate) fn add_flood(&mut self, figures: &flood::Figures) {
        let [calm, elsewhere, flooded, flooded_in_bulk] = figures.p99;
        let [single, in_bulk] = figures.flood_per_second;
        let flood = Flood {
            wasi: figures.wasi.version().to_owned(),
            backend: figures.backend.name().to_owned(),
            sockets: figures.sockets,
            calm_p50_micros: figures.calm_p50,
            p99_micros: Windows { calm, elsewhere, flooded, flooded_in_bulk },
            flooded_to_calm: Figure::new(figures.flooded, P99_SPREAD_MAX),
            flooded_in_bulk_to_calm: Figure::new(figures.flooded_in_bulk, P99_SPREAD_MAX),
            requests: figures.requests,
            lost: figures.lost,
            held_up: figures.held_up,
            datagrams_per_second: Rates { single, in_bulk },
        };
        self.noisy |= flood.flooded_to_calm.noisy || flood.flooded_in_bulk_to_calm.noisy;
        self.floods.push(flood);
    }

    pub(crate) fn add_neighbour(&mut self, figures: &neighbour::Figures) {
        let [calm_micros, computing_micros, asking_micros] =
            figures.latencies.map(|[p50, p99, max]| Latency { p50, p99, max });
        let [computing_to_stock, asking_to_stock] =
            figures.to_stock.map(|ratio| Figure::new(ratio, P99_SPREAD_MAX));
        let neighbour = Neighbour {
            wasi: figures.wasi.version().to_owned(),
            backend: figures.backend.name().to_owned(),
            sockets: figures.sockets,
            workers: figures.workers,
            calm_micros,
            computing_micros,
            asking_micros,
            computing_to_stock,
            asking_to_stock,
            requests: figures.requests,
            lost: figures.lost,
            held_up: figures.held_up,
        };
        self.noisy |= neighbour.computing_to_stock.noisy || neighbour.asking_to_stock.noisy;
        self.neighbours.push(neighbour);
    }

    pub(crate) fn add_idle(&mut self, idle: &Idle) {
        let memory = Memory {
            wasi: idle.wasi.version().to_owned(),
            backend: idle.backend.name().to_owned(),
            idleness: idle.idleness.name().to_owned(),
            sockets: idle.sockets,
            process_bytes: Figure::new(idle.process(), SPREAD_MAX),
            kernel_bytes: Figure::new(idle.kernel(), SPREAD_MAX),
        };
        self.noisy |= memory.process_bytes.noisy || memory.kernel_bytes.noisy;
        self.idle.push(memory);
    }

    /// Replaces a file at once, so that no half of one is left; anything else is written to.
    pub(crate) fn write_json(&self, file: &Path) -> wasmtime::Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        replace(file, &text)
    }

    /// One that was written before, by a run that did not fail.
    fn read_json(file: &Path) -> wasmtime::Result<Self> {
        let text = fs::read_to_string(file);
        let text = text.with_context(|| format!("cannot read {}", file.display()))?;
        let report: Self = serde_json::from_str(&text)
            .with_context(|| format!("{} is no JSON of `wasi-uring bench`", file.display()))?;
        if !report.complete {
            bail!("{} is of a run that failed", file.display());
        }
        Ok(report)
    }

    /// Draws pictures into a directory, as far as there are figures for them.
    fn draw(&self, pictures: &[Picture], dir: &Path) -> wasmtime::Result<Vec<PathBuf>> {
        let rows: Vec<_> = self.results.iter().map(plot::Row::from).collect();
        plot::draw(pictures, &rows, &self.caption(), dir)
            .with_context(|| format!("cannot draw into {}", dir.display()))
    }

    /// Likewise the one of buffers.
    fn draw_buffers(&self, dir: &Path) -> wasmtime::Result<Option<PathBuf>> {
        let swept: Vec<_> = self.sweep.iter().map(plot::buffers::Swept::from).collect();
        plot::buffers::draw(&swept, &self.caption(), dir)
            .with_context(|| format!("cannot draw into {}", dir.display()))
    }

    fn caption(&self) -> String {
        let Self { date, kernel, cpu, commit, .. } = self;
        format!("{date}, {kernel}, {cpu}, {commit}")
    }

    /// Draws every picture.
    pub(crate) fn plot(&self, dir: &Path) -> wasmtime::Result<Vec<PathBuf>> {
        let mut drawn = self.draw(&Picture::ALL, dir)?;
        drawn.extend(self.draw_buffers(dir)?);
        Ok(drawn)
    }
}

impl From<&Speed> for plot::Row {
    fn from(speed: &Speed) -> Self {
        let times_stock = |name: &str| {
            let (ring, stock) = speed.against_stock().find(|(ring, _)| ring.to_string() == name)?;
            let Figure { median, spread, .. } = speed.cpu_ratio(ring, stock);
            Some((median, spread))
        };
        let bar = |measured: &Measured| plot::Bar {
            name: measured.name.clone(),
            micros: measured.cpu_micros.median,
            spread: measured.cpu_micros.spread,
            per_second: measured.operations_per_second,
            times_stock: times_stock(&measured.name),
        };
        Self {
            bench: speed.bench.clone(),
            guests: speed.guests,
            implementations: speed.implementations.iter().map(bar).collect(),
        }
    }
}
