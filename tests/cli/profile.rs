//! `scripts/profile`, of one small bench. What is asserted is whose time there is at all, and that it is all
//! of it.

mod tool;

use std::path::Path;
use std::process::Command;

use tool::end;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/profile");

fn profile(args: &[&str]) -> Command {
    let mut command = Command::new(SCRIPT);
    command.args(["--binary", env!("CARGO_BIN_EXE_wasi-uring")]).args(args);
    command
}

/// Kills: samples that count for another implementation, and names that are taken for another part's.
#[test]
fn a_profile_divides_the_time_of_each_implementation() {
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("profile.md");
    let _ = std::fs::remove_file(&out);
    let mut command = profile(&["--rounds", "1", "--guests", "1", "--symbols", "1", "bind"]);
    command.arg("--out").arg(&out);
    end(command).with_code(0);
    let text = std::fs::read_to_string(&out).unwrap();
    let mut rows = text
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"))
        .map(|row| row.split(" | ").collect::<Vec<_>>())
        .filter(|cells| cells[0] != "---");
    let head = rows.next().unwrap();
    let column = |name: &str| {
        head.iter().position(|cell| *cell == name).unwrap_or_else(|| panic!("{name}: {text}"))
    };
    let (total, wasi, io_uring) = (column("CPU, µs"), column("WASI"), column("kernel: io_uring"));
    let (guest, wasmtime) = (column("guest"), column("Wasmtime"));
    let network = column("kernel: network");
    let rows: Vec<_> = rows.collect();
    assert_eq!(rows.len(), 8, "{text}");
    for cells in rows {
        let name = cells[0];
        let micros = |at: usize| cells[at].parse::<f64>().unwrap();
        let parts: f64 = (total + 1..head.len()).map(micros).sum();
        assert!((parts - micros(total)).abs() < 0.06, "{name}: rounded, {parts} are all: {text}");
        let is_guest = name.starts_with("uring") || name.starts_with("stock");
        let is_ring = name.starts_with("uring") || name == "floor";
        if name == "tokio-uring" {
            // Its binds are system calls, and it is made of the crate io-uring, too.
            continue;
        }
        assert_eq!(micros(io_uring) > micros(total) / 200.0, is_ring, "{name}: {text}");
        assert_eq!(micros(wasi) > 0.0, is_guest || is_ring, "{name}: {text}");
        assert_eq!(micros(wasmtime) > 0.0, is_guest, "{name}: {text}");
        assert!(micros(network) > micros(total) / 100.0, "{name}: binds are the network's: {text}");
        assert!(is_guest || micros(guest) < 0.01, "{name}: {text}");
    }
}

#[test]
fn a_wrong_argument_is_an_error_of_its_own() {
    for args in [&["nothing"][..], &["--rounds", "0"], &["--guests", "x"]] {
        end(profile(args)).with_code(2);
    }
}
