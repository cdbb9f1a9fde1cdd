//! Which address checks a policy sees.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use wasi_uring::SocketAddrUse;

use super::Setup;

/// The addresses that a policy was called with, in order.
pub type Seen = Arc<Mutex<Vec<(SocketAddr, SocketAddrUse)>>>;

/// A policy that allows everything and writes it down.
pub fn recording(seen: &Seen) -> Setup {
    let seen = Arc::clone(seen);
    Setup::allow(move |addr, use_| {
        seen.lock().unwrap().push((addr, use_));
        true
    })
}

/// What was written down since the last time, with names instead of addresses, whose ports differ
/// by run.
pub fn take_named(seen: &Seen, names: &[(&str, SocketAddr)]) -> Vec<String> {
    let name = |addr: SocketAddr| {
        let found = names.iter().find(|(_, of)| *of == addr);
        found.map_or_else(|| addr.to_string(), |(name, _)| (*name).to_owned())
    };
    let seen = std::mem::take(&mut *seen.lock().unwrap());
    seen.into_iter().map(|(addr, use_)| format!("{use_:?} {}", name(addr))).collect()
}
