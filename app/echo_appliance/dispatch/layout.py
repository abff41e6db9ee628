"""The kernel maps' layout, octet for octet: the other half of dispatch.bpf.c.

Binding <-> the keys and values of the trie.  Knows no I/O.

A range of ports is several keys, one per aligned block, each with a value that
names the whole range.  Two ranges of one prefix may share a block; its key
holds the winner, and so a range could lose all its blocks.  Hence a range of
more than one block also has a record: a key that no packet looks up.

An aligned block is a prefix of the port.  So the keys of one address, a host,
end in the port, and one lookup finds the smallest block with this port.  It
must therefore hold the winner among all ranges of the host that it lies in.
What is bound to all ports of a shorter prefix is found by the same lookup,
where the host has nothing: nothing of the port counts in its key.
"""

import struct

from .model import ADDRESS_BITS, ALL_PORTS, PROTOCOLS, Binding, blocks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LAYOUT = 3  # of all maps; a dispatcher with another one is not ours to touch
KINDS = 4
DESTINATIONS = 1024
SLOTS = 32
FIXED_BITS = 32  # of a block's key, before its address
RECORD_BITS = 64  # the same of a record's key
RECORD = 0x80  # added to the kind in the key of a record
PORT_BITS = 16
PORT_LAST = 1 << 30  # in sizes[kind], beside the bits of block sizes, for keys that end in the port
RECORDS_IN_USE = 1 << 31  # the same

ON_MISS_PASS = 1
SPARE_LOCAL = 2

U32 = struct.Struct("=I")
U64 = struct.Struct("=Q")
# bits (host order, by the kernel's struct bpf_lpm_trie_key), kind, block: 2 * its first port +
# the number of its ports, of which the lowest bit that is set tells the size; address.  That of a
# host or of all ports has 0 for the block, and the port last: bits tells how much of it counts.
KEY = struct.Struct("=IB3s20s")
KEY_BITS = 192  # at most
# bits, kind and RECORD, 0, first port, last port, address
_RECORD_KEY = struct.Struct("=IBB2s2s2x16s")
# hits, destination, low, high, prefix, flags
VALUE = struct.Struct("=QIHHBB6x")
# label, slots of each kind: 8 bits for each, the lowest for the first
DESTINATION = struct.Struct("=64sI4x")
COUNTERS = struct.Struct("=QQQ")
# layout (first in every version), local_low, local_high, sizes of TCP and of UDP, source, capacity
SETTINGS = struct.Struct("=IHHQQ32sI4x")
EXPLAINED = struct.Struct("=24sII")

Table = dict[bytes, bytes]  # keys and values of a trie


def slot_index(destination: int, kind: int, slot: int = 0) -> int:
    """Return a slot's place in the sockets map."""
    return (destination * KINDS + kind) * SLOTS + slot


def pack_key(binding: Binding, low: int, high: int) -> bytes:
    """Return the key of one block of a binding."""
    return _pack_key(binding.kind, binding.prefix, low, high, binding.address)


def _pack_key(kind: int, prefix: int, low: int, high: int, address: bytes) -> bytes:
    bits, size = FIXED_BITS + prefix, size_bit(low, high)
    if prefix < ADDRESS_BITS[kind & 1] and (low, high) != ALL_PORTS:
        return KEY.pack(bits, kind, (2 * low + size).to_bytes(3, "big"), address)
    bits += PORT_BITS + 1 - size.bit_length()
    return KEY.pack(bits, kind, bytes(3), address + low.to_bytes(2, "big"))


def _pack_record_key(kind: int, prefix: int, low: int, high: int, address: bytes) -> bytes:
    ports = low.to_bytes(2, "big"), high.to_bytes(2, "big")
    return _RECORD_KEY.pack(RECORD_BITS + prefix, kind | RECORD, 0, *ports, address)


def pack_value(binding: Binding, destination: int, hits: int = 0) -> bytes:
    """Return the value that all keys of a binding have."""
    flags = (ON_MISS_PASS if binding.on_miss_pass else 0) | (
        SPARE_LOCAL if binding.spares_local else 0
    )
    return VALUE.pack(hits, destination, binding.low, binding.high, binding.prefix, flags)


