//! `wasi-uring doctor`: the library's examination, for eyes or for a program.

use std::process::ExitCode;

use crate::doctor::{Check, Verdict, examine};
use comfy_table::Table;
use comfy_table::presets::NOTHING;

use super::{DoctorArgs, print};

/// Exit code 1 when sockets on the ring do not work here.
pub(crate) fn doctor(args: &DoctorArgs) -> ExitCode {
    let checks = examine();
    let works = checks.iter().all(|check| check.verdict != Verdict::Missing);
    if args.json {
        let checks: Vec<_> = checks.iter().map(json).collect();
        print(serde_json::json!({ "works": works, "checks": checks }));
    } else {
        let mut table = Table::new();
        table.load_preset(NOTHING);
        for check in &checks {
            table.add_row([mark(check.verdict), check.name, &check.found]);
            if let Some(remedy) = &check.remedy {
                table.add_row(["", "", &format!("→ {remedy}")]);
            }
        }
        print(table);
        print(if works {
            "\nUDP sockets on io_uring work here."
        } else {
            "\nUDP sockets on io_uring do not work here; guests can use wasmtime-wasi's \
             (`run --backend auto`)."
        });
    }
    if works { ExitCode::SUCCESS } else { ExitCode::from(1) }
}

fn mark(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Good => "ok",
        Verdict::Limited => "note",
        Verdict::Missing => "MISSING",
    }
}

fn json(check: &Check) -> serde_json::Value {
    let verdict = match check.verdict {
        Verdict::Good => "good",
        Verdict::Limited => "limited",
        Verdict::Missing => "missing",
    };
    serde_json::json!({
        "name": check.name,
        "verdict": verdict,
        "found": check.found,
        "remedy": check.remedy,
    })
}

/// Raises the soft open-files limit to the hard one, for tables may not be larger; the limit then.
/// Sockets that one process can have with wasmtime-wasi, whose each is an open file, beside what else
/// it has open.
pub(crate) fn sockets_of_stock_max() -> usize {
    usize::try_from(raise_nofile().saturating_sub(DESCRIPTORS_SPARE)).unwrap_or(usize::MAX).max(2)
}

const DESCRIPTORS_SPARE: u64 = 64;

/// As many open files as may be.
pub(crate) fn raise_nofile() -> u64 {
    rlimit::increase_nofile_limit(u64::MAX).unwrap_or_else(|error| {
        tracing::debug!(%error, "the open-files limit cannot be raised");
        rlimit::Resource::NOFILE.get_soft().unwrap_or(1024)
    })
}
