"""What is lost and what only looks so: time-outs and recovery (RFC 5681, 6298, 6675, 8985)."""

import pytest

from echo_appliance.netstack.tcp import sender as sender_module
from echo_appliance.netstack.tcp.settings import SUSPECT_AFTER, Settings
from echo_appliance.netstack.tcp.states import State
from echo_appliance.netstack.wire.tcp import Segment

from .peer import FIRST, MSS, Peer, established, in_flight, numbers, wrote


def block(start: int, end: int) -> tuple[int, int]:
    """A SACK block in octets of data."""
    return (FIRST + start, FIRST + end)


# -- time-outs -----------------------------------------------------------------


def test_time_out_sends_the_first_segment_again_and_doubles() -> None:
    peer = wrote(3000)
    peer.leaves()
    start, again = peer.now, []
    for _ in range(3):
        at = peer.connection.deadline()
        assert at is not None
        again += [(round(at - start, 3), *numbers(peer.wait(at - peer.now))[0])]
    assert again == [(0.2, FIRST, 1000), (0.6, FIRST, 1000), (1.4, FIRST, 1000)]
    assert peer.connection.sender.congestion.window == MSS


def test_time_out_follows_the_round_trip_and_its_variation() -> None:
    peer = in_flight(1)
    round_trip = peer.connection.sender.round_trip
    # One sample of 0 (the handshake took no time here), then one of 0.1.
    assert round_trip.smoothed == pytest.approx(0.0125)
    assert round_trip.rto == 0.2


def test_time_out_that_was_repeated_gives_no_sample() -> None:
    peer = wrote(1000)
    peer.leaves()
    before = peer.connection.sender.round_trip.smoothed
    peer.wait(0.25)
    peer.now += 5
    peer.sends()
    assert peer.connection.sender.round_trip.smoothed == before, "Karn: whose answer was it?"


def test_time_out_slow_start_begins_again() -> None:
    peer = in_flight(10)
    peer.wait(0.25)
    assert len(peer.sends(ack=FIRST + 2000)) == 2
    assert len(peer.sends(ack=FIRST + 4000)) == 4


def test_time_out_without_sack_sends_each_segment_again_once() -> None:
    """A partial ACK tells of the next loss in a fast recovery; here all counts as lost already."""
    peer = in_flight(10)
    sent = peer.wait(0.25)
    for acknowledged in range(2, 11):
        sent += peer.sends(ack=FIRST + acknowledged * MSS)
    assert [seq for seq, _ in numbers(sent)] == [FIRST + at * MSS for at in range(1, 11)]


def test_time_out_duplicates_that_it_caused_itself_tell_of_no_loss() -> None:
    """What the peer had already and is sent again is answered so (RFC 6582 section 3.2, step 2)."""
    peer = in_flight(10)
    peer.connection.write(bytes(20 * MSS))
    peer.wait(0.25)
    again = peer.sends(ack=FIRST + 6 * MSS)  # two of the ten were lost
    assert len(again) > 3
    assert peer.sends(ack=FIRST + 11 * MSS) != [], "what is new"
    window = peer.connection.sender.congestion.window
    for _ in again[1:]:
        assert repeated(peer.sends(ack=FIRST + 11 * MSS), peer) == []
    assert peer.connection.sender.recovery.end is None
    assert peer.connection.sender.congestion.window == window
    peer.sends(ack=FIRST + 12 * MSS)
    for _ in range(3):
        sent = peer.sends(ack=FIRST + 12 * MSS)
    assert repeated(sent, peer) == [(12 * MSS, MSS)], "these tell of one"


def test_time_outs_for_the_user_time_out_end_the_connection() -> None:
    peer = wrote(1000, Settings(user_timeout=100))
    peer.leaves()
    peer.wait(99)
    assert peer.state is State.ESTABLISHED
    assert peer.connection.is_suspect
    peer.wait(120)
    assert peer.connection.error == "timed out"


