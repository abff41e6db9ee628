"""Connects to the first backend that answers, without making the loop wait.

Backends are asked one after the other, each for connect_timeout seconds.  The
addresses of one backend's name race each other: the next one starts when the
one before has failed, or has not answered for STAGGER seconds (RFC 8305,
"happy eyeballs").  When no backend answers, and until connect_retry seconds
have passed, all of them are asked again: the client just waits.
"""

import errno
import select
import socket

from ..plain import PlainSocket
from .destination import Backend, Destination
from .target import is_passed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from ..loop import Loop, Timer
    from ..target import Target
    from .greeting import Greeting
    from .resolve import Address, Resolver
    from .target import Standby

    Begun = tuple[socket.socket | None, int]

    class Caller(Protocol):
        """Who wants the connection, and owns it from connected() on."""

        def connected(self, sock: socket.socket, backend: Backend) -> None: ...
        def not_connected(self, reason: str) -> None: ...


STAGGER = 0.25  # RFC 8305 section 5: Connection Attempt Delay
FIRST_PAUSE = 0.05  # between two rounds of asking all; doubles up to LAST_PAUSE
LAST_PAUSE = 1.0
BACKLOG_PAUSE = 0.01  # a unix socket's backlog is full: nothing tells when it no longer is

_FLAGS = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_PENDING = (errno.EINPROGRESS, errno.EALREADY)
_REASONS = {
    errno.ECONNREFUSED: "connect-refused",
    errno.ECONNRESET: "connect-refused",  # what vsock calls it
    errno.ENOENT: "connect-refused",  # a unix socket that is not there (yet)
    errno.ETIMEDOUT: "connect-timeout",
    errno.EPROTO: "no-vsock-device",
}


def begin(address: "Address", kind: int) -> "Begun":
    """Begin to connect; return the socket, if there is one, and 0 or where it stands (errno)."""
    try:
        sock = PlainSocket(address[0], kind | _FLAGS)
    except OSError as error:
        return None, error.errno or 0
    try:
        number = sock.connect_ex(address[1])
        if number == errno.EINPROGRESS:
            # Over the loopback it has succeeded, or failed, by now; asking again is cheaper
            # than a turn of the loop.
            number = sock.connect_ex(address[1])
            if number == errno.EISCONN:  # the answer of vsock to one that is connected
                number = 0
    except OSError as error:  # an address that does not fit its family
        number = error.errno or errno.EINVAL
    return sock, number


