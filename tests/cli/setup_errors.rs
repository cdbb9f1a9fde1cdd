//! Machines without io_uring, or with too little of something: made for real, by seccomp filters,
//! rlimits and capabilities. The library names cause and remedy; the command says them on.

#[path = "../common/filter.rs"]
mod filter;
mod tool;

use std::process::Command;
use std::{env, fs};

use filter::with_filter;
use serde_json::Value;
use tool::{CYCLE, Ended, arg, end, end_without_stderr, guests, run, wrapped};
use wasi_uring::doctor::Check;
use wasi_uring::{KERNEL_MIN, SetupError, Uring};

const ENOSYS: i32 = libc::ENOSYS;
const EPERM: i32 = libc::EPERM;
const EACCES: i32 = libc::EACCES;

/// Why a ring cannot be built in a thread under such a filter.
fn build_error(call: i64, errno: i32) -> SetupError {
    with_filter(call, errno, || Uring::builder().build().expect_err("a forbidden system call"))
}

/// Starts a program on what seems to be a kernel without io_uring, if a filter answers `ENOSYS`: io_uring's
/// sysctl is hidden. As root.
const WITHOUT_SYSCTL: [&str; 5] = [
    "unshare",
    "-m",
    "sh",
    "-c",
    r#"mount --bind /dev/null /proc/sys/kernel/io_uring_disabled && exec "$0" "$@""#,
];

/// Runs the command under such a filter; `ENOSYS` is of a kernel without io_uring.
fn run_filtered(call: i64, errno: i32, args: &[&str]) -> Ended {
    let wrapper = if errno == ENOSYS { &WITHOUT_SYSCTL[..] } else { &[] };
    with_filter(call, errno, || end(wrapped(wrapper, args)))
}

/// Limits and capabilities are the whole process's: the test runs once more, alone in a process
/// started by `wrapper`, and there does its part. `test` is the test's own name.
fn in_child(wrapper: &[&str], test: &str, part: impl FnOnce()) {
    const CHILD: &str = "WASI_URING_TEST_CHILD";
    if env::var_os(CHILD).is_some() {
        return part();
    }
    let this = env::current_exe().expect("the test's own file");
    let mut line = wrapper.iter().copied().chain([arg(&this), "--exact", test, "--nocapture"]);
    let mut command = Command::new(line.next().expect("the test's own file at least"));
    command.args(line).env(CHILD, "1");
    let ended = end(command).with_code(0);
    assert!(ended.stdout.contains("1 passed"), "no such test: {ended}");
}

/// Starts a program that may lock less memory than a ring takes.
fn with_little_memlock() -> Vec<&'static str> {
    const CAP_IPC_LOCK: u32 = 14;
    let mut wrapper = vec!["prlimit", "--memlock=65536:65536"];
    let status = fs::read_to_string("/proc/self/status").expect("proc is mounted");
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("CapEff");
    let effective = u64::from_str_radix(effective.trim(), 16).expect("hexadecimal");
    if effective & (1 << CAP_IPC_LOCK) != 0 {
        wrapper.extend(["setpriv", "--bounding-set", "-ipc_lock", "--inh-caps", "-ipc_lock"]);
    }
    wrapper
}

/// Whether the library has found that this kernel charges rings to the limit of locked memory.
fn are_rings_charged(checks: &[Check]) -> bool {
    let memlock = checks.iter().find(|check| check.name == "RLIMIT_MEMLOCK");
    memlock.is_none_or(|check| !check.found.contains("rings are not charged to it here"))
}

/// Whether a ring is more than the command may have locked then: some kernels do not charge it.
fn is_a_ring_too_much(wrapper: &[&str]) -> bool {
    end(wrapped(wrapper, ["doctor"])).code != Some(0)
}

#[track_caller]
fn assert_says(error: &SetupError, parts: &[&str]) {
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "nothing about {part:?} in {text:?}");
    }
}

mod library {
    use super::*;

    #[test]
    fn a_kernel_without_io_uring_is_told_apart() {
        let test = "library::a_kernel_without_io_uring_is_told_apart";
        in_child(&WITHOUT_SYSCTL, test, || {
            let error = build_error(libc::SYS_io_uring_setup, ENOSYS);
            assert!(matches!(error, SetupError::NoIoUring), "{error:?}");
            assert_says(&error, &["no io_uring", "ENOSYS", &format!("use Linux {KERNEL_MIN}")]);
        });
    }

