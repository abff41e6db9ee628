"""The stream that goes out: windows, Nagle, probes, keepalive (RFC 9293 section 3.8)."""

import pytest

from echo_appliance.netstack.tcp.settings import (
    KEEPALIVE_INTERVAL,
    KEEPALIVE_PROBES,
    MAX_RTO,
    Settings,
)
from echo_appliance.netstack.tcp.states import State
from echo_appliance.netstack.wire.tcp import ACK, PSH

from .peer import FIRST, THEIRS, established, in_flight, numbers, wrote

# -- what may leave ------------------------------------------------------------


def test_write_is_cut_into_segments_and_the_last_is_pushed() -> None:
    sent = wrote(2500).leaves()
    assert numbers(sent) == [(FIRST, 1000), (FIRST + 1000, 1000), (FIRST + 2000, 500)]
    assert [segment.flags for segment in sent] == [ACK, ACK, ACK | PSH]


def test_write_of_bytes_is_sent_without_a_copy() -> None:
    peer = established()
    data = bytes(3000)
    peer.connection.write(data)
    for segment in peer.leaves():
        assert isinstance(segment.payload, memoryview)
        assert segment.payload.obj is data


def test_write_takes_no_more_than_the_limit() -> None:
    peer = established(Settings(send_limit=1500, nagle=False))
    assert peer.connection.write(bytes(2000)) == 1500
    assert peer.connection.writable == 0
    assert peer.connection.write(b"x") == 0
    peer.leaves()
    peer.sends()
    assert peer.connection.writable == 1500


def test_write_small_pieces_are_joined_in_memory_and_on_the_wire() -> None:
    peer = established()
    for _ in range(1000):
        peer.connection.write(b"x")
    (segment,) = peer.leaves()
    assert bytes(segment.payload) == b"x" * 1000


def test_super_segments_are_whole_multiples_of_the_mss() -> None:
    peer = wrote(9500, segment_limit=4500)
    assert numbers(peer.leaves()) == [(FIRST, 4000), (FIRST + 4000, 4000), (FIRST + 8000, 1500)]


def test_window_of_the_peer_bounds_what_is_sent() -> None:
    peer = established()
    peer.sends(window=2500)
    peer.connection.write(bytes(5000))
    assert numbers(peer.leaves()) == [(FIRST, 1000), (FIRST + 1000, 1000)]
    assert peer.leaves() == [], "500 octets of window are a crumb"


def test_window_of_the_peer_shrinks_and_nothing_breaks() -> None:
    peer = wrote(3000)
    peer.leaves()
    peer.sends(ack=FIRST + 1000, window=500)
    assert peer.connection.sender.una + peer.connection.sender.window < peer.connection.sender.nxt
    peer.connection.write(bytes(1000))
    assert peer.leaves() == []
    peer.sends(ack=FIRST + 3000, window=3000)
    assert peer.connection.unacknowledged == 1000


def test_window_tiny_for_ever_is_used_by_halves() -> None:
    peer = established()
    peer.connection.sender.max_window = 0
    peer.sends(window=100)
    peer.connection.sender.max_window = 100  # it never had more
    peer.connection.write(bytes(5000))
    assert numbers(peer.leaves()) == [(FIRST, 100)]


@pytest.mark.parametrize("limit", [0, 64000])
def test_window_smaller_than_two_segments_is_filled_by_halves(limit: int) -> None:
    peer = established(segment_limit=limit)
    peer.connection.sender.max_window = 0
    peer.sends(window=1400)
    peer.connection.write(bytes(8000))
    assert numbers(peer.leaves()) == [(FIRST, 700), (FIRST + 700, 700)]
    assert numbers(peer.sends(window=1800))[0] == (FIRST + 1400, 900)
    assert len(peer.sends(window=9000)[0].payload) >= 1000


def test_window_that_was_never_large_is_no_reason_for_crumbs() -> None:
    peer = established()
    peer.connection.sender.max_window = 0
    peer.sends(window=600)
    peer.connection.write(bytes(5000))
    assert numbers(peer.leaves()) == [(FIRST, 536)]


def test_window_update_that_is_older_than_the_last_is_ignored() -> None:
    peer = established()
    peer.sends(payload=b"x", window=3000)
    peer.sends(seq=THEIRS + 1, window=9000)
    assert peer.connection.sender.window == 3000


def test_congestion_window_begins_with_ten_segments_and_doubles() -> None:
    peer = wrote(100_000)
    assert len(peer.leaves()) == 10
    assert len(peer.sends()) == 20


# -- Nagle ---------------------------------------------------------------------


def test_nagle_holds_a_second_small_segment_back() -> None:
    peer = established(Settings())
    peer.connection.write(b"one")
    assert len(peer.leaves()) == 1
    peer.connection.write(b"two")
    peer.connection.write(b"three")
    assert peer.leaves() == []
    (both,) = peer.sends()
    assert bytes(both.payload) == b"twothree"


