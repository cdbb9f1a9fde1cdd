//! A source of statistics over WASI 0.2: `COLLECTOR BURSTS LINES PAUSE_MILLIS`. In
//! each burst it sends so many lines, each with a call of its own, as statsd's
//! clients do.

mod net2;

use net2::UdpSocket;
use services::line;
use wasip2::cli::environment::get_arguments;
use wasip2::clocks::monotonic_clock::subscribe_duration;
use wasip2::random::random::get_random_u64;

struct Guest;

wasip2::cli::command::export!(Guest);

impl wasip2::exports::cli::run::Guest for Guest {
    fn run() -> Result<(), ()> {
        let (collector, load) = services::load(&get_arguments()).ok_or(())?;
        let socket = UdpSocket::connected(collector).map_err(drop)?;
        let source = get_random_u64();
        subscribe_duration(load.start_nanos(source)).block();
        let mut text = String::new();
        for burst in 0..load.bursts {
            for number in load.numbers(burst) {
                line::write(&mut text, source, number);
                socket.send(text.clone().into_bytes()).map_err(drop)?;
            }
            subscribe_duration(load.pause_nanos()).block();
        }
        Ok(())
    }
}