    #[test]
    fn a_seccomp_filter_is_told_apart_from_other_refusals() {
        // The last is podman's.
        for errno in [EPERM, EACCES, ENOSYS] {
            let error = build_error(libc::SYS_io_uring_setup, errno);
            let SetupError::DeniedBySeccomp { errno: found } = &error else { panic!("{error:?}") };
            assert_eq!(found.raw_os_error(), Some(errno));
            assert_says(
                &error,
                &["seccomp", "allow io_uring_setup, io_uring_enter and io_uring_register"],
            );
        }
    }

    /// A profile may let the ring be made and forbid its use.
    #[test]
    fn a_filter_on_the_rings_other_system_calls_is_seccomp_as_well() {
        for call in [libc::SYS_io_uring_register, libc::SYS_io_uring_enter] {
            let error = build_error(call, EPERM);
            assert!(matches!(error, SetupError::DeniedBySeccomp { .. }), "{error:?}");
        }
    }

    #[test]
    fn sockets_beyond_the_tables_that_the_open_files_limit_allows_are_named_with_the_numbers() {
        let test = "library::\
                    sockets_beyond_the_tables_that_the_open_files_limit_allows_are_named_with_the_numbers";
        in_child(&[], test, || {
            rlimit::setrlimit(rlimit::Resource::NOFILE, 64, 64).unwrap();
            let error = Uring::builder().sockets(1_000_000).build().unwrap_err();
            let SetupError::TablesBeyondNofile { sockets: 1_000_000, limit: 64, .. } = &error
            else {
                panic!("{error:?}")
            };
            assert_says(&error, &["1000000", "64", "open-files limit", "ulimit -n", "fewer"]);
            // More than a table holds are no error.
            Uring::builder().sockets(4096).build().unwrap();
        });
    }

    #[test]
    fn locked_memory_that_is_used_up_is_named_with_its_limit() {
        let test = "library::locked_memory_that_is_used_up_is_named_with_its_limit";
        in_child(&with_little_memlock(), test, || {
            let Err(error) = Uring::builder().build() else {
                return assert!(!are_rings_charged(&wasi_uring::doctor::examine()));
            };
            assert!(matches!(error, SetupError::Memlock { limit: 65536 }), "{error:?}");
            assert_says(
                &error,
                &["ENOMEM", "locked-memory limit of 65536", "ulimit -l", "CAP_IPC_LOCK"],
            );
        });
    }

    #[test]
    fn values_out_of_range_are_named_with_the_range() {
        for value in [0, wasi_uring::limits::SOCKETS_MAX + 1, u32::MAX] {
            let error = Uring::builder().sockets(value).build().unwrap_err();
            assert!(matches!(error, SetupError::OutOfRange { option: "sockets", .. }), "{error:?}");
            assert_says(&error, &["sockets must be between 1 and 1048576", &value.to_string()]);
        }
    }
}

mod command {
    use super::*;

    const SETUP: i64 = libc::SYS_io_uring_setup;

    #[test]
    fn uring_without_io_uring_is_exit_code_2_with_cause_and_remedy() {
        let args = ["run", "--backend", "uring", CYCLE, "bind", "1"];
        run_filtered(SETUP, ENOSYS, &args).with_code(2).says(&[
            "ENOSYS",
            "use Linux",
            "wasi-uring doctor",
        ]);
        run_filtered(SETUP, EPERM, &args).with_code(2).says(&[
            "seccomp",
            "allow io_uring_setup",
            "wasi-uring doctor",
        ]);
    }

    #[test]
    fn a_missing_ring_is_found_before_the_guest_is_compiled() {
        let guest = tool::file("no_component.wat", "neither a component nor its text");
        let args = ["run", "--backend", "uring", arg(&guest)];
        run_filtered(SETUP, EPERM, &args).with_code(2).says(&["allow io_uring_setup"]);
        run(&args).with_code(2).says(&["neither a component"]);
    }

    #[test]
    fn auto_without_io_uring_runs_the_guest_on_stock_and_says_so_once() {
        for (errno, cause) in [(ENOSYS, "ENOSYS"), (EPERM, "seccomp")] {
            for runtime in ["per-core", "multi-thread"] {
                let options = ["--guests", "8", "--threads", "2", "--runtime", runtime, "--stats"];
                let args = [&["run"], &options[..], &[CYCLE, "pair", "10"]].concat();
                let ended = run_filtered(SETUP, errno, &args).with_code(0).says(&[cause]);
                assert_eq!(ended.lines_with("no ring: UDP sockets are wasmtime-wasi's"), 1);
                assert_eq!(ended.stats()["backend"], "stock", "{ended}");
            }
        }
    }

    #[test]
    fn the_log_has_colours_on_terminals_only() {
        let ended = run_filtered(SETUP, EPERM, &["run", CYCLE, "bind", "1"]).with_code(0);
        assert!(ended.says(&["WARN"]).lines_with("\x1b") == 0);
    }

