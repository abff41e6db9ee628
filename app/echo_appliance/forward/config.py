"""From TOML, or --to, to routes.

    [defaults]                          # for all routes, and each may say otherwise
    connect-retry = 10

    [route.redis]                       # the descriptor's name; "*": all that have no route
    to = "tcp:127.0.0.1:6379"           # or a list: the first that answers

    [[route.web.tls]]
    server-name = ["example.org", "*.example.org"]      # "*": the default
    alpn = ["h2"]
    to = "unix:/run/web"

Raises ParseError with the place and, in words, what to do.
"""

import os

from ..errors import ParseError
from .destination import Balance, Destination, ProxyVersion
from .peers import Peers
from .route import Route
from .target import parse as parse_target
from .tls_rules import DEFAULT, TlsRules

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from enum import Enum
    from typing import Any

    Table = dict[str, Any]

YEAR = 366 * 86400
FOLDER_LIMIT = 90  # octets; a unix socket's path has 107


def load(path: str, defaults: "Table") -> dict[str, Route]:
    """Read a configuration file; `defaults` is what the command line says for all routes."""
    import tomllib

    try:
        with open(path, "rb") as file:
            tables = tomllib.load(file)
    except OSError as error:
        raise ParseError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ParseError(f"{path} is not TOML for us: its lists nest too deeply") from error
    except ValueError as error:  # also of int(), which takes no more than 4,300 digits
        raise ParseError(f"{path} is not TOML: {error}") from error
    try:
        return parse(tables, defaults)
    except ParseError as error:
        raise ParseError(f"{path}: {error}") from error


def parse(tables: "Table", defaults: "Table") -> dict[str, Route]:
    """Return the routes by descriptor name."""
    _check_keys("the file", tables, ("defaults", "route"))
    common = {**defaults, **_table("defaults", tables.get("defaults", {}))}
    _check_keys("defaults", common, (*_DESTINATION, *_ROUTE))
    routes = _table("route", tables.get("route", {}))
    if not routes:
        raise ParseError("no routes: write [route.NAME] with the name of a descriptor")
    return {name: _parse_route(name, table, common) for name, table in routes.items()}


def _parse_route(name: str, table: object, common: "Table") -> Route:
    where = f"route.{name}"
    own = _table(where, table)
    _check_keys(where, own, ("to", "tls", *_DESTINATION, *_ROUTE))
    values = {**common, **own}
    route = Route(name)
    for key, read in _ROUTE.items():
        if key in values:
            setattr(route, key.replace("-", "_"), _read(where, key, values[key], read))
    if "to" in own:
        route.destination = _parse_destination(where, values)
    if "tls" in own:
        route.tls = _parse_tls(where, own["tls"], {**values, "to": None})
    if route.destination is None and route.tls is None:
        raise ParseError(f'{where}: nowhere to go: write to = "tcp:HOST:PORT", or tls rules')
    if route.tls is not None and route.destination is not None:
        _add_rule(where, route.tls, DEFAULT, [], route.destination)
    _check_kinds(where, route)
    return route


def _parse_destination(where: str, values: "Table") -> Destination:
    texts = _read(where, "to", values["to"], _texts)
    targets = [_read(where, "to", text, parse_target) for text in texts]
    if not targets:
        raise ParseError(f"{where}: to is empty: name at least one target")
    given = {
        key.replace("-", "_"): _read(where, key, values[key], read)
        for key, read in _DESTINATION.items()
        if key in values
    }
    return Destination(targets, **given)


def _parse_tls(where: str, tables: object, common: "Table") -> TlsRules:
    if not isinstance(tables, list) or not tables:
        raise ParseError(f"{where}.tls: write each rule as [[{where}.tls]]")
    rules = TlsRules()
    for number, table in enumerate(tables, 1):
        place = f"{where}.tls rule {number}"
        own = _table(place, table)
        _check_keys(place, own, ("server-name", "alpn", "to", *_DESTINATION))
        if "to" not in own or "server-name" not in own:
            raise ParseError(f'{place}: write both server-name ("*" for the default) and to')
        destination = _parse_destination(place, {**common, **own})
        protocols = _read(place, "alpn", own.get("alpn", []), _texts)
        for name in _read(place, "server-name", own["server-name"], _texts):
            _add_rule(place, rules, name, protocols, destination)
    return rules


def _add_rule(
    where: str, rules: TlsRules, name: str, protocols: list[str], destination: Destination
) -> None:
    try:
        rules.add(name, protocols, destination)
    except ParseError as error:
        raise ParseError(f"{where}: {error}") from error


def _check_kinds(where: str, route: Route) -> None:
    """Streams go to streams, datagrams to datagrams: one route, one kind."""
    kinds = {one.target.type for each in route.destinations() for one in each.backends}
    if len(kinds) > 1:
        raise ParseError(f"{where}: one route cannot lead to streams and to datagrams")


