"""A loop whose time is an argument, sockets that answer what was scripted, and a manager."""

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from echo_appliance.metrics import Snapshot


def nothing_taken(_connection: socket.socket, _source: str | None) -> None:
    """What an acceptor hands connections to when there will be none."""


class FakeTimer:
    """What call_later() returned."""

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class FakeLoop:
    """Descriptors are noted, timers fire in advance(), signals in signal()."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.turn = 0
        self.brisk = False
        self.lingers = False
        self.watched: dict[int, int] = {}
        self.handlers: dict[int, Callable[[int], None]] = {}
        self.timers: list[FakeTimer] = []
        self.signals: dict[int, Callable[[], object]] = {}
        self.stopped = False

    def watch(self, descriptor: int, events: int, handler: Callable[[int], None]) -> None:
        assert descriptor not in self.watched
        self.watched[descriptor] = events
        self.handlers[descriptor] = handler

    def rewatch(self, descriptor: int, events: int) -> None:
        assert self.watched[descriptor] != events, "a system call for nothing"
        self.watched[descriptor] = events

    def forget(self, descriptor: int) -> None:
        del self.watched[descriptor]
        del self.handlers[descriptor]

    def discard(self, descriptor: int) -> None:
        self.watched.pop(descriptor, None)

    def call_later(self, delay: float, callback: Callable[[], None]) -> FakeTimer:
        assert delay >= 0
        timer = FakeTimer(self.now + delay, callback)
        self.timers.append(timer)
        return timer

    def linger(self) -> None:
        self.lingers = True

    def on_signal(self, number: int, handler: Callable[[], object]) -> None:
        self.signals[number] = handler

    def run(self) -> None:
        """Return at once: the test turns the loop."""

    def stop(self) -> None:
        self.stopped = True

    def advance(self, seconds: float) -> None:
        """Let time pass, and fire what falls due, in order."""
        end = self.now + seconds
        while True:
            due = [timer for timer in self.timers if timer.callback and timer.when <= end]
            if not due:
                break
            timer = min(due, key=lambda timer: timer.when)
            self.now = max(self.now, timer.when)
            callback, timer.callback = timer.callback, None
            assert callback is not None
            callback()
        self.now = end


class ScriptedSocket:
    """recv_into() and send() do what the test queued; nothing queued is EAGAIN."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.incoming: list[bytes | OSError] = []
        self.room: list[int | OSError] = []
        self.sent = bytearray()
        self.closed = False
        self.options: list[tuple[object, ...]] = []
        self.error = 0  # SO_ERROR
        self.shut = 0  # how often it was shut down for writing
        self.shutdown_error: OSError | None = None

    def fileno(self) -> int:
        return self.descriptor

    def recv_into(self, buffer: bytearray) -> int:
        if not self.incoming:
            raise BlockingIOError
        octets = self.incoming.pop(0)
        if isinstance(octets, OSError):
            raise octets
        buffer[: len(octets)] = octets
        return len(octets)

    def send(self, octets: bytes) -> int:
        if not self.room:
            raise BlockingIOError
        room = self.room.pop(0)
        if isinstance(room, OSError):
            raise room
        taken = bytes(octets[:room])
        self.sent += taken
        return len(taken)

    def setsockopt(self, *option: object) -> None:
        self.options.append(option)

    def getsockopt(self, *option: object) -> int:
        assert option == (socket.SOL_SOCKET, socket.SO_ERROR)
        return self.error

    def shutdown(self, how: int) -> None:
        assert how == socket.SHUT_WR
        if self.shutdown_error is not None:
            raise self.shutdown_error
        self.shut += 1

    def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True


class FakeManager:
    """Keeps a line per message."""

    cannot_ask = False

    def __init__(self, alive_interval: float | None = None) -> None:
        self.alive_interval = alive_interval
        self.heard: list[str] = []

    def ready(self, serves: str) -> None:
        self.heard.append(f"ready {serves}")

    def report(self, serves: str, _snapshot: "Snapshot") -> None:
        self.heard.append(f"report {serves}")

    def stopping(self, why: str) -> None:
        self.heard.append(f"stopping {why}")

    def full(self) -> None:
        self.heard.append("full")

    def alive(self) -> None:
        self.heard.append("alive")
