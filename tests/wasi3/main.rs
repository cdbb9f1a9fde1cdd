//! UDP of WASI 0.3: what only it has (implicit binds, several calls at a time, calls cancelled), on
//! both backends. What it does as 0.2 does is in `tests/both`.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/rig3.rs"]
mod rig;

mod concurrent;
mod datagrams;
mod fairness;
mod life;
mod linkers;
mod networks;
mod random;
