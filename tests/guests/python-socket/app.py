"""CPython's own `socket` module on WASI 0.2: what a program ported as it is does.

Built by scripts/guests with componentize-py alone; run it with `wasi-uring run`.
Below this file are CPython's C code and wasi-libc, which turns BSD sockets into
wasi:sockets: it binds and makes streams by itself, polls before it reads, and
takes one datagram at a time. Speaks to itself over loopback and prints a
transcript that is the same on every host and backend: ports and sizes are told
by how they compare, errors by their names.

Left out, since the request ends in libc or CPython and never reaches the host
(CPython 3.14 and the wasi-libc that componentize-py 0.25.1 brings):
- MSG_PEEK, dup, shutdown, listen, accept: ENOTSUP
- SO_REUSEADDR, SO_BROADCAST, IPV6_V6ONLY: ENOPROTOOPT or no such name
- sendmsg, recvmsg: no such function on this platform
- socketpair, and with it asyncio's event loop: TCP to oneself, in which libc aborts
- names (getaddrinfo, 'localhost'): not UDP, and the host may refuse them

Left out, since it traps in wasmtime-wasi 48 ("`connect` needs exclusive access",
a race with its own background read): connect on a socket that waited for a
datagram in vain.
"""

import errno
import select
import selectors
import socket
import time

WAIT_S = 5.0  # for what must come
QUIET_S = 0.1  # for what must not
ATTEMPTS_MAX = 100

FAMILIES = (
    ("ipv4", socket.AF_INET, "127.0.0.1", "0.0.0.0", "192.0.2.1"),
    ("ipv6", socket.AF_INET6, "::1", "::", "2001:db8::1"),
)


def say(what, answer):
    print(f"{what}: {answer}", flush=True)


def tell(what, call, show=lambda value: "ok" if value is None else value):
    """Prints what a call answers, or the name of the error it raises."""
    try:
        answer = show(call())
    except OSError as err:
        name = errno.errorcode.get(err.errno, "no errno")
        answer = f"{type(err).__name__} {name}"
    say(what, answer)


def pattern(size):
    return bytes(index % 251 for index in range(size))


class Sockets:
    """Makes sockets of one family, closes them all at the end."""

    def __init__(self, family, host):
        self.family = family
        self.host = host
        self.made = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for made in self.made:
            made.close()

    def new(self):
        made = socket.socket(self.family, socket.SOCK_DGRAM)
        made.settimeout(WAIT_S)
        self.made.append(made)
        return made

    def bound(self):
        made = self.new()
        made.bind((self.host, 0))
        return made


def unbound(sockets, foreign):
    print("-- unbound")
    one = sockets.new()
    say("type", socket.SocketKind(one.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)).name)
    tell("getsockname", one.getsockname)
    tell("getpeername", one.getpeername)
    tell("send", lambda: one.send(b"x"))
    tell("recv", lambda: one.recv(1))
    try:
        one.bind((foreign, 0))
        refused = False
    except OSError as err:
        # By the host's rules or, if they allow it, by its kernel.
        refused = err.errno in (errno.EACCES, errno.EADDRNOTAVAIL)
    say("bind elsewhere is refused", refused)


def binding(sockets, nowhere):
    print("-- bind")
    one = sockets.bound()
    host, port = one.getsockname()[:2]
    say("host", host)
    say("port is not 0", port != 0)
    say("getsockname is stable", one.getsockname()[:2] == (host, port))
    tell("bind again", lambda: one.bind((sockets.host, 0)))
    two = sockets.new()
    tell("bind to the same", lambda: two.bind((host, port)))
    tell("then to another", lambda: two.bind((host, 0)))
    say("ports differ", two.getsockname()[1] != port)
    three = sockets.new()
    three.bind((nowhere, 0))
    say("bound everywhere", three.getsockname()[0])
    say("port is not 0", three.getsockname()[1] != 0)


def options(sockets):
    print("-- options")
    one = sockets.new()
    if sockets.family == socket.AF_INET:
        hops = (socket.IPPROTO_IP, socket.IP_TTL)
    else:
        hops = (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS)
    tell("hop limit by default", lambda: one.getsockopt(*hops), lambda got: got > 0)
    for value in (1, 255, 7, 0, 256):
        tell(f"set hop limit {value}", lambda: one.setsockopt(*hops, value))
        tell("hop limit", lambda: one.getsockopt(*hops))
    for name in ("SO_RCVBUF", "SO_SNDBUF"):
        size = (socket.SOL_SOCKET, getattr(socket, name))
        tell(f"{name} by default", lambda: one.getsockopt(*size), lambda got: got > 0)
        tell(f"set {name} 65536", lambda: one.setsockopt(*size, 65536))
        tell(name, lambda: one.getsockopt(*size), lambda got: got == 65536)
        tell(f"set {name} 0", lambda: one.setsockopt(*size, 0))
        tell(f"set {name} 1", lambda: one.setsockopt(*size, 1))
        tell(f"{name} is more than that", lambda: one.getsockopt(*size), lambda got: got > 1)
        tell(f"set {name} 32768", lambda: one.setsockopt(*size, 32768))
    one.bind((sockets.host, 0))
    print("(bound)")
    tell("hop limit", lambda: one.getsockopt(*hops))
    for name in ("SO_RCVBUF", "SO_SNDBUF"):
        size = (socket.SOL_SOCKET, getattr(socket, name))
        tell(name, lambda: one.getsockopt(*size), lambda got: got == 32768)
    tell("SO_ERROR", lambda: one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))


