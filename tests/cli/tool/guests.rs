//! Small guests for single purposes, as text.

use std::path::PathBuf;

use super::file;

/// A guest without imports whose `run` is these instructions.
pub(crate) fn plain(name: &str, instructions: &str) -> PathBuf {
    file(
        name,
        format!(
            r#"(component
              (core module $module (func (export "run") (result i32) {instructions}))
              (core instance $instance (instantiate $module))
              (func $run (result (result)) (canon lift (core func $instance "run")))
              (instance $command (export "run" (func $run)))
              (export "wasi:cli/run@0.2.0" (instance $command)))"#
        ),
    )
}

/// A guest of WASI 0.3 whose `run`, which is async, is these instructions; they may call `$exit`.
pub(crate) fn plain_3(name: &str, instructions: &str) -> PathBuf {
    file(
        name,
        format!(
            r#"(component
              (import "wasi:cli/exit@0.3.0" (instance $exit
                (export "exit" (func (param "status" (result))))))
              (core func $exit (canon lower (func $exit "exit")))
              (core func $return (canon task.return (result (result))))
              (core module $module
                (import "" "exit" (func $exit (param i32)))
                (import "" "return" (func $return (param i32)))
                (func (export "run") (result i32) {instructions} call $return i32.const 0)
                (func (export "callback") (param i32 i32 i32) (result i32) unreachable))
              (core instance $instance (instantiate $module (with "" (instance
                (export "exit" (func $exit))
                (export "return" (func $return))))))
              (func $run async (result (result)) (canon lift (core func $instance "run") async
                (callback (core func $instance "callback"))))
              (instance $command (export "run" (func $run)))
              (export "wasi:cli/run@0.3.0" (instance $command)))"#
        ),
    )
}

/// A guest that calls `wasi:cli/exit` with ok (0) or err (1).
pub(crate) fn exiting(name: &str, status: u32) -> PathBuf {
    file(
        name,
        format!(
            r#"(component
              (import "wasi:cli/exit@0.2.0" (instance $exit
                (export "exit" (func (param "status" (result))))))
              (core func $exit (canon lower (func $exit "exit")))
              (core module $module
                (import "" "exit" (func $exit (param i32)))
                (func (export "run") (result i32) (call $exit (i32.const {status})) (i32.const 0)))
              (core instance $instance
                (instantiate $module (with "" (instance (export "exit" (func $exit))))))
              (func $run (result (result)) (canon lift (core func $instance "run")))
              (instance $command (export "run" (func $run)))
              (export "wasi:cli/run@0.2.0" (instance $command)))"#
        ),
    )
}

/// A guest that writes its environment to stdout, a line `NAME=VALUE` each, so many times; it
/// returns an error if it cannot.
pub(crate) fn printing(name: &str, times: u32) -> PathBuf {
    file(name, PRINTING.replace("TIMES", &times.to_string()))
}

