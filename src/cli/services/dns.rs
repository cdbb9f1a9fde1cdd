//! As much of DNS messages (RFC 1035) as asking and forwarding take. Guests are built with this file,
//! too: it knows neither sockets nor WASI.

use std::net::{Ipv4Addr, SocketAddrV4};

/// Ends a query that nobody has answered.
pub const TIMEOUT_MILLIS: u64 = 2000;
/// Queries that a forwarder waits for at once. What comes beyond waits in its socket.
pub const IN_FLIGHT_MAX: usize = 256;
/// Longer messages go by TCP, without EDNS (RFC 6891) that allows more.
pub const MESSAGE_BYTES_MAX: usize = 4096;

/// Forwarders that may have been started with the same arguments.
const LISTENERS_MAX: u16 = 64;

const HEADER_BYTES: usize = 12;
/// Of a name, type and class after it; the two, TTL and length after it.
const QUESTION_TAIL_BYTES: usize = 4;
const RECORD_TAIL_BYTES: usize = 10;
const LABEL_BYTES_MAX: usize = 63;
const IS_RESPONSE: u8 = 0x80;
const RECURSION_DESIRED: u8 = 0x01;
const SERVER_FAILURE: u8 = 2;
const A_IN: [u8; 4] = [0, 1, 0, 1];

/// Where a forwarder may listen: the first of these that is free.
pub fn listeners(first: SocketAddrV4) -> impl Iterator<Item = SocketAddrV4> {
    let ports = first.port()..first.port().saturating_add(LISTENERS_MAX);
    ports.map(move |port| SocketAddrV4::new(*first.ip(), port))
}

/// The name, type and class of a message's only question.
pub fn question(message: &[u8]) -> Option<&[u8]> {
    if message.get(4..6)? != [0, 1] {
        return None;
    }
    let end = after_name(message, HEADER_BYTES)? + QUESTION_TAIL_BYTES;
    message.get(HEADER_BYTES..end)
}

/// Whether it can be forwarded.
pub fn is_query(message: &[u8]) -> bool {
    question(message).is_some() && message[2] & IS_RESPONSE == 0
}

/// Whether it answers the query that was sent with this id. What else comes was sent by somebody who
/// guesses (RFC 5452).
pub fn is_answer(message: &[u8], query: &[u8], id: u16) -> bool {
    message.get(2).is_some_and(|flags| flags & IS_RESPONSE != 0)
        && self::id(message) == id
        && question(message).is_some_and(|asked| question(query) == Some(asked))
}

/// Of a message that has a header.
pub fn id(message: &[u8]) -> u16 {
    u16::from_be_bytes([message[0], message[1]])
}

/// Of a message that has a header.
pub fn set_id(message: &mut [u8], id: u16) {
    message[..2].copy_from_slice(&id.to_be_bytes());
}

/// Makes the answer SERVFAIL of a query.
pub fn fail(query: &mut Vec<u8>) {
    let asked = question(query).map_or(0, <[u8]>::len);
    query.truncate(HEADER_BYTES + asked);
    query[2] |= IS_RESPONSE;
    query[3] = SERVER_FAILURE;
    // No records, EDNS included.
    query[6..HEADER_BYTES].fill(0);
}

