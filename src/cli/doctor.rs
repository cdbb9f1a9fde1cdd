//! `wasi-uring doctor`: the library's examination, for eyes or for a program.

use std::process::ExitCode;

use comfy_table::Table;
use comfy_table::presets::NOTHING;
use wasi_uring::doctor::{Check, Verdict, examine};

use crate::args::DoctorArgs;
use crate::open_files;
use crate::terminal::print;

/// Exit code 1 when sockets on the ring do not work here.
pub(crate) fn doctor(args: &DoctorArgs) -> ExitCode {
    // As `run` has it.
    open_files::raise_limit();
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
        // The table pads every line to the longest, a screen's width beyond most.
        table.lines().for_each(|line| print(line.trim_end()));
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
