"""Whose segment is it: demultiplexing, listeners, SYN cookies, bounds, timers of one host."""

import pytest

from echo_appliance.netstack.tcp import endpoint as endpoint_module
from echo_appliance.netstack.tcp.connection import Connection
from echo_appliance.netstack.tcp.endpoint import Endpoint, reset_of
from echo_appliance.netstack.tcp.secrets import COOKIE_PERIOD, Secrets, offered_in, stamp_with
from echo_appliance.netstack.tcp.settings import (
    MAX_HALF_OPEN,
    MAX_RESETS_PER_SECOND,
    TIME_WAIT,
    Settings,
)
from echo_appliance.netstack.tcp.states import State
from echo_appliance.netstack.wire.tcp import ACK, FIN, RST, SYN, URG, Segment

from .link import LEFT, RIGHT, Client, Echo, Link

HERE, THERE, OTHER = b"\x0a\0\0\x01", b"\x0a\0\0\x02", b"\x0a\0\0\x03"
GROUP, BROADCAST = b"\xe0\0\0\x01", b"\xff\xff\xff\xff"


def host(settings: Settings | None = None) -> Endpoint:
    return Endpoint(bytes(32), lambda *_: (1460, 0), settings)


def segment(
    flags: int, *, port: int = 80, source: int = 4000, seq: int = 5000, ack: int = 0
) -> Segment:
    mss = 1460 if flags & SYN else None
    return Segment(source, port, seq, ack, flags, 60000, memoryview(b""), mss=mss)


def replies(endpoint: Endpoint, now: float = 0.0) -> list[Segment]:
    return [segment for _, segments in endpoint.to_send(now) for segment in segments]


def opened(endpoint: Endpoint, source: int = 4000, now: float = 0.0) -> Segment:
    """Go through the handshake as a client; return the ACK that ended it."""
    endpoint.receive(THERE, HERE, segment(SYN, source=source), now)
    (answer,) = replies(endpoint, now)
    ack = segment(ACK, source=source, seq=5001, ack=(answer.seq + 1) & 0xFFFFFFFF)
    endpoint.receive(THERE, HERE, ack, now)
    endpoint.to_send(now)
    return ack


# -- nobody's segments ---------------------------------------------------------


def test_syn_to_a_closed_port_is_answered_with_reset() -> None:
    endpoint = host()
    endpoint.receive(THERE, HERE, segment(SYN, port=81), 0.0)
    ((item, (reset,)),) = endpoint.to_send(0.0)
    assert (item.local, item.remote) == (HERE, THERE)
    assert (reset.flags, reset.seq, reset.ack) == (RST | ACK, 0, 5001)
    assert (reset.source_port, reset.destination_port) == (81, 4000)


def test_ack_to_nothing_is_answered_with_reset_at_its_number() -> None:
    reset = reset_of(segment(ACK, ack=777))
    assert (reset.flags, reset.seq) == (RST, 777)


def test_reset_to_nothing_is_never_answered() -> None:
    endpoint = host()
    endpoint.receive(THERE, HERE, segment(RST), 0.0)
    endpoint.receive(THERE, HERE, segment(RST | ACK), 0.0)
    assert replies(endpoint) == []


def test_resets_are_limited_per_second() -> None:
    endpoint = host()
    for source in range(MAX_RESETS_PER_SECOND + 100):
        endpoint.receive(THERE, HERE, segment(SYN, source=source), 0.0)
    assert len(replies(endpoint)) == MAX_RESETS_PER_SECOND
    endpoint.receive(THERE, HERE, segment(SYN), 1.0)
    assert len(replies(endpoint, 1.0)) == 1


@pytest.mark.parametrize(
    ("remote", "local"),
    [(THERE, GROUP), (THERE, BROADCAST), (GROUP, HERE), (b"\xff" + bytes(15), HERE)],
)
def test_syn_to_or_from_a_group_is_dropped_silently(remote: bytes, local: bytes) -> None:
    endpoint = host()
    endpoint.listen(80, lambda _: None)
    endpoint.receive(remote, local, segment(SYN), 0.0)
    assert replies(endpoint) == []
    assert endpoint.counters == {"not one peer": 1}


