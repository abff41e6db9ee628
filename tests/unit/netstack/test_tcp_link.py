"""Two of our hosts on a bad link: whatever it does, the octets arrive, all and in order."""

import random
from itertools import combinations

import pytest

from echo_appliance.netstack.tcp.connection import Connection
from echo_appliance.netstack.tcp.settings import TIME_WAIT, Settings
from echo_appliance.netstack.tcp.states import State
from echo_appliance.netstack.wire.tcp import Segment

from .link import LEFT, RIGHT, Client, Echo, Fault, Link

SEEDS = 2400
SEEDS_PER_TEST = 200


def listen(link: Link, settings: Settings | None = None) -> list[Connection]:
    """Let the right host echo on port 7; return the list that its connections go to."""
    taken: list[Connection] = []

    def on_open(connection: Connection) -> None:
        Echo(connection)
        taken.append(connection)

    link.right.listen(7, on_open, settings=settings)
    return taken


def echoed(link: Link, data: bytes, limit: float = 3000.0) -> float:
    """Send data, have them echoed, and close; return the seconds that took on the link."""
    listen(link)
    start = link.now
    client = Client(link.connect(7), data)
    link.run(lambda: client.done, limit)
    assert client.connection.error is None
    assert client.received == data
    return link.now - start


def any_link(seed: int) -> tuple[Link, bytes]:
    """A link, its two hosts and a stream, of any kind, from the seed."""
    chance = random.Random(seed)  # noqa: S311
    pick = chance.choice
    fault = Fault(
        loss=pick([0, 0.01, 0.05, 0.2]), duplicate=pick([0, 0.01, 0.1]), corrupt=pick([0, 0.01]),
        reorder=pick([0, 0.25, 0.5]), delay=pick([0.0005, 0.005, 0.1]), limit=pick([5, 50, 1000]),
    )  # fmt: skip
    left, right = (
        Settings(
            receive_limit=pick([1000, 5000, 65535, 1 << 20]),
            send_limit=pick([1000, 20_000, 1 << 20]),
            nagle=pick([True, False]), congestion=pick(["cubic", "newreno"]),
            user_timeout=1e6,  # with a fifth lost, nine losses in a row do happen
        )
        for _ in range(2)
    )  # fmt: skip
    size = pick([0, 1, 100, 1460, 5000, 20_000, 60_000])
    if min(left.receive_limit, right.receive_limit) == 1000:
        size = min(size, 5000)
    link = Link(fault, seed, (left, right), pick([536, 1460, 8960]), pick([0, 0, 65_000]))
    return link, chance.randbytes(size)


@pytest.mark.parametrize("first", range(0, SEEDS, SEEDS_PER_TEST))
def test_any_link_any_host_the_echo_is_exact(first: int) -> None:
    for seed in range(first, first + SEEDS_PER_TEST):
        link, data = any_link(seed)
        try:
            took = echoed(link, data)
            assert took < 100 or link.fault.loss == 0.2, f"{took:.0f} s: who waits for whom?"
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


def test_echo_of_20480_octets() -> None:
    link = Link(Fault(delay=0.0005))
    assert echoed(link, random.Random(1).randbytes(20_480)) < 0.02  # noqa: S311
    assert link.sent < 50, "Gotcp sent 21,720 octets for these, in 100 ms each"


def test_bulk_on_a_clean_link_nothing_is_sent_twice() -> None:
    link = Link(Fault(delay=0.01))
    seen: set[tuple[bytes, int]] = set()

    def trace(_now: float, source: bytes, segment: Segment, _fate: str) -> None:
        if segment.payload:
            assert (source, segment.seq) not in seen, "a time-out or recovery without a loss"
            seen.add((source, segment.seq))

    link.trace = trace
    echoed(link, bytes(2_000_000))


@pytest.mark.parametrize("congestion", ["cubic", "newreno"])
def test_echo_of_a_megabyte_through_a_bad_relay(congestion: str) -> None:
    # The kernel, to itself, needs 2.85 s through such a relay; its median over seeds is ours to
    # beat.  Of five seeds the middle one is judged, since one lost tail costs 0.2 s.
    fault = Fault(loss=0.05, duplicate=0.01, corrupt=0.001, reorder=0.25, delay=0.005)
    settings = Settings(congestion=congestion)
    times = sorted(
        echoed(Link(fault, seed, (settings, settings)), bytes(1_000_000)) for seed in range(5)
    )
    assert times[2] < 2.85


def test_reordering_alone_hardly_slows_the_stream() -> None:
    fast = echoed(Link(Fault(delay=0.01)), bytes(1_000_000))
    slow = echoed(Link(Fault(delay=0.01, reorder=0.25)), bytes(1_000_000))
    assert slow < 4 * fast


