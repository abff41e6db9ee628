"""Whether routes and inherited descriptors fit each other; raises SetupError where they do not."""

import socket

from ..errors import SetupError
from ..inherit import Inherited
from .route import EVERY_NAME, Route
from .target import is_passed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..inherit import PassedPath


def passed_names(routes: "dict[str, Route]") -> set[str]:
    """Return the names of the descriptors that are targets."""
    return {
        backend.target.path
        for route in routes.values()
        for destination in route.destinations()
        for backend in destination.backends
        if is_passed(backend.target)
    }


def check_fit(
    routes: "dict[str, Route]",
    served: list[Inherited],
    standby: list[Inherited],
    paths: "Sequence[PassedPath]",
) -> None:
    """Check that each route has a descriptor, each descriptor a route, and of one kind."""
    if not served:
        raise SetupError("no socket to forward was passed: pass one besides metrics and fd:")
    names = {one.name for one in served}
    for name in routes:
        if name not in names and name != EVERY_NAME:
            raise SetupError(
                f"route.{name}: no descriptor has this name, only {', '.join(sorted(names))}: "
                f"set FileDescriptorName={name} in the socket unit"
            )
    for inherited in served:
        _check_route(inherited, routes)
    wanted = passed_names(routes)
    for name in wanted:
        _check_passed(name, [one for one in standby if one.name == name], paths)
    for path in paths:
        if path.name not in wanted:
            raise SetupError(
                f"descriptor {path.descriptor} {path.name!r} is a path (O_PATH), which can only be "
                f'a target: write to = "fd:{path.name}"'
            )


def check_shared(
    routes: "dict[str, Route]",
    served: list[Inherited],
    standby: list[Inherited],
    limit: int,
    workers: int,
) -> None:
    """Check that so many workers have something to share."""
    for inherited in (*served, *standby):
        if not (inherited.listening or inherited.is_dgram):
            raise SetupError(
                f"{inherited} is one connection, which workers cannot share: drop --workers"
            )
    limits = {"--max-connections": limit}
    limits |= {f"route.{one.name}: max-connections": one.max_connections for one in routes.values()}
    for what, value in limits.items():
        if 0 < value < workers:
            raise SetupError(
                f"{what} {value} is less than --workers {workers}: each worker needs one at least"
            )
    if not any(one.listening for one in served) and len(served) < workers:
        raise SetupError(
            f"--workers {workers}: a client's datagrams stay in one process, so that "
            f"{len(served)} datagram sockets keep no more than {len(served)} workers busy"
        )


def _check_route(inherited: Inherited, routes: "dict[str, Route]") -> None:
    name = inherited.name
    if name not in routes and EVERY_NAME not in routes:
        raise SetupError(f"{inherited} has no route: add [route.{name}] to the configuration")
    if inherited.type not in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        raise SetupError(f"{inherited} cannot be forwarded: pass stream or dgram sockets")
    route = routes[name] if name in routes else routes[EVERY_NAME]
    kinds = {
        backend.target.type
        for destination in route.destinations()
        for backend in destination.backends
    }
    if inherited.is_dgram and (route.tls is not None or route.accept_proxy_from is not None):
        raise SetupError(f"{inherited}: TLS rules and PROXY headers are for streams")
    if kinds != {inherited.type}:
        raise SetupError(f"{inherited}: a stream needs a stream's target, a dgram a dgram's")


def _check_passed(name: str, sockets: list[Inherited], paths: "Sequence[PassedPath]") -> None:
    if not sockets and not any(path.name == name for path in paths):
        raise SetupError(f"target fd:{name}: no descriptor has this name")
    for inherited in sockets:
        if inherited.listening or not inherited.connected:
            raise SetupError(f"target fd:{name}: {inherited} is not connected to a backend")
