"""A UDP socket's whole life through spin-sdk's bindings of wasi:sockets 0.2.0.

Built by scripts/guests with componentize-py; run it with `wasi-uring run`.
Speaks to itself over loopback and prints a transcript that is the same on every
host and backend: sizes and ports are told by how they compare, errors by name.
Where the interface lets a host choose when to report (a failed bind at start or
at finish, a refused datagram at the next send or receive), only that it reports
is told. Every wait has a deadline, so a host that loses a wake-up shows up as a
different transcript, not as a hang.
"""

from contextlib import ExitStack

from componentize_py_types import Err
from spin_sdk.wit.imports import wasi_clocks_monotonic_clock_0_2_0 as clock
from spin_sdk.wit.imports import wasi_io_poll_0_2_0 as poll
from spin_sdk.wit.imports.wasi_sockets_instance_network_0_2_0 import instance_network
from spin_sdk.wit.imports.wasi_sockets_network_0_2_0 import (
    ErrorCode,
    IpAddressFamily,
    IpSocketAddress_Ipv4,
    IpSocketAddress_Ipv6,
    Ipv4SocketAddress,
    Ipv6SocketAddress,
)
from spin_sdk.wit.imports.wasi_sockets_udp_0_2_0 import OutgoingDatagram
from spin_sdk.wit.imports.wasi_sockets_udp_create_socket_0_2_0 import create_udp_socket

MS = 1_000_000  # nanoseconds
WAIT_NS = 5_000 * MS  # for what must come
QUIET_NS = 100 * MS  # for what must not
ATTEMPTS_MAX = 100

U64_MAX = 2**64 - 1


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
MAPPED = v6((0, 0, 0, 0, 0, 0xFFFF, 0x7F00, 0x0001), 9)
# Documentation addresses: no host has them, and nothing is sent to them.
FOREIGN = {
    IpAddressFamily.IPV4: v4((192, 0, 2, 1), 0),
    IpAddressFamily.IPV6: v6((0x2001, 0xDB8, 0, 0, 0, 0, 0, 1), 0),
}


def error_name(code):
    return code.name.lower().replace("_", "-")


def say(what, answer):
    print(f"{what}: {answer}", flush=True)


def tell(what, call, show=lambda value: "ok" if value is None else value):
    """Prints what a call answers, or the name of the error it raises."""
    try:
        answer = show(call())
    except Err as err:
        answer = f"error {error_name(err.value)}"
    say(what, answer)


def compare(asked, got):
    return "kept" if got == asked else "raised" if got > asked else "lowered"


def wait(source, deadline_ns):
    """Blocks on a source's pollable; says whether it fired before the deadline."""
    with source.subscribe() as event, clock.subscribe_duration(deadline_ns) as timer:
        return 0 in poll.poll([event, timer])


def pause(duration_ns=1 * MS):
    """Gives the host's runtime a turn.

    wasmtime-wasi goes on with a send in the background, and tells its error at the
    next one, when the guest has kept the runtime busy for long (tokio's cooperative
    budget); not after this.
    """
    with clock.subscribe_duration(duration_ns) as timer:
        timer.block()


def bind(network, socket, address):
    """Start and finish as one: a failure may be told at either."""
    socket.start_bind(network, address)
    for _ in range(ATTEMPTS_MAX):
        try:
            return socket.finish_bind()
        except Err as err:
            if err.value != ErrorCode.WOULD_BLOCK:
                raise
            wait(socket, WAIT_NS)
    raise RuntimeError("finish-bind still answers would-block")


def permit(outgoing):
    """Asks until at least one datagram may be sent."""
    for _ in range(ATTEMPTS_MAX):
        count = outgoing.check_send()
        if count:
            return count
        wait(outgoing, WAIT_NS)
    raise RuntimeError("check-send still permits nothing")


def send(outgoing, *datagrams):
    """One `send` of datagrams given as (data, remote address or None)."""
    if permit(outgoing) < len(datagrams):
        raise RuntimeError("check-send permits fewer datagrams than this guest sends")
    return outgoing.send([OutgoingDatagram(data, to) for data, to in datagrams])


def receive(incoming):
    """The next datagram's data and sender, both None once the deadline has passed.

    Takes one at a time: a wasmtime-wasi stream that found its socket empty keeps
    waiting in the background, and `stream` traps while it does.
    """
    for _ in range(ATTEMPTS_MAX):
        if not wait(incoming, WAIT_NS):
            break
        for got in incoming.receive(1):
            return got.data, got.remote_address
    return None, None


