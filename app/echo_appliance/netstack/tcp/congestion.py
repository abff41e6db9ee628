"""How much may be under way: NewReno (RFC 5681, 6582) and CUBIC (RFC 9438).

The network does not say how much it can carry; it loses what is too much.  So
a sender raises its window until something is lost, cuts it, and raises it
again.  NewReno adds one segment per round trip: on a long fast path it needs
minutes to come back.  CUBIC raises it as a cubic function of *time*: fast while
far below the window at which the last loss was, slowly near it, then fast again.

Which segments were lost is the business of flight.py; here is only how much.
"""

from .settings import INITIAL_WINDOW

_HUGE = 1 << 40


class NewReno:
    """The congestion window, octets."""

    __slots__ = ("_before", "_counted", "mss", "ssthresh", "window")

    beta = 0.5

    def __init__(self, mss: int) -> None:
        self.mss = mss
        self.window = INITIAL_WINDOW * mss  # RFC 6928
        self.ssthresh = _HUGE  # RFC 5681 section 3.1: arbitrarily high
        self._before = (self.window, self.ssthresh)
        self._counted = 0  # octets acknowledged since the window last grew

    def acknowledged(self, octets: int, now: float, round_trip: float) -> None:
        """New octets were acknowledged while the window was in full use and nothing was missing."""
        if self.window < self.ssthresh:  # slow start, by octets counted (RFC 3465, L = 2 or more)
            self.window = min(self.window + octets, max(self.ssthresh, self.window + self.mss))
        else:
            self._avoid(octets, now, round_trip)

    def _avoid(self, octets: int, now: float, round_trip: float) -> None:
        # One segment per window of octets, counted (RFC 5681 section 3.1): a share per ACK would be
        # rounded down, by half where windows are large.
        self._counted += octets
        if self._counted >= self.window:
            self._counted -= self.window
            self.window += self.mss

    def lost(self, flight: int, now: float) -> None:
        """Something was lost: halve (once per window of data, as the caller sees to)."""
        self._before = (self.window, self.ssthresh)
        self.ssthresh = max(int(flight * self.beta), 2 * self.mss)
        self.window = self.ssthresh
        self._counted = 0

    def timed_out(self, flight: int, now: float) -> None:
        """Nothing comes back at all: start again from one segment (RFC 5681 section 3.1)."""
        self.lost(flight, now)
        self.window = self.mss

    def undo(self) -> None:
        """The loss was none (RFC 4015): be as before."""
        window, self.ssthresh = self._before
        self.window = max(self.window, window)

    def opened(self) -> None:
        """The handshake is done: if a SYN was lost, it told nothing of the path's capacity."""
        self.ssthresh = _HUGE

    def rested(self) -> None:
        """Nothing was sent for a while: what we knew of the path is old (RFC 5681 section 4.1)."""
        self.window = min(self.window, INITIAL_WINDOW * self.mss)


class Cubic(NewReno):
    """NewReno with another growth, and a smaller cut."""

    __slots__ = ("_epoch", "_estimate", "_peak", "_plateau")

    beta = 0.7  # section 4.6
    _scale = 0.4  # C of section 5: segments per second cubed

    def __init__(self, mss: int) -> None:
        super().__init__(mss)
        self._epoch: float | None = None  # when this climb began
        self._peak = 0.0  # W_max: segments at the last loss
        self._plateau = 0.0  # K: seconds from the epoch to the peak
        self._estimate = 0.0  # W_est: what NewReno would have, segments

    def _avoid(self, octets: int, now: float, round_trip: float) -> None:
        current = self.window / self.mss
        if self._epoch is None:
            self._begin(current, now)
        elapsed = now + round_trip - (self._epoch or 0.0)
        target = self._scale * (elapsed - self._plateau) ** 3 + self._peak
        target = min(max(target, current), 1.5 * current)  # section 4.2
        # Where NewReno would be ahead, be as fast as it (section 4.3).
        alpha = 3 * (1 - self.beta) / (1 + self.beta) if self._estimate < self._peak else 1.0
        self._estimate += alpha * octets / self.window
        if self._estimate > target:
            self.window = max(self.window, int(self._estimate * self.mss))
        else:
            self.window += int((target - current) / current * octets)

    def _begin(self, current: float, now: float) -> None:
        self._epoch = now
        self._estimate = current
        self._peak = max(self._peak, current)
        self._plateau = ((self._peak - current) / self._scale) ** (1 / 3)

    def lost(self, flight: int, now: float) -> None:
        """Note the peak, a bit lower if it sinks: room for newcomers (section 4.7)."""
        current = self.window / self.mss
        self._peak = current * (1 + self.beta) / 2 if current < self._peak else current
        self._epoch = None
        super().lost(flight, now)

    def rested(self) -> None:
        """Begin a new climb: the time that was rested is none that was climbed."""
        self._epoch = None
        super().rested()


ALGORITHMS = {"newreno": NewReno, "cubic": Cubic}
