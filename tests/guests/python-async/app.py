"""A UDP socket's whole life over wasi:sockets 0.3, with asyncio's tasks.

Built by scripts/guests with componentize-py alone; run it with `wasi-uring run`.
`run`, `send` and `receive` are async functions of the component model here;
`print` still goes by WASI 0.2, to which componentize-py links CPython. Speaks to
itself over loopback and prints a transcript that is the same on every host and
backend: sizes and ports are told by how they compare, errors by name.

Left out, since WIT lets a host choose: which of several waiting receives gets the
next datagram (wasmtime-wasi 48 serves the last to come first), whether the next
send or the next receive tells of a refused datagram, and the port after a
disconnect (Linux takes back one it chose itself).

Left out, since componentize-py 0.25.1 has no `subtask.cancel`: cancellation. A
task that asyncio cancels leaves its call to the host, and traps when that
answers. So does `run` if it returns while a call is pending, but for those under
`spawn`: with those, the last thing it does is to leave two waiting.
"""

# All of them here: when the component runs, its files are gone.
import asyncio
import os
import re
from contextlib import ExitStack
from inspect import isawaitable

from componentize_py_async_support import spawn
from componentize_py_types import Err
from wit_world import exports
from wit_world.imports import monotonic_clock as clock
from wit_world.imports.types import (
    IpAddressFamily,
    IpSocketAddress_Ipv4,
    IpSocketAddress_Ipv6,
    Ipv4SocketAddress,
    Ipv6SocketAddress,
    UdpSocket,
)

MS = 1_000_000  # nanoseconds
WAIT_NS = 60_000 * MS  # for all of it
QUIET_NS = 100 * MS  # for what must not come

IN_FLIGHT = 16
ROUNDS = 8


def v4(ip, port):
    return IpSocketAddress_Ipv4(Ipv4SocketAddress(port=port, address=ip))


def v6(ip, port):
    return IpSocketAddress_Ipv6(Ipv6SocketAddress(port=port, flow_info=0, address=ip, scope_id=0))


LOOPBACK = {
    IpAddressFamily.IPV4: lambda port: v4((127, 0, 0, 1), port),
    IpAddressFamily.IPV6: lambda port: v6((0, 0, 0, 0, 0, 0, 0, 1), port),
}
UNSPECIFIED = {
    IpAddressFamily.IPV4: lambda port: v4((0, 0, 0, 0), port),
    IpAddressFamily.IPV6: lambda port: v6((0,) * 8, port),
}
OTHER = {
    IpAddressFamily.IPV4: LOOPBACK[IpAddressFamily.IPV6],
    IpAddressFamily.IPV6: LOOPBACK[IpAddressFamily.IPV4],
}
MAPPED = v6((0, 0, 0, 0, 0, 0xFFFF, 0x7F00, 0x0001), 9)
# Documentation addresses: no host has them, and nothing is sent to them.
FOREIGN = {
    IpAddressFamily.IPV4: v4((192, 0, 2, 1), 0),
    IpAddressFamily.IPV6: v6((0x2001, 0xDB8, 0, 0, 0, 0, 0, 1), 0),
}


def error_name(err):
    name = type(err.value).__name__.removeprefix("ErrorCode_")
    return re.sub(r"\B(?=[A-Z])", "-", name).lower()


def say(what, answer):
    print(f"{what}: {answer}", flush=True)


async def tell(what, call, show=lambda value: "ok" if value is None else value):
    """Prints what a call answers, awaited if it is async, or the name of the error it raises."""
    try:
        answer = call()
        if isawaitable(answer):
            answer = await answer
        say(what, show(answer))
    except Err as err:
        say(what, f"error {error_name(err)}")


def ip_of(address):
    return address.value.address


def port_of(address):
    return address.value.port


def pattern(size):
    return bytes(index % 251 for index in range(size))


async def started(*calls):
    """The calls as tasks, each of which has reached the host."""
    tasks = [asyncio.create_task(call) for call in calls]
    await asyncio.sleep(0)
    return tasks


class Sockets:
    """Makes sockets of one family, drops them all at the end."""

    def __init__(self, family):
        self.family = family
        self.loopback = LOOPBACK[family]
        self.made = ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.made.close()

    def new(self):
        return self.made.enter_context(UdpSocket.create(self.family))

    def bound(self):
        made = self.new()
        made.bind(self.loopback(0))
        return made, made.get_local_address()


