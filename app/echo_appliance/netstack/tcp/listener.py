"""What waits for connections on a port: SYNs in, connections out.

A SYN costs its sender nothing, so what it may cost us is bounded: MAX_HALF_OPEN
connections whose handshake is not done are remembered per listener.  Beyond
that we answer with SYN cookies (secrets.py) and remember nothing, until the ACK
comes back and proves that its sender is where it says.
"""

from ..seq import MASK
from ..wire.tcp import ACK, RST, SYN, Segment
from .receiver import window_shift
from .secrets import COOKIE_PERIOD, offered_in, stamp_with
from .settings import DEFAULT_MSS_V4, DEFAULT_MSS_V6, MAX_HALF_OPEN, NEVER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .connection import Connection
    from .secrets import Key, Secrets
    from .settings import Settings


class Listener:
    """A listening port.  `on_open` is given each connection once it is established."""

    def __init__(
        self,
        port: int,
        address: bytes | None,
        on_open: "Callable[[Connection], None]",
        settings: "Settings",
        secrets: "Secrets",
    ) -> None:
        self.port = port
        self.address = address  # None: any of ours
        self.on_open = on_open
        self.settings = settings
        self.half_open: dict[Key, Connection] = {}
        self._secrets = secrets
        self._last_cookie = -NEVER  # when one was sent: only then is a stray ACK looked at

    def is_full(self) -> bool:
        """Whether SYNs are to be answered with cookies."""
        return len(self.half_open) >= MAX_HALF_OPEN

    def answer_with_cookie(self, key: "Key", syn: Segment, mss: int, now: float) -> Segment:
        """Return a SYN,ACK that holds all we need to know when its ACK comes."""
        self._last_cookie = now
        secrets = self._secrets
        default = DEFAULT_MSS_V4 if len(key[0]) == 4 else DEFAULT_MSS_V6
        answer = Segment(
            syn.destination_port, syn.source_port,
            secrets.cookie(key, syn.seq, syn.mss or default, now),
            (syn.seq + 1) & MASK, SYN | ACK, min(self.settings.receive_limit, 0xFFFF), mss=mss,
        )  # fmt: skip
        if syn.timestamp is not None:
            # Without timestamps there is no place to remember the other options in.
            stamp = (secrets.stamp_offset(key) + int(now * 1000)) & MASK
            stamp = stamp_with(stamp, syn.window_scale, syn.sack_permitted)
            answer.timestamp = (stamp, syn.timestamp[0])
            answer.sack_permitted = syn.sack_permitted
            if syn.window_scale is not None:
                answer.window_scale = window_shift(self.settings.receive_limit)
        return answer

    def syn_of_cookie(self, key: "Key", segment: Segment, now: float) -> Segment | None:
        """Return the SYN that an ACK to a cookie of ours goes back to; None: there was none."""
        if now - self._last_cookie > 2 * COOKIE_PERIOD or segment.flags & (SYN | RST | ACK) != ACK:
            return None
        irs = (segment.seq - 1) & MASK
        mss = self._secrets.cookie_mss(key, irs, (segment.ack - 1) & MASK, now)
        if mss is None:
            return None
        syn = Segment(
            segment.source_port, segment.destination_port, irs, 0, SYN, segment.window, mss=mss
        )
        if segment.timestamp is not None:
            syn.timestamp = (segment.timestamp[0], 0)
            syn.window_scale, syn.sack_permitted = offered_in(segment.timestamp[1])
        return syn
