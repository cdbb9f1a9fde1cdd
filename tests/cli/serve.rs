//! `wasi-uring serve` from the outside: an HTTP client, guests that ask by UDP, and who answers them.

mod tool;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tool::http::{guest_2, guest_3};
use tool::{CYCLE, Ended, arg, command, file, run, wait, wrapped};

const BACKENDS: [&str; 2] = ["stock", "uring"];
/// Longest that one answer may take before the test says that it hangs.
const BOUND: Duration = Duration::from_mins(2);
/// Between two looks at what will come.
const PAUSE: Duration = Duration::from_millis(5);

/// A guest for each version of WASI, in files of this test's own.
fn both(test: &str) -> [PathBuf; 2] {
    [guest_2(&format!("{test}_2.wat")), guest_3(&format!("{test}_3.wat"))]
}

// ---- A server

/// The command as a server, killed when the test is over.
struct Server {
    child: Option<Child>,
    lines: Arc<Lines>,
    addr: SocketAddr,
}

/// What a server has said on stderr so far.
#[derive(Default)]
struct Lines {
    all: Mutex<(Vec<String>, bool)>,
    more: Condvar,
}

impl Lines {
    /// The first line with this, now or later.
    #[track_caller]
    fn with(&self, part: &str) -> String {
        let all = self.all.lock().expect("a reader that did not panic");
        let found = |lines: &[String]| lines.iter().find(|line| line.contains(part)).cloned();
        let (all, _) = self
            .more
            .wait_timeout_while(all, BOUND, |(lines, ended)| found(lines).is_none() && !*ended)
            .expect("a reader that did not panic");
        found(&all.0).unwrap_or_else(|| panic!("no {part:?} in {:#?}", all.0))
    }

    fn text(&self) -> String {
        let all = self.all.lock().expect("a reader that did not panic");
        let (all, _) = self
            .more
            .wait_timeout_while(all, BOUND, |(_, ended)| !*ended)
            .expect("a reader that did not panic");
        all.0.join("\n")
    }
}

impl Server {
    #[track_caller]
    fn start(guest: &Path, options: &[&str]) -> Self {
        Self::start_wrapped(&[], guest, options)
    }

