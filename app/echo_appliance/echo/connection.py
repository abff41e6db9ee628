"""What stream and seqpacket echo share: a connection's ownership, idleness and end."""

import select
import socket

from ..endings import reason_of, reset_on_close
from ..errors import say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..admission import Admission
    from ..metrics import Counters
    from ..service import Service


class Endpoint:
    """What all connections of one inherited socket have in common."""

    __slots__ = (
        "admission", "counters", "debug", "idle_timeout", "loop", "name", "service", "watches",
    )  # fmt: skip

    def __init__(
        self,
        service: "Service",
        admission: "Admission",
        counters: "Counters",
        name: str,
        *,
        idle_timeout: float = 0.0,
        debug: bool = False,
    ) -> None:
        self.service = service
        self.loop = service.loop
        self.admission = admission
        self.name = name
        self.counters = counters
        self.idle_timeout = idle_timeout  # seconds; 0: none
        self.debug = debug
        self.watches = debug or idle_timeout > 0  # whether anybody asks what each event moved

    def trace(self, received: int, sent: int) -> None:
        """Say what --debug promises: octets in and out, with the descriptor's name."""
        say(f"debug: received {received} octets, sent {sent} octets on {self.name!r}")


class Connection:
    """One admitted peer.  Owns its socket; whatever happens to it ends it alone."""

    __slots__ = ("_endpoint", "_socket", "_source", "_timer", "_touched_at")

    def __init__(self, endpoint: Endpoint, sock: socket.socket, source: str | None) -> None:
        """Serve a connection that admission has counted in under `source`.

        Raises OSError, and leaves the socket and admission as they were, when it cannot.
        """
        self._endpoint = endpoint
        self._socket = sock
        self._source = source
        self._touched_at = endpoint.loop.now
        self._timer = None
        endpoint.loop.watch(sock.fileno(), select.EPOLLIN, self.on_event)  # first: it may fail
        endpoint.counters.accepted += 1
        endpoint.counters.open += 1
        endpoint.service.opened(self)
        endpoint.service.touch()
        if endpoint.idle_timeout:
            self._timer = endpoint.loop.call_later(endpoint.idle_timeout, self._check_idleness)

    def on_event(self, events: int) -> None:
        """Read, send back, and end when there is no more."""
        raise NotImplementedError

    @property
    def unsent(self) -> int:
        """How many octets were read and not sent back yet."""
        raise NotImplementedError

    def abort(self, reason: str) -> None:
        """End the connection now; if that cuts its data short, by a reset, so that it is seen."""
        if self.unsent:
            reset_on_close(self._socket)
        self._endpoint.counters.end(reason)
        self._close()

    def _fail(self, error: OSError) -> None:
        self._endpoint.counters.end(reason_of(error))
        self._close()

    def _close(self) -> None:
        endpoint = self._endpoint
        endpoint.loop.forget(self._socket.fileno())
        self._socket.close()
        if self._timer is not None:
            self._timer.cancel()
        endpoint.counters.open -= 1
        endpoint.service.touch()
        endpoint.admission.release(self._source)
        endpoint.service.closed(self)

    def _note(self, received: int, sent: int) -> None:
        """Keep what only an idle timeout and --debug want to know of an event."""
        endpoint = self._endpoint
        self._touched_at = endpoint.loop.now
        if endpoint.debug:
            endpoint.trace(received, sent)

    def _check_idleness(self) -> None:
        # One timer that looks back, instead of one that is moved at every octet.
        endpoint = self._endpoint
        rest = self._touched_at + endpoint.idle_timeout - endpoint.loop.now
        if rest > 0:
            self._timer = endpoint.loop.call_later(rest, self._check_idleness)
        else:
            self._timer = None
            self.abort("idle-timeout")
