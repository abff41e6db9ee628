"""Whatever segments hold, and in whatever order they come, TCP's rooms keep their promises."""

import random
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from echo_appliance.errors import ParseError
from echo_appliance.netstack.seq import MASK, is_before, unwrap
from echo_appliance.netstack.tcp.octets import Stream
from echo_appliance.netstack.tcp.reassembly import Reassembly
from echo_appliance.netstack.tcp.settings import MAX_ISLANDS, Settings
from echo_appliance.netstack.tcp.states import State
from echo_appliance.netstack.wire.tcp import ACK, FIN, PSH, RST, SYN, URG, Segment, parse, serialize
from tests.unit.netstack.peer import Peer, connecting, established, listening

numbers = st.integers(0, MASK)
words = st.integers(0, 0xFFFF)
blocks = st.lists(st.tuples(numbers, numbers), max_size=3)

segments = st.builds(
    Segment,
    words, words, numbers, numbers, st.integers(0, 255), words, st.binary(max_size=50),
    st.none() | st.tuples(numbers, numbers),
    sack_blocks=blocks, urgent=words,
)  # fmt: skip
syns = st.builds(
    Segment,
    words, words, numbers, numbers, st.just(SYN) | st.just(SYN | ACK), words, st.binary(max_size=9),
    st.none() | st.tuples(numbers, numbers),
    mss=st.none() | words, window_scale=st.none() | st.integers(0, 255),
    sack_permitted=st.booleans(),
)  # fmt: skip


# -- the wire ------------------------------------------------------------------


@given(segments | syns)
def test_segment_round_trip(segment: Segment) -> None:
    octets = bytes(serialize(segment) + segment.payload)
    assert parse(memoryview(octets)) == segment


@given(st.binary(max_size=100))
def test_segment_any_octets_parse_or_raise_parse_error(octets: bytes) -> None:
    try:
        segment = parse(memoryview(octets))
    except ParseError:
        return
    assert str(segment)


@given(st.binary(min_size=40, max_size=40), st.integers(5, 15))
def test_segment_any_options_parse_or_raise_parse_error(options: bytes, words_: int) -> None:
    header = bytes(12) + bytes((words_ << 4, SYN)) + bytes(6)
    try:
        parse(memoryview(header + options))
    except ParseError:
        pass


# -- numbers -------------------------------------------------------------------


@given(st.integers(0, 1 << 40), st.integers(-(1 << 31), (1 << 31) - 1))
def test_unwrap_finds_what_is_less_than_half_a_circle_away(near: int, distance: int) -> None:
    assert unwrap((near + distance) & MASK, near) == near + distance


@given(numbers, st.integers(1, (1 << 31) - 1))
def test_is_before_is_modular(first: int, distance: int) -> None:
    assert is_before(first, (first + distance) & MASK)
    assert not is_before((first + distance) & MASK, first)
    assert not is_before(first, first)


# -- streams -------------------------------------------------------------------


@given(st.lists(st.binary(max_size=3000), max_size=20), st.data())
def test_stream_is_one_long_string(pieces: list[bytes], data: st.DataObject) -> None:
    stream, model, start = Stream(100), b"", 100
    for piece in pieces:
        stream.append(piece)
        model += piece
        cut = data.draw(st.integers(0, len(model)))
        if cut % 3 == 0:
            stream.discard_before(start + cut)
            model, start = model[cut:], start + cut
        assert (stream.start, stream.end, len(stream)) == (start, start + len(model), len(model))
        assert b"".join(bytes(one) for one in stream.pieces()) == model
        if model:
            low = data.draw(st.integers(0, len(model) - 1))
            high = data.draw(st.integers(low + 1, len(model)))
            assert bytes(stream.between(start + low, start + high)) == model[low:high]


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 60)), max_size=60), st.randoms())
def test_reassembly_is_a_map_where_the_first_octet_stays(
    pieces: list[tuple[int, int]], chance: random.Random
) -> None:
    islands, model = Reassembly(), dict[int, int]()
    for start, length in pieces:
        payload = chance.randbytes(length)
        islands.insert(start, payload)
        for at, octet in enumerate(payload, start):
            model.setdefault(at, octet)
    edges = sorted(at for at in model if at - 1 not in model)
    reported = sorted(islands.blocks(MAX_ISLANDS))
    assert [start for start, _ in reported] == edges
    assert all(at in model for start, end in reported for at in range(start, end))
    for start, end in reported:
        joined = b"".join(bytes(piece) for piece in islands.take(start))
        assert joined == bytes(model[at] for at in range(start, end))
    assert len(islands) == 0


# -- a connection, and someone who says anything -----------------------------------


def near(base: int) -> st.SearchStrategy[int]:
    """A number that is probably close to one that matters."""
    close = st.integers(-70_000, 70_000) | st.integers(-3, 3)
    return close.map(lambda distance: (base + distance) & MASK) | numbers


CONTROL = [0, ACK, ACK | PSH, FIN | ACK, SYN, SYN | ACK, RST, RST | ACK, URG | ACK, 255]

hostile = st.lists(
    st.tuples(
        st.sampled_from(CONTROL), near(5001), near(1001), st.binary(max_size=40), words,
        st.lists(st.tuples(near(1001), near(1001)), max_size=3),
        st.none() | st.tuples(near(100_000), near(100_000)), words,
    ),
    max_size=25,
)  # fmt: skip
opened = st.sampled_from([established, listening, connecting])
options = st.fixed_dictionaries(
    {},
    optional={
        "sack_permitted": st.just(True),
        "timestamp": st.just((100_000, 0)),
        "window_scale": st.integers(0, 14),
    },
)


@settings(max_examples=400)
@given(opened, options, hostile, st.integers(0, 50_000), st.booleans())
def test_connection_hostile_segments_break_no_promise(
    begin: Callable[..., Peer],
    offered: dict[str, object],
    script: list[tuple[Any, ...]],
    size: int,
    ends: bool,
) -> None:
    limits = Settings(receive_limit=5000, send_limit=20_000)
    peer = begin(limits) if begin is connecting else begin(limits, **offered)
    connection = peer.connection
    connection.write(bytes(size))
    if ends and begin is not connecting:
        connection.close()
    for flags, seq, ack, payload, window, sack, stamp, urgent in script:
        peer.sends(
            flags, seq=seq, ack=ack, payload=payload, window=window, sack=sack, stamp=stamp,
            urgent=urgent,
        )  # fmt: skip
        check(peer)
        peer.wait(0.1)
        connection.read(100)
    peer.wait(600)
    assert connection.deadline() is None or connection.state is not State.CLOSED


def check(peer: Peer) -> None:
    connection, sender, receiver = peer.connection, peer.connection.sender, peer.connection.receiver
    flight = sender.flight
    assert sender.iss <= sender.una <= sender.nxt <= sender.end
    assert connection.readable <= 5000
    assert connection.unacknowledged <= 20_000
    assert flight.octets == sum(record.end - record.start for record in flight.records)
    assert flight.sacked == sum(r.end - r.start for r in flight.records if r.sacked)
    assert flight.lost == sum(r.end - r.start for r in flight.records if r.lost)
    assert flight.octets == sender.nxt - sender.una
    assert all(a.end == b.start for a, b in zip(flight.records, flight.records[1:], strict=False))
    assert receiver.nxt <= receiver.edge or connection.state is State.SYN_SENT
    if flight.records and connection.state is not State.CLOSED:
        assert connection.deadline() is not None, "what is in flight has a timer"
