"""What a segment must pass before it is believed: RFC 9293 section 3.10.7.4, RFC 5961, RFC 7323."""

import pytest

from echo_appliance.netstack.tcp.settings import CHALLENGE_INTERVAL, PAWS_IDLE, Settings
from echo_appliance.netstack.tcp.states import State
from echo_appliance.netstack.wire.tcp import ACK, FIN, RST, SYN, URG

from .peer import OURS, THEIRS, WINDOW, established, listening

NEXT = THEIRS + 1  # what we expect of the peer
LIMIT = 1 << 20


def test_data_in_order_are_readable_and_acknowledged_after_the_delay() -> None:
    peer = established()
    assert peer.sends(payload=b"hello") == []
    assert peer.connection.readable == 5
    (ack,) = peer.wait(0.04)
    assert (ack.flags, ack.seq, ack.ack) == (ACK, OURS + 1, NEXT + 5)
    assert peer.connection.read(3) == b"hel"
    assert peer.connection.read(9) == b"lo"


def test_data_old_are_dropped_and_acknowledged_at_once() -> None:
    peer = established()
    peer.sends(payload=b"hello")
    (ack,) = peer.sends(payload=b"hello", seq=NEXT)
    assert ack.ack == NEXT + 5
    assert peer.connection.read(99) == b"hello"


def test_data_partly_old_only_the_new_part_is_taken() -> None:
    peer = established()
    peer.sends(payload=b"hello")
    peer.sends(payload=b"lo, world", seq=NEXT + 3)
    assert peer.connection.read(99) == b"hello, world"


def test_data_beyond_the_window_are_cut_off() -> None:
    peer = established(Settings(receive_limit=10))
    (ack,) = peer.sends(payload=b"0123456789ABC")
    assert (ack.ack, ack.window) == (NEXT + 10, 0)
    assert peer.connection.read(99) == b"0123456789"


def test_data_that_begin_beyond_the_window_are_dropped_and_answered() -> None:
    peer = established(Settings(receive_limit=10))
    (ack,) = peer.sends(payload=b"x", seq=NEXT + 10)
    assert ack.ack == NEXT
    assert peer.connection.readable == 0


def test_numbers_wrap_around_in_both_directions() -> None:
    peer = established(ours=0xFFFFFFF0, theirs=0xFFFFFFF0)
    peer.connection.write(b"x" * 40)
    (data,) = peer.leaves()
    assert data.seq == 0xFFFFFFF1
    peer.sends(payload=b"y" * 40, ack=25)
    assert peer.connection.unacknowledged == 0
    assert peer.connection.read(99) == b"y" * 40
    peer.sends(payload=b"z", seq=25)
    assert peer.connection.read(99) == b"z"


def test_ack_from_the_edge_of_the_window_counts() -> None:
    peer = established(Settings(receive_limit=1000))
    peer.connection.write(b"x")
    peer.leaves()
    peer.sends(seq=NEXT + 1000)  # it has filled our window, and what came first was lost
    assert peer.connection.unacknowledged == 0


def test_segment_without_ack_is_dropped() -> None:
    peer = established()
    peer.sends(0, payload=b"no ack")
    assert peer.connection.readable == 0


# -- RST, SYN and ACK from strangers (RFC 5961) --------------------------------


def test_reset_in_the_window_is_answered_with_a_challenge() -> None:
    peer = established()
    (challenge,) = peer.sends(RST, seq=NEXT + 1)
    assert (challenge.flags, challenge.seq, challenge.ack) == (ACK, OURS + 1, NEXT)
    assert peer.state is State.ESTABLISHED


def test_reset_outside_of_the_window_is_dropped() -> None:
    peer = established()
    for seq in (NEXT - 1, NEXT + LIMIT + 1, NEXT + (1 << 31)):
        assert peer.sends(RST, seq=seq) == []
    assert peer.state is State.ESTABLISHED


def test_reset_with_words_in_it_at_a_zero_window_is_believed() -> None:
    """RFC 9293 section 3.5.3: it may say why, and that needs no room."""
    peer = established(Settings(receive_limit=1000))
    peer.sends(payload=bytes(1000))
    peer.sends(RST | ACK, payload=b"out of memory")
    assert peer.connection.error == "reset"


def test_reset_before_the_window_is_dropped_however_long_it_is() -> None:
    peer = established()
    assert peer.sends(RST, seq=NEXT - 1, payload=b"words") == []
    assert peer.state is State.ESTABLISHED


def test_reset_at_a_zero_window_is_believed() -> None:
    peer = established(Settings(receive_limit=10))
    peer.sends(payload=b"0123456789")
    peer.sends(RST)
    assert peer.connection.error == "reset"


@pytest.mark.parametrize("seq", [NEXT, NEXT + 5, THEIRS, NEXT + (1 << 31)])
def test_syn_on_an_open_connection_is_answered_with_a_challenge(seq: int) -> None:
    peer = established()
    (challenge,) = peer.sends(SYN, seq=seq)
    assert (challenge.flags, challenge.ack) == (ACK, NEXT)
    assert peer.state is State.ESTABLISHED


def test_ack_of_what_was_never_sent_is_challenged_and_its_data_dropped() -> None:
    peer = established()
    (challenge,) = peer.sends(ack=OURS + 2, payload=b"forged", seq=NEXT)
    assert challenge.ack == NEXT
    assert peer.connection.readable == 0


def test_ack_far_too_old_is_challenged_and_its_data_dropped() -> None:
    peer = established()
    (challenge,) = peer.sends(ack=OURS + 1 - WINDOW - 1, payload=b"forged", seq=NEXT)
    assert challenge.ack == NEXT
    assert peer.connection.readable == 0
    peer.sends(ack=OURS, payload=b"a bit old, but from here", seq=NEXT)
    assert peer.connection.readable == 24


