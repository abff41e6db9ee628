"""Target texts: every form that README shows, and what is wrong with the others."""

import socket

import pytest

from echo_appliance.errors import ParseError
from echo_appliance.target import parse_target


@pytest.mark.parametrize(
    ("text", "family", "kind", "host", "port", "path"),
    [
        ("tcp:127.0.0.1:3000", socket.AF_INET, socket.SOCK_STREAM, "127.0.0.1", 3000, ""),
        ("tcp:[::1]:3000", socket.AF_INET6, socket.SOCK_STREAM, "::1", 3000, ""),
        ("tcp:[fe80::1%lo]:1", socket.AF_INET6, socket.SOCK_STREAM, "fe80::1%lo", 1, ""),
        ("tcp:localhost:65535", socket.AF_UNSPEC, socket.SOCK_STREAM, "localhost", 65535, ""),
        ("udp:127.0.0.1:53", socket.AF_INET, socket.SOCK_DGRAM, "127.0.0.1", 53, ""),
        ("unix:/run/x:y", socket.AF_UNIX, socket.SOCK_STREAM, "", 0, "/run/x:y"),
        ("unix:@name", socket.AF_UNIX, socket.SOCK_STREAM, "", 0, "\0name"),
        ("unix-dgram:relative", socket.AF_UNIX, socket.SOCK_DGRAM, "", 0, "relative"),
        ("unix-seqpacket:/s", socket.AF_UNIX, socket.SOCK_SEQPACKET, "", 0, "/s"),
        ("vsock:1:3000", socket.AF_VSOCK, socket.SOCK_STREAM, "1", 3000, ""),
        ("vsock-seqpacket:42:9", socket.AF_VSOCK, socket.SOCK_SEQPACKET, "42", 9, ""),
        ("vsock-uds:/run/vm:3000", socket.AF_UNIX, socket.SOCK_STREAM, "", 3000, "/run/vm"),
        ("vsock-uds:@a:b:9", socket.AF_UNIX, socket.SOCK_STREAM, "", 9, "\0a:b"),
    ],
)  # fmt: skip
def test_target_text_means_this_address(
    text: str, family: int, kind: int, host: str, port: int, path: str
) -> None:
    target = parse_target(text)
    assert (target.family, target.type) == (family, kind)
    assert (target.host, target.port, target.path) == (host, port, path)
    assert target.text == text
    assert target.is_hybrid == text.startswith("vsock-uds:")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must begin with one of"),
        ("127.0.0.1:80", "must begin with one of"),
        ("http:127.0.0.1:80", "must begin with one of"),
        ("tcp:", "needs an address and a port"),
        ("tcp:80", "needs an address and a port"),
        ("tcp::80", "needs an address and a port"),
        ("tcp:127.0.0.1:", "is not a port"),
        ("tcp:127.0.0.1:65536", "is not a port"),
        ("tcp:127.0.0.1:+1", "is not a port"),
        ("tcp:127.0.0.1:0", "port 0"),
        ("tcp:::1:80", "in brackets"),
        ("tcp:[127.0.0.1]:80", "not an IPv6 address"),
        ("tcp:[::1:80", "in brackets"),
        ("unix:", "needs a path"),
        ("unix:@", "needs a path"),
        ("unix:/" + "x" * 107, "at most 107 octets"),
        ("unix:/a\0b", "zero octet"),
        ("vsock:x:3000", "is not a CID"),
        ("vsock:4294967296:1", "is not a CID"),
        ("vsock:3000", "vsock:1:3000"),
        ("vsock-uds:/run/vm", "vsock-uds:/run/vm.vsock:3000"),
        ("vsock-uds::3000", "needs an address and a port"),
        ("vsock-uds:@:3000", "needs a path"),
        ("vsock-uds:/run/vm:0", "port 0"),
        ("vsock-uds:/run/vm:http", "is not a port"),
    ],
)
def test_target_text_that_means_nothing_raises_in_words(text: str, words: str) -> None:
    with pytest.raises(ParseError, match=words.replace("[", r"\[")):
        parse_target(text)
