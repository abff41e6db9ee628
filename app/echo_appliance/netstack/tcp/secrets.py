"""Numbers that a stranger must not guess: initial sequence numbers, timestamps, ports, cookies.

Who guesses the next number of a connection can put octets into it.  So the first
one is a clock, which keeps numbers of successive connections apart, plus a keyed hash of the
addresses and ports, which hides the clock (RFC 6528, MUST-8, SHLD-1).  Timestamps are hidden
the same way (RFC 7323 section 7.1), so that they tell no uptime, and yet go on
rising from one connection to the next of the same ports.

A SYN cookie puts all that a listener would have to remember of a SYN into the
number of its SYN,ACK, so that a flood of SYNs costs no memory (D. J. Bernstein, 1996;
RFC 4987 section 3.6): 5 bits of time, 3 of MSS, 24 of hash.  What else was agreed upon fits the
low bits of the timestamp, which the peer echoes.
"""

from hashlib import blake2b
from struct import Struct

from ..seq import MASK

Key = tuple[bytes, int, bytes, int]  # remote address and port, local address and port

COOKIE_PERIOD = 64.0  # seconds; a cookie is good for this period and the next
COOKIE_MSS = (536, 1220, 1300, 1400, 1440, 1460, 4312, 8960)  # what a cookie can say
STAMP_BITS = 6  # of the timestamp: 4 of window scale (15: none), 1 of SACK, 1 unused
_NO_SCALE = 15

_PORTS = Struct("!HH")


class Secrets:
    """All that is derived from one secret; two hosts with one secret would be one host."""

    def __init__(self, secret: bytes) -> None:
        # Keyed once, and copied for each use: a quarter of the time of a hash.
        self._keyed = {
            use: blake2b(digest_size=8, key=secret[:64], person=use)
            for use in (b"start", b"port", b"cookie")
        }
        self._last: tuple[Key, int, int] | None = None

    def _hash(self, use: bytes, key: Key, *numbers: int) -> int:
        """Return 64 bits."""
        keyed = self._keyed[use].copy()
        keyed.update(key[0] + key[2] + _PORTS.pack(key[1], key[3]))
        for number in numbers:
            keyed.update((number & MASK).to_bytes(4, "big"))
        return int.from_bytes(keyed.digest(), "big")

    def _offsets(self, key: Key) -> tuple[int, int]:
        """Return where both clocks of a connection begin: two halves of one hash."""
        if self._last is None or self._last[0] != key:
            both = self._hash(b"start", key)
            self._last = (key, both >> 32, both & MASK)
        return self._last[1:]

    def initial_sequence_number(self, key: Key, now: float) -> int:
        """Return the number of our SYN: a 4-microsecond clock plus a hash (RFC 6528 section 3)."""
        return (int(now * 250_000) + self._offsets(key)[0]) & MASK

    def stamp_offset(self, key: Key) -> int:
        """Return what is added to the clock in our timestamps."""
        return self._offsets(key)[1]

    def port_offset(self, remote: bytes, remote_port: int, local: bytes) -> int:
        """Return where among the ephemeral ports to begin to look (RFC 6056 section 3.3.3)."""
        return self._hash(b"port", (remote, remote_port, local, 0))

    # -- SYN cookies -----------------------------------------------------------

    def cookie(self, key: Key, irs: int, mss: int, now: float) -> int:
        """Return the sequence number of a SYN,ACK that nothing is remembered of."""
        period = int(now / COOKIE_PERIOD)
        index = max(i for i, value in enumerate(COOKIE_MSS) if value <= max(mss, COOKIE_MSS[0]))
        return (period & 31) << 27 | index << 24 | self._hash_24(key, irs, period, index)

    def cookie_mss(self, key: Key, irs: int, cookie: int, now: float) -> int | None:
        """Return the MSS in a cookie of ours that is not too old; None: it is none."""
        period = int(now / COOKIE_PERIOD)
        index = cookie >> 24 & 7
        for made in (period, period - 1):
            hashed = self._hash_24(key, irs, made, index)
            if cookie == (made & 31) << 27 | index << 24 | hashed:
                return COOKIE_MSS[index]
        return None

    def _hash_24(self, key: Key, irs: int, period: int, index: int) -> int:
        return self._hash(b"cookie", key, irs, period, index) >> 40


def stamp_with(stamp: int, window_scale: int | None, sack_permitted: bool) -> int:
    """Return a timestamp, at most 64 ms older, whose low bits say what a SYN offered."""
    bits = (_NO_SCALE if window_scale is None else min(window_scale, 14)) << 1 | sack_permitted
    marked = stamp >> STAMP_BITS << STAMP_BITS | bits
    return (marked if marked <= stamp else marked - (1 << STAMP_BITS)) & MASK


def offered_in(stamp: int) -> tuple[int | None, bool]:
    """Return window scale and SACK permission from an echoed timestamp of stamp_with()."""
    scale = stamp >> 1 & 15
    return (None if scale == _NO_SCALE else scale), bool(stamp & 1)
