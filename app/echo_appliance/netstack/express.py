"""The express road: the next segment of an established connection, from its frame straight to TCP.

Nearly every frame of a transfer is that, and its headers are those of the frame
before but for a few numbers.  On the long road (interface.py) it passes six
rooms, and each of them makes an object: half of the time that there is per
segment at 1 Gbit/s and an MTU of 1500.  Here all headers are read at once, and
each field is compared with the only value that is usual: no option but
timestamps, no fragment, our hardware address.  That there is a connection with
these addresses and ports says that the long road has judged them before.

Whatever is unusual, or wrong, is left to the long road.  So nothing is dropped
or counted here, and one place alone decides what becomes of a bad frame.

Nor is TCP asked for each segment.  One is held until the next frame, or the end of
the batch: data that go on where the held ones end are joined to them, and an
acknowledgment that says more than the held one takes its place.  To TCP it is as
if its peer had sent larger segments, and as if some acknowledgments had been
lost, which every sender has to bear with.  A duplicate acknowledgment takes
nobody's place: it tells of a loss (RFC 5681 section 3.2).  What turns out not to be
the next segment after all, TCP is given as it came.  No more is held than one
batch of frames has, since each batch ends with a flush.  The kernel joins
segments likewise, and calls it GRO.
"""

from struct import Struct

from .checksum import is_valid, pseudo_header_sum
from .seq import MASK, is_before
from .wire import ethernet, ipv4, ipv6
from .wire.tcp import ACK, NOP_NOP_TIMESTAMPS, PSH, Segment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .tcp.endpoint import Endpoint
    from .tcp.secrets import Key

_IP = ethernet.HEADER_SIZE
_TCP_SIZE = 32  # with timestamps
_IN_IPV4 = _IP + ipv4.HEADER_SIZE  # where TCP begins
_IN_IPV6 = _IP + ipv6.HEADER_SIZE

_TCP = "HHIIBBH4xIII"  # ports, seq, ack, offset, flags, window; the option and its numbers
_IPV4 = Struct("!6s6xHBxH2xHxB2x4s4s" + _TCP)
_IPV6 = Struct("!6s6xHIHBx16s16s" + _TCP)
_IPV4_WITHOUT_OPTIONS = 0x45
_IPV6_FIRST_OCTET = ethernet.IPV6 >> 8
_TCP_OFFSET = _TCP_SIZE // 4 << 4
_LARGE = 4096  # octets: what the device has joined, or was never cut, is worth TCP's while


