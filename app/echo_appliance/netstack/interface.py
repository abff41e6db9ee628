"""A host on one link: takes frames in, and gives frames to its port.  Knows no I/O.

The order of a packet's checks is the order of the functions: frame, version,
header, destination, source, fragments, protocol.  Whatever does not pass is
dropped, and counted by the reason; a frame of a hostile peer costs that much.

Source: RFC 1122 sections 3.2 and 3.3, RFC 8200 section 4.
"""

from hashlib import blake2b

from ..errors import ParseError
from .addresses import LIMITED_BROADCAST
from .control import Control, is_error
from .datagrams import Datagrams
from .express import Express
from .fragments import SIZE_LIMIT, Reassembly
from .link import Link
from .routes import Routes
from .streams import Streams
from .wire import ethernet, icmpv6, ipv4, ipv6, udp
from .wire.ip import is_group

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .addresses import Network
    from .counts import Counts
    from .link import Port
    from .routes import Way
    from .tcp.settings import Settings

    Packet = ipv4.Packet | ipv6.Packet

HOP_LIMIT = 64
_DISCARD_SILENTLY = 1  # the highest bits of an IPv6 option's type; 2 and 3: and say so


class Interface:
    """Our end of the link.  Borrows the port."""

    def __init__(
        self,
        port: "Port",
        hardware: bytes,
        networks: "Sequence[Network]",
        gateways: "Sequence[bytes]",
        counts: "Counts",
        secret: bytes,
        settings: "Settings",
    ) -> None:
        self.networks = networks
        self.counts = counts
        self.port = port
        self.routes = Routes(networks, gateways, port.mtu)
        self.link = Link(port, hardware, frozenset(network.address for network in networks))
        self.fragments = Reassembly()
        self.control = Control(self)
        self.datagrams = Datagrams(self)
        self.streams = Streams(self, secret, settings)
        self._express = Express(self.link.hardware, self.streams.endpoint)
        self._addresses = self.link.addresses
        self._broadcasts = {one.broadcast for one in networks} | {LIMITED_BROADCAST}
        self._secret = secret

    # -- receiving -----------------------------------------------------------

    def receive(self, octets: memoryview, now: float, *, verified: bool = False) -> None:
        """Take in a frame; `verified`: the device vouches for the transport's checksum.

        The octets are the caller's again when this returns.
        """
        if self._express.take(octets, now, verified):
            return
        self._express.settle(now)
        try:
            self._receive_frame(octets, now, verified)
        except ParseError as error:
            self.counts.drop(str(error))

    def _receive_frame(self, octets: memoryview, now: float, verified: bool) -> None:
        frame = ethernet.parse(octets)
        to_group = ethernet.is_group(frame.destination)
        if not to_group and frame.destination != self.link.hardware:
            raise ParseError("frame-for-others")
        if frame.ethertype == ethernet.IPV4:
            self._receive_ipv4(ipv4.parse(frame.payload), now, verified, to_group)
        elif frame.ethertype == ethernet.IPV6:
            self._receive_ipv6(ipv6.parse(frame.payload), frame, now, verified, to_group)
        elif frame.ethertype == ethernet.ARP:
            self.link.receive_arp(frame.payload, now)
        else:
            raise ParseError("unknown-ethertype")

    def _receive_ipv4(
        self, packet: ipv4.Packet, now: float, verified: bool, to_group: bool
    ) -> None:
        self._check_destination(packet.destination, to_group)
        source = packet.source
        if ipv4.cannot_be_source(source) or source in self._broadcasts:
            raise ParseError("martian-source")
        if packet.header is not None and len(packet.header) > ipv4.HEADER_SIZE:
            ipv4.check_options(packet.header)
        if packet.is_fragment:
            key = (packet.addresses, packet.protocol, packet.identification)
            if not self._join(packet, key, packet.offset, packet.more_follow, now):
                return
            verified = False
        self._dispatch(packet, now, verified)

    def _receive_ipv6(
        self, packet: ipv6.Packet, frame: ethernet.Frame, now: float, verified: bool, to_group: bool
    ) -> None:
        if packet.protocol == ipv6.ICMPV6 and not packet.is_fragment and packet.payload:
            kind = packet.payload[0]
            if kind in (icmpv6.NEIGHBOUR_SOLICITATION, icmpv6.NEIGHBOUR_ADVERTISEMENT):
                if packet.identification >= 0:
                    raise ParseError("nd-in-fragment")  # RFC 6980
                if packet.unknown_option:
                    raise ParseError("ipv6-unknown-option")
                self._receive_neighbour(packet, frame, now, verified)
                return
        self._check_destination(packet.destination, to_group)
        if ipv6.cannot_be_source(packet.source) or packet.source == ipv6.UNSPECIFIED:
            raise ParseError("martian-source")
        if packet.unknown_option:
            self._refuse_option(packet, now)
        if packet.is_fragment:
            key = (packet.addresses, packet.identification)
            if not self._join(packet, key, packet.offset, packet.more_follow, now):
                return
            verified = False
            ipv6.skip_extensions(packet)
            if packet.unknown_option:
                raise ParseError("ipv6-unknown-option")
        self._dispatch(packet, now, verified)

    def _refuse_option(self, packet: ipv6.Packet, now: float) -> None:
        """Do as an option's type says to whoever does not know it (RFC 8200 section 4.2)."""
        quoted = packet.header or b""
        if packet.source in self._addresses:
            raise ParseError("spoofed-source")
        if quoted[packet.unknown_option] >> 6 != _DISCARD_SILENTLY:
            self.control.send_unknown_option(packet, now)
        raise ParseError("ipv6-unknown-option")

    def _receive_neighbour(
        self, packet: ipv6.Packet, frame: ethernet.Frame, now: float, verified: bool
    ) -> None:
        """Neighbour discovery has rules of its own, and groups of its own to listen to."""
        if packet.destination not in self._addresses and not self.link.is_for_us(
            packet.destination
        ):
            raise ParseError("group-destination")
        if ipv6.cannot_be_source(packet.source):
            raise ParseError("martian-source")
        message = self.control.parse(packet, verified=verified)
        self.link.receive_neighbour(message, packet, frame.source, now)

    def _check_destination(self, destination: bytes, to_group: bool) -> None:
        if destination in self._addresses:
            if self.link.tentative:  # perhaps it is not ours; a SYN will come again
                raise ParseError("tentative-address")
            if to_group:  # RFC 1122 section 3.3.6: one forged frame would make all answer
                raise ParseError("one-address-in-group-frame")
        elif destination in self._broadcasts or is_group(destination):
            raise ParseError("group-destination")
        else:
            raise ParseError("packet-for-others")

    def _join(
        self, packet: "Packet", key: object, offset: int, more_follow: bool, now: float
    ) -> bool:
        """Take a fragment in; whether the packet is whole now, which it then has become."""
        if packet.source in self._addresses:
            raise ParseError("spoofed-source")
        quote = b""
        if not offset and not is_error(packet):
            quote = bytes(packet.header or b"") + packet.payload[:64]
        limit = SIZE_LIMIT - (ipv4.HEADER_SIZE if len(packet.source) == 4 else 0)
        whole = self.fragments.add(
            key, offset, packet.payload, now, more_follow=more_follow, first=quote, limit=limit
        )
        if whole is None:
            return False
        packet.payload = memoryview(whole)
        return True

    def _dispatch(self, packet: "Packet", now: float, verified: bool) -> None:
        if packet.source in self._addresses:  # the land attack: we would answer ourselves
            raise ParseError("spoofed-source")
        protocol = packet.protocol
        if protocol == ipv4.TCP:
            self.streams.receive(packet, now, verified)
        elif protocol == udp.PROTOCOL:
            self.datagrams.receive(packet, now, verified)
        elif protocol == (ipv4.ICMP if len(packet.source) == 4 else ipv6.ICMPV6):
            self.control.receive(packet, now, verified)
        else:
            self.control.send_protocol_unreachable(packet, now)
            raise ParseError("unknown-protocol")

    # -- sending -------------------------------------------------------------

    def send(
        self, local: bytes, remote: bytes, protocol: int, payload: "bytes | memoryview", now: float
    ) -> bool:
        """Send a packet, in fragments where it is too large; False when there is no route."""
        way = self.routes.way(local, remote)
        if way is None:
            self.counts.drop("no-route")
            return False
        mtu = way.mtu(now)
        if way.is_ipv4:
            packets = self._ipv4_packets(way, protocol, memoryview(payload), mtu)
        else:
            packets = self._ipv6_packets(way, protocol, memoryview(payload), mtu)
        for head, part in packets:
            self.link.send(way, self.port.prefix, head, part, now)
        return True

    def _identify(self, way: "Way") -> int:
        """Return a number for a packet that may be cut: counted per peer, from a secret start.

        One counter for all would tell each how much we send to others (RFC 7739 section 5.3).
        """
        if way.identification is None:
            start = blake2b(way.addresses, digest_size=4, key=self._secret, person=b"fragments")
            way.identification = int.from_bytes(start.digest(), "big")
        way.identification += 1
        return way.identification

    def _ipv4_packets(
        self, way: "Way", protocol: int, payload: memoryview, mtu: int
    ) -> "list[tuple[bytes, memoryview]]":
        # Routers may cut it: if it were too large, we would not believe who says so (Control).
        packet = ipv4.Packet(
            way.local, way.remote, protocol, payload, ttl=HOP_LIMIT,
            identification=self._identify(way) & 0xFFFF, flags_and_offset=0,
        )  # fmt: skip
        room = mtu - ipv4.HEADER_SIZE
        if len(payload) <= room:
            return [(ipv4.serialize_header(packet, len(payload)), payload)]
        packets = []
        for offset, part, more in _cut(payload, room):
            packet.flags_and_offset = offset // 8 | more * ipv4.MORE_FRAGMENTS
            packets.append((ipv4.serialize_header(packet, len(part)), part))
        return packets

    def _ipv6_packets(
        self, way: "Way", protocol: int, payload: memoryview, mtu: int
    ) -> "list[tuple[bytes, memoryview]]":
        packet = ipv6.Packet(way.local, way.remote, protocol, payload, hop_limit=HOP_LIMIT)
        if way.next_hop != way.remote:  # routers do not cut, and likewise
            mtu = ipv6.MINIMUM_MTU
        room = mtu - ipv6.HEADER_SIZE
        if len(payload) <= room:
            return [(ipv6.serialize_header(packet, len(payload)), payload)]
        identification = self._identify(way) & 0xFFFFFFFF
        packet.protocol = ipv6.FRAGMENT
        packets = []
        for offset, part, more in _cut(payload, room - ipv6.FRAGMENT_SIZE):
            middle = ipv6.serialize_fragment(protocol, offset, identification, more)
            head = ipv6.serialize_header(packet, len(part) + len(middle)) + middle
            packets.append((head, part))
        return packets

    # -- time ----------------------------------------------------------------

    def flush(self, now: float) -> None:
        """Send what TCP has to send: after each batch of frames, and when an application wrote."""
        self._express.settle(now)
        self.streams.flush(now)

    def deadline(self) -> float | None:
        """When to call on_deadline() next."""
        soonest = None
        for room in (self.streams.endpoint, self.link, self.fragments):
            when = room.deadline()
            if when is not None and (soonest is None or when < soonest):
                soonest = when
        return soonest

    def on_deadline(self, now: float) -> None:
        """Do what is due."""
        self.link.ask(now)
        for partial in self.fragments.expire(now):
            self.counts.drop("fragment-timeout")
            if partial.first:
                self.control.send_reassembly_timeout(partial.first, now)
        self.streams.on_deadline(now)
        self.flush(now)


def _cut(payload: memoryview, room: int) -> "list[tuple[int, memoryview, bool]]":
    """Cut a payload into fragments: offset, octets, and whether more follow."""
    size = room & ~7
    return [
        (offset, payload[offset : offset + size], offset + size < len(payload))
        for offset in range(0, len(payload), size)
    ]
