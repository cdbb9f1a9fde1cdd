//! Connecting: `stream` of WASI 0.2, `connect` and `disconnect` of WASI 0.3.

use std::net::SocketAddr;

use crate::datagram::RawAddr;
use crate::error::{Errno, ErrorCode};
use crate::ring::op::Op;
use crate::socket::policy::{SocketAddrUse, is_of_family, is_remote};
use crate::socket::{Remote, UdpSocket};

impl UdpSocket {
    /// Connects, reconnects or disconnects a bound socket, for `stream` of WASI 0.2.
    pub(crate) async fn stream(&self, remote: Option<SocketAddr>) -> Result<(), ErrorCode> {
        if !self.is_bound().await {
            return Err(ErrorCode::InvalidState);
        }
        if remote.is_some() || self.remote().is_some() {
            // Datagrams that wait for send buffer go to the peer the socket has when the kernel
            // takes them, since their entries name none. They are for the present one.
            self.sendable().await;
        }
        match remote {
            Some(remote) => {
                self.check_peer(remote, false)?;
                self.associate(remote).await
            }
            None if self.remote().is_some() => self.dissolve().await,
            None => Ok(()),
        }
    }

    /// `connect` of WASI 0.3, which binds what is not bound.
    pub(crate) async fn connect(&self, remote: SocketAddr) -> Result<(), ErrorCode> {
        let is_bound = self.is_bound().await;
        self.check_peer(remote, !is_bound)?;
        self.bind_anywhere(!is_bound).await?;
        // For the present peer, as in `stream`.
        self.sendable().await;
        self.associate(remote).await
    }

    pub(crate) async fn disconnect(&self) -> Result<(), ErrorCode> {
        self.remote().ok_or(ErrorCode::InvalidState)?;
        self.sendable().await;
        self.dissolve().await
    }

    fn check_peer(&self, remote: SocketAddr, binds: bool) -> Result<(), ErrorCode> {
        if !is_of_family(remote, self.family) || !is_remote(remote) {
            return Err(ErrorCode::InvalidArgument);
        }
        if binds {
            self.may_bind_anywhere()?;
        }
        self.ctx.policy.check(remote, SocketAddrUse::UdpSend)?;
        self.ctx.policy.check(remote, SocketAddrUse::UdpReceive)
    }

    async fn associate(&self, remote: SocketAddr) -> Result<(), ErrorCode> {
        let mut result = self.run_connect(remote.into()).await;
        if result == Err(Errno(libc::EINVAL)) {
            // The kernel keeps the source address of a socket's first route. For a peer beyond
            // another route the old association must be dissolved.
            let _ = self.run_connect(RawAddr::unspec()).await;
            self.set_remote(None);
            result = self.run_connect(remote.into()).await;
        }
        match result {
            Ok(()) => {
                self.set_remote(Some(remote));
                Ok(())
            }
            Err(Errno(libc::EAFNOSUPPORT)) => Err(ErrorCode::InvalidArgument),
            Err(errno) => Err(errno.into()),
        }
    }

    async fn dissolve(&self) -> Result<(), ErrorCode> {
        self.run_connect(RawAddr::unspec()).await?;
        self.set_remote(None);
        Ok(())
    }

    fn set_remote(&self, remote: Option<SocketAddr>) {
        self.lock().remote = remote.map(|asked| Box::new(Remote { asked, peer: None }));
        self.readmit();
    }

    async fn run_connect(&self, addr: RawAddr) -> Result<(), Errno> {
        // The kernel may choose another source address.
        self.lock().local = None;
        let op = Op::Connect(Box::new(addr));
        self.run(op).await.map(drop)
    }
}
