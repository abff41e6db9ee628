"""What time and strangers can make of an endpoint: its memory, its waits, its clocks."""

import gc

import pytest

from echo_appliance.netstack.tcp import endpoint as endpoint_module
from echo_appliance.netstack.tcp import flight as flight_module
from echo_appliance.netstack.tcp.arrival import may_follow
from echo_appliance.netstack.tcp.connection import Connection
from echo_appliance.netstack.tcp.endpoint import Endpoint
from echo_appliance.netstack.tcp.octets import JOIN_BELOW, Stream
from echo_appliance.netstack.tcp.reassembly import Reassembly
from echo_appliance.netstack.tcp.settings import MAX_HALF_OPEN
from echo_appliance.netstack.tcp.states import State
from echo_appliance.netstack.wire.tcp import ACK, FIN, RST, SYN, Segment

from .peer import FIRST, Peer, established, in_flight, listening
from .test_tcp_endpoint import HERE, OTHER, THERE, flooded, host, opened, replies, segment

# -- timers ------------------------------------------------------------------


def pinged(endpoint: Endpoint, seconds: int) -> None:
    """A peer whose window is shut sends an octet now and then, and each wants a delayed ACK."""
    taken = list[Connection]()
    endpoint.listen(80, taken.append)
    opened(endpoint)
    (connection,) = taken
    connection.write(b"waits for a window")
    endpoint.touch(connection)
    (data,) = replies(endpoint)
    now, seq = 0.0, 5001
    ack = (data.seq + len(data.payload)) & 0xFFFFFFFF
    shut = Segment(4000, 80, seq, ack, ACK, 0)
    endpoint.receive(THERE, HERE, shut, now)
    connection.write(b"more")
    endpoint.touch(connection)
    endpoint.to_send(now)
    while now < seconds:
        endpoint.receive(THERE, HERE, Segment(4000, 80, seq, ack, ACK, 0, memoryview(b"x")), now)
        seq += 1
        endpoint.to_send(now)
        connection.consume(connection.readable)
        now += 0.05
        while (at := endpoint.deadline()) is not None and at <= now:
            endpoint.on_deadline(now)
            endpoint.to_send(now)


def test_timers_of_one_connection_do_not_pile_up() -> None:
    """Each delayed ACK moves the deadline to and fro; what it was before is not kept."""
    endpoint = host()
    pinged(endpoint, 50)
    assert len(endpoint._timers) < 100


def test_connections_that_are_forgotten_are_not_kept_by_their_timers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TIME-WAIT is bounded, but so has to be what waits for a minute to find that out."""
    monkeypatch.setattr(endpoint_module, "MAX_TIME_WAIT", 10)
    endpoint, before = host(), connections_in_memory()
    endpoint.listen(80, Connection.close)
    for source in range(1000):
        endpoint.receive(THERE, HERE, segment(SYN, source=source), 0.0)
        (answer,) = replies(endpoint)
        ack = (answer.seq + 1) & 0xFFFFFFFF
        endpoint.receive(THERE, HERE, segment(ACK, source=source, seq=5001, ack=ack), 0.0)
        endpoint.to_send(0.0)
        last = segment(FIN | ACK, source=source, seq=5001, ack=(ack + 1) & 0xFFFFFFFF)
        endpoint.receive(THERE, HERE, last, 0.0)
        endpoint.to_send(0.0)
    assert len(endpoint.connections) == 10
    assert connections_in_memory() - before < 200


def connections_in_memory() -> int:
    gc.collect()
    return sum(isinstance(one, Connection) for one in gc.get_objects())


# -- TIME-WAIT ---------------------------------------------------------------


def client_in_time_wait() -> tuple[Endpoint, Connection]:
    """Our side opened, and closed first; nobody listens here.  The peer's next number is 5002."""
    endpoint = host()
    connection = endpoint.connect(HERE, THERE, 4000, 0.0, local_port=50000)
    (syn,) = replies(endpoint)
    ours = (syn.seq + 1) & 0xFFFFFFFF
    endpoint.receive(THERE, HERE, segment(SYN | ACK, port=50000, ack=ours), 0.0)
    connection.close()
    endpoint.to_send(0.0)
    ack = (ours + 1) & 0xFFFFFFFF
    endpoint.receive(THERE, HERE, segment(FIN | ACK, port=50000, seq=5001, ack=ack), 0.0)
    endpoint.to_send(0.0)
    assert connection.state is State.TIME_WAIT
    return endpoint, connection


def test_time_wait_a_later_syn_to_no_listener_does_not_end_it() -> None:
    """Anyone could send that SYN, and old duplicates would find a port that knows nothing."""
    endpoint, connection = client_in_time_wait()
    endpoint.receive(THERE, HERE, segment(SYN, port=50000, seq=9000), 1.0)
    assert [one.flags for one in replies(endpoint, 1.0)] == [ACK]
    assert connection.state is State.TIME_WAIT
    assert list(endpoint.connections.values()) == [connection]


