//! What guests of WASI 0.2 and of WASI 0.3 do alike: each scenario is written once, over
//! [`guest::Guest`], and runs in both versions, on both backends. What only one version has is in
//! `tests/wasi2` and `tests/wasi3`.

#[path = "../common/mod.rs"]
mod common;
#[macro_use]
mod guest;
#[path = "../common/rig3.rs"]
mod rig;

mod asking;
mod counters;
mod datagrams;
mod deferred;
mod life;
mod options;
mod policy;
