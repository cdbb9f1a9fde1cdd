//! What `scripts/services` has measured: whole services, as JSON of samples; tables, the few rows of the
//! README and a picture are made of it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use wasmtime::error::Context;

use super::files::replace;
use super::markdown::{number, shown, table};
use super::plot::{ServicePanel, draw_services};
use super::{Figure, SPREAD_MAX};
use crate::measure::Summary;

/// A round in which others had the service's processor for longer tells no rate and no latency.
const OTHERS_MAX: f64 = 0.1;

/// A service, and how its figures are told.
struct Service {
    /// In the arguments of `scripts/services`, and in JSON.
    name: &'static str,
    title: &'static str,
    what: &'static str,
    /// What is counted, in the plural.
    counted: &'static str,
    /// The load whose figures the README and the picture have.
    headline: Option<&'static str>,
    axis: &'static str,
}

const SERVICES: [Service; 5] = [
    Service {
        name: "forwarder",
        title: "DNS forwarder",
        what: "Each query gets an upstream socket of its own (RFC 5452), is asked of nsd, and answered. dnsperf asks with \
               16 sockets. saturated: 200 queries wait at any time. paced: half of what WASI 0.2 on stock sockets has \
               answered at saturation in the first round, for all. ramp: resperf's highest rate of answers while it asks \
               ever faster, and what was lost at that point.",
        counted: "queries",
        headline: Some("saturated"),
        axis: "queries per second and core",
    },
    Service {
        name: "variants",
        title: "The forwarder, otherwise",
        what: "At saturation. 8 guests: on one thread, each with a port and two of dnsperf's sockets. one upstream socket: \
               one guest that keeps it, and tells queries apart by their ids.",
        counted: "queries",
        headline: None,
        axis: "",
    },
    Service {
        name: "web",
        title: "Web service that asks DNS",
        what: "Each request has an instance of its own (`wasi-uring serve`), which opens a socket, asks nsd for an address \
               and answers with it: as many sockets as requests. wrk asks over 32 connections (saturated) or one.",
        counted: "requests",
        headline: Some("saturated"),
        axis: "requests per second and core",
    },
    Service {
        name: "telemetry",
        title: "Telemetry",
        what: "1,000 guests, each with a socket, send lines of statistics in bursts of 10, a call and a datagram for each \
               line, to a collector that counts them. paced: a burst every 100 ms. saturated: one after the other.",
        counted: "datagrams",
        headline: Some("saturated"),
        axis: "datagrams per second and core",
    },
    Service {
        name: "workers",
        title: "Workers",
        what: "The forwarder and the web service with one worker and with two, bound to no processor: two workers share both \
               with dnsperf or wrk and with nsd, so the time per request says what a second worker costs, and the rate \
               only what is left for it. The native web service has one.",
        counted: "requests",
        headline: None,
        axis: "",
    },
];

/// All that has been measured, by service.
pub(super) struct Services(BTreeMap<String, Run>);

/// One measurement of a service, with where and how.
#[derive(Deserialize)]
struct Run {
    date: String,
    kernel: String,
    cpu: String,
    commit: String,
    command: String,
    rounds: usize,
    rows: Vec<Row>,
}

/// An implementation under a load, round by round.
#[derive(Deserialize)]
struct Row {
    service: String,
    load: String,
    implementation: String,
    samples: Vec<Sample>,
}

/// One round. What a client does not tell is not there.
#[derive(Deserialize)]
#[serde(default)]
struct Sample {
    /// Queries, requests or datagrams that were answered or have arrived.
    requests: f64,
    seconds: f64,
    /// User and system time of the service's process.
    cpu_seconds: f64,
    /// For how much of the time others had its processor.
    others: f64,
    lost: f64,
    /// Answered with an error.
    failed: f64,
    /// Asked for so many per second.
    rate: f64,
    micros: Latency,
    /// Of a ramp.
    most_per_second: f64,
    lost_percent: f64,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Latency {
    p50: Option<f64>,
    p99: Option<f64>,
    #[serde(rename = "p99.9")]
    p99_9: Option<f64>,
}

impl Default for Sample {
    fn default() -> Self {
        Self {
            requests: f64::NAN,
            seconds: f64::NAN,
            cpu_seconds: f64::NAN,
            others: f64::NAN,
            lost: 0.0,
            failed: 0.0,
            rate: f64::NAN,
            micros: Latency::default(),
            most_per_second: f64::NAN,
            lost_percent: f64::NAN,
        }
    }
}

impl Row {
    fn figure(&self, of: impl Fn(&Sample) -> f64) -> Figure {
        Figure::new(Summary::of(self.samples.iter().map(of)), SPREAD_MAX)
    }

