"""Resolves host names without making the loop wait: one thread per name that is being asked for.

getaddrinfo(3) tells no time to live, so an answer is good for LIFETIME seconds
and a failure for FAILURE_LIFETIME; when a name cannot be resolved again, its
last answer is used on.
"""

import os
import select
import socket

from ..errors import say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..loop import Loop

    # family, address as socket.connect() takes it
    Address = tuple[int, tuple[object, ...] | str]
    # Takes the addresses; none when the name could not be resolved.
    Answered = Callable[[list[Address]], None]

LIFETIME = 30.0
FAILURE_LIFETIME = 1.0


class _Name:
    """What is known about one name, and who waits to know."""

    __slots__ = ("addresses", "until", "waiting")

    def __init__(self) -> None:
        self.addresses: list[Address] = []
        self.until = 0.0
        self.waiting: list[Answered] = []


class Resolver:
    """Answers in the loop's thread.  The number of names is that of the configuration."""

    def __init__(self, loop: "Loop") -> None:
        self._loop = loop
        self._names: dict[tuple[str, int, int], _Name] = {}
        self._done: list[tuple[_Name, list[Address]]] = []
        self._wakeup = -1

    def known(self, host: str, port: int, kind: int) -> "list[Address] | None":
        """Return the addresses; none when there are none, None when that must be asked."""
        name = self._names.get((host, port, kind))
        return name.addresses if name is not None and name.until > self._loop.now else None

    def lookup(self, host: str, port: int, kind: int, answered: "Answered") -> None:
        """Ask, and call answered(addresses) later."""
        name = self._names.setdefault((host, port, kind), _Name())
        name.waiting.append(answered)
        if len(name.waiting) > 1:
            return  # it is being asked for
        try:
            self._ask(name, host, port, kind)
        except (OSError, RuntimeError) as error:  # no descriptor or no thread (TasksMax=) is left
            say(f"{host} cannot be looked up: {error}")
            self._loop.call_later(0, lambda: self._take(name, []))

    def _ask(self, name: _Name, host: str, port: int, kind: int) -> None:
        import _thread  # what threading adds is of no use here, and takes time to import

        self._wait_for_threads()

        def ask() -> None:
            self._done.append((name, _resolve(host, port, kind)))
            os.eventfd_write(self._wakeup, 1)

        _thread.start_new_thread(ask, ())

    def _wait_for_threads(self) -> None:
        if self._wakeup >= 0:
            return
        wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._loop.watch(wakeup, select.EPOLLIN, self._on_done)
        except OSError:
            os.close(wakeup)
            raise
        self._wakeup = wakeup

    def _on_done(self, _events: int) -> None:
        try:
            os.eventfd_read(self._wakeup)
        except BlockingIOError:
            return
        while self._done:
            self._take(*self._done.pop(0))

    def _take(self, name: _Name, addresses: "list[Address]") -> None:
        name.addresses = addresses or name.addresses
        name.until = self._loop.now + (LIFETIME if addresses else FAILURE_LIFETIME)
        waiting, name.waiting = name.waiting, []
        for answered in waiting:
            answered(name.addresses)


def _resolve(host: str, port: int, kind: int) -> "list[Address]":
    try:
        # As octets: a str goes through the idna codec, which is a large import.
        found = socket.getaddrinfo(host.encode(), port, type=kind)
    except OSError:
        return []
    return interleave([(int(family), address) for family, _, _, _, address in found])


def interleave(addresses: "list[Address]") -> "list[Address]":
    """Let the families alternate, beginning with the first one's (RFC 8305 section 4).

    The order within a family is kept: it is that of RFC 6724.
    """
    if not addresses:
        return []
    first = addresses[0][0]
    some = [one for one in addresses if one[0] == first]
    others = [one for one in addresses if one[0] != first]
    mixed: list[Address] = []
    while some or others:
        mixed += some[:1] + others[:1]
        some, others = some[1:], others[1:]
    return mixed
