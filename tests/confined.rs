//! A cgroup whose BPF program gives every new socket something: a device that it is bound to, a mark or a
//! priority. Recycled sockets are not new. The test runs once more in such a cgroup, by itself.

#![expect(unsafe_code, reason = "bpf(2)")]

mod common;

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use std::{env, io, process, thread};

use common::network::in_a_network;
use common::{BOUND, LOOPBACK, LOOPBACK_6, Rig, block_on, eventually, uring};
use wasi_uring::doctor;

/// Set in a process that is in such a cgroup: what its sockets are given.
const GIVEN: &str = "WASI_URING_TEST_GIVEN";

/// Fields of `struct bpf_sock` (`linux/bpf.h`), in bytes from its begin.
const BOUND_DEV_IF: i16 = 0;
const MARK: i16 = 16;
const PRIORITY: i16 = 20;

/// The same in every network.
const LO: i32 = 1;

/// Calls bpf(2). `attributes` has the layout of the command's part of `union bpf_attr`.
fn bpf<T>(command: libc::c_int, attributes: &T) -> i32 {
    let attributes_len = size_of::<T>();
    // SAFETY: the kernel reads so many bytes of the attributes, and what they point to, which is the caller's
    // and lives on.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, attributes_len) };
    assert!(result >= 0, "bpf(2), command {command}: {}", io::Error::last_os_error());
    i32::try_from(result).unwrap()
}

/// A program for new sockets that writes a value to a field.
fn load(field: i16, value: i32) -> OwnedFd {
    #[repr(C)]
    struct Instruction {
        code: u8,
        /// Destination, and source in the upper half.
        registers: u8,
        offset: i16,
        immediate: i32,
    }
    #[repr(C)]
    struct Load {
        program_type: u32,
        instructions: u32,
        start: *const Instruction,
        license: *const libc::c_char,
        log: [u64; 2],
        version_and_flags: [u32; 2],
        name: [u8; 16],
        device: u32,
        attach_type: u32,
    }
    let instruction =
        |code, registers, offset, immediate| Instruction { code, registers, offset, immediate };
    let program = [
        instruction(0xb7, 0x02, 0, value), // r2 = value
        instruction(0x63, 0x21, field, 0), // *(u32 *)(r1 + field) = r2
        instruction(0xb7, 0x00, 0, 1),     // r0 = 1: let it be made
        instruction(0x95, 0, 0, 0),        // exit
    ];
    let license = CString::from(c"GPL");
    let fd = bpf(
        5, // BPF_PROG_LOAD
        &Load {
            program_type: 9, // BPF_PROG_TYPE_CGROUP_SOCK
            instructions: 4,
            start: program.as_ptr(),
            license: license.as_ptr(),
            log: [0; 2],
            version_and_flags: [0; 2],
            name: [0; 16],
            device: 0,
            attach_type: 2, // BPF_CGROUP_INET_SOCK_CREATE
        },
    );
    // SAFETY: bpf(2) has just made this descriptor, and nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A cgroup with such a program.
struct Cgroup(PathBuf);

impl Cgroup {
    fn with_program(name: &str, field: i16, value: i32) -> Self {
        #[repr(C)]
        struct Attach {
            target: i32,
            program: i32,
            kind: u32,
            flags: u32,
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mount = mounts.lines().find_map(|line| {
            let mut words = line.split(' ').skip(1);
            words.next().filter(|_| words.next() == Some("cgroup2"))
        });
        let mount = mount.expect("these tests make cgroups (version 2), which are mounted nowhere");
        let path = Path::new(mount).join(format!("wasi-uring-{}-{name}", process::id()));
        fs::create_dir(&path).expect("these tests make cgroups, for which they are root");
        let cgroup = Self(path);
        let (program, directory) = (load(field, value), File::open(&cgroup.0).unwrap());
        let (target, program) = (directory.as_raw_fd(), program.as_raw_fd());
        // BPF_PROG_ATTACH, beside what the cgroups above have (BPF_F_ALLOW_MULTI).
        bpf(8, &Attach { target, program, kind: 2, flags: 2 });
        cgroup
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // The last process of it may be ending.
        let deadline = Instant::now() + BOUND;
        while fs::remove_dir(&self.0).is_err() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Bound sockets of this network, as ss(8) shows them.
fn shown() -> Vec<String> {
    let output = Command::new("ss").arg("-Hunap").output().expect("iproute2 is installed");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

/// What happens in the cgroup.
fn confined(given: &str) {
    in_a_network(65_536, || {
        let check = doctor::examine().into_iter().find(|check| check.name.contains("recycling"));
        let found = check.unwrap().found;
        let reason = "off, new sockets are given a device, a mark or a priority here";
        assert_eq!(found.matches(reason).count(), 2, "{found}");

        let uring = uring();
        block_on(async {
            let mut rig = Rig::on_ring(&uring).await;
            // Some grace periods long.
            for _ in 0..100 {
                for any in [LOOPBACK, LOOPBACK_6] {
                    for _ in 0..8 {
                        let (socket, _) = rig.bound(any).await;
                        rig.drop_socket(socket).await;
                    }
                }
                eventually("they are closed", || uring.stats().sockets_open == 0).await;
            }
            for _ in 0..8 {
                rig.bound(LOOPBACK).await;
                rig.bound(LOOPBACK_6).await;
            }
            let sockets = shown();
            assert_eq!(sockets.len(), 16, "{sockets:#?}");
            if given == "device" {
                for socket in sockets {
                    assert!(socket.contains("%lo:"), "free of its device: {socket}");
                }
            }
        });
        assert_eq!(uring.stats().sockets_recycled, 0);
    });
}

/// Kills: a self-test that does not look; one that looks at recycled sockets alone.
#[test]
fn sockets_are_not_recycled_where_a_program_confines_new_ones() {
    if let Ok(given) = env::var(GIVEN) {
        return confined(&given);
    }
    for (given, field, value) in
        [("device", BOUND_DEV_IF, LO), ("mark", MARK, 7), ("priority", PRIORITY, 5)]
    {
        let cgroup = Cgroup::with_program(given, field, value);
        let this = env::current_exe().unwrap();
        let name = "sockets_are_not_recycled_where_a_program_confines_new_ones";
        let mut command = Command::new("sh");
        command.args(["-c", r#"echo $$ >"$0/cgroup.procs" && exec "$@""#]).arg(&cgroup.0);
        command.arg(this).args(["--exact", name, "--nocapture"]).env(GIVEN, given);
        let output = command.output().unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        let is_good = output.status.success() && stdout.contains("1 passed");
        assert!(is_good, "{given}: {stdout}\n{}", String::from_utf8_lossy(&output.stderr));
    }
}
