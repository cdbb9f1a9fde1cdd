;; A guest that makes, uses and drops sockets as fast as it can, and reports when one of them has something that is not its
;; own. What it does is drawn from a seed; a socket, from create to drop, is a cycle, and every cycle has a number.
;;
;; Natives, all at 127.0.0.1 and fd00::1, whose parts are played by natives.rs:
;;   port 1    the chaser: a cycle sends it its address (the hello), and it sends there from then on
;;   port 53   the answerer: sends as many answers as a question requests
;;   port 9    closed: the kernel refuses
;; The second address, 127.0.0.2 and fd00::2, is the answerer's too.
;;
;; A cycle is bound to an address of its own, 127.0.0.0 + number or fd00:: + number, or to all. So what was meant for
;; another cycle differs from its own: by the number, which all that is sent to it carries, and, where it is bound to all
;; addresses, by the port it was sent to.
;;
;; `run` runs CYCLES cycles from number FIRST on. It returns what was wrong (0: nothing), with which cycle and three
;; details, and what it has counted.
(component
  (import "wasi:io/poll@0.2.0" (instance $poll
    (export "pollable" (type $pollable (sub resource)))
    (export "poll" (func (param "in" (list (borrow $pollable))) (result (list u32))))
  ))
  (alias export $poll "pollable" (type $pollable))

  (import "wasi:clocks/monotonic-clock@0.2.0" (instance $clock
    (export "pollable" (type $pollable' (eq $pollable)))
    (export "subscribe-duration" (func (param "when" u64) (result (own $pollable'))))
  ))

  (import "wasi:sockets/network@0.2.0" (instance $network
    (export "network" (type (sub resource)))
    (type $error-code (enum "unknown" "access-denied" "not-supported" "invalid-argument" "out-of-memory" "timeout"
      "concurrency-conflict" "not-in-progress" "would-block" "invalid-state" "new-socket-limit" "address-not-bindable"
      "address-in-use" "remote-unreachable" "connection-refused" "connection-reset" "connection-aborted"
      "datagram-too-large" "name-unresolvable" "temporary-resolver-failure" "permanent-resolver-failure"))
    (export "error-code" (type (eq $error-code)))
    (type $ip-address-family (enum "ipv4" "ipv6"))
    (export "ip-address-family" (type (eq $ip-address-family)))
    (type $ipv4-address (tuple u8 u8 u8 u8))
    (export "ipv4-address" (type $ipv4-address' (eq $ipv4-address)))
    (type $ipv6-address (tuple u16 u16 u16 u16 u16 u16 u16 u16))
    (export "ipv6-address" (type $ipv6-address' (eq $ipv6-address)))
    (type $ipv4-socket-address (record (field "port" u16) (field "address" $ipv4-address')))
    (export "ipv4-socket-address" (type $ipv4-socket-address' (eq $ipv4-socket-address)))
    (type $ipv6-socket-address (record
      (field "port" u16) (field "flow-info" u32) (field "address" $ipv6-address') (field "scope-id" u32)))
    (export "ipv6-socket-address" (type $ipv6-socket-address' (eq $ipv6-socket-address)))
    (type $ip-socket-address (variant (case "ipv4" $ipv4-socket-address') (case "ipv6" $ipv6-socket-address')))
    (export "ip-socket-address" (type (eq $ip-socket-address)))
  ))
  (alias export $network "network" (type $network))
  (alias export $network "error-code" (type $error-code))
  (alias export $network "ip-address-family" (type $ip-address-family))
  (alias export $network "ip-socket-address" (type $ip-socket-address))

  (import "wasi:sockets/instance-network@0.2.0" (instance $instance-network
    (export "network" (type $network' (eq $network)))
    (export "instance-network" (func (result (own $network'))))
  ))

  (import "wasi:sockets/udp@0.2.0" (instance $udp
    (export "pollable" (type $pollable' (eq $pollable)))
    (export "network" (type $network' (eq $network)))
    (export "error-code" (type $error-code' (eq $error-code)))
    (export "ip-socket-address" (type $ip-socket-address' (eq $ip-socket-address)))
    (type $incoming-datagram (record (field "data" (list u8)) (field "remote-address" $ip-socket-address')))
    (export "incoming-datagram" (type $incoming-datagram' (eq $incoming-datagram)))
    (type $outgoing-datagram (record
      (field "data" (list u8)) (field "remote-address" (option $ip-socket-address'))))
    (export "outgoing-datagram" (type $outgoing-datagram' (eq $outgoing-datagram)))

    (export "udp-socket" (type $socket (sub resource)))
    (export "incoming-datagram-stream" (type $incoming (sub resource)))
    (export "outgoing-datagram-stream" (type $outgoing (sub resource)))

    (export "[method]udp-socket.start-bind" (func (param "self" (borrow $socket)) (param "network" (borrow $network'))
      (param "local-address" $ip-socket-address') (result (result (error $error-code')))))
    (export "[method]udp-socket.finish-bind" (func (param "self" (borrow $socket)) (result (result (error $error-code')))))
    (export "[method]udp-socket.stream" (func (param "self" (borrow $socket))
      (param "remote-address" (option $ip-socket-address'))
      (result (result (tuple (own $incoming) (own $outgoing)) (error $error-code')))))
    (export "[method]udp-socket.local-address" (func (param "self" (borrow $socket))
      (result (result $ip-socket-address' (error $error-code')))))
    (export "[method]udp-socket.set-unicast-hop-limit" (func (param "self" (borrow $socket)) (param "value" u8)
      (result (result (error $error-code')))))

    (export "[method]incoming-datagram-stream.receive" (func (param "self" (borrow $incoming)) (param "max-results" u64)
      (result (result (list $incoming-datagram') (error $error-code')))))
    (export "[method]incoming-datagram-stream.subscribe" (func (param "self" (borrow $incoming))
      (result (own $pollable'))))

    (export "[method]outgoing-datagram-stream.check-send" (func (param "self" (borrow $outgoing))
      (result (result u64 (error $error-code')))))
    (export "[method]outgoing-datagram-stream.send" (func (param "self" (borrow $outgoing))
      (param "datagrams" (list $outgoing-datagram')) (result (result u64 (error $error-code')))))
  ))
  (alias export $udp "udp-socket" (type $socket))
  (alias export $udp "incoming-datagram-stream" (type $incoming))
  (alias export $udp "outgoing-datagram-stream" (type $outgoing))

  (import "wasi:sockets/udp-create-socket@0.2.0" (instance $create
    (export "error-code" (type $error-code' (eq $error-code)))
    (export "ip-address-family" (type $ip-address-family' (eq $ip-address-family)))
    (export "udp-socket" (type $socket' (eq $socket)))
    (export "create-udp-socket" (func (param "address-family" $ip-address-family')
      (result (result (own $socket') (error $error-code')))))
  ))

  ;; Memory stands apart from the program because lowering an import needs it before the program can exist.
  (core module $heap-module
    (memory (export "memory") 64)
    (global $floor i32 (i32.const 4096))
    (global $next (mut i32) (i32.const 4096))
    ;; Nothing that is received between two `free-all` needs more than the 4 MiB there are; beyond them the host traps.
    (func (export "realloc") (param $old i32) (param $old-size i32) (param $align i32) (param $size i32) (result i32)
      (local $at i32)
      (if (local.get $old) (then unreachable))
      (local.set $at (i32.and
        (i32.add (global.get $next) (i32.sub (local.get $align) (i32.const 1)))
        (i32.sub (i32.const 0) (local.get $align))))
      (global.set $next (i32.add (local.get $at) (local.get $size)))
      (local.get $at))
    (func (export "free-all") (global.set $next (global.get $floor)))
  )
  (core instance $heap (instantiate $heap-module))
  (alias core export $heap "memory" (core memory $memory))
  (alias core export $heap "realloc" (core func $realloc))

  (core func $poll-list (canon lower (func $poll "poll") (memory $memory) (realloc $realloc)))
  (core func $subscribe-duration (canon lower (func $clock "subscribe-duration")))
  (core func $drop-pollable (canon resource.drop $pollable))
  (core func $instance-network (canon lower (func $instance-network "instance-network")))
  (core func $drop-network (canon resource.drop $network))
  (core func $create-udp-socket (canon lower (func $create "create-udp-socket") (memory $memory)))
  (core func $start-bind (canon lower (func $udp "[method]udp-socket.start-bind") (memory $memory)))
  (core func $finish-bind (canon lower (func $udp "[method]udp-socket.finish-bind") (memory $memory)))
  (core func $stream (canon lower (func $udp "[method]udp-socket.stream") (memory $memory)))
  (core func $local-address (canon lower (func $udp "[method]udp-socket.local-address") (memory $memory)))
  (core func $set-hops (canon lower (func $udp "[method]udp-socket.set-unicast-hop-limit") (memory $memory)))
  (core func $drop-socket (canon resource.drop $socket))
  (core func $receive (canon lower
    (func $udp "[method]incoming-datagram-stream.receive") (memory $memory) (realloc $realloc)))
  (core func $subscribe-incoming (canon lower (func $udp "[method]incoming-datagram-stream.subscribe")))
  (core func $drop-incoming (canon resource.drop $incoming))
  (core func $check-send (canon lower (func $udp "[method]outgoing-datagram-stream.check-send") (memory $memory)))
  (core func $send (canon lower (func $udp "[method]outgoing-datagram-stream.send") (memory $memory)))
  (core func $drop-outgoing (canon resource.drop $outgoing))

  ;; Functions that can fail answer 1 for failure and 0 for success; what has failed is in the report by then.
  (core module $churn-module
    (import "heap" "memory" (memory 64))
    (import "heap" "free-all" (func $free-all))
    (import "wasi" "poll" (func $poll (param i32 i32 i32)))
    (import "wasi" "subscribe-duration" (func $subscribe-duration (param i64) (result i32)))
    (import "wasi" "drop-pollable" (func $drop-pollable (param i32)))
    (import "wasi" "instance-network" (func $instance-network (result i32)))
    (import "wasi" "drop-network" (func $drop-network (param i32)))
    (import "wasi" "create-udp-socket" (func $create-udp-socket (param i32 i32)))
    ;; Two values, then the twelve of an address (its case and the wider case's eleven), then where to put the answer.
    (import "wasi" "start-bind" (func $start-bind
      (param i32 i32  i32  i32 i32  i32 i32 i32 i32 i32 i32 i32 i32  i32  i32)))
    (import "wasi" "finish-bind" (func $finish-bind (param i32 i32)))
    (import "wasi" "stream" (func $stream
      (param i32 i32  i32  i32 i32  i32 i32 i32 i32 i32 i32 i32 i32  i32  i32)))
    (import "wasi" "local-address" (func $local-address (param i32 i32)))
    (import "wasi" "set-hops" (func $set-hops (param i32 i32 i32)))
    (import "wasi" "drop-socket" (func $drop-socket (param i32)))
    (import "wasi" "receive" (func $receive (param i32 i64 i32)))
    (import "wasi" "subscribe-incoming" (func $subscribe-incoming (param i32) (result i32)))
    (import "wasi" "drop-incoming" (func $drop-incoming (param i32)))
    (import "wasi" "check-send" (func $check-send (param i32 i32)))
    (import "wasi" "send" (func $send (param i32 i32 i32 i32)))
    (import "wasi" "drop-outgoing" (func $drop-outgoing (param i32)))

    ;; Where the host puts its answers; the largest, result<ip-socket-address, error-code>, takes 36 bytes.
    (global $answer i32 (i32.const 16))
    ;; Handles of socket (+0), incoming (+4) and outgoing (+8), 0 where there is none, which no handle ever is: of this
    ;; cycle, and of one that has ended and is not closed yet.
    (global $mine i32 (i32.const 96))
    (global $lingering i32 (i32.const 112))
    ;; Two pollables to wait for: arrivals, and the clock.
    (global $waiting-for i32 (i32.const 128))
    ;; An address (case, +4: port, +6: IPv4 address, +12: IPv6 address).
    (global $to i32 (i32.const 160))
    ;; An outgoing datagram of 44 bytes: data (+0), its length (+4), the option's case (+8), an address (+12).
    (global $letter i32 (i32.const 192))
    ;; What is sent: tag, number, kind, hop limit, family, whether bound to all, answers wanted, where to send them.
    (global $payload i32 (i32.const 256))
    (global $payload-bytes i32 (i32.const 32))
    ;; What `run` returns: what is wrong, the cycle's number, three details, and the counts.
    (global $report i32 (i32.const 512))
    ;; The mix: the kind of each of 128 cycles.
    (global $mix i32 (i32.const 1024))

    (global $tag-hello i32 (i32.const 1))
    (global $tag-question i32 (i32.const 2))
    (global $tag-answer i32 (i32.const 3))

    (global $port-chaser i32 (i32.const 1))
    (global $port-answerer i32 (i32.const 53))
    (global $port-closed i32 (i32.const 9))
    (global $port-named i32 (i32.const 7777))
    (global $hops-default i32 (i32.const 64))
    (global $hops-set i32 (i32.const 7))

    ;; Error codes.
    (global $connection-refused i32 (i32.const 14))

    ;; What can be wrong; `Wrong` in churn.rs has the same.
    (global $wrong-failed i32 (i32.const 1))    ;; a call failed: at which step, with which error code
    (global $wrong-stale i32 (i32.const 2))     ;; a datagram for another cycle: its number, its port, our port
    (global $wrong-shape i32 (i32.const 3))     ;; a datagram that no native has sent: its length
    (global $wrong-missing i32 (i32.const 4))   ;; answers that have not come: how many have, of how many
    (global $wrong-local i32 (i32.const 5))     ;; bound to all, and then to an address: which
    (global $wrong-peer i32 (i32.const 6))      ;; connected, and heard another than its peer: the port
    (global $wrong-silent i32 (i32.const 7))    ;; a refusal without an error
    (global $wrong-twice i32 (i32.const 8))     ;; more answers than it requested

    ;; The present cycle.
    (global $network (mut i32) (i32.const 0))
    (global $clock (mut i32) (i32.const 0))
    (global $number (mut i32) (i32.const 0))
    (global $kind (mut i32) (i32.const 0))
    (global $v6 (mut i32) (i32.const 0))
    (global $to-all (mut i32) (i32.const 0))
    (global $connected (mut i32) (i32.const 0))
    (global $hops (mut i32) (i32.const 0))
    (global $answers (mut i32) (i32.const 0))
    (global $at-second (mut i32) (i32.const 0))
    ;; The port it has had before the present one.
    (global $former-port (mut i32) (i32.const 0))
    ;; The step that is being done, for the report.
    (global $step (mut i32) (i32.const 0))

    (data (i32.const 1024)
      ;; plain
      "\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00"
      "\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00\00"
      ;; looks
      "\01\01\01\01\01\01\01\01\01\01\01\01\01\01\01\01\01\01\01\01\01\01"
      ;; lingers
      "\02\02\02\02\02\02\02\02\02\02\02\02\02\02\02\02\02\02\02\02\02\02\02\02"
      ;; refused
      "\03\03\03\03\03\03\03\03\03\03\03\03\03\03"
      ;; receives a refusal
      "\04"
      ;; asks
      "\05\05\05\05\05\05"
      ;; asks, connected
      "\06\06\06"
      ;; asks two
      "\07\07"
      ;; sets a hop limit
      "\08"
      ;; names a port
      "\09"
      ;; roams
      "\0a\0a")
    ;; ---- the report -----------------------------------------------------------------------------

    (func $wrong (param $what i32) (param $a i32) (param $b i32) (param $c i32) (result i32)
      (i32.store (global.get $report) (local.get $what))
      (i32.store offset=4 (global.get $report) (global.get $number))
      (i32.store offset=8 (global.get $report) (local.get $a))
      (i32.store offset=12 (global.get $report) (local.get $b))
      (i32.store offset=16 (global.get $report) (local.get $c))
      (i32.store offset=20 (global.get $report) (global.get $kind))
      (i32.store offset=24 (global.get $report) (global.get $v6))
      (i32.store offset=28 (global.get $report) (global.get $to-all))
      (i32.const 1))

    (func $failed (result i32)
      (if (result i32) (i32.load8_u (global.get $answer))
        (then (call $wrong (global.get $wrong-failed) (global.get $step)
          (i32.load8_u offset=1 (global.get $answer)) (i32.const 0)))
        (else (i32.const 0))))

    ;; As `failed`, of an answer that is aligned to four or eight bytes.
    (func $failed-wide (param $align i32) (result i32)
      (if (result i32) (i32.load8_u (global.get $answer))
        (then (call $wrong (global.get $wrong-failed) (global.get $step)
          (i32.load8_u (i32.add (global.get $answer) (local.get $align))) (i32.const 0)))
        (else (i32.const 0))))

    ;; Counts: datagrams heard (0), answers (1), then cycles by kind (2 ..), and those connected over IPv6 that
    ;; received no refusal (14).
    (func $count (param $what i32) (param $more i32)
      (local $at i32)
      (local.set $at (i32.add (global.get $report) (i32.shl (local.get $what) (i32.const 2))))
      (i32.store offset=32 (local.get $at) (i32.add (i32.load offset=32 (local.get $at)) (local.get $more))))

    ;; ---- addresses ------------------------------------------------------------------------------

    ;; Of a native: its first or second address, and a port.
    (func $native (param $host i32) (param $port i32)
      (memory.fill (global.get $to) (i32.const 0) (i32.const 32))
      (i32.store (global.get $to) (global.get $v6))
      (i32.store16 offset=4 (global.get $to) (local.get $port))
      (if (global.get $v6)
        (then
          (i32.store16 offset=12 (global.get $to) (i32.const 0xfd00))
          (i32.store16 offset=26 (global.get $to) (local.get $host)))
        (else
          (i32.store8 offset=6 (global.get $to) (i32.const 127))
          (i32.store8 offset=9 (global.get $to) (local.get $host)))))

    ;; ---- calls ----------------------------------------------------------------------------------

    (func $create (result i32)
      (global.set $step (i32.const 1))
      (call $create-udp-socket (global.get $v6) (global.get $answer))
      (if (call $failed-wide (i32.const 4)) (then (return (i32.const 1))))
      (i32.store (global.get $mine) (i32.load offset=4 (global.get $answer)))
      (i32.const 0))

    ;; To the cycle's own address or to all.
    (func $bind (param $port i32) (result i32)
      (local $high i32) (local $low i32)
      (global.set $step (i32.const 2))
      (local.set $high (i32.shr_u (global.get $number) (i32.const 16)))
      (local.set $low (i32.and (global.get $number) (i32.const 0xffff)))
      (if (global.get $to-all)
        (then (call $start-bind (i32.load (global.get $mine)) (global.get $network)
          (global.get $v6) (local.get $port) (i32.const 0)
          (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
          (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
          (i32.const 0) (global.get $answer)))
        (else (if (global.get $v6)
          (then (call $start-bind (i32.load (global.get $mine)) (global.get $network)
            (i32.const 1) (local.get $port) (i32.const 0)
            (i32.const 0xfd00) (i32.const 0) (i32.const 0) (i32.const 0)
            (i32.const 0) (i32.const 0) (local.get $high) (local.get $low)
            (i32.const 0) (global.get $answer)))
          (else (call $start-bind (i32.load (global.get $mine)) (global.get $network)
            (i32.const 0) (local.get $port)
            (i32.const 127) (local.get $high)
            (i32.shr_u (local.get $low) (i32.const 8)) (i32.and (local.get $low) (i32.const 0xff))
            (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
            (global.get $answer))))))
      (if (call $failed) (then (return (i32.const 1))))
      (global.set $step (i32.const 3))
      (call $finish-bind (i32.load (global.get $mine)) (global.get $answer))
      (call $failed))

    ;; Unconnected streams, or connected to the address in $to.
    (func $open (param $connect i32) (result i32)
      (global.set $step (i32.add (i32.const 4) (local.get $connect)))
      (global.set $connected (local.get $connect))
      (if (i32.and (i32.and (local.get $connect) (global.get $v6)) (i32.ne (global.get $kind) (i32.const 4)))
        (then (call $count (i32.const 14) (i32.const 1))))
      (if (i32.load (global.get $to))
        (then (call $stream (i32.load (global.get $mine)) (local.get $connect)
          (i32.const 1) (i32.load16_u offset=4 (global.get $to)) (i32.const 0)
          (i32.load16_u offset=12 (global.get $to)) (i32.const 0) (i32.const 0) (i32.const 0)
          (i32.const 0) (i32.const 0) (i32.const 0) (i32.load16_u offset=26 (global.get $to))
          (i32.const 0) (global.get $answer)))
        (else (call $stream (i32.load (global.get $mine)) (local.get $connect)
          (i32.const 0) (i32.load16_u offset=4 (global.get $to))
          (i32.load8_u offset=6 (global.get $to)) (i32.const 0) (i32.const 0) (i32.load8_u offset=9 (global.get $to))
          (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
          (global.get $answer))))
      (if (call $failed-wide (i32.const 4)) (then (return (i32.const 1))))
      (i32.store offset=4 (global.get $mine) (i32.load offset=4 (global.get $answer)))
      (i32.store offset=8 (global.get $mine) (i32.load offset=8 (global.get $answer)))
      (i32.const 0))

    (func $connect (param $port i32) (result i32)
      (call $native (i32.const 1) (local.get $port))
      (call $open (i32.const 1)))

    ;; Streams first: a socket may not go while it has children.
    (func $close-streams (param $peer i32)
      (if (i32.load offset=4 (local.get $peer)) (then (call $drop-incoming (i32.load offset=4 (local.get $peer)))))
      (if (i32.load offset=8 (local.get $peer)) (then (call $drop-outgoing (i32.load offset=8 (local.get $peer)))))
      (i64.store offset=4 align=4 (local.get $peer) (i64.const 0)))

    (func $close (param $peer i32)
      (call $close-streams (local.get $peer))
      (if (i32.load (local.get $peer)) (then (call $drop-socket (i32.load (local.get $peer)))))
      (i32.store (local.get $peer) (i32.const 0)))

    ;; Sends the payload to $to, or to the peer.
    (func $say (param $tag i32) (param $wanted i32) (result i32)
      (i32.store (global.get $payload) (local.get $tag))
      (i32.store offset=4 (global.get $payload) (global.get $number))
      (i32.store offset=8 (global.get $payload) (global.get $kind))
      (i32.store offset=12 (global.get $payload) (global.get $hops))
      (i32.store offset=16 (global.get $payload) (global.get $v6))
      (i32.store offset=20 (global.get $payload) (global.get $to-all))
      (i32.store offset=24 (global.get $payload) (local.get $wanted))
      (i32.store offset=28 (global.get $payload) (global.get $at-second))
      (i32.store (global.get $letter) (global.get $payload))
      (i32.store offset=4 (global.get $letter) (global.get $payload-bytes))
      (i32.store8 offset=8 (global.get $letter) (i32.eqz (global.get $connected)))
      (memory.copy (i32.add (global.get $letter) (i32.const 12)) (global.get $to) (i32.const 32))
      (global.set $step (i32.const 6))
      (call $check-send (i32.load offset=8 (global.get $mine)) (global.get $answer))
      (if (call $failed-wide (i32.const 8)) (then (return (i32.const 1))))
      (global.set $step (i32.const 7))
      (call $send (i32.load offset=8 (global.get $mine)) (global.get $letter) (i32.const 1) (global.get $answer))
      (call $failed-wide (i32.const 8)))

    ;; Says where it is, to the chaser.
    (func $hello (result i32)
      (call $native (i32.const 1) (global.get $port-chaser))
      (call $say (global.get $tag-hello) (i32.const 0)))

    ;; ---- hearing --------------------------------------------------------------------------------

    (func $own-port (result i32)
      (call $local-address (i32.load (global.get $mine)) (global.get $answer))
      (i32.load16_u offset=8 (global.get $answer)))

    ;; Whether an incoming datagram (data +0, its length +4, the sender +8) is not this cycle's.
    (func $strange (param $datagram i32) (result i32)
      (local $data i32) (local $number i32) (local $port i32)
      (if (i32.lt_u (i32.load offset=4 (local.get $datagram)) (i32.const 12))
        (then (return (call $wrong (global.get $wrong-shape)
          (i32.load offset=4 (local.get $datagram)) (i32.const 0) (i32.const 0)))))
      (local.set $data (i32.load (local.get $datagram)))
      (local.set $number (i32.load offset=4 (local.get $data)))
      (if (i32.and (global.get $connected)
        (i32.ne (i32.load16_u offset=12 (local.get $datagram)) (global.get $port-answerer)))
        (then (return (call $wrong (global.get $wrong-peer)
          (i32.load16_u offset=12 (local.get $datagram)) (local.get $number) (i32.const 0)))))
      (if (i32.eq (local.get $number) (global.get $number)) (then
        (if (i32.eq (i32.load (local.get $data)) (global.get $tag-answer)) (then
          (global.set $answers (i32.add (global.get $answers) (i32.const 1)))))
        (return (i32.const 0))))
      ;; Bound to all addresses: a datagram for a cycle that had the port before rightly comes here.
      (if (global.get $to-all) (then
        (local.set $port (call $own-port))
        (if (i32.eq (i32.load offset=8 (local.get $data)) (local.get $port)) (then (return (i32.const 0))))
        (if (i32.eq (i32.load offset=8 (local.get $data)) (global.get $former-port)) (then (return (i32.const 0))))))
      (call $wrong (global.get $wrong-stale)
        (local.get $number) (i32.load offset=8 (local.get $data)) (local.get $port)))

    ;; Takes what is there, up to sixteen datagrams.
    (func $listen (result i32)
      (local $left i32) (local $datagram i32)
      (call $free-all)
      (global.set $step (i32.const 8))
      (call $receive (i32.load offset=4 (global.get $mine)) (i64.const 16) (global.get $answer))
      (if (call $failed-wide (i32.const 4)) (then (return (i32.const 1))))
      (local.set $datagram (i32.load offset=4 (global.get $answer)))
      (local.set $left (i32.load offset=8 (global.get $answer)))
      (call $count (i32.const 0) (local.get $left))
      (loop $next (result i32)
        (if (i32.eqz (local.get $left)) (then (return (i32.const 0))))
        (if (call $strange (local.get $datagram)) (then (return (i32.const 1))))
        (local.set $datagram (i32.add (local.get $datagram) (i32.const 40)))
        (local.set $left (i32.sub (local.get $left) (i32.const 1)))
        (br $next)))

    ;; Waits for arrivals; 1 if the clock has run down before.
    (func $wait (result i32)
      (local $ready i32)
      (call $free-all)
      (i32.store (global.get $waiting-for) (call $subscribe-incoming (i32.load offset=4 (global.get $mine))))
      (i32.store offset=4 (global.get $waiting-for) (global.get $clock))
      (call $poll (global.get $waiting-for) (i32.const 2) (global.get $answer))
      (call $drop-pollable (i32.load (global.get $waiting-for)))
      ;; Only the second is ready.
      (i32.and
        (i32.eq (i32.load offset=4 (global.get $answer)) (i32.const 1))
        (i32.eq (i32.load (i32.load (global.get $answer))) (i32.const 1))))

    ;; Waits for as many answers.
    (func $hear (param $wanted i32) (result i32)
      (loop $more (result i32)
        (if (call $listen) (then (return (i32.const 1))))
        (if (i32.gt_u (global.get $answers) (local.get $wanted))
          (then (return (call $wrong (global.get $wrong-twice)
            (global.get $answers) (local.get $wanted) (i32.const 0)))))
        (if (i32.eq (global.get $answers) (local.get $wanted)) (then
          (call $count (i32.const 1) (local.get $wanted))
          (return (i32.const 0))))
        (if (call $wait) (then (return (call $wrong (global.get $wrong-missing)
          (global.get $answers) (local.get $wanted) (i32.const 0)))))
        (br $more)))

    (func $ask (param $wanted i32) (result i32)
      (call $native (i32.const 1) (global.get $port-answerer))
      (if (call $say (global.get $tag-question) (local.get $wanted)) (then (return (i32.const 1))))
      (call $hear (local.get $wanted)))

    ;; ---- cycles ----------------------------------------------------------------------------------

    ;; Leaves the socket open until the next cycle is under way.
    (func $linger
      (call $close (global.get $lingering))
      (memory.copy (global.get $lingering) (global.get $mine) (i32.const 12))
      (memory.fill (global.get $mine) (i32.const 0) (i32.const 12)))

    ;; Connects to the closed port and sends a question: an error is on its way, or there.
    (func $be-refused (result i32)
      (call $close-streams (global.get $mine))
      (if (call $connect (global.get $port-closed)) (then (return (i32.const 1))))
      (call $say (global.get $tag-question) (i32.const 0)))

    ;; As before, with an armed receive that receives the error.
    (func $receive-refusal (result i32)
      (call $close-streams (global.get $mine))
      (if (call $connect (global.get $port-closed)) (then (return (i32.const 1))))
      (if (call $listen) (then (return (i32.const 1))))
      (if (call $say (global.get $tag-question) (i32.const 0)) (then (return (i32.const 1))))
      (if (call $wait) (then (return (call $wrong (global.get $wrong-silent) (i32.const 0) (i32.const 0) (i32.const 0)))))
      (call $free-all)
      (call $receive (i32.load offset=4 (global.get $mine)) (i64.const 16) (global.get $answer))
      (if (i32.and
        (i32.load8_u (global.get $answer))
        (i32.eq (i32.load8_u offset=4 (global.get $answer)) (global.get $connection-refused)))
        (then (return (i32.const 0))))
      (call $wrong (global.get $wrong-silent)
        (i32.load8_u (global.get $answer)) (i32.load offset=4 (global.get $answer)) (i32.const 0)))

    ;; Connects and disconnects, which lets a socket that is bound to all addresses hear all of them again.
    (func $roam (result i32)
      ;; The disconnect takes the port away; what comes until then is its own.
      (if (global.get $to-all) (then (global.set $former-port (call $own-port))))
      (call $close-streams (global.get $mine))
      (if (call $connect (global.get $port-answerer)) (then (return (i32.const 1))))
      (call $close-streams (global.get $mine))
      (if (call $open (i32.const 0)) (then (return (i32.const 1))))
      (if (i32.eqz (global.get $to-all)) (then (return (call $ask (i32.const 1)))))
      ;; Sent to the other address. The question has given the socket a port again.
      (global.set $at-second (i32.const 1))
      (call $native (i32.const 1) (global.get $port-answerer))
      (if (call $say (global.get $tag-question) (i32.const 1)) (then (return (i32.const 1))))
      (drop (call $own-port))
      (if (i32.eqz (i32.load8_u offset=4 (global.get $answer))) (then
        (if (i32.load offset=10 align=2 (global.get $answer))
          (then (return (call $wrong (global.get $wrong-local)
            (i32.load offset=10 align=2 (global.get $answer)) (i32.const 0) (i32.const 0)))))))
      (call $hear (i32.const 1)))

    ;; What a kind does between its bind and its end.
    (func $do (result i32)
      (block $roams (block $many (block $two (block $connected (block $asks (block $receives (block $refused (block $looks
      (block $plain
        (br_table $plain $looks $plain $refused $receives $asks $connected $two $looks $plain $roams $many (global.get $kind)))
      ;; plain, lingers, named port
      (return (call $hello)))
      ;; looks, hop limit
      (if (call $hello) (then (return (i32.const 1))))
      (return (call $listen)))
      ;; refused
      (if (call $hello) (then (return (i32.const 1))))
      (return (call $be-refused)))
      ;; receives a refusal
      (return (call $receive-refusal)))
      ;; asks
      (if (call $ask (i32.const 1)) (then (return (i32.const 1))))
      (return (call $hello)))
      ;; asks, connected
      (call $close-streams (global.get $mine))
      (if (call $connect (global.get $port-answerer)) (then (return (i32.const 1))))
      (return (call $ask (i32.const 1))))
      ;; asks two
      (if (call $ask (i32.const 2)) (then (return (i32.const 1))))
      (return (call $hello)))
      ;; asks for many
      (if (call $ask (i32.const 200)) (then (return (i32.const 1))))
      (return (call $hello)))
      ;; roams
      (if (call $roam) (then (return (i32.const 1))))
      (call $hello))

    (func $cycle (param $random i64) (result i32)
      (local $port i32)
      (global.set $kind (i32.load8_u (i32.add (global.get $mix)
        (i32.wrap_i64 (i64.and (local.get $random) (i64.const 127))))))
      ;; One in 32 that ask, asks for many.
      (if (i32.and (i32.eq (global.get $kind) (i32.const 5)) (i64.eqz (i64.and (local.get $random) (i64.const 0x1f000000))))
        (then (global.set $kind (i32.const 11))))
      (call $count (i32.add (i32.const 2) (global.get $kind)) (i32.const 1))
      (global.set $v6 (i64.eqz (i64.and (local.get $random) (i64.const 0x300))))
      (global.set $to-all (i64.eqz (i64.and (local.get $random) (i64.const 0x3000))))
      (global.set $answers (i32.const 0))
      (global.set $connected (i32.const 0))
      (global.set $at-second (i32.const 0))
      (global.set $former-port (i32.const 0))
      (global.set $hops (global.get $hops-default))
      ;; The named port is free at an address of its own.
      (if (i32.eq (global.get $kind) (i32.const 9)) (then
        (global.set $to-all (i32.const 0))
        (local.set $port (global.get $port-named))))
      ;; The chaser may hit one that is bound to all, by a predecessor's port, and leave no room for so many.
      (if (i32.eq (global.get $kind) (i32.const 11)) (then (global.set $to-all (i32.const 0))))
      (if (call $create) (then (return (i32.const 1))))
      (if (call $bind (local.get $port)) (then (return (i32.const 1))))
      (if (i32.eq (global.get $kind) (i32.const 8)) (then
        (global.set $hops (global.get $hops-set))
        (global.set $step (i32.const 9))
        (call $set-hops (i32.load (global.get $mine)) (global.get $hops) (global.get $answer))
        (if (call $failed) (then (return (i32.const 1))))))
      (call $native (i32.const 1) (i32.const 0))
      (if (call $open (i32.const 0)) (then (return (i32.const 1))))
      ;; The predecessor that has lingered goes now or when this cycle has done what it does.
      (if (i64.eqz (i64.and (local.get $random) (i64.const 0x100000))) (then (call $close (global.get $lingering))))
      (if (call $do) (then (return (i32.const 1))))
      (call $close (global.get $lingering))
      (if (i32.eq (global.get $kind) (i32.const 2)) (then (call $linger)))
      (call $close (global.get $mine))
      (i32.const 0))

    ;; SplitMix64.
    (func $mixed (param $z i64) (result i64)
      (local.set $z (i64.mul (i64.xor (local.get $z) (i64.shr_u (local.get $z) (i64.const 30)))
        (i64.const 0xbf58476d1ce4e5b9)))
      (local.set $z (i64.mul (i64.xor (local.get $z) (i64.shr_u (local.get $z) (i64.const 27)))
        (i64.const 0x94d049bb133111eb)))
      (i64.xor (local.get $z) (i64.shr_u (local.get $z) (i64.const 31))))

    (func (export "run") (param $seed i64) (param $first i32) (param $cycles i32) (param $patience i64) (result i32)
      (memory.fill (global.get $report) (i32.const 0) (i32.const 96))
      (global.set $network (call $instance-network))
      (global.set $clock (call $subscribe-duration (local.get $patience)))
      (global.set $number (local.get $first))
      (block $over
        (loop $next
          (br_if $over (i32.eqz (local.get $cycles)))
          (br_if $over (call $cycle (call $mixed (i64.add (local.get $seed)
            (i64.mul (i64.extend_i32_u (global.get $number)) (i64.const 0x9e3779b97f4a7c15))))))
          (global.set $number (i32.add (global.get $number) (i32.const 1)))
          (local.set $cycles (i32.sub (local.get $cycles) (i32.const 1)))
          (br $next)))
      (call $close (global.get $lingering))
      (call $close (global.get $mine))
      (call $drop-pollable (global.get $clock))
      (call $drop-network (global.get $network))
      (global.get $report))
  )
  (core instance $churn (instantiate $churn-module
    (with "heap" (instance $heap))
    (with "wasi" (instance
      (export "poll" (func $poll-list))
      (export "subscribe-duration" (func $subscribe-duration))
      (export "drop-pollable" (func $drop-pollable))
      (export "instance-network" (func $instance-network))
      (export "drop-network" (func $drop-network))
      (export "create-udp-socket" (func $create-udp-socket))
      (export "start-bind" (func $start-bind))
      (export "finish-bind" (func $finish-bind))
      (export "stream" (func $stream))
      (export "local-address" (func $local-address))
      (export "set-hops" (func $set-hops))
      (export "drop-socket" (func $drop-socket))
      (export "receive" (func $receive))
      (export "subscribe-incoming" (func $subscribe-incoming))
      (export "drop-incoming" (func $drop-incoming))
      (export "check-send" (func $check-send))
      (export "send" (func $send))
      (export "drop-outgoing" (func $drop-outgoing))
    ))))

  ;; What is wrong, number, three details, kind, family, whether bound to all; then fifteen counts.
  (type $wrong (tuple u32 u32 u32 u32 u32 u32 u32 u32))
  (type $counts (tuple u32 u32 u32 u32 u32 u32 u32 u32 u32 u32 u32 u32 u32 u32 u32))
  (func (export "run") (param "seed" u64) (param "first" u32) (param "cycles" u32) (param "patience" u64)
    (result (tuple $wrong $counts))
    (canon lift (core func $churn "run") (memory $memory)))
)
