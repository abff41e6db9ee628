"""PROXY headers, by vectors that haproxy 2.6 sent and by the specification's text."""

from __future__ import annotations

import pytest

from echo_appliance.errors import ParseError
from echo_appliance.forward.proxy_protocol import (
    Family,
    Header,
    parse,
    serialize_v1,
    serialize_v2,
)

INET = Header(Family.INET, ("127.0.0.1", 38600), ("127.0.0.1", 44583))
INET6 = Header(Family.INET6, ("::1", 46058), ("::1", 41837))
UNSPEC = Header(Family.UNSPEC)
LOCAL = Header(Family.UNSPEC, local=True)

# haproxy: server ... send-proxy, send-proxy-v2; the client's 5 octets follow
HAPROXY = [
    (b"PROXY TCP4 127.0.0.1 127.0.0.1 38600 44583\r\nhello", INET),
    (
        b"PROXY TCP6 ::1 ::1 49664 44583\r\nhello",
        Header(Family.INET6, ("::1", 49664), ("::1", 44583)),
    ),
    (b"PROXY UNKNOWN\r\nhello", UNSPEC),
    (
        bytes.fromhex("0d0a0d0a000d0a515549540a2111000c7f0000017f000001aa8ea36d68656c6c6f"),
        Header(Family.INET, ("127.0.0.1", 43662), ("127.0.0.1", 41837)),
    ),
    (
        bytes.fromhex(
            "0d0a0d0a000d0a515549540a2121002400000000000000000000000000000001"
            "00000000000000000000000000000001b3eaa36d68656c6c6f"
        ),
        INET6,
    ),
    (bytes.fromhex("0d0a0d0a000d0a515549540a2000000068656c6c6f"), LOCAL),
]


@pytest.mark.parametrize(("octets", "header"), HAPROXY)
def test_proxy_header_of_haproxy_is_read(octets: bytes, header: Header) -> None:
    found = parse(octets)
    assert found is not None
    assert found[0] == header
    assert octets[found[1] :] == b"hello"


def test_proxy_header_is_written_as_haproxy_does() -> None:
    for octets, header in HAPROXY:
        write = serialize_v1 if octets.startswith(b"PROXY") else serialize_v2
        assert write(header) + b"hello" == octets


def test_proxy_unix_addresses_go_by_version_2_only() -> None:
    header = Header(Family.UNIX, ("\0abstract", 0), ("/run/web", 0))
    octets = serialize_v2(header)
    assert len(octets) == 16 + 216
    assert parse(octets) == (header, len(octets))
    assert serialize_v1(header) == b"PROXY UNKNOWN\r\n"


def test_proxy_tlvs_are_skipped() -> None:
    octets = bytearray(serialize_v2(INET))
    octets[14:16] = (12 + 7).to_bytes(2, "big")
    octets += b"\x04\0\4abcd" + b"rest"
    assert parse(bytes(octets)) == (INET, 16 + 12 + 7)


def test_proxy_addresses_of_a_local_header_are_ignored() -> None:
    octets = bytearray(serialize_v2(INET))
    octets[12] = 0x20
    assert parse(bytes(octets)) == (LOCAL, len(octets))


def test_proxy_unknown_line_is_ignored_to_its_end() -> None:
    assert parse(b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\nx") == (UNSPEC, 35)


@pytest.mark.parametrize(
    "octets",
    [
        b"GET / HTTP/1.1\r\n",
        b"PROXY  TCP4 1.1.1.1 2.2.2.2 1 2\r\n",
        b"PROXY TCP5 1.1.1.1 2.2.2.2 1 2\r\n",
        b"PROXY TCP4 1.1.1.1 2.2.2.2 1\r\n",
        b"PROXY TCP4 1.1.1.1 2.2.2.2 1 65536\r\n",
        b"PROXY TCP4 1.1.1.1 2.2.2.2 01 2\r\n",
        b"PROXY TCP4 1.1.1.1 2.2.2.2 -1 2\r\n",
        b"PROXY TCP4 1.1.1 2.2.2.2 1 2\r\n",
        b"PROXY TCP4 ::1 ::1 1 2\r\n",
        b"PROXY TCP6 1.1.1.1 2.2.2.2 1 2\r\n",
        b"PROXY TCP6 fe80::1%lo ::1 1 2\r\n",
        b"PROXY TCP4 \xff 2.2.2.2 1 2\r\n",
        b"PROXY " + b"x" * 101,
        b"\r\n\r\n\0\r\nQUIT\n\x11\x11\0\0",
        b"\r\n\r\n\0\r\nQUIT\n\x22\x11\0\0",
        b"\r\n\r\n\0\r\nQUIT\n\x21\x41\0\0",
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0b" + bytes(11),
        b"\r\n\r\n\0\r\nQUIX",
    ],
)
def test_proxy_nonsense_is_refused(octets: bytes) -> None:
    with pytest.raises(ParseError):
        parse(octets)
