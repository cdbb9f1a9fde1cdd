//! The datagram codec.

use std::net::{SocketAddr, SocketAddrV6};

use crate::datagram::{GsoMessage, Outgoing, RawAddr, decode_addr, front_run, parse_received};
use crate::limits::{DATAGRAM_BYTES_MAX_V4, SEGMENTS_MAX};

/// Reads the bytes as a filled buffer and as an address, and makes datagrams of sizes that they name.
///
/// # Panics
///
/// If the codec contradicts itself.
pub fn run(bytes: &[u8]) {
    received(bytes);
    // With a header that can be: a name of 16 or 28 bytes, room for control data, all of the rest.
    if let [kind, segment @ .., _, _] = bytes {
        let name: u32 = if kind % 2 == 0 { 16 } else { 28 };
        let payload = u32::try_from(bytes.len()).unwrap_or(0);
        let mut filled: Vec<u8> =
            [name, 24, payload, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        filled.extend(if kind % 2 == 0 { 2_u16 } else { 10 }.to_ne_bytes());
        filled.resize(16 + 28, *kind);
        filled.extend(20_u64.to_ne_bytes());
        filled.extend(17_i32.to_ne_bytes());
        filled.extend(104_i32.to_ne_bytes());
        let size = i32::from(*segment.first().unwrap_or(&0)) - 8;
        filled.extend(size.to_ne_bytes());
        filled.extend([0; 4]);
        filled.extend(bytes);
        assert!(received(&filled), "a whole message of an IP address");
    }
    if let Some(addr) = decode_addr(bytes) {
        // Once in the kernel's form and back.
        let back: SocketAddr = match RawAddr::from(addr) {
            RawAddr::V4(raw) => {
                (raw.sin_addr.s_addr.to_ne_bytes(), u16::from_be(raw.sin_port)).into()
            }
            RawAddr::V6(raw) => {
                let (ip, port) = (raw.sin6_addr.s6_addr.into(), u16::from_be(raw.sin6_port));
                SocketAddrV6::new(ip, port, raw.sin6_flowinfo, raw.sin6_scope_id).into()
            }
            RawAddr::Unspec(_) => unreachable!("of no address"),
        };
        assert_eq!(back, addr);
    }
    outgoing(bytes);
}

/// Whether it is one.
fn received(filled: &[u8]) -> bool {
    let Some(received) = parse_received(filled) else { return false };
    let parts: Vec<&[u8]> = received.payloads().collect();
    assert_eq!(parts.iter().map(|part| part.len()).sum::<usize>(), received.bytes());
    let (last, whole) = parts.split_last().expect("an empty datagram is one");
    assert!(whole.iter().all(|part| part.len() == parts[0].len()) && last.len() <= parts[0].len());
    true
}

fn outgoing(bytes: &[u8]) {
    let datagrams: Vec<Outgoing> = bytes
        .chunks_exact(3)
        .map(|chunk| {
            let size = usize::from(u16::from_ne_bytes([chunk[0], chunk[1]])) >> (chunk[2] & 15);
            let peer = SocketAddr::from(([127, 0, 0, 1], chunk[2].into()));
            let to = (chunk[2] & 16 != 0).then(|| peer.into());
            Outgoing { payload: vec![chunk[2]; size], to }
        })
        .collect();
    let mut rest = &datagrams[..];
    while !rest.is_empty() {
        let run = front_run(rest, usize::from(bytes[0]) * 64);
        assert!((1..=rest.len().min(SEGMENTS_MAX)).contains(&run));
        let sum: usize = rest[..run].iter().map(|datagram| datagram.payload.len()).sum();
        assert!(run == 1 || sum <= DATAGRAM_BYTES_MAX_V4);
        let message = GsoMessage::new(&rest[..run]);
        assert!(!message.as_ptr().is_null());
        rest = &rest[run..];
    }
}
