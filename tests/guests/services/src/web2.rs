//! A web service over WASI 0.2: `GET /name` asks the DNS server in `RESOLVER` for
//! the name's address, and answers with it.

mod net2;

use std::net::Ipv4Addr;

use net2::UdpSocket;
use services::dns::{self, TIMEOUT_MILLIS};
use wasip2::cli::environment::get_environment;
use wasip2::clocks::monotonic_clock::subscribe_duration;
use wasip2::http::types::{
    Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam,
};
use wasip2::io::poll::poll;
use wasip2::random::random::get_random_u64;

struct Guest;

wasip2::http::proxy::export!(Guest);

impl wasip2::exports::http::incoming_handler::Guest for Guest {
    fn handle(request: IncomingRequest, answer: ResponseOutparam) {
        let path = request.path_with_query().unwrap_or_default();
        let (status, text) = dns::told(resolve(path.trim_start_matches('/')));
        let fields = Fields::new();
        let length = text.len().to_string().into_bytes();
        fields.append("content-length", &length).expect("a header that may be set");
        let response = OutgoingResponse::new(fields);
        response.set_status_code(status).expect("a valid status");
        let body = response.body().expect("the first body");
        ResponseOutparam::set(answer, Ok(response));
        let out = body.write().expect("the first stream");
        // A client that has gone wants no answer.
        let _ = out.blocking_write_and_flush(text.as_bytes());
        drop(out);
        let _ = OutgoingBody::finish(body, None);
    }
}

fn resolve(name: &str) -> Option<Ipv4Addr> {
    let resolver = services::resolver(&get_environment())?;
    let [id @ .., _, _, _, _, _, _] = get_random_u64().to_be_bytes();
    let id = u16::from_be_bytes(id);
    let query = dns::query(id, name)?;
    let socket = UdpSocket::connected(resolver).ok()?;
    socket.send(query.clone()).ok()?;
    let time_is_up = subscribe_duration(TIMEOUT_MILLIS * 1_000_000);
    while !time_is_up.ready() {
        poll(&[&time_is_up, socket.readable()]);
        for datagram in socket.receive(1).ok()? {
            if dns::is_answer(&datagram.data, &query, id) {
                return dns::address(&datagram.data);
            }
        }
    }
    None
}
