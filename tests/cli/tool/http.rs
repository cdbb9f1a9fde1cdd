//! Guests that answer HTTP, made of the built-in guests: their sockets and helpers, with a handler in place of `run`.
//!
//! A request's path is one letter and, for some, a number:
//!
//!   /h         answers "hello"
//!   /u PORT    sends "who?" to 127.0.0.1:PORT by UDP, waits for a datagram and answers with it
//!   /l PORT    answers "hello", and then sends "who?" to 127.0.0.1:PORT twice and waits for a datagram each time
//!   /m PAGES   grows its memory by so many pages at once; answers "grown" or "refused"
//!   /b         reads the request's body; answers with its length in decimal, or "broken"
//!   /o         makes a request; answers "denied" if the error is HTTP-request-denied (0.2 alone)
//!   /p         answers "part" of a body, and computes for ever
//!   /q         answers "part" of a body, and traps
//!   /s         computes for ever
//!   /t         traps
//!   /n         returns without an answer (0.2), answers with an error code (0.3)

use std::path::PathBuf;

use super::file;

/// The guest of WASI 0.2.
pub(crate) fn guest_2(name: &str) -> PathBuf {
    let cycle = include_str!("../../../src/cli/guests/cycle2.wat");
    made(name, cycle, &[TYPES_2_BEGIN, ERROR_CODE, TYPES_2].concat(), CORE_2, HANDLE_2, LIFT_2)
}

/// The guest of WASI 0.3.
pub(crate) fn guest_3(name: &str) -> PathBuf {
    let cycle = include_str!("../../../src/cli/guests/cycle3.wat");
    made(name, cycle, &[TYPES_3_BEGIN, ERROR_CODE, TYPES_3].concat(), CORE_3, HANDLE_3, LIFT_3)
}

/// Cuts a built-in guest where its program does, and puts the handler between.
fn made(
    name: &str,
    cycle: &str,
    types: &str,
    core: &[(&str, &str)],
    handle: &str,
    lift: &str,
) -> PathBuf {
    let cut = |text: &str, anchor: &str| {
        let at = text.find(anchor).unwrap_or_else(|| panic!("no {anchor:?} in a built-in guest"));
        (text[..at].to_owned(), text[at..].to_owned())
    };
    let (head, rest) = cut(cycle, "(core func $get-arguments (canon lower");
    let (lowerings, rest) = cut(&rest, "(import \"wasi\" \"get-arguments\"");
    let (program, rest) = cut(&rest, ")\n  (core instance $cycle");
    let (instance, rest) = cut(&rest, "(export \"get-arguments\"");
    // With 0.3's alias of the callback.
    let (exports, _tail) = cut(&rest, "\n  (func $run");
    let imports: Vec<_> = core
        .iter()
        .map(|(name, ty)| format!("(import \"wasi\" \"{name}\" (func ${name} {ty}))\n"))
        .collect();
    let core_exports: Vec<_> =
        core.iter().map(|(name, _)| format!("(export \"{name}\" (func ${name}))\n")).collect();
    file(
        name,
        [
            &*head,
            types,
            &lowerings,
            &imports.concat(),
            &program,
            COMMON,
            handle,
            &instance,
            &core_exports.concat(),
            &exports,
            lift,
            ")",
        ]
        .concat(),
    )
}