    fn micros(&self) -> Figure {
        self.figure(|sample| sample.cpu_seconds * 1e6 / sample.requests)
    }

    /// For each second of CPU time: of a service that has a core for itself, what that core serves.
    fn per_core(&self) -> Figure {
        self.figure(|sample| sample.requests / sample.cpu_seconds)
    }

    /// Those in which others did not have the service's processor. What is not CPU time depends on that.
    fn calm(&self) -> Vec<&Sample> {
        // Where that was not measured, nothing is known against them.
        let is_calm = |one: &&Sample| one.others.is_nan() || one.others <= OTHERS_MAX;
        self.samples.iter().filter(is_calm).collect()
    }

    /// Of calm rounds.
    fn calm_median(&self, of: impl Fn(&Sample) -> f64) -> f64 {
        Summary::of(self.calm().into_iter().map(of)).median
    }

    fn per_second(&self) -> f64 {
        self.calm_median(|sample| {
            if sample.most_per_second.is_nan() {
                sample.requests / sample.seconds
            } else {
                sample.most_per_second
            }
        })
    }

    fn latency(&self, of: impl Fn(&Latency) -> Option<f64>) -> f64 {
        self.calm_median(|sample| of(&sample.micros).unwrap_or(f64::NAN))
    }

    fn lost(&self) -> String {
        let percent = self.calm_median(|sample| sample.lost_percent);
        if !percent.is_nan() {
            return format!("{percent:.1} %");
        }
        let sum = |of: fn(&Sample) -> f64| self.samples.iter().map(of).sum::<f64>();
        format!(
            "{:.0} of {:.0}",
            sum(|one| one.lost + one.failed),
            sum(|one| one.requests + one.lost)
        )
    }

    /// As a guest on the ring: the same on stock sockets.
    fn baseline<'a>(&self, rows: &'a [Self]) -> Option<&'a Self> {
        let version = self.implementation.strip_prefix("uring ")?;
        let stock = format!("stock {version}");
        let is_it = |row: &&Self| {
            row.implementation == stock && row.load == self.load && row.service == self.service
        };
        rows.iter().find(is_it)
    }

    /// How many times as cheap the ring is, round by round.
    fn times_stock(&self, rows: &[Self]) -> Figure {
        let Some(stock) = self.baseline(rows) else { return Figure::UNKNOWN };
        let cost = |sample: &Sample| sample.cpu_seconds / sample.requests;
        let rounds = stock.samples.iter().zip(&self.samples);
        let ratios = rounds.map(|(stock, ring)| cost(stock) / cost(ring));
        Figure::new(Summary::of(ratios), SPREAD_MAX)
    }
}

impl Run {
    fn machine(&self) -> String {
        let Self { date, kernel, cpu, commit, rounds, .. } = self;
        format!(
            "{date}, {kernel}, {cpu}, commit {commit}; medians of {rounds} rounds in alternation."
        )
    }

    fn row(&self, load: &str, implementation: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.load == load && row.implementation == implementation)
    }

    fn table(&self) -> String {
        let header = [
            "load",
            "implementation",
            "per second",
            "CPU µs each",
            "× stock",
            "calm rounds",
            "p50 µs",
            "p99 µs",
            "p99.9 µs",
            "lost or failed",
        ];
        let is_one_service = self.rows.iter().all(|row| row.service == self.rows[0].service);
        let place = |row: &Row| {
            let is_same = |one: &Row| one.load == row.load && one.service == row.service;
            self.rows.iter().position(is_same)
        };
        let mut rows: Vec<_> = self.rows.iter().collect();
        rows.sort_by_key(|row| place(row));
        let rows = rows.into_iter().map(|row| {
            let rate = row.figure(|sample| sample.rate).median;
            let service = row.service.rsplit(": ").next().unwrap_or_default();
            let load = if rate.is_nan() {
                row.load.clone()
            } else {
                format!("{}, {rate:.0} per second", row.load)
            };
            vec![
                if is_one_service { load } else { format!("{service}, {load}") },
                row.implementation.clone(),
                number(row.per_second(), 0),
                shown_if_any(row.micros()),
                shown_if_any(row.times_stock(&self.rows)),
                format!("{} of {}", row.calm().len(), row.samples.len()),
                number(row.latency(|micros| micros.p50), 0),
                number(row.latency(|micros| micros.p99), 0),
                number(row.latency(|micros| micros.p99_9), 0),
                row.lost(),
            ]
        });
        table(&header, rows)
    }
}