def test_nagle_holds_no_small_segment_back_behind_full_ones() -> None:
    peer = wrote(2500, Settings())
    assert numbers(peer.leaves())[-1] == (FIRST + 2000, 500)


def test_nagle_holds_nothing_back_once_closed() -> None:
    peer = established(Settings())
    peer.connection.write(b"one")
    peer.leaves()
    peer.connection.write(b"two")
    peer.connection.close()
    (last,) = peer.leaves()
    assert bytes(last.payload) == b"two"


def test_nagle_off_every_write_leaves_at_once() -> None:
    peer = established(Settings(nagle=False))
    for word in (b"one", b"two", b"three"):
        peer.connection.write(word)
        (segment,) = peer.leaves()
        assert bytes(segment.payload) == word


# -- the zero window -----------------------------------------------------------


def test_window_zero_is_probed_after_a_time_out_and_then_ever_more_rarely() -> None:
    peer = established()
    peer.sends(window=0)
    peer.connection.write(b"waiting")
    assert peer.leaves() == []
    gaps, before = [], peer.now
    for _ in range(4):
        (probe,) = peer.wait(peer.connection.deadline() - peer.now)  # type: ignore[operator]
        assert numbers([probe]) == [(FIRST, 1)]
        gaps.append(peer.now - before)
        before = peer.now
        peer.sends(ack=FIRST, window=0)
    assert gaps == pytest.approx([0.2, 0.4, 0.8, 1.6])


def test_window_zero_for_days_keeps_the_connection_while_probes_are_answered() -> None:
    peer = established()
    peer.sends(window=0)
    peer.connection.write(b"waiting")
    peer.leaves()
    for _ in range(2000):
        peer.wait(MAX_RTO)
        peer.sends(ack=FIRST, window=0)
    assert peer.state is State.ESTABLISHED
    peer.sends(ack=FIRST, window=1000)
    peer.wait(1)
    assert peer.connection.sender.nxt == FIRST + 7


def test_window_zero_and_no_answer_times_out() -> None:
    peer = established()
    peer.sends(window=0)
    peer.connection.write(b"waiting")
    peer.leaves()
    peer.wait(600)
    assert peer.connection.error == "timed out"


def test_window_zero_is_probed_and_acks_still_come_from_inside_it() -> None:
    peer = established()
    peer.sends(window=0)
    peer.connection.write(b"waiting")
    peer.leaves()
    peer.wait(0.2)
    assert peer.connection.sender.nxt == FIRST + 1
    peer.sends(ack=FIRST, window=0, payload=b"more")
    (ack,) = peer.wait(0.04)
    assert ack.seq == FIRST, "or the peer would drop it, and send its data again for ever"
    peer.connection.abort()
    (reset,) = peer.leaves()
    assert reset.seq == FIRST


def test_window_rounded_down_by_its_scale_excludes_nothing_that_was_sent() -> None:
    """It looks as if it had moved back (RFC 7323 section 2.4), but the peer has all of it.

    An ACK from before that would be thrown away, and a reset, too: the peer would stay for ever.
    """
    peer = established(window_scale=5)
    peer.sends(window=2048 >> 5)
    peer.connection.write(bytes(2048))
    peer.leaves()
    peer.sends(ack=FIRST + 1000, window=1048 >> 5, payload=b"x")  # it had room for 1,048
    (ack,) = peer.wait(0.05)
    assert ack.seq == FIRST + 2048
    peer.connection.abort()
    (reset,) = peer.leaves()
    assert reset.seq == FIRST + 2048


def test_window_taken_back_excludes_what_was_sent_into_it() -> None:
    """MUST-34: the peer has thrown it away, and takes nothing but from where it is."""
    peer = in_flight(5)
    peer.sends(ack=FIRST + 1000, window=0, payload=b"x")
    (ack,) = peer.wait(0.05)
    assert ack.seq == FIRST + 1000


@pytest.mark.parametrize("data", [b"", b"waiting"])
def test_window_zero_and_scaled_excludes_what_was_sent_into_it(data: bytes) -> None:
    peer = established(window_scale=5)
    peer.sends(window=0)
    peer.connection.write(data)
    if not data:
        peer.connection.close()
    peer.leaves()
    peer.wait(0.2)
    assert peer.connection.sender.nxt == FIRST + 1
    (ack,) = peer.sends(ack=FIRST, window=0, payload=b"more") or peer.wait(0.04)
    assert ack.seq == FIRST


