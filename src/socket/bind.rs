//! Binding, which makes the socket in the kernel too: in two steps (`start-bind` and `finish-bind` of
//! WASI 0.2), in one (`bind` of WASI 0.3), or to any address before the first `connect` or `send`.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::pin;
use std::task::{Context, Poll, ready};

use crate::datagram::Family;
use crate::error::{Errno, ErrorCode};
use crate::ring::op::BindOp;
use crate::socket::policy::{SocketAddrUse, is_of_family};
use crate::socket::{BindState, Local, May, UdpSocket};

impl UdpSocket {
    /// Validates the address, asks the policy and submits the bind.
    pub(crate) async fn start_bind(&self, addr: SocketAddr) -> Result<(), ErrorCode> {
        self.can_begin_bind()?;
        if !is_of_family(addr, self.family) {
            return Err(ErrorCode::InvalidArgument);
        }
        self.may_use(addr, SocketAddrUse::UdpBind, false).await?;
        // A call that came between may have begun one.
        self.can_begin_bind()?;
        Ok(self.submit_bind(addr)?)
    }

    fn can_begin_bind(&self) -> Result<(), ErrorCode> {
        match self.lock().bind {
            BindState::Unbound => Ok(()),
            BindState::Binding(_) | BindState::Settled(_) => Err(ErrorCode::ConcurrencyConflict),
            BindState::Bound => Err(ErrorCode::InvalidState),
        }
    }

    pub(crate) async fn finish_bind(&self) -> Result<(), ErrorCode> {
        poll_fn(|cx| self.poll_finish(cx)).await
    }

    /// Both steps in one.
    pub(crate) async fn bind(&self, addr: SocketAddr) -> Result<(), ErrorCode> {
        if self.is_bound().await {
            return Err(ErrorCode::InvalidState);
        }
        self.discard_failed_bind().await;
        self.start_bind(addr).await?;
        self.finish_bind().await
    }

    /// Binds to any address and port unless the socket is bound. The policy is checked once for each
    /// bind, of which there may be several; `is_allowed`: the caller has checked it for the first.
    pub(super) async fn bind_anywhere(&self, mut is_allowed: bool) -> Result<(), ErrorCode> {
        while !self.is_bound().await {
            if !is_allowed {
                self.may_bind_anywhere().await?;
                is_allowed = true;
                // A call that came between may have bound it.
                continue;
            }
            is_allowed = false;
            self.discard_failed_bind().await;
            self.submit_bind(anywhere(self.family))?;
            match self.finish_bind().await {
                // A call that came between has discarded the failure, and perhaps bound the socket.
                Err(ErrorCode::NotInProgress) => {}
                result => return result,
            }
        }
        Ok(())
    }

    /// Checks the policy for the bind to any address and port that the kernel would do by itself.
    pub(super) fn may_bind_anywhere(&self) -> May<'_> {
        self.may_use(anywhere(self.family), SocketAddrUse::UdpBind, true)
    }

    /// Submits SOCKET, the options and BIND as one chain, whose memory is the ring's from here. The
    /// chain reaches the kernel even if the guest never waits for it.
    fn submit_bind(&self, addr: SocketAddr) -> Result<(), Errno> {
        let options = self.lock().options.to_set(self.family);
        let bind = Box::new(BindOp::new(self.family, options, addr));
        let slot = self.slot.get().copied();
        let keep = |slot| _ = self.slot.get_or_init(|| slot);
        let in_flight = self.driver.submit_bind(self.ctx.guest, slot, bind, keep)?;
        if addr.port() != 0 {
            self.know_port(addr.port());
        }
        let asked = Local { asked: Some(addr), answered: None };
        let local = self.ctx.checks.hears_local_addr().then(|| Box::new(asked));
        let mut state = self.lock();
        state.local = local;
        state.bind = BindState::Binding(Box::new(in_flight));
        Ok(())
    }

    /// Waits in a concurrent call for the bind that it begins with, or that another has begun.
    pub(super) async fn first_in_line<T>(&self, bound: impl Future<Output = T>) -> T {
        let _line = self.send_line.lock().await;
        self.as_first(bound).await
    }

    /// Waits as the first in line: another call that waits for the same takes the kernel's wake-up over, and
    /// passes it on.
    pub(super) async fn as_first<T>(&self, what: impl Future<Output = T>) -> T {
        let mut what = pin!(what);
        poll_fn(|cx| {
            let poll = what.as_mut().poll(cx);
            if poll.is_pending() {
                let waker = cx.waker().clone();
                // Dropped at the block's end, with the lock released.
                let _previous = self.lock().first.replace(waker);
            }
            poll
        })
        .await
    }

    /// Discards the failure of a bind whose call was cancelled.
    async fn discard_failed_bind(&self) {
        let _failure = self.finish_bind().await;
    }

    /// Ready with a bind's result, which is returned once.
    fn poll_finish(&self, cx: &mut Context<'_>) -> Poll<Result<(), ErrorCode>> {
        let mut state = ready!(self.poll_settled(cx));
        let BindState::Settled(result) = state.bind else {
            return Poll::Ready(Err(ErrorCode::NotInProgress));
        };
        state.bind = if result.is_ok() { BindState::Bound } else { BindState::Unbound };
        Poll::Ready(result)
    }
}

/// What a socket is bound to whose guest has not bound it.
fn anywhere(family: Family) -> SocketAddr {
    SocketAddr::new(family.unspecified(), 0)
}
