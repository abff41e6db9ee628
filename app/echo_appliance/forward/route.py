"""What is done with the connections of one descriptor name.  Values; knows no I/O."""

from ..admission import Admission

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .destination import Destination
    from .peers import Peers
    from .tls_rules import TlsRules

EVERY_NAME = "*"  # the route of descriptors that have none of their own


class Route:
    """Rules, limits and destinations.  Made by config.parse(), and never changed."""

    __slots__ = ("accept_proxy_from", "admission", "allow", "answers_in", "deny", "destination",
                 "idle_timeout", "keepalive", "lifetime", "max_connections",
                 "max_connections_per_source", "name", "tls")  # fmt: skip

    def __init__(self, name: str) -> None:
        self.name = name
        self.destination: Destination | None = None  # without tls, or when no tls rule matches
        self.tls: TlsRules | None = None
        self.allow: Peers | None = None
        self.deny: Peers | None = None
        self.accept_proxy_from: Peers | None = None
        self.answers_in = ""  # the folder for the sockets that unix datagram backends answer to
        self.idle_timeout = 0.0  # seconds; 0: none
        self.lifetime = 0.0
        self.keepalive = 0  # seconds of silence after which TCP asks whether the peer is there
        self.max_connections = 0  # 0: no limit
        self.max_connections_per_source = 0
        self.admission = Admission(0, 0)

    def permits(self, source: str | None) -> bool:
        """Whether this client may connect: what is denied may not, nor what no `allow` names."""
        if self.deny is not None and source in self.deny:
            return False
        return self.allow is None or source in self.allow

    def destinations(self) -> "list[Destination]":
        """Return all places this route may lead to."""
        found = list(self.tls.destinations()) if self.tls is not None else []
        return [self.destination, *found] if self.destination is not None else found


class Gate:
    """Admission for one listener: the limits of the process, and of the route it has now.

    A trusted proxy brings many clients: it is counted by none of them, and each
    of its clients when the header has told who that is.
    """

    __slots__ = ("_total", "route")

    def __init__(self, total: Admission, route: Route) -> None:
        self._total = total
        self.route = route

    @property
    def full(self) -> bool:
        """Whether no connection at all may be accepted now."""
        return self._total.full or self.route.admission.full

    def admit(self, source: str | None) -> bool:
        """Count a connection in, or refuse it because its source has its share."""
        return admit(self._total, self.route, self.counted_as(source))

    def release(self, source: str | None) -> None:
        """Count a connection out that has not been served."""
        release(self._total, self.route, self.counted_as(source))

    def counted_as(self, source: str | None) -> str | None:
        """Return what a new connection is counted by."""
        return None if self.route.accept_proxy_from is not None else source

    def pause(self) -> None:
        """Note that we take no more for now, while more may wait."""
        self._total.pause()

    def wait_for_room(self, resume: "Callable[[], None]") -> None:
        """Call resume() once, when there may be room."""
        full = self._total if self._total.full else self.route.admission
        full.wait_for_room(resume)


def admit(total: Admission, route: Route, source: str | None) -> bool:
    """Count a connection in with both, or with neither."""
    if not route.admission.admit(source):
        return False
    if total.admit(source):
        return True
    route.admission.release(source)
    return False


def release(total: Admission, route: Route, source: str | None) -> None:
    """Count an admitted connection out."""
    route.admission.release(source)
    total.release(source)
