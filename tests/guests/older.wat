;; A guest of an older wasi:sockets, as in older_wit.rs: binds a socket, connects it to itself, and sends itself a datagram.
;; `run` returns 0, or the number of the step that went wrong.
(component
  (import "wasi:sockets/network@0.2.0-rc-2023-10-18" (instance $network
    (export "network" (type (sub resource)))
    (type $error-code (enum "unknown" "access-denied" "not-supported" "invalid-argument" "would-block" "invalid-state"
      "new-socket-limit" "address-not-bindable" "address-in-use" "remote-unreachable" "datagram-too-large"))
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

  (import "wasi:sockets/instance-network@0.2.0-rc-2023-10-18" (instance $instance-network
    (export "network" (type $network' (eq $network)))
    (export "instance-network" (func (result (own $network'))))
  ))

  (import "wasi:sockets/udp@0.2.0-rc-2023-10-18" (instance $udp
    (export "network" (type $network' (eq $network)))
    (export "error-code" (type $error-code' (eq $error-code)))
    (export "ip-socket-address" (type $ip-socket-address' (eq $ip-socket-address)))
    (type $datagram (record (field "data" (list u8)) (field "remote-address" $ip-socket-address')))
    (export "datagram" (type $datagram' (eq $datagram)))
    (export "udp-socket" (type $socket (sub resource)))
    (export "[method]udp-socket.start-bind" (func (param "self" (borrow $socket)) (param "network" (borrow $network'))
      (param "local-address" $ip-socket-address') (result (result (error $error-code')))))
    (export "[method]udp-socket.finish-bind" (func (param "self" (borrow $socket)) (result (result (error $error-code')))))
    (export "[method]udp-socket.start-connect" (func (param "self" (borrow $socket)) (param "network" (borrow $network'))
      (param "remote-address" $ip-socket-address') (result (result (error $error-code')))))
    (export "[method]udp-socket.finish-connect" (func (param "self" (borrow $socket))
      (result (result (error $error-code')))))
    (export "[method]udp-socket.receive" (func (param "self" (borrow $socket)) (param "max-results" u64)
      (result (result (list $datagram') (error $error-code')))))
    (export "[method]udp-socket.send" (func (param "self" (borrow $socket)) (param "datagrams" (list $datagram'))
      (result (result u64 (error $error-code')))))
    (export "[method]udp-socket.local-address" (func (param "self" (borrow $socket))
      (result (result $ip-socket-address' (error $error-code')))))
  ))
  (alias export $udp "udp-socket" (type $socket))

  (import "wasi:sockets/udp-create-socket@0.2.0-rc-2023-10-18" (instance $create
    (export "error-code" (type $error-code' (eq $error-code)))
    (export "ip-address-family" (type $ip-address-family' (eq $ip-address-family)))
    (export "udp-socket" (type $socket' (eq $socket)))
    (export "create-udp-socket" (func (param "address-family" $ip-address-family')
      (result (result (own $socket') (error $error-code')))))
  ))

  (core module $heap-module
    (memory (export "memory") 1)
    (global $next (mut i32) (i32.const 1024))
    ;; A handful of datagrams: nothing is freed.
    (func (export "realloc") (param $old i32) (param $old-size i32) (param $align i32) (param $size i32) (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $next) (i32.const 7)) (i32.const -8)))
      (global.set $next (i32.add (local.get $at) (local.get $size)))
      (local.get $at))
  )
  (core instance $heap (instantiate $heap-module))
  (alias core export $heap "memory" (core memory $memory))
  (alias core export $heap "realloc" (core func $realloc))

  (core func $instance-network (canon lower (func $instance-network "instance-network")))
  (core func $create (canon lower (func $create "create-udp-socket") (memory $memory)))
  (core func $start-bind (canon lower (func $udp "[method]udp-socket.start-bind") (memory $memory)))
  (core func $finish-bind (canon lower (func $udp "[method]udp-socket.finish-bind") (memory $memory)))
  (core func $start-connect (canon lower (func $udp "[method]udp-socket.start-connect") (memory $memory)))
  (core func $finish-connect (canon lower (func $udp "[method]udp-socket.finish-connect") (memory $memory)))
  (core func $receive (canon lower (func $udp "[method]udp-socket.receive") (memory $memory) (realloc $realloc)))
  (core func $send (canon lower (func $udp "[method]udp-socket.send") (memory $memory)))
  (core func $local-address (canon lower (func $udp "[method]udp-socket.local-address") (memory $memory)))
  (core func $drop-socket (canon resource.drop $socket))
  (core func $drop-network (canon resource.drop $network))

  (core module $main-module
    ;; The socket, the network, the twelve values of an address, and where to put the answer.
    (type $with-address (func (param i32 i32  i32  i32 i32  i32 i32 i32 i32 i32 i32 i32 i32  i32  i32)))
    (import "heap" "memory" (memory 1))
    (import "wasi" "instance-network" (func $instance-network (result i32)))
    (import "wasi" "create" (func $create (param i32 i32)))
    (import "wasi" "start-bind" (func $start-bind (type $with-address)))
    (import "wasi" "finish-bind" (func $finish-bind (param i32 i32)))
    (import "wasi" "start-connect" (func $start-connect (type $with-address)))
    (import "wasi" "finish-connect" (func $finish-connect (param i32 i32)))
    (import "wasi" "receive" (func $receive (param i32 i64 i32)))
    (import "wasi" "send" (func $send (param i32 i32 i32 i32)))
    (import "wasi" "local-address" (func $local-address (param i32 i32)))
    (import "wasi" "drop-socket" (func $drop-socket (param i32)))
    (import "wasi" "drop-network" (func $drop-network (param i32)))

    ;; Where the host puts its answers: the result's case (+0), then, for all but a count (+8), what is in it (+4).
    (global $answer i32 (i32.const 16))
    ;; A datagram: data (+0), its length (+4), an address (+8: case, +12: port, +14: IPv4 address).
    (global $datagram i32 (i32.const 64))
    (data (i32.const 128) "older")
    (global $payload i32 (i32.const 128))
    (global $would-block i32 (i32.const 4))

    (func $failed (result i32) (i32.load8_u (global.get $answer)))

    ;; Whether an error came that has its code behind the case's padding, and it is would-block.
    (func $is-would-block (result i32)
      (i32.and (call $failed) (i32.eq (i32.load8_u offset=4 (global.get $answer)) (global.get $would-block))))

    (func (export "run") (result i32)
      (local $socket i32) (local $network i32) (local $port i32) (local $left i32) (local $received i32)
      (local.set $network (call $instance-network))
      (call $create (i32.const 0) (global.get $answer))
      (if (call $failed) (then (return (i32.const 1))))
      (local.set $socket (i32.load offset=4 (global.get $answer)))

      (call $start-bind (local.get $socket) (local.get $network)
        (i32.const 0) (i32.const 0) (i32.const 127) (i32.const 0) (i32.const 0) (i32.const 1)
        (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (global.get $answer))
      (if (call $failed) (then (return (i32.const 2))))
      (call $finish-bind (local.get $socket) (global.get $answer))
      (if (call $failed) (then (return (i32.const 3))))

      (call $receive (local.get $socket) (i64.const 1) (global.get $answer))
      (if (i32.eqz (call $is-would-block)) (then (return (i32.const 4))))

      (call $local-address (local.get $socket) (global.get $answer))
      (if (call $failed) (then (return (i32.const 5))))
      (i32.store (global.get $datagram) (global.get $payload))
      (i32.store offset=4 (global.get $datagram) (i32.const 5))
      (memory.copy
        (i32.add (global.get $datagram) (i32.const 8)) (i32.add (global.get $answer) (i32.const 4)) (i32.const 32))
      (local.set $port (i32.load16_u offset=12 (global.get $datagram)))

      (call $start-connect (local.get $socket) (local.get $network)
        (i32.const 0) (local.get $port) (i32.const 127) (i32.const 0) (i32.const 0) (i32.const 1)
        (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (global.get $answer))
      (if (call $failed) (then (return (i32.const 6))))
      (call $finish-connect (local.get $socket) (global.get $answer))
      (if (call $failed) (then (return (i32.const 7))))

      (call $send (local.get $socket) (global.get $datagram) (i32.const 1) (global.get $answer))
      (if (call $failed) (then (return (i32.const 8))))
      (if (i64.ne (i64.load offset=8 (global.get $answer)) (i64.const 1)) (then (return (i32.const 9))))

      ;; This version has nothing to wait with in what is here of it.
      (local.set $left (i32.const 10000000))
      (loop $next
        (local.set $left (i32.sub (local.get $left) (i32.const 1)))
        (if (i32.eqz (local.get $left)) (then (return (i32.const 10))))
        (call $receive (local.get $socket) (i64.const 1) (global.get $answer))
        (br_if $next (call $is-would-block)))
      (if (call $failed) (then (return (i32.const 11))))
      (if (i32.ne (i32.load offset=8 (global.get $answer)) (i32.const 1)) (then (return (i32.const 12))))
      (local.set $received (i32.load offset=4 (global.get $answer)))
      (if (i32.ne (i32.load offset=4 (local.get $received)) (i32.const 5)) (then (return (i32.const 13))))
      (if (i32.ne (i32.load (i32.load (local.get $received))) (i32.load (global.get $payload)))
        (then (return (i32.const 14))))
      (if (i32.ne (i32.load16_u offset=12 (local.get $received)) (local.get $port)) (then (return (i32.const 15))))

      (call $drop-socket (local.get $socket))
      (call $drop-network (local.get $network))
      (i32.const 0))
  )
  (core instance $main (instantiate $main-module
    (with "heap" (instance $heap))
    (with "wasi" (instance
      (export "instance-network" (func $instance-network))
      (export "create" (func $create))
      (export "start-bind" (func $start-bind))
      (export "finish-bind" (func $finish-bind))
      (export "start-connect" (func $start-connect))
      (export "finish-connect" (func $finish-connect))
      (export "receive" (func $receive))
      (export "send" (func $send))
      (export "local-address" (func $local-address))
      (export "drop-socket" (func $drop-socket))
      (export "drop-network" (func $drop-network))
    ))))
  (func (export "run") (result u32) (canon lift (core func $main "run")))
)
