"""`echo-appliance echo`: from options and inherited sockets to a running Service."""

import socket

from ..accept import Acceptor
from ..admission import Admission
from ..errors import SetupError
from ..inherit import Inherited, check_metrics, describe_all, take
from ..lending import SOCKET_NAME as REPLIES
from ..limits import connection_limit, share
from ..loop import Loop
from ..metrics import SOCKET_NAME as METRICS
from ..metrics import Registry
from ..notify import ServiceManager
from ..options import Parser, SharingOptions, add_service_options, add_workers
from ..service import Lifetimes, Service
from .connection import Connection, Endpoint
from .stream import StreamConnection

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..service import Manager


class Options(SharingOptions):
    """What the command line says; filled by the parser."""

    allow_any_source: bool


def main(arguments: "Sequence[str]") -> int:
    """Run the mode; return the exit status.  Raises SetupError, in words for the user."""
    options = _parse(arguments)
    sockets = take()
    metrics = [one for one in sockets if one.name == METRICS]
    lender = _lender([one for one in sockets if one.name == REPLIES])
    served = [one for one in sockets if one.name not in (METRICS, REPLIES)]
    _check_roles(served, metrics, options.workers)
    limit = connection_limit(options.max_connections)
    if options.workers > 1:
        return _run_workers(options, limit, served, metrics, lender)
    registry = Registry()
    service = _build(Loop(), ServiceManager(), registry, served, lender, options, limit)
    if metrics:
        from ..metrics_http import serve_metrics

        for inherited in metrics:
            serve_metrics(service, inherited, registry)
    service.obey_signals()
    return service.run()


def _parse(arguments: "Sequence[str]") -> Options:
    parser = Parser("echo-appliance echo", "Send back what arrives on every inherited socket.")
    add_service_options(parser)
    add_workers(parser)
    parser.group("datagrams")
    parser.add(
        "--allow-any-source", default=False,
        help="answer datagrams from ports of services that answer anything (a risk of loops)",
    )  # fmt: skip
    return parser.parse(arguments, Options())


def _lender(sockets: list[Inherited]) -> socket.socket | None:
    """Return the socket by which dispatch's sidecar lends reply sockets (borrow.py)."""
    for inherited in sockets:
        if not (inherited.is_dgram and inherited.connected) or inherited.is_internet:
            raise SetupError(
                f"{inherited} cannot ask for reply sockets: pass a unix datagram socket that is "
                "connected to the sidecar's (OpenFile= does that)"
            )
    if len(sockets) > 1:
        raise SetupError(f"{len(sockets)} sockets named {REPLIES!r} were passed: pass one")
    return sockets[0].socket if sockets else None


def _check_roles(served: list[Inherited], metrics: list[Inherited], workers: int) -> None:
    check_metrics(metrics)
    if not served:
        raise SetupError(
            f"only sockets named {METRICS!r} or {REPLIES!r} were passed: pass one to echo on, too"
        )
    if workers > 1:
        for inherited in served:
            if not (inherited.listening or inherited.is_dgram):
                raise SetupError(
                    f"{inherited} is one connection, which workers cannot share: drop --workers"
                )


def _run_workers(
    options: Options,
    limit: int,
    served: list[Inherited],
    metrics: list[Inherited],
    lender: socket.socket | None,
) -> int:
    from ..workers import Link, supervise

    if any(one.is_dgram and one.is_internet for one in served):
        from . import replies  # noqa: F401 - before the fork: what all workers know is in it

    if 0 < limit < options.workers:
        raise SetupError(
            f"--max-connections {limit} is less than --workers {options.workers}: "
            "each worker needs one at least"
        )

    def build(loop: Loop, link: Link, number: int) -> Service:
        own = share(limit, number, options.workers)
        return _build(loop, link, Registry(), served, lender, options, own)

    lifetimes = Lifetimes(options.drain, options.exit_idle, options.start_sleep)
    return supervise(options.workers, build, lifetimes, describe_all(served), metrics)


def _build(
    loop: Loop,
    manager: "Manager",
    registry: Registry,
    served: list[Inherited],
    lender: socket.socket | None,
    options: Options,
    limit: int,
) -> Service:
    """Put handlers on all sockets; what they share is made here."""
    start_sleep = options.start_sleep if options.workers == 1 else 0.0  # the supervisor's, then
    lifetimes = Lifetimes(options.drain, options.exit_idle, start_sleep)
    service = Service(loop, manager, registry, lifetimes, describe_all(served), options.debug)
    admission = Admission(limit, options.max_connections_per_source, manager.full)
    for inherited in served:
        endpoint = Endpoint(
            service, admission, registry.counters(inherited.name), inherited.name,
            idle_timeout=options.idle_timeout, debug=options.debug,
        )  # fmt: skip
        if inherited.is_dgram:
            _serve_datagrams(endpoint, inherited, served, lender, options.allow_any_source)
        else:
            _serve_connections(endpoint, inherited)
    return service


def _serve_connections(endpoint: Endpoint, inherited: Inherited) -> None:
    """Echo on a listening socket's connections, or on one that came connected."""
    connection_class: type[Connection] = StreamConnection
    if inherited.type == socket.SOCK_SEQPACKET:
        from .seqpacket import SeqpacketConnection

        connection_class = SeqpacketConnection

    def serve(sock: socket.socket, source: str | None) -> None:
        connection_class(endpoint, sock, source)

    service, admission = endpoint.service, endpoint.admission
    if inherited.listening:
        service.add_source(
            Acceptor(
                service.loop, inherited, admission, endpoint.counters, serve, service.source_lost
            )
        )
    else:
        # What systemd accepted for us (Accept=yes) is served whatever the limits are.
        admission.admit(None)
        service.at_start(lambda: serve(inherited.socket, None))


def _serve_datagrams(
    endpoint: Endpoint,
    inherited: Inherited,
    served: list[Inherited],
    lender: socket.socket | None,
    any_source: bool,
) -> None:
    from .datagram import InternetDatagrams, UnixDatagrams, refused_addresses, refused_ports

    if inherited.is_internet:
        refused = frozenset[int]() if any_source else refused_ports(served)
        endpoint.service.add_source(InternetDatagrams(endpoint, inherited, refused, lender))
    else:
        refused_here = refused_addresses(served)
        endpoint.service.add_source(UnixDatagrams(endpoint, inherited, refused_here))
