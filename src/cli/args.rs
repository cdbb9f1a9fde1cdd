//! The command line.

use std::net::{SocketAddr, SocketAddrV4};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};
use wasi_uring::Recycle;
use wasi_uring::limits::SOCKETS_MAX;

use crate::benches;

/// Runs WebAssembly guests whose UDP sockets live on an io_uring.
#[derive(Parser)]
#[command(name = "wasi-uring", version, about, arg_required_else_help = true)]
#[command(after_help = "\
Start with `wasi-uring demo`. If it says that io_uring is missing, `wasi-uring doctor` says why.
Logging: RUST_LOG=wasi_uring=debug")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Run a WASI 0.2 or 0.3 component (one that exports wasi:cli/run)
    Run(RunArgs),
    /// Serve HTTP with a WASI 0.2 or 0.3 component (one that exports wasi:http's handler)
    Serve(ServeArgs),
    /// See both backends at work: a thousand guests that open, bind, use and close sockets
    Demo(DemoArgs),
    /// Measure both backends with the same guest, in alternation
    Bench(BenchArgs),
    /// Write tables and pictures of results that `bench --json` has kept
    Report(ReportArgs),
    /// Show what this kernel and these limits allow, and what to change
    Doctor(DoctorArgs),
    /// What `bench density` has measured in a process of its own; prints JSON
    #[command(hide = true)]
    Crowd(CrowdArgs),
    /// Run a service without WebAssembly, for `scripts/services` to compare guests with
    #[command(hide = true, subcommand)]
    Native(NativeService),
}

/// Where a guest's UDP sockets come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum BackendArg {
    /// The ring; an error if this machine cannot have one
    Uring,
    /// wasmtime-wasi's own sockets, unchanged: the baseline
    Stock,
    /// The ring if there can be one, else stock, which is said once
    Auto,
}

/// Which threads and runtimes guests run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RuntimeArg {
    /// A tokio current-thread runtime and a ring for each thread
    PerCore,
    /// One tokio multi-thread runtime, and a ring for each worker
    MultiThread,
    /// A tokio-uring runtime and a ring for each thread
    TokioUring,
}

/// The version of WASI that a guest is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum WasiArg {
    /// Sockets with streams, and pollables to wait with
    #[value(name = "0.2")]
    P2,
    /// Async functions
    #[value(name = "0.3")]
    P3,
}

impl WasiArg {
    /// All there are.
    pub const ALL: [Self; 2] = [Self::P2, Self::P3];

    /// Its number.
    #[must_use]
    pub fn version(self) -> &'static str {
        match self {
            Self::P2 => "0.2",
            Self::P3 => "0.3",
        }
    }
}

/// Which addresses guests may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum NetArg {
    /// No UDP, no TCP, no name look-up
    None,
    /// UDP and TCP with this machine only, no name look-up. Wildcard binds are allowed, and what
    /// comes from elsewhere is dropped
    Loopback,
    /// Everything
    All,
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  wasi-uring run guest.wasm
  wasi-uring run --guests 1000 --threads 1 --stats guest.wasm bind 100
  wasi-uring run --backend stock guest.wasm        # the same guest on wasmtime-wasi's sockets
  wasi-uring run --net all --env TOKEN resolver.wasm example.org