/// The core functions that both handlers use, behind those of the built-in guest.
const COMMON: &str = r#"
  ;; Beyond the program's own areas, and below the heap.
  (global $r i32 (i32.const 3072))
  (global $string i32 (i32.const 3200))
  ;; What came by UDP, and its length.
  (global $told (mut i32) (i32.const 0))
  (global $told-bytes (mut i32) (i32.const 0))
  (data (i32.const 1024) "who?")
  (data (i32.const 3300) "hello")
  (data (i32.const 3310) "grown")
  (data (i32.const 3320) "refused")
  (data (i32.const 3330) "part")
  (data (i32.const 3340) "broken")
  (data (i32.const 3350) "denied")
  (data (i32.const 3360) "no answer")
  (data (i32.const 3380) "localhost")
  (data (i32.const 3390) "/")

  ;; The letter of the path in $r (an option<string>); what follows it is in $string.
  (func $letter (result i32)
    (i32.store (global.get $string)
      (i32.add (i32.load offset=4 (global.get $r)) (i32.const 2)))
    (i32.store offset=4 (global.get $string)
      (i32.sub (i32.load offset=8 (global.get $r)) (i32.const 2)))
    (i32.load8_u offset=1 (i32.load offset=4 (global.get $r))))

  (func $set-host
    (i32.store16 offset=4 (global.get $host) (call $number-of (global.get $string)))
    (i32.store offset=6 (global.get $host) (i32.const 0x0100007f)))

  (func $grow (param $out i32)
    (if (i32.eq (memory.grow (call $number-of (global.get $string))) (i32.const -1))
      (then (call $answer-with (local.get $out) (i32.const 3320) (i32.const 7)))
      (else (call $answer-with (local.get $out) (i32.const 3310) (i32.const 5)))))

  ;; Answers with a number in decimal.
  (func $answer-number (param $out i32) (param $number i32)
    (local $at i32)
    (local.set $at (i32.const 3420))
    (loop $next
      (local.set $at (i32.sub (local.get $at) (i32.const 1)))
      (i32.store8 (local.get $at)
        (i32.add (i32.const 48) (i32.rem_u (local.get $number) (i32.const 10))))
      (br_if $next (local.tee $number (i32.div_u (local.get $number) (i32.const 10)))))
    (call $answer-with (local.get $out)
      (local.get $at) (i32.sub (i32.const 3420) (local.get $at))))

  (func $compute-for-ever
    (loop $for-ever (call $compute) (br $for-ever)))

  ;; What both versions do; 1 if the letter is one of these.
  (func $common (param $letter i32) (param $out i32) (result i32)
    (if (i32.eq (local.get $letter) (i32.const 0x68)) (then
      (call $answer-with (local.get $out) (i32.const 3300) (i32.const 5))
      (return (i32.const 1))))
    (if (i32.eq (local.get $letter) (i32.const 0x75)) (then
      (call $set-host)
      (if (call $ask)
        (then (call $answer-with (local.get $out) (i32.const 3360) (i32.const 9)))
        (else (call $answer-with (local.get $out) (global.get $told) (global.get $told-bytes))))
      (return (i32.const 1))))
    (if (i32.eq (local.get $letter) (i32.const 0x6c)) (then
      (call $set-host)
      (call $answer-with (local.get $out) (i32.const 3300) (i32.const 5))
      (if (call $ask) (then unreachable))
      (if (call $ask) (then unreachable))
      (return (i32.const 1))))
    (if (i32.eq (local.get $letter) (i32.const 0x6d)) (then
      (call $grow (local.get $out))
      (return (i32.const 1))))
    (if (i32.eq (local.get $letter) (i32.const 0x70)) (then
      (call $begin-answer (local.get $out) (i32.const 3330) (i32.const 4))
      (call $compute-for-ever)))
    (if (i32.eq (local.get $letter) (i32.const 0x71)) (then
      (call $begin-answer (local.get $out) (i32.const 3330) (i32.const 4))
      unreachable))
    (if (i32.eq (local.get $letter) (i32.const 0x73)) (then (call $compute-for-ever)))
    (if (i32.eq (local.get $letter) (i32.const 0x74)) (then unreachable))
    (i32.const 0))
"#;

