//! A source of statistics over WASI 0.2: `COLLECTOR BURSTS LINES PAUSE_MILLIS`. In
//! each burst it sends so many lines, each with a call of its own, as statsd's
//! clients do.

mod net2;

use std::net::SocketAddrV4;

use net2::UdpSocket;
use services::line;
use wasip2::cli::environment::get_arguments;
use wasip2::clocks::monotonic_clock::subscribe_duration;
use wasip2::random::random::get_random_u64;

struct Guest;

wasip2::cli::command::export!(Guest);

impl wasip2::exports::cli::run::Guest for Guest {
    fn run() -> Result<(), ()> {
        let arguments = get_arguments();
        let [_, collector, numbers @ ..] = arguments.as_slice() else { return Err(()) };
        let collector: SocketAddrV4 = collector.parse().map_err(drop)?;
        let numbers: Vec<u64> = numbers.iter().filter_map(|number| number.parse().ok()).collect();
        let &[bursts, lines, pause_millis] = numbers.as_slice() else { return Err(()) };
        let pause_ns = pause_millis * 1_000_000;
        let socket = UdpSocket::connected(collector).map_err(drop)?;
        let source = get_random_u64();
        // Sources do not march in step.
        subscribe_duration(source % pause_ns.max(1)).block();
        let mut text = String::new();
        for burst in 0..bursts {
            for number in burst * lines..(burst + 1) * lines {
                line::write(&mut text, source, number);
                socket.send(text.clone().into_bytes()).map_err(drop)?;
            }
            subscribe_duration(pause_ns).block();
        }
        Ok(())
    }
}
