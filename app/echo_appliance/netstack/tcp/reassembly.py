"""What came before its turn: islands of octets beyond a gap (RFC 9293 SHLD-31, RFC 2018).

Bounded twice: by the receive window, since nothing beyond it gets here, and by
the number of islands, since each costs more than the octets in it.
"""

from bisect import bisect_left, bisect_right
from operator import attrgetter

from .octets import Stream
from .settings import MAX_ISLANDS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .octets import Octets

_start = attrgetter("start")
_end = attrgetter("end")


class Reassembly:
    """Islands in order of position, none touching another.

    Where two segments disagree on an octet, the one that came first is believed,
    so that nobody can change what the application has been promised.
    """

    __slots__ = ("_islands", "_recent")

    def __init__(self) -> None:
        self._islands: list[Stream] = []
        self._recent: list[Stream] = []  # the same, last touched first

    def __len__(self) -> int:
        return len(self._islands)

    def insert(self, start: int, payload: "Octets") -> None:
        """Keep octets that begin beyond the gap.  Borrows the payload."""
        end = start + len(payload)
        low = bisect_left(self._islands, start, key=_end)
        high = bisect_right(self._islands, end, key=_start)
        touched = self._islands[low:high]
        if not touched and len(self._islands) >= MAX_ISLANDS:
            return  # not reported in a SACK block, so it comes again
        island = self._merged(touched, start, payload)
        self._islands[low:high] = [island]
        self._recent = [island, *(other for other in self._recent if other not in touched)]

    @staticmethod
    def _merged(touched: list[Stream], start: int, payload: "Octets") -> Stream:
        """Return one island: the touched ones, and the payload between and around them."""
        if touched and touched[0].start <= start:
            island, *followers = touched
        else:
            island, followers = Stream(start), touched
        for follower in followers:
            _extend(island, start, payload, follower.start)
            island.join(follower)
        _extend(island, start, payload, start + len(payload))
        return island

    def take(self, position: int) -> "list[Octets]":
        """Return what joins on to the position, now that the stream has come so far."""
        if not self._islands or self._islands[0].start > position:
            return []
        pieces: list[Octets] = []
        while self._islands and self._islands[0].start <= position:
            island = self._islands.pop(0)
            self._recent.remove(island)
            if island.end > position:
                island.discard_before(position)
                pieces += island.pieces()
                position = island.end
        return pieces

    def blocks(self, most: int) -> list[tuple[int, int]]:
        """Return [start, end) of the islands, the last touched first (RFC 2018 section 4)."""
        return [(island.start, island.end) for island in self._recent[:most]]


def _extend(island: Stream, start: int, payload: "Octets", until: int) -> None:
    """Append the payload's octets from the island's end up to a position."""
    if until > island.end:
        island.append(bytes(payload[island.end - start : until - start]))