async def unbound(sockets):
    print("-- unbound")
    one = sockets.new()
    say("family", one.get_address_family().name.lower())
    await tell("local address", one.get_local_address)
    await tell("remote address", one.get_remote_address)
    await tell("receive", one.receive)
    await tell("send to nobody", lambda: one.send(b"x", None))
    await tell("disconnect", one.disconnect)
    await tell("bind, other family", lambda: one.bind(OTHER[sockets.family](0)))
    await tell("connect, other family", lambda: one.connect(OTHER[sockets.family](9)))
    if sockets.family == IpAddressFamily.IPV6:
        await tell("bind, mapped IPv4", lambda: one.bind(MAPPED))
        await tell("connect, mapped IPv4", lambda: one.connect(MAPPED))
    try:
        one.bind(FOREIGN[sockets.family])
        refused = "no"
    except Err as err:
        # By the host's rules or, if they allow it, by its kernel.
        refused = error_name(err) in ("access-denied", "address-not-bindable")
    say("bind elsewhere is refused", refused)
    await tell("still unbound", one.get_local_address)


async def binding(sockets):
    print("-- bind")
    one, one_at = sockets.bound()
    say("address", ip_of(one_at))
    say("port is not 0", port_of(one_at) != 0)
    say("local address is stable", one.get_local_address() == one_at)
    await tell("remote address", one.get_remote_address)
    await tell("bind again", lambda: one.bind(sockets.loopback(0)))
    two = sockets.new()
    await tell("bind to the same", lambda: two.bind(one_at))
    await tell("then to another", lambda: two.bind(sockets.loopback(0)))
    say("ports differ", port_of(two.get_local_address()) != port_of(one_at))
    three = sockets.new()
    three.bind(UNSPECIFIED[sockets.family](0))
    say("bound everywhere", ip_of(three.get_local_address()))
    say("port is not 0", port_of(three.get_local_address()) != 0)


async def options(sockets):
    print("-- options")
    one = sockets.new()
    await tell("hop limit by default", one.get_unicast_hop_limit, lambda got: got > 0)
    for value in (1, 255, 7, 0):
        await tell(f"set hop limit {value}", lambda: one.set_unicast_hop_limit(value))
        await tell("hop limit", one.get_unicast_hop_limit)
    buffers = (
        ("receive buffer", one.get_receive_buffer_size, one.set_receive_buffer_size),
        ("send buffer", one.get_send_buffer_size, one.set_send_buffer_size),
    )
    for name, size, resize in buffers:
        await tell(f"{name} by default", size, lambda got: got > 0)
        await tell(f"set {name} 65536", lambda: resize(65536))
        await tell(name, size, lambda got: got == 65536)
        await tell(f"set {name} 0", lambda: resize(0))
        await tell(f"set {name} 1", lambda: resize(1))
        await tell(f"{name} is more than that", size, lambda got: got > 1)
        await tell(f"set {name} 32768", lambda: resize(32768))
    one.bind(sockets.loopback(0))
    print("(bound)")
    await tell("hop limit", one.get_unicast_hop_limit)
    for name, size, _ in buffers:
        await tell(name, size, lambda got: got == 32768)


async def datagrams(sockets):
    print("-- send, receive")
    (one, one_at), (two, two_at) = sockets.bound(), sockets.bound()
    largest = 65507 if sockets.family == IpAddressFamily.IPV4 else 65527

    for size in (0, 1, 1472, 9000, largest):
        data = pattern(size)
        await tell(f"send {size} bytes", lambda: one.send(data, two_at))
        await tell(
            "receive",
            two.receive,
            lambda got: (
                f"{len(got[0])} bytes, intact {got[0] == data}, from its sender {got[1] == one_at}"
            ),
        )
    await tell(f"send {largest + 1} bytes", lambda: one.send(bytes(largest + 1), two_at))
    await tell("send 65536 bytes", lambda: one.send(bytes(65536), two_at))
    await tell("send to port 0", lambda: one.send(b"x", sockets.loopback(0)))
    await tell("send everywhere", lambda: one.send(b"x", UNSPECIFIED[sockets.family](9)))
    await tell("send, other family", lambda: one.send(b"x", OTHER[sockets.family](9)))
    await tell("send to nobody", lambda: one.send(b"x", None))
    await tell("send to oneself", lambda: one.send(b"echo", one_at))
    await tell("receive", one.receive, lambda got: (got[0], got[1] == one_at))

    for index in range(IN_FLIGHT):
        await one.send(b"%d" % index, two_at)
    got = [(await two.receive())[0] for _ in range(IN_FLIGHT)]
    say("in order", got == [b"%d" % index for index in range(IN_FLIGHT)])


