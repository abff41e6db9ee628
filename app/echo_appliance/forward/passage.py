"""One client's connection: taken, led to a backend, relayed, ended.

The stages are the head (where the route must see the first octets), the dial,
and the relay.  Whatever ends a passage ends it alone.
"""

import select
import socket
from time import monotonic

from ..endings import reset_on_close
from .destination import Backend, Destination, ProxyVersion
from .dial import Dial, begin
from .relay import Relay
from .route import Gate, Route, admit, release
from .tune import INTERNET, tune

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..admission import Admission
    from ..loop import Timer
    from ..metrics import Counters
    from ..service import Service
    from .access_log import AccessLog
    from .head import Head
    from .proxy_protocol import Header
    from .resolve import Resolver
    from .sni import ClientHello
    from .target import Standby

# An idle connection is found by looking this often in the time it may be idle.
_LOOKS = 4


class House:
    """What everything in this process has in common."""

    __slots__ = ("access_log", "admission", "loop", "resolver", "service", "standby")

    def __init__(
        self,
        service: "Service",
        admission: "Admission",
        resolver: "Resolver",
        standby: "Standby",
        access_log: "AccessLog | None",
    ) -> None:
        self.service = service
        self.loop = service.loop
        self.admission = admission
        self.resolver = resolver
        self.standby = standby
        self.access_log = access_log


class Entrance:
    """What the connections of one inherited socket have in common; its route may change."""

    __slots__ = ("counters", "gate", "house")

    def __init__(self, house: House, route: Route, counters: "Counters") -> None:
        self.house = house
        self.gate = Gate(house.admission, route)
        self.counters = counters

    def serve(self, sock: socket.socket, source: str | None) -> None:
        """Take over a connection that the gate has admitted."""
        self.take(sock, source, self.gate.counted_as(source))

    def take(self, sock: socket.socket, source: str | None, counted_as: str | None) -> None:
        """Take over a connection from `source` that admission has counted in."""
        route = self.gate.route
        proxies = route.accept_proxy_from
        reason = ""
        if proxies is not None and source not in proxies:
            reason = "proxy-untrusted"
        elif proxies is None and not route.permits(source):
            reason = "denied"
        if not reason:
            Passage(self, route, sock, counted_as).start()
            return
        self.counters.refuse(reason)
        self.refused(sock, source, reason)
        reset_on_close(sock)
        sock.close()
        release(self.house.admission, route, counted_as)

    def refused(self, sock: socket.socket, source: str | None, reason: str) -> None:
        """Log a connection that is not taken."""
        log = self.house.access_log
        if log is not None:
            from .client import name_of

            log.passage(self.gate.route.name, name_of(sock, source), None, end=reason)