# -- values ------------------------------------------------------------------


def _table(where: str, value: object) -> "Table":
    if not isinstance(value, dict):
        raise ParseError(f"{where} must be a table: write [{where}]")
    return value


def _check_keys(where: str, table: "Table", known: "tuple[str, ...]") -> None:
    for key in table:
        if key not in known:
            raise ParseError(f"{where}: unknown key {key!r}: use {', '.join(known)}")


def _read(where: str, key: str, value: object, read: "Callable[[Any], Any]") -> "Any":
    try:
        return read(value)
    except ParseError as error:
        raise ParseError(f"{where}: {key}: {error}") from error


def _texts(value: object) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise ParseError(f"{value!r} is neither a string nor a list of strings")
    return values


def _peers(value: object) -> Peers:
    return Peers(_texts(value))


def _folder(value: object) -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ParseError(f"{value!r} is not the absolute path of a folder")
    if len(os.fsencode(value)) > FOLDER_LIMIT:
        raise ParseError(f"{value!r} is too long: {FOLDER_LIMIT} octets leave room for a name")
    return value


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= YEAR:
        raise ParseError(f"{value!r} is not a number of seconds, 0 or more")
    return float(value)


def _time_limit(value: object) -> float:
    if not _seconds(value):
        raise ParseError("0 s leave no backend time to answer")
    return _seconds(value)


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= YEAR:
        raise ParseError(f"{value!r} is not a whole number, 0 or more")
    return value


def _keepalive(value: object) -> int:
    if _whole(value) > 32767:  # MAX_TCP_KEEPIDLE
        raise ParseError(f"{value!r} is more than the kernel's 32767 seconds")
    return _whole(value)


def _one_of(kind: "type[Enum]") -> "Callable[[object], Enum]":
    def read(value: object) -> "Enum":
        for member in kind:
            if member.value == value:
                return member
        known = ", ".join(repr(member.value) for member in kind)
        raise ParseError(f"{value!r} is none of {known}")

    return read


# Key -> how its value is read.  The attributes have the same names, with underscores.
_DESTINATION = {
    "balance": _one_of(Balance),
    "connect-timeout": _time_limit,
    "connect-retry": _seconds,
    "proxy-protocol": _one_of(ProxyVersion),
}
_ROUTE = {
    "accept-proxy-from": _peers,
    "allow": _peers,
    "answers-in": _folder,
    "deny": _peers,
    "idle-timeout": _seconds,
    "keepalive": _keepalive,
    "lifetime": _seconds,
    "max-connections": _whole,
    "max-connections-per-source": _whole,
}


# -- for people --------------------------------------------------------------


def describe(routes: dict[str, Route]) -> str:
    """Return what the routes mean, in lines."""
    lines: list[str] = []
    for name, route in routes.items():
        lines.append(f"route {name}:")
        if route.tls is not None:
            lines += [f"  TLS {line}" for line in route.tls.describe()]
        elif route.destination is not None:
            lines.append(f"  to {route.destination}")
        lines += [f"  {line}" for line in _describe_ways(route)]
        lines += [f"  {line}" for line in _describe_rules(route)]
    return "\n".join(lines) + "\n"


def _describe_ways(route: Route) -> "list[str]":
    lines: dict[str, None] = {}  # in order, each once
    for one in route.destinations():
        if len(one.backends) > 1:
            lines[f"{one}: {one.balance.value}"] = None
        wait = f", retried for {one.connect_retry:g} s" if one.connect_retry else ""
        lines[f"connecting takes at most {one.connect_timeout:g} s{wait}"] = None
        if one.proxy_protocol is not ProxyVersion.NONE:
            lines[f"{one}: is sent the client's address by PROXY {one.proxy_protocol.value}"] = None
    return list(lines)


def _describe_rules(route: Route) -> list[str]:
    lines = []
    for words, peers in (
        ("only from", route.allow),
        ("never from", route.deny),
        ("only with a PROXY header, and only from", route.accept_proxy_from),
    ):
        if peers is not None:
            lines.append(f"{words} {', '.join(peers.texts) or 'nobody'}")
    if route.answers_in:
        lines.append(f"unix datagram backends answer to sockets in {route.answers_in}")
    for words, value in (
        ("connections: at most", route.max_connections),
        ("connections of one source: at most", route.max_connections_per_source),
        ("seconds without data: at most", route.idle_timeout),
        ("seconds in all: at most", route.lifetime),
        ("seconds of silence before a TCP keepalive:", route.keepalive),
    ):
        if value:
            lines.append(f"{words} {value:g}")
    return lines
