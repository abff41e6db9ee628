"""The sockets that were passed, the routes in force for them, and the processes that serve them."""

import signal

from ..accept import Acceptor
from ..admission import Admission
from ..errors import ParseError, SetupError, say
from ..inherit import Inherited, check_metrics, describe_all
from ..limits import connection_limit, share
from ..loop import Loop
from ..metrics import SOCKET_NAME as METRICS
from ..metrics import Registry, render
from ..notify import ServiceManager
from ..service import Lifetimes, Service
from .fit import check_fit, check_shared, passed_names
from .passage import Entrance, House, Passage
from .resolve import Resolver
from .route import EVERY_NAME, Route, admit
from .target import Standby
from .tune import set_keepalive

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..inherit import PassedPath
    from ..metrics import Snapshot
    from ..service import Manager
    from ..workers import Link
    from .access_log import AccessLog
    from .command import Options
    from .datagram import Session

    Routes = dict[str, Route]

DESCRIPTORS_EACH = 2  # the client's and the backend's


class Counts:
    """The registry's counts, with those of open connections brought up to date."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.service: Service | None = None
        self.access_log: AccessLog | None = None

    def snapshot(self) -> "Snapshot":
        """Return the values of this moment."""
        if self.service is not None:
            for connection in self.service.connections:
                if isinstance(connection, Passage):
                    connection.settle()
        snapshot = self.registry.snapshot()
        if self.access_log is not None:
            snapshot[("dropped_log_lines_total", "", "")] = self.access_log.dropped
        return snapshot

    def page(self) -> str:
        """Return the metrics page."""
        return render(self.snapshot())


class Forwarder:
    """Serves in this process, or in workers that it is copied into."""

    def __init__(
        self,
        options: "Options",
        load: "Callable[[], Routes]",
        routes: "Routes",
        sockets: list[Inherited],
        paths: "list[PassedPath]",
    ) -> None:
        """load() reads the routes again.  Raises SetupError unless all of it fits together."""
        self._options = options
        self._load = load
        self._routes = routes
        self._metrics = [one for one in sockets if one.name == METRICS]
        passed = passed_names(routes)
        self._standby = [one for one in sockets if one.name in passed]
        self._served = [one for one in sockets if one.name not in (METRICS, *passed)]
        self._paths = paths
        self._limit = connection_limit(options.max_connections, DESCRIPTORS_EACH)
        self._service: Service | None = None  # of this process, once it is built
        self._number = 0  # which worker this is, from 0
        self._entrances: list[tuple[Inherited, Entrance]] = []
        self._restart: list[Callable[[], None]] = []
        check_metrics(self._metrics)
        self._check(routes)

    def run(self) -> int:
        """Serve; return the exit status."""
        if self._options.workers > 1:
            return self._run_workers()
        counts = Counts()
        service = self._build(Loop(), ServiceManager(), counts, self._limit)
        if self._metrics:
            from ..metrics_http import serve_metrics

            for inherited in self._metrics:
                serve_metrics(service, inherited, counts)
        service.obey_signals()
        service.loop.on_signal(signal.SIGHUP, self._reload)
        return service.run()

    def _run_workers(self) -> int:
        from ..workers import supervise

        options = self._options
        lifetimes = Lifetimes(options.drain, options.exit_idle, options.start_sleep)

        def build(loop: Loop, link: "Link", number: int) -> Service:
            self._number = number
            limit = share(self._limit, number, options.workers)
            service = self._build(loop, link, Counts(), limit)
            service.on_reload = self._follow
            return service

        serves = describe_all(self._served)
        return supervise(options.workers, build, lifetimes, serves, self._metrics, self._reload)

    def _build(self, loop: Loop, manager: "Manager", counts: Counts, limit: int) -> Service:
        """Put an entrance on each socket; what they share is made here."""
        options = self._options
        start_sleep = options.start_sleep if options.workers == 1 else 0.0  # the supervisor's, then
        lifetimes = Lifetimes(options.drain, options.exit_idle, start_sleep)
        serves = describe_all(self._served)
        service = Service(loop, manager, counts, lifetimes, serves, options.debug)
        counts.service = service
        admission = Admission(limit, options.max_connections_per_source, manager.full)
        counts.access_log = log = self._access_log()
        if log is not None:
            service.on_end = log.close
        house = House(service, admission, Resolver(loop), self._keep_standby(), log)
        self._take_shares(self._routes)
        self._service = service
        datagrams = [one for one in self._served if one.is_dgram]
        for inherited in self._served:
            # A client's datagrams must all come to the process that has its session.
            if not inherited.is_dgram or self._is_mine(datagrams.index(inherited)):
                self._serve(house, inherited, counts.registry)
        return service

    def _is_mine(self, place: int) -> bool:
        return place % self._options.workers == self._number

    def _serve(self, house: House, inherited: Inherited, registry: Registry) -> None:
        route = _route_of(self._routes, inherited.name)
        entrance = Entrance(house, route, registry.counters(inherited.name))
        self._entrances.append((inherited, entrance))
        service = house.service
        if inherited.is_dgram:
            from .datagram import Datagrams

            service.add_source(Datagrams(entrance, inherited))
        elif inherited.listening:
            if route.keepalive:
                _set_keepalive(inherited, route)
            acceptor = Acceptor(
                service.loop, inherited, entrance.gate, entrance.counters, entrance.serve,
                service.source_lost, entrance.refused,
            )  # fmt: skip
            service.add_source(acceptor)
            # Not before we serve: a reload during --start-sleep must not end that.
            service.at_start(lambda: self._restart.append(acceptor.start))
        else:
            # What systemd accepted for us (Accept=yes) is served whatever the limits are.
            admit(house.admission, route, None)
            from .client import source_of_peer

            peer = source_of_peer(inherited.socket)
            service.at_start(lambda: entrance.take(inherited.socket, peer, None))

    def _keep_standby(self) -> Standby:
        standby = Standby()
        for inherited in self._standby:
            standby.add(inherited.name, inherited.socket)
        for path in self._paths:
            standby.add_path(path.name, path.path)
        return standby

    def _access_log(self) -> "AccessLog | None":
        if self._options.access_log is None:
            return None
        from .access_log import AccessLog

        return AccessLog(self._options.access_log)

    # -- routes ------------------------------------------------------------------

    def _reload(self) -> bool:
        """Put a changed configuration in force; False, in words, when it cannot be.

        Open connections keep their route.
        """
        if self._options.config is None:
            say("SIGHUP: there is no --config to read again")
            return False
        try:
            routes = self._load()
            self._check(routes)
        except (ParseError, SetupError) as error:
            say(f"SIGHUP: {error}; the old configuration stays")
            return False
        self._put_in_force(routes)
        say(f"SIGHUP: {self._options.config} is in force")
        return True

    def _follow(self) -> None:
        """Do in a worker what the supervisor has found good, and said so."""
        try:
            routes = self._load()
            self._check(routes)
        except (ParseError, SetupError) as error:  # changed again: the next signal is about that
            say(f"SIGHUP: a worker keeps the old configuration: {error}")
            return
        self._put_in_force(routes)

    def _put_in_force(self, routes: "Routes") -> None:
        self._take_shares(routes)
        self._routes = routes
        for inherited, entrance in self._entrances:
            route = _route_of(routes, inherited.name)
            changed = route.keepalive != entrance.gate.route.keepalive
            entrance.gate.route = route
            if changed and inherited.listening:
                _set_keepalive(inherited, route)
        for restart in self._restart:
            restart()  # one that waited for room may have it now

    def _take_shares(self, routes: "Routes") -> None:
        """Let each worker have its part of what a route may have open; what is open counts on."""
        open_now = _open_in(self._service) if self._service is not None else []
        for name, route in routes.items():
            if name in self._routes:
                route.admission = self._routes[name].admission
            route.admission.change(
                share(route.max_connections, self._number, self._options.workers),
                route.max_connections_per_source,
                [one.source for one in open_now if one.route.admission is route.admission],
            )

    def _check(self, routes: "Routes") -> None:
        """Raise SetupError unless routes and sockets fit each other."""
        check_fit(routes, self._served, self._standby, self._paths)
        if self._options.workers > 1:
            check_shared(routes, self._served, self._standby, self._limit, self._options.workers)


def _open_in(service: Service) -> "list[Passage | Session]":
    from .datagram import Session  # many never need it, and none at the start

    return [one for one in service.connections if isinstance(one, (Passage, Session))]


def _set_keepalive(inherited: Inherited, route: Route) -> None:
    """Let connections inherit it from the socket that they are accepted on."""
    try:
        set_keepalive(inherited.socket, route.keepalive)
    except OSError as error:
        # SELinux may refuse it on a socket of init's; closed, it is when we drain.
        say(f"{inherited.name}: keepalive refused ({error.strerror}); KeepAlive= in the unit does")


def _route_of(routes: "Routes", name: str) -> Route:
    return routes[name] if name in routes else routes[EVERY_NAME]
