//! What guests of both versions of WASI share, with the native programs that are
//! measured beside them.

#[path = "../../../../src/cli/services/dns.rs"]
pub mod dns;

#[path = "../../../../src/cli/services/line.rs"]
pub mod line;
