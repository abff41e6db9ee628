"""Bindings without a kernel: blocks, text, keys and values, differences."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_appliance.dispatch.layout import (
    RECORD,
    RECORDS_IN_USE,
    add_all,
    count_bindings,
    keys,
    pack_value,
    sizes,
    unpack,
)
from echo_appliance.dispatch.model import (
    Binding,
    blocks,
    difference,
    mask,
    parse_network,
    parse_ports,
    winner,
)
from echo_appliance.errors import ParseError

ports = st.integers(0, 65535)
ranges = st.tuples(ports, ports).map(lambda pair: (min(pair), max(pair)))


@st.composite
def networks(draw: st.DrawFn) -> tuple[int, bytes, int]:
    family = draw(st.integers(0, 1))
    octets = (4, 16)[family]
    prefix = draw(st.integers(0, octets * 8))
    return family, mask(draw(st.binary(min_size=octets, max_size=octets)), prefix), prefix


@st.composite
def bindings(draw: st.DrawFn) -> Binding:
    protocol = draw(st.sampled_from(["tcp", "udp"]))
    label = draw(st.sampled_from(["a", "b"]))
    options = draw(st.booleans()), draw(st.booleans())
    return Binding(label, protocol, draw(networks()), draw(ranges), *options)


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
    for low, high in blocks(binding.low, binding.high):
        assert used[binding.kind] & (high - low + 1)


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