/// The same in both versions' wasi:http/types.
const ERROR_CODE: &str = r#"
    (type $dns (record (field "rcode" (option string)) (field "info-code" (option u16))))
    (export "DNS-error-payload" (type $dns' (eq $dns)))
    (type $tls (record (field "alert-id" (option u8)) (field "alert-message" (option string))))
    (export "TLS-alert-received-payload" (type $tls' (eq $tls)))
    (type $size (record (field "field-name" (option string)) (field "field-size" (option u32))))
    (export "field-size-payload" (type $size' (eq $size)))
    (type $http-error (variant
      (case "DNS-timeout") (case "DNS-error" $dns') (case "destination-not-found")
      (case "destination-unavailable") (case "destination-IP-prohibited")
      (case "destination-IP-unroutable") (case "connection-refused") (case "connection-terminated")
      (case "connection-timeout") (case "connection-read-timeout")
      (case "connection-write-timeout") (case "connection-limit-reached")
      (case "TLS-protocol-error") (case "TLS-certificate-error") (case "TLS-alert-received" $tls')
      (case "HTTP-request-denied") (case "HTTP-request-length-required")
      (case "HTTP-request-body-size" (option u64)) (case "HTTP-request-method-invalid")
      (case "HTTP-request-URI-invalid") (case "HTTP-request-URI-too-long")
      (case "HTTP-request-header-section-size" (option u32))
      (case "HTTP-request-header-size" (option $size'))
      (case "HTTP-request-trailer-section-size" (option u32))
      (case "HTTP-request-trailer-size" $size') (case "HTTP-response-incomplete")
      (case "HTTP-response-header-section-size" (option u32))
      (case "HTTP-response-header-size" $size') (case "HTTP-response-body-size" (option u64))
      (case "HTTP-response-trailer-section-size" (option u32))
      (case "HTTP-response-trailer-size" $size')
      (case "HTTP-response-transfer-coding" (option string))
      (case "HTTP-response-content-coding" (option string)) (case "HTTP-response-timeout")
      (case "HTTP-upgrade-failed") (case "HTTP-protocol-error") (case "loop-detected")
      (case "configuration-error") (case "internal-error" (option string))))
    (export "error-code" (type $http-error' (eq $http-error)))
"#;

const TYPES_2_BEGIN: &str = r#"
  (import "wasi:io/error@0.2.0" (instance $error (export "error" (type (sub resource)))))
  (alias export $error "error" (type $error))
  (import "wasi:io/streams@0.2.0" (instance $streams
    (export "error" (type $error' (eq $error)))
    (type $stream-error (variant (case "last-operation-failed" (own $error')) (case "closed")))
    (export "stream-error" (type $stream-error' (eq $stream-error)))
    (export "input-stream" (type $input (sub resource)))
    (export "output-stream" (type $output (sub resource)))
    (export "[method]input-stream.blocking-read" (func
      (param "self" (borrow $input)) (param "len" u64)
      (result (result (list u8) (error $stream-error')))))
    (export "[method]output-stream.blocking-write-and-flush" (func
      (param "self" (borrow $output)) (param "contents" (list u8))
      (result (result (error $stream-error')))))))
  (alias export $streams "input-stream" (type $input))
  (alias export $streams "output-stream" (type $output))
  (import "wasi:http/types@0.2.0" (instance $http
    (export "pollable" (type $pollable' (eq $pollable)))
    (export "input-stream" (type $input' (eq $input)))
    (export "output-stream" (type $output' (eq $output)))
"#;

const TYPES_2: &str = r#"
    (export "fields" (type $fields (sub resource)))
    (export "incoming-request" (type $request (sub resource)))
    (export "incoming-body" (type $incoming-body (sub resource)))
    (export "outgoing-response" (type $response (sub resource)))
    (export "outgoing-body" (type $body (sub resource)))
    (export "response-outparam" (type $out (sub resource)))
    (export "outgoing-request" (type $question (sub resource)))
    (export "request-options" (type $question-options (sub resource)))
    (export "incoming-response" (type $incoming-response (sub resource)))
    (export "future-incoming-response" (type $future (sub resource)))
    (export "[constructor]fields" (func (result (own $fields))))
    (export "[method]incoming-request.path-with-query" (func
      (param "self" (borrow $request)) (result (option string))))
    (export "[method]incoming-request.consume" (func
      (param "self" (borrow $request)) (result (result (own $incoming-body)))))
    (export "[method]incoming-body.stream" (func
      (param "self" (borrow $incoming-body)) (result (result (own $input')))))
    (export "[constructor]outgoing-response" (func
      (param "headers" (own $fields)) (result (own $response))))
    (export "[method]outgoing-response.body" (func
      (param "self" (borrow $response)) (result (result (own $body)))))
    (export "[method]outgoing-body.write" (func
      (param "self" (borrow $body)) (result (result (own $output')))))
    (export "[static]outgoing-body.finish" (func
      (param "this" (own $body)) (param "trailers" (option (own $fields)))
      (result (result (error $http-error')))))
    (export "[static]response-outparam.set" (func
      (param "param" (own $out)) (param "response" (result (own $response) (error $http-error')))))
    (export "[constructor]outgoing-request" (func
      (param "headers" (own $fields)) (result (own $question))))
    (export "[method]outgoing-request.set-path-with-query" (func
      (param "self" (borrow $question)) (param "path-with-query" (option string)) (result (result))))
    (export "[method]outgoing-request.set-authority" (func
      (param "self" (borrow $question)) (param "authority" (option string)) (result (result))))
    (export "[method]future-incoming-response.subscribe" (func
      (param "self" (borrow $future)) (result (own $pollable'))))
    (export "[method]future-incoming-response.get" (func (param "self" (borrow $future))
      (result (option (result (result (own $incoming-response) (error $http-error')))))))))
  (alias export $http "error-code" (type $http-error))
  (alias export $http "incoming-request" (type $request))
  (alias export $http "response-outparam" (type $out))
  (alias export $http "outgoing-request" (type $question))
  (alias export $http "request-options" (type $question-options))
  (alias export $http "future-incoming-response" (type $future))
  (import "wasi:http/outgoing-handler@0.2.0" (instance $asking
    (export "outgoing-request" (type $question' (eq $question)))
    (export "request-options" (type $question-options' (eq $question-options)))
    (export "future-incoming-response" (type $future' (eq $future)))
    (export "error-code" (type $http-error' (eq $http-error)))
    (export "handle" (func
      (param "request" (own $question')) (param "options" (option (own $question-options')))
      (result (result (own $future') (error $http-error')))))))
  (core func $read (canon lower
    (func $streams "[method]input-stream.blocking-read") (memory $memory) (realloc $realloc)))
  (core func $write (canon lower
    (func $streams "[method]output-stream.blocking-write-and-flush") (memory $memory)))
  (core func $drop-output (canon resource.drop $output))
  (core func $new-fields (canon lower (func $http "[constructor]fields")))
  (core func $path (canon lower
    (func $http "[method]incoming-request.path-with-query") (memory $memory) (realloc $realloc)))
  (core func $consume (canon lower
    (func $http "[method]incoming-request.consume") (memory $memory)))
  (core func $body-stream (canon lower
    (func $http "[method]incoming-body.stream") (memory $memory)))
  (core func $new-response (canon lower (func $http "[constructor]outgoing-response")))
  (core func $response-body (canon lower
    (func $http "[method]outgoing-response.body") (memory $memory)))
  (core func $body-write (canon lower
    (func $http "[method]outgoing-body.write") (memory $memory)))
  (core func $finish (canon lower
    (func $http "[static]outgoing-body.finish") (memory $memory) (realloc $realloc)))
  (core func $set-out (canon lower
    (func $http "[static]response-outparam.set") (memory $memory)))
  (core func $new-question (canon lower (func $http "[constructor]outgoing-request")))
  (core func $set-path (canon lower
    (func $http "[method]outgoing-request.set-path-with-query") (memory $memory)))
  (core func $set-authority (canon lower
    (func $http "[method]outgoing-request.set-authority") (memory $memory)))
  (core func $ask-out (canon lower
    (func $asking "handle") (memory $memory) (realloc $realloc)))
  (core func $subscribe-future (canon lower
    (func $http "[method]future-incoming-response.subscribe")))
  (core func $get-future (canon lower
    (func $http "[method]future-incoming-response.get") (memory $memory) (realloc $realloc)))
"#;

/// Name and type of each core function that the handler of 0.2 imports.
const CORE_2: &[(&str, &str)] = &[
    ("read", "(param i32 i64 i32)"),
    ("write", "(param i32 i32 i32 i32)"),
    ("drop-output", "(param i32)"),
    ("new-fields", "(result i32)"),
    ("path", "(param i32 i32)"),
    ("consume", "(param i32 i32)"),
    ("body-stream", "(param i32 i32)"),
    ("new-response", "(param i32) (result i32)"),
    ("response-body", "(param i32 i32)"),
    ("body-write", "(param i32 i32)"),
    ("finish", "(param i32 i32 i32 i32)"),
    ("set-out", "(param i32 i32 i32 i32 i64 i32 i32 i32 i32)"),
    ("new-question", "(param i32) (result i32)"),
    ("set-path", "(param i32 i32 i32 i32) (result i32)"),
    ("set-authority", "(param i32 i32 i32 i32) (result i32)"),
    ("ask-out", "(param i32 i32 i32 i32)"),
    ("subscribe-future", "(param i32) (result i32)"),
    ("get-future", "(param i32 i32)"),
];

const HANDLE_2: &str = r#"
  (global $body (mut i32) (i32.const 0))
  (global $body-out (mut i32) (i32.const 0))

  ;; Sends the answer's head and these bytes.
  (func $begin-answer (param $out i32) (param $data i32) (param $bytes i32)
    (local $response i32)
    (local.set $response (call $new-response (call $new-fields)))
    (call $response-body (local.get $response) (global.get $r))
    (global.set $body (i32.load offset=4 (global.get $r)))
    (call $body-write (global.get $body) (global.get $r))
    (global.set $body-out (i32.load offset=4 (global.get $r)))
    (call $set-out (local.get $out) (i32.const 0) (local.get $response) (i32.const 0) (i64.const 0)
      (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0))
    (call $write (global.get $body-out) (local.get $data) (local.get $bytes) (global.get $r)))

  (func $answer-with (param $out i32) (param $data i32) (param $bytes i32)
    (call $begin-answer (local.get $out) (local.get $data) (local.get $bytes))
    (call $drop-output (global.get $body-out))
    (call $finish (global.get $body) (i32.const 0) (i32.const 0) (global.get $r)))

  ;; Asks $host; 1 for failure.
  (func $ask (result i32)
    (local $letter i32)
    (global.set $network (call $instance-network))
    (block $failed
      (br_if $failed (call $open (global.get $a) (global.get $host)))
      (br_if $failed
        (call $send-one (global.get $a) (i32.const 1024) (i32.const 4) (i32.const 0)))
      (call $wait-incoming (global.get $a))
      (br_if $failed (i32.eqz (call $take (global.get $a) (i32.const 1))))
      (local.set $letter (i32.load offset=4 (global.get $answer)))
      (global.set $told (i32.load (local.get $letter)))
      (global.set $told-bytes (i32.load offset=4 (local.get $letter)))
      (call $close (global.get $a))
      (call $drop-network (global.get $network))
      (return (i32.const 0)))
    (i32.const 1))

  (func $read-body (param $request i32) (param $out i32)
    (local $stream i32) (local $bytes i32)
    (call $consume (local.get $request) (global.get $r))
    (call $body-stream (i32.load offset=4 (global.get $r)) (global.get $r))
    (local.set $stream (i32.load offset=4 (global.get $r)))
    (loop $more
      (call $free-all)
      (call $read (local.get $stream) (i64.const 4096) (global.get $r))
      (if (i32.eqz (i32.load8_u (global.get $r))) (then
        (local.set $bytes (i32.add (local.get $bytes) (i32.load offset=8 (global.get $r))))
        (br $more))))
    (if (i32.ne (i32.load8_u offset=4 (global.get $r)) (i32.const 1)) (then
      (call $answer-with (local.get $out) (i32.const 3340) (i32.const 6))
      (return)))
    (call $answer-number (local.get $out) (local.get $bytes)))

  (func $ask-http (param $out i32)
    (local $question i32) (local $future i32)
    (local.set $question (call $new-question (call $new-fields)))
    (drop (call $set-path
      (local.get $question) (i32.const 1) (i32.const 3390) (i32.const 1)))
    (drop (call $set-authority
      (local.get $question) (i32.const 1) (i32.const 3380) (i32.const 9)))
    (call $ask-out (local.get $question) (i32.const 0) (i32.const 0) (global.get $r))
    (if (i32.load8_u (global.get $r)) (then unreachable))
    (local.set $future (i32.load offset=8 (global.get $r)))
    (call $wait (call $subscribe-future (local.get $future)))
    (call $get-future (local.get $future) (global.get $r))
    ;; An option of a result of a result, each of which pads to eight bytes: some, ok, error, HTTP-request-denied.
    (if (i32.ne (i32.load8_u (global.get $r)) (i32.const 1)) (then unreachable))
    (if (i32.load8_u offset=8 (global.get $r)) (then unreachable))
    (if (i32.ne (i32.load8_u offset=16 (global.get $r)) (i32.const 1)) (then unreachable))
    (if (i32.ne (i32.load8_u offset=24 (global.get $r)) (i32.const 15)) (then unreachable))
    (call $answer-with (local.get $out) (i32.const 3350) (i32.const 6)))

  (func (export "handle") (param $request i32) (param $out i32)
    (local $letter i32)
    (call $path (local.get $request) (global.get $r))
    (local.set $letter (call $letter))
    (if (call $common (local.get $letter) (local.get $out)) (then (return)))
    (if (i32.eq (local.get $letter) (i32.const 0x62)) (then
      (call $read-body (local.get $request) (local.get $out))))
    (if (i32.eq (local.get $letter) (i32.const 0x6f)) (then (call $ask-http (local.get $out)))))
"#;

const LIFT_2: &str = r#"
  (func $handle (param "request" (own $request)) (param "response-out" (own $out))
    (canon lift (core func $cycle "handle")))
  (instance $handler (export "handle" (func $handle)))
  (export "wasi:http/incoming-handler@0.2.0" (instance $handler))
"#;

const TYPES_3_BEGIN: &str = r#"
  (import "wasi:http/types@0.3.0" (instance $http
"#;

const TYPES_3: &str = r#"
    (export "fields" (type $fields (sub resource)))
    (export "request" (type $request (sub resource)))
    (export "response" (type $response (sub resource)))
    (export "[constructor]fields" (func (result (own $fields))))
    (export "[method]request.get-path-with-query" (func
      (param "self" (borrow $request)) (result (option string))))
    (export "[static]request.consume-body" (func
      (param "this" (own $request)) (param "res" (future (result (error $http-error'))))
      (result (tuple (stream u8) (future (result (option (own $fields)) (error $http-error')))))))
    (export "[static]response.new" (func
      (param "headers" (own $fields)) (param "contents" (option (stream u8)))
      (param "trailers" (future (result (option (own $fields)) (error $http-error'))))
      (result (tuple (own $response) (future (result (error $http-error')))))))))
  (alias export $http "error-code" (type $http-error))
  (alias export $http "fields" (type $fields))
  (alias export $http "request" (type $request))
  (alias export $http "response" (type $response))
  (type $contents (stream u8))
  (type $trailers (future (result (option (own $fields)) (error $http-error))))
  (type $written (future (result (error $http-error))))
  (core func $new-fields (canon lower (func $http "[constructor]fields")))
  (core func $path (canon lower
    (func $http "[method]request.get-path-with-query") (memory $memory) (realloc $realloc)))
  (core func $new-response (canon lower (func $http "[static]response.new") (memory $memory)))
  (core func $consume (canon lower (func $http "[static]request.consume-body") (memory $memory)))
  (core func $new-contents (canon stream.new $contents))
  (core func $read-contents (canon stream.read $contents async (memory $memory)))
  (core func $drop-read (canon stream.drop-readable $contents))
  (core func $read-trailers (canon future.read $trailers async (memory $memory) (realloc $realloc)))
  (core func $drop-read-trailers (canon future.drop-readable $trailers))
  (core func $new-written (canon future.new $written))
  (core func $write-contents (canon stream.write $contents async (memory $memory)))
  (core func $drop-contents (canon stream.drop-writable $contents))
  (core func $new-trailers (canon future.new $trailers))
  (core func $write-trailers (canon future.write $trailers async (memory $memory)))
  (core func $drop-trailers (canon future.drop-writable $trailers))
  (core func $drop-written (canon future.drop-readable $written))
  (core func $return (canon task.return
    (result (result (own $response) (error $http-error))) (memory $memory)))
"#;

const CORE_3: &[(&str, &str)] = &[
    ("new-fields", "(result i32)"),
    ("path", "(param i32 i32)"),
    ("new-response", "(param i32 i32 i32 i32 i32)"),
    ("consume", "(param i32 i32 i32)"),
    ("new-contents", "(result i64)"),
    ("read-contents", "(param i32 i32 i32) (result i32)"),
    ("drop-read", "(param i32)"),
    ("read-trailers", "(param i32 i32) (result i32)"),
    ("drop-read-trailers", "(param i32)"),
    ("new-written", "(result i64)"),
    ("write-contents", "(param i32 i32 i32) (result i32)"),
    ("drop-contents", "(param i32)"),
    ("new-trailers", "(result i64)"),
    ("write-trailers", "(param i32 i32) (result i32)"),
    ("drop-trailers", "(param i32)"),
    ("drop-written", "(param i32)"),
    ("return", "(param i32 i32 i32 i64 i32 i32 i32 i32)"),
];

const HANDLE_3: &str = r#"
  ;; The ends to write to.
  (global $contents (mut i32) (i32.const 0))
  (global $trailers (mut i32) (i32.const 0))

  ;; What a read or a write on this end came to: 16 times its bytes, plus 1 if the other end is gone. Waits if it was
  ;; not done at once (-1: blocked).
  (func $done (param $end i32) (param $status i32) (result i32)
    (if (i32.ne (local.get $status) (i32.const -1)) (then (return (local.get $status))))
    (call $join (local.get $end) (global.get $set))
    (drop (call $wait-set (global.get $set) (global.get $event)))
    (call $join (local.get $end) (i32.const 0))
    (i32.load offset=4 (global.get $event)))

  (func $read-body (param $request i32)
    (local $stream i32) (local $trailers i32) (local $status i32) (local $bytes i32)
    ;; Nobody is told how reading went.
    (call $consume (local.get $request) (i32.wrap_i64 (call $new-written)) (global.get $r))
    (local.set $stream (i32.load (global.get $r)))
    (local.set $trailers (i32.load offset=4 (global.get $r)))
    (loop $more
      (local.set $status (call $done (local.get $stream)
        (call $read-contents (local.get $stream) (i32.const 32768) (i32.const 4096))))
      (local.set $bytes (i32.add (local.get $bytes)
        (i32.shr_u (local.get $status) (i32.const 4))))
      (br_if $more (i32.eqz (i32.and (local.get $status) (i32.const 15)))))
    (call $drop-read (local.get $stream))
    (drop (call $done (local.get $trailers)
      (call $read-trailers (local.get $trailers) (global.get $r))))
    (call $drop-read-trailers (local.get $trailers))
    (if (i32.load8_u (global.get $r))
      (then (call $answer-with (i32.const 0) (i32.const 3340) (i32.const 6)))
      (else (call $answer-number (i32.const 0) (local.get $bytes)))))

  ;; Sends the answer's head and these bytes, and waits until they are taken. ($out is 0.2's.)
  (func $begin-answer (param $out i32) (param $data i32) (param $bytes i32)
    (local $contents i64) (local $trailers i64)
    ;; The end to read from is in the lower half.
    (local.set $contents (call $new-contents))
    (local.set $trailers (call $new-trailers))
    (global.set $contents (i32.wrap_i64 (i64.shr_u (local.get $contents) (i64.const 32))))
    (global.set $trailers (i32.wrap_i64 (i64.shr_u (local.get $trailers) (i64.const 32))))
    (call $new-response (call $new-fields)
      (i32.const 1) (i32.wrap_i64 (local.get $contents)) (i32.wrap_i64 (local.get $trailers))
      (global.get $r))
    (call $drop-written (i32.load offset=4 (global.get $r)))
    (call $return (i32.const 0) (i32.load (global.get $r)) (i32.const 0) (i64.const 0)
      (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0))
    (drop (call $done (global.get $contents)
      (call $write-contents (global.get $contents) (local.get $data) (local.get $bytes)))))

  (func $answer-with (param $out i32) (param $data i32) (param $bytes i32)
    (call $begin-answer (local.get $out) (local.get $data) (local.get $bytes))
    (call $drop-contents (global.get $contents))
    ;; Ok, and none.
    (memory.fill (global.get $r) (i32.const 0) (i32.const 64))
    (drop (call $done (global.get $trailers)
      (call $write-trailers (global.get $trailers) (global.get $r))))
    (call $drop-trailers (global.get $trailers)))

  ;; Asks $host; 1 for failure.
  (func $ask (result i32)
    (block $failed
      (br_if $failed (call $dial (global.get $a) (global.get $host)))
      (br_if $failed
        (call $send-one (global.get $a) (i32.const 1024) (i32.const 4) (i32.const 0)))
      (br_if $failed (call $take (global.get $a)))
      (global.set $told (i32.load offset=4 (global.get $answer)))
      (global.set $told-bytes (i32.load offset=8 (global.get $answer)))
      (call $close (global.get $a))
      (return (i32.const 0)))
    (i32.const 1))

  (func (export "handle") (param $request i32) (result i32)
    (local $letter i32)
    (global.set $set (call $new-set))
    (call $path (local.get $request) (global.get $r))
    (local.set $letter (call $letter))
    (if (i32.eq (local.get $letter) (i32.const 0x62)) (then
      (call $read-body (local.get $request))
      (return (i32.const 0))))
    (if (i32.eqz (call $common (local.get $letter) (i32.const 0))) (then
      ;; HTTP-response-timeout, say.
      (call $return (i32.const 1) (i32.const 33) (i32.const 0) (i64.const 0)
        (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0))))
    (i32.const 0))
"#;

const LIFT_3: &str = r#"
  (func $handle async (param "request" (own $request))
    (result (result (own $response) (error $http-error)))
    (canon lift (core func $cycle "handle") async (memory $memory) (callback $callback)))
  (instance $handler (export "handle" (func $handle)))
  (export "wasi:http/handler@0.3.0" (instance $handler))
"#;
