"""A stream's octets between two positions: what waits to be read, or to be acknowledged.

Held as a list of immutable `bytes`.  What is put in is kept by reference, and
what is taken out is a view where it can be, so that a large write travels to
the device without being copied; a view stays true for as long as someone holds it.

Small pieces are joined: a peer that sends one octet per segment would
otherwise make us hold 34 octets of object, and 16 of list, for each of them.
"""

from bisect import bisect_right

TYPE_CHECKING = False
if TYPE_CHECKING:
    Octets = bytes | memoryview

JOIN_BELOW = 2048  # octets: pieces up to this are appended to the one before them


class Stream:
    """The octets in [start, end) of a stream; positions are unwrapped sequence numbers."""

    __slots__ = ("_chunks", "_starts", "end", "start")

    def __init__(self, start: int) -> None:
        self.start = start
        self.end = start
        self._chunks: list[bytes] = []
        self._starts: list[int] = []  # the position of each chunk's first octet

    def __len__(self) -> int:
        return self.end - self.start

    def append(self, octets: bytes) -> None:
        """Put octets at the end."""
        chunks = self._chunks
        if chunks and len(chunks[-1]) + len(octets) <= JOIN_BELOW:
            chunks[-1] += octets
        else:
            chunks.append(octets)
            self._starts.append(self.end)
        self.end += len(octets)

    def join(self, other: "Stream") -> None:
        """Put another stream at the end, where it begins; it is part of this one from then on.

        Nothing of it may have been discarded.  However many pieces it has, none is looked at but
        the first: what a peer has put into it costs nothing a second time.
        """
        pieces, starts = other._chunks, other._starts
        if self._chunks and len(self._chunks[-1]) + len(pieces[0]) <= JOIN_BELOW:
            self._chunks[-1] += pieces[0]
            pieces, starts = pieces[1:], starts[1:]
        self._chunks += pieces
        self._starts += starts
        self.end = other.end

    def discard_before(self, position: int) -> None:
        """Forget everything before the position."""
        if position >= self.end:
            self._chunks.clear()
            self._starts.clear()
            self.end = self.start = position
            return
        self.start = position
        starts = self._starts
        if len(starts) > 1 and starts[1] <= position:
            gone = bisect_right(starts, position) - 1
            del starts[:gone], self._chunks[:gone]

    def between(self, first: int, last: int) -> "Octets":
        """Return the octets in [first, last), which must be within the stream."""
        starts = self._starts
        at = bisect_right(starts, first) - 1
        chunk = self._chunks[at]
        low, high = first - starts[at], last - starts[at]
        if high <= len(chunk):
            return chunk if high - low == len(chunk) else memoryview(chunk)[low:high]
        return self._joined(at, low, last - first)

    def _joined(self, at: int, low: int, length: int) -> bytes:
        pieces = [memoryview(self._chunks[at])[low:]]
        missing = length - len(pieces[0])
        while missing > 0:
            at += 1
            pieces.append(memoryview(self._chunks[at])[:missing])
            missing -= len(pieces[-1])
        return b"".join(pieces)

    def pieces(self) -> "list[Octets]":
        """Return all there is, in order and without a copy."""
        if not self._chunks:
            return []
        cut = self.start - self._starts[0]
        first = memoryview(self._chunks[0])[cut:] if cut else self._chunks[0]
        return [first, *self._chunks[1:]]
