//! The wire between Rust and the kernel's C structures: socket addresses, control data, messages
//! out and in. Pure functions over bytes; nothing here makes a system call.
//!
//! A message may carry several datagrams of one size, the last of them shorter: GSO (`UDP_SEGMENT`)
//! on the way out, GRO (`UDP_GRO`) on the way in. Guests see datagrams only.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::ops::Range;
use std::ptr;

use crate::limits::{
    CONTROL_BYTES, DATAGRAM_BYTES_MAX_V4, NAME_BYTES, RECEIVE_HEADER_BYTES, SEGMENTS_MAX,
};

/// The two families WASI knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) fn domain(self) -> libc::c_int {
        match self {
            Self::V4 => libc::AF_INET,
            Self::V6 => libc::AF_INET6,
        }
    }

    pub(crate) fn loopback(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::LOCALHOST.into(),
            Self::V6 => Ipv6Addr::LOCALHOST.into(),
        }
    }

    pub(crate) fn unspecified(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Self::V6 => Ipv6Addr::UNSPECIFIED.into(),
        }
    }
}

/// A socket address as the kernel reads it.
pub(crate) enum RawAddr {
    V4(libc::sockaddr_in),
    V6(libc::sockaddr_in6),
    /// `AF_UNSPEC`: a connect to it dissolves the association (connect(2)).
    Unspec(libc::sockaddr_in),
}

impl RawAddr {
    pub(crate) const fn unspec() -> Self {
        Self::Unspec(libc::sockaddr_in {
            // AF_UNSPEC
            sin_family: 0,
            sin_port: 0,
            sin_addr: libc::in_addr { s_addr: 0 },
            sin_zero: [0; 8],
        })
    }

    pub(crate) fn as_ptr(&self) -> *const libc::sockaddr {
        match self {
            Self::V4(raw) | Self::Unspec(raw) => ptr::from_ref(raw).cast(),
            Self::V6(raw) => ptr::from_ref(raw).cast(),
        }
    }

    pub(crate) fn len(&self) -> libc::socklen_t {
        let bytes = match self {
            Self::V4(raw) | Self::Unspec(raw) => size_of_val(raw),
            Self::V6(raw) => size_of_val(raw),
        };
        libc::socklen_t::try_from(bytes).expect("a sockaddr is tens of bytes")
    }
}

impl PartialEq for RawAddr {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::V4(a), Self::V4(b)) => {
                (a.sin_addr.s_addr, a.sin_port) == (b.sin_addr.s_addr, b.sin_port)
            }
            (Self::V6(a), Self::V6(b)) => {
                let key = |raw: &libc::sockaddr_in6| {
                    let libc::sockaddr_in6 { sin6_port, sin6_flowinfo, sin6_scope_id, .. } = *raw;
                    (raw.sin6_addr.s6_addr, sin6_port, sin6_flowinfo, sin6_scope_id)
                };
                key(a) == key(b)
            }
            (Self::Unspec(_), Self::Unspec(_)) => true,
            (Self::V4(_) | Self::V6(_) | Self::Unspec(_), _) => false,
        }
    }
}

impl From<SocketAddr> for RawAddr {
    fn from(addr: SocketAddr) -> Self {
        match addr {
            SocketAddr::V4(addr) => Self::V4(libc::sockaddr_in {
                sin_family: family_field(libc::AF_INET),
                sin_port: addr.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(addr.ip().octets()) },
                sin_zero: [0; 8],
            }),
            SocketAddr::V6(addr) => Self::V6(libc::sockaddr_in6 {
                sin6_family: family_field(libc::AF_INET6),
                sin6_port: addr.port().to_be(),
                sin6_flowinfo: addr.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: addr.ip().octets() },
                sin6_scope_id: addr.scope_id(),
            }),
        }
    }
}

fn family_field(family: libc::c_int) -> libc::sa_family_t {
    libc::sa_family_t::try_from(family).expect("address families are small")
}

