"""status, metrics, explain: the commands that only look."""

from ...errors import ParseError, SetupError, say, tell
from ...text import whole_number
from .. import control
from ..model import ALL_PORTS, PROTOCOLS, parse_address, parse_protocol
from .asked import open_to_read, parse, parser_of, write_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..command import Options


def status(options: "Options") -> int:
    """Show bindings, destinations and counters."""
    from .. import status as view

    parser = parser_of(options, "Show bindings and destinations.")
    parser.add("--json", default=False, help="write JSON")
    asked = parse(parser, options)
    with open_to_read(options) as dispatcher:
        if others := view.others(dispatcher):
            ids = ", ".join(map(str, others))
            say(f"dispatch: warning: another sk_lookup program ({ids}) is attached here, too")
        bound = control.entries(dispatcher)
        rows = view.destinations(dispatcher, view.tally(bound))
        if asked.json:
            write_json(
                {
                    "path": dispatcher.place.path,
                    "bindings": [view.entry_data(entry) for entry in view.ordered(bound)],
                    "destinations": [view.destination_data(row) for row in rows],
                }
            )
        else:
            tell("Bindings:\n" + view.bindings_text(bound))
            tell("\nDestinations:\n" + view.destinations_text(rows))
    return 0


def metrics(options: "Options") -> int:
    """Write the counters as Prometheus text."""
    from .. import status as view

    if options.rest and not options.rest[0].startswith("-"):  # tubular's listens there
        raise SetupError(
            "metrics writes to standard output: for a scraper, "
            "pass the sidecar a socket named metrics (dispatch-metrics@.socket)"
        )
    parser = parser_of(options, "Write the counters as Prometheus text.")
    parser.add("--json", default=False, help="write JSON: the destinations of status")
    asked = parse(parser, options)
    with open_to_read(options) as dispatcher:
        if asked.json:
            rows = view.destinations(dispatcher, dispatcher.count_bindings())
            write_json([view.destination_data(row) for row in rows])
        else:
            tell(view.metrics_text(dispatcher))
    return 0


def explain(options: "Options") -> int:
    """Say which binding wins a packet, and which socket takes it."""
    from ..explain import Packet
    from ..explain import explain as explained

    parser = parser_of(options, "Which binding wins, why, and who takes it.", "tcp|udp ADDR PORT")
    parser.add("--json", default=False, help="write JSON")
    parser.add("--source", metavar="ADDR,PORT", help="where the packet comes from")
    asked = parse(parser, options, 3, 3)
    protocol, address, port = asked.words
    family, octets = parse_address(address)
    number = _port(port)
    kind = PROTOCOLS.index(parse_protocol(protocol)) << 1 | family
    packet = Packet(kind, octets, number)
    if asked.source:
        packet.remote, packet.remote_port = _source(asked.source, family)
    with open_to_read(options) as dispatcher:
        answer = explained(dispatcher, packet)
    if asked.json:
        write_json(answer.as_json())
    else:
        tell(answer.as_text())
    return 0


def _source(text: str, family: int) -> tuple[bytes, int]:
    address, comma, port = text.rpartition(",")
    if not comma:
        raise ParseError(f"--source {text}: write ADDRESS,PORT")
    remote_family, remote = parse_address(address)
    if remote_family != family:
        raise ParseError(f"--source {text}: a packet has one family")
    return remote, _port(port)


def _port(text: str) -> int:
    number = whole_number(text)
    if number is None or number > ALL_PORTS[1]:
        raise ParseError(f"{text!r:.60} is not a port: a packet has one, 0 to 65535")
    return number
