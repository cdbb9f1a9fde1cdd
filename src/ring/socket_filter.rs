//! A filter for a ring's SOCKET entries (`IORING_REGISTER_BPF_FILTER`, from Linux 7.0 on): the kernel makes UDP
//! sockets and no others for it. It runs on the kernel's copy of an entry, so no thread can change what
//! it has seen.

use std::io;
use std::os::fd::AsRawFd;

use io_uring::{IoUring, opcode};

/// `IORING_REGISTER_BPF_FILTER`
const REGISTER: libc::c_ulong = 37;

/// `IO_URING_BPF_CMD_FILTER`
const COMMAND: u16 = 1;

/// `IO_URING_BPF_FILTER_SZ_STRICT`: what the filter reads has the size that it was written for.
const STRICT: u32 = 2;

/// `struct io_uring_bpf`, and in it `struct io_uring_bpf_filter` (`linux/io_uring/bpf_filter.h`).
#[repr(C)]
struct Registration {
    command: u16,
    command_flags: u16,
    reserved: u32,
    opcode: u32,
    flags: u32,
    filter_len: u32,
    data_bytes: u8,
    reserved_2: [u8; 3],
    filter: u64,
    reserved_3: [u64; 5],
}

const _: () = assert!(size_of::<Registration>() == 72, "as the kernel has it");

/// What a filter reads of a SOCKET entry, in bytes from the begin of `struct io_uring_bpf_ctx`.
const FAMILY: u32 = 16;
const TYPE: u32 = 20;
const PROTOCOL: u32 = 24;
const DATA_BYTES: u8 = 12;

/// The bits of a type without its flags (`SOCK_TYPE_MASK`).
const TYPE_MASK: u32 = 0xf;

const ALLOWED: u32 = 1;
const REFUSED: u32 = 0;

fn load(at: u32) -> libc::sock_filter {
    statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at)
}

fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: u16::try_from(code).expect("codes are small"), jt: 0, jf: 0, k }
}

/// Skips so many instructions if what was loaded is this, and so many if not.
fn skip(value: libc::c_int, if_equal: u8, if_not: u8) -> libc::sock_filter {
    let jump = statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value.cast_unsigned());
    libc::sock_filter { jt: if_equal, jf: if_not, ..jump }
}

/// Has the kernel refuse every SOCKET entry of a ring but those of UDP, with `EACCES`.
#[expect(unsafe_code, reason = "io_uring_register(2), which io-uring has no such call of")]
pub(super) fn register(io: &IoUring) -> io::Result<()> {
    let program = [
        load(FAMILY),
        skip(libc::AF_INET, 1, 0),
        skip(libc::AF_INET6, 0, 6),
        load(TYPE),
        statement(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, TYPE_MASK),
        skip(libc::SOCK_DGRAM, 0, 3),
        load(PROTOCOL),
        skip(0, 0, 1),
        statement(libc::BPF_RET | libc::BPF_K, ALLOWED),
        statement(libc::BPF_RET | libc::BPF_K, REFUSED),
    ];
    let mut registration = Registration {
        command: COMMAND,
        command_flags: 0,
        reserved: 0,
        opcode: opcode::Socket::CODE.into(),
        flags: STRICT,
        filter_len: u32::try_from(program.len()).expect("10"),
        data_bytes: DATA_BYTES,
        reserved_2: [0; 3],
        filter: program.as_ptr().expose_provenance() as u64,
        reserved_3: [0; 5],
    };
    // SAFETY: the kernel reads the registration and the program, which both outlive the call, and writes to
    // the registration's own fields. (`the_kernel_refuses_operations_flags_and_registrations_...` is the
    // test, where the kernel has it.)
    let result = unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            io.as_raw_fd(),
            REGISTER,
            &raw mut registration,
            1_u32,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