/// With its spread.
fn shown_if_any(figure: Figure) -> String {
    if figure.median.is_nan() { number(figure.median, 2) } else { shown(figure, 2) }
}

impl Services {
    pub(super) fn file(dir: &Path) -> PathBuf {
        dir.join("services.json")
    }

    pub(super) fn read(dir: &Path) -> wasmtime::Result<Self> {
        let file = Self::file(dir);
        let text = fs::read_to_string(&file);
        let text = text.with_context(|| format!("cannot read {}", file.display()))?;
        let runs = serde_json::from_str(&text);
        let runs =
            runs.with_context(|| format!("{} is no JSON of scripts/services", file.display()));
        Ok(Self(runs?))
    }

    /// Those that were measured, in the order in which they are told.
    fn measured(&self) -> impl Iterator<Item = (&'static Service, &Run)> {
        let run = |service: &'static Service| Some((service, self.0.get(service.name)?));
        SERVICES.iter().filter_map(run)
    }

    /// Tables and the picture; returns the files.
    pub(super) fn write(&self, dir: &Path) -> wasmtime::Result<Vec<PathBuf>> {
        let (tables, picture) = (dir.join("services.md"), dir.join("services.svg"));
        replace(&tables, &self.document())?;
        let mut written = vec![tables];
        let panels: Vec<_> =
            self.headlines().map(|(service, load, run)| panel(service, load, run)).collect();
        let machines = self.headlines().map(|(_, _, run)| {
            format!("{}, {}, {}, {}", run.date, run.kernel, run.cpu, run.commit)
        });
        let caption = machines.max().unwrap_or_default();
        if draw_services(&panels, &caption, &picture)
            .with_context(|| format!("cannot draw {}", picture.display()))?
        {
            written.push(picture);
        }
        Ok(written)
    }

    fn headlines(&self) -> impl Iterator<Item = (&'static Service, &'static str, &Run)> {
        self.measured().filter_map(|(service, run)| Some((service, service.headline?, run)))
    }

    fn document(&self) -> String {
        let mut sections = vec![
            "# Services".to_owned(),
            "Written by `wasi-uring report` from services.json, which `scripts/services` measures: whole services, under \
             load from programs that nobody here wrote.\n\n\
             stock and uring are the same guest, of WASI 0.2 or 0.3, on wasmtime-wasi's sockets and on the ring; tokio is a \
             native program that does the same. All take turns, round by round. A service has one processor for itself and \
             one thread, nsd and the client have the others; everything goes over loopback in a network namespace. CPU: \
             user and system time of the service's process, its rings' threads included; what the kernel does for it on \
             others' time (the receive side of a packet is the sender's, on loopback; grace periods of RCU are kernel \
             threads') is not in it. × stock: how many times as cheap by CPU time the ring's guest is, round by round. calm \
             rounds: those in which other programs, and the kernel's threads, had the service's processor for less than a \
             tenth of the time; rates, latencies and ramps are of those alone. ±: \
             half the distance between the quartiles; !: too noisy to believe."
                .to_owned(),
        ];
        for (service, run) in self.measured() {
            sections.push(format!("## {}", service.title));
            sections.push(service.what.to_owned());
            sections.push(format!("`{}`\n\n{}", run.command, run.machine()));
            sections.push(run.table());
        }
        sections.join("\n\n") + "\n"
    }

