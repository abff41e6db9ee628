"""What a host does with each kind of frame, by RFC 1122, 826, 4861, 1191 and 5927."""

from __future__ import annotations

import pytest

from echo_appliance.netstack.checksum import checksum
from echo_appliance.netstack.control import ERRORS_AT_ONCE
from echo_appliance.netstack.fragments import PACKETS_LIMIT, TIMEOUT
from echo_appliance.netstack.neighbours import (
    ENTRIES_LIMIT,
    REACHABLE_SECONDS,
    TRIES,
    WAITING_IN_ALL,
    WAITING_LIMIT,
)
from echo_appliance.netstack.tcp.connection import Connection
from echo_appliance.netstack.wire import arp, ethernet, icmp, icmpv6, ipv4, ipv6, tcp, udp
from tests.unit.netstack.hosts import (
    OUR_MAC,
    OURS,
    OURS6,
    THEIR_MAC,
    THEIRS,
    THEIRS6,
    Host,
    arp_reply,
    arp_request,
    icmp6,
    packet4,
    packet6,
    solicitation,
)

ELSEWHERE = b"\xc6\x33\x64\x01"  # 198.51.100.1, beyond the gateway


@pytest.fixture
def host() -> Host:
    """A host whose neighbour is known."""
    host = Host()
    host.meet()
    return host


def ping(payload: bytes = b"") -> bytes:
    return icmp.serialize(icmp.Message(icmp.ECHO_REQUEST, 0, 1, payload))


# -- ARP and neighbour discovery ---------------------------------------------


def test_arp_request_for_us_is_answered_and_learned_from() -> None:
    host = Host()
    host.receive(ethernet.ARP, arp_request(), to=ethernet.BROADCAST)
    [frame] = host.sent()
    answer = arp.parse(memoryview(frame[14:]))
    assert frame[:6] == THEIR_MAC
    assert (answer.operation, answer.sender_hardware, answer.sender_protocol) == (
        arp.REPLY, OUR_MAC, OURS,
    )  # fmt: skip
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, ping()))
    assert [frame[:6] for frame in host.sent()] == [THEIR_MAC]  # without asking


def test_arp_request_for_others_teaches_nothing() -> None:
    host = Host()
    host.receive(ethernet.ARP, arp_request(target=b"\xc0\0\2\x09"), to=ethernet.BROADCAST)
    assert host.sent() == []
    assert len(host.interface.link.neighbours) == 0


def test_arp_reply_that_nobody_asked_for_teaches_nothing() -> None:
    host = Host()
    host.receive(ethernet.ARP, arp_reply())
    assert len(host.interface.link.neighbours) == 0


def test_arp_probe_for_our_address_is_answered_and_teaches_nothing() -> None:
    host = Host()
    host.receive(ethernet.ARP, arp_request(arp.UNKNOWN_PROTOCOL), to=ethernet.BROADCAST)
    assert len(host.sent(ethernet.ARP)) == 1
    assert len(host.interface.link.neighbours) == 0


def test_packet_to_an_unknown_neighbour_waits_for_the_answer() -> None:
    host = Host()
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, ping(b"patience")))
    [question] = host.sent()
    assert question[:6] == ethernet.BROADCAST
    host.receive(ethernet.ARP, arp_reply())
    [answer] = host.sent()
    assert answer[:14] == ethernet.serialize_header(THEIR_MAC, OUR_MAC, ethernet.IPV4)
    assert answer[14 + 28 :] == b"patience"


def test_neighbour_that_does_not_answer_is_asked_three_times_and_forgotten() -> None:
    host = Host()
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, ping()))
    asked, now = 1, 0.0
    host.sent()
    while (deadline := host.interface.deadline()) is not None:
        now = deadline
        host.interface.on_deadline(now)
        asked += len(host.sent(ethernet.ARP))
    assert (asked, now) == (TRIES, float(TRIES))
    assert len(host.interface.link.neighbours) == 0


