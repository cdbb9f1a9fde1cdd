//! Sources of statistics over tokio's sockets: a task and a socket each, as guests have.

use std::io;
use std::net::SocketAddrV4;
use std::time::Duration;

use tokio::task::{JoinSet, yield_now};
use tokio::time::sleep;

use super::line::{self, Load};
use super::{connected, random};

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
    let socket = connected(collector).await?;
    let source = random(8).into_iter().fold(0, |source, byte| source << 8 | u64::from(byte));
    pause(load.start_nanos(source)).await;
    let mut text = String::new();
    for burst in 0..load.bursts {
        for number in load.numbers(burst) {
            line::write(&mut text, source, number);
            socket.send(text.as_bytes()).await?;
        }
        pause(load.pause_nanos()).await;
    }
    Ok(())
}

/// As a guest's: none costs no timer.
async fn pause(nanos: u64) {
    match nanos {
        0 => yield_now().await,
        _ => sleep(Duration::from_nanos(nanos)).await,
    }
}