def test_time_wait_ended_by_a_syn_of_the_same_batch_is_still_told_to_the_application() -> None:
    """FIN and SYN at once: a session that never hears of the end keeps its place for ever."""
    endpoint, seen = host(), list[State]()

    def on_open(connection: Connection) -> None:
        connection.application = lambda one: seen.append(one.state)
        connection.close()

    endpoint.listen(80, on_open)
    ack = (opened(endpoint).ack + 1) & 0xFFFFFFFF
    endpoint.receive(THERE, HERE, segment(ACK, seq=5001, ack=ack), 0.0)
    endpoint.to_send(0.0)
    old = endpoint.connections[THERE, 4000, HERE, 80]
    assert old.state is State.FIN_WAIT_2
    seen.clear()
    endpoint.receive(THERE, HERE, segment(FIN | ACK, seq=5001, ack=ack), 1.0)
    endpoint.receive(THERE, HERE, segment(SYN, seq=9000), 1.0)
    assert [one.flags for one in replies(endpoint, 1.0)] == [SYN | ACK]
    assert seen == [State.CLOSED]
    assert old.error is None
    assert len(endpoint.connections) == 1


@pytest.mark.parametrize(
    ("stamp", "beyond", "expected"),
    [(101, -50, True), (99, 50, False), (100, 50, True), (100, -50, False),
     (None, 50, True), (None, -50, False)],
)  # fmt: skip
def test_time_wait_a_syn_is_later_by_its_timestamp_or_where_that_is_the_same_by_its_number(
    stamp: int | None, beyond: int, expected: bool
) -> None:
    """RFC 6191 section 2: a clock of 10 ms may not have ticked since the last segment."""
    peer = established(timestamp=(100, 0), theirs=0xFFFFFFF0)
    peer.connection.close()
    peer.leaves()
    peer.sends(FIN | ACK)
    assert peer.state is State.TIME_WAIT
    syn = Segment(4000, 80, (peer.seq + beyond) & 0xFFFFFFFF, 0, SYN, 60000)
    syn.timestamp = None if stamp is None else (stamp, 0)
    assert may_follow(peer.connection, syn) is expected


# -- SYN cookies -------------------------------------------------------------


def test_cookie_tells_nothing_of_the_round_trip_and_none_is_assumed() -> None:
    """When its SYN,ACK left is not remembered: a round trip of 0 s would repeat all too soon."""
    endpoint = host()
    flooded(endpoint)
    assert len(endpoint.connections) == MAX_HALF_OPEN
    opened(endpoint)
    round_trip = endpoint.connections[THERE, 4000, HERE, 80].sender.round_trip
    assert round_trip.smoothed is None
    assert round_trip.rto == 1.0


# -- hostile peers -----------------------------------------------------------


def test_reset_and_syn_of_the_same_ports_in_one_batch_open_anew() -> None:
    endpoint = host()
    endpoint.listen(80, lambda _: None)
    ack = opened(endpoint)
    endpoint.receive(THERE, HERE, segment(RST, seq=5001), 1.0)
    endpoint.receive(THERE, HERE, segment(SYN, seq=7000), 1.0)
    (answer,) = replies(endpoint, 1.0)
    assert (answer.flags, answer.ack) == (SYN | ACK, 7001)
    assert ack.ack != answer.seq


def test_window_shut_and_opened_over_and_over_does_not_have_all_repeated_each_time() -> None:
    """Else 80 octets of ACKs would bring a whole window, for as long as the peer likes."""
    peer = in_flight(10)
    repeated = 0
    for _ in range(100):
        peer.now += 1  # more than a round trip
        repeated += len(peer.sends(window=0, ack=peer.connection.sender.una & 0xFFFFFFFF))
        repeated += len(peer.sends(ack=peer.connection.sender.una & 0xFFFFFFFF))
    assert repeated <= 20


def test_window_shut_and_opened_octet_by_octet_does_not_have_all_repeated_each_time() -> None:
    """Once in a round trip is what a peer that threw away what we sent can ask for."""
    peer = in_flight(10)
    octets = 0
    for _ in range(100):
        ack = peer.connection.sender.una + 1
        sent = peer.sends(window=0, ack=ack) + peer.sends(ack=ack)
        octets += sum(len(one.payload) for one in sent)
    assert octets <= 20_000
    peer.now += 0.1
    ack = peer.connection.sender.una + 1
    sent = peer.sends(window=0, ack=ack) + peer.sends(ack=ack)
    assert sum(len(one.payload) for one in sent) > 5000


CRUMB = 48


