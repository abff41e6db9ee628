"""A host without a device: what it sends lies in a list, and time is what a test says."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from echo_appliance.netstack.addresses import parse_network
from echo_appliance.netstack.checksum import pseudo_header_sum
from echo_appliance.netstack.interface import Interface
from echo_appliance.netstack.tcp.settings import Settings
from echo_appliance.netstack.wire import arp, ethernet, icmp, icmpv6, ipv4, ipv6

OURS, THEIRS = socket.inet_aton("192.0.2.2"), socket.inet_aton("192.0.2.1")
OURS6 = socket.inet_pton(socket.AF_INET6, "2001:db8::2")
THEIRS6 = socket.inet_pton(socket.AF_INET6, "2001:db8::1")
OUR_MAC, THEIR_MAC = b"\x02\0\0\0\0\x02", b"\x02\0\0\0\0\x01"


class Port:
    """Where the host's frames go."""

    prefix = b""
    checksums = False
    segment_limit = 0

    def __init__(self, mtu: int) -> None:
        self.mtu = mtu
        self.frames: list[bytes] = []

    def send(self, head: object, payload: object) -> None:
        self.frames.append(bytes(head) + bytes(payload))  # type: ignore[call-overload]


class Drops(dict[str, int]):
    """Counts by reason."""

    def drop(self, reason: str) -> None:
        self[reason] = self.get(reason, 0) + 1


class Host:
    """An interface with two addresses and a gateway."""

    def __init__(self, mtu: int = 1500, gateways: Sequence[bytes] = ()) -> None:
        self.hardware = OUR_MAC
        self.port = Port(mtu)
        self.drops = Drops()
        networks = [parse_network("192.0.2.2/24"), parse_network("2001:db8::2/64")]
        self.interface = Interface(
            self.port, OUR_MAC, networks, [socket.inet_aton("192.0.2.254"), *gateways],
            self.drops, b"s" * 32, Settings(),  # type: ignore[arg-type]
        )  # fmt: skip

    def receive(
        self, ethertype: int, payload: bytes, now: float = 0.0, to: bytes = OUR_MAC
    ) -> None:
        """Take in a frame of the neighbour's."""
        head = ethernet.serialize_header(to, THEIR_MAC, ethertype)
        self.interface.receive(memoryview(head + payload), now)
        self.interface.flush(now)

    def meet(self, now: float = 0.0) -> None:
        """Have both of the neighbour's addresses known."""
        self.interface.link.neighbours.heard(THEIRS, THEIR_MAC, now, solicited=True, create=True)
        self.interface.link.neighbours.heard(THEIRS6, THEIR_MAC, now, solicited=True, create=True)

    def sent(self, ethertype: int | None = None) -> list[bytes]:
        """Take the frames that were sent; the payloads of one type, or all as they are."""
        frames, self.port.frames[:] = list(self.port.frames), []
        if ethertype is None:
            return frames
        return [one[14:] for one in frames if int.from_bytes(one[12:14], "big") == ethertype]


def packet4(
    protocol: int,
    payload: bytes,
    *,
    source: bytes = THEIRS,
    destination: bytes = OURS,
    flags_and_offset: int = 0x4000,
) -> bytes:
    """Return an IPv4 packet of the neighbour's."""
    made = ipv4.Packet(
        source, destination, protocol, memoryview(payload), identification=5,
        flags_and_offset=flags_and_offset,
    )  # fmt: skip
    return ipv4.serialize_header(made, len(payload)) + payload


def packet6(
    protocol: int,
    payload: bytes,
    *,
    source: bytes = THEIRS6,
    destination: bytes = OURS6,
    hop_limit: int = 255,
) -> bytes:
    """Return an IPv6 packet of the neighbour's."""
    made = ipv6.Packet(source, destination, protocol, memoryview(payload), hop_limit=hop_limit)
    return ipv6.serialize_header(made, len(payload)) + payload


def icmp6(message: icmp.Message, **ends: bytes) -> bytes:
    """Return an ICMPv6 message in a packet of the neighbour's."""
    addresses = ends.get("source", THEIRS6) + ends.get("destination", OURS6)
    so_far = pseudo_header_sum(addresses, ipv6.ICMPV6, 8 + len(message.payload))
    return packet6(ipv6.ICMPV6, icmp.serialize(message, so_far), **ends)  # type: ignore[arg-type]


def arp_request(sender: bytes = THEIRS, target: bytes = OURS) -> bytes:
    """Return a request of the neighbour's."""
    return arp.serialize(arp.Message(arp.REQUEST, THEIR_MAC, sender, bytes(6), target))


def arp_reply(sender: bytes = THEIRS, hardware: bytes = THEIR_MAC) -> bytes:
    """Return an answer of the neighbour's."""
    return arp.serialize(arp.Message(arp.REPLY, hardware, sender, OUR_MAC, OURS))


def solicitation(source: bytes = THEIRS6, hardware: bytes | None = THEIR_MAC) -> bytes:
    """Return a question for our address."""
    asked = icmpv6.Neighbour(OURS6, hardware, is_solicitation=True)
    group = ipv6.solicited_node(OURS6)
    return icmp6(icmpv6.serialize_neighbour(asked), source=source, destination=group)
