"""Targets of forward mode: those that a probe has, and `fd:NAME`.

fd:NAME is a descriptor that was passed to us.  A stream socket that is already
connected to a backend (systemd's OpenFile= makes that of a unix socket's path)
serves one client; of several with the same name each serves one.  The path of
a unix socket (O_PATH) is connected to for each client.
"""

import socket

from ..errors import ParseError
from ..target import Target, parse_target

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .resolve import Address

_PASSED = "fd:"


class Standby:
    """What was passed to us to be a target, by name: connections until a client takes them."""

    def __init__(self) -> None:
        self._sockets: dict[str, list[socket.socket]] = {}
        self._paths: dict[str, str] = {}

    def add(self, name: str, sock: socket.socket) -> None:
        """Keep a socket for a client.  Owns it from now on."""
        self._sockets.setdefault(name, []).append(sock)

    def add_path(self, name: str, path: str) -> None:
        """Keep the path of a unix socket, for any number of clients."""
        self._paths[name] = path

    def path(self, name: str) -> str | None:
        """Return the path of this name, if one was passed."""
        return self._paths.get(name)

    def take(self, name: str) -> socket.socket | None:
        """Return a socket that nobody has had, now the caller's; None when there is none left."""
        sockets = self._sockets.get(name)
        return sockets.pop(0) if sockets else None


def parse(text: str) -> Target:
    """Return what a target's text means.  Raises ParseError, in words for the user."""
    if text.startswith(_PASSED):
        name = text.removeprefix(_PASSED)
        if not name:
            raise ParseError(f"target {text!r} needs the name of a passed descriptor")
        return Target(text, socket.AF_UNSPEC, socket.SOCK_STREAM, path=name)
    target = parse_target(text)
    if target.type == socket.SOCK_SEQPACKET:
        raise ParseError(f"target {text!r}: only streams and datagrams are forwarded")
    if not target.host.isascii():
        raise ParseError(f"target {text!r}: write the name in its ASCII form (xn--...)")
    return target


def is_passed(target: Target) -> bool:
    """Whether it names a descriptor."""
    return target.text.startswith(_PASSED)


def needs_resolving(target: Target) -> bool:
    """Whether it is known by name only: a host's, or a descriptor's."""
    return target.family == socket.AF_UNSPEC


def address_of(target: Target) -> "Address":
    """Return family and address to connect to, of a target that needs no resolving."""
    if target.family == socket.AF_UNIX:
        return target.family, target.path
    host = int(target.host) if target.family == socket.AF_VSOCK else target.host
    return target.family, (host, target.port)
