//! From the guest: which datagrams may leave, and when the kernel has taken them.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::task::{Context, Poll};

use super::UdpSocket;
use crate::datagram::{Outgoing, RawAddr};
use crate::error::ErrorCode;
use crate::limits::PAYLOAD_BYTES_MAX;
use crate::policy::{SocketAddrUse, is_of_family, is_remote};
use crate::ring::Done;
use crate::ring::op::Op;
use crate::ring::send::SendOp;

impl UdpSocket {
    /// Sends datagrams in order, as one submission, and returns how many the kernel took or will
    /// take.
    ///
    /// WIT: "If at least one datagram has been sent successfully, this function never returns an
    /// error." What must wait for room is told of by the next `send`, if it fails.
    pub(crate) async fn send(
        &self,
        datagrams: impl ExactSizeIterator<Item = (Vec<u8>, Option<SocketAddr>)>,
    ) -> Result<u64, ErrorCode> {
        let remote = {
            let mut state = self.lock();
            if let Some(earlier) = &mut state.in_flight {
                let Some(done) = earlier.try_done() else { return Ok(0) };
                state.in_flight = None;
                if let Some(errno) = done.error {
                    return Err(errno.into());
                }
            }
            state.remote.as_deref().copied()
        };
        let mut refused = None;
        let mut accepted = Vec::with_capacity(datagrams.len());
        for (payload, to) in datagrams {
            match self.check_outgoing(&payload, to, remote) {
                Ok(to) => accepted.push(Outgoing { payload, to }),
                Err(error) => {
                    refused = Some(error);
                    break;
                }
            }
        }
        if accepted.is_empty() {
            return refused.map_or(Ok(0), Err);
        }
        let accepted_len = accepted.len() as u64;
        let mut ticket = self.submit(Op::Send(SendOp::new(accepted)));
        let done = poll_fn(|cx| ticket.poll_submitted(cx)).await;
        if ticket.has_yielded() {
            self.ctx.turn.begin();
        }
        match done {
            Some(Done { error: Some(errno), sent: 0, .. }) => Err(errno.into()),
            Some(Done { sent, .. }) => Ok(sent),
            None => {
                self.lock().in_flight = Some(Box::new(ticket));
                Ok(accepted_len)
            }
        }
    }

    /// Ready when the kernel has taken all that was sent.
    pub(crate) fn poll_sendable(&self, cx: &mut Context<'_>) -> Poll<()> {
        match &self.lock().in_flight {
            Some(ticket) => ticket.poll_is_done(cx),
            None => Poll::Ready(()),
        }
    }

    /// Sends one datagram, of a socket that need not be bound, and waits until the kernel has taken
    /// or refused it. Given up while it waits for room, it is not sent, unless room comes just then.
    ///
    /// Its entry names the peer even of a connected socket, which may have another one by the time
    /// there is room.
    pub(crate) async fn send_one(
        &self,
        payload: Vec<u8>,
        to: Option<SocketAddr>,
    ) -> Result<(), ErrorCode> {
        let to = self.destination(&payload, to, self.remote())?;
        let (is_bound, is_binding) = {
            let state = self.lock();
            (state.is_bound(), state.is_binding())
        };
        let is_to_bind = !is_bound && !is_binding;
        if is_to_bind {
            self.may_bind_anywhere()?;
        }
        self.ctx.policy.check(to, SocketAddrUse::UdpSend)?;
        if !is_bound {
            self.first_in_line(self.bind_anywhere(is_to_bind)).await?;
        }
        let _permit = self.sends.acquire().await;
        let datagram = Outgoing { payload, to: Some(to.into()) };
        let ticket = self.submit(Op::Send(SendOp::new(vec![datagram]))).cancelled_with_caller();
        let Done { error, .. } = ticket.done().await;
        error.map_or(Ok(()), |errno| Err(errno.into()))
    }

    /// Checks one datagram; the address to send it to, or none for a connected socket's peer.
    fn check_outgoing(
        &self,
        payload: &[u8],
        to: Option<SocketAddr>,
        remote: Option<SocketAddr>,
    ) -> Result<Option<RawAddr>, ErrorCode> {
        let effective = self.destination(payload, to, remote)?;
        self.ctx.policy.check(effective, SocketAddrUse::UdpSend)?;
        Ok(remote.is_none().then(|| effective.into()))
    }

    /// Where a datagram goes that is well-formed.
    fn destination(
        &self,
        payload: &[u8],
        to: Option<SocketAddr>,
        remote: Option<SocketAddr>,
    ) -> Result<SocketAddr, ErrorCode> {
        if payload.len() > PAYLOAD_BYTES_MAX {
            return Err(ErrorCode::DatagramTooLarge);
        }
        if let Some(to) = to
            && (!is_remote(to) || !is_of_family(to, self.family))
        {
            return Err(ErrorCode::InvalidArgument);
        }
        match (to, remote) {
            // WIT: a connected socket's datagrams name its peer or nobody.
            (Some(to), Some(remote)) if to != remote => Err(ErrorCode::InvalidArgument),
            (Some(to), _) => Ok(to),
            (None, Some(remote)) => Ok(remote),
            (None, None) => Err(ErrorCode::InvalidArgument),
        }
    }
}
