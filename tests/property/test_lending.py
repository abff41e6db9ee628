"""The words by which reply sockets are lent: a round trip, and any octets."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from echo_appliance.errors import ParseError
from echo_appliance.lending import FLOW_OCTETS, MESSAGE_LIMIT, pack_flow, parse_flow

if TYPE_CHECKING:
    from echo_appliance.lending import Flow

PORTS = st.integers(1, 65535)
INET = st.builds(lambda address, port: (str(address), port), st.ip_addresses(v=4), PORTS)
SCOPES = st.integers(0, 2**32 - 1)


def inet6(scope: int) -> st.SearchStrategy[tuple[str, int, int, int]]:
    return st.builds(
        lambda address, port: (str(address), port, 0, scope), st.ip_addresses(v=6), PORTS
    )


FLOWS: st.SearchStrategy[Flow] = st.one_of(
    st.tuples(INET, INET),
    SCOPES.flatmap(lambda scope: st.tuples(inet6(scope), inet6(scope))),
)


def normal(flow: Flow) -> object:
    return [(IPv6Address(one[0]) if ":" in one[0] else IPv4Address(one[0]), *one[1:])
            for one in flow]  # fmt: skip


@given(FLOWS)
def test_flow_reads_back_as_written(flow: Flow) -> None:
    octets = pack_flow(*flow)
    assert len(octets) == FLOW_OCTETS < MESSAGE_LIMIT
    assert normal(parse_flow(octets)) == normal(flow)


@given(st.one_of(st.binary(max_size=60), st.binary(min_size=FLOW_OCTETS, max_size=FLOW_OCTETS),
                 st.binary(min_size=40, max_size=40).map(b"\x04".__add__)))  # fmt: skip
def test_any_octets_are_a_flow_or_a_parse_error(octets: bytes) -> None:
    try:
        flow = parse_flow(octets)
    except ParseError:
        return
    assert pack_flow(*flow) == octets


def test_flow_is_laid_out_as_said() -> None:
    octets = pack_flow(("192.0.2.1", 258), ("198.51.100.2", 772))
    assert octets.hex() == (
        "04" + "c0000201" + "00" * 12 + "0102" + "c6336402" + "00" * 12 + "0304" + "00000000"
    )
