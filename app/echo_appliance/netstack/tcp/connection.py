"""One TCP connection without I/O: segments and time go in, segments come out.

    segment -> receive(now)  -> [Receiver] -> readable: read(), peek(), consume()
    write(), close()         -> [Sender]   -> to_send(now) -> segments
    deadline() says when to call on_deadline(now)

TCP is two streams, one each way, that share their segments: receiver.py and
sender.py have one each.  Here is what ties them together: the state, what the
application calls, the making of segments, and time.  What an arriving segment
has to pass before it is believed is in arrival.py; numbers are unwrapped (seq.py).
"""

from ..seq import HALF, MASK
from ..wire.tcp import ACK, FIN, RST, SYN, URG, Segment
from .arrival import arrive, take_syn
from .receiver import Receiver, window_shift
from .sender import Sender
from .settings import (
    KEEPALIVE_INTERVAL,
    KEEPALIVE_PROBES,
    MIN_MSS,
    NEVER,
    ORPHAN_TIMEOUT,
    SUSPECT_AFTER,
    SYN_TIMEOUT,
    TIMESTAMPS_LENGTH,
)
from .states import WRITING, Event, State, change

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .octets import Octets
    from .settings import Settings

_CONTROL = FIN | SYN | RST | URG | ACK
_ESTABLISHED = State.ESTABLISHED
_KEPT_ALIVE = frozenset({State.ESTABLISHED, State.CLOSE_WAIT, State.FIN_WAIT_2})
_SACK_BLOCKS = 3  # as many as fit beside timestamps (RFC 2018 section 3)
_MAX_URGENT = 0xFFFF


