"""The stream that goes out: what may be sent now, and what becomes of it.

Four things hold octets back.  The peer's window (flow control), the congestion
window (what the network bears), Nagle (no second small segment before the first
is acknowledged), and silly-window avoidance (no crumbs of a window).
Positions are unwrapped sequence numbers; SYN and FIN count as one octet each.

One timer does three jobs, since they never run together: the retransmission
time-out (RFC 6298), the probe of a zero window (RFC 9293 section 3.8.6.1), and
the tail probe (RFC 8985 section 7), which repeats the last segment after two
round trips so that a lost tail is found by SACK and not by the time-out.
"""

from ..wire.tcp import ACK, FIN, PSH, SYN
from .octets import Stream
from .recovery import Recovery
from .settings import DEFAULT_MSS_V4, MAX_RECORDS, NEVER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .flight import Sent
    from .octets import Octets
    from .settings import Settings

    Emit = Callable[[int, int, Octets], None]  # position, control bits, payload

TAIL_MARGIN = 0.002  # seconds: RFC 8985 section 7.2 leaves room for a timer's coarseness


class Sender:
    """Our half of a connection.  The names `una`, `nxt` and `window` are the RFC's SND.UNA etc."""

    __slots__ = (
        "_beyond", "_limit", "_nagle", "_probe", "_reopened_at", "_reopened_when", "_small_end",
        "_tail_next", "_tried_at", "_updated_by", "burst", "burst_limit", "congestion", "fin",
        "flight", "iss", "max_window", "mss", "nxt", "orphaned", "queue", "recovery",
        "retransmit_at", "round_trip", "scale", "stalled_at", "syn_flags", "una", "urgent",
        "window",
    )  # fmt: skip

    def __init__(self, iss: int, mss: int, settings: "Settings") -> None:
        self.iss = iss
        self.syn_flags = SYN
        self.una = iss  # the oldest position not acknowledged
        self.nxt = iss  # the next position to be sent for the first time
        self.window = 0  # octets that the peer allows from una on
        self.max_window = 0  # the most it ever did
        self.scale = 0  # of windows that the peer advertises
        self.mss = mss  # octets of payload per segment on the wire
        self.burst = mss  # the same below us, where they may be cut (TSO, GSO)
        self.burst_limit = 0
        self.queue = Stream(iss + 1)
        self.fin: int | None = None  # where our FIN is, once the application has closed
        self.orphaned = False  # no application reads any more, or waits for what becomes of this
        self.urgent = iss  # urgent data ends here
        self.recovery = Recovery(mss, settings.congestion)
        self.flight = self.recovery.flight
        self.congestion = self.recovery.congestion
        self.round_trip = self.recovery.round_trip
        self.retransmit_at = NEVER
        self.stalled_at = 0.0  # since when nothing of what is in flight was acknowledged
        self._limit = settings.send_limit
        self._nagle = settings.nagle
        self._updated_by: tuple[float, int] = (-NEVER, 0)  # WL1, WL2: seq, ack that set the window
        self._tried_at = 0.0  # when anything was last sent
        self._small_end = iss  # the end of the last segment that was not full
        self._tail_next = False  # the timer was set for a tail probe
        self._probe = ""  # what the timer found to be due: "", "window" or "tail"
        self._beyond = iss  # the end of what was sent without regard to the peer's window
        self._reopened_at = -1  # `una` when a window opened again over what was in flight
        self._reopened_when = -NEVER

    # -- the application's side ----------------------------------------------

    @property
    def room(self) -> int:
        """Octets that write() would take."""
        return 0 if self.fin is not None else max(0, self._limit - len(self.queue))

    def write(self, data: "Octets | bytearray", urgent: bool = False) -> int:
        """Take as much as there is room for; return how much.  `bytes` are not copied."""
        room = self.room
        taken = data if len(data) <= room else data[:room]
        if taken:
            self.queue.append(taken if isinstance(taken, bytes) else bytes(taken))
            if urgent:
                self.urgent = self.queue.end
        return len(taken)

    def finish(self) -> None:
        """No more will be written: FIN follows the last octet."""
        self.fin = self.queue.end

    @property
    def end(self) -> int:
        """The position after all that is to be sent, FIN included."""
        return self.queue.end if self.fin is None else self.fin + 1

    @property
    def all_acknowledged(self) -> bool:
        """Whether the peer has all, FIN included."""
        return self.fin is not None and self.una > self.fin

    # -- sending ---------------------------------------------------------------

    def set_mss(self, mss: int, burst_limit: int) -> None:
        """Set octets of payload per segment, on the wire and where they are cut below us."""
        self.burst_limit = burst_limit
        self.mss = self.congestion.mss = self.flight.mss = mss
        self.burst = max(mss, burst_limit - burst_limit % mss)

    def shrink(self, mss: int) -> None:
        """The path takes no more than this (RFC 1191, RFC 8201): send what was larger again."""
        self.set_mss(mss, self.burst_limit)
        self.flight.lose_larger_than(mss)

    def open(self, emit: "Emit", now: float) -> None:
        """Send our SYN."""
        self.nxt = self.iss + 1
        self.stalled_at = now
        self.recovery.sent(self.iss, self.nxt, now)
        emit(self.iss, self.syn_flags, b"")
        self.retransmit_at = now + self.round_trip.rto

    @property
    def acceptable(self) -> int:
        """The position for a segment without data: `nxt`, but none that the peer's window excludes.

        A probe of a zero window takes `nxt` beyond the window: an ACK from there would be thrown
        away, and with it our acknowledgment of what the peer sends.  So it would from before what
        the peer has taken, where its scale has rounded the window down (RFC 7323 section 2.4).
        """
        edge = self.una + self.window
        if self.nxt - edge < 1 << self.scale and self._beyond <= self.una:
            return self.nxt
        return min(self.nxt, max(edge, self.iss + 1))

    def send(self, now: float, emit: "Emit") -> None:
        """Emit all that may be sent now."""
        if self._probe:
            self._send_probe(now, emit)
        if self.flight.lost:
            self._send_again(now, emit)
        if self.nxt < self.end and self.una != self.iss:
            self._send_new(now, emit)

    def _send_new(self, now: float, emit: "Emit") -> None:
        """Send what windows, Nagle and silly-window avoidance let pass."""
        flight = self.flight
        was_idle = not flight.records
        if was_idle:
            self._begin_burst(now)
        # Nothing in this loop is acknowledged meanwhile, so the room only shrinks.
        room = min(
            self.una + self.window - self.nxt,
            self.congestion.window - flight.pipe,
            MAX_RECORDS * self.mss - flight.octets,  # a record may become one per segment (SACK)
        )
        last = self.queue.end
        nxt, most = self.nxt, self._most
        while nxt < last:
            size = min(last - nxt, room, most)
            if size != most:
                size = self._sensible(size, last - nxt)
            if size <= 0 or len(flight.records) >= MAX_RECORDS:
                break
            self._send_piece(nxt, size, now, emit)
            room -= size
            nxt += size
        if nxt == last == self.fin:
            self._send_fin(now, emit, room)
        if was_idle and flight.records:
            self._arm(now)
        elif was_idle and self.retransmit_at == NEVER:
            self.retransmit_at = now + self.round_trip.rto  # probe the window then

    @property
    def _most(self) -> int:
        """Octets per segment to be cut below us: the wire's where each points to urgent data.

        Who cuts a segment copies its urgent pointer, which counts from where the segment begins.
        And no more than half of what the peer ever had room for: a segment that fills such a
        window at once has Linux, which opens it in steps of segments, open it by an octet for ever.
        """
        most = self.burst if self.urgent <= self.una else self.mss
        if self.max_window < 2 * self.mss:
            most = min(most, max(self.max_window // 2, DEFAULT_MSS_V4))
        return most

    def _begin_burst(self, now: float) -> None:
        if now - self._tried_at > self.round_trip.rto:
            self.congestion.rested()
        self.stalled_at = now

    def _sensible(self, size: int, waiting: int) -> int:
        """Return how much of `size` it is sensible to send (RFC 9293 section 3.8.6.2.1)."""
        mss = self.mss
        if size == waiting and (size % mss == 0 or self._may_be_short()):
            return size
        if size >= mss:
            return size - size % mss
        if size * 2 >= self.max_window and size > 0:
            return size  # a peer with a tiny buffer would never see a whole segment
        return 0

    def _may_be_short(self) -> bool:
        # Nagle in Minshall's form: hold a small segment back only while another small one is
        # under way, not behind full ones.  What ends the stream is never held back.
        return not self._nagle or self._small_end <= self.una or self.fin is not None

    def _send_piece(self, start: int, size: int, now: float, emit: "Emit") -> None:
        end = start + size
        flags = ACK
        if end == self.queue.end:
            flags = ACK | PSH  # MUST-61: the last of what was written
            if end == self.fin:
                flags, end = ACK | PSH | FIN, end + 1
        if size % self.mss:
            self._small_end = end
        emit(start, flags, self.queue.between(start, start + size))
        self._sent(start, end, now)

    def _send_fin(self, now: float, emit: "Emit", room: int) -> None:
        if self.nxt == self.fin and (room > 0 or not self.flight.octets):
            emit(self.nxt, ACK | FIN, b"")
            self._sent(self.nxt, self.nxt + 1, now)
            if room <= 0:
                self._beyond = self.nxt

    def _sent(self, start: int, end: int, now: float) -> None:
        self.recovery.sent(start, end, now)
        self.nxt = end
        self._tried_at = now

    def _send_again(self, now: float, emit: "Emit") -> None:
        """Send lost segments again, as far as the congestion window lets us."""
        flight = self.flight
        while flight.lost and (room := self.recovery.room(self.mss)):
            record = flight.next_lost(min(self._most, room - room % self.mss))
            if record is None:
                break
            self._repeat(record, now, emit)

    def _repeat(self, record: "Sent", now: float, emit: "Emit") -> None:
        start, last = record.start, min(record.end, self.queue.end)
        flags = ACK if last < self.queue.end else ACK | PSH
        if self.fin is not None and record.end > self.fin:
            flags |= FIN
        if start == self.iss:
            emit(start, self.syn_flags, b"")
        else:
            emit(start, flags, self.queue.between(start, last) if start < last else b"")
        self.flight.repeat(record, now)
        self.recovery.repeated(now)
        self._tried_at = now
        self._arm(now)

    def _send_probe(self, now: float, emit: "Emit") -> None:
        """Do what the timer found to be due."""
        tail = self._probe == "tail"
        self._probe = ""
        waiting = self.queue.end - self.nxt
        most = min(waiting, self._most, self.mss)
        if not self.flight.records and waiting > 0:
            # One octet at least, whatever the window (MUST-36); all of a small window.
            room = self.una + self.window - self.nxt
            self._send_piece(self.nxt, max(1, min(most, room)), now, emit)
            if room <= 0:
                self._beyond = self.nxt
        elif tail and waiting > 0 and self.una + self.window - self.nxt >= most:
            self._send_piece(self.nxt, most, now, emit)
        elif tail and self.flight.records:
            self._repeat(self.flight.last(self.queue.end), now, emit)
        elif self.flight.records:
            self._emit_first_octet(emit)
            self.recovery.repeated(now)
        self._tail_next = False
        self.retransmit_at = now + self.round_trip.rto

    def _emit_first_octet(self, emit: "Emit") -> None:
        """Probe a window that was closed over what is in flight."""
        start = self.una
        flags = ACK | FIN if start == self.fin else ACK
        emit(start, flags, self.queue.between(start, start + 1) if start < self.queue.end else b"")

    # -- what comes back -------------------------------------------------------

    def update_window(self, seq: int, ack: int, window: int, now: float) -> None:
        """Take the peer's window from a segment, unless it is older than the last one that did."""
        if self._updated_by > (seq, ack):
            return
        self._updated_by = (seq, ack)
        if not window and not self.orphaned:
            self.stalled_at = now  # it lives: probe on, for as long as it answers
        if window > self.window == 0 and self.flight.octets and self.una != self.iss:
            # What was sent into the closed window was thrown away: do not wait for the timer.
            # But once per octet and round trip, or a peer could have all of it, with two ACKs, as
            # often as it likes.
            soonest = self._reopened_when + (self.round_trip.smoothed or 0.0)
            if self._reopened_at != self.una and now >= soonest:
                self._reopened_at, self._reopened_when = self.una, now
                self.flight.lose_all()
            self.round_trip.progressed()
        self.window = window
        if window > self.max_window:
            self.max_window = window

    def acknowledge(self, ack: int, now: float, echo_at: float | None) -> None:
        """The peer has everything before `ack`, which is beyond `una`."""
        octets = ack - self.una
        self.una = ack
        self.stalled_at = now
        self.queue.discard_before(min(ack, self.queue.end))
        self.recovery.acknowledged(ack, octets, now, echo_at)
        if self.flight.sacked:
            self.recovery.look(self.nxt, now)
        self._arm(now)

    def select(self, blocks: list[tuple[int, int]], now: float) -> None:
        """The peer has these too (RFC 2018)."""
        if self.flight.select(blocks, now):
            self.recovery.look(self.nxt, now)

    def duplicate(self, now: float) -> None:
        """An ACK came for `una` once more, with nothing new in it."""
        if self.window:  # else it answers a probe, and tells of no loss
            self.recovery.duplicate(self.nxt, self.mss, now)

    # -- time ------------------------------------------------------------------

    def _arm(self, now: float) -> None:
        """Start the timer anew: something was sent into silence, or acknowledged."""
        flight = self.flight
        if not flight.records:
            self.retransmit_at = NEVER
            return
        wait = self.round_trip.rto
        self._tail_next = False
        if self.recovery.selective and self.recovery.end is None and flight.octets > self.mss:
            soon = 2 * (self.round_trip.smoothed or wait) + TAIL_MARGIN
            if soon < wait:
                self._tail_next = True
                wait = soon
        self.retransmit_at = now + wait

    def on_timer(self, now: float) -> None:
        """Decide what is due; the next send() does it."""
        if self.recovery.look_at <= now:
            self.recovery.look(self.nxt, now)
        if self.retransmit_at > now:
            return
        self.retransmit_at = NEVER
        if not self.flight.records or not self.window_is_open:
            self.round_trip.back_off()
            self._probe = "window"
        elif self._tail_next:
            self._probe = "tail"
        else:
            self.recovery.time_out(self.nxt, self.mss, now)

    @property
    def window_is_open(self) -> bool:
        """Whether the peer lets us send anything, or has not yet said (it knows only our SYN)."""
        return self.window > 0 or self.una == self.iss
