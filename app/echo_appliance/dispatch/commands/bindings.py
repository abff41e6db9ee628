"""bind, unbind, bindings, load-bindings: the commands about what is steered."""

from ...errors import say, tell
from .. import control
from ..model import (
    PROTOCOLS,
    Binding,
    mask,
    parse_label,
    parse_network,
    parse_ports,
    parse_protocol,
)
from ..state import Dispatcher
from .asked import choice, lock, one_of, open_to_read, parse, parser_of, place_of, write_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..command import Options
    from ..layout import Entry


def bind(options: "Options") -> int:
    """Add a binding."""
    parser = parser_of(options, "Steer packets to a label.", "LABEL tcp|udp PREFIX PORT")
    parser.add(
        "--on-miss", choice("drop", "pass"), default="drop", metavar="drop|pass",
        help="what to do while no socket is registered (default: drop)",
    )  # fmt: skip
    parser.add(
        "--ephemeral", default=False,
        help="of UDP, take the ports that local clients use, too",
    )  # fmt: skip
    asked = parse(parser, options, 4, 4)
    binding = _binding(asked.words, asked.on_miss == "pass", asked.ephemeral)
    place = place_of(options)
    with lock(options, place), Dispatcher(place, write=True) as dispatcher:
        added = control.bind(dispatcher, binding)
    say(f"dispatch: bound {binding}" if added else f"dispatch: {binding} is bound already")
    return 0


def unbind(options: "Options") -> int:
    """Take a binding away."""
    parser = parser_of(options, "Undo a bind.", "LABEL tcp|udp PREFIX PORT")
    binding = _binding(parse(parser, options, 4, 4).words)
    place = place_of(options)
    with lock(options, place), Dispatcher(place, write=True) as dispatcher:
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
    from ..status import bindings_text, entry_data, ordered

    usage = "[tcp|udp|any [PREFIX [PORT]]]"
    parser = parser_of(options, "List bindings, the most specific first.", usage)
    parser.add("--json", default=False, help="write JSON")
    asked = parse(parser, options, 0, 3)
    with open_to_read(options) as dispatcher:
        found = _overlapping(control.entries(dispatcher), asked.words)
    if asked.json:
        write_json([entry_data(entry) for entry in ordered(found)])
    else:
        tell(bindings_text(found))
    return 0


def load_bindings(options: "Options") -> int:
    """Replace all bindings by a file's."""
    from .. import bulk

    parser = parser_of(options, "Replace all bindings by a file's, in one step.", "FILE|-")
    parser.add("--dry-run", default=False, help="only say what would change")
    parser.add("--json", default=False, help="with --dry-run, write JSON")
    asked = parse(parser, options, 1, 1)
    [path] = asked.words
    octets = bulk.read_source(path)
    place = place_of(options)
    if asked.dry_run:
        with Dispatcher(place, write=False) as dispatcher:
            _show_preview(*bulk.preview(dispatcher, path, octets), asked.json)
        return 0
    import gc

    gc.disable()  # nothing here is garbage, and looking for it costs a third of the time
    with lock(options, place), Dispatcher(place, write=True) as dispatcher:
        count = bulk.load_bindings(dispatcher, path, octets)
    say(f"dispatch: {path}: " + ("unchanged" if count is None else f"{count} keys in force"))
    return 0


def _show_preview(gone: list[Binding], come: list[Binding], as_json: bool) -> None:
    from ..status import binding_data

    if as_json:
        data = {"remove": gone, "add": come}
        write_json({key: [binding_data(one) for one in found] for key, found in data.items()})
    else:
        lines = [f"- {_in_full(one)}\n" for one in gone] + [f"+ {_in_full(one)}\n" for one in come]
        tell("".join(lines))


def _in_full(binding: Binding) -> str:
    options = " on-miss pass" if binding.on_miss_pass else ""
    return f"{binding}{options}" + (" ephemeral" if binding.ephemeral else "")


def _overlapping(entries: "list[Entry]", words: list[str]) -> "list[Entry]":
    protocol, prefix, port = [*words, *("any", "", "0")[len(words) :]]
    one_of(protocol, (*PROTOCOLS, "any"), "a protocol")
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
