"""TCP segments: octets -> Segment -> octets.  No state, no checksum, no I/O.

The checksum covers IP addresses and is verified, or left to the device, by
the interface before it calls parse(), and filled in after serialize().

Header: RFC 9293 section 3.1; options: RFC 9293 section 3.2 (MSS), RFC 7323
(window scale, timestamps), RFC 2018 (SACK).
"""

from struct import Struct

from ...errors import ParseError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# Control bits.  Plain integers: an enum.Flag costs 200 ns per test, and each segment has several.
FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = 1, 2, 4, 8, 16, 32, 64, 128

MIN_HEADER = 20
MAX_HEADER = 60
# Octets of a segment that is cut into those of the wire later: what fits the largest packet that
# RFC 791 and RFC 8200 have, beside the largest headers.
SUPER_SEGMENT = 65535 - 40 - MAX_HEADER
SEQ_OFFSET = 4
CHECKSUM_OFFSET = 16

_END, _NOP, _MSS, _WINDOW_SCALE, _SACK_PERMITTED, _SACK, _TIMESTAMPS = 0, 1, 2, 3, 4, 5, 8
_LENGTHS = {_MSS: 4, _WINDOW_SCALE: 3, _SACK_PERMITTED: 2, _TIMESTAMPS: 10}

_FIXED = Struct("!HHIIBBHHH")
_BLOCK = Struct("!II")
NOP_NOP_TIMESTAMPS = 0x0101080A  # how all the world pads this option (RFC 7323 appendix A)
# The whole header of nearly every segment there is: no option but timestamps.
_TIMED = Struct("!HHIIBBHHHIII")


class Segment:
    """One segment.  Numbers are as on the wire: 32 bits, the window not yet scaled.

    A parsed payload is a view of the octets given to parse(): whoever keeps it
    copies it.  `timestamp` is (value, echo).
    """

    __slots__ = (
        "ack", "destination_port", "flags", "mss", "payload", "sack_blocks", "sack_permitted",
        "seq", "source_port", "timestamp", "urgent", "window", "window_scale",
    )  # fmt: skip

    def __init__(
        self,
        source_port: int,
        destination_port: int,
        seq: int,
        ack: int,
        flags: int,
        window: int,
        payload: "bytes | memoryview" = b"",
        timestamp: "tuple[int, int] | None" = None,
        *,
        mss: "int | None" = None,
        window_scale: "int | None" = None,
        sack_permitted: bool = False,
        sack_blocks: "Sequence[tuple[int, int]]" = (),
        urgent: int = 0,
    ) -> None:
        self.source_port = source_port
        self.destination_port = destination_port
        self.seq = seq
        self.ack = ack
        self.flags = flags
        self.window = window
        self.payload = payload
        self.timestamp = timestamp
        self.mss = mss
        self.window_scale = window_scale
        self.sack_permitted = sack_permitted
        self.sack_blocks = sack_blocks
        self.urgent = urgent

    @property
    def length(self) -> int:
        """SEG.LEN: octets of sequence space, SYN and FIN counted (RFC 9293 section 3.4)."""
        return len(self.payload) + (self.flags >> 1 & 1) + (self.flags & FIN)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Segment) and self._values() == other._values()

    __hash__ = None  # type: ignore[assignment]  # mutable

    def _values(self) -> tuple[object, ...]:
        blocks = tuple(self.sack_blocks)
        return (*(getattr(self, name) for name in self.__slots__ if name != "sack_blocks"), blocks)

    def __repr__(self) -> str:
        return f"<Segment {self}>"

    def __str__(self) -> str:
        """Return the segment as tcpdump users expect it."""
        fields = [f"Flags [{flag_letters(self.flags)}]", f"seq {self.seq}"]
        if self.payload:
            fields[-1] += f":{(self.seq + len(self.payload)) & 0xFFFFFFFF}"
        if self.flags & ACK:
            fields.append(f"ack {self.ack}")
        fields.append(f"win {self.window}")
        if self.flags & URG:
            fields.append(f"urg {self.urgent}")
        options = self._option_words()
        if options:
            fields.append(f"options [{','.join(options)}]")
        return ", ".join([*fields, f"length {len(self.payload)}"])

    def _option_words(self) -> list[str]:
        words = [f"mss {self.mss}"] if self.mss is not None else []
        if self.sack_permitted:
            words.append("sackOK")
        if self.timestamp is not None:
            words.append("TS val {} ecr {}".format(*self.timestamp))
        if self.window_scale is not None:
            words.append(f"wscale {self.window_scale}")
        if self.sack_blocks:
            blocks = "".join(f"{{{start}:{end}}}" for start, end in self.sack_blocks)
            words.append(f"sack {len(self.sack_blocks)} {blocks}")
        return words


