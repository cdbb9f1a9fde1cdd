//! What this kernel and these limits allow, requirement by requirement.
//!
//! [`Uring::builder().build()`](crate::UringBuilder::build) stops at the first thing it misses;
//! [`examine`] looks at everything, for a person or a monitoring system to read.

use crate::error::KERNEL_MIN;
use crate::error::SetupError;
use crate::limits::{CACHED_SOCKETS_DEFAULT, SOCKETS_DEFAULT};
use crate::ring::kernel_defaults::Defaults;
use crate::ring::recycle::self_test::{self, FamilySupport, Support};
use crate::ring::rlimits::{are_rings_charged_to_memlock, soft_limit};
use crate::ring::setup::{self, ThrowAway};
use crate::ring::trials::{TRIALS, Tried};
use crate::uring::Uring;

/// One requirement and how it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// Whether sockets on the ring work with it.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to change, unless all is well.
    pub remedy: Option<String>,
}

/// How a [`Check`] came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it should be.
    Good,
    /// It works, within limits that a larger server will meet.
    Limited,
    /// Sockets on the ring do not work.
    Missing,
}

impl Check {
    fn good(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Good, found: found.into(), remedy: None }
    }

    fn bad(
        name: &'static str,
        verdict: Verdict,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { name, verdict, found: found.into(), remedy: Some(remedy.into()) }
    }
}

/// Looks at everything a ring needs: tries each thing on a ring that is thrown away. The last check
/// builds one as [`Uring::builder`] has it by default. What a larger limit would be worth is not looked at
/// where sockets on the ring do not work.
///
/// Limits are the whole process's, so a child tries one of them: the process is duplicated for a moment, as
/// by fork(2), which takes the longer the more memory it has.
#[must_use]
pub fn examine() -> Vec<Check> {
    let mut checks = vec![kernel(), sysctl(), seccomp()];
    checks.extend(operations());
    if checks.iter().all(|check| check.verdict != Verdict::Missing) {
        checks.extend([nofile(), memlock(), families(), recycling(), ring()]);
    }
    checks
}

/// A note: what this kernel has is tried.
fn kernel() -> Check {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let found = format!("Linux {}", release.trim());
    if version(&release) >= version(KERNEL_MIN) {
        return Check::good("kernel", found);
    }
    let remedy = format!("use Linux {KERNEL_MIN} or newer");
    Check::bad("kernel", Verdict::Limited, found, remedy)
}

/// Major and minor version of a kernel release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn sysctl() -> Check {
    let name = "kernel.io_uring_disabled";
    match setup::io_uring_disabled() {
        Some(0) => Check::good(name, "0: allowed"),
        None => Check::good(name, "no such sysctl: allowed"),
        Some(1) => Check::bad(
            name,
            Verdict::Limited,
            "1: allowed to CAP_SYS_ADMIN and the group in kernel.io_uring_group",
            "set it to 0, or add this process to that group",
        ),
        Some(value) => {
            Check::bad(name, Verdict::Missing, format!("{value}: forbidden"), "set it to 0")
        }
    }
}

fn seccomp() -> Check {
    if setup::seccomp_is_filtering() {
        return Check::bad(
            "seccomp",
            Verdict::Limited,
            "a filter is in force",
            "if io_uring_setup fails below, allow io_uring_setup, io_uring_enter and \
             io_uring_register in the profile",
        );
    }
    Check::good("seccomp", "no filter")
}

fn operations() -> Vec<Check> {
    let ring = "a ring with its buffers";
    let mut thrown_away = match ThrowAway::build() {
        Ok(thrown_away) => thrown_away,
        Err(error) => return vec![missing(ring, &error)],
    };
    let restricted = if thrown_away.is_udp_only {
        "nothing but these operations, and no sockets but UDP's"
    } else {
        "nothing but these operations; from Linux 7.0 on no sockets but UDP's"
    };
    let mut checks = vec![Check::good(ring, "works"), Check::good("restrictions", restricted)];
    checks.extend(TRIALS.iter().map(|trial| match thrown_away.try_out(trial) {
        Ok(Tried::NoSocket) => Check::good(trial.name, "no IPv4 socket to try it on"),
        Ok(_) => Check::good(trial.name, "works"),
        Err(SetupError::MissingOperation { since, .. }) => Check::bad(
            trial.name,
            Verdict::Missing,
            format!("this kernel does not have it: it came with Linux {since}"),
            format!("use Linux {KERNEL_MIN} or newer"),
        ),
        Err(error) => missing(trial.name, &error),
    }));
    checks
}

/// The largest table that a ring has by default.
const SLOTS_DEFAULT: u32 = SOCKETS_DEFAULT + CACHED_SOCKETS_DEFAULT;