def keys(binding: Binding) -> list[bytes]:
    """Return all keys of a binding: its only block's, or its record's and all blocks'."""
    parts = list(blocks(binding.low, binding.high))
    found = [pack_key(binding, *part) for part in parts]
    if len(parts) > 1:
        where = (binding.kind, binding.prefix, binding.low, binding.high, binding.address)
        found.insert(0, _pack_record_key(*where))
    return found


def add_all(table: Table, bindings: "Iterable[tuple[Binding, bytes]]") -> None:
    """Put bindings with their values into a table, the winner in each key that they share."""
    ranges = []
    for binding, value in bindings:
        own, *parts = keys(binding)
        table[own] = value
        if parts:
            ranges.append((binding, value))
    table.update(range_keys(ranges, table))


def range_keys(ranges: "list[tuple[Binding, bytes]]", table: Table) -> Table:
    """Return the keys of ranges of several blocks, the winner in each.

    Table has all other bindings, of which none loses its only key to a range: it is narrower.
    """
    found: Table = {}
    hosts: dict[bytes, set[bytes]] = {}  # the keys of each that has ranges
    shared = set()  # those of them that have more than one binding
    for binding, value in ranges:
        own = keys(binding)
        if host := _host(own[1]):
            if host in hosts:
                shared.add(host)
            hosts.setdefault(host, set()).update(own[1:])
        for key in own:
            present = found.get(key) or table.get(key)
            if present is None or _value_rank(present) <= _value_rank(value):
                found[key] = value
    starts = {host[:8] for host in hosts}  # which cost less to look up, for each of a million
    for key in table if hosts else ():
        if key[4:12] in starts and (host := _host(key)) in hosts:
            shared.add(host)
            hosts[host].add(key)
    for host in shared:
        _inherit(found, hosts[host], table)
    return found


def _inherit(found: Table, of_host: set[bytes], table: Table) -> None:
    """Let each block of a host have the winner of all blocks that it lies in."""
    spans = []
    for key in of_host:
        first = int.from_bytes(key[4:], "big")  # the port counts, all before it is alike
        last = first | (1 << KEY_BITS - U32.unpack_from(key)[0]) - 1
        spans.append((first, -last, key))
    around: list[tuple[int, bytes]] = []
    for first, last, key in sorted(spans):
        while around and around[-1][0] < first:
            around.pop()
        value = found.get(key) or table[key]
        if around and _value_rank(value) < _value_rank(around[-1][1]):
            value = found[key] = around[-1][1]
        around.append((-last, value))


def _value_rank(value: bytes) -> tuple[int, int]:
    """Return what Binding.rank() compares among bindings of the same prefix."""
    _, _, low, high, _, _ = VALUE.unpack(value)
    return (low - high, low)


