//! `scripts/services`, tiny: whole services under a little load of real clients. What is asserted are
//! counts; nothing here is a measurement.

mod tool;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use serde_json::Value;
use tool::{end, has_rust_guests};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/services");
const ALL: [&str; 5] = ["stock 0.2", "uring 0.2", "stock 0.3", "uring 0.3", "tokio"];

/// Each service has one processor to itself.
static ALONE: Mutex<()> = Mutex::new(());

/// Measures one service; what it has written. Nothing where there are no guests.
fn measured(service: &str) -> Option<(PathBuf, Value)> {
    if !has_rust_guests(&format!("the guests of {service}")) {
        return None;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("services-{service}"));
    let _ = std::fs::remove_dir_all(&out);
    let mut command = Command::new(SCRIPT);
    command
        .args(["--tiny", "--binary", env!("CARGO_BIN_EXE_wasi-uring"), "--out"])
        .arg(&out)
        .arg(service);
    end(command).with_code(0);
    let text = std::fs::read_to_string(out.join("services.json")).unwrap();
    let kept: Value = serde_json::from_str(&text).unwrap();
    Some((out, kept[service]["rows"].clone()))
}

/// The one sample of each implementation of a service under a load.
#[track_caller]
fn samples<'a>(
    rows: &'a Value,
    service: &str,
    load: &str,
    implementations: &[&str],
) -> Vec<&'a Value> {
    let of = |name: &&str| {
        let rows = rows.as_array().expect("rows");
        let is_it = |row: &&Value| {
            [&row["service"], &row["load"], &row["implementation"]] == [service, load, *name]
        };
        let row = rows.iter().find(is_it);
        &row.unwrap_or_else(|| panic!("nothing of {name}, {load}, in {rows:?}"))["samples"][0]
    };
    implementations.iter().map(of).collect()
}

/// Something was asked, and all of it was answered as it should be.
#[track_caller]
fn all_answered(samples: &[&Value]) {
    for sample in samples {
        assert!(sample["requests"].as_f64() > Some(0.0), "{sample}");
        assert_eq!(
            (sample["lost"].as_f64(), sample["failed"].as_f64()),
            (Some(0.0), Some(0.0)),
            "{sample}"
        );
    }
}

/// Something was answered, however much was asked.
#[track_caller]
fn some_answered(samples: &[&Value]) {
    assert!(samples.iter().all(|sample| sample["requests"].as_f64() > Some(0.0)), "{samples:?}");
}

/// Tables for all that was measured, and a picture that is well-formed, with these bars.
#[track_caller]
fn written(out: &Path, bars: &[&str]) {
    let tables = std::fs::read_to_string(out.join("services.md")).unwrap();
    let picture = std::fs::read_to_string(out.join("services.svg")).unwrap();
    let picture = roxmltree::Document::parse(&picture).expect("well-formed XML");
    let texts: Vec<_> =
        picture.descendants().filter_map(|node| node.text()).map(str::trim).collect();
    for bar in bars {
        assert!(tables.contains(&format!("| {bar} |")), "{bar} is not in {tables}");
        assert!(texts.contains(bar), "{bar} is not in {texts:?}");
    }
}

#[test]
fn a_forwarder_answers_what_dnsperf_asks_with_the_answers_of_nsd() {
    let Some((out, rows)) = measured("forwarder") else { return };
    all_answered(&samples(&rows, "forwarder", "paced", &ALL));
    written(&out, &ALL);
}

#[test]
fn several_forwarders_and_one_with_one_upstream_socket_answer_too() {
    let Some((_, rows)) = measured("variants") else { return };
    some_answered(&samples(&rows, "variants", "8 guests", &ALL[..4]));
    some_answered(&samples(&rows, "variants", "one upstream socket", &ALL[..2]));
}

#[test]
fn a_web_service_answers_what_wrk_asks_with_addresses_of_nsd() {
    let Some((out, rows)) = measured("web") else { return };
    all_answered(&samples(&rows, "web", "one connection", &ALL));
    written(&out, &ALL);
}

#[test]
fn a_collector_gets_the_lines_of_all_sources() {
    let Some((out, rows)) = measured("telemetry") else { return };
    for sample in samples(&rows, "telemetry", "paced", &ALL) {
        assert!(sample["requests"].as_f64() > Some(0.0), "{sample}");
        assert_eq!((&sample["lost"], &sample["sources"]), (&0.into(), &50.into()), "{sample}");
    }
    written(&out, &ALL);
}

#[test]
fn two_workers_share_what_is_asked() {
    let Some((_, rows)) = measured("workers") else { return };
    for (workers, web) in [("1 worker", &ALL[..]), ("2 workers", &ALL[..4])] {
        some_answered(&samples(&rows, "workers: forwarder", workers, &ALL));
        some_answered(&samples(&rows, "workers: web", workers, web));
    }
}
