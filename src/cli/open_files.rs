//! The limit of open files, which bounds wasmtime-wasi's sockets and the ring's table.

use crate::terminal::say;

/// What a process has open beside sockets.
pub(crate) const SPARE: u64 = 64;

/// As many of the sockets wanted as wasmtime-wasi can have, each of which is a file; says so if they
/// are fewer.
pub(crate) fn within_limit(wanted: usize) -> usize {
    let limit = raise_limit();
    let most = usize::try_from(limit.saturating_sub(SPARE)).unwrap_or(usize::MAX).max(2);
    if wanted > most {
        say(format_args!(
            "only {most} sockets instead of {wanted}: the open-files limit is {limit}, and each of \
             wasmtime-wasi's is a file"
        ));
    }
    wanted.min(most)
}

/// Raises the soft limit to the hard one, since a ring's table may not be larger; returns the limit
/// then.
pub(crate) fn raise_limit() -> u64 {
    rlimit::increase_nofile_limit(u64::MAX).unwrap_or_else(|error| {
        tracing::debug!(%error, "the open-files limit cannot be raised");
        rlimit::Resource::NOFILE.get_soft().unwrap_or(1024)
    })
}
