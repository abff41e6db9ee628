"""The dispatch commands, one function each: parse its arguments, do it, say what was done."""

import sys

from ..errors import ParseError, SetupError, say
from ..options import ArgumentError, Parser, positive
from . import control
from .model import (
    FAMILIES,
    PROTOCOLS,
    Binding,
    mask,
    parse_address,
    parse_label,
    parse_network,
    parse_ports,
    parse_protocol,
)
from .state import Dispatcher, Lock, Place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from socket import socket

    from .command import Options
    from .layout import Entry
    from .register import Rule


class Asked:
    """What a command's own arguments say; filled by the parser."""

    words: list[str]
    json: bool
    on_miss: str
    ephemeral: bool
    group: str | None
    capacity: int
    beside: bool
    label: str | None
    dry_run: bool
    source: str | None
    config: str | None


def _parser(options: "Options", description: str, usage: str = "") -> Parser:
    """Return a command's parser; in its usage, what may be left out is in brackets."""
    parser = Parser(f"echo-appliance dispatch {options.command}", description)
    if usage:
        parser.add("words", default=[], metavar=usage, help="see dispatch --help")
    return parser


def _parse(parser: Parser, options: "Options", fewest: int = 0, most: int = 0) -> Asked:
    """Parse, and see that there are as many words as the command takes."""
    asked = parser.parse(options.rest, Asked())
    words = asked.words if most else []
    if not fewest <= len(words) <= most:
        wanted = str(fewest) if fewest == most else f"{fewest} to {most}"
        parser.error(f"{len(words)} arguments given, {wanted} wanted")
    return asked


def _choice(*words: str) -> "Callable[[str], str]":
    def read(text: str) -> str:
        if text not in words:
            raise ArgumentError(f"{text!r} is not one of {', '.join(words)}")
        return text

    return read


def _one_of(text: str, words: "Sequence[str]", what: str) -> str:
    if text not in words:
        raise ParseError(f"{text!r} is not {what}: use {' or '.join(words)}")
    return text


def _place(options: "Options") -> Place:
    return Place(options.bpffs.rstrip("/"), options.netns)


def _lock(options: "Options", place: Place) -> Lock:
    place.check_bpffs()
    return Lock(place, options.wait)


def _read(options: "Options") -> Dispatcher:
    return Dispatcher(_place(options), write=False)


def _write_json(data: object) -> None:
    import json

    json.dump(data, sys.stdout, indent=1)
    sys.stdout.write("\n")


# -- the program -----------------------------------------------------------------------


def load(options: "Options") -> int:
    """Put the dispatcher into the network namespace."""
    parser = _parser(options, "Load the program and attach it to the network namespace.")
    parser.add("--group", metavar="NAME", help="a group (name or number) that may read the state")
    parser.add(
        "--capacity", positive, default=control.CAPACITY, metavar="N",
        help=f"most keys: one per binding, up to 31 per range (default: {control.CAPACITY})",
    )  # fmt: skip
    parser.add("--beside", default=False, help="even if other sk_lookup programs are attached")
    asked = _parse(parser, options)
    place = _place(options)
    group = None if asked.group is None else _group(asked.group)
    with _lock(options, place):
        control.load(place, asked.capacity, group, asked.beside)
    say(f"dispatch: loaded into {place.path}")
    return 0


def _group(text: str) -> int:
    if text.isascii() and text.isdigit():
        return int(text)
    import grp

    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise SetupError(f"there is no group {text!r}") from None


def unload(options: "Options") -> int:
    """Take the dispatcher out."""
    _parse(_parser(options, "Detach the program; forget bindings and sockets."), options)
    place = _place(options)
    with _lock(options, place):
        control.unload(place)
    say(f"dispatch: unloaded {place.path}")
    return 0


def upgrade(options: "Options") -> int:
    """Replace the program under traffic."""
    _parse(_parser(options, "Replace the program, keeping all state."), options)
    place = _place(options)
    with _lock(options, place), Dispatcher(place, write=True) as dispatcher:
        old, new = control.upgrade(dispatcher)
    say(f"dispatch: replaced program {old} by {new}")
    return 0


# -- bindings --------------------------------------------------------------------------


def bind(options: "Options") -> int:
    """Add a binding."""
    parser = _parser(options, "Steer packets to a label.", "LABEL tcp|udp PREFIX PORT")
    parser.add(
        "--on-miss", _choice("drop", "pass"), default="drop", metavar="drop|pass",
        help="what to do while no socket is registered (default: drop)",
    )  # fmt: skip
    parser.add(
        "--ephemeral", default=False,
        help="of UDP, take the ports that local clients use, too",
    )  # fmt: skip
    asked = _parse(parser, options, 4, 4)
    binding = _binding(asked.words, asked.on_miss == "pass", asked.ephemeral)
    place = _place(options)
    with _lock(options, place), Dispatcher(place, write=True) as dispatcher:
        added = control.bind(dispatcher, binding)
    say(f"dispatch: bound {binding}" if added else f"dispatch: {binding} is bound already")
    return 0


