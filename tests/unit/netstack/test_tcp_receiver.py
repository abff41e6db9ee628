"""The stream that comes in: windows, acknowledgments, order (RFC 9293 section 3.8, RFC 2018)."""

from echo_appliance.netstack.tcp.octets import JOIN_BELOW
from echo_appliance.netstack.tcp.receiver import window_shift
from echo_appliance.netstack.tcp.settings import MAX_ISLANDS, Settings
from echo_appliance.netstack.wire.tcp import ACK

from .peer import OURS, THEIRS, Peer, established

NEXT = THEIRS + 1


def sized(limit: int) -> Peer:
    return established(Settings(receive_limit=limit))


def selective() -> Peer:
    return established(sack_permitted=True)


# -- when to acknowledge -------------------------------------------------------


def test_ack_delayed_is_sent_within_the_delay() -> None:
    peer = established()
    assert peer.sends(payload=b"x") == []
    assert peer.connection.deadline() == peer.now + 0.04


def test_ack_for_every_second_full_segment_at_once() -> None:
    peer = established()
    assert peer.sends(payload=b"x" * 1000) == []
    (ack,) = peer.sends(payload=b"x" * 1000)
    assert ack.ack == NEXT + 2000
    assert peer.connection.deadline() is None


def test_ack_for_every_second_segment_of_a_peer_with_a_smaller_mtu() -> None:
    peer = established()
    assert [len(peer.sends(payload=b"x" * 700)) for _ in range(4)] == [0, 1, 0, 1]


def test_ack_for_every_second_segment_of_a_peer_with_the_smallest_mtu() -> None:
    peer = established(timestamp=(1, 0))
    assert [len(peer.sends(payload=b"x" * 524)) for _ in range(4)] == [0, 1, 0, 1]


def test_ack_for_what_a_device_has_joined_comes_at_once() -> None:
    peer = established()
    assert [len(peer.sends(payload=b"x" * 2 * 700)) for _ in range(2)] == [1, 1]


def test_ack_for_small_segments_waits() -> None:
    peer = established()
    assert [len(peer.sends(payload=b"x" * 64)) for _ in range(4)] == [0, 0, 0, 0]


def test_ack_for_a_batch_of_segments_is_one() -> None:
    peer = established()
    for at in range(10):
        segment = peer.segment(payload=b"x" * 1000, seq=NEXT + at * 1000)
        peer.connection.receive(segment, peer.now)
    (ack,) = peer.leaves()
    assert ack.ack == NEXT + 10_000


def test_ack_rides_on_data() -> None:
    peer = established()
    peer.connection.receive(peer.segment(payload=b"ping"), peer.now)
    peer.connection.write(b"pong")
    (data,) = peer.leaves()
    assert (bytes(data.payload), data.ack) == (b"pong", NEXT + 4)
    assert peer.wait(0.1) == []


def test_ack_delayed_for_as_long_as_the_application_chose() -> None:
    peer = established(Settings(delayed_ack=0.0))
    assert len(peer.sends(payload=b"x")) == 1


# -- order ---------------------------------------------------------------------


def test_data_out_of_order_are_kept_and_the_gap_is_told_at_once() -> None:
    peer = established()
    (ack,) = peer.sends(payload=b"world", seq=NEXT + 7)
    assert (ack.ack, ack.sack_blocks) == (NEXT, ())
    (ack,) = peer.sends(payload=b"hello, ")
    assert ack.ack == NEXT + 12
    assert peer.connection.read(99) == b"hello, world"


def test_data_out_of_order_do_not_corrupt_the_stream() -> None:
    # microps took a segment after a gap for the next one: the octets were right, their place
    # was not.
    peer = established()
    for piece in (2, 1, 3, 0):
        peer.sends(payload=bytes([65 + piece]) * 1000, seq=NEXT + piece * 1000)
    assert peer.connection.read(9999) == b"A" * 1000 + b"B" * 1000 + b"C" * 1000 + b"D" * 1000


def test_data_overlapping_disagree_and_the_first_is_believed() -> None:
    peer = established()
    peer.sends(payload=b"BBBB", seq=NEXT + 4)
    peer.sends(payload=b"XXXXXX", seq=NEXT + 3)
    peer.sends(payload=b"AAA")
    assert peer.connection.read(99) == b"AAAXBBBBX"


def test_sack_blocks_tell_the_last_island_first() -> None:
    peer = selective()
    peer.sends(payload=b"b" * 10, seq=NEXT + 10)
    peer.sends(payload=b"d" * 10, seq=NEXT + 30)
    (ack,) = peer.sends(payload=b"f" * 10, seq=NEXT + 50)
    assert ack.sack_blocks == [
        (NEXT + 50, NEXT + 60), (NEXT + 30, NEXT + 40), (NEXT + 10, NEXT + 20),
    ]  # fmt: skip
    (ack,) = peer.sends(payload=b"c" * 10, seq=NEXT + 20)
    assert ack.sack_blocks == [(NEXT + 10, NEXT + 40), (NEXT + 50, NEXT + 60)]
    (ack,) = peer.sends(payload=b"a" * 10, seq=NEXT)
    assert (ack.ack, ack.sack_blocks) == (NEXT + 40, [(NEXT + 50, NEXT + 60)])