/// Reads the sender's address out of a received message.
///
/// `None` for anything that is not a whole IPv4 or IPv6 address: the bytes are the kernel's, but
/// reading them needs no trust.
pub(crate) fn decode_addr(name: &[u8]) -> Option<SocketAddr> {
    let family = u16::from_ne_bytes(field(name, 0)?);
    let port = u16::from_be_bytes(field(name, 2)?);
    match libc::c_int::from(family) {
        libc::AF_INET => {
            let ip: [u8; 4] = field(name, 4)?;
            Some(SocketAddr::V4(SocketAddrV4::new(ip.into(), port)))
        }
        libc::AF_INET6 => {
            let flowinfo = u32::from_ne_bytes(field(name, 4)?);
            let ip: [u8; 16] = field(name, 8)?;
            let scope_id = u32::from_ne_bytes(field(name, 24)?);
            Some(SocketAddr::V6(SocketAddrV6::new(ip.into(), port, flowinfo, scope_id)))
        }
        _ => None,
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// One datagram on its way out; without an address it goes to the peer of a connected socket.
pub(crate) struct Outgoing {
    pub(crate) payload: Vec<u8>,
    pub(crate) to: Option<RawAddr>,
}

impl fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outgoing").field("bytes", &self.payload.len()).finish_non_exhaustive()
    }
}

/// The datagrams from the front that can travel as one message: of one size up to `segment_max`
/// bytes and to one peer, the last perhaps shorter. At least one, unless there is none.
pub(crate) fn front_run(datagrams: &[Outgoing], segment_max: usize) -> usize {
    let Some((first, others)) = datagrams.split_first() else { return 0 };
    let segment = first.payload.len();
    if segment == 0 || segment > segment_max {
        return 1;
    }
    let (mut run, mut bytes) = (1, segment);
    for next in others.iter().take(SEGMENTS_MAX - 1) {
        let len = next.payload.len();
        // A segment of no bytes would not be sent at all.
        let fits = (1..=segment).contains(&len) && bytes + len <= DATAGRAM_BYTES_MAX_V4;
        if !fits || next.to != first.to {
            break;
        }
        run += 1;
        bytes += len;
        if len < segment {
            break;
        }
    }
    run
}

/// Several datagrams as one message for sendmsg(2), which the kernel takes apart (udp(7),
/// `UDP_SEGMENT`). Points into the datagrams it was made of, and into itself.
pub(crate) struct GsoMessage {
    header: libc::msghdr,
    control: ControlData,
    parts: Vec<libc::iovec>,
}

// SAFETY: the pointers are only read by the kernel, whichever thread hands them over; they stay
// good because the operation table keeps message and datagrams together
// (`messages_deferred_by_a_full_send_buffer_leave_although_their_socket_is_dropped`).
#[expect(unsafe_code, reason = "msghdr and iovec hold raw pointers")]
unsafe impl Send for GsoMessage {}

impl GsoMessage {
    /// A message of a run that `front_run` has found.
    #[expect(clippy::unnecessary_box_returns, reason = "it points into itself")]
    pub(crate) fn new(run: &[Outgoing]) -> Box<Self> {
        let first = run.first();
        let segment = first.map_or(0, |datagram| datagram.payload.len());
        let parts = run.iter().map(|Outgoing { payload, .. }| libc::iovec {
            iov_base: payload.as_ptr().cast_mut().cast(),
            iov_len: payload.len(),
        });
        let mut message = Box::new(Self {
            header: empty_header(),
            control: ControlData::segment_size(u16::try_from(segment).unwrap_or(u16::MAX)),
            parts: parts.collect(),
        });
        if let Some(to) = first.and_then(|datagram| datagram.to.as_ref()) {
            message.header.msg_name = to.as_ptr().cast_mut().cast();
            message.header.msg_namelen = to.len();
        }
        message.header.msg_iov = message.parts.as_mut_ptr();
        message.header.msg_iovlen = message.parts.len() as _;
        message.header.msg_control = message.control.0.as_mut_ptr().cast();
        message.header.msg_controllen = message.control.0.len() as _;
        message
    }