def unbind(options: "Options") -> int:
    """Take a binding away."""
    parser = _parser(options, "Undo a bind.", "LABEL tcp|udp PREFIX PORT")
    binding = _binding(_parse(parser, options, 4, 4).words)
    place = _place(options)
    with _lock(options, place), Dispatcher(place, write=True) as dispatcher:
        control.unbind(dispatcher, binding)
    say(f"dispatch: unbound {binding}")
    return 0


def _binding(words: list[str], on_miss_pass: bool = False, ephemeral: bool = False) -> Binding:
    label, protocol, prefix, port = words
    network, note = parse_network(prefix)
    names = parse_label(label), parse_protocol(protocol)
    binding = Binding(*names, network, parse_ports(port), on_miss_pass, ephemeral)
    if note:
        say(f"dispatch: note: {note}")
    return binding


def bindings(options: "Options") -> int:
    """List the bindings that overlap with what is asked for."""
    from .status import bindings_text, entry_data, ordered

    usage = "[tcp|udp|any [PREFIX [PORT]]]"
    parser = _parser(options, "List bindings, the most specific first.", usage)
    parser.add("--json", default=False, help="write JSON")
    asked = _parse(parser, options, 0, 3)
    with _read(options) as dispatcher:
        found = _overlapping(control.entries(dispatcher), asked.words)
    if asked.json:
        _write_json([entry_data(entry) for entry in ordered(found)])
    else:
        sys.stdout.write(bindings_text(found))
    return 0


def load_bindings(options: "Options") -> int:
    """Replace all bindings by a file's."""
    from . import bulk

    parser = _parser(options, "Replace all bindings by a file's, in one step.", "FILE|-")
    parser.add("--dry-run", default=False, help="only say what would change")
    parser.add("--json", default=False, help="with --dry-run, write JSON")
    asked = _parse(parser, options, 1, 1)
    [path] = asked.words
    octets = bulk.read_source(path)
    place = _place(options)
    if asked.dry_run:
        with Dispatcher(place, write=False) as dispatcher:
            _show_preview(*bulk.preview(dispatcher, path, octets), asked.json)
        return 0
    import gc

    gc.disable()  # nothing here is garbage, and looking for it costs a third of the time
    with _lock(options, place), Dispatcher(place, write=True) as dispatcher:
        count = bulk.load_bindings(dispatcher, path, octets)
    say(f"dispatch: {path}: " + ("unchanged" if count is None else f"{count} keys in force"))
    return 0


def _show_preview(gone: list[Binding], come: list[Binding], as_json: bool) -> None:
    from .status import binding_data

    if as_json:
        data = {"remove": gone, "add": come}
        _write_json({key: [binding_data(one) for one in found] for key, found in data.items()})
    else:
        sys.stdout.writelines(f"- {_in_full(one)}\n" for one in gone)
        sys.stdout.writelines(f"+ {_in_full(one)}\n" for one in come)


def _in_full(binding: Binding) -> str:
    options = " on-miss pass" if binding.on_miss_pass else ""
    return f"{binding}{options}" + (" ephemeral" if binding.ephemeral else "")


def _overlapping(entries: "list[Entry]", words: list[str]) -> "list[Entry]":
    protocol, prefix, port = [*words, *("any", "", "0")[len(words) :]]
    _one_of(protocol, (*PROTOCOLS, "any"), "a protocol")
    if protocol != "any":
        entries = [one for one in entries if PROTOCOLS[one.binding.protocol] == protocol]
    if not prefix:
        return entries
    (family, address, bits), _ = parse_network(prefix)
    low, high = parse_ports(port)

    def overlaps(one: Binding) -> bool:
        shorter = min(one.prefix, bits)
        return (
            one.family == family
            and one.low <= high
            and low <= one.high
            and mask(one.address, shorter) == mask(address, shorter)
        )

    return [entry for entry in entries if overlaps(entry.binding)]


# -- sockets ---------------------------------------------------------------------------


def register(options: "Options") -> int:
    """Register the sockets that were passed to this process."""
    from .register import borrow

    parser = _parser(options, "Register inherited sockets (LISTEN_FDS).", "[LABEL]")
    words = _parse(parser, options, 0, 1).words
    chosen = [(parse_label(words[0] if words else one.name), one.socket) for one in borrow()]
    _register(options, chosen)
    return 0