def test_path_is_suspect_after_three_time_outs() -> None:
    peer = wrote(1000)
    peer.leaves()
    for _ in range(SUSPECT_AFTER):
        assert not peer.connection.is_suspect
        peer.wait(peer.connection.deadline() - peer.now)  # type: ignore[operator]
    assert peer.connection.is_suspect
    peer.sends()
    assert not peer.connection.is_suspect


def test_time_out_was_spurious_and_nothing_more_is_repeated() -> None:
    peer = in_flight(10, timestamp=(1, 0), sack_permitted=True)
    window = peer.connection.sender.congestion.window
    sent_at = peer.connection.sender.flight.records[0].at
    peer.wait(0.4)
    assert peer.connection.sender.congestion.window < window
    # The answer to the first of the ten as it was sent at first, only late.
    echo = (2, int(sent_at * 1000))
    sent = peer.sends(ack=FIRST + 2 * MSS, stamp=echo)
    assert all(segment.seq >= FIRST + 11 * MSS - 120 for segment in sent)
    assert peer.connection.sender.congestion.window >= window


def test_time_out_was_right_and_the_window_stays_small() -> None:
    peer = in_flight(10, timestamp=(1, 0), sack_permitted=True)
    peer.wait(0.4)
    echo = (2, int(peer.now * 1000))  # of what was sent again
    peer.sends(ack=FIRST + 2 * MSS, stamp=echo)
    assert peer.connection.sender.recovery.end is not None
    assert peer.connection.sender.congestion.window < 4 * MSS


@pytest.mark.parametrize("repeated_at", [0.0, 0.0004, 0.0009])
@pytest.mark.parametrize("answered_at", [0.0, 0.0004, 0.0009])
def test_loss_whose_repetition_is_answered_is_not_undone(
    repeated_at: float, answered_at: float
) -> None:
    """Timestamps count milliseconds: the echo of one sent at 0.9 ms seems to be from 0.0."""
    peer = in_flight(10, timestamp=(1, 0), sack_permitted=True)
    size = peer.connection.sender.mss
    una = peer.connection.sender.una
    peer.now = 100.3 + repeated_at
    (again, *_) = peer.sends(ack=una, sack=[(una + size, una + 4 * size)])
    assert (again.seq, again.timestamp) == (una, (100300, 1))
    peer.now = 100.4 + answered_at
    peer.sends(ack=una + 4 * size, stamp=(2, 100300))
    assert peer.connection.sender.recovery.end is not None
    assert peer.connection.sender.congestion.window < 10 * size


def test_time_out_backed_off_is_taken_back_by_an_echo_of_what_was_repeated() -> None:
    peer = wrote(MSS, None, timestamp=(1, 0))
    peer.leaves()
    peer.wait(5)
    assert peer.connection.sender.round_trip.rto > 3
    again = peer.wait(5)[-1]
    assert again.timestamp is not None
    peer.now = again.timestamp[0] / 1000 + 0.1
    peer.sends(stamp=(2, again.timestamp[0]))
    assert peer.connection.sender.round_trip.rto < 0.4
    assert not peer.connection.sender.recovery.wants_echo


def test_time_out_after_long_silence_is_the_first() -> None:
    peer = established()
    peer.wait(5000)
    peer.connection.write(b"x")
    peer.leaves()
    peer.wait(1)
    assert peer.state is State.ESTABLISHED


def test_idle_the_congestion_window_is_taken_back() -> None:
    peer = wrote(100_000)
    while peer.connection.unacknowledged:
        peer.leaves()
        peer.sends()
    assert peer.connection.sender.congestion.window > 10 * MSS
    peer.now += 10
    peer.connection.write(bytes(50_000))
    assert len(peer.leaves()) == 10


# -- recovery ------------------------------------------------------------------


def repeated(segments: list[Segment], peer: Peer) -> list[tuple[int, int]]:
    """Of what was sent, that which was not new."""
    border = peer.connection.sender.recovery.end or 0
    return [(seq - FIRST, size) for seq, size in numbers(segments) if seq < border]


