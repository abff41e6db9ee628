"""What takes the express road, what must not, and which acknowledgments are held."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from echo_appliance.netstack.wire import tcp
from echo_appliance.netstack.wire.tcp import ACK, FIN, PSH, RST, SYN, URG
from tests.unit.netstack.framed import THEIRS_FIRST, Peer
from tests.unit.netstack.hosts import OURS


def set_octet(at: int, value: int) -> Callable[[Peer, bytearray], bytearray]:
    """Return a change of one octet, after which the sums are right."""

    def change(peer: Peer, frame: bytearray) -> bytearray:
        assert frame[at] != value
        frame[at] = value
        return peer.repaired(frame)

    return change


def spoil(at: int) -> Callable[[Peer, bytearray], bytearray]:
    """Return a change of one octet, after which a sum is wrong."""

    def change(_peer: Peer, frame: bytearray) -> bytearray:
        frame[at] ^= 1
        return frame

    return change


def cut_off(_peer: Peer, frame: bytearray) -> bytearray:
    return frame[:-1]


def too_short(peer: Peer, frame: bytearray) -> bytearray:
    return frame[: peer.start + 31]


def data_of(peer: Peer, pieces: list[bytes], last: int = ACK) -> list[bytearray]:
    """Return frames of data, one after the other, the last with these flags."""
    frames, seq = [], THEIRS_FIRST
    for number, piece in enumerate(pieces):
        flags = last if number == len(pieces) - 1 else ACK
        frames.append(peer.frame(peer.segment(piece, flags, seq=seq)))
        seq += len(piece)
    return frames


def sending(octets: int = 4344, version: int = 4) -> Peer:
    """Return a peer that was sent so much."""
    peer = Peer(version)
    peer.connection.write(bytes(octets))
    peer.receive(peer.frame(peer.segment(b"go")))
    peer.taken.clear()
    return peer


def acknowledge(
    peer: Peer, octets: int, seq: int = THEIRS_FIRST + 2, flags: int = ACK, **fields: int
) -> bytearray:
    return peer.frame(peer.segment(b"", flags, seq=seq, ack=peer.next + octets, **fields))


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("flags", [ACK, ACK | PSH])
def test_usual_data_take_the_express_road(version: int, flags: int) -> None:
    peer = Peer(version)
    assert peer.takes(peer.frame(peer.segment(b"data", flags)))
    assert peer.connection.read(100) == b"data"


def test_padding_of_short_frames_is_no_data() -> None:
    peer = Peer()
    assert peer.takes(peer.frame(peer.segment(b"x")) + bytes(30))
    assert peer.connection.read(100) == b"x"


def test_device_that_has_seen_the_sum_is_believed() -> None:
    peer = Peer()
    frame = spoil(50)(peer, peer.frame(peer.segment(b"data")))
    assert not peer.takes(frame)
    assert peer.host.interface._express.take(memoryview(frame), 1.0, True)


# Where: Ethernet 0-13; IPv4 14-33, TCP from 34; IPv6 14-53, TCP from 54.
@pytest.mark.parametrize(
    ("version", "change"),
    [
        pytest.param(4, set_octet(5, 9), id="another station's"),
        pytest.param(4, set_octet(0, 0xFF), id="a group's"),
        pytest.param(4, set_octet(13, 6), id="ARP"),
        pytest.param(4, set_octet(14, 0x46), id="IP options"),
        pytest.param(4, set_octet(14, 0x55), id="version 5"),
        pytest.param(4, set_octet(17, 200), id="longer than its frame"),
        pytest.param(4, set_octet(17, 51), id="shorter than its headers"),
        pytest.param(4, set_octet(20, 0x60), id="a fragment, more follow"),
        pytest.param(4, set_octet(21, 1), id="a fragment, not the first"),
        pytest.param(4, set_octet(23, 17), id="UDP"),
        pytest.param(4, spoil(22), id="wrong IP sum"),
        pytest.param(4, spoil(60), id="wrong TCP sum"),
        pytest.param(4, spoil(67), id="wrong data"),
        pytest.param(4, set_octet(29, 77), id="no such peer"),
        pytest.param(4, set_octet(37, 8), id="no such port"),
        pytest.param(4, set_octet(46, 0x50), id="no options"),
        pytest.param(4, set_octet(46, 0x90), id="more options"),
        pytest.param(4, set_octet(56, 5), id="another option"),
        pytest.param(4, set_octet(47, FIN | ACK), id="FIN"),
        pytest.param(4, set_octet(47, SYN | ACK), id="SYN"),
        pytest.param(4, set_octet(47, RST | ACK), id="RST"),
        pytest.param(4, set_octet(47, URG | ACK), id="URG"),
        pytest.param(4, set_octet(47, 0), id="no ACK"),
        pytest.param(4, cut_off, id="cut off"),
        pytest.param(4, too_short, id="cut short"),
        pytest.param(6, set_octet(5, 9), id="another station's, IPv6"),
        pytest.param(6, set_octet(13, 0xDE), id="another ethertype"),
        pytest.param(6, set_octet(14, 0x50), id="version 5, IPv6"),
        pytest.param(6, set_octet(19, 200), id="longer than its frame, IPv6"),
        pytest.param(6, set_octet(19, 31), id="shorter than its headers, IPv6"),
        pytest.param(6, set_octet(20, 0), id="hop-by-hop options"),
        pytest.param(6, set_octet(20, 44), id="a fragment, IPv6"),
        pytest.param(6, spoil(80), id="wrong TCP sum, IPv6"),
        pytest.param(6, set_octet(66, 0x50), id="no options, IPv6"),
        pytest.param(6, set_octet(76, 5), id="another option, IPv6"),
        pytest.param(6, cut_off, id="cut off, IPv6"),
        pytest.param(6, too_short, id="cut short, IPv6"),
    ],
)
def test_unusual_frame_is_left_to_the_long_road(
    version: int, change: Callable[[Peer, bytearray], bytearray]
) -> None:
    peer = Peer(version)
    frame = change(peer, peer.frame(peer.segment(b"data")))
    assert not peer.takes(frame)
    assert not peer.connection.readable
    assert not peer.taken
    peer.receive(frame)  # which comes to an end, whatever it makes of it


@pytest.mark.parametrize("length", [0, 51, 57, 2000])
@pytest.mark.parametrize("version", [4, 6])
def test_length_that_lies_is_not_believed_of_a_device_either(version: int, length: int) -> None:
    peer = Peer(version)
    frame = peer.frame(peer.segment(b"data"))
    at = 16 if version == 4 else 18
    frame[at : at + 2] = (length if version == 4 else max(length - 20, 0)).to_bytes(2, "big")
    peer.repaired(frame)
    assert not peer.host.interface._express.take(memoryview(frame), 1.0, True)
    assert not peer.connection.readable


@pytest.mark.parametrize("source", [b"\x7f\0\0\1", OURS, b"\xff" * 4], ids=["loop", "ours", "all"])
def test_acknowledgment_from_where_nobody_is_goes_the_long_road(source: bytes) -> None:
    peer = Peer()
    frame = peer.frame(peer.segment())
    frame[26:30] = source
    peer.receive(peer.repaired(frame))
    assert not peer.taken
    assert sum(peer.host.drops.values()) == 1


# -- data --------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 6])
def test_segments_that_go_on_reach_tcp_as_one(version: int) -> None:
    peer = Peer(version)
    pieces = [bytes((number,)) * 1400 for number in range(5)]
    peer.receive(*data_of(peer, pieces))
    assert len(peer.taken) == 1
    assert peer.connection.read(10_000) == b"".join(pieces)


@pytest.mark.parametrize(
    "odd",
    [{"ack": 1}, {"window": 40000}, {"stamp": 102}, {"seq": 1}, {"seq": -1}],
    ids=["ack", "window", "timestamp", "gap", "overlap"],
)
def test_segment_that_says_something_else_is_not_joined(odd: dict[str, int]) -> None:
    peer = sending()
    first = peer.segment(b"a" * 100, seq=THEIRS_FIRST + 2)
    second = peer.segment(b"b" * 100, seq=THEIRS_FIRST + 102)
    second.seq += odd.get("seq", 0)
    second.ack += odd.get("ack", 0)
    second.window = odd.get("window", second.window)
    second.timestamp = (odd.get("stamp", 101), 0)
    peer.receive(peer.frame(first), peer.frame(second))
    assert [seq for seq, _, _ in peer.taken] == [first.seq, second.seq]


def test_every_second_segment_of_a_small_mss_is_acknowledged_at_once() -> None:
    peer = Peer()
    frames = data_of(peer, [bytes(700)] * 6)
    peer.receive(*frames[:4])
    assert len(peer.host.sent()) == 1
    peer.receive(*frames[4:])
    assert len(peer.host.sent()) == 1, "what was joined is no measure of its segments"


def test_every_second_segment_is_acknowledged_at_once_after_we_have_closed_too() -> None:
    peer = Peer()
    peer.connection.close()
    frames = data_of(peer, [bytes(700)] * 6)
    peer.receive()
    peer.host.sent()
    for first in (0, 2, 4):
        peer.receive(*frames[first : first + 2])
        assert len(peer.host.sent()) == 1


def test_octets_that_are_held_are_not_the_devices() -> None:
    peer = Peer()
    frames = data_of(peer, [b"one", b"two"])
    for frame in frames:
        peer.host.interface.receive(memoryview(frame), 1.0)
        frame[:] = bytes(len(frame))  # the next one is read into the same buffer
    peer.host.interface.flush(1.0)
    assert peer.connection.read(100) == b"onetwo"


def test_large_segments_are_not_held_and_come_in_their_turn() -> None:
    peer = Peer()
    peer.receive(*data_of(peer, [b"a" * 100, b"b" * 8000, b"c" * 8000, b"d"]))
    assert len(peer.taken) == 4
    assert peer.connection.read(20_000) == b"a" * 100 + b"b" * 8000 + b"c" * 8000 + b"d"


def test_push_ends_nothing() -> None:
    peer = Peer()
    frames = [*data_of(peer, [b"one"], ACK | PSH), *data_of(peer, [b"one", b"two"], ACK | PSH)[1:]]
    peer.receive(*frames)
    assert len(peer.taken) == 1
    assert peer.connection.read(100) == b"onetwo"


def test_data_are_seen_before_the_end_behind_them() -> None:
    peer = Peer()
    data, end = data_of(peer, [b"data", b""], FIN | ACK)
    peer.receive(data, end)
    assert peer.connection.read(100) == b"data"
    assert peer.connection.at_eof


@pytest.mark.parametrize("size", [536, 1000, 1448])
def test_every_second_full_segment_is_answered_at_once_joined_or_not(size: int) -> None:
    """A sender whose window is two segments would wait for the delayed answer, each time."""
    peer = Peer()
    for turn in range(3):
        seq = THEIRS_FIRST + 2 * size * turn
        first = peer.segment(bytes(size), seq=seq)
        second = peer.segment(bytes(size), seq=seq + size)
        peer.host.sent()
        peer.receive(peer.frame(first), peer.frame(second))
        assert len(peer.taken) == turn + 1, "they were joined"
        [answer] = peer.host.sent()
        assert tcp.parse(memoryview(answer)[34:]).ack == seq + 2 * size


def test_every_second_full_segment_is_answered_at_once_if_the_device_has_joined_them() -> None:
    peer = Peer()
    for turn in range(3):
        peer.host.sent()
        peer.receive(peer.frame(peer.segment(bytes(2896), seq=THEIRS_FIRST + 2896 * turn)))
        assert len(peer.host.sent()) == 1


def test_larger_segment_is_not_joined_to_smaller_ones() -> None:
    """They are two full ones of their size, but less than two of its."""
    peer = Peer()
    peer.host.sent()
    peer.receive(*data_of(peer, [bytes(536), bytes(536), bytes(1448)]))
    assert [seq - THEIRS_FIRST for seq, _, _ in peer.taken] == [0, 1072]
    assert len(peer.host.sent()) == 1


def test_joined_data_that_are_not_the_next_are_judged_one_by_one() -> None:
    """What is beyond a gap, or came before, is answered as if nothing had been joined."""
    peer = Peer()
    first, second, third = data_of(peer, [b"a" * 100, b"b" * 100, b"c" * 100])
    peer.receive(second, third)
    assert [seq - THEIRS_FIRST for seq, _, _ in peer.taken] == [100, 200]
    peer.receive(first, second)
    assert peer.connection.read(1000) == b"a" * 100 + b"b" * 100 + b"c" * 100


def test_joined_data_beyond_the_window_are_cut_there() -> None:
    peer = Peer()
    peer.connection.receiver.edge = peer.connection.receiver.nxt + 1500
    peer.receive(*data_of(peer, [b"a" * 1000, b"b" * 1000]))
    assert peer.connection.read(10_000) == b"a" * 1000 + b"b" * 500


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(set_octet(41, 0), id="not the next"),
        pytest.param(set_octet(42, 0x77), id="acknowledges what was not sent"),
        pytest.param(set_octet(61, 99), id="an old timestamp"),
    ],
)
def test_segment_that_is_held_is_judged_like_any(
    change: Callable[[Peer, bytearray], bytearray],
) -> None:
    peer = Peer()
    frame = change(peer, peer.frame(peer.segment(b"data")))
    assert peer.takes(frame)
    assert len(peer.taken) == 1
    assert not peer.connection.readable


# -- acknowledgments ---------------------------------------------------------


@pytest.mark.parametrize("version", [4, 6])
def test_acknowledgment_that_a_later_one_covers_is_not_looked_at(version: int) -> None:
    peer = sending(version=version)
    peer.receive(*(acknowledge(peer, octets) for octets in (1000, 2000, 4344)))
    assert [ack - peer.next for _, ack, _ in peer.taken] == [4344]
    assert peer.connection.unacknowledged == 0


def test_duplicate_acknowledgments_all_count() -> None:
    peer = sending()
    peer.receive(*(acknowledge(peer, 1000) for _ in range(4)))
    assert [ack - peer.next for _, ack, _ in peer.taken] == [1000] * 4


def test_acknowledgment_that_only_moves_the_window_counts() -> None:
    peer = sending()
    peer.receive(acknowledge(peer, 1000), acknowledge(peer, 1000, window=0))
    assert [window for _, _, window in peer.taken] == [50000, 0]
    assert peer.connection.sender.window == 0


@pytest.mark.parametrize(
    "later", [{"seq": THEIRS_FIRST + 1}, {"stamp": 99}], ids=["older number", "older timestamp"]
)
def test_acknowledgment_of_before_does_not_replace_one(later: dict[str, int]) -> None:
    peer = sending()
    peer.receive(acknowledge(peer, 1000), acknowledge(peer, 2000, **later))
    assert [ack - peer.next for _, ack, _ in peer.taken] == [1000, 2000]


def test_acknowledgment_that_takes_a_place_brings_its_window() -> None:
    peer = sending()
    peer.receive(acknowledge(peer, 1000), acknowledge(peer, 2000, window=30000, stamp=105))
    assert peer.taken == [(THEIRS_FIRST + 2, peer.next + 2000, 30000)]
    assert peer.connection.receiver.stamp == 105


def test_duplicate_acknowledgment_counts_beside_the_data_that_say_the_same() -> None:
    peer = sending()
    data = peer.frame(peer.segment(b"x", seq=THEIRS_FIRST + 2, ack=peer.next + 1000))
    peer.receive(acknowledge(peer, 1000), data)
    assert len(peer.taken) == 2


def test_acknowledgment_from_before_the_data_that_are_held_stays_apart() -> None:
    peer = sending()
    data = peer.frame(peer.segment(b"x", seq=THEIRS_FIRST + 2, ack=peer.next + 1000))
    peer.receive(data, acknowledge(peer, 2000))
    assert [ack - peer.next for _, ack, _ in peer.taken] == [1000, 2000]


def test_acknowledgment_is_seen_before_the_data_behind_it() -> None:
    peer = sending()
    data = peer.frame(peer.segment(b"x", seq=THEIRS_FIRST + 2, ack=peer.next + 2000))
    peer.receive(acknowledge(peer, 1000), data)
    assert [ack - peer.next for _, ack, _ in peer.taken] == [1000, 2000]


def test_acknowledgment_is_seen_before_the_reset_behind_it() -> None:
    peer = sending()
    reset = acknowledge(peer, 1000, flags=RST | ACK)
    peer.receive(acknowledge(peer, 1000), reset)
    assert peer.connection.unacknowledged == 3344
    assert peer.connection.error == "reset"


def test_acknowledgment_of_nothing_we_know_is_answered_by_a_reset() -> None:
    peer = sending()
    peer.host.sent()
    peer.receive(set_octet(37, 8)(peer, acknowledge(peer, 1000)))
    [answer] = peer.host.sent()
    assert tcp.parse(memoryview(answer)[34:]).flags & RST


def test_acknowledgment_held_for_a_connection_that_ends_is_answered() -> None:
    peer = sending()
    peer.host.sent()
    frame = acknowledge(peer, 1000)
    assert peer.host.interface._express.take(memoryview(frame), 1.0, False)
    assert not peer.taken, "it is held"
    peer.connection.abort()
    peer.host.interface.flush(1.0)
    [answer] = peer.host.sent()
    assert tcp.parse(memoryview(answer)[34:]).flags & RST
    assert not peer.host.interface.streams.endpoint.connections
