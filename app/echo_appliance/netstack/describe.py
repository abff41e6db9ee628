"""A frame in one line, as tcpdump's users expect it.  Knows no I/O.

What does not parse is shown as far as it does, with the reason.
"""

from ..errors import ParseError
from .addresses import format_endpoint, format_ip
from .checksum import pseudo_header_sum
from .wire import arp, ethernet, icmp, icmpv6, ipv4, ipv6, tcp, udp

TYPE_CHECKING = False
if TYPE_CHECKING:
    Packet = ipv4.Packet | ipv6.Packet

_ICMP_WORDS = {
    icmp.ECHO_REQUEST: "echo request",
    icmp.ECHO_REPLY: "echo reply",
    icmp.DESTINATION_UNREACHABLE: "destination unreachable",
    icmp.TIME_EXCEEDED: "time exceeded",
    icmp.PARAMETER_PROBLEM: "parameter problem",
}
_ICMPV6_WORDS = {
    icmpv6.ECHO_REQUEST: "echo request",
    icmpv6.ECHO_REPLY: "echo reply",
    icmpv6.DESTINATION_UNREACHABLE: "destination unreachable",
    icmpv6.PACKET_TOO_BIG: "packet too big",
    icmpv6.TIME_EXCEEDED: "time exceeded",
    icmpv6.PARAMETER_PROBLEM: "parameter problem",
    133: "router solicitation",
    134: "router advertisement",
    143: "multicast listener report v2",
}


def describe(octets: memoryview) -> str:
    """Return what a frame is, without a line feed."""
    try:
        frame = ethernet.parse(octets)
    except ParseError as error:
        return f"[{error}], length {len(octets)}"
    words = f"{ethernet.format_address(frame.source)} > " + (
        "broadcast"
        if frame.destination == ethernet.BROADCAST
        else ethernet.format_address(frame.destination)
    )
    try:
        if frame.ethertype == ethernet.ARP:
            return f"ARP, {_arp(arp.parse(frame.payload))}, length {len(frame.payload)}"
        if frame.ethertype == ethernet.IPV4:
            return "IP " + _packet(ipv4.parse(frame.payload))
        if frame.ethertype == ethernet.IPV6:
            return "IP6 " + _packet(ipv6.parse(frame.payload))
    except ParseError as error:
        return f"{words}, ethertype 0x{frame.ethertype:04x}, [{error}], length {len(octets)}"
    return f"{words}, ethertype 0x{frame.ethertype:04x}, length {len(octets)}"


def _arp(message: arp.Message) -> str:
    sender, target = format_ip(message.sender_protocol), format_ip(message.target_protocol)
    if message.operation == arp.REPLY:
        return f"Reply {sender} is-at {ethernet.format_address(message.sender_hardware)}"
    if message.sender_protocol == message.target_protocol:
        return f"Announcement {sender}"
    if message.sender_protocol == arp.UNKNOWN_PROTOCOL:
        return f"Probe {target}"
    return f"Request who-has {target} tell {sender}"


def _packet(packet: "Packet") -> str:
    pair = f"{format_ip(packet.source)} > {format_ip(packet.destination)}"
    if packet.is_fragment:
        more = "+" if packet.more_follow else ""
        size = len(packet.payload)
        return f"{pair}: fragment {packet.identification:x}:{size}@{packet.offset}{more}"
    try:
        if packet.protocol == ipv4.TCP:
            segment = tcp.parse(packet.payload)
            return f"{_pair(packet, segment.source_port, segment.destination_port)}: {segment}"
        if packet.protocol == udp.PROTOCOL:
            datagram = udp.parse(packet.payload, packet.addresses, verified=True)
            ports = _pair(packet, datagram.source_port, datagram.destination_port)
            return f"{ports}: UDP, length {len(datagram.payload)}"
        if packet.protocol in (ipv4.ICMP, ipv6.ICMPV6):
            return f"{pair}: {_icmp(packet)}, length {len(packet.payload)}"
    except ParseError as error:
        return f"{pair}: [{error}], length {len(packet.payload)}"
    return f"{pair}: protocol {packet.protocol}, length {len(packet.payload)}"


def _pair(packet: "Packet", source_port: int, destination_port: int) -> str:
    source = format_endpoint(packet.source, source_port)
    return f"{source} > {format_endpoint(packet.destination, destination_port)}"


def _icmp(packet: "Packet") -> str:
    is_ipv4 = len(packet.source) == 4
    so_far = 0
    if not is_ipv4:
        so_far = pseudo_header_sum(packet.addresses, ipv6.ICMPV6, len(packet.payload))
    message = icmp.parse(packet.payload, so_far)
    name = "ICMP" if is_ipv4 else "ICMP6"
    if not is_ipv4 and message.type in (
        icmpv6.NEIGHBOUR_SOLICITATION,
        icmpv6.NEIGHBOUR_ADVERTISEMENT,
    ):
        neighbour = icmpv6.parse_neighbour(message)
        target = format_ip(neighbour.target)
        if neighbour.is_solicitation:
            return f"{name}, neighbor solicitation, who has {target}"
        return f"{name}, neighbor advertisement, tgt is {target}"
    words = (_ICMP_WORDS if is_ipv4 else _ICMPV6_WORDS).get(message.type)
    if words is None:
        return f"{name}, type {message.type}, code {message.code}"
    if words.startswith("echo"):
        return f"{name}, {words}, id {message.identifier}, seq {message.sequence}"
    return f"{name}, {words}, code {message.code}"
