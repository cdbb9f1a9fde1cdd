//! The command in containers, made with crun(1), as root: under the seccomp profile that podman has by default,
//! and under what `doctor --seccomp` makes of it. libseccomp compiles both, as it does for every runtime.

mod tool;

use std::path::{Path, PathBuf};
use std::{env, fs, process};

use serde_json::{Value, json};
use tool::{CYCLE, CYCLE_3, Ended, arg, end, run};

/// Podman's, which Debian has in golang-github-containers-common. Docker's is of the same format.
const DEFAULT: &str = "/usr/share/containers/seccomp.json";

/// What containers may do unless their user says otherwise.
const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

fn default_profile() -> Value {
    let text = fs::read_to_string(DEFAULT);
    let text = text.unwrap_or_else(|error| panic!("{DEFAULT}: {error}; scripts/test installs it"));
    serde_json::from_str(&text).unwrap()
}

/// What a runtime makes of a profile for a container with these capabilities: of its rules those that are for
/// it, without their conditions.
fn for_container(profile: &Value) -> Value {
    let (architecture, arch) = match env::consts::ARCH {
        "x86_64" => ("SCMP_ARCH_X86_64", "amd64"),
        "aarch64" => ("SCMP_ARCH_AARCH64", "arm64"),
        other => panic!("the test knows no {other}"),
    };
    let names = |condition: &Value, what: &str| -> Vec<String> {
        serde_json::from_value(condition[what].clone()).unwrap_or_default()
    };
    let has = |cap: &String| CAPABILITIES.contains(&cap.as_str());
    let applies = |rule: &&Value| {
        let (includes, excludes) = (&rule["includes"], &rule["excludes"]);
        let arches = names(includes, "arches");
        names(includes, "caps").iter().all(has)
            && !names(excludes, "caps").iter().any(has)
            && (arches.is_empty() || arches.iter().any(|one| one == arch))
            && !names(excludes, "arches").iter().any(|one| one == arch)
    };
    let rules = profile["syscalls"].as_array().unwrap().iter().filter(applies).map(|rule| {
        let mut rule = rule.clone();
        rule.as_object_mut().unwrap().retain(|key, value| {
            ["names", "action", "errnoRet", "args"].contains(&&**key) && !value.is_null()
        });
        rule
    });
    json!({
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": [architecture],
        "syscalls": rules.collect::<Vec<_>>(),
    })
}

/// Directories that the command and the test's guests are in, and those of libraries.
fn directories() -> Vec<PathBuf> {
    let command = Path::new(env!("CARGO_BIN_EXE_wasi-uring"));
    let own = [command.parent().unwrap(), Path::new(CYCLE).parent().unwrap()];
    let system = ["/usr", "/lib", "/lib64"].map(Path::new);
    own.into_iter().chain(system).filter(|path| path.exists()).map(Path::to_owned).collect()
}

/// Runs the command in a container under a profile. `name` is the container's, and no other's.
#[track_caller]
fn contained(name: &str, profile: &Value, args: &[&str]) -> Ended {
    let name = format!("wasi-uring-{}-{name}", process::id());
    let bundle = Path::new(env!("CARGO_TARGET_TMPDIR")).join(&name);
    fs::create_dir_all(bundle.join("rootfs")).unwrap();
    let mut mounts = vec![
        json!({ "destination": "/proc", "type": "proc", "source": "proc" }),
        json!({ "destination": "/dev", "type": "tmpfs", "source": "tmpfs" }),
    ];
    mounts.extend(directories().iter().map(|path| {
        json!({ "destination": path, "source": path, "type": "bind", "options": ["rbind", "ro"] })
    }));
    let line: Vec<_> = [env!("CARGO_BIN_EXE_wasi-uring")].iter().chain(args).collect();
    let namespaces = ["mount", "pid", "ipc", "network"].map(|kind| json!({ "type": kind }));
    let config = json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": line,
            "cwd": "/",
            "noNewPrivileges": true,
            "capabilities": {
                "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES,
            },
        },
        "root": { "path": "rootfs" },
        "mounts": mounts,
        "linux": { "namespaces": namespaces, "seccomp": for_container(profile) },
    });
    fs::write(bundle.join("config.json"), config.to_string()).unwrap();
    // Whatever version of cgroups this machine has, crun sees the one that it knows, and makes none.
    let script = r#"[ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ] || mount -t cgroup2 none /sys/fs/cgroup || exit
        exec "$0" "$@""#;
    let mut command = process::Command::new("unshare");
    command.args(["-m", "sh", "-c", script, "crun", "--cgroup-manager=disabled", "--root"]);
    command.arg(bundle.join("crun")).args(["run", "--bundle", arg(&bundle), &name]);
    let ended = end(command);
    fs::remove_dir_all(&bundle).unwrap();
    ended
}