Exit code: 0 when every guest returned ok, 1 when one failed or trapped, 2 for a wrong command
line, a missing or invalid file, or a component that does not export wasi:cli/run.")]
pub(crate) struct RunArgs {
    /// Where UDP sockets come from
    #[arg(long, value_enum, default_value_t = BackendArg::Auto)]
    pub(crate) backend: BackendArg,
    /// Instances to run at once; instance 0 has the terminal's stdin, stdout and stderr
    #[arg(long, value_name = "N", default_value = "1", value_parser = parse_guests)]
    pub(crate) guests: NonZeroUsize,
    /// Threads that run guests [default: one per core]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,
    /// Threads and runtimes that run guests
    #[arg(long, value_enum, default_value_t = RuntimeArg::PerCore)]
    pub(crate) runtime: RuntimeArg,
    /// Addresses guests may use
    #[arg(long, value_enum, default_value_t = NetArg::Loopback)]
    pub(crate) net: NetArg,
    /// An environment variable for the guests; without a value, this process's
    #[arg(long = "env", value_name = "NAME[=VALUE]", value_parser = parse_env)]
    pub(crate) envs: Vec<(String, String)>,
    /// UDP sockets that may be open at once on the rings; each guest may hold its share
    /// [default: 256 per guest, at least 4096, within the open-files limit]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(SOCKETS_MAX)))]
    pub(crate) sockets: Option<u32>,
    #[command(flatten)]
    pub(crate) recycle: RecycleArgs,
    /// End with one line of JSON on stderr: what went through the rings
    #[arg(long)]
    pub(crate) stats: bool,
    /// The component, binary or text
    pub(crate) file: PathBuf,
    /// Arguments for the guests
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) args: Vec<String>,
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  wasi-uring serve guest.wasm
  wasi-uring serve --addr 0.0.0.0:80 --net all --env RESOLVER=192.0.2.53 resolver.wasm
  wasi-uring serve --addr '[::1]:8080' --timeout 500ms --metrics-addr 127.0.0.1:9090 guest.wasm

Each request has a guest of its own: an instance in a store that lives until the guest has returned and
its answer is written, also when its client has gone. What becomes of a request that a guest does not answer:
  400 it names no valid host           500 the guest failed; stderr says how
  413 its body is longer than allowed  503 too many requests at once
  504 the guest took too long
A guest that fails or takes too long when it has begun to answer has its connection closed.

Not offered: TLS and HTTP/2 (put a proxy in front), and outgoing HTTP: a guest's request is answered
with HTTP-request-denied. Guests write to this process's stdout and stderr.

SIGTERM and SIGINT end it: it stops listening, finishes what was asked for, and closes the ring.

Exit code: 0 after such an end, 1 when guests had to be ended for it (--grace) or the server failed, 2
for a wrong command line, a missing or invalid file, an address that cannot be had, or a component
that does not export wasi:http/incoming-handler@0.2 or wasi:http/handler@0.3.")]
pub(crate) struct ServeArgs {
    /// Where to listen; with port 0 the kernel chooses one, which stderr tells
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:8080", value_parser = parse_addr)]
    pub(crate) addr: SocketAddr,
    /// Where UDP sockets come from
    #[arg(long, value_enum, default_value_t = BackendArg::Auto)]
    pub(crate) backend: BackendArg,
    /// Threads that run guests [default: one per core]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,
    /// Addresses guests may use
    #[arg(long, value_enum, default_value_t = NetArg::Loopback)]
    pub(crate) net: NetArg,
    /// An environment variable for the guests; without a value, this process's
    #[arg(long = "env", value_name = "NAME[=VALUE]", value_parser = parse_env)]
    pub(crate) envs: Vec<(String, String)>,
    /// Requests at once, and guests; one more is answered with 503
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) requests_max: u32,
    /// How long a guest may take for a request, its answer's body included: 500ms, 30s, 5m
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub(crate) timeout: Time,
    /// Memory that a guest may have
    #[arg(long = "memory-max", value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) memory_max_mib: u32,
    /// Longest body of a request
    #[arg(long = "body-max", value_name = "MIB", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) body_max_mib: u32,
    /// UDP sockets that may be open at once on the ring; each guest may hold its share
    /// [default: 4096]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(SOCKETS_MAX)))]
    pub(crate) sockets: Option<u32>,
    #[command(flatten)]
    pub(crate) recycle: RecycleArgs,
    /// How long requests may still take when the server is told to end
    #[arg(long, value_name = "TIME", default_value = "10s")]
    pub(crate) grace: Time,
    /// Where Prometheus may scrape counters (path /metrics) [default: nowhere]
    #[arg(long, value_name = "IP:PORT", value_parser = parse_addr)]
    pub(crate) metrics_addr: Option<SocketAddr>,
    /// End with one line of JSON on stderr: requests, and what went through the ring
    #[arg(long)]
    pub(crate) stats: bool,
    /// The component, binary or text
    pub(crate) file: PathBuf,
}