def test_sack_blocks_wrap_around() -> None:
    peer = established(sack_permitted=True, theirs=0xFFFFFFF0)
    (ack,) = peer.sends(payload=b"x" * 20, seq=0xFFFFFFF5)
    assert ack.sack_blocks == [(0xFFFFFFF5, 9)]


def test_sack_goes_alone_since_data_fill_the_segment() -> None:
    peer = selective()
    peer.connection.write(b"d" * 1000)
    segment = peer.segment(payload=b"x", seq=NEXT + 9)
    peer.connection.receive(segment, peer.now)
    ack, data = peer.leaves()
    assert (len(ack.payload), len(ack.sack_blocks)) == (0, 1)
    assert (len(data.payload), len(data.sack_blocks)) == (1000, 0)


def test_islands_are_bounded_and_what_is_dropped_is_not_acknowledged() -> None:
    peer = selective()
    for at in range(MAX_ISLANDS + 10):
        peer.sends(payload=b"x", seq=NEXT + 2 + 2 * at)
    (ack,) = peer.sends(payload=b"y", seq=NEXT + 2 * MAX_ISLANDS + 2)
    assert ack.sack_blocks[0] == (NEXT + 2 * MAX_ISLANDS, NEXT + 2 * MAX_ISLANDS + 1)
    assert len(peer.connection.receiver.islands) == MAX_ISLANDS


# -- windows -------------------------------------------------------------------


def test_window_shrinks_with_what_waits_and_closes() -> None:
    peer = sized(5000)
    (ack,) = peer.sends(payload=b"x" * 3000)
    assert ack.window == 2000
    (ack,) = peer.sends(payload=b"x" * 2000)
    assert ack.window == 0


def test_window_edge_never_moves_back() -> None:
    peer = sized(5000)
    edges = []
    for _ in range(5):
        (ack,) = peer.sends(payload=b"x" * 2000) or peer.wait(0.1)
        edges.append(ack.ack + ack.window)
        peer.connection.read(700)
        edges += [segment.ack + segment.window for segment in peer.leaves()]
    assert edges == sorted(edges)


def test_window_opens_in_steps_worth_a_segment() -> None:
    peer = sized(5000)
    peer.sends(payload=b"x" * 5000)
    peer.connection.read(999)
    peer.connection.receiver.ack_now = True
    assert peer.leaves()[0].window == 0, "a crumb would be filled with a crumb, for ever"
    peer.connection.read(1)
    peer.connection.receiver.ack_now = True
    assert peer.leaves()[0].window == 1000


def test_window_update_is_sent_when_much_was_read() -> None:
    peer = sized(5000)
    peer.sends(payload=b"x" * 5000)
    peer.connection.read(1000)
    assert peer.leaves() == []
    peer.connection.read(1000)
    (update,) = peer.leaves()
    assert update.window == 2000


def test_window_zero_a_probe_is_answered_and_its_octet_not_taken() -> None:
    peer = sized(1000)
    peer.sends(payload=b"x" * 1000)
    (ack,) = peer.sends(payload=b"p", seq=NEXT + 1000)
    assert (ack.ack, ack.window) == (NEXT + 1000, 0)
    assert peer.connection.readable == 1000


def test_window_shift_is_the_least_that_fits() -> None:
    assert [window_shift(limit) for limit in (1, 65535, 65536, 1 << 20, 1 << 40)] == [
        0, 0, 1, 5, 14,
    ]  # fmt: skip


# -- memory --------------------------------------------------------------------


def test_small_segments_are_joined_in_memory() -> None:
    peer = established()
    for _ in range(4 * JOIN_BELOW):
        peer.sends(payload=b"x")
    assert len(peer.connection.peek()) <= 5


def test_payload_is_copied_so_that_its_buffer_can_be_used_again() -> None:
    peer = established()
    buffer = bytearray(b"precious")
    segment = peer.segment()
    segment.payload = memoryview(buffer)
    peer.connection.receive(segment, peer.now)
    buffer[:] = b"rubbish!"
    assert peer.connection.read(99) == b"precious"


def test_peek_and_consume_take_without_a_copy() -> None:
    peer = established()
    peer.sends(payload=b"a" * 3000)
    peer.sends(payload=b"b" * 3000)
    first, second = peer.connection.peek()
    assert bytes(first) + bytes(second) == b"a" * 3000 + b"b" * 3000
    peer.connection.consume(2999)
    first, second = peer.connection.peek()
    assert bytes(first) == b"a"
    assert first.obj is not None  # type: ignore[union-attr]
    assert peer.connection.read(2) == b"ab"


def test_keepalive_probe_of_the_peer_is_answered() -> None:
    peer = established()
    (ack,) = peer.sends(ACK, seq=NEXT - 1)
    assert (ack.seq, ack.ack) == (OURS + 1, NEXT)