def datagrams(sockets, nowhere):
    print("-- sendto, recvfrom")
    one, two = sockets.bound(), sockets.bound()
    one_at, two_at = one.getsockname(), two.getsockname()
    largest = 65507 if sockets.family == socket.AF_INET else 65527

    for size in (0, 1, 1472, 9000, 65507, largest):
        data = pattern(size)
        tell(f"sendto {size} bytes", lambda: one.sendto(data, two_at))
        tell(
            "recvfrom",
            lambda: two.recvfrom(65536),
            lambda got: (
                f"{len(got[0])} bytes, intact {got[0] == data}, from its sender {got[1] == one_at}"
            ),
        )
    # wasmtime-wasi tells a send's error only at the next one when the guest has
    # kept its runtime busy for long (tokio's cooperative budget); not after a sleep.
    time.sleep(0.001)
    tell(f"sendto {largest + 1} bytes", lambda: one.sendto(bytes(largest + 1), two_at))
    tell("sendto 65536 bytes", lambda: one.sendto(bytes(65536), two_at))
    tell("sendto port 0", lambda: one.sendto(b"x", (sockets.host, 0)))
    tell("sendto everywhere", lambda: one.sendto(b"x", (nowhere, 9)))
    tell("send to nobody", lambda: one.send(b"x"))
    tell("getpeername", one.getpeername)

    tell("sendto", lambda: one.sendto(b"cut short", two_at))
    tell("recv of 3 bytes", lambda: two.recv(3))
    tell("sendto", lambda: one.sendto(b"the next", two_at))
    tell("recv is the next datagram", lambda: two.recv(100))

    tell("sendto oneself", lambda: one.sendto(b"echo", one_at))
    tell("recvfrom oneself", lambda: one.recvfrom(100), lambda got: (got[0], got[1] == one_at))

    for index in range(20):
        one.sendto(b"%d" % index, two_at)
    got = [two.recv(100) for _ in range(20)]
    say("twenty in order", got == [b"%d" % index for index in range(20)])

    buffer = bytearray(8)
    one.sendto(b"into", two_at)
    tell("recv_into", lambda: two.recv_into(buffer), lambda size: bytes(buffer[:size]))
    one.sendto(b"from", two_at)
    tell("recvfrom_into", lambda: two.recvfrom_into(buffer)[0], lambda size: bytes(buffer[:size]))

    three = sockets.new()
    tell("sendto before bind", lambda: three.sendto(b"hello", two_at))
    data, three_at = two.recvfrom(100)
    say("arrived", (data, three_at[0]))
    say("bound by that", three.getsockname()[0])
    say("to the port it came from", three.getsockname()[1] == three_at[1])
    tell("answer", lambda: two.sendto(b"welcome", three_at))
    tell("recv", lambda: three.recv(100))


def waiting(sockets):
    print("-- waiting")
    one, two = sockets.bound(), sockets.bound()
    two_at = two.getsockname()

    two.settimeout(QUIET_S)
    began = time.monotonic()
    tell("recv with a timeout", lambda: two.recv(1))
    say("it waited", QUIET_S * 0.9 <= time.monotonic() - began < WAIT_S)

    two.setblocking(False)
    tell("recv without blocking", lambda: two.recv(1))
    tell("recvfrom without blocking", lambda: two.recvfrom(1))

    def selected(*sets):
        return tuple(len(ready) for ready in select.select(*sets, QUIET_S))

    def polled(flags, wait_s):
        poll = select.poll()
        poll.register(two, flags)
        return [event for _, event in poll.poll(wait_s * 1000)]

    say("select to read", selected([two], [], []))
    say("select to write", selected([], [two], []))
    say("poll to read", polled(select.POLLIN, QUIET_S))
    say("poll to write", polled(select.POLLOUT, WAIT_S) == [select.POLLOUT])
    say("poll at once", polled(select.POLLIN, 0))

    for index in (1, 2):
        one.sendto(b"%d" % index, two_at)
    say("select to read", tuple(len(ready) for ready in select.select([one, two], [], [], WAIT_S)))
    tell("recv", lambda: two.recv(10))
    say("poll to read", polled(select.POLLIN, WAIT_S) == [select.POLLIN])
    tell("recv", lambda: two.recv(10))
    say("poll to read", polled(select.POLLIN, QUIET_S))
    tell("recv", lambda: two.recv(10))

    two.settimeout(WAIT_S)
    one.sendto(b"3", two_at)
    tell("recv with a timeout", lambda: two.recv(10))
    tell("getsockname", two.getsockname, lambda name: name == two_at)


