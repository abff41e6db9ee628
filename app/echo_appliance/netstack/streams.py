"""TCP on an interface: checksums, headers and frames around the segments of tcp/.

Segments leave in the order in which the endpoint has them to send.  With a
device that cuts segments itself (TSO), one of ours may be 64 KiB long, and its
checksum is the device's to fill in: what stands in the field is the sum of the
pseudo-header.  Source: virtio 1.2 section 5.1.6.2; RFC 9293 section 3.1.
"""

import struct

from ..errors import ParseError
from .checksum import is_valid, partial_sum, pseudo_header_sum
from .tcp.connection import Connection
from .tcp.endpoint import Endpoint
from .wire import ipv4, ipv6, tcp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .interface import Interface, Packet
    from .routes import Way
    from .tcp.settings import Settings
    from .wire.tcp import Segment

_ETHERNET = 14
_VNET = struct.Struct("<BBHHHH")  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
_NEEDS_CHECKSUM = 1
_GSO_IPV4, _GSO_IPV6 = 1, 4

_IPV4 = struct.Struct("!HHIHH8s")  # RFC 6864 section 4.1: with DF the identification means nothing
_IPV6 = struct.Struct("!IHBB32s")

_HOP_LIMIT = 64
_MSS_WITHOUT_ROUTE = 536  # nothing gets there in any case


class Streams:
    """TCP's part of an interface."""

    def __init__(self, interface: "Interface", secret: bytes, settings: "Settings") -> None:
        self._interface = interface
        self._port = interface.port
        self._link = interface.link
        self._now = 0.0
        self.endpoint = Endpoint(secret, self._sizes, settings)
        self.endpoint.on_suspect = self._suspect

    # -- receiving -----------------------------------------------------------

    def receive(self, packet: "Packet", now: float, verified: bool) -> None:
        """Take in a packet's segment.  Raises ParseError."""
        octets = packet.payload
        if not verified and not is_valid(
            octets, pseudo_header_sum(packet.addresses, ipv4.TCP, len(octets))
        ):
            raise ParseError("tcp-bad-checksum")
        self.endpoint.receive(packet.source, packet.destination, tcp.parse(octets), now)

    def refused(
        self, local: bytes, remote: bytes, transport: bytes, hard: bool, words: str
    ) -> None:
        """Tell a connection what a router, or its peer's host, said of a segment."""
        key, seq = _connection_of(local, remote, transport)
        self.endpoint.unreachable(key, seq, words, hard=hard)

    def recognizes(self, local: bytes, remote: bytes, transport: bytes) -> bool:
        """Whether a quoted segment is one of ours that is on its way."""
        return self.endpoint.recognizes(*_connection_of(local, remote, transport)) is not None

    def _suspect(self, remote: bytes) -> None:
        """Nothing comes back from there: perhaps its neighbour is another one now."""
        next_hop = self._interface.routes.next_hop(remote)
        if next_hop is not None:
            self._link.suspect(next_hop)

    def path_narrowed(self, way: "Way", now: float) -> None:
        """Let connections send segments that get through."""
        self.endpoint.set_path_mss(way.remote, self._mss(way, now))

    # -- sending -------------------------------------------------------------

    def flush(self, now: float) -> None:
        """Send all that is due."""
        self._now = now
        for item, segments in self.endpoint.to_send(now):
            way = self._interface.routes.way(item.local, item.remote)
            if way is None:
                self._interface.counts.drop("no-route")
                continue
            hop_limit, traffic_class = _HOP_LIMIT, 0
            if isinstance(item, Connection):
                settings = item.settings
                hop_limit, traffic_class = settings.hop_limit, settings.traffic_class
            for segment in segments:
                self._send(way, segment, item.send_mss, hop_limit, traffic_class, now)

    def on_deadline(self, now: float) -> None:
        """Do what is due; flush() comes after."""
        self.endpoint.on_deadline(now)

    # Hot: no object but octets is made for a segment, and the fields are summed as numbers.
    def _send(
        self,
        way: "Way",
        segment: "Segment",
        mss: int,
        hop_limit: int,
        traffic_class: int,
        now: float,
    ) -> None:
        header = tcp.serialize(segment)
        payload = segment.payload
        size = len(header) + len(payload)
        addresses = way.addresses
        # The pseudo-header's sum, for the device to go on from; or the whole.
        so_far = (way.sum + ipv4.TCP + size) % 65535
        prefix = self._port.prefix
        if self._port.checksums:
            prefix = self._offload(way, len(header), len(payload), mss)
        else:
            # A header has an even length, so that it may be summed apart, and needs no division.
            so_far = -(so_far + int.from_bytes(header, "big") + partial_sum(payload)) % 65535
        header[16] = so_far >> 8
        header[17] = so_far & 0xFF
        if len(addresses) == 8:
            total = ipv4.HEADER_SIZE + size
            start = 0x4500 | traffic_class
            ttl_and_protocol = hop_limit << 8 | ipv4.TCP
            ip_sum = -(start + total + ipv4.DONT_FRAGMENT + ttl_and_protocol + way.sum) % 65535
            ip = _IPV4.pack(start, total, ipv4.DONT_FRAGMENT, ttl_and_protocol, ip_sum, addresses)
        else:
            ip = _IPV6.pack(6 << 28 | traffic_class << 20, size, ipv6.TCP, hop_limit, addresses)
        self._link.send(way, prefix, ip + header, payload, now)

    @staticmethod
    def _offload(way: "Way", header_size: int, payload_size: int, mss: int) -> bytes:
        """Return the virtio_net_hdr that leaves the checksum, and cutting, to the device."""
        is_ipv4 = len(way.remote) == 4
        start = _ETHERNET + (ipv4.HEADER_SIZE if is_ipv4 else ipv6.HEADER_SIZE)
        if payload_size <= mss:
            return _VNET.pack(_NEEDS_CHECKSUM, 0, 0, 0, start, tcp.CHECKSUM_OFFSET)
        kind = _GSO_IPV4 if is_ipv4 else _GSO_IPV6
        return _VNET.pack(
            _NEEDS_CHECKSUM, kind, start + header_size, mss, start, tcp.CHECKSUM_OFFSET
        )

    # -- sizes ---------------------------------------------------------------

    def _mss(self, way: "Way", now: float) -> int:
        ip_header = ipv4.HEADER_SIZE if way.is_ipv4 else ipv6.HEADER_SIZE
        return way.mtu(now) - ip_header - tcp.MIN_HEADER

    def _sizes(self, remote: bytes) -> tuple[int, int]:
        """Return the largest segment to an address, and the largest that the device cuts for us."""
        local = self._interface.routes.source_for(remote)
        way = self._interface.routes.way(local, remote) if local else None
        if way is None:
            return _MSS_WITHOUT_ROUTE, 0
        return self._mss(way, self._now), self._port.segment_limit


def _connection_of(
    local: bytes, remote: bytes, transport: bytes
) -> tuple[tuple[bytes, int, bytes, int], int]:
    """Return the connection and the sequence number of a segment of ours that ICMP quotes."""
    ours, theirs, seq = struct.unpack_from("!HHI", transport)
    return (remote, theirs, local, ours), seq
