"""register, register-pid, unregister: the commands about who gets it."""

from ...errors import ParseError, say
from ..model import (
    FAMILIES,
    PROTOCOLS,
    parse_address,
    parse_label,
    parse_ports,
    parse_protocol,
)
from ..register import Rule, borrow, read_pid, take_from
from ..register import register as put
from ..register import unregister as forget
from ..state import Dispatcher
from .asked import lock, one_of, parse, parser_of, place_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from socket import socket

    from ..command import Options


def register(options: "Options") -> int:
    """Register the sockets that were passed to this process."""
    parser = parser_of(options, "Register inherited sockets (LISTEN_FDS).", "[LABEL]")
    words = parse(parser, options, 0, 1).words
    chosen = [(parse_label(words[0] if words else one.name), one.socket) for one in borrow()]
    _register(options, chosen)
    return 0


def register_pid(options: "Options") -> int:
    """Register sockets of a running process."""
    parser = parser_of(options, "Register sockets of a process.", "PID [LABEL tcp|udp ADDR PORT]")
    parser.add(
        "--label", metavar="RULE[,RULE...]",
        help="LABEL=tcp|udp[:ADDR:PORT]: all of a protocol, or those of an address (* is any)",
    )  # fmt: skip
    asked = parse(parser, options, 1, 5)
    pid, *words = asked.words
    rules = [_rule(*words)] if len(words) == 4 else []
    rules += [_label_rule(text) for text in (asked.label or "").split(",") if text]
    if len(words) not in (0, 4) or not rules:
        parser.error("give LABEL tcp|udp ADDR PORT, or --label rules")
    chosen = take_from(read_pid(pid), rules)
    try:
        _register(options, chosen)
    finally:
        for _, sock in chosen:
            sock.close()
    return 0


def _label_rule(text: str) -> Rule:
    label, equals, rest = text.partition("=")
    protocol, colon, where = rest.partition(":")
    address, _, port = where.rpartition(":") if colon else ("*", "", "*")
    if not (equals and address and port):
        raise ParseError(f"--label {text!r}: write LABEL=tcp, or LABEL=tcp:ADDR:PORT")
    return _rule(label, protocol, address.strip("[]"), port)


def _rule(label: str, protocol: str, address: str, port: str) -> Rule:
    host = None
    if address != "*":
        from socket import AF_INET, AF_INET6, inet_ntop

        family, octets = parse_address(address)
        host = inet_ntop((AF_INET, AF_INET6)[family], octets)  # as getsockname() writes it
    number = None
    if port != "*":
        number, high = parse_ports(port)
        if number != high:
            raise ParseError(f"{port!r}: a socket is bound to one port")
    return Rule(parse_label(label), parse_protocol(protocol), host, number)


def _register(options: "Options", chosen: "Sequence[tuple[str, socket]]") -> None:
    place = place_of(options)
    with lock(options, place), Dispatcher(place, write=True) as dispatcher:
        for line in put(dispatcher, chosen):
            say(f"dispatch: {line}")


def unregister(options: "Options") -> int:
    """Forget a destination's sockets."""
    usage = "LABEL ipv4|ipv6 tcp|udp"
    asked = parse(parser_of(options, "Forget a destination's sockets.", usage), options, 3, 3)
    label, domain, protocol = asked.words
    one_of(domain, FAMILIES, "a domain")
    kind = PROTOCOLS.index(parse_protocol(protocol)) << 1 | FAMILIES.index(domain)
    place = place_of(options)
    with lock(options, place), Dispatcher(place, write=True) as dispatcher:
        count = forget(dispatcher, label, kind)
    say(f"dispatch: unregistered {count} from {label} {domain} {protocol}")
    return 0