class Connection:
    """One connection.  An Endpoint makes it, and calls what is marked (driver).

    `local` and `remote` are addresses, 4 or 16 octets.  `error` says why the
    connection ended, if not by a FIN from both sides: "reset", "refused",
    "timed out" or "aborted".  `application` is called when something has changed.
    """

    __slots__ = (
        "_moment", "_out", "_stamp_offset", "application", "challenged_at", "error", "heard_at",
        "local", "local_port", "mss", "on_transition", "passive", "probes", "receiver",
        "remote", "remote_port", "scaled", "scheduled", "sender", "settings", "soft_error",
        "stamps", "state", "time_wait_at",
    )  # fmt: skip

    def __init__(
        self,
        local: bytes,
        local_port: int,
        remote: bytes,
        remote_port: int,
        *,
        iss: int,
        stamp_offset: int,
        mss: int,
        settings: "Settings",
        segment_limit: int = 0,
    ) -> None:
        """`mss` is what one segment may carry without options: the MTU less IP and TCP headers.

        `segment_limit` is the most octets of a segment that is cut below us; 0: none is.
        """
        self.local, self.local_port = local, local_port
        self.remote, self.remote_port = remote, remote_port
        self.state = State.CLOSED
        self.error: str | None = None
        self.soft_error: str | None = None  # what ICMP said; the connection goes on (MUST-56)
        self.mss = mss
        self.settings = settings
        self.application: Callable[[Connection], None] | None = None
        self.on_transition: Callable[[Connection, State, State], None] | None = None
        self.sender = Sender(iss, mss, settings)
        self.sender.set_mss(mss, segment_limit)
        self.receiver = Receiver(settings, mss)
        self.passive = False
        self.stamps = True  # timestamps are offered; after the handshake: agreed
        self.scaled = False  # both sides know of window scaling
        self.heard_at = 0.0
        self.challenged_at = -NEVER
        self.time_wait_at = NEVER  # the end of TIME-WAIT; of FIN-WAIT-2, if orphaned
        self.probes = 0  # keepalive probes without an answer
        self.scheduled = NEVER  # the endpoint's: when it will look at deadline()
        self._stamp_offset = stamp_offset
        self._out: list[Segment] = []
        self._moment = 0  # the timestamp of segments that leave now

    # -- the application -------------------------------------------------------

    @property
    def readable(self) -> int:
        """Octets that wait to be read."""
        return len(self.receiver.queue)

    @property
    def at_eof(self) -> bool:
        """Whether the peer has closed, and everything was read."""
        return self.receiver.finished and not self.receiver.queue

    @property
    def writable(self) -> int:
        """Octets that write() would take now."""
        return self.sender.room if self.state in WRITING else 0

    @property
    def unacknowledged(self) -> int:
        """Octets written that the peer has not acknowledged."""
        return len(self.sender.queue)

    @property
    def urgent(self) -> int:
        """Octets to read up to the end of the peer's urgent data; 0: there is none (MUST-32)."""
        return max(0, self.receiver.urgent - self.receiver.queue.start)

    @property
    def send_mss(self) -> int:
        """Octets of payload per segment on the wire: what a larger one is cut into."""
        return self.sender.mss

    @property
    def is_suspect(self) -> bool:
        """Whether the peer has let several time-outs pass without a sign (R1 of section 3.8.3)."""
        return self.sender.round_trip.backoffs >= SUSPECT_AFTER

    def write(self, data: "Octets | bytearray", *, urgent: bool = False) -> int:
        """Take data to be sent, as much as fits; return how many octets were taken.

        `bytes` are kept by reference, anything else is copied.
        """
        return self.sender.write(data, urgent) if self.state in WRITING else 0

    def peek(self) -> "list[Octets]":
        """Return all that can be read, in pieces, without a copy and without taking it."""
        return self.receiver.queue.pieces()

    def consume(self, octets: int) -> None:
        """Take octets that peek() showed."""
        if not 0 <= octets <= self.readable:
            raise ValueError(f"consume({octets}) of {self.readable} octets")
        self.receiver.consume(octets)

    def read(self, limit: int) -> bytes:
        """Take up to `limit` octets; empty when there are none."""
        queue = self.receiver.queue
        octets = min(limit, len(queue))
        if octets <= 0:
            return b""
        data = bytes(queue.between(queue.start, queue.start + octets))
        self.receiver.consume(octets)
        return data

    def close(self) -> None:
        """Send FIN after all that was written.  Reading goes on: this closes one direction."""
        if self.state in WRITING:
            self.sender.finish()
            self.change(Event.CLOSE)

    def release(self, now: float) -> None:
        """Close both directions: nobody reads any more (RFC 9293 section 3.6.1, SHLD-3).

        Data that come then, or have not been read, are answered by a reset.  The peer's FIN has
        ORPHAN_TIMEOUT, its closed window the user time-out: else it could keep us for ever.
        """
        if self.readable:
            self.abort()
            return
        self.sender.orphaned = True
        self.close()
        self.limit_orphan(now)

    def limit_orphan(self, now: float) -> None:
        """Wait no longer than that for the peer's FIN, if nobody else does (driver)."""
        if self.sender.orphaned and self.state is State.FIN_WAIT_2:
            self.time_wait_at = now + ORPHAN_TIMEOUT

    def abort(self) -> None:
        """End at once: RST to the peer, and nothing more is sent or read."""
        if self.state not in (State.CLOSED, State.SYN_SENT, State.TIME_WAIT):
            self._emit(self.sender.acceptable, RST | ACK, b"")
        self.end("aborted")

    # -- opening and ending ----------------------------------------------------

    def connect(self, now: float) -> None:
        """Begin an active open (driver)."""
        self.heard_at = now
        self.change(Event.ACTIVE_OPEN)
        self._moment = self._stamp(now)
        self.sender.open(self._emit, now)

    def accept(self, syn: Segment, now: float) -> None:
        """Begin a passive open with the peer's SYN (driver)."""
        self.passive = True
        self.heard_at = now
        self.change(Event.PASSIVE_OPEN)
        take_syn(self, syn, now)
        self.change(Event.SYN)
        self.sender.syn_flags = SYN | ACK
        self._moment = self._stamp(now)
        self.sender.open(self._emit, now)

    def change(self, event: Event) -> State:
        """Change the state, and return the new one: the only place that does."""
        old, self.state = self.state, change(self.state, event)
        if self.on_transition is not None:
            self.on_transition(self, old, self.state)
        return self.state

    def end(self, error: str | None) -> None:
        """Be closed from now on, because of this."""
        if self.state is not State.CLOSED:
            self.error = error
            self.change(Event.END)

    def unreachable(self, reason: str, *, hard: bool) -> None:
        """ICMP says that our segments do not arrive (driver).  It may be forged, or pass.

        It ends only an open that is still waiting, and only if it is final (MUST-56, SHLD-26).
        """
        self.soft_error = reason
        if hard and self.state is State.SYN_SENT:
            self.end(reason)

    def set_path_mss(self, mss: int) -> None:
        """The path takes no more than this per segment, options included (driver)."""
        mss = max(MIN_MSS, mss) - (TIMESTAMPS_LENGTH if self.stamps else 0)
        if mss < self.sender.mss:
            self.sender.shrink(mss)

    # -- segments that come ----------------------------------------------------

    def receive(self, segment: Segment, now: float) -> None:
        """Take a segment of this connection, its checksum right (driver).  Borrows its payload."""
        payload, is_usual = segment.payload, segment.flags & _CONTROL == ACK
        if not is_usual or segment.sack_blocks or not self.receive_next(
            segment.seq, segment.ack, segment.window, payload, len(payload), segment.timestamp, now
        ):  # fmt: skip
            arrive(self, segment, now)

    def receive_next(
        self, seq: int, ack: int, window: int, payload: "Octets", size: int,
        stamp: tuple[int, int] | None, now: float,
    ) -> bool:  # fmt: skip
        """Take a segment with ACK alone if it is the next one, and nothing unusual (driver).

        The payload may be of several in a row, the largest of `size` octets.  Hot: nearly all are
        such.  A few comparisons replace the checks of arrival.py (V. Jacobson's header prediction,
        1990): 2.0 us per segment of bulk, not 3.4.  False: it was not looked at: receive() it.
        """
        receiver, sender = self.receiver, self.sender
        nxt, advance = receiver.nxt, (ack - sender.una) & MASK
        if (
            self.state is not _ESTABLISHED
            or seq != nxt & MASK
            or not (payload or advance)
            or advance > sender.nxt - sender.una
            or len(payload) > receiver.edge - nxt
            or receiver.islands
            or receiver.fin is not None
            or (stamp is not None) is not self.stamps
            or (stamp is not None and (stamp[0] - receiver.stamp) & MASK >= HALF)
        ):
            return False
        self.heard_at, self.probes = now, 0
        if stamp is not None and receiver.acknowledged == nxt:
            receiver.stamp, receiver.stamp_at = stamp[0], now
        if advance:
            sender.acknowledge(sender.una + advance, now, self.echo_time(stamp, now))
        sender.update_window(nxt, sender.una, window << sender.scale, now)
        if payload:
            receiver.take(payload, size, now)
        return True

    def echo_time(self, stamp: tuple[int, int] | None, now: float) -> float | None:
        """Return when we sent the segment that one with this timestamp answers, if that matters."""
        if not self.sender.recovery.wants_echo or stamp is None or not self.stamps:
            return None
        return now - ((self._stamp(now) - stamp[1]) & MASK) / 1000

    # -- segments that go ------------------------------------------------------

    def to_send(self, now: float) -> list[Segment]:
        """Return the segments that are due (driver).  Payloads are views of immutable octets."""
        receiver = self.receiver
        if self.state is not State.CLOSED:
            self._moment = self._stamp(now)
            if receiver.ack_now and receiver.islands:
                self._emit(self.sender.acceptable, ACK, b"")  # alone: there is room for SACK
            self.sender.send(now, self._emit)
            if receiver.ack_now or receiver.ack_at <= now:
                self._emit(self.sender.acceptable, ACK, b"")
        out, self._out = self._out, []
        return out

    def _emit(self, position: int, flags: int, payload: "Octets") -> None:
        """Put a segment into the output.  Each one acknowledges, and tells our window."""
        receiver, sender = self.receiver, self.sender
        window = receiver.advertise()
        segment = Segment(
            self.local_port, self.remote_port, position & MASK, receiver.nxt & MASK, flags,
            window, payload, (self._moment, receiver.stamp) if self.stamps else None,
        )  # fmt: skip
        if flags & SYN:
            self._add_options(segment)
        elif receiver.islands and not payload and sender.recovery.selective:
            blocks = receiver.islands.blocks(_SACK_BLOCKS)
            segment.sack_blocks = [(start & MASK, end & MASK) for start, end in blocks]
        if sender.urgent > position and not flags & (SYN | RST):
            segment.flags |= URG
            segment.urgent = min(sender.urgent - position, _MAX_URGENT)
        self._out.append(segment)

    def _add_options(self, syn: Segment) -> None:
        """Offer what we can, or in a SYN,ACK: agree to what the peer offered."""
        syn.mss = self.mss  # MUST-14; without options subtracted: RFC 6691
        answers = syn.flags & ACK
        syn.sack_permitted = self.sender.recovery.selective if answers else True
        if not answers:
            syn.window_scale = window_shift(self.settings.receive_limit)
        elif self.scaled:
            syn.window_scale = self.receiver.scale
        # The window of a SYN is never scaled (RFC 7323 section 2.2).
        room = self.receiver.edge - self.receiver.nxt if answers else self.settings.receive_limit
        syn.window = min(room, 0xFFFF)

    def reset(self, position: int) -> None:
        """Answer a segment that cannot be ours with RST, at the number that it acknowledges."""
        self._out.append(Segment(self.local_port, self.remote_port, position, 0, RST, 0))

    # -- time ------------------------------------------------------------------

    def _stamp(self, now: float) -> int:
        """Return our timestamp: milliseconds, from a start that tells nobody our uptime."""
        return (self._stamp_offset + int(now * 1000)) & MASK

    def deadline(self) -> float | None:
        """Return when on_deadline() is to be called; None: not for now (driver)."""
        if self.state is State.CLOSED:
            return None
        sender = self.sender
        at = min(
            sender.retransmit_at, sender.recovery.look_at, self.receiver.ack_at, self.time_wait_at
        )
        if self.settings.keepalive:
            at = min(at, self._keepalive_at)
        return at if at < NEVER else None

    @property
    def _keepalive_at(self) -> float:
        if not self.settings.keepalive or self.state not in _KEPT_ALIVE:
            return NEVER
        if self.sender.flight.records:
            return NEVER  # what is under way finds out by itself
        return self.heard_at + self.settings.keepalive_idle + self.probes * KEEPALIVE_INTERVAL

    def on_deadline(self, now: float) -> None:
        """Let time pass up to now; to_send() has what comes of it (driver)."""
        sender = self.sender
        if self.time_wait_at <= now:
            if self.state is State.FIN_WAIT_2:
                self.end("timed out")
            else:
                self.change(Event.TIMEOUT)
            return
        if min(sender.retransmit_at, sender.recovery.look_at) <= now:
            if self._gives_up(now):
                self.end("timed out")
                return
            sender.on_timer(now)
        if self._keepalive_at <= now:
            self._keep_alive(now)

    def _gives_up(self, now: float) -> bool:
        """R2 of section 3.8.3: whether the peer has been silent for too long (MUST-20, MUST-21)."""
        sender = self.sender
        limit = SYN_TIMEOUT if sender.una == sender.iss else self.settings.user_timeout
        return sender.retransmit_at <= now and now - sender.stalled_at >= limit

    def _keep_alive(self, now: float) -> None:
        """Ask whether the peer is still there: an old number, to be answered by an ACK (3.8.4)."""
        if self.probes >= KEEPALIVE_PROBES:
            self.end("timed out")  # MUST-29: not for one probe without an answer
            return
        self.probes += 1
        self._moment = self._stamp(now)
        self._emit(self.sender.nxt - 1, ACK, b"")
