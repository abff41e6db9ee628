"""`echo-appliance forward`: from options, configuration and inherited sockets to a Service."""

import signal
import socket
import sys

from ..accept import Acceptor, source_of
from ..admission import Admission
from ..errors import ParseError, SetupError, say
from ..inherit import Inherited, check_metrics, describe_all, take
from ..limits import connection_limit
from ..loop import Loop
from ..metrics import SOCKET_NAME as METRICS
from ..metrics import Registry, render
from ..notify import ServiceManager
from ..options import ArgumentError, Parser, add_service_options, count, seconds
from ..service import Lifetimes, Service
from . import config
from .passage import Entrance, House, Passage, set_keepalive
from .resolve import Resolver
from .route import EVERY_NAME, Route, admit
from .target import Standby, is_passed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..metrics import Snapshot
    from ..service import Manager
    from .access_log import AccessLog

    Routes = dict[str, Route]

DESCRIPTORS_EACH = 2  # the client's and the backend's


class Options:
    """What the command line says; filled by the parser."""

    to: list[str]
    config: str | None
    check: bool
    connect_timeout: float | None
    connect_retry: float | None
    balance: str | None
    proxy_protocol: str | None
    keepalive: int | None
    access_log: str | None
    max_connections: int | None
    max_connections_per_source: int
    idle_timeout: float
    exit_idle: float
    drain: float
    start_sleep: float
    workers: int
    debug: bool


def main(arguments: "Sequence[str]") -> int:
    """Run the mode; return the exit status.  Raises SetupError, in words for the user."""
    options = _parse(arguments)
    try:
        routes = _load(options)
    except ParseError as error:
        raise SetupError(str(error)) from error
    if options.workers > 1:
        raise SetupError("forward serves in one process: drop --workers")
    if options.check:
        sys.stdout.write(config.describe(routes))
        return 0
    forwarder = Forwarder(options, routes, take())
    return forwarder.run()


def _parse(arguments: "Sequence[str]") -> Options:
    parser = Parser(
        "echo-appliance forward", "Relay every inherited socket to a target, in both directions."
    )
    parser.group("where to (one of the two)")
    parser.add(
        "--to", _each(), default=[], metavar="TARGET",
        help="where all sockets lead, as tcp:HOST:PORT, unix:/path, unix:@name, vsock:CID:PORT,"
        " udp:HOST:PORT, unix-dgram:/path or fd:NAME; given again: others that do the same",
    )  # fmt: skip
    parser.add("--config", metavar="FILE", help="routes by descriptor name, as TOML")
    parser.add("--check", default=False, help="say what the configuration means, and exit")
    _add_ways(parser)
    add_service_options(parser)
    options = parser.parse(arguments, Options())
    if bool(options.to) == (options.config is not None):
        parser.error("say where to: either --to TARGET or --config FILE")
    return options


def _add_ways(parser: Parser) -> None:
    parser.group("ways, where the configuration says nothing else")
    parser.add(
        "--connect-timeout", seconds, metavar="S",
        help="give a backend S seconds to answer (default: 5)",
    )  # fmt: skip
    parser.add(
        "--connect-retry", seconds, metavar="S",
        help="while no backend answers, let the client wait, and ask again for S seconds",
    )  # fmt: skip
    parser.add(
        "--balance", metavar="HOW",
        help="which of several targets is asked first: first-alive (default) or round-robin",
    )  # fmt: skip
    parser.add(
        "--proxy-protocol", metavar="VERSION",
        help="tell backends the client's address in a PROXY header: v1, v2 or none (default)",
    )  # fmt: skip
    parser.add(
        "--keepalive", count, metavar="S",
        help="let TCP ask after S silent seconds whether a peer is there (default: never)",
    )  # fmt: skip
    parser.group("log")
    parser.add(
        "--access-log", _log_form, metavar="FORM",
        help="write a line per connection to standard output, as text or json",
    )  # fmt: skip


def _each() -> "Callable[[str], list[str]]":
    """Read an option that may be given several times."""
    values: list[str] = []

    def read(text: str) -> list[str]:
        values.append(text)
        return values

    return read


def _log_form(text: str) -> str:
    if text not in ("text", "json"):
        raise ArgumentError(f"{text!r} is neither text nor json")
    return text


def _load(options: Options) -> "Routes":
    """Return the routes.  Raises ParseError."""
    given: dict[str, object] = {
        "connect-timeout": options.connect_timeout,
        "connect-retry": options.connect_retry,
        "balance": options.balance,
        "proxy-protocol": options.proxy_protocol,
        "keepalive": options.keepalive,
        "idle-timeout": options.idle_timeout or None,
    }
    defaults = {key: value for key, value in given.items() if value is not None}
    if options.config is not None:
        return config.load(options.config, defaults)
    return config.parse({"route": {EVERY_NAME: {"to": options.to}}}, defaults)