const PRINTING: &str = r#"(component
  (import "wasi:cli/environment@0.2.0" (instance $environment
    (export "get-environment" (func (result (list (tuple string string)))))))
  (import "wasi:io/error@0.2.0" (instance $error (export "error" (type (sub resource)))))
  (alias export $error "error" (type $error))
  (import "wasi:io/streams@0.2.0" (instance $streams
    (export "error" (type $error' (eq $error)))
    (type $stream-error (variant (case "last-operation-failed" (own $error')) (case "closed")))
    (export "stream-error" (type $stream-error' (eq $stream-error)))
    (export "output-stream" (type $output (sub resource)))
    (export "[method]output-stream.blocking-write-and-flush" (func
      (param "self" (borrow $output)) (param "contents" (list u8))
      (result (result (error $stream-error')))))))
  (alias export $streams "output-stream" (type $output))
  (import "wasi:cli/stdout@0.2.0" (instance $stdout
    (export "output-stream" (type $output' (eq $output)))
    (export "get-stdout" (func (result (own $output'))))))

  (core module $heap-module
    (memory (export "memory") 16)
    (global $next (mut i32) (i32.const 1024))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $next) (i32.const 7)) (i32.const -8)))
      (global.set $next (i32.add (local.get $at) (local.get 3)))
      (local.get $at)))
  (core instance $heap (instantiate $heap-module))
  (alias core export $heap "memory" (core memory $memory))
  (alias core export $heap "realloc" (core func $realloc))
  (core func $get-environment (canon lower
    (func $environment "get-environment") (memory $memory) (realloc $realloc)))
  (core func $write (canon lower
    (func $streams "[method]output-stream.blocking-write-and-flush") (memory $memory)))
  (core func $get-stdout (canon lower (func $stdout "get-stdout")))

  (core module $module
    (import "" "memory" (memory 1))
    (import "" "get-environment" (func $get-environment (param i32)))
    (import "" "write" (func $write (param i32 i32 i32 i32)))
    (import "" "get-stdout" (func $get-stdout (result i32)))
    (data (i32.const 64) "=\n")
    (global $out (mut i32) (i32.const 0))
    (global $failed (mut i32) (i32.const 0))

    (func $print (param $data i32) (param $bytes i32)
      (call $write (global.get $out) (local.get $data) (local.get $bytes) (i32.const 16))
      (global.set $failed (i32.or (global.get $failed) (i32.load8_u (i32.const 16)))))

    (func (export "run") (result i32)
      (local $times i32) (local $at i32) (local $end i32)
      (global.set $out (call $get-stdout))
      (call $get-environment (i32.const 32))
      (local.set $end (i32.add
        (i32.load (i32.const 32)) (i32.shl (i32.load (i32.const 36)) (i32.const 4))))
      (local.set $times (i32.const TIMES))
      (loop $again
        (local.set $at (i32.load (i32.const 32)))
        (loop $next
          (if (i32.lt_u (local.get $at) (local.get $end)) (then
            (call $print (i32.load (local.get $at)) (i32.load offset=4 (local.get $at)))
            (call $print (i32.const 64) (i32.const 1))
            (call $print (i32.load offset=8 (local.get $at)) (i32.load offset=12 (local.get $at)))
            (call $print (i32.const 65) (i32.const 1))
            (local.set $at (i32.add (local.get $at) (i32.const 16)))
            (br $next))))
        (br_if $again (i32.and
          (i32.eqz (global.get $failed))
          (local.tee $times (i32.sub (local.get $times) (i32.const 1))))))
      (global.get $failed)))
  (core instance $instance (instantiate $module (with "" (instance
    (export "memory" (memory $memory))
    (export "get-environment" (func $get-environment))
    (export "write" (func $write))
    (export "get-stdout" (func $get-stdout))))))
  (func $run (result (result)) (canon lift (core func $instance "run")))
  (instance $command (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $command)))
"#;

/// What a [`variant`] adds to the built-in guest, and what it does instead.
#[derive(Default)]
pub(crate) struct Variant<'a> {
    /// Imports of the component, lowered to core functions.
    pub(crate) imports: &'a str,
    /// Imports of the core module from "wasi".
    pub(crate) core_imports: &'a str,
    /// The exports that satisfy them.
    pub(crate) core_exports: &'a str,
    /// Locals of `run` beside `$n`.
    pub(crate) locals: &'a str,
    /// The body of `run`, which leaves 0 for ok or 1 for err.
    pub(crate) run: &'a str,
}

/// The built-in guest with another `run`, which finds sockets, network and helpers at hand.
pub(crate) fn variant(name: &str, variant: &Variant<'_>) -> PathBuf {
    const CYCLE: &str = include_str!("../../../src/cli/guests/cycle2.wat");
    let cut = |text: &str, anchor: &str| {
        let at = text.find(anchor).unwrap_or_else(|| panic!("cycle2.wat has no {anchor:?}"));
        (text[..at].to_owned(), text[at..].to_owned())
    };
    let (head, rest) = cut(CYCLE, "(core func $get-arguments (canon lower");
    let (lowerings, rest) = cut(&rest, "(import \"wasi\" \"get-arguments\"");
    let (program, rest) = cut(&rest, "(func (export \"run\")");
    let (_run, rest) = cut(&rest, ")\n  (core instance $cycle");
    let (instance, tail) = cut(&rest, "(export \"get-arguments\"");
    let Variant { imports, core_imports, core_exports, locals, run } = variant;
    let run = format!(
        "(func (export \"run\") (result i32)
           (local $n i32) {locals}
           (global.set $network (call $instance-network))
           {run})"
    );
    file(
        name,
        [&*head, imports, &lowerings, core_imports, &program, &run, &instance, core_exports, &tail]
            .concat(),
    )
}

/// Numbers of `wasi:sockets/network.error-code`.
pub(crate) const ACCESS_DENIED: u32 = 1;
pub(crate) const NEW_SOCKET_LIMIT: u32 = 10;
pub(crate) const PERMANENT_RESOLVER_FAILURE: u32 = 20;

/// The twelve core values of an IPv4 address.
fn flat(addr: [u8; 4], port: u16) -> String {
    let [a, b, c, d] = addr;
    format!(
        "(i32.const 0) (i32.const {port}) (i32.const {a}) (i32.const {b}) (i32.const {c}) \
         (i32.const {d}) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) \
         (i32.const 0)"
    )
}

/// 1 if the answer is this error; its code lies where the other case's value would.
fn is_error(code: u32, offset: u32) -> String {
    format!(
        "(i32.and (call $failed)
           (i32.eq (i32.load8_u offset={offset} (global.get $answer)) (i32.const {code})))"
    )
}

/// A guest that binds a UDP socket to an address, several times over; an error if all is refused.
pub(crate) fn binding(name: &str, addr: [u8; 4], times: u32) -> PathBuf {
    let run = format!(
        "(loop $again
           (if (call $create (global.get $a) (i32.const 0)) (then (return (i32.const 1))))
           (call $start-bind (i32.load (global.get $a)) (global.get $network) {addr} (global.get $answer))
           (local.set $refused (i32.add (local.get $refused) {denied}))
           (call $close (global.get $a))
           (local.set $n (i32.add (local.get $n) (i32.const 1)))
           (br_if $again (i32.lt_u (local.get $n) (i32.const {times}))))
         (i32.eq (local.get $refused) (i32.const {times}))",
        addr = flat(addr, 0),
        denied = is_error(ACCESS_DENIED, 1),
    );
    variant(name, &Variant { locals: "(local $refused i32)", run: &run, ..Variant::default() })
}

/// A guest that binds a UDP socket to an address, receives from it once, and computes for ever.
pub(crate) fn holding(name: &str, addr: [u8; 4], port: u16) -> PathBuf {
    let run = format!(
        "(if (call $create (global.get $a) (i32.const 0)) (then (return (i32.const 1))))
         (call $start-bind (i32.load (global.get $a)) (global.get $network) {addr} (global.get $answer))
         (call $finish-bind (i32.load (global.get $a)) (global.get $answer))
         (if (call $failed) (then (return (i32.const 1))))
         (call $stream (i32.load (global.get $a)) (i32.const 0) {none} (global.get $answer))
         (call $receive (i32.load offset=4 (global.get $answer)) (i64.const 1) (global.get $answer))
         (loop $for-ever (br $for-ever))
         unreachable",
        addr = flat(addr, port),
        none = flat([0; 4], 0),
    );
    variant(name, &Variant { run: &run, ..Variant::default() })
}

/// A guest that connects a UDP socket to an address; an error if that is refused.
pub(crate) fn connecting(name: &str, addr: [u8; 4], port: u16) -> PathBuf {
    let run = format!(
        "(if (call $create (global.get $a) (i32.const 0)) (then (return (i32.const 1))))
         (if (call $bind-loopback (global.get $a) (i32.const 0)) (then (return (i32.const 1))))
         (call $stream (i32.load (global.get $a)) (i32.const 1) {addr} (global.get $answer))
         {denied}",
        addr = flat(addr, port),
        denied = is_error(ACCESS_DENIED, 4),
    );
    variant(name, &Variant { run: &run, ..Variant::default() })
}

/// A guest that binds a TCP socket to an address; an error if that is refused.
pub(crate) fn binding_tcp(name: &str, addr: [u8; 4]) -> PathBuf {
    let run = format!(
        "(call $create-tcp-socket (i32.const 0) (global.get $answer))
         (if (call $failed) (then (return {create_denied})))
         (local.set $n (i32.load offset=4 (global.get $answer)))
         (call $start-bind-tcp (local.get $n) (global.get $network) {addr} (global.get $answer))
         {denied}",
        create_denied = is_error(ACCESS_DENIED, 4),
        addr = flat(addr, 0),
        denied = is_error(ACCESS_DENIED, 1),
    );
    variant(
        name,
        &Variant {
            imports: r#"
              (import "wasi:sockets/tcp@0.2.0" (instance $tcp
                (export "network" (type $network' (eq $network)))
                (export "error-code" (type $error-code' (eq $error-code)))
                (export "ip-socket-address" (type $ip-socket-address' (eq $ip-socket-address)))
                (export "tcp-socket" (type $socket (sub resource)))
                (export "[method]tcp-socket.start-bind" (func (param "self" (borrow $socket))
                  (param "network" (borrow $network')) (param "local-address" $ip-socket-address')
                  (result (result (error $error-code')))))))
              (alias export $tcp "tcp-socket" (type $tcp-socket))
              (import "wasi:sockets/tcp-create-socket@0.2.0" (instance $create-tcp
                (export "error-code" (type $error-code' (eq $error-code)))
                (export "ip-address-family" (type $ip-address-family' (eq $ip-address-family)))
                (export "tcp-socket" (type $socket' (eq $tcp-socket)))
                (export "create-tcp-socket" (func (param "address-family" $ip-address-family')
                  (result (result (own $socket') (error $error-code')))))))
              (core func $create-tcp-socket (canon lower
                (func $create-tcp "create-tcp-socket") (memory $memory)))
              (core func $start-bind-tcp (canon lower
                (func $tcp "[method]tcp-socket.start-bind") (memory $memory)))
              "#,
            core_imports: r#"
              (import "wasi" "create-tcp-socket" (func $create-tcp-socket (param i32 i32)))
              (import "wasi" "start-bind-tcp" (func $start-bind-tcp
                (param i32 i32  i32  i32 i32  i32 i32 i32 i32 i32 i32 i32 i32  i32  i32)))
              "#,
            core_exports: r#"
              (export "create-tcp-socket" (func $create-tcp-socket))
              (export "start-bind-tcp" (func $start-bind-tcp))
              "#,
            locals: "",
            run: &run,
        },
    )
}

/// A guest that looks up the name `127.0.0.1`, which takes no name server; an error if refused.
pub(crate) fn resolving(name: &str) -> PathBuf {
    variant(
        name,
        &Variant {
            imports: r#"
              (import "wasi:sockets/ip-name-lookup@0.2.0" (instance $lookup
                (export "network" (type $network' (eq $network)))
                (export "error-code" (type $error-code' (eq $error-code)))
                (export "resolve-address-stream" (type $addresses (sub resource)))
                (export "resolve-addresses" (func (param "network" (borrow $network'))
                  (param "name" string)
                  (result (result (own $addresses) (error $error-code')))))))
              (core func $resolve-addresses (canon lower
                (func $lookup "resolve-addresses") (memory $memory)))
              "#,
            core_imports: r#"
              (import "wasi" "resolve-addresses" (func $resolve-addresses (param i32 i32 i32 i32)))
              (data (i32.const 1024) "127.0.0.1")
              "#,
            core_exports: r#"(export "resolve-addresses" (func $resolve-addresses))"#,
            locals: "",
            run: &format!(
                "(call $resolve-addresses
                   (global.get $network) (i32.const 1024) (i32.const 9) (global.get $answer))
                 {}",
                is_error(PERMANENT_RESOLVER_FAILURE, 4)
            ),
        },
    )
}

/// Opens sockets until it gets an error or has 100,000, and keeps them; leaves the number in `$n`.
const HOARD: &str = "
  (block $full
    (loop $more
      (call $create-udp-socket (i32.const 0) (global.get $answer))
      (br_if $full (call $failed))
      (local.set $last (i32.load offset=4 (global.get $answer)))
      (local.set $n (i32.add (local.get $n) (i32.const 1)))
      (br_if $more (i32.lt_u (local.get $n) (i32.const 100000)))))";

/// A guest that opens sockets until it is refused, gives one back, and binds and drops in its place
/// so many times; an error unless `new-socket-limit` came at exactly `share` sockets.
pub(crate) fn hoarding(name: &str, share: u32, cycles: u32) -> PathBuf {
    let run = format!(
        "{HOARD}
         (if (i32.eqz {limit}) (then (return (i32.const 1))))
         (if (i32.ne (local.get $n) (i32.const {share})) (then (return (i32.const 1))))
         (call $drop-socket (local.get $last))
         (call $repeat (global.get $mode-bind) (i32.const {cycles}))",
        limit = is_error(NEW_SOCKET_LIMIT, 4),
    );
    variant(name, &Variant { locals: "(local $last i32)", run: &run, ..Variant::default() })
}

/// A guest that hoards if its stdin has a byte for it, keeps all until stdin ends, and returns an
/// error; it traps unless it was refused with `new-socket-limit`. Without a byte it binds and drops
/// so many times.
pub(crate) fn hoarding_by_stdin(name: &str, cycles: u32) -> PathBuf {
    let run = format!(
        "(local.set $stdin (call $get-stdin))
         (call $read (local.get $stdin) (i64.const 1) (global.get $answer))
         (if (call $failed) (then
           (return (call $repeat (global.get $mode-bind) (i32.const {cycles})))))
         {HOARD}
         (if (i32.eqz {limit}) (then unreachable))
         (loop $open
           (call $read (local.get $stdin) (i64.const 1) (global.get $answer))
           (br_if $open (i32.eqz (call $failed))))
         (i32.const 1)",
        limit = is_error(NEW_SOCKET_LIMIT, 4),
    );
    variant(
        name,
        &Variant {
            imports: r#"
              (import "wasi:io/error@0.2.0" (instance $error
                (export "error" (type (sub resource)))))
              (alias export $error "error" (type $error))
              (import "wasi:io/streams@0.2.0" (instance $streams
                (export "error" (type $error' (eq $error)))
                (type $stream-error (variant
                  (case "last-operation-failed" (own $error')) (case "closed")))
                (export "stream-error" (type $stream-error' (eq $stream-error)))
                (export "input-stream" (type $input (sub resource)))
                (export "[method]input-stream.blocking-read" (func
                  (param "self" (borrow $input)) (param "len" u64)
                  (result (result (list u8) (error $stream-error')))))))
              (alias export $streams "input-stream" (type $input))
              (import "wasi:cli/stdin@0.2.0" (instance $stdin
                (export "input-stream" (type $input' (eq $input)))
                (export "get-stdin" (func (result (own $input'))))))
              (core func $get-stdin (canon lower (func $stdin "get-stdin")))
              (core func $read (canon lower
                (func $streams "[method]input-stream.blocking-read")
                (memory $memory) (realloc $realloc)))
              "#,
            core_imports: r#"
              (import "wasi" "get-stdin" (func $get-stdin (result i32)))
              (import "wasi" "read" (func $read (param i32 i64 i32)))
              "#,
            core_exports: r#"
              (export "get-stdin" (func $get-stdin))
              (export "read" (func $read))
              "#,
            locals: "(local $last i32) (local $stdin i32)",
            run: &run,
        },
    )
}