def flag_letters(flags: int) -> str:
    """Return control bits in tcpdump's letters, as in `S.`."""
    letters = "".join(
        letter
        for bit, letter in ((SYN, "S"), (FIN, "F"), (RST, "R"), (PSH, "P"),
                            (ACK, "."), (URG, "U"), (ECE, "E"), (CWR, "W"))
        if flags & bit
    )  # fmt: skip
    return letters or "none"


def parse(octets: memoryview) -> Segment:
    """Return the segment that starts and ends with these octets; its payload is a view of them.

    Raises ParseError where header or options do not fit.  The checksum is the caller's matter,
    reserved bits are nobody's (RFC 9293 section 3.1: ignored when received).
    """
    if len(octets) < MIN_HEADER:
        raise ParseError("tcp: shorter than a header")
    if octets[12] >> 4 == 8 and len(octets) >= 32:
        (source, destination, seq, ack, _, flags, window, _, urgent, option, value, echo) = (
            _TIMED.unpack_from(octets)
        )
        if option == NOP_NOP_TIMESTAMPS:
            segment = Segment(
                source, destination, seq, ack, flags, window, octets[32:], (value, echo)
            )
            segment.urgent = urgent
            return segment
    source, destination, seq, ack, offset, flags, window, _, urgent = _FIXED.unpack_from(octets)
    header = (offset >> 4) * 4
    if not MIN_HEADER <= header <= len(octets):
        raise ParseError("tcp: data offset outside of the segment")
    segment = Segment(source, destination, seq, ack, flags, window, octets[header:])
    segment.urgent = urgent
    if header > MIN_HEADER:
        _parse_options(bytes(octets[MIN_HEADER:header]), segment)
    return segment


def _parse_options(octets: bytes, segment: Segment) -> None:
    """Read options into the segment; ones unknown to us are skipped (RFC 9293 MUST-6)."""
    at, end = 0, len(octets)
    while at < end:
        kind = octets[at]
        if kind == _END:
            return
        if kind == _NOP:
            at += 1
            continue
        if at + 2 > end:
            raise ParseError("tcp: option cut short")
        length = octets[at + 1]
        if length < 2 or at + length > end:  # MUST-7; zero would loop for ever
            raise ParseError("tcp: option runs past the header")
        if length != _LENGTHS.get(kind, length):
            raise ParseError("tcp: option of a wrong length")
        if kind == _MSS:
            segment.mss = octets[at + 2] << 8 | octets[at + 3]
        elif kind == _WINDOW_SCALE:
            segment.window_scale = octets[at + 2]
        elif kind == _SACK_PERMITTED:
            segment.sack_permitted = True
        elif kind == _TIMESTAMPS:
            segment.timestamp = _BLOCK.unpack_from(octets, at + 2)
        elif kind == _SACK:
            segment.sack_blocks = _parse_blocks(octets[at + 2 : at + length])
        at += length


def _parse_blocks(octets: bytes) -> list[tuple[int, int]]:
    if len(octets) % 8 or not octets:
        raise ParseError("tcp: option of a wrong length")
    return list(_BLOCK.iter_unpack(octets))


def serialize(segment: Segment) -> bytearray:
    """Return the segment's header with its options; the checksum field is zero.

    The payload stays where it is, to be gathered by the device.  Raises ValueError when options
    exceed the 40 octets there are.
    """
    stamp = segment.timestamp
    if stamp is not None and not segment.flags & SYN and not segment.sack_blocks:
        header = bytearray(32)
        _TIMED.pack_into(
            header, 0, segment.source_port, segment.destination_port, segment.seq, segment.ack,
            0x80, segment.flags, segment.window, 0, segment.urgent, NOP_NOP_TIMESTAMPS, *stamp,
        )  # fmt: skip
        return header
    options = _options(segment)
    length = MIN_HEADER + len(options)
    if length > MAX_HEADER:
        raise ValueError(f"{len(options)} octets of options do not fit a TCP header")
    header = bytearray(length)
    _FIXED.pack_into(
        header, 0, segment.source_port, segment.destination_port, segment.seq, segment.ack,
        length // 4 << 4, segment.flags, segment.window, 0, segment.urgent,
    )  # fmt: skip
    header[MIN_HEADER:] = options
    return header


def _options(segment: Segment) -> bytes:
    """Return the options, each group padded to four octets by leading NOPs."""
    out = b""
    if segment.mss is not None:
        out += bytes((_MSS, 4)) + segment.mss.to_bytes(2, "big")
    if segment.sack_permitted:
        out += bytes((_NOP, _NOP, _SACK_PERMITTED, 2))
    if segment.timestamp is not None:
        out += NOP_NOP_TIMESTAMPS.to_bytes(4, "big") + _BLOCK.pack(*segment.timestamp)
    if segment.window_scale is not None:
        out += bytes((_NOP, _WINDOW_SCALE, 3, segment.window_scale))
    if segment.sack_blocks:
        out += bytes((_NOP, _NOP, _SACK, 2 + 8 * len(segment.sack_blocks)))
        out += b"".join(_BLOCK.pack(*block) for block in segment.sack_blocks)
    return out