class Watched(flight_module.Sent):
    """A record that counts how often records are looked at."""

    looks = 0

    def __getattribute__(self, name: str) -> object:
        Watched.looks += 1
        return super().__getattribute__(name)


def with_crumbs_in_flight(monkeypatch: pytest.MonkeyPatch) -> Peer:
    """A peer whose MSS makes 4,096 records of a window; looking at each took 0.4 ms per ACK."""
    monkeypatch.setattr(flight_module, "Sent", Watched)
    peer = listening(sack_permitted=True, window_scale=7, mss=CRUMB)
    peer.now += 0.1
    peer.sends(window=8192)
    peer.connection.write(b"x")
    peer.leaves()
    peer.now += 0.1
    peer.sends(window=8192)
    peer.connection.sender.congestion.window = 1 << 20
    peer.connection.write(bytes(4096 * CRUMB))
    assert len(peer.leaves()) == 4096
    peer.now += 0.15
    Watched.looks = 0
    return peer


def test_sack_blocks_of_a_peer_with_crumbs_in_flight_cost_no_look_at_each_crumb(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peer, acks, first = with_crumbs_in_flight(monkeypatch), 0, FIRST + 1
    for offset in (1, 2):  # of each three, one; then, before what is sent again could arrive
        for at in range(0, 4000, 3):
            start = first + CRUMB * (at + offset)
            peer.sends(ack=first, window=8192, sack=[(start, start + CRUMB)])
            acks += 1
    assert Watched.looks / acks < 400


def test_sack_blocks_that_tell_again_of_all_that_has_arrived_cost_no_look_at_each_crumb(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As each ACK does while the first segment is missing; four such blocks took 0.3 ms."""
    peer, first = with_crumbs_in_flight(monkeypatch), FIRST + 1
    block = (first + CRUMB, first + CRUMB * 4000)
    peer.sends(ack=first, window=8192, sack=[block])
    Watched.looks = 0
    for at in range(4000, 4096):
        block = (first + CRUMB, first + CRUMB * (at + 1))
        peer.sends(ack=first, window=8192, sack=[block] * 4)
    assert Watched.looks / 96 < 400
    assert peer.connection.sender.flight.sacked == CRUMB * 4095


def test_loss_acknowledged_octet_by_octet_leaves_no_trace_of_each_time_it_was_sent_again() -> None:
    """What was sent before it, and is still under way, had all of them be kept."""
    peer = in_flight(10, timestamp=(1, 0))
    sender = peer.connection.sender

    def acknowledge(octets: int, sent_before: float = 0.0) -> None:
        peer.now += 0.01
        echo = int((peer.now - sent_before) * 1000)
        peer.sends(ack=sender.una + octets, stamp=(2, echo))

    peer.wait(sender.retransmit_at - peer.now)
    for _ in range(3):  # so more and more is sent again, some of which stays under way
        acknowledge(sender.mss)
    peer.wait(sender.retransmit_at - peer.now)
    acknowledge(1, sent_before=0.1)  # the time-out was wrong, it says
    for _ in range(3):
        acknowledge(0)
    for _ in range(sender.mss - 2):
        acknowledge(1)
    assert sender.recovery.end is not None
    assert len(sender.flight._resent) < 100
    acknowledge(sender.nxt - sender.una)
    assert not sender.flight._resent


@pytest.mark.parametrize("size", [1, 1448])
def test_island_that_grows_to_the_left_costs_no_look_at_what_it_has(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Segments that come last first, into a large window, cost 0.3 ms each."""
    islands, appended = Reassembly(), 0
    append = Stream.append

    def counted(stream: Stream, octets: bytes) -> None:
        nonlocal appended
        appended += 1
        append(stream, octets)

    monkeypatch.setattr(Stream, "append", counted)
    number, end = 5000, 1 << 24
    for at in range(1, number + 1):
        islands.insert(end - at * size, bytes((at & 0xFF,)) * size)
    assert appended <= number
    (island,) = islands._islands
    assert len(island.pieces()) <= number * size / (JOIN_BELOW / 2) + 1, "small ones are joined"
    whole = b"".join(bytes(piece) for piece in island.pieces())
    assert whole == b"".join(bytes((at & 0xFF,)) * size for at in range(number, 0, -1))
    first, last = island.start + 3 * size, island.end - 7 * size
    assert bytes(island.between(first, last)) == whole[3 * size : -7 * size]


def test_flood_of_another_leaves_half_open_slots_when_it_times_out() -> None:
    endpoint = host()
    flooded(endpoint)
    now = 0.0
    while (at := endpoint.deadline()) is not None:
        now = at
        endpoint.on_deadline(now)
        endpoint.to_send(now)
    assert endpoint.connections == {}
    assert now < 400
    endpoint.receive(OTHER, HERE, segment(SYN), now)
    assert len(replies(endpoint, now)) == 1
    assert len(endpoint.connections) == 1
