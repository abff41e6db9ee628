"""How much of something may be sent: a bucket of tokens that time fills.  Knows no I/O.

RFC 1812 section 4.3.2.8 and RFC 4443 section 2.4 (f) ask for it for ICMP errors:
without one, a stream of forged packets would be answered by a stream of ours.
"""


class Budget:
    """So many per second, and so many at once."""

    __slots__ = ("_burst", "_left", "_rate", "_seen_at")

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._left = float(burst)
        self._seen_at = 0.0

    def take(self, now: float) -> bool:
        """Whether there is one left, which is then used."""
        grown = self._left + max(0.0, now - self._seen_at) * self._rate
        self._left = min(self._burst, grown)
        self._seen_at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True
