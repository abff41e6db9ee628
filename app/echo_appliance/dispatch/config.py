"""Reads files of bindings: ours in TOML or JSON, and tubular's JSON.

    {"bindings": [{"label": "web", "prefix": "192.0.2.0/24", "port": 80}]}

    [[bindings]]
    label = "web"
    prefix = "192.0.2.0/24"
    port = "1000-2000"      # a port, FIRST-LAST, or 0 for all, which is the default
    protocol = "tcp"        # without it both, as in tubular's files
    on-miss = "pass"        # without a live socket; by default drop
    ephemeral = true        # of UDP, take the ports of local clients, too

Octets in, keys and values for the trie out.  Knows no I/O.  A million bindings
go through the loop in `compile_entries`, so it works on what is alike only once: a
shape is all of an entry but its prefix.
"""

from socket import AF_INET, inet_pton

from ..errors import ParseError
from .layout import KINDS, Table, keys, pack_value, range_keys, sizes, unpack
from .model import (
    ADDRESS_BITS,
    PROTOCOLS,
    Binding,
    blocks,
    conflict,
    parse_label,
    parse_network,
    parse_ports,
    parse_protocol,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Entry = dict[str, object]

_KEYS = frozenset(("label", "prefix", "port", "protocol", "on-miss", "ephemeral"))
_TOO_LONG = "a number has thousands of digits"  # int() refuses those
_IPV4_BITS = {str(bits): bits for bits in range(33)}


def parse(text: str) -> "list[Entry]":
    """Return the entries of a file, unchecked.  Raises ParseError with line and column."""
    data = _parse_json(text) if text.lstrip()[:1] == "{" else _parse_toml(text)
    if not isinstance(data, dict) or not isinstance(data.get("bindings"), list):
        raise ParseError('no list of bindings: write [[bindings]], or {"bindings": [...]}')
    if unknown := sorted(data.keys() - {"bindings"}):
        raise ParseError(f"unknown key {unknown[0]!r}: only bindings is known")
    entries: list[Entry] = data["bindings"]
    return entries


def _parse_json(text: str) -> object:
    import json

    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ParseError(f"{where}: {error.msg}") from None
    except ValueError:
        raise ParseError(_TOO_LONG) from None
    except RecursionError:
        raise ParseError("nested too deeply") from None


def _parse_toml(text: str) -> object:
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ParseError(str(error)) from None
    except ValueError:
        raise ParseError(_TOO_LONG) from None
    except RecursionError:
        raise ParseError("nested too deeply") from None


class _Row:
    """What all bindings of one shape and prefix length have in common."""

    __slots__ = ("family", "head", "host_bits", "prefix", "ranges", "tail", "values")

    def __init__(self, bindings: list[Binding], number: int) -> None:
        self.family, self.prefix = bindings[0].family, bindings[0].prefix
        self.host_bits = (1 << ADDRESS_BITS[self.family] - self.prefix) - 1
        self.values = [pack_value(one, number) for one in bindings]
        # Of one block, as nearly all are: the octets of the key before the address, and after it.
        own = [keys(one)[0] for one in bindings]
        self.head = [key[:8] for key in own]
        self.tail = own[0][8 + ADDRESS_BITS[self.family] // 8 :]
        self.ranges = len(list(blocks(bindings[0].low, bindings[0].high))) > 1


class _Shape:
    """An entry without its prefix, checked."""

    def __init__(self, entry: "Entry", number: "Callable[[str], int]") -> None:
        label, protocol = entry.get("label"), entry.get("protocol")
        if not isinstance(label, str):
            raise ParseError("label is missing" if label is None else "label must be a string")
        self.label = parse_label(label)
        self.protocols: tuple[str, ...] = PROTOCOLS
        if protocol is not None:
            self.protocols = (parse_protocol(str(protocol)),)
        port = entry.get("port", 0)
        if isinstance(port, bool) or not isinstance(port, int | str):
            raise ParseError(f"port {port!r} is not a port, FIRST-LAST, or 0 for all ports")
        self.ports = parse_ports(port)
        if entry.get("on-miss", "drop") not in ("drop", "pass"):
            raise ParseError(f"on-miss {entry['on-miss']!r}: use drop or pass")
        if not isinstance(entry.get("ephemeral", False), bool):
            raise ParseError("ephemeral must be true or false")
        self.options = (entry.get("on-miss") == "pass", bool(entry.get("ephemeral")))
        self.number = number(self.label)
        self._rows: dict[tuple[int, int], _Row] = {}

    def bindings(self, network: tuple[int, bytes, int]) -> list[Binding]:
        """Return the bindings of an entry of this shape, one per protocol."""
        return [
            Binding(self.label, protocol, network, self.ports, *self.options)
            for protocol in self.protocols
        ]

    def row(self, family: int, prefix: int) -> _Row:
        """Return what is alike for a prefix length; made once."""
        found = self._rows.get((family, prefix))
        if found is None:
            network = (family, bytes(ADDRESS_BITS[family] // 8), prefix)
            bindings = self.bindings(network)
            found = self._rows[family, prefix] = _Row(bindings, self.number)
        return found

    def sizes(self) -> list[int]:
        """Return the sizes of blocks that the shape's bindings use."""
        found = [0] * KINDS
        for family, prefix in self._rows:
            one = (family, bytes(ADDRESS_BITS[family] // 8), prefix)
            used = sizes([key for binding in self.bindings(one) for key in keys(binding)])
            found = [old | new for old, new in zip(found, used, strict=True)]
        return found


class Compiled:
    """What entries amount to.  `take` gets keys and values as they come; table has them all."""

    def __init__(self, number: "Callable[[str], int]") -> None:
        self.table: Table = {}
        self.sizes = [0] * KINDS
        self.masked = 0  # how many prefixes had host bits
        self._number = number
        self._labels: dict[int, str] = {}
        self._wide: list[tuple[Binding, bytes]] = []

    def number(self, label: str) -> int:
        """Return the label's number, and remember it for messages."""
        number = self._number(label)
        self._labels[number] = label
        return number

    # Hot: 1 us per entry of a million.
    def compile_entries(
        self, entries: "list[Entry]", take: "Callable[[list[bytes], list[bytes]], None]",
        chunk: int,
    ) -> None:  # fmt: skip
        """Check and compile all entries.  Raises ParseError that names the entry."""
        shapes: dict[tuple[object, ...], _Shape] = {}
        known: set[tuple[str, ...]] = set()
        table = self.table
        new_keys: list[bytes] = []
        new_values: list[bytes] = []
        index = 0
        try:
            for index, entry in enumerate(entries):  # noqa: B007 - which one it was, if it fails
                names = tuple(entry)
                if names not in known:
                    _check_keys(entry)
                    known.add(names)
                get = entry.get
                kind = (get("label"), get("protocol"), get("port", 0), get("on-miss", 0),
                        get("ephemeral", 0))  # fmt: skip
                shape = shapes.get(kind)
                if shape is None:
                    shape = shapes[kind] = _Shape(entry, self.number)
                octets, row = self._locate(shape, get("prefix"))  # type: ignore[arg-type]
                if row.ranges:
                    self._defer(shape, octets, row)
                    continue
                for head, value in zip(row.head, row.values, strict=True):
                    key = head + octets + row.tail
                    if key in table:
                        if table[key] != value:
                            self._check_same(key, value)
                        continue
                    table[key] = value
                    new_keys.append(key)
                    new_values.append(value)
                if len(new_keys) >= chunk:
                    take(new_keys, new_values)
                    new_keys, new_values = [], []
        except (ParseError, TypeError, AttributeError, ValueError) as error:
            raise ParseError(f"bindings[{index}]: {_words(entries[index], error)}") from None
        take(new_keys, new_values)
        take(*self._finish(shapes))

    def _locate(self, shape: _Shape, text: str) -> "tuple[bytes, _Row]":
        """Return the address of a prefix, and what it has in common with others of its length."""
        address, slash, bits = text.partition("/")
        length = _IPV4_BITS.get(bits) if slash else 32
        if length is not None and ":" not in address:
            try:
                octets = inet_pton(AF_INET, address)
            except (OSError, ValueError):
                pass  # parse_network() says it in words
            else:
                row = shape.row(0, length)
                if not int.from_bytes(octets, "big") & row.host_bits:
                    return octets, row
        (family, octets, prefix), note = parse_network(text)
        self.masked += note is not None
        return octets, shape.row(family, prefix)

    def _defer(self, shape: _Shape, octets: bytes, row: _Row) -> None:
        network = (row.family, octets, row.prefix)
        for binding, value in zip(shape.bindings(network), row.values, strict=True):
            record = keys(binding)[0]
            if record in self.table:
                self._check_same(record, value)
                continue
            self.table[record] = value
            self._wide.append((binding, value))

    def _check_same(self, key: bytes, value: bytes) -> None:
        """Two entries of one place must say the same."""
        [one] = unpack([(key, self.table[key])], self._labels)
        [other] = unpack([(key, value)], self._labels)
        if why := conflict(one.binding, other.binding):
            raise ParseError(why)

    def _finish(
        self, shapes: "dict[tuple[object, ...], _Shape]"
    ) -> tuple[list[bytes], list[bytes]]:
        """Add ranges of several blocks, where no narrower one is, and sum up the sizes."""
        rest = range_keys(self._wide, self.table)
        self.table.update(rest)
        for shape in shapes.values():
            used = shape.sizes()
            self.sizes = [old | new for old, new in zip(self.sizes, used, strict=True)]
        return list(rest), list(rest.values())


def _check_keys(entry: "Entry") -> None:
    if unknown := sorted(entry.keys() - _KEYS):
        raise ParseError(f"unknown key {unknown[0]!r}: use {', '.join(sorted(_KEYS))}")


def _words(entry: object, error: Exception) -> str:
    """Say what is wrong with an entry, also where its types are not those it should have."""
    if isinstance(error, ParseError):
        return str(error)
    if not isinstance(entry, dict):
        return f"{entry!r:.40} is not a table"
    if not isinstance(entry.get("prefix"), str):
        return "prefix is missing" if "prefix" not in entry else "prefix must be a string"
    return "a value is of a wrong type"
