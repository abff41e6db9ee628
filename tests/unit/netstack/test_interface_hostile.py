"""Packets that say more than they should, or hide something: headers, fragments, ICMP, numbers."""

from __future__ import annotations

import pytest

from echo_appliance.netstack.checksum import checksum
from echo_appliance.netstack.tcp.connection import Connection
from echo_appliance.netstack.wire import ethernet, icmp, icmpv6, ipv4, ipv6, udp
from tests.unit.netstack.hosts import (
    OURS,
    OURS6,
    THEIR_MAC,
    THEIRS,
    THEIRS6,
    Host,
    icmp6,
    packet4,
    packet6,
    solicitation,
)

ELSEWHERE = b"\xc6\x33\x64\x01"  # 198.51.100.1, beyond the gateway
ELSEWHERE6 = bytes.fromhex("20010db90000000000000000000000a1")
GATEWAY, GATEWAY6 = b"\xc0\0\2\xfe", THEIRS6[:15] + b"\xfe"


@pytest.fixture
def host() -> Host:
    """A host whose neighbour is known."""
    host = Host()
    host.meet()
    return host


# -- options -----------------------------------------------------------------


def with_options(options: bytes) -> bytes:
    """Return a ping of the neighbour's with IPv4 options."""
    question = icmp.serialize(icmp.Message(icmp.ECHO_REQUEST, 0, 1, b"?"))
    plain = bytearray(packet4(ipv4.ICMP, question))
    options += bytes(-len(options) % 4)
    plain[0] += len(options) // 4
    plain[2:4], plain[10:12] = (len(plain) + len(options)).to_bytes(2, "big"), bytes(2)
    plain[20:20] = options
    plain[10:12] = checksum(plain[: 20 + len(options)]).to_bytes(2, "big")
    return bytes(plain)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("01 07 07 04 00000000 00", None),  # record route
        ("00 8307", None),  # what stands behind the end
        ("83 07 04 c6336401", "ipv4-source-route"),
        ("01 89 07 08 c6336401", "ipv4-source-route"),  # strict, and at its end
        ("07 00 04 00", "ipv4-bad-option"),  # would never end
        ("07 27 04 00", "ipv4-bad-option"),
        ("01 01 01 07", "ipv4-bad-option"),
    ],
)
def test_ipv4_options_that_lead_here_or_do_not_fit_are_refused(
    host: Host, options: str, reason: str | None
) -> None:
    host.receive(ethernet.IPV4, with_options(bytes.fromhex(options)))
    assert len(host.sent()) == (reason is None)
    assert host.drops == ({} if reason is None else {reason: 1})


def question6_with(option: bytes, header: int = ipv6.DESTINATION_OPTIONS) -> bytes:
    """Return a ping of the neighbour's behind an extension header with an option of 6 octets."""
    return packet6(header, bytes((ipv6.ICMPV6, 0)) + option + question6(8))


@pytest.mark.parametrize("header", [ipv6.DESTINATION_OPTIONS, ipv6.HOP_BY_HOP])
@pytest.mark.parametrize(
    ("kind", "answers"), [(0x05, [129]), (0x1E, [129]), (0x5E, []), (0x9E, [4]), (0xC2, [4])]
)
def test_ipv6_option_that_is_unknown_is_treated_as_its_type_says(
    host: Host, header: int, kind: int, answers: list[int]
) -> None:
    """RFC 8200 section 4.2: skip it; or drop the packet, and say so or not."""
    host.receive(ethernet.IPV6, question6_with(bytes((kind, 4)) + bytes(4), header))
    sent = host.sent(ethernet.IPV6)
    assert [one[40] for one in sent] == answers
    if answers == [icmpv6.PARAMETER_PROBLEM]:
        assert (sent[0][41], sent[0][44:48]) == (icmpv6.UNKNOWN_OPTION, b"\0\0\0\x2a")
        assert sent[0][48:] == question6_with(bytes((kind, 4)) + bytes(4), header), "quoted whole"


def test_ipv6_option_that_is_unknown_before_an_error_is_not_answered(host: Host) -> None:
    error = icmp6(icmp.Message(icmpv6.TIME_EXCEEDED, 0, 0, bytes(48)))[40:]
    head = bytes((ipv6.ICMPV6, 0)) + bytes((0x9E, 4)) + bytes(4)
    host.receive(ethernet.IPV6, packet6(ipv6.DESTINATION_OPTIONS, head + error))
    assert (host.sent(), host.drops) == ([], {"ipv6-unknown-option": 1})


def test_ipv6_option_that_is_unknown_is_refused_in_what_was_in_fragments_and_in_questions(
    host: Host,
) -> None:
    head = bytes((ipv6.ICMPV6, 0)) + bytes((0x5E, 4)) + bytes(4)
    for part in fragments6(head + question6(1000), ipv6.DESTINATION_OPTIONS):
        host.receive(ethernet.IPV6, part)
    asked = solicitation()
    whole = packet6(ipv6.DESTINATION_OPTIONS, head + asked[40:], destination=asked[24:40])
    host.receive(ethernet.IPV6, whole)
    assert (host.sent(), host.drops) == ([], {"ipv6-unknown-option": 2})


