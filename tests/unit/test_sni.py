"""ClientHello by ClientHello: what openssl sends, and what nobody should."""

from __future__ import annotations

import pytest

from echo_appliance.errors import ParseError
from echo_appliance.forward.sni import HELLO_LIMIT, ClientHello, HelloReader, alert
from tests.unit import hellos
from tests.unit.hellos import alpn, hello, records, server_name


def read(octets: bytes) -> ClientHello | None:
    return HelloReader().feed(octets)


def asked(octets: bytes) -> tuple[str, tuple[str, ...]]:
    found = read(octets)
    assert found is not None
    return found.server_name, found.protocols


def test_sni_of_openssl_is_read() -> None:
    assert asked(hellos.TLS13) == ("www.example.org", ("h2", "http/1.1"))
    assert asked(hellos.TLS12_WITHOUT_NAME) == ("", ())
    assert asked(hellos.TLS10) == ("old.example", ())


def test_sni_of_a_message_over_many_records_is_read() -> None:
    message = hello(server_name(b"a.example"), alpn(b"h2"))
    for size in (1, 2, 3, 5, 50):
        assert asked(records(message, [size])) == ("a.example", ("h2",))


def test_sni_of_the_longest_message_is_read() -> None:
    empty = len(hello(server_name(b"a.example"), (21, b""))) - 4
    message = hello(server_name(b"a.example"), (21, bytes(HELLO_LIMIT - empty)))
    assert len(message) == HELLO_LIMIT + 4
    assert asked(records(message)) == ("a.example", ())
    too_long = hello(server_name(b"a.example"), (21, bytes(HELLO_LIMIT - empty + 1)))
    with pytest.raises(ParseError):
        read(records(too_long))


def test_sni_skips_grease_and_ech() -> None:
    message = hello(
        (hellos.GREASE, b"\0"),
        (hellos.ECH, b"encrypted"),
        server_name(b"outer.example"),
        alpn(b"\x0a\x0a", b"h2"),
        (0xFAFA, b""),
        session=bytes(32),
    )
    assert asked(records(message)) == ("outer.example", ("\n\n", "h2"))


def test_sni_without_extensions_is_an_empty_name() -> None:
    body = b"\3\1" + bytes(32) + b"\0" + b"\0\2\0\5" + b"\1\0"
    assert asked(records(b"\1" + hellos.vector(3, body))) == ("", ())


def test_sni_waits_for_the_rest() -> None:
    for size in range(len(hellos.TLS13)):
        assert read(hellos.TLS13[:size]) is None


@pytest.mark.parametrize(
    "octets",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x80\x2e\1\3\1",  # SSL 2
        b"\x16\2",
        b"\x16\3\1\0\0",  # an empty record
        b"\x16\3\1\xff\xff",
        b"\x16\3\1\0\1\2",  # a ServerHello
        b"\x15\3\1\0\2\2\x28",  # an alert
        records(b"\1\xff\xff\xff"),
        records(hello((0, b""))),
        records(hello((0, b"\0\0"))),
        records(hello((0, b"\0\3\0\0\0"))),  # a name of no octets
        records(hello(server_name(b"a b\0"))),
        records(hello(server_name(b"." * 256))),
        records(hello(server_name(b"caf\xe9"))),
        records(hello(server_name(b"a"), server_name(b"b"))),
        records(hello(alpn(b"h2"), alpn(b"h3"))),
        records(hello(alpn(b""))),
        records(hello((16, b"\0\3\2h"))),
        records(b"\1" + hellos.vector(3, b"\3\3")),
        records(b"\1" + hellos.vector(3, hello()[4:] + b"more")),
    ],
)
def test_sni_nonsense_is_refused(octets: bytes) -> None:
    with pytest.raises(ParseError):
        read(octets)


def test_sni_alert_is_a_fatal_one() -> None:
    assert alert(112) == bytes.fromhex("15030100020270")
