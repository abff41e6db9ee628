"""How fast windows grow and shrink: RFC 5681, RFC 9438, RFC 6298."""

import pytest

from echo_appliance.netstack.tcp.congestion import Cubic, NewReno
from echo_appliance.netstack.tcp.rtt import RoundTrip
from echo_appliance.netstack.tcp.settings import MAX_RTO, MIN_RTO

MSS = 1000


def avoiding(kind: type[NewReno], segments: int) -> NewReno:
    """A window of so many segments, after a loss that it was brought down by."""
    window = kind(MSS)
    window.window = int(segments * MSS / kind.beta)
    window.lost(window.window, 0.0)
    return window


def round_trips(window: NewReno, seconds: float, round_trip: float = 0.1) -> int:
    """Let the window grow in full use for a while; return it in segments."""
    now = 0.0
    while now < seconds:
        for _ in range(window.window // MSS):
            window.acknowledged(MSS, now, round_trip)
        now += round_trip
    return window.window // MSS


@pytest.mark.parametrize("kind", [NewReno, Cubic])
def test_slow_start_doubles_per_round_trip(kind: type[NewReno]) -> None:
    assert round_trips(kind(MSS), 0.29) == 80


def test_newreno_avoidance_adds_one_segment_per_round_trip() -> None:
    assert round_trips(avoiding(NewReno, 50), 0.99) == 50 + 10


@pytest.mark.parametrize("kind", [NewReno, Cubic])
def test_loss_leaves_its_share_and_never_less_than_two_segments(kind: type[NewReno]) -> None:
    window = kind(MSS)
    window.lost(100 * MSS, 0.0)
    assert window.window == 100 * MSS * kind.beta
    window.lost(MSS, 1.0)
    assert window.window == 2 * MSS


@pytest.mark.parametrize("kind", [NewReno, Cubic])
def test_time_out_leaves_one_segment_and_slow_start_up_to_half(kind: type[NewReno]) -> None:
    window = kind(MSS)
    window.timed_out(40 * MSS, 0.0)
    assert window.window == MSS
    assert window.ssthresh == 40 * MSS * kind.beta


def test_loss_that_was_none_is_undone() -> None:
    window = NewReno(MSS)
    window.window = 40 * MSS
    window.timed_out(40 * MSS, 0.0)
    window.undo()
    assert window.window == 40 * MSS
    assert window.ssthresh > 40 * MSS


def test_cubic_is_back_at_the_peak_after_k_seconds_and_then_beyond_it() -> None:
    # Peak 1000 segments: K is the cube root of 1000 * 0.3 / 0.4, which is 9.09 seconds.
    window = avoiding(Cubic, 700)
    assert round_trips(window, 9.0) == pytest.approx(1000, rel=0.01)
    assert round_trips(avoiding(Cubic, 700), 12.0) > 1005


def test_cubic_comes_back_faster_than_newreno_on_a_long_fast_path() -> None:
    assert round_trips(avoiding(Cubic, 700), 5.0) > 900
    assert round_trips(avoiding(NewReno, 700), 5.0) < 760


def test_cubic_on_a_short_path_is_no_slower_than_newreno() -> None:
    cubic, reno = (round_trips(avoiding(kind, 10), 1.0, 0.001) for kind in (Cubic, NewReno))
    assert cubic == pytest.approx(reno, rel=0.05)


def test_time_out_of_a_first_sample_is_three_times_it() -> None:
    time = RoundTrip()
    assert time.rto == 1.0
    time.sample(0.5)
    assert (time.smoothed, time.rto) == (0.5, 1.5)
    time.sample(0.5)
    assert time.rto == pytest.approx(0.5 + 4 * 0.1875)


def test_time_out_has_a_floor_and_a_ceiling() -> None:
    time = RoundTrip()
    time.sample(0.0001)
    assert time.rto == MIN_RTO
    for _ in range(20):
        time.back_off()
    assert time.rto == MAX_RTO
    time.progressed()
    assert time.rto == MIN_RTO
