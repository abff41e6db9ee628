"""Who a client is: by its socket, or by the word of a trusted proxy."""

import os
import socket

from ..accept import source_of
from ..inherit import format_address

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .proxy_protocol import Header

_MAPPED = "::ffff:"


def header_of(client: socket.socket) -> "Header":
    """Return what a backend is told about a client that came without a proxy."""
    from .proxy_protocol import Family, Header

    try:
        source, destination = client.getpeername(), client.getsockname()
    except OSError:
        return Header(Family.UNSPEC)  # it is gone already; the relay will find out
    if client.family == socket.AF_UNIX:
        return Header(Family.UNIX, (_path(source), 0), (_path(destination), 0))
    if client.family not in (socket.AF_INET, socket.AF_INET6):
        return Header(Family.UNSPEC)
    hosts = [_host(address[0]) for address in (source, destination)]
    family = Family.INET6 if ":" in hosts[0] else Family.INET
    return Header(family, (hosts[0], source[1]), (hosts[1], destination[1]))


def source_of_peer(client: socket.socket) -> str | None:
    """Return what rules and limits know a connection's other end by, as accept() told it."""
    try:
        return source_of(client.family, client.getpeername())
    except OSError:
        return None  # it was reset; the relay will find out


def name_of(client: socket.socket, source: str | None) -> str:
    """Return the client's address for the access log; what accept() told when it is gone."""
    try:
        name = client.getpeername()
    except OSError:
        return source or "?"  # it was reset
    return format_address(name) or "unix"


def name_in(header: "Header") -> str:
    """Return the client's address by a header, for the access log; empty when it has none."""
    host = header.source[0]
    if header.host is not None:
        return format_address(header.source)
    return format_address(os.fsencode(host) if host.startswith("\0") else host)


def _host(host: str) -> str:
    # An IPv4 client of a dual-stack socket is an IPv4 client.
    return host.removeprefix(_MAPPED).partition("%")[0]


def _path(name: str | bytes) -> str:
    return name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name