    #[track_caller]
    fn start_wrapped(wrapper: &[&str], guest: &Path, options: &[&str]) -> Self {
        let args = [&["serve", "--addr", "127.0.0.1:0"], options, &[arg(guest)]].concat();
        let mut command = wrapped(wrapper, args);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the command");
        let stderr = BufReader::new(child.stderr.take().expect("piped"));
        let lines = Arc::new(Lines::default());
        let reads = Arc::clone(&lines);
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                reads.all.lock().expect("no panic").0.push(line);
                reads.more.notify_all();
            }
            reads.all.lock().expect("no panic").1 = true;
            reads.more.notify_all();
        });
        let mut server =
            Self { child: Some(child), lines, addr: SocketAddr::from(([0, 0, 0, 0], 0)) };
        server.addr = server.said_addr("serving http://");
        server
    }

    /// The address in the line that begins so.
    #[track_caller]
    fn said_addr(&self, before: &str) -> SocketAddr {
        let line = self.lines.with(before);
        let (_, rest) = line.split_once(before).expect("the line has it");
        let addr = rest.split('/').next().expect("there is a first part");
        addr.parse().unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }

    fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("it runs");
        let pid = i32::try_from(child.id()).expect("a process id");
        kill(Pid::from_raw(pid), signal).expect("our own child");
    }

    /// Waits for its end, which somebody else has caused.
    #[track_caller]
    fn ended(mut self) -> Ended {
        let mut ended = wait(self.child.take().expect("it runs"));
        ended.stderr = self.lines.text();
        ended
    }

    /// Ends it by SIGTERM.
    #[track_caller]
    fn end(self) -> Ended {
        self.signal(Signal::SIGTERM);
        self.ended()
    }

    #[track_caller]
    fn get(&self, path: &str) -> Reply {
        Client::new(self.addr).get(path)
    }

    /// Asks in a thread of its own.
    fn asks(&self, path: impl Into<String>) -> thread::JoinHandle<Reply> {
        let (addr, path) = (self.addr, path.into());
        thread::spawn(move || Client::new(addr).get(&path))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

// ---- A client

#[derive(Debug)]
struct Reply {
    status: u16,
    /// In lower case.
    head: String,
    body: String,
}

impl Reply {
    #[track_caller]
    fn is(&self, status: u16, body: &str) {
        assert_eq!((self.status, self.body.as_str()), (status, body), "{}", self.head);
    }
}

struct Client(BufReader<TcpStream>);

impl Client {
    fn new(addr: SocketAddr) -> Self {
        let stream = TcpStream::connect(addr).expect("a server");
        stream.set_read_timeout(Some(BOUND)).expect("a bound");
        Self(BufReader::new(stream))
    }

    fn send(&mut self, request: impl AsRef<[u8]>) {
        self.0.get_mut().write_all(request.as_ref()).expect("the server reads");
    }

    fn ask(&mut self, path: &str) {
        self.send(format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n"));
    }

    #[track_caller]
    fn get(&mut self, path: &str) -> Reply {
        self.ask(path);
        self.reply().unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// The next answer; an error if it is not whole.
    fn reply(&mut self) -> io::Result<Reply> {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if self.0.read_line(&mut head)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let head = head.to_ascii_lowercase();
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.unwrap_or_else(|| panic!("no status in {head:?}"));
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let mut body = Vec::new();
        if let Some(length) = length {
            self.take(length.trim().parse().expect("a length"), &mut body)?;
        } else {
            assert!(head.contains("transfer-encoding: chunked"), "{head}");
            loop {
                let mut line = String::new();
                self.0.read_line(&mut line)?;
                let length = usize::from_str_radix(line.trim(), 16);
                let length = length.map_err(|_| io::Error::from(io::ErrorKind::UnexpectedEof))?;
                self.take(length, &mut body)?;
                self.0.read_line(&mut line)?;
                if length == 0 {
                    break;
                }
            }
        }
        Ok(Reply { status, head, body: String::from_utf8(body).expect("text") })
    }

    fn take(&mut self, bytes: usize, into: &mut Vec<u8>) -> io::Result<()> {
        let before = into.len();
        into.resize(before + bytes, 0);
        self.0.read_exact(&mut into[before..])
    }

    /// Whether the server has closed the connection; waits until it does, or sends something.
    fn is_closed(&mut self) -> bool {
        matches!(self.0.fill_buf(), Ok([]) | Err(_))
    }
}

// ---- Whom guests ask

/// A UDP socket on loopback that guests ask "who?".
struct Asked(UdpSocket);

impl Asked {
    fn new() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
        socket.set_read_timeout(Some(BOUND)).expect("a bound");
        Self(socket)
    }

    /// The path by which guests ask here.
    fn path(&self) -> String {
        format!("/u{}", self.0.local_addr().expect("it is bound").port())
    }

    /// Waits for a guest's question.
    #[track_caller]
    fn question(&self) -> SocketAddr {
        let mut bytes = [0; 16];
        let (length, guest) = self.0.recv_from(&mut bytes).expect("a guest asks");
        assert_eq!(&bytes[..length], b"who?");
        guest
    }

    fn answer(&self, guest: SocketAddr, text: &str) {
        self.0.send_to(text.as_bytes(), guest).expect("loopback");
    }
}

/// Waits until this is so.
#[track_caller]
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..BOUND.as_millis() / PAUSE.as_millis() {
        if is_so() {
            return;
        }
        thread::sleep(PAUSE);
    }
    panic!("not before the bound: {what}");
}

// ---- Tests

mod answers {
    use super::*;

    #[test]
    fn a_guest_asks_by_udp_and_answers_with_what_came() {
        for guest in both("asks") {
            for backend in BACKENDS {
                eprintln!("{} on {backend}", guest.display());
                let server = Server::start(&guest, &["--backend", backend, "--stats"]);
                let asked = Asked::new();
                for text in ["it is I", "it is I again"] {
                    let asking = server.asks(asked.path());
                    asked.answer(asked.question(), text);
                    asking.join().expect("a reply").is(200, text);
                }
                let stats = server.end().with_code(0).stats();
                assert_eq!(stats["backend"], backend, "{stats}");
                assert_eq!(stats["requests"]["answered"], 2, "{stats}");
                // Which implementation ran.
                let sent = if backend == "uring" { Value::from(2) } else { Value::Null };
                assert_eq!(stats["sockets_created"], sent, "{stats}");
                assert_eq!(stats["datagrams_sent"], sent, "{stats}");
                assert_eq!(stats["datagrams_received"], sent, "{stats}");
            }
        }
    }

    #[test]
    fn guests_at_once_on_two_threads_each_get_their_own_answer() {
        const CLIENTS: usize = 24;
        for guest in both("at_once") {
            for backend in BACKENDS {
                eprintln!("{} on {backend}", guest.display());
                let server =
                    Server::start(&guest, &["--backend", backend, "--threads", "2", "--stats"]);
                let asked = Asked::new();
                let asking: Vec<_> = (0..CLIENTS).map(|_| server.asks(asked.path())).collect();
                // All of them are there before the first is answered, the last one first.
                let guests: Vec<_> = asking.iter().map(|_| asked.question()).collect();
                for guest in guests.iter().rev() {
                    asked.answer(*guest, &guest.to_string());
                }
                let mut bodies: Vec<_> = asking
                    .into_iter()
                    .map(|asking| asking.join().expect("a reply"))
                    .map(|reply| (reply.status, reply.body))
                    .collect();
                let mut expected: Vec<_> =
                    guests.iter().map(|guest| (200, guest.to_string())).collect();
                bodies.sort();
                expected.sort();
                assert_eq!(bodies, expected);
                server.end().with_code(0);
            }
        }
    }

    #[test]
    fn each_request_on_a_connection_has_a_guest_of_its_own() {
        for guest in both("own") {
            // Eight pages fit once into sixteen, not twice.
            let server = Server::start(&guest, &["--memory-max", "1"]);
            let mut client = Client::new(server.addr);
            for _ in 0..3 {
                client.get("/m8").is(200, "grown");
            }
            server.end().with_code(0);
        }
    }

    #[test]
    fn net_is_obeyed() {
        for guest in both("net") {
            for backend in BACKENDS {
                let server = Server::start(&guest, &["--backend", backend, "--net", "none"]);
                server.get(&Asked::new().path()).is(200, "no answer");
            }
        }
    }

    #[test]
    fn a_request_of_a_guest_is_denied_and_that_is_said_once() {
        let server = Server::start(&guest_2("asks_http_2.wat"), &[]);
        server.get("/o").is(200, "denied");
        server.get("/o").is(200, "denied");
        let ended = server.end().with_code(0).says(&["localhost", "no outgoing HTTP"]);
        assert_eq!(ended.lines_with("outgoing HTTP"), 1, "{ended}");
    }
}

mod limits {
    use super::*;

    #[test]
    fn one_request_too_many_is_refused_and_the_others_go_on() {
        for guest in both("too_many") {
            let server = Server::start(&guest, &["--requests-max", "2"]);
            let asked = Asked::new();
            let asking = [server.asks(asked.path()), server.asks(asked.path())];
            let guests = [asked.question(), asked.question()];
            let refused = server.get("/h");
            assert_eq!(refused.status, 503, "{refused:?}");
            assert!(refused.head.contains("retry-after: 1"), "{refused:?}");
            for guest in guests {
                asked.answer(guest, "you");
            }
            for asking in asking {
                asking.join().expect("a reply").is(200, "you");
            }
            // A guest is gone a moment after its answer.
            until("there is room again", || server.get("/h").status == 200);
            server.end().with_code(0);
        }
    }

    #[test]
    fn a_guest_has_no_more_memory_than_allowed() {
        for guest in both("memory") {
            let server = Server::start(&guest, &["--memory-max", "1"]);
            // It has one page already, and sixteen are a mebibyte.
            server.get("/m15").is(200, "grown");
            server.get("/m16").is(200, "refused");
            let server = Server::start(&guest, &["--memory-max", "2"]);
            server.get("/m16").is(200, "grown");
            server.get("/m31").is(200, "grown");
            server.get("/m32").is(200, "refused");
        }
    }

    #[test]
    fn memories_count_together() {
        let two = "(core module $large (memory 12)) (core instance (instantiate $large))\n\
                   (import \"wasi:http/types@0.2.0\"";
        let text = std::fs::read_to_string(guest_2("two_memories.wat")).expect("just written");
        let text = text.replacen("(import \"wasi:http/types@0.2.0\"", two, 1);
        let guest = file("two_memories.wat", text);
        let server = Server::start(&guest, &["--memory-max", "1"]);
        server.get("/m3").is(200, "grown");
        server.get("/m4").is(200, "refused");
    }

    #[test]
    fn a_guest_that_begins_with_too_much_is_refused_at_the_start() {
        let large = file(
            "large.wat",
            "(component (core module $large (memory 33)) (core instance (instantiate $large)))",
        );
        run(&["serve", "--addr", "127.0.0.1:0", "--memory-max", "2", arg(&large)])
            .with_code(2)
            .says(&["begins with 3 MiB", "--memory-max allows 2"]);
    }

    #[test]
    fn a_body_that_says_that_it_is_too_long_is_refused() {
        for guest in both("long_body") {
            let server = Server::start(&guest, &["--body-max", "1"]);
            let mut client = Client::new(server.addr);
            client.send("POST /h HTTP/1.1\r\nHost: test\r\nContent-Length: 1048577\r\n\r\n");
            assert_eq!(client.reply().expect("an answer").status, 413);
        }
    }

    #[test]
    fn a_body_is_read_up_to_the_limit_and_not_beyond() {
        for guest in both("reads_body") {
            let server = Server::start(&guest, &["--body-max", "1"]);
            for (kibibytes, answer) in [(0, "0"), (3, "3072"), (1024, "1048576"), (1025, "broken")]
            {
                let mut client = Client::new(server.addr);
                client.send("POST /b HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n");
                for _ in 0..kibibytes {
                    client.send([&b"400\r\n"[..], &[b'.'; 1024], b"\r\n"].concat());
                }
                client.send("0\r\n\r\n");
                client.reply().expect("an answer").is(200, answer);
            }
            let mut client = Client::new(server.addr);
            client.send("POST /b HTTP/1.1\r\nHost: test\r\nContent-Length: 5\r\n\r\nhello");
            client.reply().expect("an answer").is(200, "5");
        }
    }

    #[test]
    fn a_request_without_a_host_is_refused() {
        for guest in both("no_host") {
            let server = Server::start(&guest, &[]);
            let mut client = Client::new(server.addr);
            client.send("GET /h HTTP/1.1\r\n\r\n");
            assert_eq!(client.reply().expect("an answer").status, 400);
            client.send("GET http://named/h HTTP/1.1\r\n\r\n");
            client.reply().expect("an answer").is(200, "hello");
        }
    }

    #[test]
    fn without_room_for_a_pool_guests_do_without_and_that_is_said() {
        let guest = guest_2("no_pool_2.wat");
        // 32 GiB of addresses: enough for a few guests, and not for the pool.
        let server = Server::start_wrapped(&["prlimit", "--as=34359738368"], &guest, &[]);
        server.get("/h").is(200, "hello");
        server.get("/m16").is(200, "grown");
        server.end().with_code(0).says(&["no pool of instances"]);
        let server = Server::start(&guest, &[]);
        server.get("/h").is(200, "hello");
        let ended = server.end().with_code(0);
        assert_eq!(ended.lines_with("pool"), 0, "{ended}");
    }
}

mod time_outs {
    use super::*;

    #[test]
    fn a_guest_that_computes_or_waits_too_long_is_ended() {
        for guest in both("too_long") {
            for backend in BACKENDS {
                let options =
                    ["--backend", backend, "--threads", "1", "--timeout", "300ms", "--stats"];
                let server = Server::start(&guest, &options);
                let asked = Asked::new();
                let computing = server.asks("/s");
                let waiting = server.asks(asked.path());
                for asking in [computing, waiting] {
                    let reply = asking.join().expect("a reply");
                    assert_eq!(reply.status, 504, "{reply:?}");
                }
                let stats = server.end().with_code(0).stats();
                assert_eq!(stats["requests"], serde_json::json!({ "timed_out": 2 }));
            }
        }
    }

    #[test]
    fn while_guests_compute_on_every_thread_others_are_answered() {
        for guest in both("computes") {
            for backend in BACKENDS {
                let options = ["--backend", backend, "--threads", "1", "--timeout", "1h"];
                let server = Server::start(&guest, &options);
                // The two begin their answers when they begin to compute.
                let mut computing = [Client::new(server.addr), Client::new(server.addr)];
                for client in &mut computing {
                    client.ask("/p");
                    let mut head = String::new();
                    client.0.read_line(&mut head).expect("an answer begins");
                    assert!(head.contains("200"), "{head}");
                }
                server.get("/h").is(200, "hello");
                let asked = Asked::new();
                let asking = server.asks(asked.path());
                asked.answer(asked.question(), "you");
                asking.join().expect("a reply").is(200, "you");
            }
        }
    }

    #[test]
    fn an_answer_that_is_cut_does_not_look_whole() {
        for guest in both("cut") {
            // Of a busy machine's guests some take long to begin: those are not cut.
            let cut = |timeout, path| {
                let server = Server::start(&guest, &["--timeout", timeout, "--stats"]);
                let mut client = Client::new(server.addr);
                client.ask(path);
                match client.reply() {
                    Ok(reply) => {
                        assert_eq!(reply.status, 504, "{path}: {reply:?}");
                        false
                    }
                    Err(cut) => {
                        assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof, "{path}: {cut}");
                        server.get("/h");
                        let stats = server.end().with_code(0).stats();
                        assert_eq!(stats["requests"]["cut"], 1, "{stats}");
                        true
                    }
                }
            };
            assert!(["300ms", "3s", "30s"].into_iter().any(|timeout| cut(timeout, "/p")));
            assert!(cut("1h", "/q"));
        }
    }
}