class Dial:
    """One client's way to a backend; over when it calls its caller, or by cancel()."""

    __slots__ = ("_addresses", "_attempts", "_backend", "_backends", "_caller", "_destination",
                 "_kind", "_limit", "_loop", "_pause", "_reason", "_resolver", "_retry_until",
                 "_standby", "_timer")  # fmt: skip

    def __init__(
        self,
        loop: "Loop",
        resolver: "Resolver",
        standby: "Standby",
        destination: Destination,
        caller: "Caller",
        kind: int = socket.SOCK_STREAM,
    ) -> None:
        self._loop = loop
        self._resolver = resolver
        self._standby = standby
        self._destination = destination
        self._caller: Caller | None = caller
        self._kind = kind
        self._backends: list[Backend] = []  # still to be asked in this round
        self._backend: Backend | None = None  # the one that is being asked
        self._addresses: list[Address] = []  # its addresses that have not been tried
        self._attempts: dict[int, tuple[socket.socket, Address]] = {}  # those being tried
        self._limit: Timer | None = None  # when this backend's time is up
        self._timer: Timer | None = None  # when to try the next address, or all again
        self._pause = FIRST_PAUSE
        self._retry_until = loop.now + destination.connect_retry
        self._reason = "no-backend"

    def start(self, begun: "Begun | None" = None) -> None:
        """Ask the first backend, or go on with what has been begun at the only one there is.

        The caller may be called before this returns.
        """
        self._backends = list(self._destination.order(self._loop.now))
        sole = self._destination.sole
        if begun is not None and sole is not None and sole.address is not None:
            self._backend = self._backends.pop(0)
            if self._judge(sole.address, *begun):
                return
            sole.failed(self._loop.now)
        self._ask_next()

    def cancel(self) -> None:
        """Stop, without a word to the caller."""
        self._caller = None
        self._leave_backend()

    # -- one backend after the other -----------------------------------------

    def _ask_next(self) -> None:
        """Ask backends until one of them does not fail at once."""
        while self._backends:
            self._backend = self._backends.pop(0)
            if self._ask(self._backend):
                return
            self._backend.failed(self._loop.now)
        self._all_failed()

    def _ask(self, backend: Backend) -> bool:
        """Begin with a backend; False when it has failed already."""
        target = backend.target
        if backend.address is not None:
            self._addresses = []
            return self._try(backend.address)
        if is_passed(target):
            return self._ask_passed(target.path)
        addresses = self._resolver.known(target.host, target.port, self._kind)
        if addresses is not None:
            return self._race_for(backend, addresses)
        limit = self._limit_time()

        def resolved(addresses: "list[Address]") -> None:
            # Another limit, or none: too late, its time was up.
            if self._limit is limit and not self._race_for(backend, addresses):
                self._backend_failed()

        self._resolver.lookup(target.host, target.port, self._kind, resolved)
        return True

    def _ask_passed(self, name: str) -> bool:
        path = self._standby.path(name)
        if path is not None:
            self._addresses = [(socket.AF_UNIX, path)]
            return self._race()
        sock = self._standby.take(name)
        if sock is None:
            self._reason = "descriptor-used-up"
            return False
        self._succeed(sock, None)
        return True

    def _race_for(self, backend: Backend, addresses: "list[Address]") -> bool:
        if not addresses:
            self._reason = "name-not-resolved"
        # All may be tried, but the one that answered first, and the one that refused last.
        good, refused = backend.good_address, backend.refused_address
        self._addresses = sorted(addresses, key=lambda one: (one != good, one == refused))
        return self._race()

    def _backend_failed(self) -> None:
        self._leave_backend()
        if self._backend is not None:
            self._backend.failed(self._loop.now)
        self._ask_next()

    def _leave_backend(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._attempts:
            for descriptor, (sock, _) in self._attempts.items():
                self._loop.forget(descriptor)
                sock.close()
            self._attempts.clear()

    def _all_failed(self) -> None:
        caller = self._caller
        if caller is None:
            return
        if self._loop.now < self._retry_until:
            self._later(self._pause, self.start)
            self._pause = min(2 * self._pause, LAST_PAUSE)
        else:
            self._caller = None
            caller.not_connected(self._reason)

    def _later(self, delay: float, call: "Callable[[], None]") -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(delay, call)

    def _limit_time(self) -> "Timer":
        if self._limit is None:
            timeout = self._destination.connect_timeout
            self._limit = self._loop.call_later(timeout, self._time_is_up)
        return self._limit

    def _time_is_up(self) -> None:
        self._reason = "connect-timeout"
        self._backend_failed()

    # -- the addresses of one backend ------------------------------------------

    def _race(self) -> bool:
        """Try the next address; False when none is left and none is being tried."""
        while self._addresses:
            address = self._addresses.pop(0)
            if self._try(address):
                if self._addresses and self._attempts:
                    self._later(STAGGER, self._race_on)
                return True
        return bool(self._attempts)

    def _race_on(self) -> None:
        if not self._race():
            self._backend_failed()

    def _try(self, address: "Address") -> bool:
        """Begin to connect; False when that has failed already."""
        return self._judge(address, *begin(address, self._kind))

    def _judge(self, address: "Address", sock: socket.socket | None, number: int) -> bool:
        """Take what begin() has returned; False when that is a failure."""
        if sock is None:
            self._note(number)
            return False
        if not number:
            if self._backend is not None and self._backend.target.is_hybrid:
                return self._greet(sock, address, self._backend.target)
            self._succeed(sock, address)
            return True
        if number in _PENDING:
            try:
                self._loop.watch(sock.fileno(), select.EPOLLOUT, self._on_event(sock.fileno()))
            except OSError as error:  # epoll takes no more (fs.epoll.max_user_watches)
                number = error.errno or errno.ENOSPC
            else:
                self._limit_time()
                self._attempts[sock.fileno()] = (sock, address)
                return True
        sock.close()
        if number == errno.EAGAIN and address[0] == socket.AF_UNIX:
            self._limit_time()
            self._addresses.append(address)
            self._later(BACKLOG_PAUSE, self._race_on)
            return True
        self._note(number)
        return False

    def _greet(self, sock: socket.socket, address: "Address", target: "Target") -> bool:
        """Ask the device that has answered for its guest; False when it has gone already."""
        from .greeting import Greeting  # few forwarders have such a target

        try:
            greeting = Greeting(sock, target)
            self._loop.watch(sock.fileno(), select.EPOLLIN, lambda _: self._on_greeting(greeting))
        except OSError as error:
            sock.close()
            self._note(error.errno or errno.EINVAL)
            return False
        self._limit_time()
        self._attempts[sock.fileno()] = (sock, address)
        return True

    def _on_greeting(self, greeting: "Greeting") -> None:
        descriptor = greeting.sock.fileno()
        try:
            if not greeting.read():
                return
        except OSError as error:
            self._attempt_failed(descriptor, error.errno or errno.EINVAL)
            return
        self._loop.forget(descriptor)
        self._succeed(*self._attempts.pop(descriptor))

    def _attempt_failed(self, descriptor: int, number: int) -> None:
        self._loop.forget(descriptor)
        self._attempts.pop(descriptor)[0].close()
        self._note(number)
        if not self._race():
            self._backend_failed()

    def _on_event(self, descriptor: int) -> "Callable[[int], None]":
        def on_event(_events: int) -> None:
            sock, address = self._attempts[descriptor]
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if not number:
                number = sock.connect_ex(address[1])
                if number in _PENDING:
                    return  # the event of another socket that had this number
            if number not in (0, errno.EISCONN):
                self._attempt_failed(descriptor, number)
                return
            self._loop.forget(descriptor)
            del self._attempts[descriptor]
            self._succeed(sock, address)

        return on_event

    def _note(self, number: int) -> None:
        code = errno.errorcode.get(number, str(number)).lower()
        self._reason = _REASONS.get(number, f"connect-{code}")

    def _succeed(self, sock: socket.socket, address: "Address | None") -> None:
        backend, caller = self._backend, self._caller
        self.cancel()
        if backend is None or caller is None:
            raise RuntimeError("a connection that nobody asked for")
        backend.answered(address)
        caller.connected(sock, backend)