def test_half_close_the_reply_comes_after_it() -> None:
    link = Link()

    def on_open(connection: Connection) -> None:
        sizes: list[int] = []

        def answer(one: Connection) -> None:
            sizes.append(len(one.read(1 << 20)))
            if one.at_eof and one.state is State.CLOSE_WAIT:
                one.write(b"all %d octets" % sum(sizes))
                one.close()

        connection.application = answer

    link.right.listen(7, on_open)
    connection = link.connect(7)
    link.run(lambda: connection.state is State.ESTABLISHED)
    connection.write(bytes(5000))
    connection.close()
    link.left.touch(connection)
    link.run(lambda: connection.at_eof or connection.readable > 0)
    assert connection.read(99) == b"all 5000 octets"


def test_simultaneous_open_carries_data_both_ways() -> None:
    link = Link()
    left = link.left.connect(LEFT, RIGHT, 5000, link.now, local_port=6000)
    right = link.right.connect(RIGHT, LEFT, 6000, link.now, local_port=5000)
    link.run(lambda: left.state is State.ESTABLISHED and right.state is State.ESTABLISHED)
    left.write(b"from the left")
    right.write(b"from the right")
    link.left.touch(left)
    link.right.touch(right)
    link.run(lambda: left.readable > 0 and right.readable > 0)
    assert (right.read(99), left.read(99)) == (b"from the left", b"from the right")


class Dropping(Link):
    """A link that loses the segments with these numbers: (whose, the how-manieth of theirs)."""

    def __init__(self, lost: tuple[tuple[bytes, int], ...]) -> None:
        super().__init__()
        self._lost = lost
        self._counts = {LEFT: 0, RIGHT: 0}

    def _carry(self, source: bytes, destination: bytes, segment: Segment) -> None:
        number = self._counts[source]
        self._counts[source] += 1
        if (source, number) not in self._lost:
            super()._carry(source, destination, segment)


def both_ways(link: Link, data: bytes, *, simultaneous: bool) -> list[Client]:
    """Have each side send the data and close; return what becomes both sides, once opened."""
    sides: list[Client] = []
    if simultaneous:
        left = link.left.connect(LEFT, RIGHT, 5000, link.now, local_port=6000)
        right = link.right.connect(RIGHT, LEFT, 6000, link.now, local_port=5000)
        sides.append(Client(right, data))
    else:
        link.right.listen(7, lambda connection: sides.append(Client(connection, data)))
        left = link.connect(7)
    sides.append(Client(left, data))
    return sides


@pytest.mark.parametrize("data", [b"", b"a few octets", bytes(range(250)) * 20])
@pytest.mark.parametrize("simultaneous", [True, False])
def test_any_two_segments_lost_both_sides_open_send_and_close(
    simultaneous: bool, data: bytes
) -> None:
    """Opened by one side or by both at once, and closed by both at once."""
    numbers = [(side, number) for side in (LEFT, RIGHT) for number in range(7)]
    for lost in [(), *((one,) for one in numbers), *combinations(numbers, 2)]:
        link = Dropping(lost)
        sides = both_ways(link, data, simultaneous=simultaneous)
        link.run(lambda: len(sides) == 2 and all(side.done for side in sides), 5.0)  # noqa: B023
        assert [(bytes(side.received), side.connection.error) for side in sides] == [
            (data, None), (data, None)
        ], f"lost: {lost}"  # fmt: skip
        link.run(lambda: not link.left.connections and not link.right.connections, 2 * TIME_WAIT)  # noqa: B023


def test_reader_slow_the_sender_waits_and_memory_stays_bounded() -> None:
    limit = 50_000
    link = Link(settings=(Settings(send_limit=limit), Settings(receive_limit=limit)))
    taken: list[Connection] = []
    link.right.listen(7, taken.append)  # it never reads
    connection = link.connect(7)
    client = Client(connection, bytes(1_000_000))
    link.run(lambda: connection.state is State.ESTABLISHED)
    end = link.now + 300
    while link.now < end:
        link.step()
    assert taken[0].readable == limit
    assert connection.unacknowledged <= limit
    assert connection.state is State.ESTABLISHED, "a zero window may last as long as it likes"
    received = bytearray()
    while not taken[0].at_eof:
        received += taken[0].read(10_000)
        link.right.touch(taken[0])
        link.step()
    assert received == bytes(1_000_000)
    assert not client.received


def test_connections_a_thousand_at_once_are_all_served() -> None:
    link = Link(Fault(delay=0.001, loss=0.01, limit=5000), seed=1)
    listen(link)
    clients = [Client(link.connect(7), b"%d" % number * 100) for number in range(1000)]
    link.run(lambda: all(client.done for client in clients))
    assert all(client.received == b"%d" % n * 100 for n, client in enumerate(clients))


def test_path_mtu_shrinks_under_way_and_the_stream_goes_on() -> None:
    link = Link(Fault(delay=0.001), segment_limit=65_000)
    listen(link)
    client = Client(link.connect(7), bytes(300_000))
    link.run(lambda: len(client.received) > 50_000)
    for endpoint, remote in ((link.left, RIGHT), (link.right, LEFT)):
        endpoint.set_path_mss(remote, 576)
    link.run(lambda: client.done)
    assert client.received == bytes(300_000)