impl ServeArgs {
    /// In bytes.
    pub(crate) fn memory_max(&self) -> usize {
        (self.memory_max_mib as usize) << 20
    }

    /// In bytes.
    pub(crate) fn body_max(&self) -> usize {
        (self.body_max_mib as usize) << 20
    }
}

/// A span of time on the command line, with its unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Time(pub(crate) Duration);

/// Longer ones would only overflow what is computed from them.
const TIME_MAX: Duration = Duration::from_hours(24 * 365);

impl FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let unit = match unit {
            "ms" => Some(Duration::from_millis(1)),
            "s" => Some(Duration::from_secs(1)),
            "m" => Some(Duration::from_mins(1)),
            "h" => Some(Duration::from_hours(1)),
            _ => None,
        };
        let number = number.parse::<u32>().ok();
        let time = unit.zip(number).and_then(|(unit, number)| unit.checked_mul(number));
        match time {
            Some(time) if !time.is_zero() && time <= TIME_MAX => Ok(Self(time)),
            _ => Err(format!(
                "{text} is no time; write a whole number with ms, s, m or h: 500ms, 30s"
            )),
        }
    }
}

impl std::fmt::Display for Time {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(&self.0, f)
    }
}

fn parse_addr(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        format!("{text} is no IP address with a port; write it as 127.0.0.1:8080 or [::1]:8080")
    })
}

#[derive(Args, Clone, Copy)]
pub(crate) struct RecycleArgs {
    /// Close every socket for good instead of keeping it for a new owner
    #[arg(long)]
    no_recycle: bool,
}

impl RecycleArgs {
    pub(crate) fn limits(self) -> Recycle {
        if self.no_recycle { Recycle::OFF } else { Recycle::default() }
    }
}

#[derive(Args)]
pub(crate) struct DemoArgs {
    /// Guests at once
    #[arg(long, value_name = "N", default_value = "1000", value_parser = parse_guests)]
    pub(crate) guests: NonZeroUsize,
    /// Rounds per backend; more rounds, less noise
    #[arg(long, value_name = "N", default_value = "5")]
    pub(crate) rounds: NonZeroUsize,
}

#[derive(Args)]
#[command(after_help = bench_help())]
pub(crate) struct BenchArgs {
    /// What to measure [default: everything]
    #[arg(value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// Measure nothing; print each bench's name, what is measured and what it does, separated by tabs
    #[arg(long)]
    pub(crate) list: bool,
    /// The WASI version of the guests; several values, several rows
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = WasiArg::ALL)]
    pub(crate) wasi: Vec<WasiArg>,
    /// Guests at once; several values, several rows
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,64",
        value_parser = parse_guests)]
    pub(crate) guests: Vec<NonZeroUsize>,
    /// Rounds per backend
    #[arg(long, value_name = "N", default_value = "7")]
    pub(crate) rounds: NonZeroUsize,
    /// Write the results here, as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Draw the results of speed into this directory, as SVG
    #[arg(long, value_name = "DIR")]
    pub(crate) plot: Option<PathBuf>,
    /// Sockets for flood (1000 by default), neighbour (16), idle (10000) and density (100000, under a limit of a fifth
    /// as many open files)
    #[arg(long, value_name = "N")]
    pub(crate) sockets: Option<NonZeroUsize>,
    #[command(flatten)]
    pub(crate) recycle: RecycleArgs,
    /// per-core (one thread) or multi-thread
    #[arg(long, value_enum, default_value_t = RuntimeArg::PerCore)]
    pub(crate) runtime: RuntimeArg,
}

