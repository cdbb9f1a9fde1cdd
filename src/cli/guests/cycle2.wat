;; The command's built-in guest: what a UDP guest does all day, without anything else in the way. A wasi:cli/run command
;; with the arguments MODE COUNT [PORT [BYTES DATAGRAMS [HOST]]] (after argv 0); run answers err for an argument it does not
;; know and for every error a socket reports. A datagram has BYTES, 4 to 1200, else 64; DATAGRAMS are 1 to 16, else 16; sockets
;; of IPv4 are bound to 127.0.0.HOST, 1 to 254, else 1.
;;
;;   create   COUNT times: create, drop
;;   bind     COUNT times: create, bind to port 0, drop
;;   bind6    likewise with ::1
;;   pair     COUNT times: open two sockets, one datagram each way, close both
;;   echo     open two sockets; COUNT times one datagram each way
;;   dns      open a server; COUNT times: a fresh socket connects to it, sends, is answered, closes
;;   batch    connect a sender to a receiver; COUNT times so many DATAGRAMS at once
;;   burst    the same, one by one
;;
;; The following send their address to 127.0.0.1:PORT, by a datagram.
;;
;;   receive  open a socket; COUNT times send 4 bytes there, and wait for DATAGRAMS that begin with them
;;   compute  open a socket; COUNT times compute for some 10 ms
;;   ask      open a socket; COUNT times compute for some 10 ms, then as `receive`
;;   serve    open a socket; COUNT times wait for datagrams and send each back
;;   sink     open a socket; COUNT times wait for datagrams
;;   await    open COUNT sockets that wait for a datagram, then wait for ever
;;   bound    open COUNT sockets that do nothing, then wait for ever
;;   crowd    open COUNT sockets, up to 600, that wait for a datagram; when the last has got one, send their ports to
;;            127.0.0.1:PORT, two bytes each; then send back what comes to any of them, for ever
;;
;; Where both ends live in this guest they use loopback, whose losses would need a full receive buffer; so there is no
;; timeout.
(component
  (import "wasi:cli/environment@0.2.0" (instance $environment
    (export "get-arguments" (func (result (list string))))
  ))

  (import "wasi:io/poll@0.2.0" (instance $poll
    (export "pollable" (type $pollable (sub resource)))
    (export "[method]pollable.block" (func (param "self" (borrow $pollable))))
    (export "poll" (func (param "in" (list (borrow $pollable))) (result (list u32))))
  ))
  (alias export $poll "pollable" (type $pollable))

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
    (export "[method]udp-socket.subscribe" (func (param "self" (borrow $socket)) (result (own $pollable'))))

    (export "[method]incoming-datagram-stream.receive" (func (param "self" (borrow $incoming)) (param "max-results" u64)
      (result (result (list $incoming-datagram') (error $error-code')))))
    (export "[method]incoming-datagram-stream.subscribe" (func (param "self" (borrow $incoming))
      (result (own $pollable'))))

    (export "[method]outgoing-datagram-stream.check-send" (func (param "self" (borrow $outgoing))
      (result (result u64 (error $error-code')))))
    (export "[method]outgoing-datagram-stream.send" (func (param "self" (borrow $outgoing))
      (param "datagrams" (list $outgoing-datagram')) (result (result u64 (error $error-code')))))
    (export "[method]outgoing-datagram-stream.subscribe" (func (param "self" (borrow $outgoing))
      (result (own $pollable'))))
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
    (memory (export "memory") 1)
    ;; Below this lie the program's own areas, and what it keeps.
    (global $floor (mut i32) (i32.const 4096))
    (global $next (mut i32) (i32.const 4096))

    (func (export "realloc") (param $old i32) (param $old-size i32) (param $align i32) (param $size i32) (result i32)
      (local $at i32) (local $end i64) (local $missing i64)
      (local.set $at (i32.and
        (i32.add (global.get $next) (i32.sub (local.get $align) (i32.const 1)))
        (i32.sub (i32.const 0) (local.get $align))))
      ;; 64 bits, so that a request beyond the address space fails to grow instead of wrapping round.
      (local.set $end (i64.add (i64.extend_i32_u (local.get $at)) (i64.extend_i32_u (local.get $size))))
      (local.set $missing (i64.sub
        (i64.shr_u (i64.add (local.get $end) (i64.const 0xffff)) (i64.const 16))
        (i64.extend_i32_u (memory.size))))
      (if (i64.gt_s (local.get $missing) (i64.const 0)) (then
        (if (i32.eq (memory.grow (i32.wrap_i64 (local.get $missing))) (i32.const -1)) (then unreachable))))
      (if (local.get $old-size) (then
        (memory.copy (local.get $at) (local.get $old) (select (local.get $old-size) (local.get $size)
          (i32.lt_u (local.get $old-size) (local.get $size))))))
      (global.set $next (i32.wrap_i64 (local.get $end)))
      (local.get $at))

    (func (export "free-all") (global.set $next (global.get $floor)))
    (func (export "keep-all") (global.set $floor (global.get $next)))
  )
  (core instance $heap (instantiate $heap-module))
  (alias core export $heap "memory" (core memory $memory))
  (alias core export $heap "realloc" (core func $realloc))

  (core func $get-arguments (canon lower (func $environment "get-arguments") (memory $memory) (realloc $realloc)))
  (core func $block (canon lower (func $poll "[method]pollable.block")))
  (core func $poll (canon lower (func $poll "poll") (memory $memory) (realloc $realloc)))
  (core func $drop-pollable (canon resource.drop $pollable))
  (core func $instance-network (canon lower (func $instance-network "instance-network")))
  (core func $drop-network (canon resource.drop $network))
  (core func $create-udp-socket (canon lower (func $create "create-udp-socket") (memory $memory)))
  (core func $start-bind (canon lower (func $udp "[method]udp-socket.start-bind") (memory $memory)))
  (core func $finish-bind (canon lower (func $udp "[method]udp-socket.finish-bind") (memory $memory)))
  (core func $stream (canon lower (func $udp "[method]udp-socket.stream") (memory $memory)))
  (core func $local-address (canon lower (func $udp "[method]udp-socket.local-address") (memory $memory)))
  (core func $subscribe-socket (canon lower (func $udp "[method]udp-socket.subscribe")))
  (core func $drop-socket (canon resource.drop $socket))
  (core func $receive (canon lower
    (func $udp "[method]incoming-datagram-stream.receive") (memory $memory) (realloc $realloc)))
  (core func $subscribe-incoming (canon lower (func $udp "[method]incoming-datagram-stream.subscribe")))
  (core func $drop-incoming (canon resource.drop $incoming))
  (core func $check-send (canon lower (func $udp "[method]outgoing-datagram-stream.check-send") (memory $memory)))
  (core func $send (canon lower (func $udp "[method]outgoing-datagram-stream.send") (memory $memory)))
  (core func $subscribe-outgoing (canon lower (func $udp "[method]outgoing-datagram-stream.subscribe")))
  (core func $drop-outgoing (canon resource.drop $outgoing))

  ;; Functions that can fail answer 1 for failure and 0 for success, as the flat form of `result` does.
  (core module $cycle-module
    (import "heap" "memory" (memory 1))
    (import "heap" "free-all" (func $free-all))
    (import "heap" "keep-all" (func $keep-all))
    (import "heap" "realloc" (func $realloc (param i32 i32 i32 i32) (result i32)))
    (import "wasi" "get-arguments" (func $get-arguments (param i32)))
    (import "wasi" "block" (func $block (param i32)))
    (import "wasi" "poll" (func $poll (param i32 i32 i32)))
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
    (import "wasi" "subscribe-socket" (func $subscribe-socket (param i32) (result i32)))
    (import "wasi" "drop-socket" (func $drop-socket (param i32)))
    (import "wasi" "receive" (func $receive (param i32 i64 i32)))
    (import "wasi" "subscribe-incoming" (func $subscribe-incoming (param i32) (result i32)))
    (import "wasi" "drop-incoming" (func $drop-incoming (param i32)))
    (import "wasi" "check-send" (func $check-send (param i32 i32)))
    (import "wasi" "send" (func $send (param i32 i32 i32 i32)))
    (import "wasi" "subscribe-outgoing" (func $subscribe-outgoing (param i32) (result i32)))
    (import "wasi" "drop-outgoing" (func $drop-outgoing (param i32)))

    ;; Where the host puts its answers; the largest, result<ip-socket-address, error-code>, takes 36 bytes.
    (global $answer i32 (i32.const 16))
    ;; Two peers of 44 bytes: the handles of socket (+0), incoming (+4) and outgoing (+8), 0 where there is none, which
    ;; no handle ever is; then the local address (+12: case, +16: port, +18: IPv4 address) once `name` has asked for it.
    (global $a i32 (i32.const 64))
    (global $b i32 (i32.const 128))
    ;; The host's IPv4 address, as a letter has it (case, +4: port, +6: address).
    (global $host i32 (i32.const 192))
    ;; Sixteen outgoing datagrams of 44 bytes: data (+0), its length (+4), the option's case (+8), an address (+12).
    (global $letters i32 (i32.const 256))
    ;; What is sent. The first four bytes count trips and batches, so that a stray datagram is not taken for an answer.
    (global $payload i32 (i32.const 1024))

    ;; As the arguments have them.
    (global $bytes (mut i32) (i32.const 64))
    (global $datagrams (mut i32) (i32.const 16))
    ;; The last byte of the IPv4 address that sockets are bound to.
    (global $own-host (mut i32) (i32.const 1))
    ;; What comes of computing, so that it is done.
    (global $computed (mut i64) (i64.const 1))
    (global $would-block i32 (i32.const 8))

    ;; Modes are their names' letters, first letter highest.
    (global $mode-create i64 (i64.const 0x637265617465))
    (global $mode-bind i64 (i64.const 0x62696e64))
    (global $mode-bind6 i64 (i64.const 0x62696e6436))
    (global $mode-pair i64 (i64.const 0x70616972))
    (global $mode-echo i64 (i64.const 0x6563686f))
    (global $mode-dns i64 (i64.const 0x646e73))
    (global $mode-batch i64 (i64.const 0x6261746368))
    (global $mode-burst i64 (i64.const 0x6275727374))
    (global $mode-receive i64 (i64.const 0x72656365697665))
    (global $mode-compute i64 (i64.const 0x636f6d70757465))
    (global $mode-ask i64 (i64.const 0x61736b))
    (global $mode-serve i64 (i64.const 0x7365727665))
    (global $mode-sink i64 (i64.const 0x73696e6b))
    (global $mode-await i64 (i64.const 0x6177616974))
    (global $mode-bound i64 (i64.const 0x626f756e64))
    (global $mode-crowd i64 (i64.const 0x63726f7764))

    (global $network (mut i32) (i32.const 0))

    (func $failed (result i32) (i32.load8_u (global.get $answer)))

    ;; Takes the pollable over: it is a child of what it watches, so it must be gone before that is dropped.
    (func $wait (param $pollable i32)
      (call $block (local.get $pollable))
      (call $drop-pollable (local.get $pollable)))

    (func $create (param $peer i32) (param $ipv6 i32) (result i32)
      (call $create-udp-socket (local.get $ipv6) (global.get $answer))
      (if (call $failed) (then (return (i32.const 1))))
      (i32.store (local.get $peer) (i32.load offset=4 (global.get $answer)))
      (i32.const 0))

    (func $bind-loopback (param $peer i32) (param $ipv6 i32) (result i32)
      (if (local.get $ipv6)
        (then (call $start-bind (i32.load (local.get $peer)) (global.get $network)
          (i32.const 1) (i32.const 0) (i32.const 0)
          (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
          (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 1)
          (i32.const 0) (global.get $answer)))
        (else (call $start-bind (i32.load (local.get $peer)) (global.get $network)
          (i32.const 0) (i32.const 0)
          (i32.const 127) (i32.const 0) (i32.const 0) (global.get $own-host)
          (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
          (global.get $answer))))
      (if (call $failed) (then (return (i32.const 1))))
      (loop $unfinished (result i32)
        (call $finish-bind (i32.load (local.get $peer)) (global.get $answer))
        (if (i32.eqz (call $failed)) (then (return (i32.const 0))))
        (if (i32.ne (i32.load8_u offset=1 (global.get $answer)) (global.get $would-block)) (then (return (i32.const 1))))
        (call $wait (call $subscribe-socket (i32.load (local.get $peer))))
        (br $unfinished)))

    (func $name (param $peer i32) (result i32)
      (call $local-address (i32.load (local.get $peer)) (global.get $answer))
      (if (call $failed) (then (return (i32.const 1))))
      (memory.copy
        (i32.add (local.get $peer) (i32.const 12)) (i32.add (global.get $answer) (i32.const 4)) (i32.const 32))
      (i32.const 0))

    ;; $to is an IPv4 address in memory, or 0 for an unconnected socket: then the option's case is 0 too, and the host does
    ;; not look at the values read from there.
    (func $open-streams (param $peer i32) (param $to i32) (result i32)
      (call $stream (i32.load (local.get $peer)) (i32.ne (local.get $to) (i32.const 0))
        (i32.const 0) (i32.load16_u offset=4 (local.get $to))
        (i32.load8_u offset=6 (local.get $to)) (i32.load8_u offset=7 (local.get $to))
        (i32.load8_u offset=8 (local.get $to)) (i32.load8_u offset=9 (local.get $to))
        (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
        (global.get $answer))
      (if (call $failed) (then (return (i32.const 1))))
      (i32.store offset=4 (local.get $peer) (i32.load offset=4 (global.get $answer)))
      (i32.store offset=8 (local.get $peer) (i32.load offset=8 (global.get $answer)))
      (i32.const 0))

    ;; Streams first: a socket may not go while it has children. A peer that failed half way is closed as far as it came.
    (func $close (param $peer i32)
      (if (i32.load offset=4 (local.get $peer)) (then (call $drop-incoming (i32.load offset=4 (local.get $peer)))))
      (if (i32.load offset=8 (local.get $peer)) (then (call $drop-outgoing (i32.load offset=8 (local.get $peer)))))
      (if (i32.load (local.get $peer)) (then (call $drop-socket (i32.load (local.get $peer)))))
      (memory.fill (local.get $peer) (i32.const 0) (i32.const 12)))

    (func $open (param $peer i32) (param $to i32) (result i32)
      (block $failed
        (br_if $failed (call $create (local.get $peer) (i32.const 0)))
        (br_if $failed (call $bind-loopback (local.get $peer) (i32.const 0)))
        (br_if $failed (call $open-streams (local.get $peer) (local.get $to)))
        (return (i32.const 0)))
      (i32.const 1))

    ;; An unconnected socket whose address others can learn.
    (func $serve (param $peer i32) (result i32)
      (if (call $open (local.get $peer) (i32.const 0)) (then (return (i32.const 1))))
      (call $name (local.get $peer)))

    ;; Fills one outgoing datagram; $to is an address in memory, or 0 to send to the connected peer.
    (func $write-letter (param $letter i32) (param $data i32) (param $bytes i32) (param $to i32)
      (i32.store (local.get $letter) (local.get $data))
      (i32.store offset=4 (local.get $letter) (local.get $bytes))
      (i32.store8 offset=8 (local.get $letter) (i32.ne (local.get $to) (i32.const 0)))
      (if (local.get $to) (then
        (memory.copy (i32.add (local.get $letter) (i32.const 12)) (local.get $to) (i32.const 32)))))

    ;; Sends the first $count letters. A send larger than what check-send permitted traps, and one may send less.
    (func $send-letters (param $peer i32) (param $count i32) (result i32)
      (local $at i32) (local $permit i64) (local $sent i32)
      (local.set $at (global.get $letters))
      (loop $unsent (result i32)
        (call $check-send (i32.load offset=8 (local.get $peer)) (global.get $answer))
        (if (call $failed) (then (return (i32.const 1))))
        (local.set $permit (i64.load offset=8 (global.get $answer)))
        (if (i64.eqz (local.get $permit)) (then
          (call $wait (call $subscribe-outgoing (i32.load offset=8 (local.get $peer))))
          (br $unsent)))
        (call $send (i32.load offset=8 (local.get $peer)) (local.get $at)
          (select (i32.wrap_i64 (local.get $permit)) (local.get $count)
            (i64.lt_u (local.get $permit) (i64.extend_i32_u (local.get $count))))
          (global.get $answer))
        (if (call $failed) (then (return (i32.const 1))))
        (local.set $sent (i32.wrap_i64 (i64.load offset=8 (global.get $answer))))
        (local.set $at (i32.add (local.get $at) (i32.mul (local.get $sent) (i32.const 44))))
        (local.set $count (i32.sub (local.get $count) (local.get $sent)))
        (br_if $unsent (local.get $count))
        (i32.const 0)))

    (func $send-one (param $peer i32) (param $data i32) (param $bytes i32) (param $to i32) (result i32)
      (call $write-letter (global.get $letters) (local.get $data) (local.get $bytes) (local.get $to))
      (call $send-letters (local.get $peer) (i32.const 1)))

    (func $wait-incoming (param $peer i32)
      (call $wait (call $subscribe-incoming (i32.load offset=4 (local.get $peer)))))

    ;; How many datagrams came, at least one; 0 for failure. They stay on the heap until the next call.
    (func $take (param $peer i32) (param $max i32) (result i32)
      (local $count i32)
      (loop $empty (result i32)
        (call $free-all)
        (call $receive (i32.load offset=4 (local.get $peer)) (i64.extend_i32_u (local.get $max)) (global.get $answer))
        (if (call $failed) (then (return (i32.const 0))))
        (local.set $count (i32.load offset=8 (global.get $answer)))
        (if (i32.eqz (local.get $count)) (then
          (call $wait-incoming (local.get $peer))
          (br $empty)))
        (local.get $count)))

    ;; Whether an incoming datagram (data +0, its length +4, the sender +8) is not the one expected.
    (func $strange (param $letter i32) (param $bytes i32) (result i32)
      (if (i32.ne (i32.load offset=4 (local.get $letter)) (local.get $bytes)) (then (return (i32.const 1))))
      (i32.ne (i32.load (i32.load (local.get $letter))) (i32.load (global.get $payload))))

    ;; Waits before it receives, as guests do that were written for poll(2). Answers the incoming datagram, or 0.
    (func $take-one (param $peer i32) (result i32)
      (call $wait-incoming (local.get $peer))
      (if (i32.ne (call $take (local.get $peer) (i32.const 1)) (i32.const 1)) (then (return (i32.const 0))))
      (if (call $strange (i32.load offset=4 (global.get $answer)) (global.get $bytes))
        (then (return (i32.const 0))))
      (i32.load offset=4 (global.get $answer)))

    (func $stamp
      (i32.store (global.get $payload) (i32.add (i32.load (global.get $payload)) (i32.const 1))))

    ;; a asks, b sends what it got back to where it came from. $to is b's address, or 0 if a is connected to it.
    (func $trip (param $to i32) (result i32)
      (local $letter i32)
      (call $stamp)
      (block $failed
        (br_if $failed (call $send-one (global.get $a) (global.get $payload) (global.get $bytes) (local.get $to)))
        (br_if $failed (i32.eqz (local.tee $letter (call $take-one (global.get $b)))))
        (br_if $failed (call $send-one
          (global.get $b) (i32.load (local.get $letter)) (global.get $bytes)
          (i32.add (local.get $letter) (i32.const 8))))
        (br_if $failed (i32.eqz (local.tee $letter (call $take-one (global.get $a)))))
        ;; The answer must come from b: port, then IPv4 address.
        (br_if $failed (i32.ne (i32.load16_u offset=12 (local.get $letter)) (i32.load16_u offset=16 (global.get $b))))
        (br_if $failed (i32.ne (i32.load offset=14 (local.get $letter)) (i32.load offset=18 (global.get $b))))
        (return (i32.const 0)))
      (i32.const 1))

    (func $b-address (result i32) (i32.add (global.get $b) (i32.const 12)))

    (func $open-pair (result i32)
      (if (call $serve (global.get $b)) (then (return (i32.const 1))))
      (call $open (global.get $a) (i32.const 0)))

    ;; Tells the host where a is.
    (func $report (result i32)
      (call $send-one (global.get $a) (global.get $payload) (global.get $bytes) (global.get $host)))

    (func $open-reported (result i32)
      (if (call $open (global.get $a) (i32.const 0)) (then (return (i32.const 1))))
      (call $report))

    ;; Waits, then takes what is there; sends it back to where it came from if asked to.
    (func $take-all (param $answering i32) (result i32)
      (call $wait-incoming (global.get $a))
      (if (i32.eqz (call $take (global.get $a) (i32.const 16))) (then (return (i32.const 1))))
      (if (result i32) (local.get $answering)
        (then (call $answer-all (global.get $a)))
        (else (i32.const 0))))

    ;; Sends what was received last back to where it came from.
    (func $answer-all (param $peer i32) (result i32)
      (local $letter i32) (local $left i32)
      (local.set $letter (i32.load offset=4 (global.get $answer)))
      (local.set $left (i32.load offset=8 (global.get $answer)))
      (loop $next (result i32)
        (if (i32.eqz (local.get $left)) (then (return (i32.const 0))))
        (if (call $send-one (local.get $peer)
          (i32.load (local.get $letter)) (i32.load offset=4 (local.get $letter))
          (i32.add (local.get $letter) (i32.const 8)))
          (then (return (i32.const 1))))
        (local.set $letter (i32.add (local.get $letter) (i32.const 40)))
        (local.set $left (i32.sub (local.get $left) (i32.const 1)))
        (br $next)))

    ;; A socket that waits for a datagram, and is forgotten.
    (func $await (result i32)
      (if (call $open (global.get $a) (i32.const 0)) (then (return (i32.const 1))))
      (call $receive (i32.load offset=4 (global.get $a)) (i64.const 1) (global.get $answer))
      (call $failed))

    ;; A peer of 12 bytes for each socket, and behind them all their pollables. Answers where they are.
    (func $open-crowd (param $count i32) (result i32)
      (local $peers i32) (local $end i32) (local $peer i32)
      (local.set $peers (call $realloc
        (i32.const 0) (i32.const 0) (i32.const 4) (i32.mul (local.get $count) (i32.const 16))))
      (call $keep-all)
      (local.set $end (i32.add (local.get $peers) (i32.mul (local.get $count) (i32.const 12))))
      (local.set $peer (local.get $peers))
      (loop $next
        (if (call $await) (then (return (i32.const 0))))
        (memory.copy (local.get $peer) (global.get $a) (i32.const 12))
        (local.set $peer (i32.add (local.get $peer) (i32.const 12)))
        (br_if $next (i32.lt_u (local.get $peer) (local.get $end))))
      (local.get $peers))

    ;; Sends the ports of all from the last, when that has got a datagram.
    (func $report-ports (param $peers i32) (param $count i32) (result i32)
      (local $at i32)
      (if (i32.eqz (call $take (global.get $a) (i32.const 1))) (then (return (i32.const 1))))
      (loop $next
        (call $local-address
          (i32.load (i32.add (local.get $peers) (i32.mul (local.get $at) (i32.const 12)))) (global.get $answer))
        (if (call $failed) (then (return (i32.const 1))))
        (i32.store16 (i32.add (global.get $payload) (i32.shl (local.get $at) (i32.const 1)))
          (i32.load16_u offset=8 (global.get $answer)))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br_if $next (i32.lt_u (local.get $at) (local.get $count))))
      (call $send-one (global.get $a) (global.get $payload) (i32.shl (local.get $count) (i32.const 1)) (global.get $host)))

    ;; Ends only with a failure. Several sockets may be ready at once, so nothing is freed before all were served.
    (func $crowd (param $count i32) (result i32)
      (local $peers i32) (local $pollables i32) (local $at i32) (local $end i32) (local $peer i32)
      (if (i32.gt_u (i32.sub (local.get $count) (i32.const 1)) (i32.const 599)) (then (return (i32.const 1))))
      (block $failed
        (br_if $failed (i32.eqz (local.tee $peers (call $open-crowd (local.get $count)))))
        (br_if $failed (call $report))
        (br_if $failed (call $report-ports (local.get $peers) (local.get $count)))
        (local.set $pollables (i32.add (local.get $peers) (i32.mul (local.get $count) (i32.const 12))))
        (loop $next
          (i32.store (i32.add (local.get $pollables) (i32.shl (local.get $at) (i32.const 2)))
            (call $subscribe-incoming (i32.load offset=4
              (i32.add (local.get $peers) (i32.mul (local.get $at) (i32.const 12))))))
          (local.set $at (i32.add (local.get $at) (i32.const 1)))
          (br_if $next (i32.lt_u (local.get $at) (local.get $count))))
        (loop $more
          (call $free-all)
          (call $poll (local.get $pollables) (local.get $count) (global.get $answer))
          (local.set $at (i32.load (global.get $answer)))
          (local.set $end (i32.add (local.get $at) (i32.shl (i32.load offset=4 (global.get $answer)) (i32.const 2))))
          (loop $ready
            (local.set $peer (i32.add (local.get $peers) (i32.mul (i32.load (local.get $at)) (i32.const 12))))
            (call $receive (i32.load offset=4 (local.get $peer)) (i64.const 16) (global.get $answer))
            (br_if $failed (call $failed))
            (br_if $failed (call $answer-all (local.get $peer)))
            (local.set $at (i32.add (local.get $at) (i32.const 4)))
            (br_if $ready (i32.lt_u (local.get $at) (local.get $end))))
          (br $more)))
      (i32.const 1))

    (func $open-batch (result i32)
      (local $letter i32) (local $left i32)
      (local.set $letter (global.get $letters))
      (local.set $left (global.get $datagrams))
      (loop $next
        (call $write-letter (local.get $letter) (global.get $payload) (global.get $bytes) (i32.const 0))
        (local.set $letter (i32.add (local.get $letter) (i32.const 44)))
        (br_if $next (local.tee $left (i32.sub (local.get $left) (i32.const 1)))))
      (if (call $serve (global.get $b)) (then (return (i32.const 1))))
      (call $open (global.get $a) (call $b-address)))

    ;; Takes what is there until a batch is complete.
    (func $take-batch (param $peer i32) (result i32)
      (local $letter i32) (local $left i32) (local $count i32)
      (local.set $left (global.get $datagrams))
      (loop $more
        (local.set $count (call $take (local.get $peer) (local.get $left)))
        (if (i32.eqz (local.get $count)) (then (return (i32.const 1))))
        (local.set $left (i32.sub (local.get $left) (local.get $count)))
        (local.set $letter (i32.load offset=4 (global.get $answer)))
        (loop $next
          (if (call $strange (local.get $letter) (global.get $bytes)) (then (return (i32.const 1))))
          (local.set $letter (i32.add (local.get $letter) (i32.const 40)))
          (br_if $next (local.tee $count (i32.sub (local.get $count) (i32.const 1)))))
        (br_if $more (local.get $left)))
      (i32.const 0))

    (func $batch (result i32)
      (call $stamp)
      (if (call $send-letters (global.get $a) (global.get $datagrams)) (then (return (i32.const 1))))
      (call $take-batch (global.get $b)))

    (func $burst (result i32)
      (local $left i32)
      (call $stamp)
      (local.set $left (global.get $datagrams))
      (loop $next
        (if (call $send-one (global.get $a) (global.get $payload) (global.get $bytes) (i32.const 0))
          (then (return (i32.const 1))))
        (br_if $next (local.tee $left (i32.sub (local.get $left) (i32.const 1)))))
      (call $take-batch (global.get $b)))

    (func $request (result i32)
      (call $stamp)
      (if (call $send-one (global.get $a) (global.get $payload) (i32.const 4) (global.get $host))
        (then (return (i32.const 1))))
      (call $take-batch (global.get $a)))

    ;; A chain of multiplications, each of which waits for the one before.
    (func $compute
      (local $left i32) (local $value i64)
      (local.set $left (i32.const 7000000))
      (local.set $value (global.get $computed))
      (loop $next
        (local.set $value (i64.add
          (i64.mul (local.get $value) (i64.const 6364136223846793005)) (i64.const 1442695040888963407)))
        (br_if $next (local.tee $left (i32.sub (local.get $left) (i32.const 1)))))
      (global.set $computed (local.get $value)))

    ;; Whether a mode's sockets stay open, and the guest with them.
    (func $stays (param $mode i64) (result i32)
      (i32.or
        (i64.eq (local.get $mode) (global.get $mode-await))
        (i64.eq (local.get $mode) (global.get $mode-bound))))

    ;; What a mode does once, before the first of COUNT. Also the place where an unknown mode fails.
    (func $prepare (param $mode i64) (result i32)
      (if (i64.eq (local.get $mode) (global.get $mode-create)) (then (return (i32.const 0))))
      (if (i64.eq (local.get $mode) (global.get $mode-bind)) (then (return (i32.const 0))))
      (if (i64.eq (local.get $mode) (global.get $mode-bind6)) (then (return (i32.const 0))))
      (if (i64.eq (local.get $mode) (global.get $mode-pair)) (then (return (i32.const 0))))
      (if (i64.eq (local.get $mode) (global.get $mode-echo)) (then (return (call $open-pair))))
      (if (i64.eq (local.get $mode) (global.get $mode-dns)) (then (return (call $serve (global.get $b)))))
      (if (i64.eq (local.get $mode) (global.get $mode-batch)) (then (return (call $open-batch))))
      (if (i64.eq (local.get $mode) (global.get $mode-burst)) (then (return (call $open-batch))))
      (if (i64.eq (local.get $mode) (global.get $mode-receive)) (then
        (return (call $open (global.get $a) (i32.const 0)))))
      (if (i64.eq (local.get $mode) (global.get $mode-compute)) (then (return (call $open-reported))))
      (if (i64.eq (local.get $mode) (global.get $mode-ask)) (then (return (call $open-reported))))
      (if (i64.eq (local.get $mode) (global.get $mode-serve)) (then (return (call $open-reported))))
      (if (i64.eq (local.get $mode) (global.get $mode-sink)) (then (return (call $open-reported))))
      (if (call $stays (local.get $mode)) (then (return (i32.const 0))))
      (i32.const 1))

    ;; What a mode does COUNT times, where that leaves nothing open. A failure leaves its sockets to $run.
    (func $cycle (param $mode i64) (result i32)
      (local $ipv6 i32)
      (block $failed
        (if (i64.eq (local.get $mode) (global.get $mode-echo)) (then (return (call $trip (call $b-address)))))
        (if (i64.eq (local.get $mode) (global.get $mode-batch)) (then (return (call $batch))))
        (if (i64.eq (local.get $mode) (global.get $mode-burst)) (then (return (call $burst))))
        (if (i64.eq (local.get $mode) (global.get $mode-receive)) (then (return (call $request))))
        (if (i64.eq (local.get $mode) (global.get $mode-compute)) (then
          (call $compute)
          (return (i32.const 0))))
        (if (i64.eq (local.get $mode) (global.get $mode-ask)) (then
          (call $compute)
          (return (call $request))))
        (if (i64.eq (local.get $mode) (global.get $mode-serve)) (then (return (call $take-all (i32.const 1)))))
        (if (i64.eq (local.get $mode) (global.get $mode-sink)) (then (return (call $take-all (i32.const 0)))))
        (if (i64.eq (local.get $mode) (global.get $mode-await)) (then (return (call $await))))
        (if (i64.eq (local.get $mode) (global.get $mode-bound)) (then (return (call $open (global.get $a) (i32.const 0)))))
        (if (i64.eq (local.get $mode) (global.get $mode-dns)) (then
          (br_if $failed (call $open (global.get $a) (call $b-address)))
          (br_if $failed (call $trip (i32.const 0)))
          (call $close (global.get $a))
          (return (i32.const 0))))
        (if (i64.eq (local.get $mode) (global.get $mode-pair)) (then
          (br_if $failed (call $open-pair))
          (br_if $failed (call $trip (call $b-address)))
          (call $close (global.get $a))
          (call $close (global.get $b))
          (return (i32.const 0))))
        (local.set $ipv6 (i64.eq (local.get $mode) (global.get $mode-bind6)))
        (br_if $failed (call $create (global.get $a) (local.get $ipv6)))
        (if (i64.ne (local.get $mode) (global.get $mode-create)) (then
          (br_if $failed (call $bind-loopback (global.get $a) (local.get $ipv6)))))
        (call $close (global.get $a))
        (return (i32.const 0)))
      (i32.const 1))

    (func $repeat (param $mode i64) (param $count i32) (result i32)
      (if (call $prepare (local.get $mode)) (then (return (i32.const 1))))
      (loop $next (result i32)
        (if (i32.eqz (local.get $count)) (then (return (i32.const 0))))
        (if (call $cycle (local.get $mode)) (then (return (i32.const 1))))
        (local.set $count (i32.sub (local.get $count) (i32.const 1)))
        (br $next)))

    ;; The string's letters, first letter highest; 0, which is no mode, where they do not fit.
    (func $letters-of (param $string i32) (result i64)
      (local $at i32) (local $end i32) (local $value i64)
      (if (i32.gt_u (i32.load offset=4 (local.get $string)) (i32.const 8)) (then (return (i64.const 0))))
      (local.set $at (i32.load (local.get $string)))
      (local.set $end (i32.add (local.get $at) (i32.load offset=4 (local.get $string))))
      (loop $next (result i64)
        (if (i32.eq (local.get $at) (local.get $end)) (then (return (local.get $value))))
        (local.set $value (i64.or (i64.shl (local.get $value) (i64.const 8)) (i64.load8_u (local.get $at))))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br $next)))

    ;; The decimal number in the string, -1 where there is none. Nine digits are sure to fit.
    (func $number-of (param $string i32) (result i32)
      (local $at i32) (local $end i32) (local $digit i32) (local $value i32)
      (local.set $at (i32.load (local.get $string)))
      (local.set $end (i32.add (local.get $at) (i32.load offset=4 (local.get $string))))
      (if (i32.eq (local.get $at) (local.get $end)) (then (return (i32.const -1))))
      (if (i32.gt_u (i32.load offset=4 (local.get $string)) (i32.const 9)) (then (return (i32.const -1))))
      (loop $next (result i32)
        (if (i32.eq (local.get $at) (local.get $end)) (then (return (local.get $value))))
        (local.set $digit (i32.sub (i32.load8_u (local.get $at)) (i32.const 48)))
        (if (i32.gt_u (local.get $digit) (i32.const 9)) (then (return (i32.const -1))))
        (local.set $value (i32.add (i32.mul (local.get $value) (i32.const 10)) (local.get $digit)))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br $next)))

    (func (export "run") (result i32)
      (local $given i32) (local $strings i32) (local $mode i64) (local $count i32) (local $port i32) (local $status i32)
      (call $get-arguments (global.get $answer))
      (local.set $given (i32.load offset=4 (global.get $answer)))
      (if (i32.or (i32.lt_u (local.get $given) (i32.const 3)) (i32.gt_u (local.get $given) (i32.const 7)))
        (then (return (i32.const 1))))
      (if (i32.eq (local.get $given) (i32.const 5)) (then (return (i32.const 1))))
      ;; A string is a pointer and a length: eight bytes each, and the first is argv 0.
      (local.set $strings (i32.load (global.get $answer)))
      (local.set $mode (call $letters-of (i32.add (local.get $strings) (i32.const 8))))
      (local.set $count (call $number-of (i32.add (local.get $strings) (i32.const 16))))
      (if (i32.eq (local.get $count) (i32.const -1)) (then (return (i32.const 1))))
      (if (i32.ge_u (local.get $given) (i32.const 4)) (then
        (local.set $port (call $number-of (i32.add (local.get $strings) (i32.const 24))))
        (if (i32.gt_u (local.get $port) (i32.const 65535)) (then (return (i32.const 1))))
        (i32.store16 offset=4 (global.get $host) (local.get $port))
        (i32.store offset=6 (global.get $host) (i32.const 0x0100007f))))
      (if (i32.ge_u (local.get $given) (i32.const 6)) (then
        (global.set $bytes (call $number-of (i32.add (local.get $strings) (i32.const 32))))
        (if (i32.gt_u (i32.sub (global.get $bytes) (i32.const 4)) (i32.const 1196)) (then (return (i32.const 1))))
        (global.set $datagrams (call $number-of (i32.add (local.get $strings) (i32.const 40))))
        (if (i32.gt_u (i32.sub (global.get $datagrams) (i32.const 1)) (i32.const 15))
          (then (return (i32.const 1))))))
      (if (i32.eq (local.get $given) (i32.const 7)) (then
        (global.set $own-host (call $number-of (i32.add (local.get $strings) (i32.const 48))))
        (if (i32.gt_u (i32.sub (global.get $own-host) (i32.const 1)) (i32.const 253))
          (then (return (i32.const 1))))))

      ;; One network for the whole run, as guests' libraries keep it.
      (global.set $network (call $instance-network))
      (if (i64.eq (local.get $mode) (global.get $mode-crowd)) (then (return (call $crowd (local.get $count)))))
      (local.set $status (call $repeat (local.get $mode) (local.get $count)))
      (if (call $stays (local.get $mode)) (then
        (if (local.get $status) (then (return (i32.const 1))))
        (if (call $report) (then (return (i32.const 1))))
        (call $wait-incoming (global.get $a))))
      (call $close (global.get $a))
      (call $close (global.get $b))
      (call $drop-network (global.get $network))
      (local.get $status))
  )
  (core instance $cycle (instantiate $cycle-module
    (with "heap" (instance $heap))
    (with "wasi" (instance
      (export "get-arguments" (func $get-arguments))
      (export "block" (func $block))
      (export "poll" (func $poll))
      (export "drop-pollable" (func $drop-pollable))
      (export "instance-network" (func $instance-network))
      (export "drop-network" (func $drop-network))
      (export "create-udp-socket" (func $create-udp-socket))
      (export "start-bind" (func $start-bind))
      (export "finish-bind" (func $finish-bind))
      (export "stream" (func $stream))
      (export "local-address" (func $local-address))
      (export "subscribe-socket" (func $subscribe-socket))
      (export "drop-socket" (func $drop-socket))
      (export "receive" (func $receive))
      (export "subscribe-incoming" (func $subscribe-incoming))
      (export "drop-incoming" (func $drop-incoming))
      (export "check-send" (func $check-send))
      (export "send" (func $send))
      (export "subscribe-outgoing" (func $subscribe-outgoing))
      (export "drop-outgoing" (func $drop-outgoing))
    ))))

  (func $run (result (result)) (canon lift (core func $cycle "run")))
  (instance $cli-run (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $cli-run))
)
