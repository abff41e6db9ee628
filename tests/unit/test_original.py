"""The destination's control message becomes the answer's; vectors were written by hand."""

import socket

from echo_appliance.original import answer_from

# sockaddr_in of 192.0.2.7:4321, little-endian family as on the machines we build for
INET = bytes.fromhex("0200 10e1 c0000207 0000000000000000")
# sockaddr_in6 of [2001:db8::5]:4321, flow 0, scope 0
INET6 = bytes.fromhex("0a00 10e1 00000000 20010db8000000000000000000000005 00000000")
# sockaddr_in6 of [fe80::1%3]:7
LINK_LOCAL = bytes.fromhex("0a00 0007 00000000 fe800000000000000000000000000001 03000000")


def test_original_inet_destination_becomes_the_source_to_use() -> None:
    answer = answer_from([(socket.SOL_IP, 20, INET)])
    assert answer == [(0, 8, bytes.fromhex("00000000 c0000207 00000000"))]


def test_original_inet6_destination_becomes_the_source_to_use() -> None:
    answer = answer_from([(socket.IPPROTO_IPV6, 74, INET6)])
    assert answer == [(41, 50, bytes.fromhex("20010db8000000000000000000000005 00000000"))]


def test_original_link_local_destination_keeps_its_interface() -> None:
    answer = answer_from([(socket.IPPROTO_IPV6, 74, LINK_LOCAL)])
    assert answer == [(41, 50, bytes.fromhex("fe800000000000000000000000000001 03000000"))]


def test_original_multicast_destination_is_not_answered() -> None:
    assert answer_from([(0, 20, bytes.fromhex("0200 10e1 e0000001 0000000000000000"))]) is None
    assert answer_from([(0, 20, bytes.fromhex("0200 10e1 efffffff 0000000000000000"))]) is None
    group = bytes.fromhex("0a00 10e1 00000000 ff020000000000000000000000000001 02000000")
    assert answer_from([(41, 74, group)]) is None


def test_original_broadcast_destination_is_not_answered() -> None:
    assert answer_from([(0, 20, bytes.fromhex("0200 10e1 ffffffff 0000000000000000"))]) is None


def test_original_absent_leaves_the_choice_to_the_kernel() -> None:
    assert answer_from([]) == []
    assert answer_from([(socket.SOL_SOCKET, 29, b"a timestamp")]) == []