@pytest.mark.parametrize("option", ["1e05 00000000", "0100 0100 011e"])
def test_ipv6_options_that_run_past_their_header_are_refused(host: Host, option: str) -> None:
    host.receive(ethernet.IPV6, question6_with(bytes.fromhex(option)))
    assert (host.sent(), host.drops) == ([], {"ipv6-bad-extension": 1})


# -- fragments ---------------------------------------------------------------


def question6(size: int) -> bytes:
    """Return an echo request of the neighbour's, without its IPv6 header."""
    return icmp6(icmp.Message(icmpv6.ECHO_REQUEST, 0, 1, bytes(size)))[40:]


def fragments6(whole: bytes, protocol: int, size: int = 512) -> list[bytes]:
    """Return packets with pieces of a payload that begins with a header of this protocol."""
    return [
        packet6(
            ipv6.FRAGMENT,
            ipv6.serialize_fragment(protocol, at, 9, at + size < len(whole))
            + whole[at : at + size],
        )
        for at in range(0, len(whole), size)
    ]


def test_fragments_longer_together_than_a_packet_with_its_header_are_refused(host: Host) -> None:
    """Else our answer would be one that is too long, a ping of death, for a forged source."""
    question = icmp.serialize(icmp.Message(icmp.ECHO_REQUEST, 0, 1, bytes(65527)))
    for at in range(0, len(question), 1480):
        part = question[at : at + 1480]
        place = at // 8 | ipv4.MORE_FRAGMENTS * (at + 1480 < len(question))
        host.receive(ethernet.IPV4, packet4(ipv4.ICMP, part, flags_and_offset=place))
    assert (host.sent(), host.drops) == ([], {"fragment-too-long": 1})
    assert len(host.interface.fragments) == 0


@pytest.mark.parametrize("backwards", [False, True])
def test_fragments_with_extension_headers_in_the_first_are_put_together(
    host: Host, backwards: bool
) -> None:
    """RFC 8200 section 4.5: what is cut may begin with headers of its own."""
    options = bytes((ipv6.DESTINATION_OPTIONS, 9)) + b"\x01\x4c" + bytes(76)
    options += bytes((ipv6.ICMPV6, 1)) + b"\x01\x0c" + bytes(12)
    pieces = fragments6(options + question6(1500), ipv6.DESTINATION_OPTIONS)
    for packet in reversed(pieces) if backwards else pieces:
        host.receive(ethernet.IPV6, packet)
    answers = [ipv6.parse(memoryview(one)) for one in host.sent(ethernet.IPV6)]
    assert sum(len(one.payload) for one in answers) == 1508
    assert host.drops == {}


def test_fragments_whose_headers_run_past_the_whole_are_dropped(host: Host) -> None:
    lying = bytes((ipv6.ICMPV6, 255)) + bytes(1022)
    for packet in fragments6(lying, ipv6.DESTINATION_OPTIONS):
        host.receive(ethernet.IPV6, packet)
    assert (host.sent(), host.drops) == ([], {"ipv6-bad-extension": 1})


def test_fragment_within_a_fragment_is_dropped(host: Host) -> None:
    inner = ipv6.serialize_fragment(ipv6.ICMPV6, 0, 9, False) + question6(800)
    for packet in fragments6(inner, ipv6.FRAGMENT):
        host.receive(ethernet.IPV6, packet)
    assert (host.sent(), host.drops) == ([], {"ipv6-bad-extension": 1})


def test_neighbour_discovery_put_together_from_fragments_is_nothing(host: Host) -> None:
    claim = icmpv6.Neighbour(THEIRS6, b"\x02\0\0\0\0\x66", is_solicitation=False, override=True)
    whole = icmp6(icmpv6.serialize_neighbour(claim))[40:]
    for packet in fragments6(whole, ipv6.ICMPV6, 16):
        host.receive(ethernet.IPV6, packet)
    assert host.interface.link.neighbours.find(THEIRS6, 0.0).hardware == THEIR_MAC
    assert host.drops == {"icmp-unknown-type": 1}


# -- numbers that tell strangers nothing -------------------------------------


def identifications(host: Host, source: bytes, size: int) -> list[int]:
    """Return those of the answers to three echo requests."""
    question = icmp.serialize(icmp.Message(icmp.ECHO_REQUEST, 0, 1, bytes(size)))
    cut = [question[at : at + 1480] for at in range(0, len(question), 1480)]
    for _ in range(3):
        for number, part in enumerate(cut):
            more = ipv4.MORE_FRAGMENTS if number + 1 < len(cut) else 0
            place = number * 185 | more
            host.receive(
                ethernet.IPV4, packet4(ipv4.ICMP, part, source=source, flags_and_offset=place)
            )
    answers = [ipv4.parse(memoryview(one)) for one in host.sent(ethernet.IPV4)]
    return sorted({one.identification for one in answers})


