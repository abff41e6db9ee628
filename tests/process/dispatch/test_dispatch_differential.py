"""Random bindings and packets: the Python model, the program in the kernel, real connections.

Three ways to know who wins a packet, which must always agree.
"""

from __future__ import annotations

import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from echo_appliance.dispatch import control
from echo_appliance.dispatch.explain import Packet, ask_kernel
from echo_appliance.dispatch.model import Binding, mask, winner
from tests.process.dispatch.clients import reached
from tests.process.dispatch.space import Space

LABELS = ("a", "b", "c", "d")

# Few addresses and ports, close together, so that prefixes nest and ranges overlap.
ADDRESSES = (
    st.integers(0, 3).map(lambda last: bytes([127, 1, 0, last])),
    st.integers(0, 3).map(lambda last: bytes([0x20, 0x01, 0x0D, 0xB8, *bytes(11), last])),
)
LENGTHS = (
    st.sampled_from([0, 8, 24, 28, 30, 31, 32]),
    st.sampled_from([0, 32, 124, 126, 127, 128]),
)
PORTS = st.one_of(st.integers(1, 20), st.integers(1, 20), st.integers(1, 65535))


@st.composite
def bindings(draw: st.DrawFn) -> Binding:
    family = draw(st.integers(0, 1))
    prefix = draw(LENGTHS[family])
    network = (family, mask(draw(ADDRESSES[family]), prefix), prefix)
    low, high = sorted((draw(PORTS), draw(PORTS)))
    # Ranges of one width, which overlap without one being in the other, are the hard case.
    same = (low, min(low + 5, 65535))
    ports = draw(st.sampled_from([(low, low), same, same, (low, high), (0, 65535)]))
    options = draw(st.booleans()), draw(st.booleans())
    return Binding(draw(st.sampled_from(LABELS)), draw(st.sampled_from(["tcp", "udp"])), network,
                   ports, *options)  # fmt: skip


@st.composite
def packets(draw: st.DrawFn) -> Packet:
    family = draw(st.integers(0, 1))
    return Packet(draw(st.integers(0, 1)) << 1 | family, draw(ADDRESSES[family]), draw(PORTS))


def one_per_place(listed: list[Binding]) -> list[Binding]:
    return list({one.place: one for one in listed}.values())


def test_dispatch_model_and_kernel_choose_the_same_binding(space: Space) -> None:
    with space.dispatcher() as dispatcher:

        @settings(
            max_examples=150, deadline=None, derandomize=False,
            suppress_health_check=[HealthCheck.function_scoped_fixture],
        )  # fmt: skip
        @given(st.lists(bindings(), max_size=12), st.lists(packets(), min_size=20, max_size=40))
        def agree(listed: list[Binding], sent: list[Packet]) -> None:
            chosen = one_per_place(listed)
            control.replace(dispatcher, chosen)
            assert {entry.binding for entry in control.entries(dispatcher)} == set(chosen)
            for packet in sent:
                won = winner(chosen, packet.kind, packet.address, packet.port)
                decision = ask_kernel(dispatcher, packet)
                expected = None if won is None else (won.prefix, won.low, won.high)
                assert (decision.winner and decision.winner[:3]) == expected

        agree()


@pytest.mark.parametrize("prefix", [31, 32], ids=["prefix", "host"])
@pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
def test_dispatch_model_and_kernel_agree_on_every_port_of_overlapping_ranges(
    space: Space, family: int, prefix: int
) -> None:
    address = (bytes([127, 1, 0, 2]), bytes([0x20, 0x01, 0x0D, 0xB8, *bytes(11), 2]))[family]
    network = (family, address, prefix + 96 * family)
    widths = st.sampled_from([0, 1, 2, 3, 3, 5, 5, 7, 12])
    ranges = st.tuples(st.integers(1, 30), widths).map(lambda pair: (pair[0], sum(pair)))
    with space.dispatcher() as dispatcher:

        @settings(
            max_examples=60, deadline=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture],
        )  # fmt: skip
        @given(st.lists(ranges, min_size=2, max_size=6, unique=True))
        def agree(listed: list[tuple[int, int]]) -> None:
            chosen = [Binding("a", "tcp", network, ports) for ports in listed]
            control.replace(dispatcher, chosen)
            for port in range(1, 45):
                won = winner(chosen, family, address, port)
                found = ask_kernel(dispatcher, Packet(family, address, port)).winner
                assert (found and found[1:3]) == (won and (won.low, won.high))

        agree()


@pytest.mark.parametrize("family", [0, 1], ids=["ipv4", "ipv6"])
def test_dispatch_kernel_knows_every_size_of_block(space: Space, family: int) -> None:
    address = (bytes([127, 1, 0, 2]), bytes([0x20, 0x01, 0x0D, 0xB8, *bytes(11), 2]))[family]
    with space.dispatcher() as dispatcher:
        for prefix in (31 + 96 * family, 32 + 96 * family):
            for size in (1 << bit for bit in range(17)):
                low, high = 65536 - size, 65535
                control.replace(
                    dispatcher, [Binding("a", "tcp", (family, address, prefix), (low, high))]
                )
                for port in {low, high, max(low - 1, 0)}:
                    found = ask_kernel(dispatcher, Packet(family, address, port)).winner
                    expected = (prefix, low, high) if port >= low else None
                    assert (found and found[:3]) == expected


def test_dispatch_one_by_one_and_all_at_once_lead_to_the_same(space: Space) -> None:
    """bind and unbind, in place or rebuilt, against the model of what should be there."""
    with space.dispatcher() as dispatcher:

        @settings(
            max_examples=60, deadline=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture],
        )  # fmt: skip
        @given(
            st.lists(bindings(), max_size=10), st.data(),
            st.lists(packets(), min_size=10, max_size=10),
        )  # fmt: skip
        def agree(listed: list[Binding], data: st.DataObject, sent: list[Packet]) -> None:
            control.replace(dispatcher, [])
            chosen = one_per_place(listed)
            for one in chosen:
                assert control.bind(dispatcher, one)
            for _ in range(len(chosen) // 2):
                gone = data.draw(st.sampled_from(chosen))
                chosen.remove(gone)
                control.unbind(dispatcher, gone)
            assert {entry.binding for entry in control.entries(dispatcher)} == set(chosen)
            for packet in sent:
                won = winner(chosen, packet.kind, packet.address, packet.port)
                found = ask_kernel(dispatcher, packet).winner
                assert (found and found[:3]) == (won and (won.prefix, won.low, won.high))

        agree()


def test_dispatch_real_connections_go_where_the_model_says(space: Space) -> None:
    listeners = {label: space.tcp() for label in LABELS}
    assert space.register(*listeners.items()).status == 0
    with space.dispatcher() as dispatcher:

        @settings(
            max_examples=40, deadline=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture],
        )  # fmt: skip
        @given(
            st.lists(bindings(), min_size=1, max_size=10),
            st.lists(st.tuples(ADDRESSES[0], PORTS), min_size=5, max_size=5),
        )
        def agree(listed: list[Binding], sent: list[tuple[bytes, int]]) -> None:
            chosen = [one for one in one_per_place(listed) if one.protocol == 0]
            control.replace(dispatcher, chosen)
            for address, port in sent:
                if port in {one.getsockname()[1] for one in listeners.values()}:
                    continue
                won = winner(chosen, 0, address, port)
                got = reached(list(listeners.values()), socket.inet_ntoa(address), port)
                assert got == (None if won is None else LABELS.index(won.label))

        agree()