def test_neighbour_that_was_confirmed_long_ago_is_asked_while_it_is_used(host: Host) -> None:
    late = REACHABLE_SECONDS + 1
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, ping()), late)
    frames = host.sent()
    assert [frame[12:14] for frame in frames] == [b"\x08\x06", b"\x08\x00"]
    assert [frame[:6] for frame in frames] == [THEIR_MAC, THEIR_MAC]  # to itself, not to all
    host.receive(ethernet.ARP, arp_reply(), late)
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, ping()), late)
    assert len(host.sent()) == 1


def test_neighbours_of_a_whole_forged_link_stay_within_bounds() -> None:
    host = Host()
    neighbours = host.interface.link.neighbours
    for number in range(3 * ENTRIES_LIMIT):
        address = b"\xc0\0" + number.to_bytes(2, "big")
        entry = neighbours.find(address, 0.0)
        for _ in range(WAITING_LIMIT + 1):
            neighbours.wait(entry, (b"", b""))
    assert len(neighbours) == ENTRIES_LIMIT
    assert sum(len(entry.waiting) for entry in neighbours) <= WAITING_IN_ALL
    assert max(len(entry.waiting) for entry in neighbours) <= WAITING_LIMIT


def test_neighbour_solicitation_for_us_is_answered() -> None:
    host = Host()
    group = ethernet.group_of_ipv6(ipv6.solicited_node(OURS6))
    host.receive(ethernet.IPV6, solicitation(), to=group)
    [frame] = host.sent()
    packet = ipv6.parse(memoryview(frame[14:]))
    assert (frame[:6], packet.destination, packet.hop_limit) == (THEIR_MAC, THEIRS6, 255)
    answer = icmpv6.parse_neighbour(host.interface.control.parse(packet, verified=False))
    assert (answer.target, answer.hardware, answer.solicited) == (OURS6, OUR_MAC, True)


def test_neighbour_solicitation_of_somebody_without_an_address_is_answered_to_all() -> None:
    host = Host()
    host.receive(ethernet.IPV6, solicitation(ipv6.UNSPECIFIED, None))
    [frame] = host.sent()
    assert frame[:6] == b"\x33\x33\0\0\0\x01"
    assert len(host.interface.link.neighbours) == 0


def test_neighbour_solicitation_from_beyond_the_link_is_dropped() -> None:
    host = Host()
    routed = bytearray(solicitation())
    routed[7] = 254
    host.receive(ethernet.IPV6, bytes(routed))
    assert (host.sent(), host.drops) == ([], {"nd-not-from-this-link": 1})


@pytest.mark.parametrize("family", [4, 6])
def test_address_of_ours_that_others_use_is_a_conflict(family: int) -> None:
    host = Host()
    seen = []
    host.interface.link.on_conflict = lambda address, who, _now: seen.append((address, who))
    if family == 4:
        host.receive(ethernet.ARP, arp_request(sender=OURS), to=ethernet.BROADCAST)
    else:
        claim = icmpv6.Neighbour(OURS6, THEIR_MAC, is_solicitation=False, override=True)
        message = icmpv6.serialize_neighbour(claim)
        host.receive(ethernet.IPV6, icmp6(message, source=OURS6, destination=ipv6.ALL_NODES))
    assert seen == [(OURS if family == 4 else OURS6, THEIR_MAC)]
    assert host.drops == {"address-conflict": 1}


def test_address_that_is_still_asked_for_is_not_answered_for(host: Host) -> None:
    host.interface.link.tentative = True
    host.receive(ethernet.ARP, arp_request(), to=ethernet.BROADCAST)
    host.receive(ethernet.IPV6, solicitation())
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, ping()))
    assert (host.sent(), host.drops) == ([], {"tentative-address": 2})


# -- ICMP --------------------------------------------------------------------


