//! Connecting: `stream` of WASI 0.2, `connect` and `disconnect` of WASI 0.3.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::task::{Context, Poll, Waker};

use crate::datagram::RawAddr;
use crate::error::{Errno, ErrorCode};
use crate::ring::op::Op;
use crate::socket::policy::{SocketAddrUse, is_of_family, is_remote};
use crate::socket::{Remote, UdpSocket, Unsettled};

impl UdpSocket {
    /// Connects, reconnects or disconnects a bound socket, for `stream` of WASI 0.2.
    pub(crate) async fn stream(&self, remote: Option<SocketAddr>) -> Result<(), ErrorCode> {
        if !self.is_bound().await {
            return Err(ErrorCode::InvalidState);
        }
        self.settled().await?;
        if remote.is_some() || self.remote().is_some() {
            // Datagrams that wait for send buffer go to the peer the socket has when the kernel
            // takes them, since their entries name none. They are for the present one.
            self.sent().await;
        }
        match remote {
            Some(remote) => {
                self.check_peer(remote, false).await?;
                self.associate(remote).await
            }
            None if self.remote().is_some() => self.dissolve().await,
            None => Ok(()),
        }
    }

    /// `connect` of WASI 0.3, which binds what is not bound.
    pub(crate) async fn connect(&self, remote: SocketAddr) -> Result<(), ErrorCode> {
        let is_bound = self.is_bound().await;
        self.check_peer(remote, !is_bound).await?;
        self.bind_anywhere(!is_bound).await?;
        self.settled().await?;
        // For the present peer, as in `stream`.
        self.sent().await;
        self.associate(remote).await
    }

    pub(crate) async fn disconnect(&self) -> Result<(), ErrorCode> {
        self.settled().await?;
        self.remote().ok_or(ErrorCode::InvalidState)?;
        self.sent().await;
        self.dissolve().await
    }

    /// A peer is one to send to and to receive from, so the policy must allow both.
    async fn check_peer(&self, remote: SocketAddr, binds: bool) -> Result<(), ErrorCode> {
        if !is_of_family(remote, self.family) || !is_remote(remote) {
            return Err(ErrorCode::InvalidArgument);
        }
        if binds {
            self.may_bind_anywhere().await?;
        }
        self.may_use(remote, SocketAddrUse::UdpSend, false).await?;
        self.may_use(remote, SocketAddrUse::UdpReceive, false).await
    }

    async fn associate(&self, remote: SocketAddr) -> Result<(), ErrorCode> {
        let mut result = self.run_connect(Some(remote)).await;
        if result == Err(Errno(libc::EINVAL)) {
            // The kernel keeps the source address of a socket's first route. For a peer beyond
            // another route the old association must be dissolved.
            let _ = self.run_connect(None).await;
            result = self.run_connect(Some(remote)).await;
        }
        match result {
            Ok(()) => Ok(()),
            Err(Errno(libc::EAFNOSUPPORT)) => Err(ErrorCode::InvalidArgument),
            Err(errno) => Err(errno.into()),
        }
    }

    async fn dissolve(&self) -> Result<(), ErrorCode> {
        Ok(self.run_connect(None).await?)
    }

    fn set_remote(&self, remote: Option<SocketAddr>) {
        self.lock().remote = remote.map(|asked| Box::new(Remote { asked, peer: None }));
        self.readmit();
    }

    /// Connects, or with no address disconnects.
    async fn run_connect(&self, to: Option<SocketAddr>) -> Result<(), Errno> {
        self.settled().await?;
        let addr = to.map_or_else(RawAddr::unspec, RawAddr::from);
        let mut connect = self.submit(Op::Connect(Box::new(addr)))?;
        // The kernel may choose another source address.
        if let Some(local) = &mut self.lock().local {
            local.answered = None;
        }
        let result = poll_fn(|cx| connect.poll_result(cx)).await.map(drop);
        if connect.has_ended() {
            if result.is_ok() {
                self.set_remote(to);
            }
        } else {
            self.lock().unsettled = Some(Box::new(Unsettled { connect, to }));
        }
        result
    }

    /// Waits for a connect that goes on although its call has returned. An error: it still does, because
    /// the kernel refuses enters. (What comes of it is no news to the guest: it was told.)
    pub(super) async fn settled(&self) -> Result<(), Errno> {
        poll_fn(|cx| self.poll_settled_connect(cx)).await
    }

    fn poll_settled_connect(&self, cx: &mut Context<'_>) -> Poll<Result<(), Errno>> {
        // Taken out to be polled with the state unlocked.
        let unsettled = self.lock().unsettled.take();
        let Some(mut unsettled) = unsettled else { return Poll::Ready(Ok(())) };
        let Poll::Ready(result) = unsettled.connect.poll_result(cx) else {
            self.lock().unsettled = Some(unsettled);
            return Poll::Pending;
        };
        let refused = if unsettled.connect.has_ended() {
            if result.is_ok() {
                self.set_remote(unsettled.to);
            }
            Ok(())
        } else {
            self.lock().unsettled = Some(unsettled);
            result.map(drop)
        };
        let first = self.lock().first.take();
        first.into_iter().for_each(Waker::wake);
        Poll::Ready(refused)
    }

    /// As `settled`, without waiting.
    #[cold]
    fn settle(&self, mut unsettled: Box<Unsettled>) {
        let result = unsettled.connect.try_result();
        if !unsettled.connect.has_ended() {
            self.lock().unsettled = Some(unsettled);
        } else if let Some(Ok(_)) = result {
            self.set_remote(unsettled.to);
        }
    }

    /// Whom the socket is connected to, as far as the kernel has got.
    pub(super) fn remote(&self) -> Option<Remote> {
        let unsettled = {
            let mut state = self.lock();
            match state.unsettled.take() {
                None => return state.remote.as_deref().copied(),
                Some(unsettled) => unsettled,
            }
        };
        self.settle(unsettled);
        self.lock().remote.as_deref().copied()
    }
}
