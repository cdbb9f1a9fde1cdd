//! UDP of WASI 0.2: what only it has (binds of two calls, streams, batches, pollables), on both
//! backends. What it does as 0.3 does is in `tests/both`.

#[path = "../common/mod.rs"]
mod common;

mod coalesced;
mod connected;
mod datagrams;
mod life;
mod networks;
mod policy;
mod poll;
mod random;
