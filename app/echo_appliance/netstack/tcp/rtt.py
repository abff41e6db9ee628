"""How long to wait for an acknowledgment (RFC 6298).

A time-out that comes early repeats what was not lost, and one that comes late leaves
the line idle.  So the time-out follows the mean of the round trips *and* how
much they vary: a mean alone, as RFC 793 had it, collapses when the load rises
(V. Jacobson, Congestion Avoidance and Control, 1988).
"""

from .settings import CLOCK_GRANULARITY, INITIAL_RTO, MAX_RTO, MIN_RTO, NEVER, RTO_AFTER_LOST_SYN


class RoundTrip:
    """Smoothed round-trip time, its variation, and the time-out that they give; seconds."""

    __slots__ = ("_variation", "backoffs", "minimum", "rto", "smoothed")

    def __init__(self) -> None:
        self.smoothed: float | None = None
        self.minimum = NEVER
        self.rto = INITIAL_RTO
        self.backoffs = 0  # time-outs in a row
        self._variation = 0.0

    def sample(self, seconds: float) -> None:
        """Take in one round trip of a segment that was sent once (Karn: MUST-18)."""
        if seconds < self.minimum:
            self.minimum = seconds
        if self.smoothed is None:
            self.smoothed = seconds
            self._variation = seconds / 2
        else:
            self._variation += (abs(self.smoothed - seconds) - self._variation) / 4
            self.smoothed += (seconds - self.smoothed) / 8
        self._set()

    def progressed(self) -> None:
        """New data was acknowledged: the back-off is over."""
        self.backoffs = 0
        self._set()

    def back_off(self) -> None:
        """The time-out passed: double it (section 5.5)."""
        self.backoffs += 1
        self.rto = min(self.rto * 2, MAX_RTO)

    def handshake_done(self) -> None:
        """After a SYN was lost, be careful: we know nothing of this path yet (section 5.7)."""
        if self.backoffs and self.smoothed is None:
            self.rto = RTO_AFTER_LOST_SYN
        self.backoffs = 0

    def _set(self) -> None:
        if self.smoothed is not None:
            spread = max(CLOCK_GRANULARITY, 4 * self._variation)
            self.rto = min(max(self.smoothed + spread, MIN_RTO), MAX_RTO)