async def implicit(sockets):
    print("-- implicit bind")
    peer, peer_at = sockets.bound()

    one = sockets.new()
    await tell("send before bind", lambda: one.send(b"hello", peer_at))
    data, one_at = await peer.receive()
    say("arrived", (data, ip_of(one_at)))
    say("bound by that", ip_of(one.get_local_address()))
    say("to the port it came from", port_of(one.get_local_address()) == port_of(one_at))
    await tell("bind", lambda: one.bind(sockets.loopback(0)))
    await tell("answer", lambda: peer.send(b"welcome", one_at))
    await tell("receive", one.receive, lambda got: (got[0], got[1] == peer_at))

    two = sockets.new()
    await tell("connect before bind", lambda: two.connect(peer_at))
    say("bound by that", ip_of(two.get_local_address()))
    say("port is not 0", port_of(two.get_local_address()) != 0)

    three = sockets.new()
    await asyncio.gather(*(three.send(b"%d" % index, peer_at) for index in range(IN_FLIGHT)))
    got = [await peer.receive() for _ in range(IN_FLIGHT)]
    say("first sends at once", len({data for data, _ in got}))
    one_port = {port_of(three.get_local_address())}
    say("from one port", {port_of(sender) for _, sender in got} == one_port)

    four = sockets.new()
    # Starts the turn anew: the send must be done at once for the receive to find it bound.
    await clock.wait_for(MS)
    sent, waiting = await started(four.send(b"hello", peer_at), four.receive())
    await sent
    _, four_at = await peer.receive()
    await peer.send(b"welcome", four_at)
    await tell("receive beside the first send", lambda: waiting, lambda got: got[0])


async def in_flight(sockets):
    print("-- in flight")
    (one, one_at), (two, two_at) = sockets.bound(), sockets.bound()
    numbers = [b"%d" % index for index in range(IN_FLIGHT)]

    waiting = await started(*(two.receive() for _ in numbers))
    for data in numbers:
        await one.send(data, two_at)
    got = await asyncio.gather(*waiting)
    say("receives before sends", sorted(int(data) for data, _ in got) == [*range(IN_FLIGHT)])
    say("from their sender", all(sender == one_at for _, sender in got))

    waiting = set(await started(*(two.receive() for _ in numbers)))
    came = []
    for data in numbers:
        await one.send(data, two_at)
        answered, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        came += [task.result()[0] for task in answered]
    say("one send, one receive", came == numbers)

    await asyncio.gather(*(one.send(data, two_at) for data in numbers))
    got = await asyncio.gather(*(two.receive() for _ in numbers))
    say("sends before receives", sorted(int(data) for data, _ in got) == [*range(IN_FLIGHT)])

    many = [sockets.bound() for _ in numbers]
    waiting = await started(*(each.receive() for each, _ in many))
    for data, (_, at) in reversed([*zip(numbers, many)]):
        await one.send(data, at)
    got = await asyncio.gather(*waiting)
    say("a socket each, last first", [data for data, _ in got] == numbers)

    waiting = set(await started(two.receive()))
    quiet = set(await started(clock.wait_for(QUIET_NS)))
    answered, _ = await asyncio.wait(waiting | quiet, return_when=asyncio.FIRST_COMPLETED)
    say("nothing came", answered == quiet)
    await tell("local address meanwhile", two.get_local_address, lambda got: got == two_at)
    await tell("set hop limit meanwhile", lambda: two.set_unicast_hop_limit(9))
    await tell("send meanwhile", lambda: two.send(b"out", one_at))
    await tell("receive", one.receive, lambda got: (got[0], got[1] == two_at))
    await tell("send", lambda: one.send(b"in", two_at))
    await tell("receive", waiting.pop, lambda got: (got[0], got[1] == one_at))