def test_echo_is_answered_with_the_same_octets(host: Host) -> None:
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, ping(b"abc")))
    [answer] = host.sent(ethernet.IPV4)
    packet = ipv4.parse(memoryview(answer))
    message = icmp.parse(packet.payload)
    assert (packet.source, packet.destination) == (OURS, THEIRS)
    assert (message.type, message.rest, message.payload) == (icmp.ECHO_REPLY, 1, b"abc")


def test_echo_over_ipv6_is_answered(host: Host) -> None:
    question = icmp.Message(icmpv6.ECHO_REQUEST, 0, 1, b"abc")
    host.receive(ethernet.IPV6, icmp6(question))
    [answer] = host.sent(ethernet.IPV6)
    message = host.interface.control.parse(ipv6.parse(memoryview(answer)), verified=False)
    assert (message.type, message.payload) == (icmpv6.ECHO_REPLY, b"abc")


def test_echo_beyond_the_link_goes_to_the_gateway(host: Host) -> None:
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, ping(), source=ELSEWHERE))
    [question] = host.sent(ethernet.ARP)
    assert arp.parse(memoryview(question)).target_protocol == b"\xc0\0\2\xfe"


def test_closed_udp_port_is_told_and_quotes_the_datagram(host: Host) -> None:
    octets = udp.serialize(udp.Datagram(40000, 4321, b"?"), THEIRS + OURS)
    cause = packet4(ipv4.UDP, octets)
    host.receive(ethernet.IPV4, cause)
    [answer] = host.sent(ethernet.IPV4)
    message = icmp.parse(ipv4.parse(memoryview(answer)).payload)
    assert (message.type, message.code) == (icmp.DESTINATION_UNREACHABLE, icmp.PORT_UNREACHABLE)
    assert message.payload == cause


def test_unknown_protocol_is_told_in_both_versions(host: Host) -> None:
    host.receive(ethernet.IPV4, packet4(132, b"sctp?"))
    [answer] = host.sent(ethernet.IPV4)
    message = icmp.parse(ipv4.parse(memoryview(answer)).payload)
    assert (message.type, message.code) == (3, icmp.PROTOCOL_UNREACHABLE)
    host.receive(ethernet.IPV6, packet6(132, b"sctp?"))
    [answer] = host.sent(ethernet.IPV6)
    message = host.interface.control.parse(ipv6.parse(memoryview(answer)), verified=False)
    assert (message.type, message.code, message.rest) == (4, icmpv6.UNKNOWN_NEXT_HEADER, 6)


def test_icmp_errors_are_limited(host: Host) -> None:
    octets = udp.serialize(udp.Datagram(40000, 4321, b"?"), THEIRS + OURS)
    for _ in range(3 * ERRORS_AT_ONCE):
        host.receive(ethernet.IPV4, packet4(ipv4.UDP, octets))
    assert len(host.sent(ethernet.IPV4)) == ERRORS_AT_ONCE
    assert host.drops["icmp-error-limit"] == 2 * ERRORS_AT_ONCE


@pytest.mark.parametrize(
    ("source", "destination", "reason"),
    [
        (b"\x7f\0\0\1", OURS, "martian-source"),
        (b"\xe0\0\0\1", OURS, "martian-source"),
        (b"\0\0\0\0", OURS, "martian-source"),
        (b"\xc0\0\2\xff", OURS, "martian-source"),  # the link's broadcast
        (OURS, OURS, "spoofed-source"),
        (THEIRS, b"\xc0\0\2\xff", "group-destination"),
        (THEIRS, b"\xff" * 4, "group-destination"),
        (THEIRS, b"\xe0\0\0\1", "group-destination"),
        (THEIRS, b"\xc0\0\2\x09", "packet-for-others"),
    ],
)
def test_packet_between_wrong_addresses_is_dropped(
    host: Host, source: bytes, destination: bytes, reason: str
) -> None:
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, ping(), source=source, destination=destination))
    assert (host.sent(), host.drops) == ([], {reason: 1})


def test_packet_for_us_in_a_frame_for_all_is_dropped(host: Host) -> None:
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, ping()), to=ethernet.BROADCAST)
    assert (host.sent(), host.drops) == ([], {"one-address-in-group-frame": 1})


