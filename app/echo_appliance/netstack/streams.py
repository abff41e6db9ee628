"""TCP on an interface: checksums, headers and frames around the segments of tcp/.

Segments leave in the order in which the endpoint has them to send.  One of them
may be 64 KiB long.  A device that cuts segments (TSO) gets it whole, and fills in
the checksums: what stands in the field is the sum of the pseudo-header.  For any
other it is cut here.  Source: virtio 1.2 section 5.1.6.2; RFC 9293 section 3.1.
"""

import struct

from ..errors import ParseError
from .checksum import is_valid, partial_sum, pseudo_header_sum
from .seq import MASK
from .tcp.connection import Connection
from .tcp.endpoint import Endpoint
from .wire import ipv4, ipv6, tcp
from .wire.tcp import ACK, FIN, PSH

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

_NUMBER = struct.Struct("!I")
_SUM = struct.Struct("!H")

_HOP_LIMIT = 64
_MSS_WITHOUT_ROUTE = 536  # nothing gets there in any case


class Streams:
    """TCP's part of an interface."""

    def __init__(self, interface: "Interface", secret: bytes, settings: "Settings") -> None:
        self._interface = interface
        self._port = interface.port
        self._link = interface.link
        self._now = 0.0
        self._we_cut = not interface.port.segment_limit
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
            mss = item.send_mss
            head, last = None, segments[0]
            for segment in segments:
                if head is not None and _differs_in_number_only(segment, last):
                    _NUMBER.pack_into(head, self._seq_at(way), segment.seq)
                    self._port.send(head, segment.payload)
                elif self._we_cut and len(segment.payload) > mss:
                    self._send_cut(way, segment, mss, hop_limit, traffic_class, now)
                else:
                    head = self._send(way, segment, mss, hop_limit, traffic_class, now)
                    last = segment

    def on_deadline(self, now: float) -> None:
        """Do what is due; flush() comes after."""
        self.endpoint.on_deadline(now)

    def _seq_at(self, way: "Way") -> int:
        """Return where in a frame the sequence number is."""
        ip_header = ipv4.HEADER_SIZE if way.is_ipv4 else ipv6.HEADER_SIZE
        return len(self._port.prefix) + _ETHERNET + ip_header + tcp.SEQ_OFFSET

    # Hot: no object but octets is made for a segment, and the fields are summed as numbers.
    def _send(
        self,
        way: "Way",
        segment: "Segment",
        mss: int,
        hop_limit: int,
        traffic_class: int,
        now: float,
    ) -> bytearray | None:
        """Send a segment; return what stood before its payload, if that is right for others, too.

        It is where the device fills in checksums: then what is in the field does not depend on
        the number, nor on the payload but for its size.
        """
        header = tcp.serialize(segment)
        payload = segment.payload
        size = len(header) + len(payload)
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
        ip = _ip_header(way, size, hop_limit, traffic_class)
        start = self._link.start_of_frame(way, prefix, now)
        if start is None:
            self._link.send(way, prefix, ip + header, payload, now)
            return None
        head = bytearray(start + ip + header)
        self._port.send(head, payload)
        return head if self._port.checksums else None

    # Hotter still: of what the segments of one run have in common, all is done once.
    def _send_cut(
        self,
        way: "Way",
        segment: "Segment",
        mss: int,
        hop_limit: int,
        traffic_class: int,
        now: float,
    ) -> None:
        """Cut a segment that is larger than the link bears, as late as can be.

        Up to here it is one, as for a device that cuts (TSO), so that TCP's work for 45 segments is
        done once: 10 us for each that is sent became 4.  The kernel does likewise, and calls it
        GSO.  SYN and URG never come here: the first has no payload, the second is not cut.
        """
        payload, flags, seq = memoryview(segment.payload), segment.flags, segment.seq
        last = (len(payload) - 1) // mss * mss  # where the last piece begins, which ends the run
        segment.flags = flags & ~(FIN | PSH)
        start = self._link.start_of_frame(way, self._port.prefix, now)
        if start is None:  # the neighbour is being asked for: what can wait does so by the piece
            for offset in range(0, last, mss):
                segment.seq, segment.payload = (seq + offset) & MASK, payload[offset : offset + mss]
                self._send(way, segment, mss, hop_limit, traffic_class, now)
        else:
            header = tcp.serialize(segment)
            size = len(header) + mss
            head = bytearray(start + _ip_header(way, size, hop_limit, traffic_class) + header)
            at_seq = self._seq_at(way)
            at_sum = at_seq - tcp.SEQ_OFFSET + tcp.CHECKSUM_OFFSET
            so_far = way.sum + ipv4.TCP + size + int.from_bytes(header, "big") - seq
            send = self._port.send
            for offset in range(0, last, mss):
                piece = payload[offset : offset + mss]
                number = (seq + offset) & MASK
                sum_of = -(so_far + number + partial_sum(piece)) % 65535
                _NUMBER.pack_into(head, at_seq, number)
                _SUM.pack_into(head, at_sum, sum_of)
                send(head, piece)
        segment.seq, segment.flags, segment.payload = (seq + last) & MASK, flags, payload[last:]
        self._send(way, segment, mss, hop_limit, traffic_class, now)

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

    def _sizes(self, local: bytes, remote: bytes) -> tuple[int, int]:
        """Return the largest segment to an address, and the largest that is cut below TCP."""
        way = self._interface.routes.way(local, remote)
        if way is None:
            return _MSS_WITHOUT_ROUTE, 0
        return self._mss(way, self._now), self._port.segment_limit or tcp.SUPER_SEGMENT


def _differs_in_number_only(segment: "Segment", last: "Segment") -> bool:
    """Whether a segment needs the headers of another one, but for its number.

    Both carry data and leave at once, so they acknowledge the same.
    """
    return segment.flags == last.flags == ACK and len(segment.payload) == len(last.payload) > 0


def _ip_header(way: "Way", size: int, hop_limit: int, traffic_class: int) -> bytes:
    """Return the IP header before a TCP segment of this size; its fields are summed as numbers."""
    if len(way.addresses) == 8:
        total = ipv4.HEADER_SIZE + size
        start = 0x4500 | traffic_class
        ttl_and_protocol = hop_limit << 8 | ipv4.TCP
        sum_of = -(start + total + ipv4.DONT_FRAGMENT + ttl_and_protocol + way.sum) % 65535
        return _IPV4.pack(start, total, ipv4.DONT_FRAGMENT, ttl_and_protocol, sum_of, way.addresses)
    return _IPV6.pack(6 << 28 | traffic_class << 20, size, ipv6.TCP, hop_limit, way.addresses)


def _connection_of(
    local: bytes, remote: bytes, transport: bytes
) -> tuple[tuple[bytes, int, bytes, int], int]:
    """Return the connection and the sequence number of a segment of ours that ICMP quotes."""
    ours, theirs, seq = struct.unpack_from("!HHI", transport)
    return (remote, theirs, local, ours), seq
