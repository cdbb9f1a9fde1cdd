//! A source of statistics over WASI 0.3: `COLLECTOR BURSTS LINES PAUSE_MILLIS`. In
//! each burst it sends so many lines, each with a call of its own, as statsd's
//! clients do.

mod net3;

use std::net::SocketAddrV4;

use services::line;
use wasip3::cli::environment::get_arguments;
use wasip3::clocks::monotonic_clock::wait_for;
use wasip3::random::random::get_random_u64;

struct Guest;

wasip3::cli::command::export!(Guest);

impl wasip3::exports::cli::run::Guest for Guest {
    async fn run() -> Result<(), ()> {
        let arguments = get_arguments();
        let [_, collector, numbers @ ..] = arguments.as_slice() else { return Err(()) };
        let collector: SocketAddrV4 = collector.parse().map_err(drop)?;
        let numbers: Vec<u64> = numbers.iter().filter_map(|number| number.parse().ok()).collect();
        let &[bursts, lines, pause_millis] = numbers.as_slice() else { return Err(()) };
        let pause_ns = pause_millis * 1_000_000;
        let socket = net3::connected(collector).map_err(drop)?;
        let source = get_random_u64();
        // Sources do not march in step.
        wait_for(source % pause_ns.max(1)).await;
        let mut text = String::new();
        for burst in 0..bursts {
            for number in burst * lines..(burst + 1) * lines {
                line::write(&mut text, source, number);
                socket.send(text.clone().into_bytes(), None).await.map_err(drop)?;
            }
            wait_for(pause_ns).await;
        }
        Ok(())
    }
}
