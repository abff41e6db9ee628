"""Opening a connection: RFC 9293 sections 3.5 and 3.10.7.2 to 3.10.7.4."""

import pytest

from echo_appliance.netstack.tcp.settings import Settings
from echo_appliance.netstack.tcp.states import State
from echo_appliance.netstack.wire.tcp import ACK, FIN, RST, SYN

from .peer import OURS, THEIRS, WINDOW, Peer, connecting, established, listening

SYN_ACK = SYN | ACK


def test_connect_sends_a_syn_with_all_options() -> None:
    peer = Peer()
    peer.connection.connect(peer.now)
    (syn,) = peer.leaves()
    assert (syn.flags, syn.seq, syn.ack) == (SYN, OURS, 0)
    assert (syn.mss, syn.window_scale, syn.sack_permitted) == (1000, 5, True)
    assert syn.timestamp == (int(peer.now * 1000), 0)
    assert syn.window == 65535, "the window of a SYN is not scaled"
    assert peer.states == ["SYN-SENT"]


def test_syn_sent_syn_ack_comes_and_is_acknowledged() -> None:
    peer = connecting()
    peer.connection.receive(peer.syn(SYN_ACK, mss=500), peer.now)
    (ack,) = peer.leaves()
    assert (ack.flags, ack.seq, ack.ack) == (ACK, OURS + 1, THEIRS + 1)
    assert peer.states == ["SYN-SENT", "ESTABLISHED"]
    assert peer.connection.send_mss == 500
    assert ack.timestamp is None, "the peer offered none"


def test_syn_sent_ack_of_something_else_is_answered_with_reset() -> None:
    peer = connecting()
    (reset,) = peer.sends(SYN_ACK, ack=OURS + 2)
    assert (reset.flags, reset.seq) == (RST, OURS + 2)
    assert peer.state is State.SYN_SENT


def test_syn_sent_reset_with_a_wrong_ack_is_ignored() -> None:
    peer = connecting()
    assert peer.sends(RST | ACK, ack=OURS) == []
    assert peer.sends(RST) == []
    assert peer.state is State.SYN_SENT


def test_syn_sent_reset_refuses() -> None:
    peer = connecting()
    assert peer.sends(RST | ACK) == []
    assert peer.state is State.CLOSED
    assert peer.connection.error == "refused"


def test_syn_sent_segment_without_syn_is_ignored() -> None:
    peer = connecting()
    assert peer.sends(ACK) == []
    assert peer.sends(FIN) == []
    assert peer.state is State.SYN_SENT


def test_syn_sent_close_forgets_the_connection() -> None:
    peer = connecting()
    peer.connection.close()
    assert peer.states == ["SYN-SENT", "CLOSED"]
    assert peer.leaves() == []


def test_simultaneous_open_both_syns_cross_and_both_are_established() -> None:
    peer = connecting()
    peer.connection.receive(peer.syn(SYN, mss=1000), peer.now)
    (answer,) = peer.leaves()
    assert (answer.flags, answer.seq, answer.ack) == (SYN_ACK, OURS, THEIRS + 1)
    assert peer.state is State.SYN_RECEIVED
    peer.sends(SYN_ACK, seq=THEIRS, ack=OURS + 1)
    assert peer.states == ["SYN-SENT", "SYN-RECEIVED", "ESTABLISHED"]


def test_simultaneous_open_window_of_the_second_syn_is_not_scaled_either() -> None:
    """RFC 7323 section 2.2: the window of a segment with SYN never is."""
    peer = connecting()
    peer.connection.receive(peer.syn(SYN, window_scale=7), peer.now)
    peer.leaves()
    peer.sends(SYN_ACK, seq=THEIRS, ack=OURS + 1, window=3000)
    assert peer.state is State.ESTABLISHED
    assert 3000 - (1 << 7) < peer.connection.sender.window <= 3000
    peer.sends(window=30)
    assert peer.connection.sender.window == 30 << 7


def test_simultaneous_open_reset_refuses() -> None:
    peer = connecting()
    peer.connection.receive(peer.syn(SYN), peer.now)
    peer.leaves()
    peer.sends(RST)
    assert peer.connection.error == "refused", "the application asked for it, so it is told"


def test_listen_syn_comes_and_is_answered() -> None:
    peer = Peer()
    peer.connection.accept(peer.syn(mss=700, timestamp=(77, 0), window_scale=3), peer.now)
    (answer,) = peer.leaves()
    assert (answer.flags, answer.seq, answer.ack) == (SYN_ACK, OURS, THEIRS + 1)
    assert (answer.mss, answer.window_scale, answer.sack_permitted) == (1000, 5, False)
    assert answer.timestamp == (int(peer.now * 1000), 77)
    assert peer.states == ["LISTEN", "SYN-RECEIVED"]