    #[test]
    fn threads_share_a_ring_where_there_is_no_memory_for_two() {
        let mut wrapper = with_little_memlock();
        wrapper[1] = "--memlock=131072:131072";
        let options = ["--runtime", "per-core", "--guests", "2", "--threads", "2", "--stats"];
        let args = [&["run"], &options[..], &[CYCLE, "pair", "10"]].concat();
        let ended = end(wrapped(&wrapper, args)).with_code(0);
        assert_eq!(ended.stats()["backend"], "uring", "{ended}");
        if is_a_ring_too_much(&with_little_memlock()) {
            let ended = ended.says(&["locked-memory limit"]);
            assert_eq!(ended.lines_with("threads share"), 1, "{ended}");
            assert_eq!(ended.stats()["rings"], 1, "{ended}");
        }
    }

    #[test]
    fn auto_falls_back_even_if_nobody_reads_that_it_does() {
        with_filter(SETUP, EPERM, || {
            end_without_stderr(tool::command(["run", CYCLE, "pair", "10"])).with_code(0);
        });
    }

    /// tokio-uring's runtime is an io_uring itself, whatever the guests' sockets are.
    #[test]
    fn a_tokio_uring_runtime_without_io_uring_fails_and_does_not_panic() {
        for backend in ["auto", "stock"] {
            let options = ["--backend", backend, "--runtime", "tokio-uring"];
            let args = [&["run"], &options[..], &[CYCLE, "bind", "1"]].concat();
            let ended = run_filtered(SETUP, EPERM, &args).says(&["tokio-uring", "per-core"]);
            assert!(matches!(ended.code, Some(1 | 2)), "{ended}");
            assert!(!ended.stderr.contains("panicked"), "{ended}");
        }
    }

    #[test]
    fn stock_does_not_ask_for_io_uring() {
        let args = ["run", "--backend", "stock", CYCLE, "pair", "1"];
        let ended = run_filtered(SETUP, EPERM, &args).with_code(0);
        assert_eq!(ended.stderr, "");
    }

    #[test]
    fn comparing_backends_without_io_uring_fails_with_cause_and_remedy() {
        for args in [&["demo", "--guests", "1"][..], &["bench", "create", "--guests", "1"]] {
            let ended = run_filtered(SETUP, EPERM, args).says(&["seccomp", "allow io_uring_setup"]);
            assert!(matches!(ended.code, Some(1 | 2)), "{ended}");
        }
    }

    /// Runs the command under a hard open-files limit of 256.
    fn with_few_files(args: &[&str]) -> Ended {
        end(wrapped(&["prlimit", "--nofile=128:256"], args))
    }

    #[test]
    fn sockets_beyond_all_tables_are_exit_code_2_with_the_remedy() {
        let args = ["run", "--backend", "uring", "--sockets", "1000000", CYCLE, "bind", "1"];
        with_few_files(&args).with_code(2).says(&["1048576", "limit of 256", "ulimit -n"]);
    }

    #[test]
    fn without_a_number_of_sockets_they_fit_the_limit() {
        for runtime in ["per-core", "multi-thread"] {
            let options = ["--backend", "uring", "--guests", "4", "--runtime", runtime];
            let args = [&["run"], &options[..], &[CYCLE, "pair", "10"]].concat();
            let ended = with_few_files(&args).with_code(0);
            assert_eq!(ended.stderr, "");
        }
    }

    /// Sockets on the ring are no files: more of them than files are open at once.
    #[test]
    fn sockets_on_the_ring_do_not_count_as_open_files() {
        let guest = guests::hoarding("hoards_under_a_limit.wat", 1024, 1);
        let options = ["--backend", "uring", "--threads", "1", "--sockets", "1024"];
        let args = [&["run"], &options[..], &[arg(&guest)]].concat();
        with_few_files(&args).with_code(0);
    }

    #[test]
    fn the_demo_runs_fewer_guests_where_files_are_few_and_says_so() {
        let ended = with_few_files(&["demo", "--guests", "1000", "--rounds", "1"]).with_code(0);
        let ended = ended.says(&["the open-files limit is 256"]);
        assert!(ended.stdout.contains("times as fast"), "{ended}");
    }

    #[test]
    fn locked_memory_that_is_used_up_is_exit_code_2_with_the_remedy() {
        let wrapper = with_little_memlock();
        let args = ["run", "--backend", "uring", CYCLE, "bind", "1"];
        let ended = end(wrapped(&wrapper, args));
        if !is_a_ring_too_much(&wrapper) {
            assert_eq!(ended.with_code(0).stderr, "");
            return;
        }
        ended.with_code(2).says(&["ENOMEM", "locked-memory limit of 65536", "ulimit -l"]);
        let ended = end(wrapped(&wrapper, ["run", CYCLE, "bind", "1"])).with_code(0);
        ended.says(&["no ring", "locked-memory limit of 65536"]);
    }
}

