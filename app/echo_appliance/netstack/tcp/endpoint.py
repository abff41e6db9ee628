"""All the TCP of one host without I/O: which segment belongs to which connection.

The driver hands in what arrives (receive), asks once per batch what is to leave
(to_send), and comes back when deadline() says so.  An application is a function
that is called with its connection after something about it changed, once per
batch; what it writes there leaves with the same to_send(), and carries the
acknowledgments of the batch.

Everything that a stranger can make grow has a bound: half-open connections
(listener.py), connections in all, those in TIME-WAIT, and resets per second.
"""

from heapq import heapify, heappop, heappush

from ..seq import MASK, is_before
from ..wire.ip import is_group
from ..wire.tcp import ACK, RST, SYN, Segment
from .arrival import may_follow
from .connection import Connection
from .listener import Listener
from .secrets import Key, Secrets
from .settings import MAX_CONNECTIONS, MAX_RESETS_PER_SECOND, MAX_TIME_WAIT, NEVER, Settings
from .states import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .octets import Octets

    Route = Callable[[bytes, bytes], tuple[int, int]]

FIRST_EPHEMERAL, LAST_EPHEMERAL = 49152, 65535  # RFC 6335 section 6
_STALE_TIMERS = 64  # entries of the heap that may be, beside one for each connection
_PAST_OLD_NUMBERS = 65537  # how far beyond the old connection's numbers a new one begins


class Reply:
    """Whom a segment goes to that belongs to no connection."""

    __slots__ = ("local", "remote", "send_mss")

    def __init__(self, local: bytes, remote: bytes) -> None:
        self.local = local
        self.remote = remote
        self.send_mss = 0