def test_ipv4_options_are_skipped(host: Host) -> None:
    """RFC 9293 MUST-50: what we do not understand there is ignored."""
    plain = bytearray(packet4(ipv4.ICMP, ping()))
    plain[0], plain[2:4], plain[10:12] = 0x46, (len(plain) + 4).to_bytes(2, "big"), b"\0\0"
    head = bytes(plain[:20]) + b"\x99\x04\0\0"
    head = head[:10] + checksum(head).to_bytes(2, "big") + head[12:]
    host.receive(ethernet.IPV4, head + bytes(plain[20:]))
    assert len(host.sent(ethernet.IPV4)) == 1


def test_source_route_of_ipv6_is_dropped(host: Host) -> None:
    routing = bytes((17, 0, 0, 1)) + bytes(4)
    host.receive(ethernet.IPV6, packet6(ipv6.ROUTING, routing + b"x"))
    assert (host.sent(), host.drops) == ([], {"ipv6-source-route": 1})


# -- fragments ---------------------------------------------------------------


def test_fragments_sent_are_taken_together_again(host: Host) -> None:
    question = ping(bytes(range(256)) * 20)
    cut = [question[at : at + 1480] for at in range(0, len(question), 1480)]
    for number, part in enumerate(cut):
        more = ipv4.MORE_FRAGMENTS if number + 1 < len(cut) else 0
        place = number * 185 | more
        host.receive(ethernet.IPV4, packet4(ipv4.ICMP, part, flags_and_offset=place))
    answers = [ipv4.parse(memoryview(one)) for one in host.sent(ethernet.IPV4)]
    assert [one.offset for one in answers] == [0, 1480, 2960, 4440]
    assert all(len(one.payload) <= 1480 for one in answers)
    whole = b"".join(one.payload for one in answers)
    assert icmp.parse(memoryview(whole)).payload == question[8:]


def test_fragment_overlap_ends_the_packet(host: Host) -> None:
    host.receive(ethernet.IPV4, packet4(17, b"x" * 24, flags_and_offset=0x2000))
    host.receive(ethernet.IPV4, packet4(17, b"y" * 24, flags_and_offset=2))
    assert host.drops == {"fragment-overlap": 1}
    assert len(host.interface.fragments) == 0


def test_fragments_of_a_packet_too_long_are_dropped(host: Host) -> None:
    host.receive(ethernet.IPV4, packet4(17, b"x" * 64, flags_and_offset=0x1FFF))
    assert host.drops == {"fragment-too-long": 1}


def test_fragments_that_stay_alone_time_out_and_are_told(host: Host) -> None:
    host.receive(ethernet.IPV4, packet4(17, b"x" * 64, flags_and_offset=0x2000))
    assert host.interface.deadline() == TIMEOUT
    host.meet(TIMEOUT)
    host.interface.on_deadline(TIMEOUT)
    [answer] = host.sent(ethernet.IPV4)
    message = icmp.parse(ipv4.parse(memoryview(answer)).payload)
    assert (message.type, message.code) == (icmp.TIME_EXCEEDED, 1)
    assert host.drops == {"fragment-timeout": 1}


def test_fragments_of_too_many_packets_make_room(host: Host) -> None:
    for number in range(3 * PACKETS_LIMIT):
        source = b"\xc6\x33\x64" + bytes((number % 250 + 1,))
        host.receive(ethernet.IPV4, packet4(17, b"x" * 8, source=source, flags_and_offset=0x2000))
    assert len(host.interface.fragments) <= PACKETS_LIMIT


# -- path MTU ----------------------------------------------------------------


def connected(host: Host) -> Connection:
    """Return a connection to the neighbour that has just sent its SYN."""
    connection = host.interface.streams.endpoint.connect(OURS, ELSEWHERE, 80, 0.0)
    host.interface.link.neighbours.heard(
        b"\xc0\0\2\xfe", THEIR_MAC, 0.0, solicited=True, create=True
    )
    host.interface.flush(0.0)
    return connection