    /// The few rows of the README; `all` is where the others are.
    pub(super) fn headline(&self, all: &str) -> String {
        let header = [
            "per second and core",
            "stock 0.2",
            "uring 0.2",
            "× stock",
            "stock 0.3",
            "uring 0.3",
            "× stock",
            "tokio",
        ];
        let rows = self.headlines().map(|(service, load, run)| {
            let per_core = |name| run.row(load, name).map_or(f64::NAN, |row| row.per_core().median);
            let times = |name| {
                let ratio = run.row(load, name).map(|row| row.times_stock(&run.rows));
                format!("**{}**", shown_if_any(ratio.unwrap_or(Figure::UNKNOWN)))
            };
            vec![
                format!("{}: {}", service.title, service.counted),
                number(per_core("stock 0.2"), 0),
                number(per_core("uring 0.2"), 0),
                times("uring 0.2"),
                number(per_core("stock 0.3"), 0),
                number(per_core("uring 0.3"), 0),
                times("uring 0.3"),
                number(per_core("tokio"), 0),
            ]
        });
        let rows = table(&header, rows);
        let machines = self.machines();
        format!("{rows}\n\n{machines}\nAll figures: [{all}]({all}).")
    }

    /// Where and how the headlines were measured: a line, or if they were not measured alike one for each of them.
    fn machines(&self) -> String {
        let each: Vec<_> =
            self.headlines().map(|(service, _, run)| (service.title, run.machine())).collect();
        match each.as_slice() {
            [(_, first), others @ ..] if others.iter().any(|(_, other)| other != first) => {
                let lines = each.iter().map(|(title, machine)| format!("- {title}: {machine}\n"));
                lines.collect()
            }
            [(_, first), ..] => first.clone(),
            [] => String::new(),
        }
    }
}

fn panel(service: &'static Service, load: &str, run: &Run) -> ServicePanel {
    let rows = run.rows.iter().filter(|row| row.load == load);
    let per_core = rows.map(|row| {
        let Figure { median, spread, .. } = row.per_core();
        (row.implementation.clone(), median, spread)
    });
    ServicePanel {
        name: service.title,
        counted: service.counted,
        axis: service.axis,
        per_core: per_core.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn services() -> Services {
        let row = |implementation: &str, cpu: [f64; 2]| {
            let samples = cpu.map(|cpu| {
                serde_json::json!({ "requests": 1000, "seconds": 1.0, "cpu_seconds": cpu, "lost": 1, "others": cpu / 2.5,
                    "micros": { "p50": 100.0, "p99": null, "p99.9": null } })
            });
            serde_json::json!({ "service": "forwarder", "load": "saturated",
                "implementation": implementation, "samples": samples })
        };
        let rows =
            [row("stock 0.2", [0.4, 0.8]), row("uring 0.2", [0.1, 0.4]), row("tokio", [0.1, 0.1])];
        let run = serde_json::json!({ "date": "today", "kernel": "Linux", "cpu": "2 × some", "commit": "c",
            "command": "scripts/services", "rounds": 2, "rows": rows });
        Services(serde_json::from_value(serde_json::json!({ "forwarder": run })).unwrap())
    }

    #[test]
    fn ratios_are_of_the_same_round_and_version() {
        let services = services();
        let run = &services.0["forwarder"];
        let ratio = |name| run.row("saturated", name).unwrap().times_stock(&run.rows).median;
        // The median of 4 and 2, which is not the ratio of the medians.
        assert!((ratio("uring 0.2") - 3.0).abs() < 1e-9);
        assert!(ratio("stock 0.2").is_nan() && ratio("tokio").is_nan());
    }

    #[test]
    fn rates_and_latencies_are_of_rounds_in_which_nobody_else_had_the_processor() {
        let services = services();
        let row = services.0["forwarder"].row("saturated", "uring 0.2").unwrap();
        // The one in which others had it for 0.16 of the time is not in it.
        assert_eq!((row.calm().len(), row.samples.len()), (1, 2));
        assert!((row.per_second() - 1000.0).abs() < 1e-9);
        assert!(services.document().contains("| 1 of 2 | 100 |"), "{}", services.document());
    }

    #[test]
    fn the_few_rows_and_the_table_have_what_was_measured_and_dashes_for_the_rest() {
        let services = services();
        let few = services.headline("services.md");
        assert!(few.contains("| DNS forwarder: queries |"), "{few}");
        assert!(few.contains("| – | – | **–** |"), "nothing of 0.3: {few}");
        let document = services.document();
        assert!(document.contains("| saturated | tokio | 1000 | 100.00"), "{document}");
        assert!(document.contains("| 2 of 2 | 100 | – | – | 2 of 2002 |"), "{document}");
    }
}
