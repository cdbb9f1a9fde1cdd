//! The hosts that are Cargo examples, and an adapter over the bindings: each example's core is called as
//! its `main` does.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/rig3.rs"]
mod rig;

#[allow(dead_code, reason = "main, and what only it calls")]
mod fallback;
#[allow(dead_code, reason = "main, and what only it calls")]
#[path = "generic_store/main.rs"]
mod generic_store;
#[allow(dead_code, reason = "main, and what only it calls")]
mod multi_thread;
#[allow(dead_code, reason = "main, and what only it calls")]
mod one_line;
#[allow(dead_code, reason = "main, and what only it calls")]
mod otel;
#[allow(dead_code, reason = "main, and what only it calls")]
mod tenants;

mod guests;
mod limit;
mod older_wit;
mod options;
mod policies;