def test_challenges_are_limited_per_connection() -> None:
    peer = established()
    assert len(peer.sends(RST, seq=NEXT + 1)) == 1
    assert peer.sends(RST, seq=NEXT + 2) == []
    peer.wait(CHALLENGE_INTERVAL)
    assert len(peer.sends(RST, seq=NEXT + 2)) == 1


# -- timestamps (RFC 7323) -----------------------------------------------------


def test_timestamps_echo_that_of_the_segment_that_is_acknowledged() -> None:
    peer = established(timestamp=(10, 0))
    peer.sends(payload=b"first", stamp=(20, 0))
    peer.sends(payload=b"second", stamp=(30, 0))
    (ack,) = peer.wait(0.04)
    assert ack.timestamp == (int(peer.now * 1000), 20), "of the one that the delay began with"


def test_paws_segment_with_an_old_timestamp_is_dropped_and_answered() -> None:
    peer = established(timestamp=(1000, 0))
    (ack,) = peer.sends(payload=b"from before the wrap", stamp=(999, 0), seq=NEXT)
    assert ack.ack == NEXT
    assert peer.connection.readable == 0


def test_paws_timestamps_wrap_around() -> None:
    peer = established(timestamp=(0xFFFFFFFF, 0))
    peer.sends(payload=b"later", stamp=(3, 0))
    assert peer.connection.readable == 5


def test_paws_after_24_days_of_silence_any_timestamp_is_taken() -> None:
    peer = established(timestamp=(1000, 0))
    peer.wait(PAWS_IDLE + 1)
    peer.sends(payload=b"hello again", stamp=(999, 0))
    assert peer.connection.readable == 11
    (ack,) = peer.wait(0.04)
    assert ack.timestamp is not None
    assert ack.timestamp[1] == 999, "and is the one that counts from then on"


def test_timestamps_agreed_a_segment_without_one_is_dropped() -> None:
    peer = established(timestamp=(1000, 0))
    peer.stamp = None
    assert peer.sends(payload=b"no stamp", seq=NEXT) == []
    assert peer.connection.readable == 0


def test_timestamps_agreed_a_syn_without_one_is_challenged() -> None:
    """Its host has started anew, or is another one behind the same NAT: it could not get in."""
    peer = established(timestamp=(1, 0))
    peer.stamp = None
    (challenge,) = peer.sends(SYN, seq=77777)
    assert (challenge.flags, challenge.ack) == (ACK, NEXT)
    assert peer.sends(SYN, seq=77777) == [], "at a limited rate"
    peer.sends(RST, seq=challenge.ack)
    assert peer.connection.error == "reset"


def test_reset_needs_no_timestamp() -> None:
    peer = established(timestamp=(1000, 0))
    peer.stamp = None
    peer.sends(RST)
    assert peer.connection.error == "reset"


def test_timestamp_not_agreed_it_is_ignored() -> None:
    peer = established()
    peer.sends(payload=b"odd", stamp=(5, 5))
    assert peer.connection.readable == 3
    peer.sends(payload=b"odd", stamp=(4, 5))
    assert peer.connection.readable == 6


# -- urgent data ---------------------------------------------------------------


def test_urgent_data_of_any_length_are_told_while_they_are_read() -> None:
    peer = established()
    peer.sends(ACK | URG, payload=b"urgent", urgent=3000)
    assert peer.connection.urgent == 3000
    peer.connection.read(6)
    peer.sends(ACK | URG, payload=b"more", urgent=10)
    assert peer.connection.urgent == 2994, "the end of urgent data never moves back"


def test_urgent_pointer_counts_even_with_a_zero_window() -> None:
    peer = established(Settings(receive_limit=10))
    peer.sends(payload=b"0123456789")
    peer.connection.write(b"x")
    peer.leaves()
    peer.sends(ACK | URG, payload=b"U", urgent=1, seq=NEXT + 10, ack=OURS + 2)
    assert peer.connection.urgent == 11
    assert peer.connection.unacknowledged == 0, "nor is the ACK lost"
    assert peer.connection.readable == 10


def test_urgent_data_are_sent_with_the_pointer_after_the_last_octet() -> None:
    peer = established()
    peer.connection.write(b"hurry", urgent=True)
    peer.connection.write(b", or not")
    (data,) = peer.leaves()
    assert data.flags & URG
    assert (bytes(data.payload), data.urgent) == (b"hurry, or not", 5)


# -- hostile -------------------------------------------------------------------


def test_fin_forged_twice_the_first_counts() -> None:
    peer = established()
    peer.sends(FIN | ACK, seq=NEXT + 100)
    peer.sends(FIN | ACK, seq=NEXT + 3)
    peer.sends(payload=b"0123")
    assert peer.state is State.ESTABLISHED


def test_data_past_a_fin_are_dropped() -> None:
    peer = established()
    peer.sends(FIN | ACK, seq=NEXT + 3)
    peer.sends(payload=b"beyond all", seq=NEXT + 5)
    assert not peer.connection.receiver.islands
    peer.sends(payload=b"012345")
    assert peer.connection.read(99) == b"012"
    assert peer.state is State.CLOSE_WAIT
    peer.sends(payload=b"more", seq=NEXT + 4)
    assert peer.connection.readable == 0


def test_closed_connection_ignores_all() -> None:
    peer = listening()
    peer.sends(RST)
    for flags in (SYN, ACK, FIN | ACK, RST):
        assert peer.sends(flags, payload=b"x") == []
    assert peer.state is State.CLOSED