class Life:
    """One address family, from creation to the last drop."""

    def __init__(self, network, family):
        self.network = network
        self.family = family
        self.other = (
            IpAddressFamily.IPV6 if family == IpAddressFamily.IPV4 else IpAddressFamily.IPV4
        )
        self.loopback = LOOPBACK[family]

    def refuses(self, socket, address):
        """By the host's rules or, if they allow it, by its kernel."""
        try:
            bind(self.network, socket, address)
        except Err as err:
            return err.value in (ErrorCode.ACCESS_DENIED, ErrorCode.ADDRESS_NOT_BINDABLE)
        return False

    def socket(self, stack, bound=True):
        socket = stack.enter_context(create_udp_socket(self.family))
        if bound:
            bind(self.network, socket, self.loopback(0))
        return socket

    def socket_with_a_port_of_its_own(self, stack):
        """Bound to a free port by number.

        Linux takes a port it chose itself back when a socket is disconnected, and
        wasmtime-wasi lets it: only a port asked for by number outlives
        `stream(none)` everywhere.
        """
        for _ in range(ATTEMPTS_MAX):
            with create_udp_socket(self.family) as finder:
                bind(self.network, finder, self.loopback(0))
                free_at = finder.local_address()
            socket = stack.enter_context(create_udp_socket(self.family))
            try:
                bind(self.network, socket, free_at)
                return socket
            except Err as err:
                if err.value != ErrorCode.ADDRESS_IN_USE:
                    raise
        raise RuntimeError("found no port that stays free")

    def streams(self, stack, socket, remote=None):
        incoming, outgoing = socket.stream(remote)
        return stack.enter_context(incoming), stack.enter_context(outgoing)

    def run(self):
        print(f"== {self.family.name.lower()}")
        self.unbound()
        self.options()
        self.binding()
        self.unconnected()
        self.connected()
        self.batch()
        self.refused()

    def unbound(self):
        print("-- unbound")
        with ExitStack() as stack:
            socket = self.socket(stack, bound=False)
            say("family", socket.address_family().name.lower())
            tell("local-address", socket.local_address)
            tell("remote-address", socket.remote_address)
            tell("finish-bind", socket.finish_bind)
            tell("stream(none)", lambda: socket.stream(None))
            tell("stream(some)", lambda: socket.stream(self.loopback(9)))
            say("socket's pollable is ready", wait(socket, WAIT_NS))

    def options(self):
        print("-- options")
        with ExitStack() as stack:
            socket = self.socket(stack, bound=False)
            tell("hop limit by default", socket.unicast_hop_limit, lambda hops: hops > 0)
            tell("hop limit 0", lambda: socket.set_unicast_hop_limit(0))
            for hops in (1, 255, 7):
                tell(f"hop limit {hops}", lambda: socket.set_unicast_hop_limit(hops))
                tell("hop limit", socket.unicast_hop_limit)

            sizes = {
                "receive": (socket.receive_buffer_size, socket.set_receive_buffer_size),
                "send": (socket.send_buffer_size, socket.set_send_buffer_size),
            }
            for name, (get, set_) in sizes.items():
                tell(f"{name} buffer by default", get, lambda size: size > 0)
                tell(f"{name} buffer 0", lambda: set_(0))
                for asked in (1, U64_MAX, 65536):
                    tell(f"{name} buffer {asked}", lambda: set_(asked))
                    tell(f"{name} buffer", get, lambda size: compare(asked, size))

            bind(self.network, socket, self.loopback(0))
            print("(bound)")
            tell("hop limit", socket.unicast_hop_limit)
            for name, (get, set_) in sizes.items():
                tell(f"{name} buffer", get, lambda size: compare(65536, size))
                tell(f"{name} buffer 32768", lambda: set_(32768))
                tell(f"{name} buffer", get, lambda size: compare(32768, size))
                tell(f"{name} buffer 0", lambda: set_(0))
            tell("hop limit 9", lambda: socket.set_unicast_hop_limit(9))
            tell("hop limit 0", lambda: socket.set_unicast_hop_limit(0))
            tell("hop limit", socket.unicast_hop_limit)

        with ExitStack() as stack:
            # Whatever the first socket was told must not reach the next one.
            socket = self.socket(stack)
            tell("next socket's hop limit is 9", socket.unicast_hop_limit, lambda h: h == 9)
            tell(
                "next socket's receive buffer is 32768",
                socket.receive_buffer_size,
                lambda size: size == 32768,
            )

    def binding(self):
        print("-- bind")
        with ExitStack() as stack:
            socket = self.socket(stack, bound=False)
            tell("other family", lambda: bind(self.network, socket, LOOPBACK[self.other](0)))
            if self.family == IpAddressFamily.IPV6:
                tell("mapped IPv4", lambda: bind(self.network, socket, MAPPED))
            say("foreign address is refused", self.refuses(socket, FOREIGN[self.family]))
            tell("start-bind", lambda: socket.start_bind(self.network, self.loopback(0)))
            tell(
                "start-bind while binding",
                lambda: socket.start_bind(self.network, self.loopback(0)),
            )
            wait(socket, WAIT_NS)
            tell("finish-bind", socket.finish_bind)
            tell("finish-bind again", socket.finish_bind)
            tell("bind again", lambda: bind(self.network, socket, self.loopback(0)))
            local = socket.local_address()
            say("address is loopback's", local.value.address == self.loopback(0).value.address)
            say("port is not 0", local.value.port != 0)
            say("local-address is stable", socket.local_address() == local)
            tell("remote-address", socket.remote_address)

            taken = self.socket(stack, bound=False)
            tell("port in use", lambda: bind(self.network, taken, local))
            tell("another after that", lambda: bind(self.network, taken, self.loopback(0)))
            say("ports differ", taken.local_address() != local)

            everywhere = self.socket(stack, bound=False)
            bind(self.network, everywhere, UNSPECIFIED[self.family](0))
            local = everywhere.local_address()
            say(
                "unspecified stays unspecified",
                local.value.address == UNSPECIFIED[self.family](0).value.address,
            )
            say("port is not 0", local.value.port != 0)

    def unconnected(self):
        print("-- unconnected")
        with ExitStack() as stack:
            one, two = self.socket(stack), self.socket(stack)
            one_at, two_at = one.local_address(), two.local_address()
            one_in, one_out = self.streams(stack, one)
            two_in, two_out = self.streams(stack, two)

            tell("receive(0)", lambda: two_in.receive(0))
            tell("receive on a fresh socket", lambda: two_in.receive(16))
            say("fresh socket is readable", wait(two_in, QUIET_NS))
            say("fresh socket is writable", wait(two_out, WAIT_NS))
            tell("send nothing", lambda: two_out.send([]))
            tell("check-send", two_out.check_send, lambda count: count > 0)

            tell("send to port 0", lambda: send(one_out, (b"x", self.loopback(0))))
            tell("send to nobody", lambda: send(one_out, (b"x", None)))
            tell("send to other family", lambda: send(one_out, (b"x", LOOPBACK[self.other](9))))
            tell(
                "send to unspecified",
                lambda: send(one_out, (b"x", UNSPECIFIED[self.family](9))),
            )
            pause()
            tell("send 65536 bytes", lambda: send(one_out, (bytes(65536), two_at)))
            if self.family == IpAddressFamily.IPV4:
                tell("send 65508 bytes", lambda: send(one_out, (bytes(65508), two_at)))
            tell("none of these arrived", lambda: wait(two_in, QUIET_NS), lambda hit: not hit)

            for size in (0, 1, 1472, 9000, 65507):
                data = bytes(byte % 251 for byte in range(size))
                tell(f"send {size} bytes", lambda: send(one_out, (data, two_at)))
                arrived, sender = receive(two_in)
                say("arrived whole", arrived == data)
                say("from its sender", sender == one_at)

            tell("send to itself", lambda: send(one_out, (b"echo", one_at)))
            say("arrived", receive(one_in) == (b"echo", one_at))

            tell("answer", lambda: send(two_out, (b"answer", one_at)))
            say("arrived", receive(one_in) == (b"answer", two_at))
            tell("remote-address", one.remote_address)
            tell("bind with streams", lambda: bind(self.network, one, self.loopback(0)))

    def connected(self):
        print("-- connected")
        with ExitStack() as stack:
            server = self.socket_with_a_port_of_its_own(stack)
            server_at = server.local_address()
            # A stranger never becomes the peer: what it has sent may come late.
            first, second, stranger = (self.socket(stack) for _ in range(3))
            first_at, second_at = first.local_address(), second.local_address()
            stranger_at = stranger.local_address()
            first_in, first_out = self.streams(stack, first)
            second_in, second_out = self.streams(stack, second)
            _, stranger_out = self.streams(stack, stranger)

            tell("stream to port 0", lambda: server.stream(self.loopback(0)))
            tell("stream to unspecified", lambda: server.stream(UNSPECIFIED[self.family](9)))
            tell("stream to other family", lambda: server.stream(LOOPBACK[self.other](9)))
            if self.family == IpAddressFamily.IPV6:
                tell("stream to mapped IPv4", lambda: server.stream(MAPPED))

            for name, peer_at, peer_in, peer_out in (
                ("first", first_at, first_in, first_out),
                ("second", second_at, second_in, second_out),
            ):
                with ExitStack() as streams:
                    incoming, outgoing = self.streams(streams, server, peer_at)
                    print(f"(connected to the {name})")
                    say("remote-address is the peer's", server.remote_address() == peer_at)
                    say("local-address is kept", server.local_address() == server_at)
                    tell("send", lambda: send(outgoing, (b"to the peer", None)))
                    say("peer has it", receive(peer_in) == (b"to the peer", server_at))
                    tell("send to the peer by name", lambda: send(outgoing, (b"named", peer_at)))
                    say("peer has it", receive(peer_in) == (b"named", server_at))
                    tell("send to a stranger", lambda: send(outgoing, (b"x", stranger_at)))
                    tell("send from a stranger", lambda: send(stranger_out, (b"no", server_at)))
                    tell("send from the peer", lambda: send(peer_out, (b"yes", server_at)))
                    say("only the peer's came", receive(incoming) == (b"yes", peer_at))

            print("(disconnected)")
            pause(QUIET_NS)
            with ExitStack() as streams:
                incoming, outgoing = self.streams(streams, server)
                tell("remote-address", server.remote_address)
                say("local-address is kept", server.local_address() == server_at)
                tell("send to nobody", lambda: send(outgoing, (b"x", None)))
                tell("send from a stranger", lambda: send(stranger_out, (b"yes", server_at)))
                say("it came", receive(incoming) == (b"yes", stranger_at))
                tell("send to the first", lambda: send(outgoing, (b"back", first_at)))
                say("it came", receive(first_in) == (b"back", server_at))

    def batch(self):
        print("-- batch")
        with ExitStack() as stack:
            one, two = self.socket(stack), self.socket(stack)
            one_at, two_at = one.local_address(), two.local_address()
            _, one_out = self.streams(stack, one)
            two_in, _ = self.streams(stack, two)
            pause()
            tell(
                "three, the second to port 0",
                lambda: send(one_out, (b"a", two_at), (b"b", self.loopback(0)), (b"c", two_at)),
            )
            say("the first came", receive(two_in) == (b"a", one_at))
            pause()
            tell("then all is well", lambda: send(one_out, (b"d", two_at), (b"e", two_at)))
            got = [receive(two_in), receive(two_in)]
            say("both came in order", got == [(b"d", one_at), (b"e", one_at)])

            pause()
            batch = [(b"%d" % index, two_at) for index in range(8)]
            tell("eight at once", lambda: send(one_out, *batch))
            wait(two_in, WAIT_NS)
            got = []
            for _ in range(ATTEMPTS_MAX):
                more = two_in.receive(3)
                if len(more) > 3:
                    say("receive(3) answered", len(more))
                got += more
                if len(got) >= len(batch) or not (more or wait(two_in, WAIT_NS)):
                    break
            say("came in order", [g.data for g in got] == [data for data, _ in batch])

    def refused(self):
        print("-- refused")
        with ExitStack() as stack:
            # A port that was just free again.
            with create_udp_socket(self.family) as gone:
                bind(self.network, gone, self.loopback(0))
                gone_at = gone.local_address()
            socket = self.socket(stack)
            incoming, outgoing = self.streams(stack, socket, gone_at)
            answer = "never"
            for _ in range(ATTEMPTS_MAX):
                try:
                    send(outgoing, (b"anyone?", None))
                    if wait(incoming, QUIET_NS):
                        incoming.receive(1)
                except Err as err:
                    answer = f"error {error_name(err.value)}"
                    break
            say("a closed port answers", answer)


class Run:
    def run(self):
        with instance_network() as network:
            for family in (IpAddressFamily.IPV4, IpAddressFamily.IPV6):
                Life(network, family).run()
        print("done", flush=True)
