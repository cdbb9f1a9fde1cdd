//! UDP of WASI 0.3: each function on both backends, several calls at a time, and calls cancelled.

mod common;
#[path = "wasi3/rig.rs"]
mod rig;

#[path = "wasi3/concurrent.rs"]
mod concurrent;
#[path = "wasi3/datagrams.rs"]
mod datagrams;
#[path = "wasi3/life.rs"]
mod life;
#[path = "wasi3/linkers.rs"]
mod linkers;
#[path = "wasi3/networks.rs"]
mod networks;
#[path = "wasi3/random.rs"]
mod random;
#[path = "wasi3/turns.rs"]
mod turns;