/// The default as `doctor --seccomp` extends it.
fn extended_profile() -> Value {
    let ended = run(&["doctor", "--seccomp", DEFAULT]).with_code(0);
    serde_json::from_str(&ended.stdout).expect("a profile")
}

/// Kills: an errno that says of another cause.
#[test]
fn a_containers_default_profile_forbids_the_ring_and_the_remedy_is_named() {
    let mut profile = default_profile();
    // Podman's answer to what it does not know, and Docker's.
    for (name, errno) in [("enosys", libc::ENOSYS), ("eperm", libc::EPERM)] {
        profile["defaultErrnoRet"] = errno.into();
        let args = ["run", "--backend", "uring", CYCLE, "pair", "10"];
        let ended = contained(name, &profile, &args).with_code(2);
        ended.says(&[
            "refused by a seccomp filter",
            "allow io_uring_setup, io_uring_enter and io_uring_register",
            "doctor --seccomp",
        ]);
        let ended = contained(name, &profile, &["run", "--stats", CYCLE, "pair", "10"]);
        assert_eq!(ended.with_code(0).stats()["backend"], "stock");
        let ended = contained(name, &profile, &["doctor"]).with_code(1);
        assert!(ended.stdout.contains("MISSING"), "{ended}");
    }
}

#[test]
fn what_doctor_makes_of_it_allows_all_that_the_command_does() {
    let profile = extended_profile();
    for (name, guest) in [("p2", CYCLE), ("p3", CYCLE_3)] {
        for runtime in ["per-core", "multi-thread", "tokio-uring"] {
            let options = ["--backend", "uring", "--guests", "4", "--runtime", runtime, "--stats"];
            let args = [&["run"], &options[..], &[guest, "pair", "100"]].concat();
            let ended = contained(name, &profile, &args).with_code(0);
            let stats = ended.stats();
            assert_eq!(stats["backend"], "uring", "{ended}");
            assert!(stats["datagrams_received"].as_u64() >= Some(800), "{ended}");
        }
    }
    let ended = contained("demo", &profile, &["demo", "--guests", "16", "--rounds", "1"]);
    assert!(ended.with_code(0).stdout.contains("times as fast"));
    // Grace periods (membarrier) included.
    let ended = contained("doctor", &profile, &["doctor", "--json"]).with_code(0);
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let recycling = checks.iter().find(|check| check["name"] == "recycling of closed sockets");
    let found = recycling.unwrap()["found"].as_str().unwrap();
    assert!(found.starts_with("IPv4: works"), "{ended}");
}

#[test]
fn what_is_no_profile_is_exit_code_2() {
    for (name, text) in [("no_json.json", "seccomp"), ("no_profile.json", r#"{"syscalls":[]}"#)] {
        let file = tool::file(name, text);
        let ended = run(&["doctor", "--seccomp", arg(&file)]).with_code(2);
        ended.says(&[name, "is no seccomp profile"]);
    }
    run(&["doctor", "--seccomp", "/nowhere/default.json"])
        .with_code(2)
        .says(&["/nowhere/default.json"]);
    run(&["doctor", "--seccomp", DEFAULT, "--json"]).with_code(2);
}
