"""Target addresses as users write them: tcp:127.0.0.1:80, unix:@name, vsock:1:3000 ...

Text in, values out; nothing is resolved or opened here.
"""

import os
import socket

from .errors import ParseError
from .text import whole_number

_INTERNET = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
_UNIX = {
    "unix": socket.SOCK_STREAM,
    "unix-dgram": socket.SOCK_DGRAM,
    "unix-seqpacket": socket.SOCK_SEQPACKET,
}
_VSOCK = {"vsock": socket.SOCK_STREAM, "vsock-seqpacket": socket.SOCK_SEQPACKET}
# A guest's vsock port behind a unix socket, as user-space vsock devices and micro-VMs have it
# ("hybrid vsock"): who connects writes "CONNECT port", and is answered "OK ..." first.
_HYBRID = "vsock-uds"

SCHEMES = (*_INTERNET, *_UNIX, *_VSOCK, _HYBRID)

_UNIX_PATH_LIMIT = 107  # struct sockaddr_un has 108 octets; a path ends with a zero


class Target:
    """Where to connect.  `family` is AF_UNSPEC while `host` is a name that is not resolved."""

    __slots__ = ("family", "host", "path", "port", "text", "type")

    def __init__(
        self,
        text: str,
        family: int,
        kind: int,
        *,
        host: str = "",
        port: int = 0,
        path: str = "",
    ) -> None:
        self.text = text
        self.family = family
        self.type = kind
        self.host = host  # an IP address or a name; the CID in digits for vsock
        self.port = port  # the guest's, for vsock-uds
        self.path = path  # unix only; starts with a zero octet when abstract

    def __repr__(self) -> str:
        return f"Target({self.text!r})"

    @property
    def is_hybrid(self) -> bool:
        """Whether `port` is to be asked for on the unix socket `path`."""
        return self.family == socket.AF_UNIX and self.port != 0


def parse_target(text: str) -> Target:
    """Return what a target's text means.  Raises ParseError, in words for the user."""
    scheme, colon, rest = text.partition(":")
    if not colon or scheme not in SCHEMES:
        raise ParseError(f"target {text!r} must begin with one of {', '.join(SCHEMES)} and a colon")
    if scheme in _UNIX:
        return Target(text, socket.AF_UNIX, _UNIX[scheme], path=_parse_path(text, rest))
    host, colon, port_text = rest.rpartition(":")
    if not colon or not host:
        raise ParseError(f"target {text!r} needs an address and a port: {_example(scheme)}")
    if scheme == _HYBRID:
        port = _parse_port(text, port_text, 0xFFFFFFFF)
        return Target(
            text, socket.AF_UNIX, socket.SOCK_STREAM, path=_parse_path(text, host), port=port
        )
    if scheme in _VSOCK:
        port = _parse_number(text, "port", port_text, 0xFFFFFFFF)
        cid = _parse_number(text, "CID", host, 0xFFFFFFFF)
        return Target(text, socket.AF_VSOCK, _VSOCK[scheme], host=str(cid), port=port)
    port = _parse_port(text, port_text, 0xFFFF)
    family, host = _parse_host(text, host)
    return Target(text, family, _INTERNET[scheme], host=host, port=port)


def _parse_host(text: str, host: str) -> tuple[int, str]:
    if host.startswith("[") and host.endswith("]"):
        if not _is_address(socket.AF_INET6, host[1:-1].partition("%")[0]):
            raise ParseError(f"target {text!r}: {host[1:-1]!r} is not an IPv6 address")
        return socket.AF_INET6, host[1:-1]
    if ":" in host:
        raise ParseError(f"target {text!r}: write an IPv6 address in brackets, as in [::1]:3000")
    if _is_address(socket.AF_INET, host):
        return socket.AF_INET, host
    return socket.AF_UNSPEC, host


def _is_address(family: int, host: str) -> bool:
    try:
        socket.inet_pton(family, host)
    except (OSError, ValueError):
        return False
    return True


def _parse_port(text: str, digits: str, limit: int) -> int:
    port = _parse_number(text, "port", digits, limit)
    if port == 0:
        raise ParseError(f"target {text!r}: nobody can be reached at port 0")
    return port


def _parse_number(text: str, what: str, digits: str, limit: int) -> int:
    number = whole_number(digits)
    if number is None or number > limit:
        raise ParseError(f"target {text!r}: {digits!r} is not a {what} (0 to {limit})")
    return number


def _parse_path(text: str, path: str) -> str:
    if path in ("", "@"):
        raise ParseError(f"target {text!r} needs a path, or @ and an abstract name")
    if len(os.fsencode(path)) > _UNIX_PATH_LIMIT:
        raise ParseError(f"target {text!r}: a unix socket's path has at most 107 octets")
    if "\0" in path:
        raise ParseError(f"target {text!r}: a path cannot hold a zero octet")
    return "\0" + path[1:] if path.startswith("@") else path


def _example(scheme: str) -> str:
    if scheme == _HYBRID:
        return "vsock-uds:/run/vm.vsock:3000"
    return f"{scheme}:1:3000" if scheme in _VSOCK else f"{scheme}:127.0.0.1:3000"
