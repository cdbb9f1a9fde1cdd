//! Sources of statistics over tokio's sockets: a task and a socket each, as guests have.

use std::io;
use std::net::SocketAddrV4;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::sleep;

use super::{connected, line, random};

/// What each source sends.
#[derive(Clone, Copy)]
pub(super) struct Load {
    pub(super) bursts: u64,
    /// In each burst.
    pub(super) lines: u64,
    /// Between bursts.
    pub(super) pause_millis: u64,
}

pub(super) async fn run(collector: SocketAddrV4, sources: u32, load: Load) -> io::Result<()> {
    let mut tasks = JoinSet::new();
    for _ in 0..sources {
        tasks.spawn_local(send(collector, load));
    }
    while let Some(ended) = tasks.join_next().await {
        ended.map_err(io::Error::other)??;
    }
    Ok(())
}

async fn send(collector: SocketAddrV4, load: Load) -> io::Result<()> {
    let Load { bursts, lines, pause_millis } = load;
    let socket = connected(collector).await?;
    let source = random(8).into_iter().fold(0, |source, byte| source << 8 | u64::from(byte));
    // Sources do not march in step.
    sleep(Duration::from_nanos(source % (pause_millis * 1_000_000).max(1))).await;
    let mut text = String::new();
    for burst in 0..bursts {
        for number in burst * lines..(burst + 1) * lines {
            line::write(&mut text, source, number);
            socket.send(text.as_bytes()).await?;
        }
        sleep(Duration::from_millis(pause_millis)).await;
    }
    Ok(())
}
