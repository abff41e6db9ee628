"""Sends packets to neighbours on the link, and finds out who they are: ARP and ND at work.

Knows no I/O: frames leave through the port, which the device is.

Source: RFC 826 and 5227 (ARP), RFC 4861 and 4862 (neighbour discovery and
duplicate addresses).
"""

from ..errors import ParseError
from .budget import Budget
from .checksum import pseudo_header_sum
from .neighbours import REACHABLE_SECONDS, Neighbours
from .wire import arp, ethernet, icmp, icmpv6, ipv6

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from .neighbours import Neighbour, Waiting
    from .routes import Way

    Octets = bytes | bytearray | memoryview

    class Port(Protocol):
        """What takes our frames: a device."""

        prefix: bytes  # what stands before a frame that asks nothing of the device
        checksums: bool  # whether the device fills in TCP checksums
        segment_limit: int  # octets of payload that it cuts into segments itself; 0: none
        mtu: int

        def send(self, head: Octets, payload: Octets) -> None:
            """Send a frame, prefix and all, in two parts; drop it when it cannot be sent now."""


ASKS_PER_SECOND, ASKS_AT_ONCE = 200, 128
DEFENCE_SECONDS = 10.0  # RFC 5227 section 2.4 (b), DEFEND_INTERVAL

_ANYBODY = bytes(16)