def test_duplicate_acks_three_send_the_first_segment_again() -> None:
    peer = in_flight(10)
    for _ in range(2):
        assert repeated(peer.sends(ack=FIRST + MSS), peer) == []
    assert repeated(peer.sends(ack=FIRST + MSS), peer) == [(MSS, MSS)]


def test_duplicate_acks_two_let_new_segments_out() -> None:
    peer = in_flight(10)
    peer.connection.sender.congestion.window = 10 * MSS
    peer.connection.write(bytes(5 * MSS))
    assert peer.leaves() == []
    assert numbers(peer.sends(ack=FIRST + MSS)) == [(FIRST + 11 * MSS, MSS)], "RFC 3042"


def test_duplicate_acks_before_a_new_one_do_not_count() -> None:
    peer = in_flight(10)
    for _ in range(2):
        peer.sends(ack=FIRST + MSS)
    peer.sends(ack=FIRST + 2 * MSS)
    assert peer.connection.sender.flight.pipe == 9 * MSS
    assert repeated(peer.sends(ack=FIRST + 2 * MSS), peer) == []
    assert peer.connection.sender.recovery.end is None


def test_partial_ack_sends_the_next_missing_segment() -> None:
    peer = in_flight(10)
    for _ in range(3):
        peer.sends(ack=FIRST + MSS)
    assert repeated(peer.sends(ack=FIRST + 4 * MSS), peer)[0] == (4 * MSS, MSS)
    assert peer.connection.sender.recovery.end is not None
    peer.sends()
    assert peer.connection.sender.recovery.end is None


@pytest.mark.parametrize("acknowledged", [0, 2 * MSS])
def test_duplicate_acks_have_one_segment_of_a_super_segment_sent_again(acknowledged: int) -> None:
    peer = established(segment_limit=10 * MSS)
    peer.connection.write(bytes(10 * MSS))
    assert len(peer.leaves()) == 1
    if acknowledged:
        peer.sends(ack=FIRST + acknowledged)
    sent = [peer.sends(ack=FIRST + acknowledged) for _ in range(8)]
    assert repeated([one for some in sent for one in some], peer) == [(acknowledged, MSS)]
    assert repeated(peer.sends(ack=FIRST + 5 * MSS), peer) == [(5 * MSS, MSS)], "a partial one"


def test_duplicate_with_data_or_another_window_is_none() -> None:
    peer = in_flight(10)
    for at in range(4):
        peer.sends(ack=FIRST + MSS, payload=b"x")
        peer.sends(ack=FIRST + MSS, window=5000 + at)
    assert peer.connection.sender.recovery.end is None


def test_duplicate_acks_send_one_segment_of_a_super_segment_again() -> None:
    """What has arrived and is sent again is answered by duplicates, which look like a loss."""
    peer = in_flight(1, segment_limit=10 * MSS)
    peer.sends()
    peer.connection.write(bytes(9 * MSS))
    assert len(peer.leaves()) == 1
    una = FIRST + 2 * MSS
    sent = [one for _ in range(5) for one in peer.sends(ack=una)]
    assert repeated(sent, peer) == [(2 * MSS, MSS)]
    assert repeated(peer.sends(ack=una + 4 * MSS), peer) == [(6 * MSS, MSS)], "a partial one"


def selective(segments: int) -> Peer:
    return in_flight(segments, sack_permitted=True)


def test_sack_three_segments_beyond_a_gap_send_it_again() -> None:
    peer = selective(10)
    una = FIRST + MSS
    for end in (3, 4):
        assert repeated(peer.sends(ack=una, sack=[block(2 * MSS, end * MSS)]), peer) == []
    sent = peer.sends(ack=una, sack=[block(2 * MSS, 5 * MSS)])
    assert repeated(sent, peer) == [(MSS, MSS)]