mod failures {
    use super::*;

    #[test]
    fn a_guest_that_fails_is_a_500_for_its_client_and_a_line_in_the_log() {
        for guest in both("fails") {
            let server = Server::start(&guest, &["--stats"]);
            let mut client = Client::new(server.addr);
            for path in ["/t", "/n"] {
                let reply = client.get(path);
                reply.is(500, "the guest failed\n");
            }
            // The connection lives on, and so does the server.
            client.get("/h").is(200, "hello");
            drop(client);
            let ended = server.end().with_code(0).says(&["GET /t", "unreachable", "GET /n"]);
            assert_eq!(
                ended.stats()["requests"],
                serde_json::json!({ "answered": 1, "failed": 2 })
            );
        }
    }

    #[test]
    fn an_address_in_use_is_exit_code_2_and_says_what_to_do() {
        let guest = guest_2("in_use_2.wat");
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        let taken = taken.local_addr().expect("its address").to_string();
        for option in ["--addr", "--metrics-addr"] {
            let free = if option == "--addr" { "--metrics-addr" } else { "--addr" };
            run(&["serve", option, &taken, free, "127.0.0.1:0", arg(&guest)]).with_code(2).says(&[
                &taken,
                "another process",
                option,
            ]);
        }
    }

    #[test]
    fn a_wrong_command_line_is_exit_code_2_and_teaches() {
        let lines: &[(&[&str], &str)] = &[
            (&["--addr", "localhost:80"], "127.0.0.1:8080"),
            (&["--addr", "127.0.0.1"], "127.0.0.1:8080"),
            (&["--metrics-addr", "9090"], "[::1]:8080"),
            (&["--timeout", "5"], "500ms"),
            (&["--grace", "0s"], "500ms"),
            (&["--requests-max", "0"], "1..=10000"),
            (&["--memory-max", "4097"], "1..=4096"),
            (&["--backend", "epoll"], "stock"),
        ];
        for (options, teaches) in lines {
            run(&[&["serve"], *options, &[CYCLE]].concat()).with_code(2).says(&["--help", teaches]);
        }
        // TEST-NET-1 (RFC 5737): no host has it.
        run(&["serve", "--addr", "192.0.2.1:0", CYCLE])
            .with_code(2)
            .says(&["192.0.2.1:0", "does not have this address"]);
    }