def test_syn_from_ourselves_to_ourselves_is_dropped() -> None:
    endpoint = host()
    endpoint.listen(80, lambda _: None)
    endpoint.receive(HERE, HERE, segment(SYN, source=80), 0.0)  # the land attack
    assert replies(endpoint) == []


# -- listening -----------------------------------------------------------------


def test_listener_gives_a_connection_once_it_is_established() -> None:
    endpoint, taken = host(), list[Connection]()
    endpoint.listen(80, taken.append)
    endpoint.receive(THERE, HERE, segment(SYN), 0.0)
    (answer,) = replies(endpoint)
    assert taken == []
    endpoint.receive(THERE, HERE, segment(ACK, seq=5001, ack=answer.seq + 1), 0.0)
    (connection,) = taken
    assert connection.state is State.ESTABLISHED
    assert (connection.local, connection.local_port) == (HERE, 80)


def test_listener_on_one_address_goes_before_that_on_all() -> None:
    endpoint, calls = host(), list[str]()
    endpoint.listen(80, lambda _: calls.append("all"))
    endpoint.listen(80, lambda _: calls.append("one"), address=HERE)
    opened(endpoint)
    endpoint.receive(THERE, OTHER, segment(SYN), 0.0)
    (answer,) = replies(endpoint)
    endpoint.receive(THERE, OTHER, segment(ACK, seq=5001, ack=answer.seq + 1), 0.0)
    assert calls == ["one", "all"]


def test_listener_twice_on_one_port_is_refused() -> None:
    endpoint = host()
    endpoint.listen(80, lambda _: None)
    with pytest.raises(ValueError, match="port 80 is listened to already"):
        endpoint.listen(80, lambda _: None)


def test_listener_gone_resets_what_was_half_open_and_keeps_the_rest() -> None:
    endpoint, taken = host(), list[Connection]()
    listener = endpoint.listen(80, taken.append)
    opened(endpoint)
    endpoint.receive(THERE, HERE, segment(SYN, source=4001), 0.0)
    replies(endpoint)
    endpoint.unlisten(listener)
    assert [reset.flags for reset in replies(endpoint)] == [RST | ACK]
    assert list(endpoint.connections.values()) == taken
    endpoint.receive(THERE, HERE, segment(SYN, source=4002), 0.0)
    assert replies(endpoint)[0].flags & RST


@pytest.mark.parametrize("flags", [0, FIN, URG, FIN | URG])
def test_segment_without_ack_or_syn_is_dropped_by_a_listener(flags: int) -> None:
    """RFC 9293 section 3.10.7.2, fourth; a port without one refuses it."""
    endpoint = host()
    endpoint.listen(80, lambda _: None)
    endpoint.receive(THERE, HERE, segment(flags), 0.0)
    assert replies(endpoint) == []
    endpoint.receive(THERE, HERE, segment(flags, port=81), 0.0)
    assert [one.flags for one in replies(endpoint)] == [RST | ACK]


def test_stray_ack_to_a_listener_is_answered_with_reset() -> None:
    endpoint = host()
    endpoint.listen(80, lambda _: None)
    endpoint.receive(THERE, HERE, segment(ACK, ack=9), 0.0)
    assert [(reset.flags, reset.seq) for reset in replies(endpoint)] == [(RST, 9)]


# -- floods --------------------------------------------------------------------


def echo(connection: Connection) -> None:
    Echo(connection)


def flooded(endpoint: Endpoint, now: float = 0.0) -> None:
    endpoint.listen(80, echo)
    for source in range(MAX_HALF_OPEN):
        endpoint.receive(OTHER, HERE, segment(SYN, source=source), now)
    endpoint.to_send(now)