def test_sack_three_small_segments_beyond_a_gap_send_it_again() -> None:
    """They count as three, though they lie side by side and are less than one."""
    peer = selective(10)
    una = FIRST + 11 * MSS
    peer.sends(ack=una)
    for _ in range(4):
        peer.connection.write(b"small")
        peer.leaves()
    for end in (10, 15):
        assert peer.sends(ack=una, sack=[(una + 5, una + end)]) == []
    assert numbers(peer.sends(ack=una, sack=[(una + 5, una + 20)])) == [(una, 5)]


def test_sack_only_what_is_missing_is_sent_again() -> None:
    peer = selective(10)
    blocks = [block(9 * MSS, 11 * MSS), block(5 * MSS, 8 * MSS), block(2 * MSS, 4 * MSS)]
    peer.now += 0.1
    sent = repeated(peer.sends(ack=FIRST + MSS, sack=blocks), peer)
    sent += repeated(peer.sends(ack=FIRST + MSS, sack=blocks), peer)
    assert sent == [(MSS, MSS), (4 * MSS, MSS), (8 * MSS, MSS)]


def test_sack_halves_once_per_window_not_once_per_loss() -> None:
    peer = selective(10)
    peer.sends(ack=FIRST + MSS, sack=[block(2 * MSS, 5 * MSS)])
    window = peer.connection.sender.congestion.window
    assert window == 7000, "CUBIC keeps 0.7 of what was in flight"
    peer.sends(ack=FIRST + MSS, sack=[block(6 * MSS, 11 * MSS), block(2 * MSS, 5 * MSS)])
    assert peer.connection.sender.congestion.window == window


def test_sack_reordering_is_waited_for_once_it_was_seen() -> None:
    peer = selective(10)
    peer.sends(ack=FIRST + MSS, sack=[block(2 * MSS, 4 * MSS)])
    peer.sends(ack=FIRST + 4 * MSS)  # it came after all
    assert peer.connection.sender.flight.reordered
    assert peer.sends(ack=FIRST + 4 * MSS, sack=[block(5 * MSS, 9 * MSS)]) == []
    assert repeated(peer.wait(0.05), peer) == [(4 * MSS, MSS)], "a quarter of a round trip later"


def test_sack_tail_lost_is_probed_after_two_round_trips() -> None:
    peer = selective(3)
    assert numbers(peer.wait(0.05)) == [(FIRST + 3 * MSS, MSS)], "the last segment, not the first"
    sent = peer.sends(ack=FIRST + MSS, sack=[block(3 * MSS, 4 * MSS)])
    assert repeated(sent + peer.wait(0.1), peer)[:2] == [(MSS, MSS), (2 * MSS, MSS)]


def test_sack_tail_of_a_super_segment_is_probed_too() -> None:
    peer = in_flight(1, sack_permitted=True, segment_limit=10 * MSS)
    peer.sends()
    peer.connection.write(bytes(5 * MSS))
    assert len(peer.leaves()) == 1
    assert numbers(peer.wait(0.05)) == [(FIRST + 6 * MSS, MSS)]


@pytest.mark.parametrize(("rest", "close"), [(1, False), (500, False), (500, True), (MSS, True)])
def test_sack_tail_that_is_probed_is_the_last_segment_as_it_left(rest: int, close: bool) -> None:
    """Not octets of two: the peer may have one of them, and says so by its borders."""
    peer = in_flight(1, sack_permitted=True, segment_limit=10 * MSS)
    peer.sends()
    peer.connection.write(bytes(4 * MSS + rest))
    if close:
        peer.connection.close()
    assert len(peer.leaves()) == 1
    [probe] = peer.wait(0.05)
    assert probe.seq == FIRST + 6 * MSS
    assert len(probe.payload) == rest


