"""What a dispatcher does at this moment: bindings, destinations, counters, metrics text.

Reads only; a group that may read the pins needs no capability for it.
"""

from . import libbpf
from .labels import live, read_counters
from .layout import KINDS
from .model import PROTOCOLS, Binding, kind_name, order
from .state import Dispatcher

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .layout import Entry


class Destination:
    """One row of status: a label and a kind, with what was counted since the label was new."""

    __slots__ = ("bindings", "cookies", "errors", "kind", "label", "lookups", "misses")

    def __init__(self, label: str, kind: int) -> None:
        self.label = label
        self.kind = kind
        self.cookies: list[int] = []  # of its live sockets, by slot
        self.bindings = 0
        self.lookups = 0
        self.misses = 0
        self.errors = 0


def destinations(dispatcher: Dispatcher, bound: dict[tuple[int, int], int]) -> list[Destination]:
    """Return the destinations that have a binding or a socket, sorted.

    Bound: how many bindings there are, by number of the destination and kind.
    """
    labels = dispatcher.destinations()
    rows = {
        (number, kind): Destination(label, kind)
        for number, (label, _) in labels.items()
        for kind in range(KINDS)
    }
    for place, count in bound.items():
        if (row := rows.get(place)) is not None:
            row.bindings = count
    for number, (_, slots) in labels.items():
        for (kind, _), cookie in live(dispatcher, number, slots).items():
            rows[number, kind].cookies.append(cookie)
    used = {place: row for place, row in rows.items() if row.bindings or row.cookies}
    for (number, kind), row in used.items():
        row.lookups, row.misses, row.errors = read_counters(dispatcher, number, kind)
    return sorted(used.values(), key=lambda row: (row.label, row.kind & 1, row.kind >> 1))


def tally(bound: "Iterable[Entry]") -> dict[tuple[int, int], int]:
    """Count bindings that were read already, for destinations(): so both say the same."""
    found: dict[tuple[int, int], int] = {}
    for entry in bound:
        place = (entry.destination, entry.binding.kind)
        found[place] = found.get(place, 0) + 1
    return found


def others(dispatcher: Dispatcher) -> list[int]:
    """Return the programs that are attached beside ours; none, where we may not ask."""
    try:
        ours, _ = libbpf.link_info(dispatcher.descriptor("link"))
        return [one for one in libbpf.attached(dispatcher.place.netns) if one != ours]
    except PermissionError:
        return []


# -- text ----------------------------------------------------------------------------


def table(rows: "Sequence[Sequence[str]]") -> str:
    """Return rows as right-justified columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        " " + " ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(lines) + "\n"


def bindings_text(bound: "Iterable[Entry]") -> str:
    """Return the table of bindings, the most specific first."""
    head = ("protocol", "prefix", "port", "label", "hits", "on-miss")
    rows = [
        (PROTOCOLS[one.protocol], one.network, one.ports, one.label, str(entry.hits), on_miss(one))
        for entry in ordered(bound)
        for one in (entry.binding,)
    ]
    return table([head, *rows])


def destinations_text(rows: "Iterable[Destination]") -> str:
    """Return the table of destinations."""
    head = ("label", "domain", "protocol", "socket", "lookups", "misses", "errors")
    lines = [
        (
            row.label, *kind_name(row.kind), _sockets(row.cookies),
            str(row.lookups), str(row.misses), str(row.errors),
        )
        for row in rows
    ]  # fmt: skip
    return table([head, *lines])


def _sockets(cookies: list[int]) -> str:
    return ",".join(f"sk:{cookie:x}" for cookie in cookies) or "-"


def ordered(bound: "Iterable[Entry]") -> "list[Entry]":
    """Sort as listings are."""
    return sorted(bound, key=lambda entry: order(entry.binding))


def on_miss(binding: Binding) -> str:
    """Return the word of the option."""
    return "pass" if binding.on_miss_pass else "drop"


# -- data ----------------------------------------------------------------------------


def binding_data(binding: Binding) -> dict[str, object]:
    """Return a binding as --json and files have it."""
    data: dict[str, object] = {
        "label": binding.label,
        "protocol": PROTOCOLS[binding.protocol],
        "prefix": binding.network,
        "port": int(binding.ports) if binding.ports.isdigit() else binding.ports,
        "on-miss": on_miss(binding),
    }
    if binding.ephemeral:
        data["ephemeral"] = True
    return data


def entry_data(entry: "Entry") -> dict[str, object]:
    """Return a binding with what it counted."""
    return {**binding_data(entry.binding), "hits": entry.hits}


def destination_data(row: Destination) -> dict[str, object]:
    """Return a row of status."""
    domain, protocol = kind_name(row.kind)
    return {
        "label": row.label,
        "domain": domain,
        "protocol": protocol,
        "sockets": [f"sk:{cookie:x}" for cookie in row.cookies],
        "bindings": row.bindings,
        "lookups": row.lookups,
        "misses": row.misses,
        "errors": row.errors,
    }


# -- Prometheus -----------------------------------------------------------------------

_PREFIX = "echo_appliance_dispatch"
_COLUMNS = (
    ("lookups_total", "counter", "Packets that a binding of the destination won."),
    ("misses_total", "counter", "Packets for which no live socket was there."),
    ("errors_total", "counter", "Sockets that could not take a packet that was theirs."),
    ("bindings", "gauge", "Bindings in force."),
    ("sockets", "gauge", "Live sockets."),
)


def metrics_text(dispatcher: Dispatcher) -> str:
    """Return the counters in the Prometheus text format, version 0.0.4."""
    rows = destinations(dispatcher, dispatcher.count_bindings())
    lines = []
    for name, kind, words in _COLUMNS:
        lines += [f"# HELP {_PREFIX}_{name} {words}", f"# TYPE {_PREFIX}_{name} {kind}"]
        for row in rows:
            domain, protocol = kind_name(row.kind)
            labels = f'label="{_escape(row.label)}",domain="{domain}",protocol="{protocol}"'
            lines.append(f"{_PREFIX}_{name}{{{labels}}} {_value(row, name)}")
    return "\n".join(lines) + "\n"


def _value(row: Destination, name: str) -> int:
    values = {
        "lookups_total": row.lookups,
        "misses_total": row.misses,
        "errors_total": row.errors,
        "bindings": row.bindings,
        "sockets": len(row.cookies),
    }
    return values[name]


def _escape(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"")