def test_syn_flood_memory_is_bounded_and_a_client_still_gets_in() -> None:
    endpoint = host()
    flooded(endpoint)
    for source in range(5000):
        endpoint.receive(OTHER, HERE, segment(SYN, source=source + 1000), 0.0)
    assert len(replies(endpoint)) == 5000
    assert len(endpoint.connections) == MAX_HALF_OPEN
    opened(endpoint)
    assert len(endpoint.connections) == MAX_HALF_OPEN + 1
    assert endpoint.connections[THERE, 4000, HERE, 80].state is State.ESTABLISHED


def test_syn_cookie_forged_is_answered_with_reset() -> None:
    endpoint = host()
    flooded(endpoint)
    endpoint.receive(THERE, HERE, segment(SYN), 0.0)
    (answer,) = replies(endpoint)
    endpoint.receive(THERE, HERE, segment(ACK, seq=5001, ack=answer.seq + 2), 0.0)
    endpoint.receive(THERE, HERE, segment(ACK, seq=5002, ack=answer.seq + 1), 0.0)
    assert [reset.flags for reset in replies(endpoint)] == [RST, RST]


def test_syn_cookie_keeps_options_and_carries_an_echo() -> None:
    link = Link()
    flooded(link.right, link.now)
    connection = link.connect(80)
    data = bytes(range(256)) * 200
    client = Client(connection, data)
    link.run(lambda: client.done)
    assert bytes(client.received) == data
    assert link.right.counters["syn cookies taken"] == 1
    assert connection.stamps
    assert connection.scaled
    assert connection.sender.recovery.selective


def test_syn_cookie_data_with_its_ack_and_all_options_are_taken() -> None:
    endpoint = host()
    flooded(endpoint)
    syn = segment(SYN)
    syn.timestamp, syn.window_scale = (7, 0), 9
    endpoint.receive(THERE, HERE, syn, 0.0)
    (answer,) = replies(endpoint)
    assert answer.timestamp is not None
    ack = segment(ACK, seq=5001, ack=answer.seq + 1)
    ack.timestamp, ack.payload = (8, answer.timestamp[0]), memoryview(b"at once")
    endpoint.receive(THERE, HERE, ack, 0.0)
    connection = endpoint.connections[THERE, 4000, HERE, 80]
    assert connection.sender.scale == 9
    assert not connection.sender.recovery.selective
    (data,) = replies(endpoint)
    assert bytes(data.payload) == b"at once"


def test_cookie_is_good_for_two_periods() -> None:
    secrets = Secrets(bytes(32))
    key = (THERE, 4000, HERE, 80)
    cookie = secrets.cookie(key, 5000, 1460, 0.0)
    assert secrets.cookie_mss(key, 5000, cookie, COOKIE_PERIOD) == 1460
    assert secrets.cookie_mss(key, 5000, cookie, 2 * COOKIE_PERIOD) is None
    assert secrets.cookie_mss((OTHER, 4000, HERE, 80), 5000, cookie, 0.0) is None
    assert secrets.cookie_mss(key, 5001, cookie, 0.0) is None


@pytest.mark.parametrize(("offered", "kept"), [(1, 536), (1459, 1440), (1460, 1460), (65535, 8960)])
def test_cookie_rounds_the_mss_down(offered: int, kept: int) -> None:
    secrets = Secrets(bytes(32))
    key = (THERE, 4000, HERE, 80)
    assert secrets.cookie_mss(key, 1, secrets.cookie(key, 1, offered, 9.0), 9.0) == kept


@pytest.mark.parametrize("scale", [None, 0, 7, 14])
def test_cookie_timestamp_keeps_what_the_syn_offered(scale: int | None) -> None:
    for permitted in (True, False):
        stamp = stamp_with(1_000_000, scale, permitted)
        assert 0 <= 1_000_000 - stamp <= 64
        assert offered_in(stamp) == (scale, permitted)


