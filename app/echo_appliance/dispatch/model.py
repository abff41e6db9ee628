"""Bindings: what they are, which one wins a packet, how ranges become aligned port blocks.

Knows no I/O and no kernel.  dispatch.bpf.c decides by the same rules; tests compare the two.

A binding gives a label the packets of one protocol to one prefix and one range of ports.
Which binding wins a packet:

1. the longest prefix;
2. of the same prefix, the narrowest range of ports (one port, then ranges, then all ports);
3. of two equally wide ranges that overlap, the higher one.

Protocols and address families never mix: ::/0 is all of IPv6 and none of IPv4.
"""

# What the module socket has them from: that one, with its enums and selectors, would be 3 of the
# 28 ms that a command takes.
from _socket import AF_INET, AF_INET6, inet_ntop, inet_pton

from ..errors import ParseError
from ..text import whole_number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PROTOCOLS = ("tcp", "udp")
FAMILIES = ("ipv4", "ipv6")
ADDRESS_BITS = (32, 128)
LABEL_OCTETS = 63
ALL_PORTS = (0, 65535)
_FAMILY_NUMBERS = (AF_INET, AF_INET6)
_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96


class Binding:
    """One rule.  Immutable by agreement; equality is by all that it says."""

    __slots__ = ("address", "ephemeral", "family", "high", "label", "low", "on_miss_pass", "prefix",
                 "protocol")  # fmt: skip

    def __init__(
        self,
        label: str,
        protocol: str,
        network: tuple[int, bytes, int],
        ports: tuple[int, int] = ALL_PORTS,
        on_miss_pass: bool = False,
        ephemeral: bool = False,
    ) -> None:
        self.label = label
        self.protocol = PROTOCOLS.index(protocol)
        self.family, self.address, self.prefix = network  # the address has no host bits
        self.low, self.high = ports
        self.on_miss_pass = on_miss_pass  # without a live socket: normal lookup, not a drop
        # Take the ports of local UDP clients, too: no question for TCP, nor for a single port.
        self.ephemeral = ephemeral and self.protocol == 1 and self.low != self.high

    @property
    def kind(self) -> int:
        """Protocol and family in one number, as the kernel's maps have it."""
        return self.protocol << 1 | self.family

    @property
    def place(self) -> tuple[int, int, bytes, int, int]:
        """What it is about: two bindings of the same place contradict or repeat each other."""
        return (self.kind, self.prefix, self.address, self.low, self.high)

    @property
    def spares_local(self) -> bool:
        """Whether the ports of local clients stay with them.

        An unconnected UDP client of this machine, on an address inside the prefix,
        gets its answers there, and the kernel asks us before it looks for that
        client.  A single port is meant as it is written; TCP knows its connections.
        """
        return self.protocol == 1 and self.low != self.high and not self.ephemeral

    def covers(self, address: bytes, port: int) -> bool:
        """Whether a packet to this address (of the same kind) and port is in it."""
        return self.low <= port <= self.high and mask(address, self.prefix) == self.address

    def rank(self) -> tuple[int, int, int]:
        """Return its weight: of the bindings that cover a packet, the greatest wins."""
        return (self.prefix, self.low - self.high, self.low)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Binding) and self._all() == other._all()

    def __hash__(self) -> int:
        return hash(self._all())

    def _all(self) -> tuple[object, ...]:
        return (self.place, self.label, self.on_miss_pass, self.ephemeral)

    def __str__(self) -> str:
        return f"{self.label}#{PROTOCOLS[self.protocol]}:[{self.network}]:{self.ports}"

    __repr__ = __str__

    @property
    def network(self) -> str:
        """Its prefix as people write it."""
        return format_network(self.family, self.address, self.prefix)

    @property
    def ports(self) -> str:
        """Its ports as the command line takes them; 0 is all of them."""
        return format_ports(self.low, self.high)


def winner(bindings: "Iterable[Binding]", kind: int, address: bytes, port: int) -> Binding | None:
    """Return the binding that a packet belongs to."""
    return max(covering(bindings, kind, address, port), key=Binding.rank, default=None)


def covering(
    bindings: "Iterable[Binding]", kind: int, address: bytes, port: int
) -> "Iterator[Binding]":
    """Yield every binding that covers the packet, in no order."""
    return (one for one in bindings if one.kind == kind and one.covers(address, port))


def blocks(low: int, high: int) -> "Iterator[tuple[int, int]]":
    """Yield the fewest aligned blocks (first and last port) that make up a range, in order.

    A block has 2^n ports and starts at a multiple of 2^n: at most 30 per range.
    """
    while low <= high:
        size = low & -low or 65536
        while low + size - 1 > high:
            size >>= 1
        yield low, low + size - 1
        low += size


def overlaps(one: Binding, other: Binding) -> bool:
    """Whether some packet is in both."""
    shorter = min(one.prefix, other.prefix)
    return (
        one.kind == other.kind
        and one.low <= other.high
        and other.low <= one.high
        and mask(one.address, shorter) == mask(other.address, shorter)
    )