def _host(key: bytes) -> bytes:
    """Return kind and address of a host's key; nothing of others."""
    bits = ADDRESS_BITS[key[4] & 1]
    if key[4] & RECORD or U32.unpack_from(key)[0] < FIXED_BITS + bits:
        return b""
    return key[4 : 8 + bits // 8]


def own_key(key: bytes, value: bytes) -> bytes:
    """Return the key that its binding has for itself, whatever others there are.

    That of its only block, or its record; any of its keys and its value tell it.
    """
    _, _, low, high, prefix, _ = VALUE.unpack(value)
    width = high - low + 1
    if key[4] & RECORD or block_size(key) == width:
        return key
    _, kind, _, address = KEY.unpack(key)
    is_block = not (width & width - 1 or low & width - 1)
    pack = _pack_key if is_block else _pack_record_key
    return pack(kind, prefix, low, high, address[: ADDRESS_BITS[kind & 1] // 8])


def carried_hits(old: "Iterable[tuple[bytes, bytes]]", new: Table) -> Table:
    """Return the values of those bindings of `new` that were in `old` too, with their hits there.

    A binding's hits are those of all its keys; the sum goes to its own key.
    """
    carried: dict[bytes, int] = {}
    for key, value in old:
        own = own_key(key, value)
        if new.get(own, b"")[8:] == value[8:]:
            carried[own] = carried.get(own, 0) + U64.unpack_from(value)[0]
    return {key: U64.pack(hits) + new[key][8:] for key, hits in carried.items()}


def sizes(table: "Iterable[bytes]") -> list[int]:
    """Return, for each kind, the block sizes in use, as settings has them."""
    found = [0] * KINDS
    # Of a million keys there are few such parts.
    for part in {key[4:8] for key in table}:
        if part[0] & RECORD:
            found[part[0] & ~RECORD] |= RECORDS_IN_USE
        else:
            found[part[0]] |= block_size(bytes(4) + part) if any(part[1:]) else PORT_LAST
    return found


def count_bindings(batches: "Iterable[tuple[bytes, bytes]]") -> dict[tuple[int, int], int]:
    """Return how many bindings each destination and kind has, of keys and values as they lie.

    Of a million no object is made for each, so that they can be counted at every scrape.
    """
    found: dict[tuple[int, int], int] = {}
    for some_keys, values in batches:
        kinds = some_keys[4 :: KEY.size]
        destinations = memoryview(values).cast("I")[2 :: VALUE.size // 4].tolist()
        ports = memoryview(values).cast("H")
        lows = ports[6 :: VALUE.size // 2].tolist()
        highs = ports[7 :: VALUE.size // 2].tolist()
        rows = zip(kinds, destinations, lows, highs, strict=True)
        for index, (kind, destination, low, high) in enumerate(rows):
            # A port, or all ports, has one key, and lends its value to no other.
            if 0 < high - low < ALL_PORTS[1] and not kind & RECORD:
                start = index * KEY.size
                if block_size(some_keys[start : start + 8]) != size_bit(low, high):
                    continue  # one block of several: the record counts
            place = (destination, kind & ~RECORD)
            found[place] = found.get(place, 0) + 1
    return found


def block_size(key: bytes) -> int:
    """Return how many ports the block of a key has, of which the first 8 octets tell it."""
    if block := int.from_bytes(key[5:8], "big"):
        return block & -block
    spare = FIXED_BITS + ADDRESS_BITS[key[4] & 1] + PORT_BITS - int(U32.unpack_from(key)[0])
    return 1 << min(spare, PORT_BITS)


def size_bit(low: int, high: int) -> int:
    """Return the bit of a block's size: blocks of 2^n ports are bit n."""
    return high - low + 1


def unpack(table: "Iterable[tuple[bytes, bytes]]", labels: dict[int, str]) -> "Iterator[Entry]":
    """Yield each binding of a trie once, in no order."""
    entries: dict[tuple[int, bytes, int, int, int], Entry] = {}
    for key, value in table:
        _, kind, _, address = KEY.unpack(key)
        if kind & RECORD:
            _, kind, _, _, _, address = _RECORD_KEY.unpack(key)
        hits, destination, low, high, prefix, flags = VALUE.unpack(value)
        address = address[: ADDRESS_BITS[kind & 1] // 8]
        place = (kind & ~RECORD, address, prefix, low, high)
        if (entry := entries.get(place)) is None:
            label = labels.get(destination, f"?{destination}")
            entries[place] = Entry(_binding(place, flags, label), destination, hits)
        else:
            entry.hits += hits
    yield from entries.values()


def _binding(place: tuple[int, bytes, int, int, int], flags: int, label: str) -> Binding:
    kind, address, prefix, low, high = place
    network = (kind & 1, address, prefix)
    options = (bool(flags & ON_MISS_PASS), not flags & SPARE_LOCAL)
    return Binding(label, PROTOCOLS[kind >> 1], network, (low, high), *options)


class Entry:
    """A binding as the kernel has it."""

    __slots__ = ("binding", "destination", "hits")

    def __init__(self, binding: Binding, destination: int, hits: int) -> None:
        self.binding = binding
        self.destination = destination
        self.hits = hits
