"""Puts fragmented packets together again, within bounds.  Knows no I/O.

Attackers send fragments that overlap (to slip past whoever looked at them
before), that never become whole, or far too many.  So: an overlap ends the
whole packet (RFC 5722 section 4; for IPv4, too), a packet has TIMEOUT seconds,
and all that wait have PACKETS_LIMIT places and OCTETS_LIMIT octets, out of which
the oldest makes room.

Source: RFC 791 section 3.2, RFC 815, RFC 1122 section 3.3.2, RFC 8200 section 4.5.
"""

from ..errors import ParseError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable

TIMEOUT = 30.0  # Linux's; RFC 1122 says 60 to 120, of a slower time
PACKETS_LIMIT = 64
OCTETS_LIMIT = 1 << 20
SIZE_LIMIT = 65535  # octets of payload; an IPv4 packet's header counts, too
FRAGMENTS_LIMIT = 128  # of one packet: each new one is compared with all of them


class Partial:
    """A packet that is not whole yet.  `first` is what an ICMP error would quote."""

    __slots__ = ("_parts", "end", "first", "key", "octets", "started_at")

    def __init__(self, key: "Hashable", now: float) -> None:
        self.key = key
        self.started_at = now
        self.octets = 0
        self.end: int | None = None  # known once the last fragment is here
        self.first = b""
        self._parts: dict[int, bytes] = {}

    def add(
        self, offset: int, payload: memoryview, *, more_follow: bool, limit: int
    ) -> bytes | None:
        """Take a fragment in; return the whole payload once it is there.  Raises ParseError."""
        end = offset + len(payload)
        if end > limit:
            raise ParseError("fragment-too-long")  # the "ping of death"
        if (more_follow and len(payload) % 8) or not payload:
            raise ParseError("fragment-bad-length")
        if self._parts.get(offset, b"") == bytes(payload) and (more_follow or end == self.end):
            return None  # the same again, as networks do
        if len(self._parts) >= FRAGMENTS_LIMIT:
            raise ParseError("fragment-too-many")
        if any(offset < at + len(part) and at < end for at, part in self._parts.items()):
            raise ParseError("fragment-overlap")
        if not more_follow:
            if self.end is not None:
                raise ParseError("fragment-overlap")
            self.end = end
        self._parts[offset] = bytes(payload)
        self.octets += len(payload)
        return self._whole()

    def _whole(self) -> bytes | None:
        if self.end is None or self.octets < self.end:
            return None
        ordered = sorted(self._parts.items())
        if self.octets != self.end or ordered[-1][0] + len(ordered[-1][1]) != self.end:
            raise ParseError("fragment-overlap")  # some lie behind the end
        return b"".join(part for _, part in ordered)


class Reassembly:
    """All packets of an interface that are not whole yet."""

    def __init__(self) -> None:
        self._partials: dict[Hashable, Partial] = {}
        self._octets = 0
        self.evicted = 0  # how many made room for others

    def __len__(self) -> int:
        return len(self._partials)

    @property
    def octets(self) -> int:
        """How much is held."""
        return self._octets

    def add(
        self,
        key: "Hashable",
        offset: int,
        payload: memoryview,
        now: float,
        *,
        more_follow: bool,
        first: bytes = b"",
        limit: int = SIZE_LIMIT,
    ) -> bytes | None:
        """Take a fragment of the packet `key` in; return its payload once that is whole.

        Raises ParseError; the packet is then forgotten as a whole.
        """
        partial = self._partials.get(key)
        if partial is None:
            partial = self._partials[key] = Partial(key, now)
        if not offset:
            partial.first = first
        held = partial.octets
        try:
            whole = partial.add(offset, payload, more_follow=more_follow, limit=limit)
        except ParseError:
            self._octets += partial.octets - held
            self._forget(partial)
            raise
        self._octets += partial.octets - held
        if whole is not None:
            self._forget(partial)
        self._make_room()
        return whole

    def deadline(self) -> float | None:
        """When to call expire() next."""
        oldest = next(iter(self._partials.values()), None)
        return None if oldest is None else oldest.started_at + TIMEOUT

    def expire(self, now: float) -> list[Partial]:
        """Forget and return the packets whose time is over."""
        over = [one for one in self._partials.values() if one.started_at + TIMEOUT <= now]
        for partial in over:
            self._forget(partial)
        return over

    def _make_room(self) -> None:
        while len(self._partials) > PACKETS_LIMIT or self._octets > OCTETS_LIMIT:
            self._forget(next(iter(self._partials.values())))
            self.evicted += 1

    def _forget(self, partial: Partial) -> None:
        del self._partials[partial.key]
        self._octets -= partial.octets