    #[test]
    fn what_is_no_http_component_is_told_what_it_is() {
        let refused = |guest: &str, says: &[&str]| {
            for backend in BACKENDS {
                let options = ["serve", "--backend", backend, "--addr", "127.0.0.1:0", guest];
                run(&options).with_code(2).says(says);
            }
        };
        refused(CYCLE, &["incoming-handler", "wasi:cli/run@0.2.0", "`wasi-uring run`"]);
        refused(tool::CYCLE_3, &["wasi:http/handler", "wasi:cli/run@0.3.0", "`wasi-uring run`"]);
        let library = file("serve_library.wat", "(component)");
        refused(arg(&library), &["nothing", "wasi:http/proxy"]);
        let module = file("serve_module.wat", "(module)");
        refused(arg(&module), &["is a core module", "wasm-tools component new"]);
        let stranger = file(
            "serve_stranger.wat",
            r#"(component (import "acme:rockets/launch@1.0.0" (instance (export "now" (func)))))"#,
        );
        refused(arg(&stranger), &["acme:rockets/launch@1.0.0", "wasi:http"]);
        refused("/nowhere/guest.wasm", &["cannot read /nowhere/guest.wasm"]);
    }

    #[test]
    fn help_says_what_is_not_offered() {
        let mut help = command(["serve", "--help"]);
        help.stdout(Stdio::piped()).stderr(Stdio::piped());
        let ended = wait(help.spawn().expect("the command")).with_code(0);
        for part in ["outgoing HTTP", "TLS", "SIGTERM", "Exit code"] {
            assert!(ended.stdout.contains(part), "nothing about {part:?} in {ended}");
        }
    }
}