    pub(crate) fn as_ptr(&self) -> *const libc::msghdr {
        &raw const self.header
    }
}

/// A message of nothing, to nobody.
pub(crate) fn empty_header() -> libc::msghdr {
    libc::msghdr {
        msg_name: ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: ptr::null_mut(),
        msg_iovlen: 0,
        msg_control: ptr::null_mut(),
        msg_controllen: 0,
        msg_flags: 0,
    }
}

/// One control message (cmsg(3)): its length, level and type, then a value of up to eight bytes.
#[repr(align(8))]
struct ControlData([u8; CONTROL_BYTES]);

/// Length, level and type.
const CONTROL_HEADER: Range<usize> = 0..16;

impl ControlData {
    fn segment_size(bytes: u16) -> Self {
        let value = bytes.to_ne_bytes();
        let len = CONTROL_HEADER.end + value.len();
        let mut data = [0; CONTROL_BYTES];
        data[..8].copy_from_slice(&len.to_ne_bytes());
        data[8..12].copy_from_slice(&libc::SOL_UDP.to_ne_bytes());
        data[12..16].copy_from_slice(&libc::UDP_SEGMENT.to_ne_bytes());
        data[CONTROL_HEADER.end..len].copy_from_slice(&value);
        Self(data)
    }
}

/// A received message, still in the ring's buffer.
#[derive(Debug)]
pub(crate) struct Received<'buffer> {
    pub(crate) from: SocketAddr,
    payload: &'buffer [u8],
    /// Bytes of every datagram but the last.
    segment: usize,
}

impl<'buffer> Received<'buffer> {
    pub(crate) fn bytes(&self) -> usize {
        self.payload.len()
    }

    /// The payloads of the datagrams it carries; an empty datagram is one.
    pub(crate) fn payloads(&self) -> impl ExactSizeIterator<Item = &'buffer [u8]> {
        let (payload, segment) = (self.payload, self.segment);
        let count = payload.len().div_ceil(segment).max(1);
        (0..count).map(move |at| {
            let rest = &payload[at * segment..];
            &rest[..rest.len().min(segment)]
        })
    }
}

/// The header a multishot recvmsg is armed with: it asks for the sender's address and leaves room
/// for one control message. The kernel copies it when the entry is prepared.
pub(crate) fn receive_header() -> libc::msghdr {
    libc::msghdr {
        msg_namelen: libc::socklen_t::try_from(NAME_BYTES).expect("28"),
        msg_controllen: CONTROL_BYTES as _,
        ..empty_header()
    }
}

/// Reads a filled buffer: `struct io_uring_recvmsg_out`, room for the name, room for control data,
/// the payload (`io_uring_prep_recvmsg_multishot(3)`).
///
/// `None` if the message was cut or its sender is not an IP address, neither of which a ring with
/// whole-datagram buffers should ever see.
pub(crate) fn parse_received(filled: &[u8]) -> Option<Received<'_>> {
    let name_len = u32::from_ne_bytes(field(filled, 0)?);
    let control_len = u32::from_ne_bytes(field(filled, 4)?);
    let payload_len = u32::from_ne_bytes(field(filled, 8)?);
    let flags = u32::from_ne_bytes(field(filled, 12)?);
    if flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC).cast_unsigned() != 0 {
        return None;
    }
    let (name, rest) = filled.get(RECEIVE_HEADER_BYTES..)?.split_at_checked(NAME_BYTES)?;
    let (control, payload) = rest.split_at_checked(CONTROL_BYTES)?;
    let from = decode_addr(name.get(..usize::try_from(name_len).ok()?)?)?;
    let payload = payload.get(..usize::try_from(payload_len).ok()?)?;
    let segment = control.get(..usize::try_from(control_len).ok()?).and_then(decode_segment_size);
    let segment = segment.unwrap_or(payload.len()).max(1);
    Some(Received { from, payload, segment })
}

