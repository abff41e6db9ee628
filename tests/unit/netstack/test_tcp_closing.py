"""Closing a connection: RFC 9293 section 3.6, and its ends that are not so good."""

import pytest

from echo_appliance.netstack.tcp.settings import ORPHAN_TIMEOUT, TIME_WAIT, Settings
from echo_appliance.netstack.tcp.states import TRANSITIONS, Event, State, change
from echo_appliance.netstack.wire.tcp import ACK, FIN, PSH, RST, SYN

from .peer import FIRST, OURS, THEIRS, Peer, connecting, established, listening, numbers

FIN_ACK = FIN | ACK


def closing_first() -> Peer:
    """In FIN-WAIT-1, our FIN under way."""
    peer = established()
    peer.connection.close()
    (fin,) = peer.leaves()
    assert (fin.flags, fin.seq) == (FIN_ACK, OURS + 1)
    return peer


def test_established_data_beyond_a_fin_that_came_before_it_are_no_part_of_the_stream() -> None:
    """They wait in an island that reaches past the FIN, which was passed by and never taken."""
    peer = established()
    peer.sends(seq=THEIRS + 51, payload=bytes(100))
    peer.sends(FIN_ACK, seq=THEIRS + 71)
    (ack,) = peer.sends(seq=THEIRS + 1, payload=bytes(50))
    assert (peer.state, ack.ack) == (State.CLOSE_WAIT, THEIRS + 72)
    assert peer.connection.read(999) == bytes(70)
    assert peer.connection.at_eof


def test_established_fin_comes_and_reading_ends() -> None:
    peer = established()
    (ack,) = peer.sends(FIN_ACK, payload=b"last")
    assert ack.ack == THEIRS + 1 + 4 + 1
    assert peer.states == ["CLOSE-WAIT"]
    assert not peer.connection.at_eof, "there are octets to read"
    assert peer.connection.read(10) == b"last"
    assert peer.connection.at_eof


def test_close_wait_can_still_send_all_it_has() -> None:
    peer = established()
    peer.sends(FIN_ACK)
    assert peer.connection.write(b"reply after the half-close") == 26
    (data,) = peer.leaves()
    assert bytes(data.payload) == b"reply after the half-close"
    peer.sends()
    peer.connection.close()
    (fin,) = peer.leaves()
    assert fin.flags & FIN
    assert peer.state is State.LAST_ACK
    peer.sends()
    assert peer.states == ["CLOSE-WAIT", "LAST-ACK", "CLOSED"]
    assert peer.connection.error is None


def test_close_sends_fin_after_what_was_written() -> None:
    peer = established()
    peer.connection.write(b"a" * 1500)
    peer.connection.close()
    first, second = peer.leaves()
    assert numbers([first, second]) == [(OURS + 1, 1000), (OURS + 1001, 500)]
    assert not first.flags & FIN
    assert second.flags == FIN | PSH | ACK
    assert peer.connection.write(b"more") == 0


def test_fin_wait_1_fin_acknowledged_then_fin_comes() -> None:
    peer = closing_first()
    peer.sends()
    assert peer.states == ["FIN-WAIT-1", "FIN-WAIT-2"]
    peer.sends(payload=b"still talking")
    assert peer.connection.read(99) == b"still talking"
    (ack,) = peer.sends(FIN_ACK)
    assert ack.ack == peer.seq
    assert peer.states == ["FIN-WAIT-1", "FIN-WAIT-2", "TIME-WAIT"]


def test_fin_wait_1_fin_with_the_ack_goes_to_time_wait() -> None:
    peer = closing_first()
    peer.sends(FIN_ACK)
    assert peer.states == ["FIN-WAIT-1", "FIN-WAIT-2", "TIME-WAIT"]


# -- nobody reads any more ---------------------------------------------------


def test_fin_wait_2_lasts_for_as_long_as_somebody_waits() -> None:
    peer = established()
    peer.connection.close()
    peer.leaves()
    peer.sends()
    peer.wait(86400)
    assert peer.state is State.FIN_WAIT_2


@pytest.mark.parametrize("acknowledged_before", [True, False])
def test_fin_wait_2_of_a_released_connection_is_bounded(acknowledged_before: bool) -> None:
    peer = established()
    if acknowledged_before:
        peer.connection.close()
        peer.leaves()
        peer.sends()
        peer.connection.release(peer.now)
    else:
        peer.connection.release(peer.now)
        assert [one.flags for one in peer.leaves()] == [FIN | ACK]
        peer.sends()
    assert peer.wait(ORPHAN_TIMEOUT - 1) == []
    assert peer.states[-1] == "FIN-WAIT-2"
    assert peer.wait(2) == []
    assert peer.states[-1] == "CLOSED"


def test_fin_wait_2_of_a_released_connection_still_ends_by_a_fin() -> None:
    peer = established()
    peer.connection.release(peer.now)
    peer.leaves()
    peer.sends()
    peer.wait(30)
    peer.sends(FIN | ACK)
    peer.wait(TIME_WAIT - 1)
    assert peer.state is State.TIME_WAIT
    peer.wait(2)
    assert peer.states[-1] == "CLOSED"
    assert peer.connection.error is None


def test_released_connection_sends_what_was_written_and_resets_what_comes() -> None:
    """RFC 9293 SHLD-3."""
    peer = established()
    peer.connection.write(b"the rest")
    peer.connection.release(peer.now)
    (last,) = peer.leaves()
    assert (bytes(last.payload), last.flags & FIN) == (b"the rest", FIN)
    (reset,) = peer.sends(payload=b"too late")
    assert reset.flags & RST
    assert peer.state is State.CLOSED