mod doctor {
    use super::*;

    /// The JSON report's checks that say "missing".
    #[track_caller]
    fn missing(ended: &Ended) -> Vec<(String, String, String)> {
        let report: Value = serde_json::from_str(&ended.stdout).expect("a report");
        assert_eq!(report["works"], false, "{ended}");
        let checks = report["checks"].as_array().expect("checks");
        let text = |check: &Value, field: &str| check[field].as_str().unwrap_or("").to_owned();
        checks
            .iter()
            .filter(|check| check["verdict"] == "missing")
            .map(|check| (text(check, "name"), text(check, "found"), text(check, "remedy")))
            .collect()
    }

    #[test]
    fn it_names_a_missing_io_uring_and_the_remedy() {
        for (errno, cause, remedy) in [
            (ENOSYS, "no io_uring", "6.11"),
            (EPERM, "refused by a seccomp filter", "allow io_uring_setup"),
        ] {
            let call = libc::SYS_io_uring_setup;
            let ended = run_filtered(call, errno, &["doctor", "--json"]).with_code(1);
            let missing = missing(&ended);
            assert!(!missing.is_empty());
            for (name, found, says) in missing {
                assert!(found.contains(cause) && says.contains(remedy), "{name}: {found}, {says}");
            }
            let text = run_filtered(call, errno, &["doctor"]).with_code(1).stdout;
            let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
            for part in ["MISSING", cause, remedy, "--backend auto"] {
                assert!(text.contains(part), "nothing about {part:?} in {text}");
            }
        }
    }

    #[test]
    fn it_names_locked_memory_and_the_remedy() {
        let ended = end(wrapped(&with_little_memlock(), ["doctor", "--json"]));
        if ended.code == Some(0) {
            let memlock = check(&ended, "RLIMIT_MEMLOCK");
            assert_eq!(memlock["found"], "65536 bytes; rings are not charged to it here");
            return;
        }
        let missing = missing(&ended);
        assert!(!missing.is_empty());
        for (name, found, says) in missing {
            assert!(
                found.contains("ENOMEM") && says.contains("ulimit -l"),
                "{name}: {found}, {says}"
            );
        }
    }

    #[test]
    fn few_open_files_are_a_note_and_not_a_failure() {
        let ended = end(wrapped(&["prlimit", "--nofile=256:256"], ["doctor", "--json"]));
        let ended = ended.with_code(0);
        let nofile = check(&ended, "RLIMIT_NOFILE");
        assert_eq!(nofile["verdict"], "limited");
        assert!(nofile["found"].as_str().unwrap().contains("256"), "{nofile}");
        assert!(nofile["remedy"].as_str().unwrap().contains("ulimit -n"), "{nofile}");
        // What to raise it to is said once.
        let recycling = check(&ended, "recycling of closed sockets");
        let remedy = recycling["remedy"].as_str().unwrap();
        assert!(remedy.contains("RLIMIT_NOFILE"), "{recycling}");
        assert!(!remedy.contains(|c: char| c.is_ascii_digit()), "{recycling}");
    }

    #[test]
    fn the_limits_are_those_that_run_has() {
        let ended = end(wrapped(&["prlimit", "--nofile=128:256"], ["doctor", "--json"]));
        let nofile = check(&ended.with_code(0), "RLIMIT_NOFILE");
        assert!(nofile["found"].as_str().unwrap().starts_with("256:"), "{nofile}");
    }

    /// What would help a ring that there cannot be is no help.
    #[test]
    fn where_there_is_no_ring_only_what_is_in_its_way_has_a_remedy() {
        let ended = with_filter(libc::SYS_io_uring_setup, ENOSYS, || {
            end(wrapped(&["prlimit", "--nofile=256:256"], ["doctor"]))
        });
        let ended = ended.with_code(1);
        assert!(ended.stdout.contains("MISSING") && !ended.stdout.contains("RLIMIT"), "{ended}");
    }

    #[test]
    fn what_is_not_read_on_a_terminal_has_no_blanks_at_the_ends_of_its_lines() {
        let ended = run(&["doctor"]);
        for line in ended.stdout.lines() {
            assert_eq!(line, line.trim_end());
        }
    }

    /// A check of the JSON report.
    #[track_caller]
    fn check(ended: &Ended, name: &str) -> Value {
        let report: Value = serde_json::from_str(&ended.stdout).expect("a report");
        let checks = report["checks"].as_array().expect("checks");
        checks.iter().find(|check| check["name"] == name).expect("a check of this name").clone()
    }
}
