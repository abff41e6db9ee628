"""A scripted peer: hands segments to one connection, with explicit numbers and times.

Our numbers begin at OURS, the peer's at THEIRS; both SYNs take one number, so
data begin one further.
"""

from echo_appliance.netstack.tcp.connection import Connection
from echo_appliance.netstack.tcp.settings import Settings
from echo_appliance.netstack.tcp.states import State
from echo_appliance.netstack.wire.tcp import ACK, SYN, Segment

OURS, THEIRS = 1000, 5000
LOCAL, REMOTE = b"\x0a\x00\x00\x01", b"\x0a\x00\x00\x02"
START = 100.0
WINDOW = 60000


class Peer:
    """The other end of `connection`, and the clock of both."""

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        ours: int = OURS,
        theirs: int = THEIRS,
        mss: int = 1000,
        segment_limit: int = 0,
        address: bytes = REMOTE,
    ) -> None:
        self.now = START
        self.states: list[str] = []
        self.seq = theirs
        self.stamp: int | None = None  # our next timestamp, if we use them
        self.connection = Connection(
            LOCAL, 80, address, 4000, iss=ours, stamp_offset=0, mss=mss,
            settings=settings or Settings(nagle=False), segment_limit=segment_limit,
        )  # fmt: skip
        self.connection.on_transition = lambda _, __, new: self.states.append(new.value)

    def segment(
        self,
        flags: int = ACK,
        *,
        seq: int | None = None,
        ack: int | None = None,
        payload: bytes = b"",
        window: int = WINDOW,
        stamp: tuple[int, int] | None = None,
        sack: list[tuple[int, int]] | None = None,
        urgent: int = 0,
    ) -> Segment:
        """A segment of the peer: the next in order, acknowledging all, unless told otherwise."""
        if ack is None:
            ack = self.connection.sender.nxt & 0xFFFFFFFF if flags & ACK else 0
        if stamp is None and self.stamp is not None:
            stamp = (self.stamp, 0)
        return Segment(
            4000, 80, self.seq if seq is None else seq, ack, flags, window,
            memoryview(payload), stamp, sack_blocks=sack or [], urgent=urgent,
        )  # fmt: skip

    def sends(self, flags: int = ACK, **fields: object) -> list[Segment]:
        """Hand over a segment(), and return what leaves at once."""
        segment = self.segment(flags, **fields)  # type: ignore[arg-type]
        if "seq" not in fields:
            self.seq = (self.seq + segment.length) & 0xFFFFFFFF
        self.connection.receive(segment, self.now)
        return self.leaves()

    def syn(self, flags: int = SYN, **options: object) -> Segment:
        """The peer's SYN; options as Segment has them."""
        ack = self.connection.sender.nxt & 0xFFFFFFFF if flags & ACK else 0
        stamp = options.pop("timestamp", None)
        if stamp is not None:
            self.stamp = stamp[0]  # type: ignore[index]
        segment = Segment(4000, 80, self.seq, ack, flags, WINDOW, b"", stamp, **options)  # type: ignore[arg-type]
        self.seq = (self.seq + 1) & 0xFFFFFFFF
        return segment

    def leaves(self) -> list[Segment]:
        """What the connection sends now."""
        return self.connection.to_send(self.now)

    def wait(self, seconds: float) -> list[Segment]:
        """Let time pass, deadline by deadline; return all that left meanwhile."""
        end = self.now + seconds
        out: list[Segment] = []
        while (at := self.connection.deadline()) is not None and at <= end:
            self.now = max(self.now, at)
            self.connection.on_deadline(self.now)
            out += self.leaves()
        self.now = end
        return out

    @property
    def state(self) -> State:
        return self.connection.state


def listening(settings: Settings | None = None, **options: object) -> Peer:
    """A connection in SYN-RECEIVED whose SYN,ACK has left."""
    syn_options = {
        name: options.pop(name)
        for name in ("mss", "window_scale", "sack_permitted", "timestamp")
        if name in options
    }
    peer = Peer(settings, **options)  # type: ignore[arg-type]
    peer.connection.accept(peer.syn(SYN, **{"mss": 1000, **syn_options}), peer.now)
    peer.leaves()
    return peer


def connecting(settings: Settings | None = None, **options: object) -> Peer:
    """A connection in SYN-SENT whose SYN has left."""
    peer = Peer(settings, **options)  # type: ignore[arg-type]
    peer.connection.connect(peer.now)
    peer.leaves()
    return peer


def established(settings: Settings | None = None, **options: object) -> Peer:
    """An established connection, with no option but those given: numbers are easier to read."""
    peer = listening(settings, **options)
    peer.sends()
    assert peer.state is State.ESTABLISHED
    peer.states.clear()
    return peer


def numbers(segments: list[Segment]) -> list[tuple[int, int]]:
    """(sequence number, octets of payload) of each."""
    return [(segment.seq, len(segment.payload)) for segment in segments]


FIRST = OURS + 1  # our first octet of data
MSS = 1000


def wrote(octets: int, settings: Settings | None = None, **options: object) -> Peer:
    """Established, with so much written; what is sent of it has not been asked for."""
    peer = established(settings, **options)
    assert peer.connection.write(bytes(octets)) == octets
    return peer


def in_flight(segments: int, **options: object) -> Peer:
    """Established, with so many full segments sent and a round trip of 0.1 s known."""
    peer = wrote(MSS, None, **options)
    peer.leaves()
    peer.now += 0.1
    peer.sends()
    peer.connection.write(bytes(segments * MSS))
    assert len(peer.leaves()) == segments
    return peer