def too_big(quoted: bytes, mtu: int) -> bytes:
    message = icmp.Message(icmp.DESTINATION_UNREACHABLE, icmp.FRAGMENTATION_NEEDED, mtu, quoted)
    return packet4(ipv4.ICMP, icmp.serialize(message))


def test_path_mtu_narrows_for_a_segment_that_is_on_its_way(host: Host) -> None:
    connected(host)
    [syn] = host.sent(ethernet.IPV4)
    way = host.interface.routes.way(OURS, ELSEWHERE)
    assert way is not None
    host.receive(ethernet.IPV4, too_big(syn[:28], 1300))
    assert way.mtu(0.0) == 1300
    host.receive(ethernet.IPV4, too_big(syn[:28], 68))  # nobody honest asks for that
    assert way.mtu(0.0) == 552
    assert way.mtu(601.0) == 1500  # and after ten minutes it is tried again


def test_path_mtu_of_a_forged_segment_is_not_believed(host: Host) -> None:
    connected(host)
    [syn] = host.sent(ethernet.IPV4)
    forged = syn[:24] + bytes(4)
    host.receive(ethernet.IPV4, too_big(forged, 600))
    assert host.drops == {"icmp-quote-not-ours": 1}


def test_port_unreachable_ends_an_open_that_waits(host: Host) -> None:
    connection = connected(host)
    [syn] = host.sent(ethernet.IPV4)
    message = icmp.Message(icmp.DESTINATION_UNREACHABLE, icmp.PORT_UNREACHABLE, 0, syn[:28])
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, icmp.serialize(message)))
    assert connection.error == "port unreachable"


def test_source_quench_changes_nothing(host: Host) -> None:
    """RFC 9293 MUST-55: it is silently discarded."""
    connection = connected(host)
    [syn] = host.sent(ethernet.IPV4)
    message = icmp.Message(4, 0, 0, syn[:28])
    host.receive(ethernet.IPV4, packet4(ipv4.ICMP, icmp.serialize(message)))
    assert connection.error is None
    assert host.sent() == []


# -- TCP ---------------------------------------------------------------------


def test_syn_to_a_broadcast_address_opens_nothing(host: Host) -> None:
    """RFC 9293 MUST-57."""
    syn = bytes(tcp.serialize(tcp.Segment(40000, 7, 1, 0, tcp.SYN, 1000)))
    for destination in (b"\xc0\0\2\xff", b"\xff" * 4, b"\xe0\0\0\1"):
        host.receive(ethernet.IPV4, packet4(ipv4.TCP, syn, destination=destination))
    assert (host.sent(), host.drops) == ([], {"group-destination": 3})


def test_segment_with_a_wrong_checksum_is_dropped(host: Host) -> None:
    """RFC 9293 MUST-3; MUST-2 is in the answers that the kernel takes."""
    syn = bytes(tcp.serialize(tcp.Segment(40000, 7, 1, 0, tcp.SYN, 1000)))
    host.receive(ethernet.IPV4, packet4(ipv4.TCP, syn))
    assert (host.sent(), host.drops) == ([], {"tcp-bad-checksum": 1})


def test_connection_speaks_from_the_address_that_is_near(host: Host) -> None:
    """RFC 9293 MUST-44."""
    routes = host.interface.routes
    assert routes.source_for(THEIRS) == routes.source_for(ELSEWHERE) == OURS
    assert routes.source_for(THEIRS6) == OURS6
    assert routes.next_hop(bytes.fromhex("20010db9") + bytes(12)) is None


def test_hop_limit_and_traffic_class_of_settings_are_in_the_packets(host: Host) -> None:
    """RFC 9293 MUST-48 and MUST-49."""
    connection = connected(host)
    [packet] = host.sent(ethernet.IPV4)
    assert (packet[1], packet[8]) == (
        connection.settings.traffic_class,
        connection.settings.hop_limit,
    )
