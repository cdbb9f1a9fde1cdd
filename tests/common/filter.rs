//! Threads in which a system call is forbidden, by a seccomp filter.

use std::collections::BTreeMap;
use std::{env, thread};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

/// Runs something in a thread in which a system call always fails with this errno. Processes
/// started there inherit the filter; the other tests' threads do not.
pub(crate) fn with_filter<T: Send>(call: i64, errno: i32, what: impl FnOnce() -> T + Send) -> T {
    let filter = SeccompFilter::new(
        BTreeMap::from([(call, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(errno.unsigned_abs()),
        env::consts::ARCH.try_into().expect("an architecture seccomp knows"),
    );
    let program: BpfProgram = filter.and_then(TryInto::try_into).expect("a filter of one rule");
    thread::scope(|scope| {
        let filtered = scope.spawn(|| {
            apply_filter(&program).expect("a filter can always be added");
            what()
        });
        filtered.join().expect("the test's own part")
    })
}