fn bench_help() -> String {
    let names = benches::listed();
    format!(
        "\
Names, and what one operation does (to open is to create and bind):
{names}
The CPU time of the thread that sends what is only received does not count.

wasmtime-wasi allocates 64 KiB of memory for each datagram that a guest of WASI 0.2 receives. malloc
may give those of a batch back to the kernel each time, which makes the batch cost four times as
much; with MALLOC_TRIM_THRESHOLD_=1073741824 in the environment it keeps them.

It makes an error, too, that nobody sees, whenever a guest of WASI 0.2 asks for a socket's streams. With
RUST_BACKTRACE=1 each takes a backtrace, which makes dns and pair a third more expensive."
    )
}

#[derive(Args)]
pub(crate) struct CrowdArgs {
    /// How many sockets, of what, as JSON
    pub(crate) crowd: String,
}

#[derive(Args)]
#[command(after_help = "\
`scripts/bench` and `scripts/services` measure what this reads. Nothing is measured here.")]
pub(crate) struct ReportArgs {
    /// Where results.json, guests.json, multi-thread.json, others.json and density.json are, and services.json,
    /// if there is one; README.md, services.md and the pictures are written beside them
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// Also write the few most telling rows into this file, between `<!-- bench -->` and
    /// `<!-- /bench -->`, and `<!-- services -->` and `<!-- /services -->`
    #[arg(long, value_name = "FILE")]
    pub(crate) readme: Option<PathBuf>,
    /// Read services.json alone, and write what is made of it
    #[arg(long)]
    pub(crate) services: bool,
}

#[derive(Args)]
#[command(after_help = "\
A container runtime's own seccomp profile forbids io_uring. One that allows it, for instance for podman:
  wasi-uring doctor --seccomp /usr/share/containers/seccomp.json >wasi-uring.json
  podman run --security-opt seccomp=wasi-uring.json ...
Docker has its own built in; as a file it is seccomp/default.json of moby/profiles.")]
pub(crate) struct DoctorArgs {
    /// Print JSON instead of text
    #[arg(long)]
    pub(crate) json: bool,
    /// Look at nothing; print this seccomp profile, a container runtime's own, with what rings need allowed
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    pub(crate) seccomp: Option<PathBuf>,
}

/// What a guest of tests/guests/services does, in a native program.
#[derive(Subcommand)]
pub(crate) enum NativeService {
    /// Forward DNS queries to another server
    Forward {
        /// With port P and N threads: the first free ports from P on
        listen: SocketAddrV4,
        upstream: SocketAddrV4,
        #[arg(long, value_name = "N", default_value_t = 1)]
        threads: u16,
    },
    /// Answer GET /name with the name's address
    Web { listen: SocketAddrV4, resolver: SocketAddrV4 },
    /// Send lines of statistics in bursts
    Source { collector: SocketAddrV4, sources: u32, bursts: u64, lines: u64, pause_millis: u64 },
    /// Count lines of statistics
    Collect { listen: SocketAddrV4 },
}

/// More guests than any machine's memory holds would only overflow what is computed from them.
const GUESTS_MAX: usize = 1_000_000;

fn parse_guests(text: &str) -> Result<NonZeroUsize, String> {
    match text.parse::<NonZeroUsize>() {
        Ok(guests) if guests.get() <= GUESTS_MAX => Ok(guests),
        _ => Err(format!("{text} is not in 1..={GUESTS_MAX}")),
    }
}

fn parse_env(text: &str) -> Result<(String, String), String> {
    if let Some((name, value)) = text.split_once('=') {
        return Ok((name.to_owned(), value.to_owned()));
    }
    match std::env::var(text) {
        Ok(value) => Ok((text.to_owned(), value)),
        Err(std::env::VarError::NotPresent) => {
            Err(format!("this process has no variable {text}; give a value: --env {text}=VALUE"))
        }
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_needs_a_number_and_a_unit_and_must_not_overflow() {
        let time = |text: &str| text.parse::<Time>().ok().map(|time| time.0);
        assert_eq!(time("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(time("2m"), Some(Duration::from_mins(2)));
        for wrong in ["", "5", "s", "0s", "-1s", "1.5s", "5 s", "4294967295h", "99999999999s"] {
            assert_eq!(time(wrong), None, "{wrong:?}");
        }
    }
}