mod metrics {
    use super::*;

    /// The value of a metric, with its labels.
    fn value(text: &str, name: &str) -> Option<u64> {
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    }

    #[test]
    fn a_client_that_goes_is_counted_and_its_guest_goes_on() {
        for guest in both("client_goes") {
            let server = Server::start(&guest, &["--metrics-addr", "127.0.0.1:0"]);
            let metrics = server.said_addr("metrics at http://");
            let scrape = || Client::new(metrics).get("/metrics").body;
            let asked = Asked::new();
            let mut client = Client::new(server.addr);
            client.ask(&asked.path());
            let guest = asked.question();
            drop(client);
            let gone = "wasi_uring_requests_total{outcome=\"client_gone\"}";
            until("the server knows", || value(&scrape(), gone) == Some(1));
            assert_eq!(value(&scrape(), "wasi_uring_guests"), Some(1));
            asked.answer(guest, "you");
            until("the guest has returned", || value(&scrape(), "wasi_uring_guests") == Some(0));
            let ended = server.end().with_code(0);
            assert_eq!(ended.lines_with("WARN"), 0, "{ended}");
        }
    }

    #[test]
    fn a_scrape_tells_requests_guests_and_what_went_through_the_ring() {
        for guest in both("scrape") {
            for backend in BACKENDS {
                let options = ["--backend", backend, "--metrics-addr", "127.0.0.1:0"];
                let server = Server::start(&guest, &options);
                let metrics = server.said_addr("metrics at http://");
                let scrape = || Client::new(metrics).get("/metrics").body;
                assert_eq!(value(&scrape(), "wasi_uring_guests"), Some(0));

                let asked = Asked::new();
                let asking = server.asks(asked.path());
                let guest = asked.question();
                assert_eq!(value(&scrape(), "wasi_uring_guests"), Some(1));
                asked.answer(guest, "you");
                asking.join().expect("a reply").is(200, "you");
                server.get("/t");
                until("the guests have gone", || value(&scrape(), "wasi_uring_guests") == Some(0));

                let text = scrape();
                let requests = |outcome: &str| {
                    value(&text, &format!("wasi_uring_requests_total{{outcome=\"{outcome}\"}}"))
                };
                assert_eq!(
                    (requests("answered"), requests("failed")),
                    (Some(1), Some(1)),
                    "{text}"
                );
                let expected = (backend == "uring").then_some(1);
                for name in ["sockets_created", "datagrams_sent", "datagrams_received"] {
                    let name = format!("wasi_uring_{name}_total");
                    assert_eq!(value(&text, &name), expected, "{name} in {text}");
                }

                let mut client = Client::new(metrics);
                assert!(client.get("/metrics").head.contains("text/plain; version=0.0.4"));
                assert_eq!(client.get("/").status, 404);
                client.send("POST /metrics HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n");
                assert_eq!(client.reply().expect("an answer").status, 405);
            }
        }
    }
}