def connected(sockets):
    print("-- connect")
    client, first, second = sockets.new(), sockets.bound(), sockets.bound()
    # Never becomes the peer: what it has sent may come late.
    stranger = sockets.bound()
    first_at, second_at = first.getsockname(), second.getsockname()

    tell("connect to port 0", lambda: client.connect((sockets.host, 0)))
    tell("connect before bind", lambda: client.connect(first_at))
    say("bound by that", client.getsockname()[0])
    client_at = client.getsockname()
    say("getpeername is the first", client.getpeername() == first_at)
    tell("connect_ex", lambda: client.connect_ex(first_at))
    say("getsockname is kept", client.getsockname() == client_at)

    tell("send", lambda: client.send(b"to the first"))
    tell("recvfrom", lambda: first.recvfrom(100), lambda got: (got[0], got[1] == client_at))
    tell("sendall", lambda: client.sendall(b"all of it"))
    tell("recv", lambda: first.recv(100))
    tell("sendto a stranger", lambda: client.sendto(b"x", stranger.getsockname()))
    tell("stranger's datagram", lambda: stranger.sendto(b"no", client_at))
    tell("peer's datagram", lambda: first.sendto(b"yes", client_at))
    tell("recv", lambda: client.recv(100))

    tell("reconnect", lambda: client.connect(second_at))
    say("getpeername is the second", client.getpeername() == second_at)
    say("getsockname is kept", client.getsockname() == client_at)
    tell("send", lambda: client.send(b"to the second"))
    tell("recv", lambda: second.recv(100))
    tell("stranger's datagram", lambda: stranger.sendto(b"no", client_at))
    tell("peer's datagram", lambda: second.sendto(b"yes", client_at))
    tell("recvfrom", lambda: client.recvfrom(100), lambda got: (got[0], got[1] == second_at))
    client.settimeout(QUIET_S)
    tell("nothing else came", lambda: client.recv(100))


def refused(sockets):
    print("-- refused")
    gone = sockets.bound()
    gone_at = gone.getsockname()
    gone.close()
    tell("recv on a closed socket", lambda: gone.recv(1))
    client = sockets.bound()
    client.settimeout(QUIET_S)
    client.connect(gone_at)
    # The next send or the next recv may tell, and the port may close a bit later.
    answer = "never"
    for _ in range(ATTEMPTS_MAX):
        try:
            client.send(b"anyone?")
            client.recv(1)
        except TimeoutError:
            continue
        except OSError as err:
            answer = f"{type(err).__name__} {errno.errorcode[err.errno]}"
            break
    say("a closed port answers", answer)


def server(sockets, clients):
    """An echo server over a selector, as an event loop would write it."""
    print("-- selector")
    serving = sockets.bound()
    serving.setblocking(False)
    peers = [sockets.bound() for _ in range(clients)]
    with selectors.DefaultSelector() as selector:
        selector.register(serving, selectors.EVENT_READ, None)
        for index, peer in enumerate(peers):
            peer.connect(serving.getsockname())
            peer.send(b"%d" % index)
            peer.setblocking(False)
            selector.register(peer, selectors.EVENT_READ, index)
        echoed, came = 0, set()
        deadline = time.monotonic() + WAIT_S
        while len(came) < clients and time.monotonic() < deadline:
            for key, _ in selector.select(QUIET_S):
                try:
                    data, sender = key.fileobj.recvfrom(100)
                except BlockingIOError:
                    continue
                if key.data is None:
                    select.select([], [serving], [], WAIT_S)
                    echoed += serving.sendto(data + b"!", sender) > 0
                elif data == b"%d!" % key.data:
                    came.add(key.data)
    say("echoed", echoed)
    say("came back to its sender", len(came))


class Run:
    def run(self):
        for name, family, host, nowhere, foreign in FAMILIES:
            print(f"== {name}")
            with Sockets(family, host) as sockets:
                unbound(sockets, foreign)
                binding(sockets, nowhere)
                options(sockets)
                datagrams(sockets, nowhere)
                waiting(sockets)
                connected(sockets)
                refused(sockets)
                server(sockets, clients=16)
        print("done", flush=True)