class Endpoint:
    """The connections and listeners of one host."""

    def __init__(self, secret: bytes, route: "Route", settings: Settings | None = None) -> None:
        """`secret` is 32 random octets.

        `route` returns (mss, segment_limit), see Connection, for a local and a remote address.
        """
        self.connections: dict[Key, Connection] = {}
        self.counters: dict[str, int] = {}
        self.on_transition: Callable[[Connection, State, State], None] | None = None
        self.on_suspect: Callable[[bytes], None] | None = None  # this peer's path may be dead
        self._settings = settings or Settings()
        self._secrets = Secrets(secret)
        self._route = route
        self._listeners: dict[tuple[bytes | None, int], Listener] = {}
        self._opening: dict[Connection, Listener] = {}
        self._waiting: dict[Connection, None] = {}  # in TIME-WAIT, oldest first
        self._changed: dict[Connection, None] = {}  # whose application is to be told
        self._touched: dict[Connection, None] = {}  # which may have something to send
        self._replies: list[tuple[Reply, Segment]] = []
        self._timers: list[tuple[float, int, Connection]] = []
        self._timer_number = 0  # no two entries of the heap compare by their connections
        self._port_number = 0
        self._reset_second = 0
        self._resets = 0

    # -- the application -------------------------------------------------------

    def listen(
        self,
        port: int,
        on_open: "Callable[[Connection], None]",
        *,
        address: bytes | None = None,
        settings: Settings | None = None,
    ) -> Listener:
        """Take connections to a port; `on_open` gets each of them, and sets its application."""
        if (address, port) in self._listeners:
            raise ValueError(f"port {port} is listened to already")
        listener = Listener(port, address, on_open, settings or self._settings, self._secrets)
        self._listeners[address, port] = listener
        return listener

    def unlisten(self, listener: Listener) -> None:
        """Take no more connections there; those whose handshake is not done are reset."""
        del self._listeners[listener.address, listener.port]
        for connection in list(listener.half_open.values()):
            connection.abort()
            self.touch(connection)

    def connect(
        self,
        local: bytes,
        remote: bytes,
        remote_port: int,
        now: float,
        *,
        local_port: int | None = None,
        settings: Settings | None = None,
    ) -> Connection:
        """Open a connection.  Raises ValueError for what cannot be one, OSError without a port."""
        if is_group(remote) or not remote_port:
            raise ValueError("a connection needs one peer and a port")  # MUST-46
        if local_port is None:
            local_port = self._free_port(local, remote, remote_port)
        key = (remote, remote_port, local, local_port)
        if key in self.connections:
            raise ValueError("there is a connection between these already")
        connection = self._make(key, settings or self._settings, now)
        connection.connect(now)
        self.touch(connection)
        return connection

    def touch(self, connection: Connection) -> None:
        """Let the next to_send() look at a connection that was used outside of its application."""
        self._touched[connection] = None

    def _free_port(self, local: bytes, remote: bytes, remote_port: int) -> int:
        """Return a port that is hard to guess (RFC 6056, algorithm 3)."""
        count = LAST_EPHEMERAL - FIRST_EPHEMERAL + 1
        offset = self._secrets.port_offset(remote, remote_port, local)
        for _ in range(count):
            self._port_number += 1
            port = FIRST_EPHEMERAL + (offset + self._port_number) % count
            if (remote, remote_port, local, port) not in self.connections:
                return port
        raise OSError("no ephemeral port is free")

    def _make(self, key: Key, settings: Settings, now: float, iss: int | None = None) -> Connection:
        remote, remote_port, local, local_port = key
        mss, segment_limit = self._route(local, remote)
        if iss is None:
            iss = self._secrets.initial_sequence_number(key, now)
        connection = Connection(
            local, local_port, remote, remote_port, iss=iss, mss=mss, settings=settings,
            stamp_offset=self._secrets.stamp_offset(key), segment_limit=segment_limit,
        )  # fmt: skip
        connection.on_transition = self.on_transition
        self.connections[key] = connection
        return connection

    # -- what arrives ----------------------------------------------------------

    def receive(self, remote: bytes, local: bytes, segment: Segment, now: float) -> None:
        """Take a segment whose checksum was verified.  Borrows its payload until it returns."""
        key = (remote, segment.source_port, local, segment.destination_port)
        connection, past = self.connections.get(key), 0
        if connection is not None and connection.state is State.TIME_WAIT:
            past = self._make_way(connection, segment)
        if connection is not None and connection.state is State.CLOSED:
            # By a segment of the same batch: its application is yet to be told, at to_send().
            del self.connections[key]
            connection = None
        if connection is None:
            self._receive_unknown(key, segment, now, past)
            return
        connection.receive(segment, now)
        self._changed[connection] = None
        if connection in self._opening:
            self._look_at_opening(connection)

    def receive_next(
        self, key: Key, seq: int, ack: int, window: int, payload: "Octets", size: int,
        stamp: tuple[int, int] | None, now: float,
    ) -> bool:  # fmt: skip
        """Take a segment if it is a connection's next one, as there; False: receive() it."""
        connection = self.connections.get(key)
        if connection is None or not connection.receive_next(
            seq, ack, window, payload, size, stamp, now
        ):
            return False
        self._changed[connection] = None
        return True

    def _receive_unknown(self, key: Key, segment: Segment, now: float, past: int = 0) -> None:
        """A segment of no connection: a new one's first, or a mistake (section 3.10.7.1-2)."""
        remote, remote_port, local, local_port = key
        if is_group(remote) or is_group(local) or (remote, remote_port) == (local, local_port):
            self.count("not one peer")  # MUST-57, MUST-63; the last is the land attack
            return
        listener = self._listener(local, local_port)
        kind = segment.flags & (SYN | ACK | RST)
        if kind & RST:
            self.count("reset of nothing")
        elif listener is None:
            self._refuse(key, segment, now)
        elif not kind:
            self.count("neither syn nor ack")  # section 3.10.7.2, fourth
        elif kind == SYN:
            self._open(listener, key, segment, now, past)
        elif kind != ACK or not self._open_by_cookie(listener, key, segment, now):
            self._refuse(key, segment, now)

    def _listener(self, local: bytes, port: int) -> Listener | None:
        return self._listeners.get((local, port)) or self._listeners.get((None, port))

    def _open(self, listener: Listener, key: Key, syn: Segment, now: float, past: int) -> None:
        if len(self.connections) >= MAX_CONNECTIONS:
            self.count("too many connections")
            return
        if listener.is_full():
            self.count("syn cookies sent")
            mss = self._route(key[2], key[0])[0]
            answer = listener.answer_with_cookie(key, syn, mss, now)
            self._replies.append((Reply(key[2], key[0]), answer))
            return
        iss = self._secrets.initial_sequence_number(key, now)
        if past and is_before(iss, past & MASK):
            iss = past & MASK
        connection = self._make(key, listener.settings, now, iss)
        connection.accept(syn, now)
        listener.half_open[key] = connection
        self._opening[connection] = listener
        self.touch(connection)

    def _open_by_cookie(self, listener: Listener, key: Key, ack: Segment, now: float) -> bool:
        """Open the connection that a SYN cookie stands for; tell whether it was one."""
        syn = listener.syn_of_cookie(key, ack, now)
        if syn is None or len(self.connections) >= MAX_CONNECTIONS:
            return False
        self.count("syn cookies taken")
        connection = self._make(key, listener.settings, now, (ack.ack - 1) & MASK)
        connection.accept(syn, now)
        connection.to_send(now)  # our SYN,ACK: it was sent as a cookie
        connection.sender.recovery.repeated(now)  # when, we do not know: no round trip is measured
        connection.receive(ack, now)
        self._changed[connection] = None
        self._opening[connection] = listener
        self._look_at_opening(connection)
        return True

    def _look_at_opening(self, connection: Connection) -> None:
        """Hand a connection over once its handshake is done."""
        if connection.state is State.SYN_RECEIVED:
            return
        listener = self._opening.pop(connection)
        listener.half_open.pop(_key(connection), None)
        if connection.state is not State.CLOSED:
            listener.on_open(connection)

    def _make_way(self, old: Connection, segment: Segment) -> int:
        """End one in TIME-WAIT for a SYN (MAY-2); return where its numbers are to begin, or 0."""
        if self._listener(old.local, old.local_port) is None or not may_follow(old, segment):
            return 0
        old.end(None)
        self._changed[old] = None  # of its end, its application is told in any case
        return old.sender.nxt + _PAST_OLD_NUMBERS

    def _refuse(self, key: Key, segment: Segment, now: float) -> None:
        self.count("no such connection")
        if int(now) != self._reset_second:
            self._reset_second, self._resets = int(now), 0
        self._resets += 1
        if self._resets <= MAX_RESETS_PER_SECOND:
            self._replies.append((Reply(key[2], key[0]), reset_of(segment)))

    def count(self, reason: str) -> None:
        """Count something that came to nothing."""
        self.counters[reason] = self.counters.get(reason, 0) + 1

    # -- what ICMP says --------------------------------------------------------

    def recognizes(self, key: Key, seq: int) -> Connection | None:
        """Return the connection that has this sequence number in flight (RFC 5927 section 4).

        Only then may an ICMP error about it be believed.
        """
        connection = self.connections.get(key)
        if connection is None:
            return None
        sender = connection.sender
        in_flight = (seq - sender.una) & MASK < max(1, sender.nxt - sender.una)
        return connection if in_flight else None

    def set_path_mss(self, remote: bytes, mss: int) -> None:
        """The path to a peer takes no more than this per segment, options included."""
        for connection in self.connections.values():
            if connection.remote == remote:
                connection.set_path_mss(mss)
                self.touch(connection)

    def unreachable(self, key: Key, seq: int, reason: str, *, hard: bool) -> None:
        """A segment of ours did not arrive, so ICMP says."""
        connection = self.recognizes(key, seq)
        if connection is not None:
            connection.unreachable(reason, hard=hard)
            self._changed[connection] = None

    # -- what leaves -----------------------------------------------------------

    def to_send(self, now: float) -> "list[tuple[Connection | Reply, list[Segment]]]":
        """Tell applications what changed, and return all that is to leave now."""
        changed, self._changed = self._changed, {}
        for connection in changed:
            if connection.application is not None and connection.state is not State.SYN_SENT:
                connection.application(connection)
        touched, self._touched = self._touched | changed, {}
        out: list[tuple[Connection | Reply, list[Segment]]] = []
        for connection in touched:
            segments = connection.to_send(now)
            if segments:
                out.append((connection, segments))
            self._settle(connection)
        if self._replies:
            out += [(reply, [segment]) for reply, segment in self._replies]
            self._replies.clear()
        return out

    def _settle(self, connection: Connection) -> None:
        """After a connection was looked at: forget it, or know when to look again."""
        if connection.state is State.CLOSED:
            self._forget(connection)
            return
        if connection.state is State.TIME_WAIT and connection not in self._waiting:
            self._waiting[connection] = None
            if len(self._waiting) > MAX_TIME_WAIT:
                self.count("time-wait cut short")
                self._forget(next(iter(self._waiting)))
        at = connection.deadline()
        if at is not None and at < connection.scheduled:
            self._schedule(connection, at)

    def _forget(self, connection: Connection) -> None:
        for queue in (self._waiting, self._changed, self._touched):
            queue.pop(connection, None)
        connection.scheduled = NEVER  # its entries in the heap are stale
        if connection in self._opening:
            self._opening.pop(connection).half_open.pop(_key(connection), None)
        if self.connections.get(_key(connection)) is connection:
            del self.connections[_key(connection)]
        self._sweep_timers()

    # -- time ------------------------------------------------------------------

    def _schedule(self, connection: Connection, at: float) -> None:
        # A deadline that moves back is not looked for in the heap: the entry stays, and when its
        # time comes the connection is asked again.  One that moves on makes the old entry stale.
        connection.scheduled = at
        self._timer_number += 1
        heappush(self._timers, (at, self._timer_number, connection))
        self._sweep_timers()

    def _sweep_timers(self) -> None:
        """Drop stale entries once they are the greater part: each keeps a connection in memory."""
        if len(self._timers) > 2 * len(self.connections) + _STALE_TIMERS:
            valid = {one[2]: one for one in self._timers if one[2].scheduled == one[0]}
            self._timers[:] = valid.values()
            heapify(self._timers)

    def deadline(self) -> float | None:
        """Return when on_deadline() is to be called; None: not for now."""
        timers = self._timers
        while timers and timers[0][2].scheduled != timers[0][0]:
            heappop(timers)
        return timers[0][0] if timers else None

    def on_deadline(self, now: float) -> None:
        """Let time pass up to now; to_send() has what comes of it."""
        timers = self._timers
        while timers and timers[0][0] <= now:
            scheduled, _, connection = heappop(timers)
            if connection.scheduled != scheduled:
                continue
            connection.scheduled = NEVER
            at = connection.deadline()
            if at is None:
                continue
            if at > now:
                self._schedule(connection, at)
                continue
            connection.on_deadline(now)
            self._changed[connection] = None
            if self.on_suspect is not None and connection.is_suspect:
                self.on_suspect(connection.remote)  # MUST-20, SHLD-9


def reset_of(segment: Segment) -> Segment:
    """Return the RST for a segment that belongs to nothing here (section 3.10.7.1)."""
    here, there = segment.destination_port, segment.source_port
    if segment.flags & ACK:
        return Segment(here, there, segment.ack, 0, RST, 0)
    return Segment(here, there, 0, (segment.seq + segment.length) & MASK, RST | ACK, 0)


def _key(connection: Connection) -> Key:
    return (connection.remote, connection.remote_port, connection.local, connection.local_port)