fn nofile() -> Check {
    let name = "RLIMIT_NOFILE";
    let limit = soft_limit(libc::RLIMIT_NOFILE);
    let found = format!("{limit}: tables of up to {limit} sockets, cached ones included");
    if limit >= u64::from(SLOTS_DEFAULT) {
        return Check::good(name, found);
    }
    let remedy = format!(
        "raise it (`ulimit -n {SLOTS_DEFAULT}`, LimitNOFILE=), or build rings with fewer .sockets(..)"
    );
    Check::bad(name, Verdict::Limited, found, remedy)
}

/// Below this many bytes a ring may not be had where it is charged.
const MEMLOCK_BYTES_SAFE: u64 = 1 << 20;

fn memlock() -> Check {
    let name = "RLIMIT_MEMLOCK";
    let limit = match soft_limit(libc::RLIMIT_MEMLOCK) {
        libc::RLIM_INFINITY => "unlimited".to_owned(),
        limit => format!("{limit} bytes"),
    };
    match are_rings_charged_to_memlock() {
        Some(false) => Check::good(name, format!("{limit}; rings are not charged to it here")),
        None => Check::good(name, limit),
        Some(true) => {
            let found = format!("{limit}, which rings are charged to here");
            if soft_limit(libc::RLIMIT_MEMLOCK) >= MEMLOCK_BYTES_SAFE {
                return Check::good(name, found);
            }
            let remedy = "raise it (`ulimit -l`, LimitMEMLOCK=) or grant CAP_IPC_LOCK";
            Check::bad(name, Verdict::Limited, found, remedy)
        }
    }
}

fn families() -> Check {
    match Defaults::query() {
        Ok(Defaults { v4: Some(_), v6: Some(_) }) => {
            Check::good("address families", "IPv4 and IPv6")
        }
        Ok(Defaults { v4, v6 }) => {
            let found = match (v4, v6) {
                (Some(_), _) => "IPv4 only",
                (None, Some(_)) => "IPv6 only",
                (None, None) => "neither IPv4 nor IPv6",
            };
            let remedy = "guests get not-supported for the missing family; enable it in the kernel";
            Check::bad("address families", Verdict::Limited, found, remedy)
        }
        Err(error) => missing("address families", &error),
    }
}

fn recycling() -> Check {
    let name = "recycling of closed sockets";
    let Support { v4, v6 } = self_test::support();
    let is_limited = [&v4, &v6].iter().any(|support| {
        matches!(support, FamilySupport::Unsupported(_) | FamilySupport::Untested(_))
    });
    let found = [("IPv4", v4), ("IPv6", v6)].map(|(family, support)| match support {
        FamilySupport::Works { also_connected: true } => format!("{family}: works"),
        FamilySupport::Works { also_connected: false } => {
            format!("{family}: works, unless connected")
        }
        FamilySupport::Unsupported(reason) => format!("{family}: off, {reason}"),
        FamilySupport::Untested(reason) => format!("{family}: off for now, {reason}"),
        FamilySupport::NoFamily => format!("{family}: no such family"),
    });
    let found = found.join("; ");
    if soft_limit(libc::RLIMIT_NOFILE) <= u64::from(SOCKETS_DEFAULT) {
        let found =
            format!("{found}; but a table of {SOCKETS_DEFAULT} leaves no room for cached ones");
        return Check::bad(name, Verdict::Limited, found, "raise RLIMIT_NOFILE, as above");
    }
    if !is_limited {
        return Check::good(name, found);
    }
    let remedy = "sockets of the family are made and closed anew: correct, but slower";
    Check::bad(name, Verdict::Limited, found, remedy)
}

fn ring() -> Check {
    let name = "a ring with its table and buffers";
    let sockets = u32::try_from(soft_limit(libc::RLIMIT_NOFILE)).unwrap_or(u32::MAX);
    let sockets = sockets.min(SOCKETS_DEFAULT);
    match Uring::builder().sockets(sockets).build() {
        Ok(uring) => {
            let addresses = if uring.pool().first().has_names() {
                "sockets are asked for their addresses on it"
            } else {
                "sockets are asked for their addresses by a descriptor (before Linux 6.19)"
            };
            Check::good(name, format!("built, with {sockets} slots; {addresses}"))
        }
        Err(error) => missing(name, &error),
    }
}

/// A set-up error as a check: what follows its colon is the remedy.
fn missing(name: &'static str, error: &SetupError) -> Check {
    let text = error.to_string();
    let (found, remedy) = text.split_once(": ").unwrap_or((&text, "see the errno"));
    Check::bad(name, Verdict::Missing, found, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_compare_by_number() {
        assert!(version("6.9.1") < version(KERNEL_MIN));
        assert!(version("6.11-rc1") >= version(KERNEL_MIN));
        assert!(version("10.0.0-custom") >= version(KERNEL_MIN));
        assert!(version("nonsense") < version(KERNEL_MIN));
    }

    #[test]
    fn this_machine_passes_its_own_examination() {
        let checks = examine();
        assert!(checks.len() > TRIALS.len());
        for check in checks {
            assert_ne!(check.verdict, Verdict::Missing, "{check:?}");
        }
    }
}
