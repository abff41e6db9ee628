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
from .congestion import ALGORITHMS
from .flight import Flight
from .octets import Stream
from .rtt import RoundTrip
from .settings import CLOCK_GRANULARITY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .flight import Sent
    from .octets import Octets
    from .settings import Settings

    Emit = Callable[[int, int, Octets], None]  # position, control bits, payload

NEVER = float("inf")
TAIL_MARGIN = 0.002  # seconds: RFC 8985 section 7.2 leaves room for a timer's coarseness


class Sender:
    """Our half of a connection.  The names `una`, `nxt` and `window` are the RFC's SND.UNA etc."""

    __slots__ = (
        "_ambiguous_since", "_limit", "_must_repeat", "_nagle", "_probe", "_small_end",
        "_tail_next", "_timed_at", "_timed_end", "_tried_at", "_updated_by", "burst", "burst_limit",
        "congestion", "duplicates", "fin", "flight", "iss", "max_window", "mss", "nxt", "queue",
        "recovery_end", "reorder_at", "repeated_at", "retransmit_at", "round_trip", "scale",
        "selective", "stalled_at", "syn_flags", "timed_out", "una", "urgent", "window",
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
        self.burst = mss  # the same for the device, which may cut them (TSO)
        self.burst_limit = 0
        self.queue = Stream(iss + 1)
        self.fin: int | None = None  # where our FIN is, once the application has closed
        self.urgent = iss  # urgent data ends here
        self.flight = Flight()
        self.congestion = ALGORITHMS[settings.congestion](mss)
        self.round_trip = RoundTrip()
        self.selective = False  # the peer sends SACK blocks
        self.duplicates = 0  # duplicate ACKs in a row
        self.recovery_end: int | None = None  # recovery lasts until this is acknowledged
        self.timed_out = False  # and it began by a time-out
        self.retransmit_at = NEVER
        self.reorder_at = NEVER  # when to look for losses again
        self.stalled_at = 0.0  # since when nothing of what is in flight was acknowledged
        self._limit = settings.send_limit
        self._nagle = settings.nagle
        self._updated_by: tuple[float, int] = (-NEVER, 0)  # WL1, WL2: seq, ack that set the window
        self._timed_end: int | None = None  # one segment per round trip is timed (RFC 6298)
        self._timed_at = 0.0
        self._ambiguous_since: float | None = None  # something was sent twice, and not timed since
        self._tried_at = 0.0  # when anything was last sent
        self._small_end = iss  # the end of the last segment that was not full
        self._must_repeat = False  # a recovery began: the first lost segment goes out at once
        self.repeated_at: float | None = None  # when it did, until an ACK tells if it had to
        self._tail_next = False  # the timer was set for a tail probe
        self._probe = ""  # what the timer found to be due: "", "window" or "tail"

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
        """Set octets of payload per segment, on the wire and for a device that cuts segments."""
        self.burst_limit = burst_limit
        self.mss = self.congestion.mss = mss
        self.burst = max(mss, burst_limit - burst_limit % mss)

    def shrink(self, mss: int) -> None:
        """The path takes no more than this (RFC 1191, RFC 8201): send what was larger again."""
        self.set_mss(mss, self.burst_limit)
        self.flight.lose_larger_than(mss)

    def open(self, emit: "Emit", now: float) -> None:
        """Send our SYN."""
        self.nxt = self.iss + 1
        self.stalled_at = self._timed_at = now
        self._timed_end = self.nxt
        self.flight.add(self.iss, self.nxt, now)
        emit(self.iss, self.syn_flags, b"")
        self.retransmit_at = now + self.round_trip.rto

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
        room = min(self.una + self.window - self.nxt, self.congestion.window - flight.pipe)
        last = self.queue.end
        nxt = self.nxt
        while nxt < last:
            size = min(last - nxt, room, self.burst)
            if size != self.burst:
                size = self._sensible(size, last - nxt)
            if size <= 0:
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

    def _sent(self, start: int, end: int, now: float) -> None:
        self.flight.add(start, end, now)
        self.nxt = end
        self._tried_at = now
        if self._timed_end is None:
            self._timed_end = end
            self._timed_at = now

    def _send_again(self, now: float, emit: "Emit") -> None:
        """Send lost segments again, as far as the congestion window lets us."""
        flight = self.flight
        while flight.lost:
            room = self.congestion.window - flight.pipe
            if room < self.mss:
                if not self._must_repeat:  # RFC 6675 section 5 (4.3)
                    break
                room = self.mss
            most = min(self.burst, room - room % self.mss)
            record = flight.next_lost(most)
            if record is None:
                break
            if self._must_repeat:
                self._must_repeat = False
                self.repeated_at = now
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
        self._timed_end = None  # Karn
        self._ambiguous_since = now
        self._tried_at = now
        self._arm(now)

    def _send_probe(self, now: float, emit: "Emit") -> None:
        """Do what the timer found to be due."""
        tail = self._probe == "tail"
        self._probe = ""
        waiting = self.queue.end - self.nxt
        if not self.flight.records and waiting > 0:
            # One octet at least, whatever the window (MUST-36); all of a small window.
            size = max(1, min(waiting, self.una + self.window - self.nxt, self.mss))
            self._send_piece(self.nxt, size, now, emit)
        elif tail and waiting > 0 and self.una + self.window - self.nxt >= min(waiting, self.mss):
            self._send_piece(self.nxt, min(waiting, self.mss), now, emit)
        elif tail and self.flight.records:
            self._repeat(self.flight.last(self.mss), now, emit)
        elif self.flight.records:
            self._emit_first_octet(emit)
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
        if not window:
            self.stalled_at = now  # it lives: probe on, for as long as it answers
        if window > self.window == 0 and self.flight.octets and self.una != self.iss:
            # What was sent into the closed window was thrown away: do not wait for the timer.
            self.flight.lose_all()
            self.round_trip.progressed()
        self.window = window
        if window > self.max_window:
            self.max_window = window

    @property
    def wants_echo(self) -> bool:
        """Whether timestamps can tell what the segments themselves cannot: which was answered."""
        return self.repeated_at is not None or self._ambiguous_since is not None

    def acknowledge(self, ack: int, now: float, echo_at: float | None) -> None:
        """The peer has everything before `ack`, which is beyond `una`.

        `echo_at` is when the segment that this acknowledges was sent, if timestamps tell.
        """
        flight = self.flight
        acked = ack - self.una
        in_full_use = flight.octets * 2 >= self.congestion.window
        self.una = ack
        self.duplicates = 0
        self.stalled_at = now
        self.queue.discard_before(min(ack, self.queue.end))
        flight.acknowledge(ack, now)
        if self._timed_end is not None and ack >= self._timed_end:
            self._sample(now - self._timed_at)
        elif self._answers_repeat(echo_at):
            self._sample(now - (echo_at or now))
        if self.round_trip.backoffs:
            self.round_trip.progressed()
        if self.recovery_end is not None:
            self._progress(ack, now, echo_at)
        if in_full_use and (self.recovery_end is None or self.timed_out):
            self.congestion.acknowledged(acked, now, self.round_trip.smoothed or 0.0)
        self.reorder_at = NEVER
        if flight.sacked:
            self._look_for_losses(now)
        self._arm(now)

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

    def _progress(self, ack: int, now: float, echo_at: float | None) -> None:
        """Go on with a recovery, or end it."""
        flight = self.flight
        flight.assumed = 0
        if self.repeated_at is not None and echo_at is not None and echo_at < self.repeated_at:
            # It answers what was sent first, so that was not lost (Eifel: RFC 3522, RFC 4015).
            flight.forgive()
            self.congestion.undo()
            self._end_recovery()
        elif self.recovery_end is not None and ack >= self.recovery_end:
            self._end_recovery()
        else:
            self.repeated_at = None
            if not self.selective:
                flight.lose_first()  # a partial ACK: the next one is missing too (RFC 6582)

    def _end_recovery(self) -> None:
        self.recovery_end = None
        self.repeated_at = None
        self._must_repeat = False
        self.timed_out = False

    def select(self, blocks: list[tuple[int, int]], now: float) -> None:
        """The peer has these too."""
        if blocks:
            self.flight.select(blocks, now)
            self._look_for_losses(now)

    def duplicate(self, now: float) -> None:
        """An ACK came for `una` once more, with nothing new: something overtook (RFC 5681)."""
        flight = self.flight
        if not flight.records:
            return  # it answers nothing of ours (RFC 5681 section 2)
        self.duplicates += 1
        if self.selective:
            return
        flight.assumed = min(self.duplicates * self.mss, max(0, flight.octets - self.mss))
        if self.duplicates == 3 and self.recovery_end is None:
            flight.lose_first()
            self._begin_recovery(now)

    def _look_for_losses(self, now: float) -> None:
        recovering = self.recovery_end is not None
        self.reorder_at = self.flight.find_lost(now, self.round_trip.smoothed or 0.0, recovering)
        if self.flight.lost and not recovering:
            self._begin_recovery(now)

    def _begin_recovery(self, now: float) -> None:
        flight = self.flight
        self.recovery_end = self.nxt
        self._must_repeat = True
        self.congestion.lost(flight.octets, now)

    # -- time ------------------------------------------------------------------

    def _arm(self, now: float) -> None:
        """Start the timer anew: something was sent into silence, or acknowledged."""
        flight = self.flight
        if not flight.records:
            self.retransmit_at = NEVER
            return
        wait = self.round_trip.rto
        self._tail_next = False
        if self.selective and self.recovery_end is None and len(flight.records) > 1:
            soon = 2 * (self.round_trip.smoothed or wait) + TAIL_MARGIN
            if soon < wait:
                self._tail_next = True
                wait = soon
        self.retransmit_at = now + wait

    def on_timer(self, now: float) -> None:
        """Decide what is due; the next send() does it."""
        if self.reorder_at <= now:
            self._look_for_losses(now)
        if self.retransmit_at > now:
            return
        self.retransmit_at = NEVER
        if not self.flight.records or not self.window_is_open:
            self.round_trip.back_off()
            self._probe = "window"
        elif self._tail_next:
            self._probe = "tail"
        else:
            self._time_out(now)

    @property
    def window_is_open(self) -> bool:
        """Whether the peer lets us send anything, or has not yet said (it knows only our SYN)."""
        return self.window > 0 or self.una == self.iss

    def _time_out(self, now: float) -> None:
        """Nothing came back in time: all is lost (RFC 6298 section 5, RFC 5681 section 3.1)."""
        flight = self.flight
        self.round_trip.back_off()
        if not self.timed_out:  # a repeated time-out is the same loss
            self.congestion.timed_out(flight.octets, now)
        else:
            self.congestion.window = self.mss
        flight.lose_all()
        self.recovery_end = self.nxt
        self.timed_out = True
        self._must_repeat = True
        self.duplicates = 0
        self._timed_end = None
        self.reorder_at = NEVER