class Counts:
    """The registry's counts, with those of open connections brought up to date."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.service: Service | None = None

    def snapshot(self) -> "Snapshot":
        """Return the values of this moment."""
        if self.service is not None:
            for connection in self.service.connections:
                if isinstance(connection, Passage):
                    connection.settle()
        return self.registry.snapshot()

    def page(self) -> str:
        """Return the metrics page."""
        return render(self.snapshot())


class Forwarder:
    """The sockets that were passed, and the routes that are in force for them."""

    def __init__(self, options: Options, routes: "Routes", sockets: list[Inherited]) -> None:
        self._options = options
        self._metrics = [one for one in sockets if one.name == METRICS]
        passed = _passed_names(routes)
        self._standby = [one for one in sockets if one.name in passed]
        self._served = [one for one in sockets if one.name not in (METRICS, *passed)]
        self._entrances: list[tuple[Inherited, Entrance]] = []
        self._restart: list[Callable[[], None]] = []
        check_metrics(self._metrics)
        self._check(routes)
        self._routes = routes

    def run(self) -> int:
        """Serve; return the exit status."""
        limit = connection_limit(self._options.max_connections, DESCRIPTORS_EACH)
        registry = Registry()
        counts = Counts(registry)
        service = self._build(Loop(), ServiceManager(), counts, limit)
        if self._metrics:
            from ..metrics_http import serve_metrics

            for inherited in self._metrics:
                serve_metrics(service, inherited, counts)
        service.obey_signals()
        return service.run()

    def _build(self, loop: Loop, manager: "Manager", counts: Counts, limit: int) -> Service:
        """Put an entrance on each socket; what they share is made here."""
        options = self._options
        lifetimes = Lifetimes(options.drain, options.exit_idle, options.start_sleep)
        serves = describe_all(self._served)
        service = Service(loop, manager, counts, lifetimes, serves, options.debug)
        counts.service = service
        admission = Admission(limit, options.max_connections_per_source)
        house = House(service, admission, Resolver(loop), self._keep_standby(), self._access_log())
        for inherited in self._served:
            self._serve(house, inherited, counts.registry)
        loop.on_signal(signal.SIGHUP, self._reload)
        return service

    def _serve(self, house: House, inherited: Inherited, registry: Registry) -> None:
        route = _route_of(self._routes, inherited.name)
        entrance = Entrance(house, route, registry.counters(inherited.name))
        self._entrances.append((inherited, entrance))
        service = house.service
        if inherited.is_dgram:
            from .datagram import Datagrams

            service.add_source(Datagrams(entrance, inherited))
        elif inherited.listening:
            set_keepalive(inherited.socket, route.keepalive)  # connections inherit it
            acceptor = Acceptor(
                service.loop, inherited, entrance.gate, entrance.counters, entrance.serve,
                service.source_lost,
            )  # fmt: skip
            service.add_source(acceptor)
            self._restart.append(acceptor.start)
        else:
            # What systemd accepted for us (Accept=yes) is served whatever the limits are.
            admit(house.admission, route, None)
            service.at_start(lambda: entrance.take(inherited.socket, _peer(inherited), None))

    def _keep_standby(self) -> Standby:
        standby = Standby()
        for inherited in self._standby:
            standby.add(inherited.name, inherited.socket)
        return standby

    def _access_log(self) -> "AccessLog | None":
        if self._options.access_log is None:
            return None
        from .access_log import AccessLog

        return AccessLog(self._options.access_log)

    # -- routes ------------------------------------------------------------------

    def _reload(self) -> None:
        """Put a changed configuration in force; open connections keep their route."""
        if self._options.config is None:
            say("SIGHUP: there is no --config to read again")
            return
        try:
            routes = _load(self._options)
            self._check(routes)
        except (ParseError, SetupError) as error:
            say(f"SIGHUP: {error}; the old configuration stays")
            return
        self._routes = routes
        for inherited, entrance in self._entrances:
            route = _route_of(routes, inherited.name)
            entrance.gate.route = route
            set_keepalive(inherited.socket, route.keepalive)
        for restart in self._restart:
            restart()  # one that waited for room may have it now
        say(f"SIGHUP: {self._options.config} is in force")

    def _check(self, routes: "Routes") -> None:
        """Raise SetupError unless routes and sockets fit each other."""
        if not self._served:
            raise SetupError("no socket to forward was passed: pass one besides metrics and fd:")
        names = {one.name for one in self._served}
        for name in routes:
            if name not in names and name != EVERY_NAME:
                raise SetupError(
                    f"route.{name}: no descriptor has this name, only {', '.join(sorted(names))}: "
                    f"set FileDescriptorName={name} in the socket unit"
                )
        for inherited in self._served:
            _check_fit(inherited, routes)
        for name in _passed_names(routes):
            _check_standby(name, [one for one in self._standby if one.name == name])


def _peer(inherited: Inherited) -> str | None:
    """Return the source of a connection that was passed as such, for the route's rules."""
    try:
        return source_of(inherited.family, inherited.socket.getpeername())
    except OSError:
        return None  # it was reset; the relay will find out


def _route_of(routes: "Routes", name: str) -> Route:
    return routes[name] if name in routes else routes[EVERY_NAME]


def _passed_names(routes: "Routes") -> set[str]:
    """Return the names of the descriptors that are targets."""
    return {
        backend.target.path
        for route in routes.values()
        for destination in route.destinations()
        for backend in destination.backends
        if is_passed(backend.target)
    }


def _check_fit(inherited: Inherited, routes: "Routes") -> None:
    name = inherited.name
    if name not in routes and EVERY_NAME not in routes:
        raise SetupError(f"{inherited} has no route: add [route.{name}] to the configuration")
    if inherited.type not in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        raise SetupError(f"{inherited} cannot be forwarded: pass stream or dgram sockets")
    route = _route_of(routes, name)
    kinds = {
        backend.target.type
        for destination in route.destinations()
        for backend in destination.backends
    }
    if inherited.is_dgram and (route.tls is not None or route.accept_proxy_from is not None):
        raise SetupError(f"{inherited}: TLS rules and PROXY headers are for streams")
    if kinds != {inherited.type}:
        raise SetupError(f"{inherited}: a stream needs a stream's target, a dgram a dgram's")


def _check_standby(name: str, sockets: list[Inherited]) -> None:
    if not sockets:
        raise SetupError(f"target fd:{name}: no descriptor has this name")
    for inherited in sockets:
        if inherited.listening or not inherited.connected:
            raise SetupError(f"target fd:{name}: {inherited} is not connected to a backend")
