"""ClientHello, PROXY header, peers and TOML: any octets, in any pieces, and round trips."""

from __future__ import annotations

import ipaddress
import itertools

from hypothesis import given
from hypothesis import strategies as st

from echo_appliance.errors import ParseError
from echo_appliance.forward import config
from echo_appliance.forward.peers import Peers
from echo_appliance.forward.proxy_protocol import (
    Family,
    Header,
    parse,
    serialize_v1,
    serialize_v2,
)
from echo_appliance.forward.sni import HelloReader
from tests.unit import hellos

# -- ClientHello -----------------------------------------------------------------

names = st.from_regex(r"[a-z0-9-]{1,20}(\.[a-z0-9-]{1,20}){0,3}", fullmatch=True)
protocols = st.lists(st.binary(min_size=1, max_size=20), max_size=4)
others = st.tuples(st.integers(17, 0xFFFF), st.binary(max_size=100))


@st.composite
def hello_messages(draw: st.DrawFn) -> tuple[bytes, str, tuple[str, ...]]:
    """A ClientHello's message, and what it asks for."""
    name, wanted = draw(names), draw(protocols)
    extensions = draw(st.lists(others, max_size=3))
    extensions.insert(draw(st.integers(0, len(extensions))), hellos.server_name(name.encode()))
    if wanted:
        extensions.append(hellos.alpn(*wanted))
    message = hellos.hello(*extensions, session=draw(st.binary(max_size=32)))
    return message, name, tuple(one.decode("latin-1") for one in wanted)


def feed(octets: bytes, cuts: list[int]) -> tuple[str, tuple[str, ...]] | str | None:
    """Return what the reader makes of octets that come in these pieces."""
    reader = HelloReader()
    edges = sorted({min(cut, len(octets)) for cut in cuts} | {0, len(octets)})
    for start, end in itertools.pairwise(edges):
        try:
            found = reader.feed(octets[start:end])
        except ParseError as error:
            return str(error)
        if found is not None:
            return found.server_name, found.protocols
    return None


cuts = st.lists(st.integers(0, 700), max_size=20)


@given(hello_messages(), st.lists(st.integers(1, 300), min_size=1, max_size=5), cuts)
def test_sni_any_hello_in_any_records_and_pieces_is_read(
    made: tuple[bytes, str, tuple[str, ...]], sizes: list[int], pieces: list[int]
) -> None:
    message, name, wanted = made
    octets = hellos.records(message, sizes)
    assert feed(octets, pieces) == (name, wanted)
    assert feed(octets + b"what follows", pieces) == (name, wanted)


@given(st.binary(max_size=300), cuts)
def test_sni_any_octets_in_any_pieces_give_one_answer(octets: bytes, pieces: list[int]) -> None:
    whole, split = feed(octets, []), feed(octets, pieces)
    assert whole == split


@given(hello_messages(), st.integers(0, 400), st.integers(0, 255), cuts)
def test_sni_one_wrong_octet_never_does_harm(
    made: tuple[bytes, str, tuple[str, ...]], at: int, octet: int, pieces: list[int]
) -> None:
    octets = bytearray(hellos.records(made[0], [100]))
    octets[at % len(octets)] = octet
    assert feed(bytes(octets), []) == feed(bytes(octets), pieces)


# -- PROXY -------------------------------------------------------------------------

ports = st.integers(0, 0xFFFF)
inet = st.tuples(st.ip_addresses(v=4).map(str), ports)
inet6 = st.tuples(st.ip_addresses(v=6).map(str), ports)
paths = st.text("abc/.\u00e9", max_size=50).map(lambda path: (path, 0))
headers = st.one_of(
    st.builds(Header, st.just(Family.INET), inet, inet),
    st.builds(Header, st.just(Family.INET6), inet6, inet6),
    st.builds(Header, st.just(Family.UNIX), paths, paths),
    st.just(Header(Family.UNSPEC)),
    st.just(Header(Family.UNSPEC, local=True)),
)


@given(headers, st.binary(max_size=20))
def test_proxy_v2_any_header_comes_back(header: Header, rest: bytes) -> None:
    octets = serialize_v2(header)
    said = Header(Family.UNSPEC, local=True) if header.family is Family.UNSPEC else header
    assert parse(octets + rest) == (said, len(octets))


@given(headers, st.binary(max_size=20))
def test_proxy_v1_any_header_comes_back_as_far_as_it_goes(header: Header, rest: bytes) -> None:
    octets = serialize_v1(header)
    assert len(octets) <= 107
    known = header.family in (Family.INET, Family.INET6)
    assert parse(octets + rest) == (header if known else Header(Family.UNSPEC), len(octets))


@given(headers, st.booleans())
def test_proxy_every_beginning_asks_for_more(header: Header, binary: bool) -> None:
    octets = serialize_v2(header) if binary else serialize_v1(header)
    for size in range(1, len(octets)):
        assert parse(octets[:size]) is None


def answer(octets: bytes) -> object:
    try:
        return parse(octets)
    except ParseError:
        return "refused"


starts = st.sampled_from(
    [b"", b"PROXY ", b"PROXY TCP4 ", b"\r\n\r\n\0\r\nQUIT\n", b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0"]
)


@given(starts, st.binary(max_size=200))
def test_proxy_any_octets_parse_ask_for_more_or_are_refused(start: bytes, rest: bytes) -> None:
    octets = start + rest
    final = answer(octets)
    earlier = [answer(octets[:size]) for size in range(1, len(octets))]
    decided = [one for one in earlier if one is not None]
    assert all(one == final for one in decided), "more octets must not change the answer"


# -- peers ---------------------------------------------------------------------------


@given(st.ip_addresses(), st.integers(0, 128), st.ip_addresses())
def test_peers_agree_with_the_library(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
    length: int,
    other: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    network = ipaddress.ip_network((address, length % (address.max_prefixlen + 1)), strict=False)
    peers = Peers([str(network)])
    if not is_mapped(address):
        assert str(address) in peers
        assert is_mapped(other) or (str(other) in peers) == (other in network)


def is_mapped(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether it is an IPv4 address in IPv6's clothes: both are the same peer to us."""
    return isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None


def test_peers_take_a_mapped_address_for_what_it_stands_for() -> None:
    for text in ("10.0.0.0/8", "::ffff:10.0.0.0/104"):
        for source in ("10.1.2.3", "::ffff:10.1.2.3"):
            assert source in Peers([text])
    assert "10.1.2.3" not in Peers(["::/0"])


@given(st.text(max_size=30))
def test_peers_any_text_is_a_peer_or_refused(text: str) -> None:
    try:
        peers = Peers([text])
    except ParseError:
        return
    assert text in ("unix", "vsock") or any(mark in text for mark in ".:")
    assert peers.texts == [text]


# -- configuration ---------------------------------------------------------------------

values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(
                st.sampled_from(
                    ["to", "tls", "server-name", "alpn", "allow", "balance", "lifetime"]
                ),
                st.text(max_size=5),
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=15,
)


@given(st.dictionaries(st.sampled_from(["route", "defaults", "x"]), values, max_size=3))
def test_config_any_table_is_routes_or_refused(tables: dict[str, object]) -> None:
    try:
        routes = config.parse(tables, {})
    except ParseError:
        return
    assert config.describe(routes)
