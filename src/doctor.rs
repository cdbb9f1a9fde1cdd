//! What this kernel and these limits allow, requirement by requirement.
//!
//! [`Uring::builder().build()`](crate::UringBuilder::build) stops at the first thing it misses;
//! [`examine`] looks at everything, for a person or a monitoring system to read.

use io_uring::Probe;

use crate::error::KERNEL_MIN;
use crate::error::SetupError;
use crate::limits::{CACHED_SOCKETS_DEFAULT, SOCKETS_DEFAULT};
use crate::ring::kernel_defaults::Defaults;
use crate::ring::op::OPERATIONS;
use crate::ring::recycle::self_test::{self, FamilySupport, Support};
use crate::ring::setup;
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

/// Looks at everything a ring needs. The last check builds one.
#[must_use]
pub fn examine() -> Vec<Check> {
    let mut checks = vec![kernel(), sysctl(), seccomp()];
    checks.extend(operations());
    checks.extend([nofile(), memlock(), families(), recycling(), ring()]);
    checks
}

fn kernel() -> Check {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    if version(release) >= version(KERNEL_MIN) {
        return Check::good("kernel", format!("Linux {release}"));
    }
    let remedy = format!("use Linux {KERNEL_MIN} or newer");
    Check::bad("kernel", Verdict::Missing, format!("Linux {release}"), remedy)
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
    let io = match setup::set_up() {
        Ok(io) => io,
        Err(error) => return vec![missing("io_uring_setup", &error)],
    };
    let mut checks = vec![Check::good("io_uring_setup", "works")];
    let mut supported = Probe::new();
    if let Err(errno) = io.submitter().register_probe(&mut supported) {
        let error = SetupError::Io { step: "probing io_uring's operations", errno };
        checks.push(missing("io_uring_register", &error));
        return checks;
    }
    checks.extend(OPERATIONS.iter().map(|(name, code, since)| {
        if supported.is_supported(*code) {
            return Check::good(name, "supported");
        }
        Check::bad(name, Verdict::Missing, "unknown", format!("use Linux {since} or newer"))
    }));
    checks.push(match setup::restrict(&io) {
        Ok(true) => {
            Check::good("restrictions", "nothing but these operations, and no sockets but UDP's")
        }
        Ok(false) => Check::good(
            "restrictions",
            "nothing but these operations; from Linux 7.0 on no sockets but UDP's",
        ),
        Err(error) => missing("restrictions", &error),
    });
    checks
}

fn nofile() -> Check {
    let name = "RLIMIT_NOFILE";
    let limit = setup::soft_limit(libc::RLIMIT_NOFILE);
    let found = format!("{limit}: tables of up to {limit} sockets, cached ones included");
    if limit >= u64::from(SOCKETS_DEFAULT) {
        return Check::good(name, found);
    }
    let remedy = format!(
        "raise it (`ulimit -n {SOCKETS_DEFAULT}`, LimitNOFILE=), or build rings with \
         .sockets({limit})"
    );
    Check::bad(name, Verdict::Limited, found, remedy)
}

/// Below this many bytes a ring may not be had without `CAP_IPC_LOCK`.
const MEMLOCK_BYTES_SAFE: u64 = 1 << 20;

fn memlock() -> Check {
    let name = "RLIMIT_MEMLOCK";
    match setup::soft_limit(libc::RLIMIT_MEMLOCK) {
        libc::RLIM_INFINITY => Check::good(name, "unlimited"),
        limit if limit >= MEMLOCK_BYTES_SAFE => Check::good(name, format!("{limit} bytes")),
        limit => Check::bad(
            name,
            Verdict::Limited,
            format!("{limit} bytes, which a ring exceeds without CAP_IPC_LOCK"),
            "raise it (`ulimit -l`, LimitMEMLOCK=)",
        ),
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
    let limit = setup::soft_limit(libc::RLIMIT_NOFILE);
    if limit <= u64::from(SOCKETS_DEFAULT) {
        let found =
            format!("{found}; but a table of {SOCKETS_DEFAULT} leaves no room for cached ones");
        let remedy = format!("raise RLIMIT_NOFILE to {}", SOCKETS_DEFAULT + CACHED_SOCKETS_DEFAULT);
        return Check::bad(name, Verdict::Limited, found, remedy);
    }
    if !is_limited {
        return Check::good(name, found);
    }
    let remedy = "sockets of the family are made and closed anew: correct, but slower";
    Check::bad(name, Verdict::Limited, found, remedy)
}

fn ring() -> Check {
    let name = "a ring with its table and buffers";
    let sockets = u32::try_from(setup::soft_limit(libc::RLIMIT_NOFILE)).unwrap_or(u32::MAX);
    let sockets = sockets.min(SOCKETS_DEFAULT);
    match Uring::builder().sockets(sockets).build() {
        Ok(uring) => {
            let addresses = if uring.driver().has_names() {
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
        assert!(checks.len() > OPERATIONS.len());
        for check in checks {
            assert_ne!(check.verdict, Verdict::Missing, "{check:?}");
        }
    }
}
