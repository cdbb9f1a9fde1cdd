;; The built-in guest cycle2.wat once more, for WASI 0.3: the same modes, so that both can be measured side by side. A
;; wasi:cli/run command with the arguments MODE COUNT [PORT [BYTES DATAGRAMS [HOST]]] (after argv 0); run answers err for
;; an argument it does not know and for every error a socket reports. A datagram has BYTES, 4 to 1200, else 64; DATAGRAMS are
;; 1 to 16, else 16; sockets of IPv4 are bound to 127.0.0.HOST, 1 to 254, else 1.
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
;;   serve    open a socket; COUNT times wait for a datagram and send it back
;;   sink     open a socket; COUNT times wait for a datagram
;;   await    open COUNT sockets that wait for a datagram, then wait for ever
;;   bound    open COUNT sockets that do nothing, then wait for ever
;;   crowd    open COUNT sockets, up to 600, that wait for a datagram; when the last has got one, send their ports to
;;            127.0.0.1:PORT, two bytes each; then send back what comes to any of them, for ever
;;
;; Where both ends live in this guest they use loopback, whose losses would need a full receive buffer; so there is no
;; timeout.
;;
;; 0.3 has one datagram per call. So a batch is so many sends before the first is waited for, and serve and sink count
;; datagrams where 0.2 counts what arrives together. A socket that connects is not bound first: connect does that.
;;
;; send and receive are lowered async, as languages' bindings have them: a call that is done at once says so, and the guest is not
;; suspended; for any other it waits on a waitable set.
(component
  (import "wasi:cli/environment@0.3.0" (instance $environment
    (export "get-arguments" (func (result (list string))))
  ))

  (import "wasi:sockets/types@0.3.0" (instance $sockets
    (type $error-code (variant (case "access-denied") (case "not-supported") (case "invalid-argument")
      (case "out-of-memory") (case "timeout") (case "invalid-state") (case "address-not-bindable")
      (case "address-in-use") (case "remote-unreachable") (case "connection-refused") (case "connection-broken")
      (case "connection-reset") (case "connection-aborted") (case "datagram-too-large")
      (case "other" (option string))))
    (export "error-code" (type $error-code' (eq $error-code)))
    (type $ip-address-family (enum "ipv4" "ipv6"))
    (export "ip-address-family" (type $ip-address-family' (eq $ip-address-family)))
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
    (export "ip-socket-address" (type $ip-socket-address' (eq $ip-socket-address)))

    (export "udp-socket" (type $socket (sub resource)))

    (export "[static]udp-socket.create" (func (param "address-family" $ip-address-family')
      (result (result (own $socket) (error $error-code')))))
    (export "[method]udp-socket.bind" (func (param "self" (borrow $socket))
      (param "local-address" $ip-socket-address') (result (result (error $error-code')))))
    (export "[method]udp-socket.connect" (func (param "self" (borrow $socket))
      (param "remote-address" $ip-socket-address') (result (result (error $error-code')))))
    (export "[method]udp-socket.send" (func async (param "self" (borrow $socket)) (param "data" (list u8))
      (param "remote-address" (option $ip-socket-address')) (result (result (error $error-code')))))
    (export "[method]udp-socket.receive" (func async (param "self" (borrow $socket))
      (result (result (tuple (list u8) $ip-socket-address') (error $error-code')))))
    (export "[method]udp-socket.get-local-address" (func (param "self" (borrow $socket))
      (result (result $ip-socket-address' (error $error-code')))))
  ))
  (alias export $sockets "udp-socket" (type $socket))

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

  ;; Where an answer can be an error, $realloc is for the text in it.
  (core func $get-arguments (canon lower (func $environment "get-arguments") (memory $memory) (realloc $realloc)))
  (core func $create-udp-socket (canon lower
    (func $sockets "[static]udp-socket.create") (memory $memory) (realloc $realloc)))
  (core func $bind (canon lower (func $sockets "[method]udp-socket.bind") (memory $memory) (realloc $realloc)))
  (core func $connect (canon lower (func $sockets "[method]udp-socket.connect") (memory $memory) (realloc $realloc)))
  (core func $send (canon lower
    (func $sockets "[method]udp-socket.send") async (memory $memory) (realloc $realloc)))
  (core func $receive (canon lower
    (func $sockets "[method]udp-socket.receive") async (memory $memory) (realloc $realloc)))
  (core func $local-address (canon lower
    (func $sockets "[method]udp-socket.get-local-address") (memory $memory) (realloc $realloc)))
  (core func $drop-socket (canon resource.drop $socket))
  (core func $new-set (canon waitable-set.new))
  (core func $join (canon waitable.join))
  (core func $wait-set (canon waitable-set.wait (memory $memory)))
  (core func $poll-set (canon waitable-set.poll (memory $memory)))
  (core func $drop-subtask (canon subtask.drop))
  (core func $task-return (canon task.return (result (result))))

  ;; Functions that can fail answer 1 for failure and 0 for success, as the flat form of `result` does.
  (core module $cycle-module
    (import "heap" "memory" (memory 1))
    (import "heap" "free-all" (func $free-all))
    (import "heap" "keep-all" (func $keep-all))
    (import "heap" "realloc" (func $realloc (param i32 i32 i32 i32) (result i32)))
    (import "wasi" "get-arguments" (func $get-arguments (param i32)))
    (import "wasi" "create-udp-socket" (func $create-udp-socket (param i32 i32)))
    ;; The socket, then the twelve values of an address (its case and the wider case's eleven), then where to put the
    ;; answer.
    (import "wasi" "bind" (func $bind
      (param i32  i32  i32 i32  i32 i32 i32 i32 i32 i32 i32 i32  i32  i32)))
    (import "wasi" "connect" (func $connect
      (param i32  i32  i32 i32  i32 i32 i32 i32 i32 i32 i32 i32  i32  i32)))
    ;; More than four values, so they are in memory.
    (import "wasi" "send" (func $send (param $values i32) (param $answer i32) (result i32)))
    (import "wasi" "receive" (func $receive (param $socket i32) (param $answer i32) (result i32)))
    (import "wasi" "local-address" (func $local-address (param i32 i32)))
    (import "wasi" "drop-socket" (func $drop-socket (param i32)))
    (import "wasi" "new-set" (func $new-set (result i32)))
    (import "wasi" "join" (func $join (param $subtask i32) (param $set i32)))
    (import "wasi" "wait-set" (func $wait-set (param $set i32) (param $event i32) (result i32)))
    (import "wasi" "poll-set" (func $poll-set (param $set i32) (param $event i32) (result i32)))
    (import "wasi" "drop-subtask" (func $drop-subtask (param i32)))
    (import "wasi" "task-return" (func $task-return (param i32)))

    ;; Where the host puts its answers; the largest, that of receive, takes 44 bytes: the result's case (+0), data (+4),
    ;; its length (+8), the sender (+12: case, +16: port, +18: IPv4 address).
    (global $answer i32 (i32.const 16))
    ;; Two peers of 36 bytes: the socket's handle (+0), 0 where there is none, which no handle ever is; then the local
    ;; address (+4: case, +8: port, +10: IPv4 address) once `name` has asked for it.
    (global $a i32 (i32.const 64))
    (global $b i32 (i32.const 112))
    ;; The host's IPv4 address, as a letter has it (case, +4: port, +6: address).
    (global $host i32 (i32.const 160))
    ;; What a waitable set tells: a subtask's handle and its state.
    (global $event i32 (i32.const 192))
    ;; The answer of every receive that `await` forgets; not $answer, which may be in use when a stray datagram comes.
    (global $forgotten i32 (i32.const 208))
    ;; Sixteen letters of 68 bytes: what send takes, which is a socket (+0), data (+4), its length (+8), the option's
    ;; case (+12) and an address (+16); then the answer (+48), each its own because sixteen sends can be under way.
    (global $letters i32 (i32.const 256))
    ;; What is sent. The first four bytes count trips and batches, so that a stray datagram is not taken for an answer.
    (global $payload i32 (i32.const 1536))

    ;; As the arguments have them.
    (global $bytes (mut i32) (i32.const 64))
    (global $datagrams (mut i32) (i32.const 16))
    ;; The last byte of the IPv4 address that sockets are bound to.
    (global $own-host (mut i32) (i32.const 1))
    ;; What comes of computing, so that it is done.
    (global $computed (mut i64) (i64.const 1))
    (global $letter-bytes i32 (i32.const 68))
    ;; What an async call answers, without a subtask in the upper 28 bits, when it is done at once.
    (global $returned i32 (i32.const 2))

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

    ;; One waitable set for the whole run, as guests' libraries keep it for a task; and one for what `await` forgets, so
    ;; that nothing else comes out of the first.
    (global $set (mut i32) (i32.const 0))
    (global $forgotten-set (mut i32) (i32.const 0))

    (func $failed (result i32) (i32.load8_u (global.get $answer)))

    ;; Waits for one of the set's subtasks to return. Dropping any other would trap, so there is no state to look at.
    (func $wait (param $set i32)
      (drop (call $wait-set (local.get $set) (global.get $event)))
      (call $drop-subtask (i32.load (global.get $event))))

    ;; Whether an async call's subtask is still under way. Then it joins the set.
    (func $pending (param $status i32) (param $set i32) (result i32)
      (if (i32.eq (local.get $status) (global.get $returned)) (then (return (i32.const 0))))
      (call $join (i32.shr_u (local.get $status) (i32.const 4)) (local.get $set))
      (i32.const 1))

    (func $create (param $peer i32) (param $ipv6 i32) (result i32)
      (call $create-udp-socket (local.get $ipv6) (global.get $answer))
      (if (call $failed) (then (return (i32.const 1))))
      (i32.store (local.get $peer) (i32.load offset=4 (global.get $answer)))
      (i32.const 0))

    (func $bind-loopback (param $peer i32) (param $ipv6 i32) (result i32)
      (if (local.get $ipv6)
        (then (call $bind (i32.load (local.get $peer))
          (i32.const 1) (i32.const 0) (i32.const 0)
          (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
          (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 1)
          (i32.const 0) (global.get $answer)))
        (else (call $bind (i32.load (local.get $peer))
          (i32.const 0) (i32.const 0)
          (i32.const 127) (i32.const 0) (i32.const 0) (global.get $own-host)
          (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
          (global.get $answer))))
      (call $failed))

    (func $name (param $peer i32) (result i32)
      (call $local-address (i32.load (local.get $peer)) (global.get $answer))
      (if (call $failed) (then (return (i32.const 1))))
      (memory.copy
        (i32.add (local.get $peer) (i32.const 4)) (i32.add (global.get $answer) (i32.const 4)) (i32.const 32))
      (i32.const 0))

    ;; Nothing is under way on a socket that is closed: a socket may not go while a subtask borrows it.
    (func $close (param $peer i32)
      (if (i32.load (local.get $peer)) (then (call $drop-socket (i32.load (local.get $peer)))))
      (i32.store (local.get $peer) (i32.const 0)))

    (func $open (param $peer i32) (result i32)
      (if (call $create (local.get $peer) (i32.const 0)) (then (return (i32.const 1))))
      (call $bind-loopback (local.get $peer) (i32.const 0)))

    ;; An unconnected socket whose address others can learn.
    (func $serve (param $peer i32) (result i32)
      (if (call $open (local.get $peer)) (then (return (i32.const 1))))
      (call $name (local.get $peer)))

    ;; A socket connected to $to, an IPv4 address in memory.
    (func $dial (param $peer i32) (param $to i32) (result i32)
      (if (call $create (local.get $peer) (i32.const 0)) (then (return (i32.const 1))))
      (call $connect (i32.load (local.get $peer))
        (i32.const 0) (i32.load16_u offset=4 (local.get $to))
        (i32.load8_u offset=6 (local.get $to)) (i32.load8_u offset=7 (local.get $to))
        (i32.load8_u offset=8 (local.get $to)) (i32.load8_u offset=9 (local.get $to))
        (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
        (global.get $answer))
      (call $failed))

    ;; Fills one letter; $to is an address in memory, or 0 to send to the connected peer.
    (func $write-letter (param $letter i32) (param $peer i32) (param $data i32) (param $bytes i32) (param $to i32)
      (i32.store (local.get $letter) (i32.load (local.get $peer)))
      (i32.store offset=4 (local.get $letter) (local.get $data))
      (i32.store offset=8 (local.get $letter) (local.get $bytes))
      (i32.store8 offset=12 (local.get $letter) (i32.ne (local.get $to) (i32.const 0)))
      (if (local.get $to) (then
        (memory.copy (i32.add (local.get $letter) (i32.const 16)) (local.get $to) (i32.const 32)))))

    ;; Sends the letters up to $end; none is waited for before all have been started.
    (func $send-letters (param $end i32) (result i32)
      (local $letter i32) (local $pending i32)
      (local.set $letter (global.get $letters))
      (loop $next
        (local.set $pending (i32.add (local.get $pending) (call $pending
          (call $send (local.get $letter) (i32.add (local.get $letter) (i32.const 48))) (global.get $set))))
        (local.set $letter (i32.add (local.get $letter) (global.get $letter-bytes)))
        (br_if $next (i32.lt_u (local.get $letter) (local.get $end))))
      (loop $next
        (if (local.get $pending) (then
          (call $wait (global.get $set))
          (local.set $pending (i32.sub (local.get $pending) (i32.const 1)))
          (br $next))))
      (loop $next
        (local.set $letter (i32.sub (local.get $letter) (global.get $letter-bytes)))
        (if (i32.load8_u offset=48 (local.get $letter)) (then (return (i32.const 1))))
        (br_if $next (i32.gt_u (local.get $letter) (global.get $letters))))
      (i32.const 0))

    (func $send-one (param $peer i32) (param $data i32) (param $bytes i32) (param $to i32) (result i32)
      (call $write-letter
        (global.get $letters) (local.get $peer) (local.get $data) (local.get $bytes) (local.get $to))
      (call $send-letters (i32.add (global.get $letters) (global.get $letter-bytes))))

    ;; What came is in $answer, its data on the heap until the next call.
    (func $take (param $peer i32) (result i32)
      (call $free-all)
      (if (call $pending (call $receive (i32.load (local.get $peer)) (global.get $answer)) (global.get $set))
        (then (call $wait (global.get $set))))
      (call $failed))

    ;; Likewise, and it is a failure if what came is not what was expected.
    (func $expect (param $peer i32) (param $bytes i32) (result i32)
      (if (call $take (local.get $peer)) (then (return (i32.const 1))))
      (if (i32.ne (i32.load offset=8 (global.get $answer)) (local.get $bytes)) (then (return (i32.const 1))))
      (i32.ne (i32.load (i32.load offset=4 (global.get $answer))) (i32.load (global.get $payload))))

    ;; Sends what came last back to where it came from.
    (func $answer-it (param $peer i32) (result i32)
      (call $send-one (local.get $peer) (i32.load offset=4 (global.get $answer)) (i32.load offset=8 (global.get $answer))
        (i32.add (global.get $answer) (i32.const 12))))

    (func $stamp
      (i32.store (global.get $payload) (i32.add (i32.load (global.get $payload)) (i32.const 1))))

    ;; a asks, b answers. $to is b's address, or 0 if a is connected to it.
    (func $trip (param $to i32) (result i32)
      (call $stamp)
      (block $failed
        (br_if $failed (call $send-one (global.get $a) (global.get $payload) (global.get $bytes) (local.get $to)))
        (br_if $failed (call $expect (global.get $b) (global.get $bytes)))
        (br_if $failed (call $answer-it (global.get $b)))
        (br_if $failed (call $expect (global.get $a) (global.get $bytes)))
        ;; The answer must come from b: port, then IPv4 address.
        (br_if $failed (i32.ne (i32.load16_u offset=16 (global.get $answer)) (i32.load16_u offset=8 (global.get $b))))
        (br_if $failed (i32.ne (i32.load offset=18 (global.get $answer)) (i32.load offset=10 (global.get $b))))
        (return (i32.const 0)))
      (i32.const 1))

    (func $b-address (result i32) (i32.add (global.get $b) (i32.const 4)))

    (func $open-pair (result i32)
      (if (call $serve (global.get $b)) (then (return (i32.const 1))))
      (call $open (global.get $a)))

    ;; Tells the host where a is.
    (func $report (result i32)
      (call $send-one (global.get $a) (global.get $payload) (global.get $bytes) (global.get $host)))

    (func $open-reported (result i32)
      (if (call $open (global.get $a)) (then (return (i32.const 1))))
      (call $report))

    ;; A socket that waits for a datagram, and is forgotten.
    (func $await (result i32)
      (if (call $open (global.get $a)) (then (return (i32.const 1))))
      (if (call $pending (call $receive (i32.load (global.get $a)) (global.get $forgotten)) (global.get $forgotten-set))
        (then (return (i32.const 0))))
      (i32.load8_u (global.get $forgotten)))

    ;; A member of a crowd, 52 bytes: the socket's handle (+0), as a peer begins; then the answer of its receive (+4).
    (func $member (param $members i32) (param $at i32) (result i32)
      (i32.add (local.get $members) (i32.mul (local.get $at) (i32.const 52))))

    ;; Sends back what a member's receive has brought.
    (func $answer-member (param $member i32) (result i32)
      (if (i32.load8_u offset=4 (local.get $member)) (then (return (i32.const 1))))
      (call $send-one (local.get $member) (i32.load offset=8 (local.get $member)) (i32.load offset=12 (local.get $member))
        (i32.add (local.get $member) (i32.const 16))))

    ;; Has a member receive, until it waits; its subtask is stored at $waits.
    (func $listen (param $member i32) (param $waits i32) (result i32)
      (local $status i32)
      (loop $next (result i32)
        (local.set $status (call $receive (i32.load (local.get $member)) (i32.add (local.get $member) (i32.const 4))))
        (if (call $pending (local.get $status) (global.get $forgotten-set)) (then
          (i32.store (local.get $waits) (i32.shr_u (local.get $status) (i32.const 4)))
          (return (i32.const 0))))
        (br_if $next (i32.eqz (call $answer-member (local.get $member))))
        (i32.const 1)))

    ;; Which member has the subtask of an event; the subtask is dropped.
    (func $heard (param $waits i32) (result i32)
      (local $at i32)
      (loop $next
        (if (i32.ne (i32.load (i32.add (local.get $waits) (i32.shl (local.get $at) (i32.const 2))))
          (i32.load (global.get $event))) (then
          (local.set $at (i32.add (local.get $at) (i32.const 1)))
          (br $next))))
      (call $drop-subtask (i32.load (global.get $event)))
      (local.get $at))

    ;; The ports of all, sent from the last.
    (func $report-ports (param $members i32) (param $count i32) (result i32)
      (local $at i32)
      (loop $next
        (call $local-address (i32.load (call $member (local.get $members) (local.get $at))) (global.get $answer))
        (if (call $failed) (then (return (i32.const 1))))
        (i32.store16 (i32.add (global.get $payload) (i32.shl (local.get $at) (i32.const 1)))
          (i32.load16_u offset=8 (global.get $answer)))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br_if $next (i32.lt_u (local.get $at) (local.get $count))))
      (call $send-one (global.get $a) (global.get $payload) (i32.shl (local.get $count) (i32.const 1)) (global.get $host)))

    ;; Ends only with a failure. The subtasks that members wait for, then the members.
    (func $crowd (param $count i32) (result i32)
      (local $waits i32) (local $members i32) (local $at i32)
      (if (i32.gt_u (i32.sub (local.get $count) (i32.const 1)) (i32.const 599)) (then (return (i32.const 1))))
      (local.set $waits (call $realloc
        (i32.const 0) (i32.const 0) (i32.const 4) (i32.mul (local.get $count) (i32.const 56))))
      (call $keep-all)
      (local.set $members (i32.add (local.get $waits) (i32.shl (local.get $count) (i32.const 2))))
      (block $failed
        (loop $next
          (br_if $failed (call $open (global.get $a)))
          (i32.store (call $member (local.get $members) (local.get $at)) (i32.load (global.get $a)))
          (br_if $failed (call $listen (call $member (local.get $members) (local.get $at))
            (i32.add (local.get $waits) (i32.shl (local.get $at) (i32.const 2)))))
          (local.set $at (i32.add (local.get $at) (i32.const 1)))
          (br_if $next (i32.lt_u (local.get $at) (local.get $count))))
        (br_if $failed (call $report))
        (drop (call $wait-set (global.get $forgotten-set) (global.get $event)))
        (local.set $at (call $heard (local.get $waits)))
        (br_if $failed (i32.load8_u offset=4 (call $member (local.get $members) (local.get $at))))
        (br_if $failed (call $report-ports (local.get $members) (local.get $count)))
        (loop $more
          (br_if $failed (call $listen (call $member (local.get $members) (local.get $at))
            (i32.add (local.get $waits) (i32.shl (local.get $at) (i32.const 2)))))
          ;; What a receive has brought stays until it was sent back; where no event is left there is none.
          (if (i32.eqz (call $poll-set (global.get $forgotten-set) (global.get $event))) (then
            (call $free-all)
            (drop (call $wait-set (global.get $forgotten-set) (global.get $event)))))
          (local.set $at (call $heard (local.get $waits)))
          (br_if $failed (call $answer-member (call $member (local.get $members) (local.get $at))))
          (br $more)))
      (i32.const 1))

    ;; Where the letters of a batch end.
    (func $letters-end (result i32)
      (i32.add (global.get $letters) (i32.mul (global.get $datagrams) (global.get $letter-bytes))))

    (func $open-batch (result i32)
      (local $letter i32)
      (if (call $serve (global.get $b)) (then (return (i32.const 1))))
      (if (call $dial (global.get $a) (call $b-address)) (then (return (i32.const 1))))
      (local.set $letter (global.get $letters))
      (loop $next
        (call $write-letter
          (local.get $letter) (global.get $a) (global.get $payload) (global.get $bytes) (i32.const 0))
        (local.set $letter (i32.add (local.get $letter) (global.get $letter-bytes)))
        (br_if $next (i32.lt_u (local.get $letter) (call $letters-end))))
      (i32.const 0))

    (func $take-batch (param $peer i32) (result i32)
      (local $left i32)
      (local.set $left (global.get $datagrams))
      (loop $next
        (if (call $expect (local.get $peer) (global.get $bytes)) (then (return (i32.const 1))))
        (br_if $next (local.tee $left (i32.sub (local.get $left) (i32.const 1)))))
      (i32.const 0))

    (func $batch (result i32)
      (call $stamp)
      (if (call $send-letters (call $letters-end)) (then (return (i32.const 1))))
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
      (if (i64.eq (local.get $mode) (global.get $mode-receive)) (then (return (call $open (global.get $a)))))
      (if (i64.eq (local.get $mode) (global.get $mode-compute)) (then (return (call $open-reported))))
      (if (i64.eq (local.get $mode) (global.get $mode-ask)) (then (return (call $open-reported))))
      (if (i64.eq (local.get $mode) (global.get $mode-serve)) (then (return (call $open-reported))))
      (if (i64.eq (local.get $mode) (global.get $mode-sink)) (then (return (call $open-reported))))
      (if (call $stays (local.get $mode)) (then (return (i32.const 0))))
      (i32.const 1))

    ;; What a mode does COUNT times, where that leaves nothing open. A failure leaves its sockets to $main.
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
        (if (i64.eq (local.get $mode) (global.get $mode-serve)) (then
          (br_if $failed (call $take (global.get $a)))
          (return (call $answer-it (global.get $a)))))
        (if (i64.eq (local.get $mode) (global.get $mode-sink)) (then (return (call $take (global.get $a)))))
        (if (i64.eq (local.get $mode) (global.get $mode-await)) (then (return (call $await))))
        (if (i64.eq (local.get $mode) (global.get $mode-bound)) (then (return (call $open (global.get $a)))))
        (if (i64.eq (local.get $mode) (global.get $mode-dns)) (then
          (br_if $failed (call $dial (global.get $a) (call $b-address)))
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

    (func $main (result i32)
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

      (global.set $set (call $new-set))
      (global.set $forgotten-set (call $new-set))
      (if (i64.eq (local.get $mode) (global.get $mode-crowd)) (then (return (call $crowd (local.get $count)))))
      (local.set $status (call $repeat (local.get $mode) (local.get $count)))
      (if (call $stays (local.get $mode)) (then
        (if (local.get $status) (then (return (i32.const 1))))
        (if (call $report) (then (return (i32.const 1))))
        (loop $for-ever
          (call $wait (global.get $forgotten-set))
          (br $for-ever))))
      (call $close (global.get $a))
      (call $close (global.get $b))
      (local.get $status))

    ;; An async export with a callback may block all the same, as the whole run does where it waits; so it is over when
    ;; this returns (0: exit), and there is nothing to call back for.
    (func (export "run") (result i32)
      (call $task-return (call $main))
      (i32.const 0))

    (func (export "callback") (param i32 i32 i32) (result i32) unreachable)
  )
  (core instance $cycle (instantiate $cycle-module
    (with "heap" (instance $heap))
    (with "wasi" (instance
      (export "get-arguments" (func $get-arguments))
      (export "create-udp-socket" (func $create-udp-socket))
      (export "bind" (func $bind))
      (export "connect" (func $connect))
      (export "send" (func $send))
      (export "receive" (func $receive))
      (export "local-address" (func $local-address))
      (export "drop-socket" (func $drop-socket))
      (export "new-set" (func $new-set))
      (export "join" (func $join))
      (export "wait-set" (func $wait-set))
      (export "poll-set" (func $poll-set))
      (export "drop-subtask" (func $drop-subtask))
      (export "task-return" (func $task-return))
    ))))

  (alias core export $cycle "callback" (core func $callback))
  (func $run async (result (result)) (canon lift (core func $cycle "run") async (callback $callback)))
  (instance $cli-run (export "run" (func $run)))
  (export "wasi:cli/run@0.3.0" (instance $cli-run))
)