async def connected(sockets):
    print("-- connect")
    client = sockets.new()
    # Never becomes the peer: what it has sent may come late.
    (first, first_at), (second, second_at), (third, third_at), (stranger, stranger_at) = (
        sockets.bound() for _ in range(4)
    )

    await tell("connect to port 0", lambda: client.connect(sockets.loopback(0)))
    await tell("connect everywhere", lambda: client.connect(UNSPECIFIED[sockets.family](9)))
    await tell("connect", lambda: client.connect(first_at))
    client_at = client.get_local_address()
    await tell("remote address", client.get_remote_address, lambda got: got == first_at)
    await tell("send", lambda: client.send(b"to the first", None))
    await tell("receive", first.receive, lambda got: (got[0], got[1] == client_at))
    await tell("send with the address", lambda: client.send(b"by name", first_at))
    await tell("receive", first.receive, lambda got: got[0])
    await tell("send to a stranger", lambda: client.send(b"x", stranger_at))
    await tell("stranger's datagram", lambda: stranger.send(b"no", client_at))
    await tell("peer's datagram", lambda: first.send(b"yes", client_at))
    await tell("receive", client.receive, lambda got: (got[0], got[1] == first_at))

    await tell("reconnect", lambda: client.connect(second_at))
    await tell("remote address", client.get_remote_address, lambda got: got == second_at)
    await tell("local address is kept", client.get_local_address, lambda got: got == client_at)
    await tell("send", lambda: client.send(b"to the second", None))
    await tell("receive", second.receive, lambda got: got[0])

    (waiting,) = await started(client.receive())
    await tell("reconnect while a receive waits", lambda: client.connect(third_at))
    await tell("stranger's datagram", lambda: stranger.send(b"no", client_at))
    await tell("peer's datagram", lambda: third.send(b"yes", client_at))
    await tell("receive", lambda: waiting, lambda got: (got[0], got[1] == third_at))

    await tell("disconnect", client.disconnect)
    await tell("remote address", client.get_remote_address)
    await tell("disconnect again", client.disconnect)
    await tell("send to nobody", lambda: client.send(b"x", None))
    await tell("send to a stranger", lambda: client.send(b"at last", stranger_at))
    data, client_at = await stranger.receive()
    say("arrived", (data, ip_of(client_at)))
    await tell("its answer", lambda: stranger.send(b"good", client_at))
    await tell("receive", client.receive, lambda got: (got[0], got[1] == stranger_at))


async def refused(sockets):
    print("-- refused")
    with UdpSocket.create(sockets.family) as gone:
        gone.bind(sockets.loopback(0))
        gone_at = gone.get_local_address()
    client, _ = sockets.bound()
    client.connect(gone_at)
    (waiting,) = await started(client.receive())
    # The port may close a bit later, and the next send may tell before the receive does.
    by_sends = set()
    while not waiting.done():
        try:
            await client.send(b"anyone?", None)
        except Err as err:
            by_sends.add(error_name(err))
        await clock.wait_for(MS)
    await tell("receive from a closed port", lambda: waiting)
    say("sends tell of nothing else", by_sends <= {"connection-refused"})


async def server(sockets):
    """An echo server and its clients, all of them tasks."""
    print("-- echo")
    serving, at = sockets.bound()
    echoes = []

    async def serve():
        for _ in range(IN_FLIGHT * ROUNDS):
            data, sender = await serving.receive()
            echoes.append(asyncio.create_task(serving.send(data + b"!", sender)))
        await asyncio.gather(*echoes)

    async def ask(index):
        one = sockets.new()
        one.connect(at)
        answered = 0
        for turn in range(ROUNDS):
            await one.send(b"%d.%d" % (index, turn), None)
            data, sender = await one.receive()
            answered += (data, sender) == (b"%d.%d!" % (index, turn), at)
        return answered

    _, *answered = await asyncio.gather(serve(), *(ask(index) for index in range(IN_FLIGHT)))
    say("echoed", len(echoes))
    say("came back to its sender", sum(answered))


async def watch():
    await clock.wait_for(WAIT_NS)
    print("took too long", flush=True)
    os._exit(1)


class Run(exports.Run):
    async def run(self):
        spawn(watch())
        for family in IpAddressFamily:
            print(f"== {family.name.lower()}")
            with Sockets(family) as sockets:
                await unbound(sockets)
                await binding(sockets)
                await options(sockets)
                await datagrams(sockets)
                await implicit(sockets)
                await in_flight(sockets)
                await connected(sockets)
                await refused(sockets)
                await server(sockets)
        abandoned, _ = Sockets(IpAddressFamily.IPV4).bound()
        spawn(abandoned.receive())
        await asyncio.sleep(0)
        print("done", flush=True)