@pytest.mark.parametrize("size", [56, 3000])
def test_identification_is_counted_for_each_peer_apart(host: Host, size: int) -> None:
    """One counter would tell a stranger how much we send to others (the idle scan)."""
    other = b"\xc0\0\2\x07"
    host.interface.link.neighbours.find(other, 0.0)
    host.interface.link.neighbours.heard(other, THEIR_MAC, 0.0, solicited=True)
    one, two = identifications(host, THEIRS, size), identifications(host, other, size)
    assert len(one) == len(two) == 3  # each packet its own: they would be mixed up
    assert min(abs(a - b) for a in one for b in two) > 3


# -- paths that are narrower than the link -----------------------------------


def test_answers_that_are_no_segments_may_be_cut_on_their_way(host: Host) -> None:
    """Who could tell us that they are too large is not believed: it could be forged."""
    opening(host)
    question = icmp.serialize(icmp.Message(icmp.ECHO_REQUEST, 0, 1, bytes(1400)))
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, question, source=ELSEWHERE))
    host.interface.link.neighbours.heard(GATEWAY, THEIR_MAC, 0.0, solicited=True)
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, question, source=ELSEWHERE))
    [answer] = [ipv4.parse(memoryview(one)) for one in host.sent(ethernet.IPV4)]
    assert not answer.flags_and_offset & ipv4.DONT_FRAGMENT


@pytest.mark.parametrize(("beyond", "sizes"), [(False, [1408]), (True, [1232, 176])])
def test_answers_over_ipv6_fit_any_path_beyond_the_link(beyond: bool, sizes: list[int]) -> None:
    """RFC 8200 section 5: 1280 octets get through everywhere; routers cut nothing."""
    host = Host(gateways=[GATEWAY6])
    host.meet()
    host.interface.link.neighbours.find(GATEWAY6, 0.0)
    host.interface.link.neighbours.heard(GATEWAY6, THEIR_MAC, 0.0, solicited=True)
    source = ELSEWHERE6 if beyond else THEIRS6
    question = icmp.Message(icmpv6.ECHO_REQUEST, 0, 1, bytes(1400))
    host.receive(ethernet.IPV6, icmp6(question, source=source))
    answers = [ipv6.parse(memoryview(one)) for one in host.sent(ethernet.IPV6)]
    assert [len(one.payload) for one in answers] == sizes


# -- ICMP --------------------------------------------------------------------


def opening(host: Host) -> tuple[Connection, bytes]:
    """Return a connection that has just sent its SYN, and what ICMP quotes of that."""
    connection = host.interface.streams.endpoint.connect(OURS, THEIRS, 80, 0.0)
    host.interface.flush(0.0)
    [syn] = host.sent(ethernet.IPV4)
    assert ipv4.parse(memoryview(syn)).flags_and_offset == ipv4.DONT_FRAGMENT
    return connection, syn[:28]


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        (icmp.TIME_EXCEEDED, 0, "time to live exceeded"),
        (icmp.PARAMETER_PROBLEM, 0, "parameter problem"),
        (icmp.DESTINATION_UNREACHABLE, 1, "host unreachable"),
        (4, 0, None),  # source quench: RFC 6633
        (5, 1, None),  # redirect
    ],
)
def test_icmp_error_is_told_in_its_own_words(
    host: Host, kind: int, code: int, words: str | None
) -> None:
    connection, quote = opening(host)
    message = icmp.serialize(icmp.Message(kind, code, 0, quote))
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, message))
    assert (connection.error, connection.soft_error) == (None, words)


def test_icmp_error_for_a_fragment_of_an_icmp_error_is_not_sent(host: Host) -> None:
    """RFC 1122 section 3.2.2: errors about errors would never end."""
    message = icmp.serialize(icmp.Message(icmp.TIME_EXCEEDED, 0, 0, bytes(56)))
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, message, flags_and_offset=0x2000))
    host.interface.on_deadline(31.0)
    assert host.sent(ethernet.IPV4) == []
    host.meet(31.0)
    error6 = icmp6(icmp.Message(icmpv6.TIME_EXCEEDED, 0, 0, bytes(56)))[40:]
    [first, _] = fragments6(error6, ipv6.ICMPV6, 56)
    host.receive(ethernet.IPV6, first, 31.0)
    host.interface.on_deadline(62.0)
    assert host.sent(ethernet.IPV6) == []


# -- UDP ---------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 7, 13, 65535])
def test_datagram_that_lies_about_its_length_is_dropped(host: Host, length: int) -> None:
    octets = bytearray(udp.serialize(udp.Datagram(40000, 7, b"data"), THEIRS + OURS))
    octets[4:6] = length.to_bytes(2, "big")
    host.receive(ethernet.IPV4, packet4(ipv4.UDP, bytes(octets)))
    assert (host.sent(), host.drops) == ([], {"udp-bad-length": 1})


def test_datagram_over_ipv6_without_a_checksum_is_dropped(host: Host) -> None:
    octets = udp.serialize(udp.Datagram(40000, 7, b"data"), THEIRS6 + OURS6)
    host.receive(ethernet.IPV6, packet6(ipv6.UDP, octets[:6] + b"\0\0" + octets[8:]))
    assert (host.sent(), host.drops) == ([], {"udp-no-checksum": 1})
