//! What guests of both versions of WASI share, with the native programs that are
//! measured beside them.

use std::net::SocketAddrV4;

#[path = "../../../../src/cli/services/dns.rs"]
pub mod dns;

#[path = "../../../../src/cli/services/line.rs"]
pub mod line;

/// The server that a web service asks, as its environment names it.
pub fn resolver(environment: &[(String, String)]) -> Option<SocketAddrV4> {
    let (_, resolver) = environment.iter().find(|(name, _)| name == "RESOLVER")?;
    resolver.parse().ok()
}

/// What a source sends where, from `COLLECTOR BURSTS LINES PAUSE_MILLIS`.
pub fn load(arguments: &[String]) -> Option<(SocketAddrV4, line::Load)> {
    let [_, collector, numbers @ ..] = arguments else { return None };
    let numbers: Vec<u64> = numbers.iter().filter_map(|number| number.parse().ok()).collect();
    let &[bursts, lines, pause_millis] = numbers.as_slice() else { return None };
    Some((collector.parse().ok()?, line::Load { bursts, lines, pause_millis }))
}
