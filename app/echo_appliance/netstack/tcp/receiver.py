"""The stream that comes in: what is accepted, kept, acknowledged, and given to the application.

The window that we advertise has one edge, and it never moves back (RFC 9293
section 3.8.6, SHLD-14): what a peer was promised may be under way.  It moves on in steps
worth a segment, since small steps invite small segments for ever after (the
silly window syndrome, RFC 813; section 3.8.6.2.2).
"""

from ..seq import is_before
from .octets import Stream
from .reassembly import Reassembly
from .settings import (
    DEFAULT_MSS_V4,
    MAX_UNSCALED_WINDOW,
    MAX_WINDOW_SHIFT,
    NEVER,
    PAWS_IDLE,
    TIMESTAMPS_LENGTH,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .octets import Octets
    from .settings import Settings

# A smaller segment is no full-sized one, whatever its sender's MTU.
MIN_FULL_SIZE = DEFAULT_MSS_V4 - TIMESTAMPS_LENGTH


def window_shift(limit: int) -> int:
    """Return the scale with which `limit` octets fit the window field (RFC 7323 section 2)."""
    shift = 0
    while limit >> shift > MAX_UNSCALED_WINDOW and shift < MAX_WINDOW_SHIFT:
        shift += 1
    return shift


class Receiver:
    """The peer's half of a connection.  `nxt` and `edge` are RCV.NXT and RCV.NXT+RCV.WND."""

    __slots__ = (
        "_delay", "_full", "_limit", "ack_at", "ack_now", "acknowledged", "edge", "fin", "islands",
        "mss", "nxt", "queue", "scale", "stamp", "stamp_at", "urgent",
    )  # fmt: skip

    def __init__(self, settings: "Settings", mss: int) -> None:
        self.nxt = 0  # the next position that we have not got
        self.edge = 0  # the position up to which the peer may send
        self.fin: int | None = None  # where the peer's FIN is, once it was seen
        self.urgent = 0  # the peer's urgent data ends here
        self.queue = Stream(0)  # what waits for the application
        self.islands = Reassembly()
        self.scale = 0  # of windows that we advertise
        self.mss = mss  # what the peer may send us per segment
        self._full = MIN_FULL_SIZE  # octets in a full-sized segment of the peer, as far as was seen
        self.ack_now = False
        self.ack_at = NEVER  # when the delayed acknowledgment is due
        self.stamp = 0  # TS.Recent: the peer's timestamp that we echo
        self.stamp_at = 0.0
        self.acknowledged = 0  # the last position that we acknowledged
        self._limit = settings.receive_limit
        self._delay = settings.delayed_ack

    def start(self, irs: int) -> None:
        """The peer's SYN came, with this number."""
        self.nxt = self.acknowledged = irs + 1
        self.edge = self.nxt + min(self._limit, MAX_UNSCALED_WINDOW)
        self.queue.discard_before(self.nxt)  # it is empty: it begins there
        self.urgent = self.nxt

    # -- is it ours ------------------------------------------------------------

    def accepts(self, seq: int, length: int) -> bool:
        """Whether any of the segment is within the window (section 3.10.7.4, table 6)."""
        if length == 0:
            # The edge included: who has filled the window acknowledges from there (appendix A.2).
            return self.nxt <= seq <= self.edge
        return seq < self.edge and seq + length > self.nxt

    def is_old(self, stamp: int, now: float) -> bool:
        """Whether the timestamp shows a duplicate from before the numbers wrapped (PAWS)."""
        return is_before(stamp, self.stamp) and now - self.stamp_at < PAWS_IDLE

    def note_stamp(self, stamp: int, seq: int, now: float) -> None:
        """Keep the timestamp to echo: of the segment that the next ACK answers (RFC 7323 4.3)."""
        if seq <= self.acknowledged and not self.is_old(stamp, now):
            self.stamp, self.stamp_at = stamp, now

    # -- taking in -------------------------------------------------------------

    def take(self, payload: "Octets", size: int, now: float) -> None:
        """Take octets that begin at `nxt` and are within the window.  The payload is copied.

        `size` is that of the largest segment that they came in; 0: who knows.
        """
        self.queue.append(bytes(payload))
        self.nxt += len(payload)
        if self._full < size <= self.mss:  # more than that, a device has joined
            self._full = size
        if self.nxt - self.acknowledged >= 2 * self._full:
            self.ack_now = True  # SHLD-19: at least every second full-sized segment
        elif self.ack_at == NEVER:
            self.ack_at = now + self._delay

    def take_any(self, seq: int, payload: "Octets", now: float) -> None:
        """Take what of the payload is new and within the window, in order or not."""
        skip = max(0, self.nxt - seq)
        last = self.edge if self.fin is None else min(self.edge, self.fin)
        room = max(0, last - seq)
        if len(payload) > room or skip:
            self.ack_now = True  # it does not know where we are
            payload = payload[skip:room]
            seq += skip
        if not payload:
            return
        if seq > self.nxt:
            self.islands.insert(seq, payload)
            self.ack_now = True  # tells the sender of the gap (RFC 5681 section 4.2)
            return
        self.take(payload, 0, now)  # it may be of several
        if self.islands:
            self.ack_now = True  # likewise: a gap was filled
            for piece in self.islands.take(self.nxt):
                room = len(piece) if self.fin is None else max(0, self.fin - self.nxt)
                self.queue.append(bytes(piece[:room]))  # a FIN that came later ends it, too
                self.nxt += min(len(piece), room)

    def reach_fin(self) -> bool:
        """Whether the peer's FIN is next; if so, it is taken."""
        if self.fin != self.nxt:
            return False
        self.nxt += 1
        self.edge = max(self.edge, self.nxt)  # a FIN needs no room
        self.ack_now = True
        return True

    @property
    def finished(self) -> bool:
        """Whether the peer's stream came to its end."""
        return self.fin is not None and self.nxt > self.fin

    # -- giving out ------------------------------------------------------------

    def consume(self, octets: int) -> None:
        """The application has read so much from the queue."""
        queue = self.queue
        queue.discard_before(queue.start + octets)
        # Tell the peer of the room when there is much of it, not at every read.
        if not self.finished and self._next_edge() - self.edge >= self._limit // 4:
            self.ack_now = True

    def _next_edge(self) -> int:
        """Return where the edge would be if it moved now."""
        return self.nxt + self._limit - len(self.queue)

    def advertise(self) -> int:
        """Return the window field of a segment that leaves now, and note that it acknowledges."""
        edge = self.nxt + self._limit - len(self.queue)
        if edge - self.edge >= min(self._limit // 2, self.mss):
            self.edge = edge
        self.acknowledged = self.nxt
        self.ack_now = False
        self.ack_at = NEVER
        window = (self.edge - self.nxt) >> self.scale
        return window if window < MAX_UNSCALED_WINDOW else MAX_UNSCALED_WINDOW