def test_syn_received_ack_comes_and_establishes() -> None:
    peer = listening()
    assert peer.sends() == []
    assert peer.states == ["LISTEN", "SYN-RECEIVED", "ESTABLISHED"]
    assert peer.connection.sender.window == WINDOW


def test_syn_received_ack_of_something_else_is_answered_with_reset() -> None:
    peer = listening()
    for wrong in (OURS, OURS + 2, OURS - 1):
        (reset,) = peer.sends(ack=wrong)
        assert (reset.flags, reset.seq) == (RST, wrong)
    assert peer.state is State.SYN_RECEIVED


def test_syn_received_reset_or_new_syn_returns_to_listen() -> None:
    for flags in (RST, SYN):
        peer = listening()
        peer.sends(flags)
        assert peer.state is State.CLOSED
        assert peer.leaves() == []


def test_syn_received_data_with_the_ack_are_taken() -> None:
    peer = listening()
    peer.sends(payload=b"early")
    assert peer.connection.read(10) == b"early"


def test_syn_data_in_it_are_kept_for_later() -> None:
    peer = Peer()
    syn = peer.syn(mss=1000)
    syn.payload = b"in the syn"
    peer.seq += len(syn.payload)
    peer.connection.accept(syn, peer.now)
    (answer,) = peer.leaves()
    assert answer.ack == THEIRS + 1 + 10
    peer.sends()
    assert peer.connection.read(20) == b"in the syn"


def test_syn_lost_is_sent_again_with_doubling_time_outs() -> None:
    peer = connecting()
    start = peer.now
    times = []
    for _ in range(4):
        (syn,) = peer.wait(peer.connection.deadline() - peer.now)  # type: ignore[operator]
        assert (syn.flags, syn.seq) == (SYN, OURS)
        times.append(peer.now - start)
    assert times == [1, 3, 7, 15]


def test_syn_never_answered_times_out_after_three_minutes() -> None:
    peer = connecting()
    peer.wait(179)
    assert peer.state is State.SYN_SENT
    peer.wait(120)
    assert peer.connection.error == "timed out"


def test_syn_was_lost_and_the_first_time_out_is_three_seconds() -> None:
    peer = connecting()
    peer.wait(1)
    peer.connection.receive(peer.syn(SYN_ACK), peer.now)
    peer.leaves()
    peer.connection.write(b"x")
    peer.leaves()
    assert peer.connection.deadline() == peer.now + 3


def test_syn_was_lost_and_slow_start_begins_with_one_segment() -> None:
    peer = connecting()
    peer.wait(1)
    peer.connection.receive(peer.syn(SYN_ACK, mss=1000), peer.now)
    peer.connection.write(bytes(50_000))
    assert [len(segment.payload) for segment in peer.leaves()] == [1000]
    assert [len(peer.sends()) for _ in range(3)] == [2, 4, 8]


def test_syn_ack_lost_is_sent_again() -> None:
    peer = listening()
    (again,) = peer.wait(1)
    assert (again.flags, again.seq, again.ack) == (SYN_ACK, OURS, THEIRS + 1)


def test_mss_option_absent_the_default_is_used() -> None:
    for address, default in ((b"\x0a\0\0\x02", 536), (bytes(15) + b"\x02", 1220)):
        peer = listening(mss=None, address=address)
        peer.connection.mss = 1460
        peer.sends()
        assert peer.connection.send_mss == min(default, 1000)


@pytest.mark.parametrize(("theirs", "expected"), [(0, 536), (1, 48), (47, 48), (9000, 1460)])
def test_mss_option_absurd_is_bounded(theirs: int, expected: int) -> None:
    peer = Peer(mss=1460)
    peer.connection.accept(peer.syn(mss=theirs), peer.now)
    assert peer.connection.send_mss == expected


def test_mss_is_reduced_by_the_options_of_every_segment() -> None:
    peer = established(mss=1000, timestamp=(1, 0))
    assert peer.connection.send_mss == 1000 - 12


def test_window_scale_is_used_only_if_both_offer_it() -> None:
    peer = established(window_scale=4)
    peer.sends(window=100)
    assert peer.connection.sender.window == 1600
    plain = established()
    plain.sends(window=100)
    assert plain.connection.sender.window == 100


def test_window_scale_above_fourteen_is_taken_for_fourteen() -> None:
    assert listening(window_scale=255).connection.sender.scale == 14


def test_window_of_65535_is_not_negative() -> None:
    peer = established()
    peer.sends(window=65535)
    assert peer.connection.sender.window == 65535


def test_receive_limit_small_needs_no_scale() -> None:
    peer = Peer(Settings(receive_limit=4096))
    peer.connection.connect(peer.now)
    (syn,) = peer.leaves()
    assert (syn.window_scale, syn.window) == (0, 4096)
