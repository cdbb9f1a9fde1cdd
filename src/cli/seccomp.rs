//! `wasi-uring doctor --seccomp`: a container runtime's own profile, with what rings need beside it.

use std::path::Path;
use std::process::ExitCode;

use serde_json::{Value, json};
use wasmtime::error::Context;

use crate::terminal::{Failure, print};

/// System calls of rings that no container runtime allows by default. (They all allow the others:
/// eventfd2, membarrier, what Wasmtime and tokio need.)
const NEEDED: [&str; 3] = ["io_uring_setup", "io_uring_enter", "io_uring_register"];

/// Prints the profile in this file with those allowed.
pub(crate) fn profile(default: &Path) -> Result<ExitCode, Failure> {
    let file = default.display();
    let text = std::fs::read_to_string(default).with_context(|| format!("cannot read {file}"));
    let text = text.map_err(Failure::usage)?;
    let profile = serde_json::from_str(&text).ok().and_then(with_rings);
    let profile = profile.ok_or_else(|| {
        let error =
            "is no seccomp profile of a container runtime: JSON with defaultAction and syscalls";
        Failure::usage(wasmtime::format_err!("{file} {error}"))
    })?;
    print(format_args!("{profile:#}"));
    Ok(ExitCode::SUCCESS)
}

/// `None` if it is no profile.
fn with_rings(mut profile: Value) -> Option<Value> {
    profile.get("defaultAction")?.as_str()?;
    let rules = profile.get_mut("syscalls")?.as_array_mut()?;
    // A rule that forbids one of them by name would stand against ours.
    for rule in &mut *rules {
        let names = rule.get_mut("names")?.as_array_mut()?;
        names.retain(|name| name.as_str().is_none_or(|name| !NEEDED.contains(&name)));
    }
    rules.retain(|rule| rule["names"].as_array().is_some_and(|names| !names.is_empty()));
    rules.push(json!({ "names": NEEDED, "action": "SCMP_ACT_ALLOW" }));
    Some(profile)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_gets_the_rings_calls_and_nothing_else() {
        let ours = json!({ "names": NEEDED, "action": "SCMP_ACT_ALLOW" });
        let others = json!({ "names": ["bind", "read"], "action": "SCMP_ACT_ALLOW" });
        let forbids = |names: &[&str]| json!({ "names": names, "action": "SCMP_ACT_ERRNO" });
        let given = json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "archMap": [1],
            "syscalls": [others, forbids(&["io_uring_enter", "bpf"]), forbids(&["io_uring_setup"])],
        });
        let expected = json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "archMap": [1],
            "syscalls": [others, forbids(&["bpf"]), ours],
        });
        assert_eq!(with_rings(given), Some(expected));
    }
}
