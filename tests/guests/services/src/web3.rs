//! A web service over WASI 0.3: `GET /name` asks the DNS server in `RESOLVER` for
//! the name's address, and answers with it.

mod net3;

use std::net::Ipv4Addr;
use std::pin::pin;

use futures_util::future::{Either, select};
use services::dns::{self, TIMEOUT_MILLIS};
use wasip3::cli::environment::get_environment;
use wasip3::clocks::monotonic_clock::wait_for;
use wasip3::http::types::{ErrorCode, Fields, Request, Response};
use wasip3::random::random::get_random_u64;
use wasip3::{spawn_local, wit_future, wit_stream};

struct Guest;

wasip3::http::service::export!(Guest);

impl wasip3::exports::http::handler::Guest for Guest {
    async fn handle(request: Request) -> Result<Response, ErrorCode> {
        let path = request.get_path_with_query().unwrap_or_default();
        let (status, text) = dns::told(resolve(path.trim_start_matches('/')).await);
        let fields = Fields::new();
        let length = text.len().to_string().into_bytes();
        fields.append("content-length", &length).expect("a header that may be set");
        let (mut body, contents) = wit_stream::new();
        let (trailers, no_trailers) = wit_future::new(|| Ok(None));
        drop(trailers);
        let (response, _sent) = Response::new(fields, Some(contents), no_trailers);
        response.set_status_code(status).expect("a valid status");
        spawn_local(async move {
            // A client that has gone wants no answer.
            body.write_all(text.into_bytes()).await;
        });
        Ok(response)
    }
}

async fn resolve(name: &str) -> Option<Ipv4Addr> {
    let resolver = services::resolver(&get_environment())?;
    let [id @ .., _, _, _, _, _, _] = get_random_u64().to_be_bytes();
    let id = u16::from_be_bytes(id);
    let query = dns::query(id, name)?;
    let socket = net3::connected(resolver).ok()?;
    socket.send(query.clone(), None).await.ok()?;
    let answered = async {
        loop {
            let (answer, _) = socket.receive().await.ok()?;
            if dns::is_answer(&answer, &query, id) {
                return dns::address(&answer);
            }
        }
    };
    match select(pin!(answered), pin!(wait_for(TIMEOUT_MILLIS * 1_000_000))).await {
        Either::Left((address, _)) => address,
        Either::Right(_) => None,
    }
}