def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "MAX_CONNECTIONS", 10)
    endpoint = host()
    endpoint.listen(80, lambda _: None)
    for source in range(12):
        endpoint.receive(THERE, HERE, segment(SYN, source=source), 0.0)
    assert len(replies(endpoint)) == 10
    assert endpoint.counters["too many connections"] == 2


def test_connections_one_after_another_leave_nothing_behind() -> None:
    link = Link()
    link.right.listen(7, echo)
    for number in range(50):
        client = Client(link.connect(7), b"number %d" % number)
        link.run(lambda: client.done)  # noqa: B023
    link.run(lambda: not link.left.connections, TIME_WAIT + 10)
    for endpoint in (link.left, link.right):
        assert endpoint.connections == {}
        assert endpoint.deadline() is None
        assert not endpoint._waiting
        assert not endpoint._opening


# -- TIME-WAIT and numbers -----------------------------------------------------


def in_time_wait() -> tuple[Endpoint, Connection]:
    """A server that closed first; the peer's next number is 5002."""
    endpoint, taken = host(), list[Connection]()
    endpoint.listen(80, taken.append)
    ack = opened(endpoint)
    (connection,) = taken
    connection.close()
    endpoint.touch(connection)
    endpoint.to_send(0.0)
    endpoint.receive(THERE, HERE, segment(FIN | ACK, seq=5001, ack=ack.ack + 1), 0.0)
    endpoint.to_send(0.0)
    assert connection.state is State.TIME_WAIT
    return endpoint, connection


@pytest.mark.parametrize("sent", [0, 1 << 20])
def test_time_wait_a_later_syn_opens_a_new_connection_beyond_the_old_numbers(sent: int) -> None:
    """Also where more was sent than the clock of initial numbers has ticked since."""
    endpoint, old = in_time_wait()
    old.sender.nxt += sent
    endpoint.receive(THERE, HERE, segment(SYN, seq=6000), 1.0)
    (answer,) = replies(endpoint, 1.0)
    assert (answer.flags, answer.ack) == (SYN | ACK, 6001)
    assert 0 < (answer.seq - old.sender.nxt) & 0xFFFFFFFF < 1 << 31


def test_time_wait_an_old_syn_is_only_acknowledged() -> None:
    endpoint, old = in_time_wait()
    endpoint.receive(THERE, HERE, segment(SYN, seq=4000), 1.0)
    (answer,) = replies(endpoint, 1.0)
    assert answer.flags == ACK
    assert old.state is State.TIME_WAIT


def test_time_wait_is_bounded_and_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "MAX_TIME_WAIT", 3)
    link = Link()
    link.right.listen(7, echo)
    for _ in range(5):
        client = Client(link.connect(7), b"x")
        link.run(lambda: client.done)  # noqa: B023
        link.step()
    assert len(link.left.connections) == 3
    assert link.left.counters == {"time-wait cut short": 2}


def test_initial_numbers_follow_a_clock_and_a_secret() -> None:
    key = (THERE, 4000, HERE, 80)
    one, other = Secrets(b"1" * 32), Secrets(b"2" * 32)
    first = one.initial_sequence_number(key, 100.0)
    assert (one.initial_sequence_number(key, 101.0) - first) & 0xFFFFFFFF == 250_000
    assert one.initial_sequence_number((THERE, 4001, HERE, 80), 100.0) != first
    assert other.initial_sequence_number(key, 100.0) != first


def test_ephemeral_ports_differ_and_run_out_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = host()
    ports = {endpoint.connect(HERE, THERE, 80, 0.0).local_port for _ in range(100)}
    assert len(ports) == 100
    assert min(ports) >= 49152
    monkeypatch.setattr(endpoint_module, "FIRST_EPHEMERAL", 65535)
    endpoint.connect(HERE, OTHER, 80, 0.0)
    with pytest.raises(OSError, match="no ephemeral port is free"):
        endpoint.connect(HERE, OTHER, 80, 0.0)