mod the_end {
    use super::*;

    #[test]
    fn sigterm_and_sigint_finish_what_was_asked_for_and_refuse_the_rest() {
        for guest in both("end") {
            for backend in BACKENDS {
                for signal in [Signal::SIGTERM, Signal::SIGINT] {
                    let options = ["--backend", backend, "--grace", "1h"];
                    let server = Server::start(&guest, &options);
                    let asked = Asked::new();
                    let asking = server.asks(asked.path());
                    let guest = asked.question();
                    server.signal(signal);
                    until("nobody can connect", || TcpStream::connect(server.addr).is_err());
                    asked.answer(guest, "you");
                    asking.join().expect("a reply").is(200, "you");
                    server.ended().with_code(0);
                    // The guest's port is free.
                    UdpSocket::bind(guest).expect("nobody has it");
                }
            }
        }
    }

    #[test]
    fn a_guest_that_goes_on_after_its_answer_is_waited_for() {
        for guest in both("goes_on") {
            for backend in BACKENDS {
                let options = ["--backend", backend, "--grace", "1h", "--stats"];
                let server = Server::start(&guest, &options);
                let asked = Asked::new();
                server.get(&asked.path().replace("/u", "/l")).is(200, "hello");
                let guest = asked.question();
                server.signal(Signal::SIGTERM);
                until("nobody can connect", || TcpStream::connect(server.addr).is_err());
                asked.answer(guest, "you");
                asked.answer(asked.question(), "you");
                let stats = server.ended().with_code(0).stats();
                assert_eq!(stats["requests"], serde_json::json!({ "answered": 1 }));
            }
        }
    }