def test_window_zero_its_probe_accepted_after_minutes_was_no_round_trip() -> None:
    """It was sent many times (Karn); as a sample it would make the next time-out a minute."""
    peer = in_flight(1)
    peer.sends(window=0)
    peer.connection.write(b"waiting")
    peer.leaves()
    probes = peer.wait(100)
    assert len(probes) > 5
    peer.sends(ack=probes[-1].seq + 1)
    round_trip = peer.connection.sender.round_trip
    assert round_trip.smoothed is not None
    assert round_trip.smoothed < 0.2
    assert round_trip.rto < 1


def test_window_zero_answers_to_probes_are_no_duplicates_that_tell_of_a_loss() -> None:
    peer = established()
    peer.sends(window=0)
    peer.connection.write(bytes(5000))
    peer.leaves()
    before = peer.connection.sender.congestion.window
    for _ in range(5):
        peer.wait(peer.connection.deadline() - peer.now)  # type: ignore[operator]
        assert peer.sends(ack=FIRST, window=0) == []
    assert peer.connection.sender.recovery.end is None
    assert peer.connection.sender.congestion.window == before


def test_window_opens_and_what_was_refused_is_sent_again_at_once() -> None:
    peer = established()
    peer.sends(window=0)
    peer.connection.write(b"waiting")
    peer.leaves()
    peer.wait(0.2)
    sent = peer.sends(ack=FIRST, window=1000)
    assert b"".join(bytes(segment.payload) for segment in sent) == b"waiting"


def test_window_too_small_for_a_segment_is_used_after_a_time_out() -> None:
    peer = established()
    peer.sends(window=300)
    peer.connection.write(bytes(5000))
    assert peer.leaves() == []
    assert numbers(peer.wait(0.25)) == [(FIRST, 300)]


# -- path MTU, ICMP, keepalive -------------------------------------------------


def test_path_mtu_shrinks_and_what_was_larger_is_sent_again_in_pieces() -> None:
    peer = in_flight(3)
    peer.connection.set_path_mss(600)
    sent = peer.leaves()
    assert numbers(sent)[:3] == [
        (FIRST + 1000, 600), (FIRST + 1600, 400), (FIRST + 2000, 600),
    ]  # fmt: skip
    assert peer.connection.send_mss == 600


def test_path_mtu_absurd_is_bounded() -> None:
    peer = established()
    peer.connection.set_path_mss(1)
    assert peer.connection.send_mss == 48
    peer.connection.set_path_mss(9000)
    assert peer.connection.send_mss == 48, "ICMP only makes it smaller"


def test_icmp_error_never_ends_an_established_connection() -> None:
    peer = established()
    for hard in (True, False):
        peer.connection.unreachable("port unreachable", hard=hard)
    assert peer.state is State.ESTABLISHED
    assert peer.connection.soft_error == "port unreachable"


def test_keepalive_is_off_by_default() -> None:
    peer = established()
    assert peer.wait(30 * 86400) == []
    assert peer.connection.deadline() is None


def test_keepalive_asks_after_the_interval_of_silence() -> None:
    peer = established(Settings(keepalive=True, keepalive_idle=10))
    peer.wait(5)
    peer.sends(payload=b"x")
    assert all(segment.seq == FIRST for segment in peer.wait(9.9)), "only the delayed ACK"
    (probe,) = peer.wait(0.2)
    assert (probe.seq, probe.flags, len(probe.payload)) == (FIRST - 1, ACK, 0)
    peer.sends()
    assert peer.wait(9.7) == []


def test_keepalive_has_the_timestamp_of_its_time() -> None:
    peer = established(Settings(keepalive=True, keepalive_idle=10), timestamp=(1, 0))
    (probe,) = peer.wait(10)
    assert probe.timestamp == (int(peer.now * 1000), 1)


def test_keepalive_lost_once_is_no_end_but_always_is() -> None:
    peer = established(Settings(keepalive=True, keepalive_idle=10))
    peer.wait(10 + KEEPALIVE_INTERVAL * (KEEPALIVE_PROBES - 1))
    assert peer.state is State.ESTABLISHED
    peer.wait(KEEPALIVE_INTERVAL)
    assert peer.connection.error == "timed out"


def test_keepalive_asks_nothing_while_data_are_under_way() -> None:
    peer = wrote(1000, Settings(keepalive=True, keepalive_idle=1))
    peer.leaves()
    assert all(segment.payload for segment in peer.wait(20))


def test_keepalive_interval_not_set_is_two_hours() -> None:
    peer = established(Settings(keepalive=True))
    assert peer.wait(7199) == []
    assert len(peer.wait(2)) == 1


def test_mss_option_is_in_syns_only() -> None:
    peer = wrote(2000, sack_permitted=True, timestamp=(1, 0), window_scale=3)
    for segment in [*peer.leaves(), *peer.sends(payload=b"x", seq=peer.seq + 9), *peer.wait(1)]:
        assert (segment.mss, segment.window_scale, segment.sack_permitted) == (None, None, False)
