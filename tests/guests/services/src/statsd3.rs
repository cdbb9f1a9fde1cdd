//! A source of statistics over WASI 0.3: `COLLECTOR BURSTS LINES PAUSE_MILLIS`. In
//! each burst it sends so many lines, each with a call of its own, as statsd's
//! clients do.

mod net3;

use services::line;
use wasip3::cli::environment::get_arguments;
use wasip3::clocks::monotonic_clock::wait_for;
use wasip3::random::random::get_random_u64;

struct Guest;

wasip3::cli::command::export!(Guest);

impl wasip3::exports::cli::run::Guest for Guest {
    async fn run() -> Result<(), ()> {
        let (collector, load) = services::load(&get_arguments()).ok_or(())?;
        let socket = net3::connected(collector).map_err(drop)?;
        let source = get_random_u64();
        wait_for(load.start_nanos(source)).await;
        let mut text = String::new();
        for burst in 0..load.bursts {
            for number in load.numbers(burst) {
                line::write(&mut text, source, number);
                socket.send(text.clone().into_bytes(), None).await.map_err(drop)?;
            }
            wait_for(load.pause_nanos()).await;
        }
        Ok(())
    }
}