def difference(
    old: "Iterable[Binding]", new: "Iterable[Binding]"
) -> tuple[list[Binding], list[Binding]]:
    """Return what a replacement of old by new takes away and what it adds, each sorted."""
    before, after = set(old), set(new)
    return sorted(before - after, key=order), sorted(after - before, key=order)


def order(binding: Binding) -> tuple[object, ...]:
    """Sort key of listings: protocols and families together, the most specific first."""
    width = binding.high - binding.low
    return (binding.kind, -binding.prefix, binding.address, width, -binding.low, binding.label)


def conflict(one: Binding, other: Binding) -> str | None:
    """Say why two bindings of the same place cannot both be; None when they repeat each other."""
    if one.label != other.label:
        return f"{other} contradicts {one}: unbind one of them, or use another prefix or port"
    if one != other:
        return f"{other} is given twice, with different options: unbind it first"
    return None


def warnings(binding: Binding, local_ports: tuple[int, int]) -> "Iterator[str]":
    """Yield a line for each way in which a binding takes more than people tend to mean."""
    if binding.prefix == 0:
        yield f"{binding} takes every address of this machine"
    low, high = local_ports
    overlap = binding.low <= high and low <= binding.high
    if not (overlap and binding.protocol == 1 and binding.low != binding.high):
        return
    if binding.ephemeral:
        yield f"{binding} takes ports {low}-{high} from local UDP clients: their answers go astray"
    else:
        yield f"{binding} leaves ports {low}-{high} to local UDP clients; --ephemeral takes them"


# -- text ------------------------------------------------------------------------


def mask(address: bytes, prefix: int) -> bytes:
    """Return the address without its host bits."""
    spare = len(address) * 8 - prefix
    if not spare:
        return address
    return (int.from_bytes(address, "big") >> spare << spare).to_bytes(len(address), "big")


def parse_address(text: str) -> tuple[int, bytes]:
    """Read an IPv4 or IPv6 address: family (0 or 1) and octets.  Raises ParseError."""
    family = 1 if ":" in text else 0
    try:
        return family, inet_pton(_FAMILY_NUMBERS[family], text)
    except (OSError, ValueError):
        raise ParseError(f"{text!r} is not an IPv4 or IPv6 address") from None


def parse_network(text: str) -> tuple[tuple[int, bytes, int], str | None]:
    """Read ADDRESS[/BITS]; return family, masked address and bits, and a note if it was masked.

    Raises ParseError.  IPv4-mapped prefixes are refused: packets never carry such
    addresses, so the binding would be dead, and reading it as IPv4 is guessing.
    """
    text_address, slash, text_bits = text.partition("/")
    family, address = parse_address(text_address)
    bits = ADDRESS_BITS[family]
    if slash:
        length = whole_number(text_bits)
        if length is None or length > bits:
            raise ParseError(f"{text!r:.60}: the prefix length must be 0 to {bits}")
        bits = length
    if family and bits >= 96 and address.startswith(_MAPPED):
        inner = format_network(0, address[12:], bits - 96)
        raise ParseError(f"{text!r} is an IPv4-mapped prefix, which no packet has: write {inner}")
    masked = mask(address, bits)
    network = (family, masked, bits)
    if masked == address:
        return network, None
    return network, f"{text} has host bits: taken as {format_network(*network)}"


def parse_ports(text: "str | int") -> tuple[int, int]:
    """Read a port, FIRST-LAST, or 0 for all ports.  Raises ParseError."""
    first, dash, last = str(text).partition("-")
    low, high = whole_number(first), whole_number(last if dash else first)
    if low is None or high is None or max(low, high) > ALL_PORTS[1]:
        raise ParseError(f"{text!r:.60} is not a port, FIRST-LAST, or 0 for all ports")
    if not dash:
        return (low, high) if low else ALL_PORTS
    if low > high:
        raise ParseError(f"ports {text}: the first is above the last; write {high}-{low}")
    return low, high


def parse_label(text: str) -> str:
    """Check a label: 1 to 63 octets, printable, without spaces.  Raises ParseError."""
    if not text:
        raise ParseError("a label must not be empty")
    if not text.isprintable() or " " in text:  # nor anything that is no UTF-8
        raise ParseError(f"label {text!r:.60} has spaces or unprintable characters")
    if len(text.encode()) > LABEL_OCTETS:
        raise ParseError(f"label {text[:20]!r}...: {len(text.encode())} octets, at most 63 fit")
    return text


def parse_protocol(text: str) -> str:
    """Check a protocol's name.  Raises ParseError."""
    if text not in PROTOCOLS:
        raise ParseError(f"{text!r} is not a protocol: use tcp or udp")
    return text


def format_network(family: int, address: bytes, prefix: int) -> str:
    """Return ADDRESS/BITS."""
    return f"{inet_ntop(_FAMILY_NUMBERS[family], address)}/{prefix}"


def format_ports(low: int, high: int) -> str:
    """Return a port, FIRST-LAST, or 0 for all ports."""
    if (low, high) == ALL_PORTS:
        return "0"
    return str(low) if low == high else f"{low}-{high}"


def kind_name(kind: int) -> tuple[str, str]:
    """Return the names of a kind's family and protocol: ("ipv4", "tcp")."""
    return FAMILIES[kind & 1], PROTOCOLS[kind >> 1]