    #[test]
    fn an_idle_connection_holds_nobody_up() {
        let server = Server::start(&guest_2("idle_2.wat"), &["--grace", "1h"]);
        let mut idle = Client::new(server.addr);
        idle.get("/h").is(200, "hello");
        let mut silent = Client::new(server.addr);
        server.end().with_code(0);
        assert!(idle.is_closed() && silent.is_closed());
    }

    #[test]
    fn what_takes_longer_than_the_grace_is_ended_and_said() {
        for guest in both("grace") {
            for backend in BACKENDS {
                let options = ["--backend", backend, "--grace", "200ms", "--stats"];
                let server = Server::start(&guest, &options);
                let asked = Asked::new();
                let mut waiting = Client::new(server.addr);
                waiting.ask(&asked.path());
                asked.question();
                let mut computing = Client::new(server.addr);
                computing.ask("/p");
                let mut head = String::new();
                computing.0.read_line(&mut head).expect("an answer begins");
                server.end().with_code(1).says(&["2 guests", "200ms", "--grace"]);
                assert!(waiting.reply().is_err());
            }
        }
    }

    #[test]
    fn a_second_signal_ends_it_at_once() {
        for backend in BACKENDS {
            let guest = guest_3(&format!("second_signal_{backend}.wat"));
            let server = Server::start(&guest, &["--backend", backend, "--grace", "1h"]);
            let asked = Asked::new();
            let mut waiting = Client::new(server.addr);
            waiting.ask(&asked.path());
            let guest = asked.question();
            server.signal(Signal::SIGTERM);
            server.lines.with("a second signal ends it");
            server.signal(Signal::SIGTERM);
            let ended = server.ended();
            assert_eq!(ended.code, None, "{ended}");
            assert_eq!(ended.lines_with("trapped"), 0, "{ended}");
            if backend == "uring" {
                UdpSocket::bind(guest).expect("the ring was closed, nobody has it");
            }
        }
    }
}
