"""What to make of acknowledgments, and of their absence: round trips, losses, the way back.

A recovery begins when something is known to be lost, and ends when all that
was in flight then is acknowledged: a loss of ten segments is one event, and
the window is cut once (RFC 6582, RFC 6675).  After a time-out it is the same, but
everything counts as lost and the window opens again from one segment.

A recovery may be wrong: what was late looks lost.  Timestamps tell (Eifel,
RFC 3522): if the first acknowledgment after sending something again echoes the
time of its *first* sending, nothing was lost, and the cut is undone.
"""

from .congestion import ALGORITHMS
from .flight import Flight
from .rtt import RoundTrip
from .settings import CLOCK_GRANULARITY, DUPLICATE_THRESHOLD, NEVER


class Recovery:
    """The state of one connection's losses.  It decides; what is sent is the sender's."""

    __slots__ = (
        "_ambiguous_since", "_duplicates", "_must_repeat", "_recovered", "_repeated_at",
        "_timed_at", "_timed_end", "after_timeout", "congestion", "end", "flight", "look_at",
        "round_trip", "selective",
    )  # fmt: skip

    def __init__(self, mss: int, algorithm: str) -> None:
        self.flight = Flight(mss)
        self.round_trip = RoundTrip()
        self.congestion = ALGORITHMS[algorithm](mss)
        self.selective = False  # the peer sends SACK blocks
        self.end: int | None = None  # a recovery lasts until this position is acknowledged
        self.after_timeout = False  # and a time-out began it
        self.look_at = NEVER  # when to look for losses again: what may be late has time until then
        self._duplicates = 0  # duplicate ACKs in a row
        self._recovered = -1  # where the last one ended: duplicates from there may be its own
        self._must_repeat = False  # a recovery began: the first lost segment goes out at once
        self._repeated_at: float | None = None  # when it did, until an ACK tells if it had to
        self._timed_end: int | None = None  # one segment per round trip is timed (RFC 6298)
        self._timed_at = 0.0
        self._ambiguous_since: float | None = None  # something was repeated, and none timed since

    def opened(self) -> None:
        """The handshake is done."""
        self.round_trip.handshake_done()
        self.congestion.opened()

    # -- what the sender did ---------------------------------------------------

    def sent(self, start: int, end: int, now: float) -> None:
        """[start, end) was sent for the first time."""
        self.flight.add(start, end, now)
        if self._timed_end is None:
            self._timed_end = end
            self._timed_at = now

    def room(self, least: int) -> int:
        """Return how many octets may be sent again now: none, or at least so many."""
        room = self.congestion.window - self.flight.pipe
        if room >= least:
            return room
        return least if self._must_repeat else 0  # RFC 6675 section 5 (4.3)

    def repeated(self, now: float) -> None:
        """Something was sent again."""
        if self._must_repeat:
            self._must_repeat = False
            self._repeated_at = now
        self._timed_end = None  # Karn: its answer would tell nothing (MUST-18)
        self._ambiguous_since = now

    # -- what came back --------------------------------------------------------

    @property
    def wants_echo(self) -> bool:
        """Whether timestamps can tell what the segments themselves cannot: which was answered."""
        return self._repeated_at is not None or self._ambiguous_since is not None

    def acknowledged(self, una: int, octets: int, now: float, echo_at: float | None) -> None:
        """Everything before `una` has arrived; `octets` of it are news.

        `echo_at` is when the segment that this answers was sent, if timestamps tell.
        """
        flight = self.flight
        in_full_use = flight.octets * 2 >= self.congestion.window
        self._duplicates = flight.assumed = 0
        flight.acknowledge(una, now)
        if self._timed_end is not None and una >= self._timed_end:
            self._sample(now - self._timed_at)
        elif self._answers_repeat(echo_at):
            self._sample(now - (echo_at or now))
        if self.round_trip.backoffs:
            self.round_trip.progressed()
        if self.end is not None:
            self._progress(una, echo_at)
        if in_full_use and (self.end is None or self.after_timeout):
            self.congestion.acknowledged(octets, now, self.round_trip.smoothed or 0.0)
        self.look_at = NEVER

    def _answers_repeat(self, echo_at: float | None) -> bool:
        """Whether a timestamp tells that what was sent again is what was answered (RFC 7323 4.1).

        Without that, an RTO that was backed off would stay for as long as losses go on.
        """
        since = self._ambiguous_since
        if since is None or echo_at is None:
            return False
        return echo_at >= since - CLOCK_GRANULARITY

    def _sample(self, seconds: float) -> None:
        self._timed_end = None
        self._ambiguous_since = None
        self.round_trip.sample(seconds)
        self.flight.shortest = self.round_trip.minimum

    def _progress(self, una: int, echo_at: float | None) -> None:
        """Go on with a recovery, or end it."""
        if self._was_needless(echo_at):
            self.flight.forgive()
            self.congestion.undo()
            self._finish()
        elif self.end is not None and una >= self.end:
            self._recovered = self.end
            self._finish()
        else:
            self._repeated_at = None
            if not (self.selective or self.after_timeout):  # then, all counts as lost already
                self.flight.lose_first()  # a partial ACK: the next one is missing too (RFC 6582)

    def _was_needless(self, echo_at: float | None) -> bool:
        """Whether what is answered was sent before anything was sent again (RFC 3522)."""
        if self._repeated_at is None or echo_at is None:
            return False
        # Timestamps are rounded down: what was sent again may seem to be up to one unit older.
        return echo_at + CLOCK_GRANULARITY < self._repeated_at

    def duplicate(self, nxt: int, mss: int, now: float) -> None:
        """An ACK came once more, with nothing new: something overtook (RFC 5681)."""
        flight = self.flight
        if not flight.records or self.selective:
            return  # it answers nothing of ours (RFC 5681 section 2), or SACK tells more
        self._duplicates += 1
        flight.assumed = min(self._duplicates * mss, max(0, flight.octets - mss))
        if self._duplicates != DUPLICATE_THRESHOLD or self.end is not None:
            return
        if flight.records[0].start > self._recovered:  # RFC 6582 section 3.2, step 2
            flight.lose_first()
            self._begin(nxt, now)

    def look(self, nxt: int, now: float) -> None:
        """Find what must be lost by now, and begin a recovery if anything is."""
        smoothed = self.round_trip.smoothed or 0.0
        self.look_at = self.flight.find_lost(now, smoothed, self.end is not None)
        if self.flight.lost and self.end is None:
            self._begin(nxt, now)

    def time_out(self, nxt: int, mss: int, now: float) -> None:
        """Nothing came back in time: all is lost (RFC 6298 section 5, RFC 5681 section 3.1)."""
        self.round_trip.back_off()
        if self.after_timeout:
            self.congestion.window = mss  # the same loss still
        else:
            self.congestion.timed_out(self.flight.octets, now)
        self.flight.lose_all()
        self.end = nxt
        self.after_timeout = True
        self._must_repeat = True
        self._duplicates = 0
        self._timed_end = None
        self.look_at = NEVER

    def _begin(self, nxt: int, now: float) -> None:
        self.end = nxt
        self._must_repeat = True
        self.congestion.lost(self.flight.octets, now)

    def _finish(self) -> None:
        self.end = None
        self.after_timeout = False
        self._must_repeat = False
        self._repeated_at = None
