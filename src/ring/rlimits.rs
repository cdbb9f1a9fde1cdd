//! The process's limits, and whether rings are charged to that of locked memory.

/// A soft limit of getrlimit(2).
#[expect(unsafe_code, reason = "getrlimit(2)")]
pub(crate) fn soft_limit(resource: libc::__rlimit_resource_t) -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a local of the type that getrlimit(2) writes.
    unsafe { libc::getrlimit(resource, &raw mut limit) };
    limit.rlim_cur
}

/// Words of `struct io_uring_params`.
const PARAMS_WORDS: usize = 30;

/// Whether rings of this process are charged to `RLIMIT_MEMLOCK`: some kernels do that, others do not, and
/// none does for a process with `CAP_IPC_LOCK`. `None` if it could not be tried.
///
/// A child tries to make a ring under a limit of 0, because limits are the whole process's. The host does
/// not hear of it: it ends without a signal, and only a wait that asks for such children sees it.
pub(crate) fn are_rings_charged_to_memlock() -> Option<bool> {
    const CHARGED: libc::c_int = 1;
    const NOT_CHARGED: libc::c_int = 2;
    let child = fork_unheard();
    if child == 0 {
        // Only system calls from here on: another thread may have held any lock.
        exit(match setup_without_memlock() {
            Ok(()) => NOT_CHARGED,
            Err(libc::ENOMEM) => CHARGED,
            Err(_) => 0,
        });
    }
    let status = wait_for(child)?;
    match libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status))? {
        CHARGED => Some(true),
        NOT_CHARGED => Some(false),
        _ => None,
    }
}

/// fork(2) without SIGCHLD; negative if that is not to be had.
#[expect(unsafe_code, reason = "clone(2)")]
fn fork_unheard() -> libc::pid_t {
    // SAFETY: without flags the child has a copy of this process's memory, its stack included, so
    // nothing of the parent's changes; and it has this thread alone, so the caller makes system calls
    // only (`rings_are_charged_to_memlock_or_not_and_the_process_is_as_before`).
    let child = unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) };
    libc::pid_t::try_from(child).unwrap_or(-1)
}

/// Makes a ring while no memory may be locked.
#[expect(unsafe_code, reason = "setrlimit(2) and io_uring_setup(2)")]
fn setup_without_memlock() -> Result<(), libc::c_int> {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a local of the type that setrlimit(2) reads.
    if unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const none) } != 0 {
        return Err(libc::EPERM);
    }
    let mut params = [0_u32; PARAMS_WORDS];
    // SAFETY: the kernel reads and writes as many words as there are.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
    if ring >= 0 {
        return Ok(());
    }
    Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
}

#[expect(unsafe_code, reason = "_exit(2)")]
fn exit(status: libc::c_int) -> ! {
    // SAFETY: _exit(2) runs no handlers of the parent's.
    unsafe { libc::_exit(status) }
}

#[expect(unsafe_code, reason = "waitpid(2)")]
fn wait_for(child: libc::pid_t) -> Option<libc::c_int> {
    if child < 0 {
        return None;
    }
    let mut status = 0;
    loop {
        // SAFETY: the pointer is to a local of the type that waitpid(2) writes.
        let waited = unsafe { libc::waitpid(child, &raw mut status, libc::__WALL) };
        if waited == child {
            return Some(status);
        }
        if std::io::Error::last_os_error().kind() != std::io::ErrorKind::Interrupted {
            return None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_are_charged_to_memlock_or_not_and_the_process_is_as_before() {
        let before = soft_limit(libc::RLIMIT_MEMLOCK);
        let charged = are_rings_charged_to_memlock();
        assert!(charged.is_some());
        assert_eq!(are_rings_charged_to_memlock(), charged);
        assert_eq!(soft_limit(libc::RLIMIT_MEMLOCK), before);
    }
}
