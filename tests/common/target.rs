//! Where a guest that does anything may want to bind or send to.

use std::net::SocketAddr;

use proptest::prelude::*;

use super::{LOOPBACK, LOOPBACK_6, addr};

#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// Without a port.
    Loopback,
    Wildcard,
    OtherFamily,
    Mapped,
    /// Taken, and so in use for a bind.
    Peer,
    OtherPeer,
}

pub fn target() -> impl Strategy<Value = Target> {
    use Target::{Loopback, Mapped, OtherFamily, OtherPeer, Peer, Wildcard};
    prop_oneof![
        3 => Just(Loopback),
        3 => Just(Peer),
        2 => Just(OtherPeer),
        2 => Just(Wildcard),
        1 => Just(OtherFamily),
        1 => Just(Mapped),
    ]
}

impl Target {
    /// For a socket of either family, with two peers of it.
    pub fn addr(self, is_v4: bool, peers: [SocketAddr; 2]) -> SocketAddr {
        match self {
            Self::Loopback if is_v4 => LOOPBACK,
            Self::Wildcard if is_v4 => addr("0.0.0.0:0"),
            Self::OtherFamily if is_v4 => LOOPBACK_6,
            Self::Loopback => LOOPBACK_6,
            Self::Wildcard => addr("[::]:0"),
            Self::OtherFamily => LOOPBACK,
            Self::Mapped => addr("[::ffff:127.0.0.1]:9"),
            Self::Peer => peers[0],
            Self::OtherPeer => peers[1],
        }
    }
}