/// Asks for the IPv4 addresses of a name.
pub fn query(id: u16, name: &str) -> Option<Vec<u8>> {
    let mut message = Vec::with_capacity(HEADER_BYTES + name.len() + 2 + A_IN.len());
    message.extend(id.to_be_bytes());
    message.extend([RECURSION_DESIRED, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        let len = u8::try_from(label.len()).ok()?;
        if !(1..=LABEL_BYTES_MAX).contains(&label.len()) {
            return None;
        }
        message.push(len);
        message.extend(label.as_bytes());
    }
    message.push(0);
    message.extend(A_IN);
    Some(message)
}

/// The first IPv4 address of an answer.
pub fn address(message: &[u8]) -> Option<Ipv4Addr> {
    let mut at = HEADER_BYTES + question(message)?.len();
    for _ in 0..u16::from_be_bytes([message[6], message[7]]) {
        at = after_name(message, at)?;
        let tail = message.get(at..at + RECORD_TAIL_BYTES)?;
        let data = at + RECORD_TAIL_BYTES;
        at = data + usize::from(u16::from_be_bytes([tail[8], tail[9]]));
        if tail[..4] == A_IN {
            let octets: [u8; 4] = message.get(data..at)?.try_into().ok()?;
            return Some(octets.into());
        }
    }
    None
}

/// Status and text by which a web service tells the address of the name it was asked for.
pub fn told(address: Option<Ipv4Addr>) -> (u16, String) {
    match address {
        Some(address) => (200, format!("{address}\n")),
        None => (502, "no address\n".to_owned()),
    }
}

/// Where a name that begins at `at` ends: behind the empty label, or a pointer.
fn after_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        let len = usize::from(*message.get(at)?);
        match len {
            0 => return Some(at + 1),
            1..=LABEL_BYTES_MAX => at += 1 + len,
            0xC0.. => return Some(at + 2),
            _ => return None,
        }
    }
}

/// Ids that cannot be guessed, fetched many at a time.
pub struct Ids {
    bytes: Vec<u8>,
    random: fn(usize) -> Vec<u8>,
}

impl Ids {
    const FETCHED_BYTES: usize = 512;

    /// From a source of so many random bytes.
    pub fn new(random: fn(usize) -> Vec<u8>) -> Self {
        Self { bytes: Vec::new(), random }
    }

    pub fn draw(&mut self) -> u16 {
        if self.bytes.len() < 2 {
            self.bytes = (self.random)(Self::FETCHED_BYTES);
        }
        let mut next = || self.bytes.pop().expect("as many as were asked for");
        u16::from_be_bytes([next(), next()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `www.example.test` has the address 192.0.2.1, by a pointer to the question, behind an alias.
    fn answer() -> Vec<u8> {
        let mut message = query(7, "www.example.test").expect("a valid name");
        message[2] |= IS_RESPONSE;
        message[7] = 2;
        message.extend([0xC0, 12, 0, 5, 0, 1, 0, 0, 0, 9, 0, 2, 0xC0, 12]);
        message.extend([0xC0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 192, 0, 2, 1]);
        message
    }

    #[test]
    fn an_address_is_found_behind_other_records() {
        assert_eq!(address(&answer()), Some(Ipv4Addr::new(192, 0, 2, 1)));
    }

    #[test]
    fn a_message_cut_anywhere_has_no_address_and_panics_nowhere() {
        let whole = answer();
        for len in 0..whole.len() {
            assert_eq!(address(&whole[..len]), None, "{len} bytes");
            assert!(!is_query(&whole[..len]));
        }
    }

    #[test]
    fn only_the_question_asked_with_the_id_sent_is_answered() {
        let asked = query(7, "www.example.test").expect("a valid name");
        let other = query(7, "ftp.example.test").expect("a valid name");
        assert!(is_query(&asked));
        assert!(is_answer(&answer(), &asked, 7));
        assert!(!is_answer(&answer(), &asked, 8));
        assert!(!is_answer(&answer(), &other, 7));
        assert!(!is_answer(&asked, &asked, 7), "a query is no answer");
    }

    #[test]
    fn a_failure_has_the_question_and_nothing_else() {
        let asked = query(7, "www.example.test").expect("a valid name");
        let mut failed = asked.clone();
        failed[11] = 1;
        failed.extend([0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
        fail(&mut failed);
        assert!(is_answer(&failed, &asked, 7));
        assert_eq!((failed.len(), failed[3] & 15), (asked.len(), SERVER_FAILURE));
    }

    #[test]
    fn names_that_cannot_be_asked_for_are_refused() {
        let long = "a".repeat(64);
        for name in ["", ".", "a..b", &long] {
            assert_eq!(query(1, name), None, "{name:?}");
        }
    }
}
