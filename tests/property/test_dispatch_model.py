"""Bindings without a kernel: blocks, text, keys and values, differences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_appliance.dispatch.config import Compiled
from echo_appliance.dispatch.layout import (
    FIXED_BITS,
    KEY_BITS,
    PORT_BITS,
    PORT_LAST,
    RECORD,
    RECORDS_IN_USE,
    U32,
    U64,
    VALUE,
    add_all,
    carried_hits,
    count_bindings,
    keys,
    own_key,
    pack_value,
    sizes,
    unpack,
)
from echo_appliance.dispatch.model import (
    ADDRESS_BITS,
    ALL_PORTS,
    Binding,
    blocks,
    difference,
    mask,
    parse_network,
    parse_ports,
    winner,
)
from echo_appliance.dispatch.status import binding_data
from echo_appliance.errors import ParseError

ports = st.integers(0, 65535)
ranges = st.tuples(ports, ports).map(lambda pair: (min(pair), max(pair)))


@st.composite
def networks(draw: st.DrawFn) -> tuple[int, bytes, int]:
    family = draw(st.integers(0, 1))
    octets = (4, 16)[family]
    prefix = draw(st.one_of(st.just(octets * 8), st.integers(0, octets * 8)))
    return family, mask(draw(st.binary(min_size=octets, max_size=octets)), prefix), prefix


@st.composite
def bindings(draw: st.DrawFn) -> Binding:
    protocol = draw(st.sampled_from(["tcp", "udp"]))
    label = draw(st.sampled_from(["a", "b"]))
    options = draw(st.booleans()), draw(st.booleans())
    ports = draw(st.one_of(st.just(ALL_PORTS), ranges))
    return Binding(label, protocol, draw(networks()), ports, *options)


@given(ranges)
def test_blocks_are_aligned_make_up_the_range_and_are_few(ports: tuple[int, int]) -> None:
    parts = list(blocks(*ports))
    assert parts[0][0] == ports[0]
    assert parts[-1][1] == ports[1]
    assert all(one[1] + 1 == other[0] for one, other in pairwise(parts))
    for low, high in parts:
        size = high - low + 1
        assert size & (size - 1) == 0
        assert low % size == 0
    assert len(parts) <= 30


@given(networks())
def test_network_reads_back_as_written(network: tuple[int, bytes, int]) -> None:
    binding = Binding("a", "tcp", network)
    mapped = network[2] >= 96 and network[1].startswith(bytes(10) + b"\xff\xff")
    if network[0] and mapped:
        with pytest.raises(ParseError, match="IPv4-mapped"):
            parse_network(binding.network)
    else:
        assert parse_network(binding.network) == (network, None)


@given(ranges)
def test_ports_read_back_as_written(ports: tuple[int, int]) -> None:
    written = Binding("a", "tcp", (0, bytes(4), 0), ports).ports
    if ports == (0, 0):
        return  # port 0 alone cannot be said: it stands for all
    assert parse_ports(written) == ports


@given(st.text(max_size=40))
def test_any_text_is_a_network_and_ports_or_a_parse_error(text: str) -> None:
    for parse in (parse_network, parse_ports):
        try:
            parse(text)
        except ParseError:
            pass


@given(st.lists(bindings(), max_size=8, unique_by=lambda one: one.place))
def test_a_table_gives_back_the_bindings_it_was_made_of(listed: list[Binding]) -> None:
    numbers = {"a": 1, "b": 7}
    table: dict[bytes, bytes] = {}
    add_all(table, ((one, pack_value(one, numbers[one.label])) for one in listed))
    found = [entry.binding for entry in unpack(table.items(), {1: "a", 7: "b"})]
    assert len(found) == len(listed)
    assert set(found) == set(listed)
    counts = Counter((numbers[one.label], one.kind) for one in listed)
    batches = [(b"".join(table), b"".join(table.values()))]
    assert count_bindings([*batches, (b"", b"")]) == counts
    assert count_bindings([*batches, *batches]) == counts + counts


@given(st.lists(bindings(), max_size=6, unique_by=lambda one: one.place))
def test_a_table_does_not_depend_on_the_order_of_bindings(listed: list[Binding]) -> None:
    tables: list[dict[bytes, bytes]] = [{}, {}]
    for table, turn in zip(tables, (listed, listed[::-1]), strict=True):
        add_all(table, ((one, pack_value(one, 0)) for one in turn))
    assert tables[0] == tables[1]


@given(bindings())
def test_sizes_name_every_block_of_a_binding(binding: Binding) -> None:
    found = keys(binding)
    used = sizes(found)
    plain = [key for key in found if not key[4] & RECORD]
    assert len(found) == (len(plain) + 1 if len(plain) > 1 else 1)
    assert bool(used[binding.kind] & RECORDS_IN_USE) == (len(plain) > 1)
    whole = binding.prefix == ADDRESS_BITS[binding.family]
    if whole or (binding.low, binding.high) == ALL_PORTS:
        assert used[binding.kind] & ~RECORDS_IN_USE == PORT_LAST
    else:
        expected = sum({high - low + 1 for low, high in blocks(binding.low, binding.high)})
        assert used[binding.kind] & ~RECORDS_IN_USE == expected


def lookup_in(table: dict[bytes, bytes], kind: int) -> Callable[[bytes, int], bytes | None]:
    """Return the lookup of dispatch.bpf.c, step by step, in a trie that is a dict."""
    trie = {(bits, mask(key[4:], bits)): value for key, value in table.items()
            for bits in U32.unpack_from(key)}  # fmt: skip
    lengths = sorted({bits for bits, _ in trie}, reverse=True)
    used = sizes(table)[kind]

    def longest(octets: bytes, bits: int) -> bytes | None:
        octets = octets.ljust(KEY_BITS // 8, b"\0")
        found = (trie.get((length, mask(octets, length))) for length in lengths if length <= bits)
        return next((value for value in found if value is not None), None)

    def rank(value: bytes) -> tuple[int, int, int]:
        _, _, low, high, prefix, _ = VALUE.unpack(value)
        return prefix, low - high, low

    def look_up(address: bytes, port: int) -> bytes | None:
        whole = FIXED_BITS + len(address) * 8
        found = None
        if used & PORT_LAST:
            octets = bytes([kind, 0, 0, 0]) + address + port.to_bytes(2, "big")
            found = longest(octets, whole + PORT_BITS)
            if found is not None and VALUE.unpack(found)[4] == len(address) * 8:
                return found
        in_use = [1 << bit for bit in range(16) if used & 1 << bit]
        starts = ((kind << 24 | 2 * (port & -size) + size).to_bytes(4, "big") for size in in_use)
        others = [longest(start + address, whole) for start in starts]
        return max((one for one in (found, *others) if one is not None), key=rank, default=None)

    return look_up


few_hosts = st.integers(0, 1).map(lambda last: (0, bytes([192, 0, 2, last]), 32))
shorter = st.sampled_from([31, 24, 0])
few_networks = st.one_of(
    few_hosts,
    few_hosts,
    shorter.map(lambda prefix: (0, mask(bytes([192, 0, 2, 0]), prefix), prefix)),
)
near_ports = st.one_of(st.integers(0, 40), st.sampled_from([1000, 65535]))
near_ranges = st.one_of(
    st.sampled_from([(0, 65535), (0, 15), (8, 15), (16, 31)]),
    st.tuples(near_ports, near_ports).map(lambda pair: (min(pair), max(pair))),
    st.tuples(st.integers(0, 40), st.just(5)).map(lambda pair: (pair[0], sum(pair))),
)
neighbours = st.builds(
    Binding, st.sampled_from(["a", "b"]), st.just("tcp"), few_networks, near_ranges
)


@given(st.lists(neighbours, max_size=8, unique_by=lambda one: one.place))
def test_a_table_gives_each_packet_to_the_winner(listed: list[Binding]) -> None:
    table: dict[bytes, bytes] = {}
    add_all(table, ((one, pack_value(one, number)) for number, one in enumerate(listed)))
    look_up = lookup_in(table, 0)
    addresses = [bytes([192, 0, 2, last]) for last in range(3)]
    for address in addresses:
        for port in (*range(48), 999, 1000, 1001, 65535):
            won = winner(listed, 0, address, port)
            value = look_up(address, port)
            found = None if value is None else listed[VALUE.unpack(value)[1]]
            assert found == won
    # Hits of whatever key go to the binding that its value names.
    assert {own_key(key, value) for key, value in table.items()} == {keys(one)[0] for one in listed}
    hit = [(key, U64.pack(1) + value[8:]) for key, value in table.items()]
    carried = carried_hits(hit, table)
    assert sum(U64.unpack_from(value)[0] for value in carried.values()) == len(table)


either = st.lists(st.one_of(neighbours, bindings()), max_size=8, unique_by=lambda one: one.place)


@given(either.filter(lambda listed: all(one.high for one in listed)))  # a file has no port 0
def test_a_file_leads_to_the_table_of_its_bindings(listed: list[Binding]) -> None:
    numbers = {"a": 1, "b": 7}
    table: dict[bytes, bytes] = {}
    add_all(table, ((one, pack_value(one, numbers[one.label])) for one in listed))
    taken: dict[bytes, bytes] = {}

    def take(keys: list[bytes], values: list[bytes]) -> None:
        taken.update(zip(keys, values, strict=True))

    compiled = Compiled(numbers.__getitem__)
    compiled.compile_entries([binding_data(one) for one in listed], take, 2)
    assert taken == compiled.table == table
    assert compiled.sizes == sizes(table)


@given(st.lists(bindings(), max_size=6), st.lists(bindings(), max_size=6))
def test_difference_leads_from_old_to_new(old: list[Binding], new: list[Binding]) -> None:
    gone, come = difference(old, new)
    assert set(old) - set(gone) | set(come) == set(new)
    assert not set(gone) & set(come)


@given(st.lists(bindings(), max_size=8), st.integers(0, 3), st.data(), ports)
def test_winner_covers_the_packet_and_none_that_covers_it_ranks_higher(
    listed: list[Binding], kind: int, data: st.DataObject, port: int
) -> None:
    octets = (4, 16)[kind & 1]
    address = data.draw(st.binary(min_size=octets, max_size=octets))
    won = winner(listed, kind, address, port)
    covering = [one for one in listed if one.kind == kind and one.covers(address, port)]
    assert (won is None) == (not covering)
    if won is not None:
        assert won in covering
        assert won.prefix == max(one.prefix for one in covering)
        same = [one for one in covering if one.prefix == won.prefix]
        assert won.high - won.low == min(one.high - one.low for one in same)