@pytest.mark.parametrize("remote", [GROUP, BROADCAST, b"\xff\x02" + bytes(13) + b"\x01"])
def test_connect_to_a_group_is_refused(remote: bytes) -> None:
    with pytest.raises(ValueError, match="one peer"):
        host().connect(HERE, remote, 80, 0.0)


# -- ICMP ----------------------------------------------------------------------


def test_icmp_is_believed_only_for_what_is_in_flight() -> None:
    endpoint = host()
    connection = endpoint.connect(HERE, THERE, 80, 0.0, local_port=5555)
    (syn,) = replies(endpoint)
    key = (THERE, 80, HERE, 5555)
    endpoint.unreachable(key, syn.seq + 1, "port unreachable", hard=True)
    assert connection.state is State.SYN_SENT
    endpoint.unreachable(key, syn.seq, "host unreachable", hard=False)
    assert (connection.state, connection.soft_error) == (State.SYN_SENT, "host unreachable")
    told: list[State] = []
    connection.application = lambda one: told.append(one.state)
    endpoint.unreachable(key, syn.seq, "port unreachable", hard=True)
    assert connection.error == "port unreachable"
    endpoint.to_send(0.0)
    assert told == [State.CLOSED]


def test_path_mtu_of_a_peer_reaches_its_connections_only() -> None:
    endpoint = host()
    one, other = (endpoint.connect(HERE, remote, 80, 0.0) for remote in (THERE, OTHER))
    endpoint.set_path_mss(THERE, 1000)
    assert (one.send_mss, other.send_mss) == (988, 1460)


def test_suspect_path_is_told_after_three_time_outs() -> None:
    endpoint, suspects = host(), list[bytes]()
    endpoint.on_suspect = suspects.append
    endpoint.connect(HERE, THERE, 80, 0.0)
    endpoint.to_send(0.0)
    for _ in range(3):
        assert suspects == []
        now = endpoint.deadline()
        assert now is not None
        endpoint.on_deadline(now)
        endpoint.to_send(now)
    assert suspects == [THERE]


def test_application_is_told_of_the_end_and_is_not_called_again() -> None:
    link = Link()
    states: list[State] = []

    def on_open(connection: Connection) -> None:
        connection.application = lambda one: states.append(one.state)

    link.right.listen(7, on_open)
    connection = link.connect(7)
    link.run(lambda: bool(states))
    connection.abort()
    link.left.touch(connection)
    link.run(lambda: State.CLOSED in states)
    assert states.count(State.CLOSED) == 1
    assert link.right.connections == {}


def test_transitions_are_told_for_a_trace() -> None:
    link = Link()
    seen: list[tuple[bytes, str]] = []
    for endpoint in (link.left, link.right):
        endpoint.on_transition = lambda one, _, new: seen.append((one.local, new.value))
    link.right.listen(7, echo)
    client = Client(link.connect(7), b"x")
    link.run(lambda: client.done and not link.right.connections)
    assert [state for local, state in seen if local == RIGHT] == [
        "LISTEN", "SYN-RECEIVED", "ESTABLISHED", "CLOSE-WAIT", "LAST-ACK", "CLOSED",
    ]  # fmt: skip
    assert [state for local, state in seen if local == LEFT][:3] == [
        "SYN-SENT", "ESTABLISHED", "FIN-WAIT-1",
    ]  # fmt: skip


def test_urgent_pointer_calls_the_application_before_the_data_are_there() -> None:
    endpoint, urgent = host(), list[int]()

    def on_open(connection: Connection) -> None:
        connection.application = lambda one: urgent.append(one.urgent)

    endpoint.listen(80, on_open)
    ack = opened(endpoint)
    ack.flags, ack.urgent = ACK | URG, 500
    endpoint.receive(THERE, HERE, ack, 1.0)
    endpoint.to_send(1.0)
    assert urgent[-1] == 500
