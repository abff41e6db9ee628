"""The loop with real descriptors, and timers on a clock of our own."""

import functools
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import echo_appliance.loop
from echo_appliance.loop import CALM, LINGER, Loop


class Clock:
    """Time that moves when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(echo_appliance.loop, "monotonic", clock)
    return clock


@pytest.fixture
def loop(clock: Clock) -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    first, second = socket.socketpair()
    with first, second:
        yield first, second


def test_loop_ready_descriptor_calls_its_handler(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    heard: list[bytes] = []

    def on_readable(_events: int) -> None:
        heard.append(pair[1].recv(10))
        loop.stop()

    loop.watch(pair[1].fileno(), select.EPOLLIN, on_readable)
    pair[0].send(b"x")
    loop.run()
    assert heard == [b"x"]


def test_loop_handler_forgotten_in_the_same_turn_is_not_called(loop: Loop) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    called: list[int] = []

    def forget_the_other(descriptor: int, _events: int) -> None:
        called.append(descriptor)
        other = next(one[1].fileno() for one in pairs if one[1].fileno() != descriptor)
        loop.forget(other)
        loop.stop()

    for _, reader in pairs:
        number = reader.fileno()
        loop.watch(number, select.EPOLLIN, functools.partial(forget_the_other, number))
    for writer, _ in pairs:
        writer.send(b"x")
    loop.run()
    assert len(called) == 1
    for one in pairs:
        for end in one:
            end.close()


def test_loop_timers_fire_in_order_and_not_before_their_time(loop: Loop, clock: Clock) -> None:
    fired: list[str] = []
    loop.call_later(2, lambda: fired.append("second"))
    loop.call_later(1, lambda: fired.append("first"))
    loop.call_later(3, lambda: fired.append("third"))
    loop.call_later(0, loop.stop)
    clock.now = 2.5
    loop.run()
    assert fired == ["first", "second"]


def test_loop_cancelled_timer_does_not_fire(loop: Loop, clock: Clock) -> None:
    fired: list[str] = []
    timer = loop.call_later(1, lambda: fired.append("cancelled"))
    timer.cancel()
    timer.cancel()
    loop.call_later(1, loop.stop)
    clock.now = 5
    loop.run()
    assert not fired


def test_loop_timer_may_cancel_another_of_the_same_moment(loop: Loop, clock: Clock) -> None:
    fired: list[str] = []
    loop.call_later(1, lambda: later.cancel())
    later = loop.call_later(2, lambda: fired.append("cancelled"))
    loop.call_later(3, loop.stop)
    clock.now = 5
    loop.run()
    assert not fired


def test_loop_many_cancelled_timers_do_not_pile_up(loop: Loop) -> None:
    for _ in range(10_000):
        loop.call_later(3600, lambda: None).cancel()
    assert len(loop._timers) < 200


def test_loop_sweep_of_cancelled_timers_keeps_the_others(loop: Loop, clock: Clock) -> None:
    fired: list[int] = []
    for number in range(100):
        loop.call_later(number, functools.partial(fired.append, number))
        for _ in range(5):
            loop.call_later(1000, lambda: None).cancel()
    loop.call_later(100, loop.stop)
    clock.now = 100
    loop.run()
    assert fired == list(range(100))


LOOK = LINGER / 3.5


class Waits:
    """An epoll instance that notes how long it is asked to wait, and only says that it waited."""

    def __init__(self, loop: Loop, clock: Clock) -> None:
        self.asked: list[float] = []
        self.before_the_next: Callable[[], object] | None = None
        self._epoll, self._clock = loop._epoll, clock

    def poll(self, timeout: float, most: int) -> list[tuple[int, int]]:
        self.asked.append(timeout)
        if found := self._epoll.poll(0, most):
            return found
        self._clock.now += timeout or LOOK
        if self.before_the_next is not None:
            self.before_the_next()
        return []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)


@pytest.fixture
def waits(loop: Loop, clock: Clock) -> Waits:
    waits = Waits(loop, clock)
    loop._epoll = waits  # type: ignore[assignment]
    return waits


def test_loop_that_lingers_looks_for_a_moment_and_sleeps_then(loop: Loop, waits: Waits) -> None:
    loop.call_later(1, loop.linger)
    loop.call_later(2, loop.stop)
    loop.run()
    assert waits.asked == pytest.approx([1, 0, 0, 0, 0, 1 - 4 * LOOK])


def linger_each_second(loop: Loop, waits: Waits, seconds: int) -> list[int]:
    """Return after which of so many seconds the loop looked for a moment before it slept."""
    looked: list[int] = []

    def second(number: int) -> None:
        if 0 in waits.asked:
            looked.append(number - 1)
        waits.asked.clear()
        loop.linger()

    for number in range(1, seconds + 1):
        loop.call_later(number, functools.partial(second, number))
    loop.call_later(seconds + 1, loop.stop)
    loop.run()
    return looked


def test_loop_that_lingers_in_vain_does_so_ever_more_seldom(loop: Loop, waits: Waits) -> None:
    assert linger_each_second(loop, waits, 60) == [1, 3, 7, 15, 31]


def test_loop_that_lingers_in_vain_tries_again_some_time(
    loop: Loop, waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(echo_appliance.loop, "SKIPPED_MOST", 4)
    assert linger_each_second(loop, waits, 22) == [1, 3, 7, 12, 17]


@pytest.mark.parametrize(("awaited", "expected"), [(True, [1, 3, 4, 6]), (False, [1, 3, 4, 8])])
def test_loop_that_lingers_forgets_what_was_in_vain_when_an_event_comes_meanwhile(
    loop: Loop, waits: Waits, pair: tuple[socket.socket, socket.socket],
    awaited: bool, expected: list[int],
) -> None:  # fmt: skip
    """One that was there already has spared no sleep."""

    def on_readable(_events: int) -> None:
        pair[1].recv(1)

    def send_once() -> None:
        waits.before_the_next = None
        pair[0].send(b"x")

    def at_second_three() -> None:
        if awaited:
            waits.before_the_next = send_once
        else:
            pair[0].send(b"x")

    loop.watch(pair[1].fileno(), select.EPOLLIN, on_readable)
    loop.call_later(3, at_second_three)
    assert linger_each_second(loop, waits, 9) == expected


ONE, TWO, THREE, LATE = (1, 0.0), (2, LINGER / 2), (3, 0.0), (1, 2 * LINGER)


@pytest.mark.parametrize(
    ("turns", "brisk"),
    [
        ([ONE] * CALM, False),
        ([ONE] * CALM + [TWO], True),
        ([ONE] * CALM + [LATE], False),
        ([LATE] * CALM + [ONE], True),
        ([ONE] * CALM + [THREE], False),
        ([THREE] + [ONE] * CALM, False),
        ([THREE] + [ONE] * CALM + [TWO], True),
    ],
)
def test_loop_turn_is_brisk_when_events_come_one_by_one_and_at_once(
    loop: Loop, waits: Waits, clock: Clock, monkeypatch: pytest.MonkeyPatch,
    turns: list[tuple[int, float]], brisk: bool,
) -> None:  # fmt: skip
    left = list(turns)

    def poll(_timeout: float, _most: int) -> list[tuple[int, int]]:
        events, after = left.pop(0)
        clock.now += after
        if not left:
            loop.stop()
        return [(1000, select.EPOLLIN)] * events  # of descriptors that have been forgotten

    monkeypatch.setattr(waits, "poll", poll)
    loop.run()
    assert loop.brisk == brisk


def test_loop_signal_is_handled_in_the_loop(loop: Loop) -> None:
    loop.on_signal(signal.SIGUSR1, loop.stop)
    os.kill(os.getpid(), signal.SIGUSR1)
    loop.run()
    assert loop._stopped


def test_loop_close_gives_back_every_descriptor() -> None:
    before = os.listdir("/proc/self/fd")
    loop = Loop()
    loop.on_signal(signal.SIGUSR1, loop.stop)
    loop.close()
    assert os.listdir("/proc/self/fd") == before
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_loop_descriptor_that_is_dropped_and_closed_is_heard_of_no_more(loop: Loop) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        called: list[int] = []
        number = ours.fileno()
        loop.watch(number, select.EPOLLIN, called.append)
        loop.drop(number)
        ours.close()
        with socket.socket() as other:
            assert other.fileno() == number, "the next descriptor has its number"
            loop.watch(number, 0, lambda _events: loop.stop())  # EPOLLHUP: it is not connected
            loop.run()
            loop.forget(number)
        assert not called