/// The size of the datagrams in a message (udp(7), `UDP_GRO`), the only control data we ask for.
fn decode_segment_size(control: &[u8]) -> Option<usize> {
    let level = libc::c_int::from_ne_bytes(field(control, 8)?);
    let name = libc::c_int::from_ne_bytes(field(control, 12)?);
    let size = libc::c_int::from_ne_bytes(field(control, CONTROL_HEADER.end)?);
    let is_ours = level == libc::SOL_UDP && name == libc::UDP_GRO;
    is_ours.then(|| usize::try_from(size).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use proptest::prelude::*;

    use super::*;

    fn bytes_of(raw: &RawAddr) -> Vec<u8> {
        // The same fields the kernel would copy, without reading through the raw pointer.
        match raw {
            RawAddr::V4(a) | RawAddr::Unspec(a) => [
                &a.sin_family.to_ne_bytes()[..],
                &a.sin_port.to_ne_bytes(),
                &a.sin_addr.s_addr.to_ne_bytes(),
                &a.sin_zero,
            ]
            .concat(),
            RawAddr::V6(a) => [
                &a.sin6_family.to_ne_bytes()[..],
                &a.sin6_port.to_ne_bytes(),
                &a.sin6_flowinfo.to_ne_bytes(),
                &a.sin6_addr.s6_addr,
                &a.sin6_scope_id.to_ne_bytes(),
            ]
            .concat(),
        }
    }

    proptest! {
        #![proptest_config(crate::regressions("tests/proptest-regressions/datagram.txt"))]

        #[test]
        fn an_address_survives_the_kernels_layout(addr: SocketAddr) {
            let raw = RawAddr::from(addr);
            let bytes = bytes_of(&raw);
            prop_assert_eq!(bytes.len(), usize::try_from(raw.len()).unwrap());
            prop_assert_eq!(decode_addr(&bytes), Some(addr));
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_addr(&bytes);
            let _ = parse_received(&bytes).map(|received| received.payloads().count());
        }

        /// Any value of the control message, any size it claims for itself and for the payload.
        #[test]
        fn whatever_control_data_says_a_message_is_split_without_loss(
            payload in proptest::collection::vec(any::<u8>(), 0..300),
            segment in prop_oneof![-1..400_i32, any::<i32>()],
            control_len in 0..40_u32,
            payload_len in 0..400_u32,
        ) {
            let mut filled = filled(&payload, Some(segment));
            filled[4..8].copy_from_slice(&control_len.to_ne_bytes());
            filled[8..12].copy_from_slice(&payload_len.to_ne_bytes());
            let Some(received) = parse_received(&filled) else {
                prop_assert!(usize::try_from(payload_len).unwrap() > payload.len());
                return Ok(());
            };
            let parts: Vec<_> = received.payloads().collect();
            prop_assert_eq!(parts.concat(), &payload[..payload_len.try_into().unwrap()]);
            let (last, whole) = parts.split_last().unwrap();
            prop_assert!(whole.iter().all(|part| part.len() == parts[0].len()));
            prop_assert!(last.len() <= parts[0].len());
        }

        /// Greedy is best here: what begins a run is one itself.
        #[test]
        fn datagrams_are_parted_into_the_longest_runs(
            alike in proptest::collection::vec((size(), 0..peers().len(), 1..80_usize), 0..8),
            segment_max in prop_oneof![Just(0), 1..5000_usize, Just(usize::from(u16::MAX))],
        ) {
            // The longest run is looked for in cubic time, for which Miri has not the patience.
            let all = if cfg!(miri) { 12 } else { usize::MAX };
            let datagrams: Vec<_> = alike
                .into_iter()
                .flat_map(|(bytes, peer, times)| std::iter::repeat_n((bytes, peer), times))
                .take(all)
                .map(|(bytes, peer)| outgoing(bytes, peers()[peer]))
                .collect();
            let mut rest = &datagrams[..];
            while !rest.is_empty() {
                let run = front_run(rest, segment_max);
                let longest = (1..=rest.len()).rev().find(|n| is_run(&rest[..*n], segment_max));
                prop_assert_eq!(Some(run), longest);
                rest = &rest[run..];
            }
        }
    }

    /// Alone, or what the kernel takes apart into the very same datagrams.
    fn is_run(datagrams: &[Outgoing], segment_max: usize) -> bool {
        let sizes: Vec<usize> = datagrams.iter().map(|datagram| datagram.payload.len()).collect();
        let Some((last, others)) = sizes.split_last() else { return false };
        others.is_empty()
            || (sizes.len() <= 64
                && sizes.iter().sum::<usize>() <= 65_507
                && sizes[0] <= segment_max
                && others.iter().all(|size| *size == sizes[0])
                && (1..=sizes[0]).contains(last)
                && datagrams.iter().all(|datagram| datagram.to == datagrams[0].to))
    }

    fn size() -> impl Strategy<Value = usize> {
        let usual = prop::sample::select(vec![0, 1, 2, 1200, 1201, 32_753, 65_507, 65_535]);
        prop_oneof![4 => usual, 1 => 0..5000_usize]
    }

    /// No peer, and peers that differ in one field each.
    fn peers() -> [Option<SocketAddr>; 6] {
        let six = |flowinfo, scope_id| {
            Some(SocketAddrV6::new([0xfe80, 0, 0, 0, 0, 0, 0, 1].into(), 1, flowinfo, scope_id))
        };
        let four = ["127.0.0.1:1", "127.0.0.1:2"].map(|text| Some(text.parse().unwrap()));
        let [a, b, c] = [six(0, 1), six(0, 2), six(1, 1)].map(|addr| addr.map(SocketAddr::V6));
        [None, four[0], four[1], a, b, c]
    }

    fn outgoing(bytes: usize, to: Option<SocketAddr>) -> Outgoing {
        Outgoing { payload: vec![0; bytes], to: to.map(RawAddr::from) }
    }

    #[test]
    fn a_run_ends_where_the_kernel_would_send_something_else() {
        let run = |sizes: &[usize], segment_max| {
            let datagrams: Vec<_> = sizes.iter().map(|bytes| outgoing(*bytes, None)).collect();
            front_run(&datagrams, segment_max)
        };
        assert_eq!(run(&[], 2000), 0);
        assert_eq!(run(&[9, 9, 9], 2000), 3);
        assert_eq!(run(&[9, 9, 8, 9], 2000), 3, "only the last may be shorter");
        assert_eq!(run(&[9, 9, 10], 2000), 2, "longer");
        assert_eq!(run(&[9, 9, 0], 2000), 2, "no segment is empty");
        assert_eq!(run(&[0, 0], 2000), 1);
        assert_eq!(run(&[2000, 2000], 2000), 2);
        assert_eq!(run(&[2001, 2001], 2000), 1);
        assert_eq!(run(&[1; 65], 2000), 64);
        assert_eq!(run(&[6550, 58_957], 6550), 1);
        assert_eq!(run(&[32_754, 32_753], 65_535), 2, "65,507 bytes");
        assert_eq!(run(&[32_754, 32_754], 65_535), 1);
        assert_eq!(run(&[1; 2], 0), 1);
    }

    /// `struct cmsghdr` and the value behind it, as `CMSG_LEN` and `CMSG_DATA` have them (cmsg(3)).
    #[test]
    fn a_message_of_several_datagrams_is_laid_out_as_sendmsg_reads_it() {
        const HEADER: usize = size_of::<libc::cmsghdr>();
        for to in peers() {
            let run = [outgoing(1200, to), outgoing(1200, to), outgoing(7, to)];
            let message = GsoMessage::new(&run);
            let control = &message.control.0;
            let int = |at| libc::c_int::from_ne_bytes(field(control, at).unwrap());
            let len = field(control, offset_of!(libc::cmsghdr, cmsg_len)).unwrap();
            assert_eq!(usize::from_ne_bytes(len), HEADER + 2);
            assert_eq!(int(offset_of!(libc::cmsghdr, cmsg_level)), libc::SOL_UDP);
            assert_eq!(int(offset_of!(libc::cmsghdr, cmsg_type)), libc::UDP_SEGMENT);
            assert_eq!(field(control, HEADER), Some(1200_u16.to_ne_bytes()));
            assert_eq!(align_of::<ControlData>(), align_of::<libc::cmsghdr>());

            let header = &message.header;
            assert_eq!(header.msg_control, control.as_ptr().cast_mut().cast());
            assert_eq!(header.msg_controllen, CONTROL_BYTES);
            assert_eq!(
                (header.msg_iov.cast_const(), header.msg_iovlen),
                (message.parts.as_ptr(), 3)
            );
            let parts = message.parts.iter().map(|part| (part.iov_base.cast_const(), part.iov_len));
            let payloads = run.iter().map(|Outgoing { payload, .. }| {
                (payload.as_ptr().cast::<libc::c_void>(), payload.len())
            });
            assert!(parts.eq(payloads));
            let name = run[0].to.as_ref().map_or((ptr::null(), 0), |to| (to.as_ptr(), to.len()));
            assert_eq!((header.msg_name.cast_const().cast(), header.msg_namelen), name);
        }
    }

    /// A buffer as a multishot recvmsg fills it, from an IPv4 sender.
    fn filled(payload: &[u8], segment: Option<i32>) -> Vec<u8> {
        let mut control = [0; CONTROL_BYTES];
        let segment = segment.map(|size| {
            control[..8].copy_from_slice(&20_u64.to_ne_bytes());
            control[8..12].copy_from_slice(&libc::SOL_UDP.to_ne_bytes());
            control[12..16].copy_from_slice(&libc::UDP_GRO.to_ne_bytes());
            control[16..20].copy_from_slice(&size.to_ne_bytes());
        });
        let control_len = if segment.is_some() { 24 } else { 0 };
        let lens = [16, control_len, u32::try_from(payload.len()).unwrap(), 0];
        let mut name = [0; NAME_BYTES];
        name[..2].copy_from_slice(&2_u16.to_ne_bytes()); // AF_INET
        [&lens.map(u32::to_ne_bytes).concat()[..], &name, &control, payload].concat()
    }

    #[test]
    fn a_message_is_split_into_the_datagrams_it_carries() {
        let split = |payload: &[u8], segment| -> Vec<Vec<u8>> {
            let filled = filled(payload, segment);
            parse_received(&filled).unwrap().payloads().map(<[u8]>::to_vec).collect()
        };
        assert_eq!(split(b"abcdefgh", Some(4)), [b"abcd", b"efgh"]);
        assert_eq!(split(b"abcdefg", Some(3)), [&b"abc"[..], b"def", b"g"]);
        assert_eq!(split(b"abc", Some(1)), [b"a", b"b", b"c"]);
        assert_eq!(split(b"abc", Some(3)), [b"abc"]);
        assert_eq!(split(b"abc", Some(4)), [b"abc"]);
        assert_eq!(split(b"abc", None), [b"abc"]);
        for segment in [None, Some(3)] {
            assert_eq!(split(b"", segment), [b""], "an empty datagram is one");
        }
    }

    #[test]
    fn control_data_of_another_kind_splits_nothing() {
        for at in [8, 12] {
            let mut filled = filled(b"abcdef", Some(2));
            filled[RECEIVE_HEADER_BYTES + NAME_BYTES + at] ^= 1;
            assert_eq!(parse_received(&filled).unwrap().payloads().count(), 1);
        }
    }

    #[test]
    fn a_cut_message_is_refused() {
        let mut bytes = filled(b"", None);
        assert!(parse_received(&bytes).is_some());
        for cut in [libc::MSG_TRUNC, libc::MSG_CTRUNC] {
            bytes[12] = u8::try_from(cut).unwrap(); // flags
            assert!(parse_received(&bytes).is_none());
        }
    }
}