@pytest.mark.parametrize("peer_closed", [True, False])
def test_released_connection_is_not_kept_by_a_window_that_stays_closed(peer_closed: bool) -> None:
    """Its probes are answered, for ever if need be; but nobody waits for what they are about."""
    peer = established(Settings(user_timeout=100))
    if peer_closed:
        peer.sends(FIN | ACK)
    peer.sends(window=0)
    peer.connection.write(b"never taken")
    peer.connection.release(peer.now)
    assert peer.leaves() == []
    start = peer.now
    while peer.connection.deadline() is not None and peer.now < start + 1000:
        peer.wait(1)
        peer.sends(ack=FIRST, window=0)
    assert peer.state is State.CLOSED
    assert 99 < peer.now - start < 200


def test_released_connection_with_data_unread_is_reset() -> None:
    peer = established()
    peer.sends(payload=b"nobody will read this")
    peer.connection.release(peer.now)
    (reset,) = peer.leaves()
    assert reset.flags & RST


def test_simultaneous_close_both_fins_cross() -> None:
    peer = closing_first()
    peer.sends(FIN_ACK, ack=OURS + 1)
    assert peer.state is State.CLOSING
    peer.sends()
    peer.wait(TIME_WAIT)
    assert peer.states == ["FIN-WAIT-1", "CLOSING", "TIME-WAIT", "CLOSED"]


def test_fin_out_of_order_waits_for_what_is_before_it() -> None:
    peer = established()
    peer.sends(FIN_ACK, seq=THEIRS + 1 + 5)
    assert peer.state is State.ESTABLISHED
    (ack,) = peer.sends(payload=b"12345")
    assert ack.ack == THEIRS + 1 + 6
    assert peer.states == ["CLOSE-WAIT"]


def test_time_wait_lasts_two_segment_lifetimes() -> None:
    peer = closing_first()
    peer.sends(FIN_ACK)
    peer.wait(TIME_WAIT - 0.001)
    assert peer.state is State.TIME_WAIT
    peer.wait(0.001)
    assert peer.states[-1] == "CLOSED"
    assert peer.connection.error is None


def test_time_wait_fin_comes_again_and_the_wait_starts_anew() -> None:
    peer = closing_first()
    peer.sends(FIN_ACK)
    peer.wait(TIME_WAIT - 1)
    (ack,) = peer.sends(FIN_ACK, seq=THEIRS + 1)
    assert ack.ack == THEIRS + 2
    peer.wait(TIME_WAIT - 1)
    assert peer.state is State.TIME_WAIT


def test_fin_lost_is_sent_again() -> None:
    peer = closing_first()
    (again,) = peer.wait(0.3)
    assert (again.flags & FIN, again.seq) == (FIN, OURS + 1)


def test_fin_comes_into_a_full_window() -> None:
    peer = established(Settings(receive_limit=4))
    (ack,) = peer.sends(FIN_ACK, payload=b"full")
    assert (ack.ack, ack.window) == (THEIRS + 1 + 5, 0)
    assert peer.states == ["CLOSE-WAIT"]


def test_reset_of_a_connection_that_we_opened_is_no_refusal() -> None:
    peer = connecting()
    peer.connection.receive(peer.syn(SYN | ACK), peer.now)
    peer.leaves()
    peer.sends(RST)
    assert peer.connection.error == "reset"


def test_fin_needs_no_window() -> None:
    peer = established()
    peer.sends(window=0)
    peer.connection.close()
    (fin,) = peer.leaves()
    assert fin.flags & FIN


def test_close_in_syn_received_sends_fin_once_established() -> None:
    peer = listening()
    peer.connection.close()
    assert peer.leaves() == []
    (fin,) = peer.sends()
    assert fin.flags & FIN
    assert peer.states == ["LISTEN", "SYN-RECEIVED", "FIN-WAIT-1"]


def test_abort_sends_reset_and_forgets_all() -> None:
    peer = established()
    peer.connection.write(b"never sent")
    peer.connection.abort()
    (reset,) = peer.leaves()
    assert (reset.flags, reset.seq) == (RST | ACK, OURS + 1)
    assert peer.connection.error == "aborted"
    assert peer.connection.deadline() is None


def test_reset_at_the_next_number_ends_the_connection_and_tells_why() -> None:
    peer = established()
    peer.sends(RST)
    assert peer.states == ["CLOSED"]
    assert peer.connection.error == "reset"


@pytest.mark.parametrize("closed", ["peer", "both"])
def test_reset_after_both_closed_is_no_error(closed: str) -> None:
    peer = closing_first()
    if closed == "both":
        peer.sends(FIN_ACK)
        assert peer.state is State.TIME_WAIT
    peer.sends(RST)
    assert peer.state is State.CLOSED
    assert peer.connection.error == (None if closed == "both" else "reset")


def test_table_every_state_can_be_reached_and_left() -> None:
    assert set(TRANSITIONS.values()) == set(State)
    assert {before for before, _ in TRANSITIONS} == set(State)


def test_change_unknown_to_the_table_is_our_mistake() -> None:
    with pytest.raises(RuntimeError, match="no way out of LISTEN by: our FIN was acknowledged"):
        change(State.LISTEN, Event.FIN_ACKED)
