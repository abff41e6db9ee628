"""Chooses a destination by what a TLS ClientHello asks for.  Knows no I/O.

The server name decides: the exact name, else the longest `*.suffix` (of any
depth), else the default.  Among the rules of that name ALPN decides: the first
of the client's protocols that a rule names, else a rule that names none.
"""

from ..errors import ParseError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from .destination import Destination

DEFAULT = "*"


class TlsRules:
    """Destinations by server name and ALPN protocol."""

    def __init__(self) -> None:
        # server name, "*.suffix" or "*" -> ALPN protocol, or "" for any -> destination
        self._names: dict[str, dict[str, Destination]] = {}

    def add(self, server_name: str, protocols: "Iterable[str]", destination: "Destination") -> None:
        """Add a rule.  Raises ParseError for a second rule of the same name and protocol."""
        name = server_name.lower().removesuffix(".")
        _check_name(server_name, name)
        rules = self._names.setdefault(name, {})
        for protocol in protocols or ("",):
            if protocol in rules:
                what = "default" if name == DEFAULT else f"rule for {server_name!r}"
                raise ParseError(f"two of the kind: a {what} with ALPN {protocol or 'any'!r}")
            rules[protocol] = destination

    def find(self, server_name: str, protocols: "Iterable[str]") -> "Destination | str":
        """Return the destination, or why there is none."""
        rules = self._rules(server_name.lower().removesuffix("."))
        if rules is None:
            return "tls-name-unknown"
        for protocol in (*protocols, ""):
            if protocol in rules:
                return rules[protocol]
        return "tls-no-protocol"

    def destinations(self) -> "Iterable[Destination]":
        """Return all destinations, each as often as there are rules for it."""
        return [one for rules in self._names.values() for one in rules.values()]

    def describe(self) -> list[str]:
        """Return a line per rule, for people."""
        return [
            f"{name}{f' with ALPN {protocol}' if protocol else ''} -> {destination}"
            for name, rules in self._names.items()
            for protocol, destination in rules.items()
        ]

    def _rules(self, name: str) -> "dict[str, Destination] | None":
        names = self._names
        if name in names and name != DEFAULT:
            return names[name]
        _, dot, suffix = name.partition(".")
        while dot:
            if f"*.{suffix}" in names:
                return names[f"*.{suffix}"]
            _, dot, suffix = suffix.partition(".")
        return names.get(DEFAULT)


def _check_name(written: str, name: str) -> None:
    if name == DEFAULT:
        return
    labels = name.removeprefix("*.")
    if not labels or "*" in labels or not labels.isascii() or not labels.isprintable():
        raise ParseError(f"{written!r} is no server name: write example.org, *.example.org or *")
