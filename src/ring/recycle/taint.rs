//! What a kernel socket has been through, as far as its next owner could notice.

use crate::datagram::Family;
use crate::stats::ClosedInstead;

/// Why a socket is closed for good and not cached, or not any longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// Bound to a port by its number, which a disconnect does not give up.
    NamedPort,
    /// A guest or this crate has set an option.
    Options,
    /// Connected, of a family that remembers its peers.
    Connected,
    /// An operation has failed.
    Error,
    /// An operation still went on when the guest dropped the socket.
    Busy,
    /// The cache is full, or the slot is needed.
    NoRoom,
    /// More datagrams waited unread than are worth draining.
    Unread,
    /// It could not be unbound, or not be drained.
    Unclean,
    /// No bind has needed it for a while.
    Idle,
}

impl ClosedInstead {
    pub(super) fn count(&mut self, reason: Reason) {
        *match reason {
            Reason::NamedPort => &mut self.named_port,
            Reason::Options => &mut self.options,
            Reason::Connected => &mut self.connected,
            Reason::Error => &mut self.error,
            Reason::Busy => &mut self.busy,
            Reason::NoRoom => &mut self.no_room,
            Reason::Unread => &mut self.unread,
            Reason::Unclean => &mut self.unclean,
            Reason::Idle => &mut self.idle,
        } += 1;
    }
}

/// What the operations on a socket have left in it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taint {
    pub(super) family: Family,
    /// Bound to one address and not to all. The kernel remembers that for good
    /// (`SOCK_BINDADDR_LOCK`): bound to all addresses, such a socket would not forget the address
    /// that a connect has chosen for it.
    pub(super) is_addressed: bool,
    pub(super) has_connected: bool,
    /// What was sent may still be in a device's queue. It is charged to the socket, and leaves its
    /// next owner a smaller send buffer.
    pub(super) may_be_sending: bool,
    /// Why the socket must be closed: the first thing in it that unbinding does not undo.
    pub(super) reason: Option<Reason>,
}

impl Taint {
    pub(crate) fn new(family: Family) -> Self {
        Self {
            family,
            is_addressed: false,
            has_connected: false,
            may_be_sending: false,
            reason: None,
        }
    }

    pub(crate) fn family(self) -> Family {
        self.family
    }

    /// For the next owner: what the kernel remembers stays.
    pub(crate) fn renewed(self) -> Self {
        Self { is_addressed: self.is_addressed, ..Self::new(self.family) }
    }

    pub(crate) fn bind(&mut self, is_addressed: bool) {
        self.is_addressed |= is_addressed;
    }

    pub(crate) fn connect(&mut self) {
        self.has_connected = true;
    }

    pub(crate) fn send(&mut self) {
        self.may_be_sending = true;
    }

    /// The kernel has sent everything.
    pub(crate) fn sent_all(&mut self) {
        self.may_be_sending = false;
    }

    /// The socket is never another owner's.
    pub(crate) fn mark(&mut self, reason: Reason) {
        self.reason.get_or_insert(reason);
    }
}