class Passage:
    """Owns the client's socket, and the backend's as soon as there is one."""

    __slots__ = ("_backend", "_client", "_destination", "_entrance", "_header", "_hello",
                 "_name", "_octets", "_relay", "_settled", "_stage",
                 "_started_at", "_target", "_timers", "_waiting", "route", "source")  # fmt: skip

    def __init__(
        self, entrance: Entrance, route: Route, client: socket.socket, source: str | None
    ) -> None:
        """`source` is what the gate counted it by."""
        self._entrance = entrance
        self.route = route
        self._client: socket.socket | None = client
        self.source = source
        self._stage: Head | Dial | None = None
        self._waiting = False  # watching the client while its backend is dialled
        self._name = ""  # for the access log, if there is one
        self._octets = b""  # read from the client, for the backend
        self._header: Header | None = None  # the client by the word of a trusted proxy
        self._hello: ClientHello | None = None
        self._destination: Destination | None = None
        self._target = ""
        self._backend: socket.socket | None = None
        self._relay: Relay | None = None
        self._settled = (0, 0)
        self._timers: tuple[Timer, ...] = ()
        self._started_at = monotonic()

    def start(self) -> None:
        """Begin with the first stage that the route has."""
        entrance, route = self._entrance, self.route
        house = entrance.house
        entrance.counters.accepted += 1
        entrance.counters.open += 1
        house.service.opened(self)
        house.service.touch()
        if house.access_log is not None and self._client is not None:
            from .client import name_of

            self._name = name_of(self._client, self.source)  # soon it may be gone
        if route.lifetime:
            self._after(route.lifetime, lambda: self.abort("lifetime"))
        try:
            if route.tls is not None or route.accept_proxy_from is not None:
                self._read_head(route)
            elif route.destination is not None:
                self._dial(route.destination)
        except OSError:
            self._end("resources", reset=True)  # epoll could not take a descriptor

    def abort(self, reason: str) -> None:
        """End it now; by a reset if that cuts its data short, so that it is seen."""
        self._end(reason, reset=self._relay is None or self._relay.unsent > 0)

    def settle(self) -> None:
        """Bring the counters up to date: the relay itself counts for this connection only."""
        if self._relay is not None:
            now = (self._relay.client.octets, self._relay.backend.octets)
            self._entrance.counters.received += now[0] - self._settled[0]
            self._entrance.counters.sent += now[1] - self._settled[1]
            self._settled = now

    # -- the head --------------------------------------------------------------

    def _read_head(self, route: Route) -> None:
        from .head import Head  # with its parsers: most routes need none

        if self._client is not None:
            proxy, tls = route.accept_proxy_from is not None, route.tls is not None
            loop = self._entrance.house.loop
            self._stage = Head(loop, self._client, self, proxy=proxy, tls=tls)

    def proxied(self, header: "Header") -> None:
        """A trusted proxy has told whose connection it is: now the route's rules can apply."""
        self._header = header
        client = header.host
        if header.anonymous and self._client is not None:
            from .client import source_of_peer

            client = source_of_peer(self._client)  # the proxy's own: what it is connected by counts
        route, total = self.route, self._entrance.house.admission
        if not route.permits(client):
            self._end("denied", reset=True)
            return
        if not admit(total, route, client):
            self._end("source-limit", reset=True)
            return
        release(total, route, self.source)  # the proxy's place is now the client's
        self.source = client

    def head_failed(self, reason: str, answer: bytes) -> None:
        """The client did not say where it wants to go."""
        self._stage = None
        self._say(answer)
        self._end(reason, reset=False)

    def head_read(self, octets: bytes, hello: "ClientHello | None") -> None:
        """All is known that the route wants to know."""
        self._stage = None
        self._octets = octets
        self._hello = hello
        destination: Destination | str | None = self.route.destination
        if self.route.tls is not None and hello is not None:
            destination = self.route.tls.find(hello.server_name, hello.protocols)
        if isinstance(destination, Destination):
            self._dial(destination)
        else:
            from . import sni

            known = destination == "tls-no-protocol"
            why = sni.NO_APPLICATION_PROTOCOL if known else sni.UNRECOGNIZED_NAME
            self._say(sni.alert(why))
            self._end(destination or "no-destination", reset=False)

    def _say(self, answer: bytes) -> None:
        if answer and self._client is not None:
            try:
                self._client.send(answer)
                self._client.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it is closed next in any case

    # -- the dial --------------------------------------------------------------

    def _dial(self, destination: Destination) -> None:
        house = self._entrance.house
        self._destination = destination
        backend, begun = destination.sole, None
        if backend is not None and backend.address is not None:
            # Mostly it answers at once: then there is nothing to look after.
            sock, number = begun = begin(backend.address, socket.SOCK_STREAM)
            if sock is not None and not number and not backend.target.is_hybrid:
                backend.answered(backend.address)
                self.connected(sock, backend)
                return
        dial = Dial(house.loop, house.resolver, house.standby, destination, self)
        self._stage = dial
        dial.start(begun)
        if self._stage is dial and self._client is not None:
            # Not there at once.  Its octets can wait, but if it goes away so may the dial.
            try:
                house.loop.watch(self._client.fileno(), 0, self._on_client_gone)
                self._waiting = True
            except OSError:
                self._end("resources", reset=True)  # epoll takes no more

    def _on_client_gone(self, events: int) -> None:
        if self._client is None:
            return
        if not events & select.EPOLLERR and _has_octets(self._client):
            # A unix socket that is closed already, but its last words are for the backend.
            self._stop_waiting()
        else:
            self._end("client-gone", reset=True)

    def _stop_waiting(self) -> None:
        if self._waiting and self._client is not None:
            self._waiting = False
            self._entrance.house.loop.forget(self._client.fileno())

    def not_connected(self, reason: str) -> None:
        """No backend answered: the client sees what it would have seen there."""
        self._stage = None
        self._end(reason, reset=True)

    def connected(self, sock: socket.socket, backend: Backend) -> None:
        """A backend is there: relay."""
        self._stage = None
        if self._waiting:
            self._stop_waiting()
        self._backend = sock
        self._target = backend.target.text
        client, route, loop = self._client, self.route, self._entrance.house.loop
        if client is None:
            raise RuntimeError("a backend for a client that is gone")
        self._relay = relay = Relay(loop, self, client, sock)
        relay.client.octets = len(self._octets)  # the head's were read before there was a relay
        if route.idle_timeout:
            self._after(route.idle_timeout / _LOOKS, lambda: self._look_for_idleness(0, -1))
        try:
            head, self._octets = self._head_for_backend() + self._octets, b""
            relay.start(head)
        except OSError:
            self._end("reset", reset=True)
        if self._backend is not None and sock.family in INTERNET:
            tune(sock, route.keepalive)

    def _head_for_backend(self) -> bytes:
        if self._destination is None or self._destination.proxy_protocol is ProxyVersion.NONE:
            return b""
        from . import proxy_protocol
        from .client import header_of

        header = self._header
        if header is None and self._client is not None:
            header = header_of(self._client)
        if header is None:
            return b""
        if self._destination.proxy_protocol is ProxyVersion.V1:
            return proxy_protocol.serialize_v1(header)
        return proxy_protocol.serialize_v2(header)

    # -- the end -----------------------------------------------------------------

    def relay_ended(self, reason: str, reset: bool) -> None:
        """One side failed, or both are through."""
        self._end(reason, reset=reset)

    def _end(self, reason: str, *, reset: bool) -> None:
        client, self._client = self._client, None
        if client is None:
            return
        entrance = self._entrance
        if self._waiting:
            entrance.house.loop.forget(client.fileno())
        for timer in self._timers:
            timer.cancel()
        if self._stage is not None:
            self._stage.cancel()
        if self._relay is not None:
            self._relay.end()
        if entrance.house.access_log is not None:
            self._log(entrance.house.access_log, reason)
        backend, self._backend = self._backend, None
        for sock in (client, backend):
            if sock is not None:
                if reset:
                    reset_on_close(sock)
                sock.close()
        self._count_out(reason)

    def _count_out(self, reason: str) -> None:
        entrance = self._entrance
        house = entrance.house
        self.settle()
        if reason != "eof":
            entrance.counters.end(reason)
        entrance.counters.open -= 1
        release(house.admission, self.route, self.source)
        house.service.touch()
        house.service.closed(self)

    def _log(self, log: "AccessLog", reason: str) -> None:
        relay = self._relay
        log.passage(
            self.route.name, self._name, self._header,
            target=self._target,
            octets=(relay.client.octets, relay.backend.octets) if relay else (0, 0),
            seconds=monotonic() - self._started_at,
            server_name=self._hello.server_name if self._hello is not None else None,
            end=reason,
        )  # fmt: skip

    # -- time --------------------------------------------------------------------

    def _after(self, delay: float, call: "Callable[[], None]") -> None:
        self._timers = (*self._timers, self._entrance.house.loop.call_later(delay, call))

    def _look_for_idleness(self, looks: int, octets: int) -> None:
        # Looking back from time to time, instead of moving a timer at every octet.
        relay = self._relay
        if relay is None:
            return
        moved = relay.client.octets + relay.backend.octets
        looks = looks + 1 if moved == octets else 0
        if looks >= _LOOKS:
            self.abort("idle-timeout")
            return
        timer = self._entrance.house.loop.call_later(
            self.route.idle_timeout / _LOOKS, lambda: self._look_for_idleness(looks, moved)
        )
        self._timers = (*self._timers[:-1], timer)


def _has_octets(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except OSError:
        return False