class Link:
    """One station on an Ethernet: its hardware address, its IP addresses and its neighbours."""

    def __init__(self, port: "Port", hardware: bytes, addresses: frozenset[bytes]) -> None:
        self.port = port
        self.hardware = hardware
        self.addresses = addresses
        self.neighbours = Neighbours()
        self.tentative = False  # whether our addresses are still being asked for: RFC 4862, 5.4
        self.on_conflict: Callable[[bytes, bytes, float], None] = self._defend
        self._asks = Budget(ASKS_PER_SECOND, ASKS_AT_ONCE)
        self._defended_at = -DEFENCE_SECONDS
        self._solicited = {
            ipv6.solicited_node(address): address for address in addresses if len(address) == 16
        }

    # -- sending -------------------------------------------------------------

    def send(
        self, way: "Way", prefix: bytes, head: "Octets", payload: "Octets", now: float
    ) -> None:
        """Send an IP packet along its way, now or as soon as the neighbour is known."""
        start = self.start_of_frame(way, prefix, now)
        if start is not None:
            self.port.send(start + head, payload)
        elif way.neighbour is not None:
            # What waits outlives the buffer that it may be a view of.
            waiting = (prefix + self._headless(way), bytes(head) + payload)
            self.neighbours.wait(way.neighbour, waiting)

    def start_of_frame(self, way: "Way", prefix: bytes, now: float) -> bytes | None:
        """Return what stands before a packet on its way; None while its neighbour is not known."""
        neighbour = way.neighbour
        if (
            neighbour is None
            or neighbour.hardware is None
            or now - neighbour.confirmed_at > REACHABLE_SECONDS
        ):
            neighbour = way.neighbour = self._neighbour(way, now)
        if neighbour.hardware is None:
            return None
        ethertype = b"\x08\x00" if len(way.remote) == 4 else b"\x86\xdd"
        return b"".join((prefix, neighbour.hardware, self.hardware, ethertype))

    def _headless(self, way: "Way") -> bytes:
        """Return the part of an Ethernet header that is known before the neighbour is."""
        return self.hardware + (ethernet.IPV4 if way.is_ipv4 else ethernet.IPV6).to_bytes(2, "big")

    def _send_to(self, hardware: bytes, ethertype: int, packet: bytes) -> None:
        head = ethernet.serialize_header(hardware, self.hardware, ethertype)
        self.port.send(self.port.prefix + head, packet)

    def _neighbour(self, way: "Way", now: float) -> "Neighbour":
        neighbour = self.neighbours.find(way.next_hop, now)
        if self.neighbours.is_to_be_asked(neighbour, now):
            self._ask_within_bounds(neighbour, now)
        return neighbour

    def _release(self, hardware: bytes, waiting: "list[Waiting]") -> None:
        for start, packet in waiting:
            prefix, rest = start[: len(self.port.prefix)], start[len(self.port.prefix) :]
            self.port.send(prefix + hardware + rest, packet)

    # -- asking --------------------------------------------------------------

    def ask(self, now: float) -> None:
        """Ask for all neighbours whose time has come; call again at deadline()."""
        for neighbour in self.neighbours.to_ask(now):
            self._ask_within_bounds(neighbour, now)

    def deadline(self) -> float | None:
        """When to call ask() next."""
        return self.neighbours.deadline()

    def _ask_within_bounds(self, neighbour: "Neighbour", now: float) -> None:
        # Who has answered before is asked in any case: a flood of forged sources would use the
        # budget up, and they would be forgotten.
        if neighbour.has_answered or self._asks.take(now):
            self._ask_for(neighbour)

    def _ask_for(self, neighbour: "Neighbour") -> None:
        source = self._source_of(neighbour.address)
        if len(neighbour.address) == 4:
            self._send_arp(
                arp.REQUEST, source or arp.UNKNOWN_PROTOCOL, arp.UNKNOWN_HARDWARE,
                neighbour.address, neighbour.hardware or ethernet.BROADCAST,
            )  # fmt: skip
        else:
            self._solicit(neighbour.address, source or _ANYBODY)

    def _source_of(self, address: bytes) -> bytes | None:
        return next((own for own in self.addresses if len(own) == len(address)), None)

    def _send_arp(
        self, operation: int, own: bytes, hardware: bytes, address: bytes, to: bytes
    ) -> None:
        message = arp.Message(operation, self.hardware, own, hardware, address)
        self._send_to(to, ethernet.ARP, arp.serialize(message))

    def _solicit(self, target: bytes, source: bytes) -> None:
        hardware = None if source == _ANYBODY else self.hardware
        question = icmpv6.Neighbour(target, hardware, is_solicitation=True)
        group = ipv6.solicited_node(target)
        self._send_nd(question, source, group, ethernet.group_of_ipv6(group))

    def _send_nd(
        self, neighbour: icmpv6.Neighbour, source: bytes, destination: bytes, to: bytes
    ) -> None:
        message = icmpv6.serialize_neighbour(neighbour)
        size = icmp.HEADER_SIZE + len(message.payload)
        octets = icmp.serialize(message, pseudo_header_sum(source + destination, ipv6.ICMPV6, size))
        packet = ipv6.Packet(
            source, destination, ipv6.ICMPV6, memoryview(octets), hop_limit=icmpv6.HOP_LIMIT
        )
        self._send_to(to, ethernet.IPV6, ipv6.serialize_header(packet, size) + octets)

    def suspect(self, next_hop: bytes) -> None:
        """Ask for a neighbour anew: what went its way came to nothing.  RFC 9293 MUST-20."""
        self.neighbours.suspect(next_hop)

    # -- our own addresses ---------------------------------------------------

    def probe(self) -> None:
        """Ask the link whether somebody has our addresses; answers come to on_conflict()."""
        for address in self.addresses:
            if len(address) == 4:
                self._send_arp(
                    arp.REQUEST, arp.UNKNOWN_PROTOCOL, arp.UNKNOWN_HARDWARE, address,
                    ethernet.BROADCAST,
                )  # fmt: skip
            else:
                self._solicit(address, _ANYBODY)

    def announce(self) -> None:
        """Tell the link that our addresses are here, so that what it knew before is renewed."""
        for address in self.addresses:
            if len(address) == 4:
                self._send_arp(
                    arp.REQUEST, address, arp.UNKNOWN_HARDWARE, address, ethernet.BROADCAST
                )
            else:
                self._advertise(address, ipv6.ALL_NODES, ethernet.group_of_ipv6(ipv6.ALL_NODES))

    def _advertise(self, address: bytes, destination: bytes, to: bytes) -> None:
        answer = icmpv6.Neighbour(
            address, self.hardware, is_solicitation=False, override=True,
            solicited=destination != ipv6.ALL_NODES,
        )  # fmt: skip
        self._send_nd(answer, address, destination, to)

    def _defend(self, _address: bytes, _hardware: bytes, now: float) -> None:
        """Say once in a while whose an address is that somebody else uses."""
        if now - self._defended_at >= DEFENCE_SECONDS:
            self._defended_at = now
            self.announce()

    # -- receiving -----------------------------------------------------------

    def receive_arp(self, octets: memoryview, now: float) -> None:
        """Answer a request for us, and learn from what concerns us.  Raises ParseError."""
        message = arp.parse(octets)
        self._check_conflict(message, now)
        sender, hardware = message.sender_protocol, message.sender_hardware
        if hardware == self.hardware:
            raise ParseError("arp-from-ourselves")
        for_us = message.target_protocol in self.addresses
        if sender != arp.UNKNOWN_PROTOCOL:
            self._learn(sender, hardware, now, solicited=message.operation == arp.REPLY,
                        create=for_us and message.operation == arp.REQUEST)  # fmt: skip
        if for_us and message.operation == arp.REQUEST and not self.tentative:
            self._send_arp(arp.REPLY, message.target_protocol, hardware, sender, hardware)

    def _check_conflict(self, message: arp.Message, now: float) -> None:
        """Raise ParseError where somebody else uses or wants an address of ours.  RFC 5227.

        It may be a twin, whose --address gave it our hardware address, too: while ours are
        tentative we only ask, so what speaks *from* them is another, and later we never ask.
        """
        sender, target = message.sender_protocol, message.target_protocol
        from_ourselves = message.sender_hardware == self.hardware
        uses = sender in self.addresses and (self.tentative or not from_ourselves)
        wants = (
            sender == arp.UNKNOWN_PROTOCOL
            and target in self.addresses
            and self.tentative != from_ourselves
        )
        if uses or wants:
            self.on_conflict(sender if uses else target, message.sender_hardware, now)
            raise ParseError("address-conflict")

    def receive_neighbour(
        self, message: icmp.Message, packet: ipv6.Packet, hardware: bytes, now: float
    ) -> None:
        """The same for a solicitation or an advertisement.  Raises ParseError."""
        if packet.hop_limit != icmpv6.HOP_LIMIT:
            raise ParseError("nd-not-from-this-link")
        neighbour = icmpv6.parse_neighbour(message)
        if neighbour.is_solicitation:
            self._receive_solicitation(neighbour, packet, hardware, now)
        else:
            self._receive_advertisement(neighbour, packet, hardware, now)

    def _receive_solicitation(
        self, neighbour: icmpv6.Neighbour, packet: ipv6.Packet, hardware: bytes, now: float
    ) -> None:
        if packet.source in self.addresses:
            raise ParseError("spoofed-source")
        is_probe = packet.source == ipv6.UNSPECIFIED
        group = ipv6.solicited_node(neighbour.target)
        if is_probe and (packet.destination != group or neighbour.hardware is not None):
            raise ParseError("nd-malformed")  # RFC 4861 section 7.1.1
        if neighbour.target not in self.addresses:
            raise ParseError("nd-for-others")
        if self.tentative:
            if is_probe and hardware != self.hardware:  # RFC 4862 section 5.4.3
                self.on_conflict(neighbour.target, hardware, now)
                raise ParseError("address-conflict")
            raise ParseError("tentative-address")
        if is_probe:  # somebody is about to take our address
            self._advertise(
                neighbour.target, ipv6.ALL_NODES, ethernet.group_of_ipv6(ipv6.ALL_NODES)
            )
            return
        if neighbour.hardware is not None:
            self._learn(packet.source, neighbour.hardware, now, solicited=False, create=True)
        self._advertise(neighbour.target, packet.source, neighbour.hardware or hardware)

    def _receive_advertisement(
        self, neighbour: icmpv6.Neighbour, packet: ipv6.Packet, hardware: bytes, now: float
    ) -> None:
        if neighbour.solicited and ipv6.is_group(packet.destination):
            raise ParseError("nd-malformed")  # RFC 4861 section 7.1.2
        if hardware == self.hardware and not self.tentative:
            raise ParseError("nd-from-ourselves")
        if neighbour.target in self.addresses:
            self.on_conflict(neighbour.target, neighbour.hardware or bytes(6), now)
            raise ParseError("address-conflict")
        if neighbour.hardware is not None:
            self._learn(
                neighbour.target, neighbour.hardware, now, solicited=neighbour.solicited,
                create=False, override=neighbour.override,
            )  # fmt: skip

    def _learn(
        self,
        address: bytes,
        hardware: bytes,
        now: float,
        *,
        solicited: bool,
        create: bool,
        override: bool = True,
    ) -> None:
        waiting = self.neighbours.heard(
            address, hardware, now, solicited=solicited, create=create, override=override
        )
        self._release(hardware, waiting)

    def is_for_us(self, destination: bytes) -> bool:
        """Whether an IPv6 group is one that we listen to."""
        return destination == ipv6.ALL_NODES or destination in self._solicited