class Express:
    """Takes what is usual.  Borrows the endpoint."""

    def __init__(self, hardware: bytes, endpoint: "Endpoint") -> None:
        self._hardware = hardware
        self._endpoint = endpoint
        # What is held: whose, its first and last number and the rest of its header, and its data.
        self._key: Key | None = None
        self._seq = self._end = self._ack = self._window = 0
        self._stamp = (0, 0)
        self._pieces: list[bytes] = []

    def take(self, octets: memoryview, now: float, verified: bool) -> bool:
        """Take the frame if it is usual; else nothing was done, and it is for the long road.

        `verified`: the device vouches for TCP's checksum.
        """
        size = len(octets)
        if size < _IPV4.size:
            return False
        if octets[12] == _IPV6_FIRST_OCTET:
            return size >= _IPV6.size and self._take_ipv6(octets, now, verified)
        (hardware, ethertype, version, length, fragment, protocol, remote, local, remote_port,
         local_port, seq, ack, offset, flags, window, option, value, echo) = _IPV4.unpack_from(
            octets
        )  # fmt: skip
        if (
            option != NOP_NOP_TIMESTAMPS
            or offset != _TCP_OFFSET
            or protocol != ipv4.TCP
            or hardware != self._hardware
            or ethertype != ethernet.IPV4
            or version != _IPV4_WITHOUT_OPTIONS
            or fragment & (ipv4.MORE_FRAGMENTS | ipv4.OFFSET_MASK)
            or not ipv4.HEADER_SIZE + _TCP_SIZE <= length <= size - _IP
            or not is_valid(octets[_IP:_IN_IPV4])
        ):
            return False
        end = _IP + length
        if not verified and not is_valid(
            octets[_IN_IPV4:end],
            pseudo_header_sum(remote + local, ipv4.TCP, length - ipv4.HEADER_SIZE),
        ):
            return False
        key = (remote, remote_port, local, local_port)
        payload = octets[_IN_IPV4 + _TCP_SIZE : end]
        return self._deliver(key, seq, ack, flags, window, payload, (value, echo), now)

    def _take_ipv6(self, octets: memoryview, now: float, verified: bool) -> bool:
        (hardware, ethertype, version, length, protocol, remote, local, remote_port, local_port,
         seq, ack, offset, flags, window, option, value, echo) = _IPV6.unpack_from(
            octets
        )  # fmt: skip
        if (
            option != NOP_NOP_TIMESTAMPS
            or offset != _TCP_OFFSET
            or protocol != ipv6.TCP
            or hardware != self._hardware
            or ethertype != ethernet.IPV6
            or version >> 28 != 6
            or not _TCP_SIZE <= length <= len(octets) - _IN_IPV6
        ):
            return False
        end = _IN_IPV6 + length
        if not verified and not is_valid(
            octets[_IN_IPV6:end], pseudo_header_sum(remote + local, ipv6.TCP, length)
        ):
            return False
        key = (remote, remote_port, local, local_port)
        payload = octets[_IN_IPV6 + _TCP_SIZE : end]
        return self._deliver(key, seq, ack, flags, window, payload, (value, echo), now)

    def _deliver(
        self, key: "Key", seq: int, ack: int, flags: int, window: int, payload: memoryview,
        stamp: "tuple[int, int]", now: float,
    ) -> bool:  # fmt: skip
        """Join the segment to what is held, or hold it; False: it is for the long road."""
        size = len(payload)
        if flags & ~PSH != ACK:
            return False
        if size > _LARGE:
            self.settle(now)
            return self._endpoint.receive_next(key, seq, ack, window, payload, size, stamp, now)
        if key == self._key:
            if not size:
                if not self._pieces and self._is_news(seq, ack, stamp):
                    self._ack, self._window, self._stamp = ack, window, stamp
                    return True
            elif (
                self._pieces
                and size <= len(self._pieces[0])  # TCP learns from it how large a full one is
                and seq == self._end
                and ack == self._ack
                and window == self._window
                and stamp == self._stamp
            ):
                self._pieces.append(bytes(payload))  # the frame's octets are ours until we return
                self._end = (seq + size) & MASK
                return True
        self.settle(now)
        if key not in self._endpoint.connections:
            return False
        self._key, self._seq, self._ack, self._window, self._stamp = key, seq, ack, window, stamp
        self._end = (seq + size) & MASK
        if size:
            self._pieces.append(bytes(payload))
        return True

    def _is_news(self, seq: int, ack: int, stamp: "tuple[int, int]") -> bool:
        """Whether an acknowledgment says all that the held one does, and more."""
        return (
            seq == self._seq
            and is_before(self._ack, ack)
            and not is_before(stamp[0], self._stamp[0])
        )

    def settle(self, now: float) -> None:
        """Let TCP have what is held: before any other frame, and at the end of a batch."""
        key = self._key
        if key is None:
            return
        pieces = self._pieces or [b""]
        self._key, self._pieces = None, []
        payload = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        size = len(pieces[0])  # none is larger
        seq, ack, window, stamp = self._seq, self._ack, self._window, self._stamp
        if self._endpoint.receive_next(key, seq, ack, window, payload, size, stamp, now):
            return
        for piece in pieces:  # it is not the usual after all: one by one, as they came
            segment = Segment(key[1], key[3], seq, ack, ACK, window, piece, stamp)
            self._endpoint.receive(key[0], key[2], segment, now)
            seq = (seq + len(piece)) & MASK