def test_sack_of_part_of_a_super_segment_splits_it() -> None:
    peer = established(sack_permitted=True, segment_limit=10 * MSS)
    peer.connection.write(bytes(10 * MSS))
    assert len(peer.leaves()) == 1
    sent = peer.sends(ack=FIRST, sack=[block(MSS, 10 * MSS)])
    assert repeated(sent + peer.wait(0.1), peer)[0] == (0, MSS)


def test_sack_of_three_segments_at_once_beyond_a_gap_sends_it_again() -> None:
    """RFC 8985 section 6.2 counts segments: peers that join them (GRO) say all in one block."""
    peer = in_flight(1, sack_permitted=True, segment_limit=10 * MSS)
    peer.sends()
    peer.connection.write(bytes(9 * MSS))
    assert len(peer.leaves()) == 1
    una = FIRST + 2 * MSS
    assert repeated(peer.sends(ack=una, sack=[block(3 * MSS, 5 * MSS)]), peer) == []
    sent = peer.sends(ack=una, sack=[block(3 * MSS, 6 * MSS)])
    assert repeated(sent, peer) == [(2 * MSS, MSS)]


@pytest.mark.parametrize(
    "blocks", [[(FIRST - 500, FIRST + 10)], [(FIRST + 5000, FIRST + 99_000)], [(FIRST + 9, FIRST)]]
)
def test_sack_made_up_is_ignored(blocks: list[tuple[int, int]]) -> None:
    peer = selective(5)
    peer.sends(ack=FIRST + MSS, sack=blocks)
    assert peer.connection.sender.flight.sacked == 0


def test_sack_of_crumbs_of_segments_is_ignored() -> None:
    peer = selective(5)
    for at in range(MSS, 6 * MSS, 10):
        peer.sends(ack=FIRST + MSS, sack=[block(at, at + 1)])
    assert len(peer.connection.sender.flight.records) == 5
    assert peer.connection.sender.flight.sacked == 0


def test_segments_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender_module, "MAX_RECORDS", 4)
    peer = wrote(10 * MSS)
    assert len(peer.leaves()) == 4
    assert len(peer.sends()) == 4


def test_segments_in_flight_are_bounded_when_they_leave_as_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks of a peer's choice would split it into as many records as it has segments."""
    monkeypatch.setattr(sender_module, "MAX_RECORDS", 4)
    peer = wrote(10 * MSS, segment_limit=10 * MSS)
    assert numbers(peer.leaves()) == [(FIRST, 4 * MSS)]
    assert numbers(peer.sends()) == [(FIRST + 4 * MSS, 4 * MSS)]


def test_segments_in_flight_are_bounded_where_they_are_cut_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sender_module, "MAX_RECORDS", 4)
    peer = wrote(10 * MSS, None, segment_limit=10 * MSS)
    assert numbers(peer.leaves()) == [(FIRST, 4 * MSS)]
    assert numbers(peer.sends(ack=FIRST + 3 * MSS)) == [(FIRST + 4 * MSS, 3 * MSS)]


def test_sack_that_was_not_agreed_upon_is_ignored() -> None:
    peer = in_flight(5)
    peer.sends(ack=FIRST + MSS, sack=[block(2 * MSS, 5 * MSS)])
    assert peer.connection.sender.flight.sacked == 0


def test_sack_reneged_all_is_sent_again_after_the_time_out() -> None:
    peer = selective(3)
    peer.sends(ack=FIRST + MSS, sack=[block(2 * MSS, 4 * MSS)])
    peer.sends(ack=FIRST + 2 * MSS)
    assert peer.connection.sender.flight.sacked == 2 * MSS, "it forgot to say so"
    peer.wait(0.5)
    assert peer.connection.sender.flight.sacked == 0
    assert peer.connection.unacknowledged == 2 * MSS


def test_data_are_kept_until_acknowledged_even_if_sacked() -> None:
    peer = selective(3)
    peer.sends(ack=FIRST + MSS, sack=[block(2 * MSS, 4 * MSS)])
    assert peer.connection.unacknowledged == 3 * MSS