def register_pid(options: "Options") -> int:
    """Register sockets of a running process."""
    from .register import read_pid, take_from

    parser = _parser(options, "Register sockets of a process.", "PID [LABEL tcp|udp ADDR PORT]")
    parser.add(
        "--label", metavar="RULE[,RULE...]",
        help="LABEL=tcp|udp[:ADDR:PORT]: all of a protocol, or those of an address (* is any)",
    )  # fmt: skip
    asked = _parse(parser, options, 1, 5)
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


def _label_rule(text: str) -> "Rule":
    label, equals, rest = text.partition("=")
    protocol, colon, where = rest.partition(":")
    address, _, port = where.rpartition(":") if colon else ("*", "", "*")
    if not (equals and address and port):
        raise ParseError(f"--label {text!r}: write LABEL=tcp, or LABEL=tcp:ADDR:PORT")
    return _rule(label, protocol, address.strip("[]"), port)


def _rule(label: str, protocol: str, address: str, port: str) -> "Rule":
    from .register import Rule

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
    from .register import register as put

    place = _place(options)
    with _lock(options, place), Dispatcher(place, write=True) as dispatcher:
        for line in put(dispatcher, chosen):
            say(f"dispatch: {line}")


def unregister(options: "Options") -> int:
    """Forget a destination's sockets."""
    from .register import unregister as forget

    usage = "LABEL ipv4|ipv6 tcp|udp"
    asked = _parse(_parser(options, "Forget a destination's sockets.", usage), options, 3, 3)
    label, domain, protocol = asked.words
    _one_of(domain, FAMILIES, "a domain")
    kind = PROTOCOLS.index(parse_protocol(protocol)) << 1 | FAMILIES.index(domain)
    place = _place(options)
    with _lock(options, place), Dispatcher(place, write=True) as dispatcher:
        count = forget(dispatcher, label, kind)
    say(f"dispatch: unregistered {count} from {label} {domain} {protocol}")
    return 0


# -- what is there -----------------------------------------------------------------------


def status(options: "Options") -> int:
    """Show bindings, destinations and counters."""
    from . import status as view

    parser = _parser(options, "Show bindings and destinations.")
    parser.add("--json", default=False, help="write JSON")
    asked = _parse(parser, options)
    with _read(options) as dispatcher:
        if others := view.others(dispatcher):
            ids = ", ".join(map(str, others))
            say(f"dispatch: warning: another sk_lookup program ({ids}) is attached here, too")
        bound = control.entries(dispatcher)
        rows = view.destinations(dispatcher, bound)
        if asked.json:
            _write_json(
                {
                    "path": dispatcher.place.path,
                    "bindings": [view.entry_data(entry) for entry in view.ordered(bound)],
                    "destinations": [view.destination_data(row) for row in rows],
                }
            )
        else:
            sys.stdout.write("Bindings:\n" + view.bindings_text(bound))
            sys.stdout.write("\nDestinations:\n" + view.destinations_text(rows))
    return 0


def metrics(options: "Options") -> int:
    """Write the counters as Prometheus text."""
    from .status import metrics_text

    _parse(_parser(options, "Write the counters as Prometheus text."), options)
    with _read(options) as dispatcher:
        sys.stdout.write(metrics_text(dispatcher))
    return 0


def explain(options: "Options") -> int:
    """Say which binding wins a packet, and which socket takes it."""
    from .explain import Packet
    from .explain import explain as explained

    parser = _parser(options, "Which binding wins, why, and who takes it.", "tcp|udp ADDR PORT")
    parser.add("--json", default=False, help="write JSON")
    parser.add("--source", metavar="ADDR,PORT", help="where the packet comes from")
    asked = _parse(parser, options, 3, 3)
    protocol, address, port = asked.words
    family, octets = parse_address(address)
    number, _ = parse_ports(port)
    kind = PROTOCOLS.index(parse_protocol(protocol)) << 1 | family
    packet = Packet(kind, octets, number)
    if asked.source:
        packet.remote, packet.remote_port = _source(asked.source, family)
    with _read(options) as dispatcher:
        answer = explained(dispatcher, packet)
    if asked.json:
        _write_json(answer.as_json())
    else:
        sys.stdout.write(answer.as_text())
    return 0


def _source(text: str, family: int) -> tuple[bytes, int]:
    address, _, port = text.rpartition(",")
    remote_family, remote = parse_address(address)
    if remote_family != family:
        raise ParseError(f"--source {text}: a packet has one family")
    return remote, parse_ports(port)[0]


def run(options: "Options") -> int:
    """Be the sidecar."""
    from .sidecar import run as serve

    parser = _parser(options, "Keep a file's bindings in force and inherited sockets registered.")
    parser.add("--config", metavar="FILE", help="bindings, as for load-bindings; SIGHUP rereads it")
    asked = _parse(parser, options)
    return serve(_place(options), options.wait, asked.config)
