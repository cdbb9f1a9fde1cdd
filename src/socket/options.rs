//! Socket options: read from memory, recorded until the bind, set in the kernel from then on.

use crate::datagram::Family;
use crate::error::ErrorCode;
use crate::ring::kernel_defaults::{FamilyDefaults, hop_limit_option};
use crate::ring::op::{Op, SocketOption};
use crate::socket::{Options, UdpSocket};

/// A socket option that WASI lets guests set.
#[derive(Clone, Copy)]
pub(crate) enum OptionValue {
    HopLimit(u8),
    ReceiveBuffer(u64),
    SendBuffer(u64),
}

impl UdpSocket {
    pub(crate) fn hop_limit(&self) -> u8 {
        self.lock().options.hop_limit.unwrap_or(self.defaults().hop_limit)
    }

    pub(crate) fn receive_buffer_size(&self) -> u64 {
        self.defaults().receive_buffer.reported(self.lock().options.receive_buffer)
    }

    pub(crate) fn send_buffer_size(&self) -> u64 {
        self.defaults().send_buffer.reported(self.lock().options.send_buffer)
    }

    fn defaults(&self) -> FamilyDefaults {
        self.driver.defaults().of(self.family).expect("checked when the socket was created")
    }

    /// Records an option. A bound socket's is set in the kernel first, an unbound one's with its
    /// bind.
    pub(crate) async fn set_option(&self, value: OptionValue) -> Result<(), ErrorCode> {
        let mut options = Options::default();
        match value {
            // WIT: 0 is an `invalid-argument`.
            OptionValue::HopLimit(0)
            | OptionValue::ReceiveBuffer(0)
            | OptionValue::SendBuffer(0) => {
                return Err(ErrorCode::InvalidArgument);
            }
            OptionValue::HopLimit(hops) => options.hop_limit = Some(hops),
            OptionValue::ReceiveBuffer(bytes) => options.receive_buffer = Some(clamp_to_int(bytes)),
            OptionValue::SendBuffer(bytes) => options.send_buffer = Some(clamp_to_int(bytes)),
        }
        if self.is_bound().await {
            for option in options.to_set(self.family).into_iter().filter(|o| !o.is_v6only()) {
                let op = Op::SetOption(Box::new(option));
                self.run(op).await?;
            }
        }
        self.lock().options.update(options);
        Ok(())
    }
}

impl Options {
    /// What is to be set in the kernel, `IPV6_V6ONLY` always: WASI sockets are never dual-stack.
    pub(super) fn to_set(self, family: Family) -> Vec<SocketOption> {
        let mut options = Vec::new();
        if family == Family::V6 {
            options.push(SocketOption::V6ONLY);
        }
        if let Some(hops) = self.hop_limit {
            let (level, name) = hop_limit_option(family);
            options.push(SocketOption { level, name, value: hops.into() });
        }
        for (name, bytes) in
            [(libc::SO_RCVBUF, self.receive_buffer), (libc::SO_SNDBUF, self.send_buffer)]
        {
            if let Some(bytes) = bytes {
                let value = bytes.cast_signed();
                options.push(SocketOption { level: libc::SOL_SOCKET, name, value });
            }
        }
        options
    }

    fn update(&mut self, other: Self) {
        self.hop_limit = other.hop_limit.or(self.hop_limit);
        self.receive_buffer = other.receive_buffer.or(self.receive_buffer);
        self.send_buffer = other.send_buffer.or(self.send_buffer);
    }
}

/// The kernel takes buffer sizes as an `int` and clamps them itself.
fn clamp_to_int(bytes: u64) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX).min(i32::MAX.unsigned_abs())
}
