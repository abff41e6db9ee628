"""What becomes of a segment that comes: the checks of RFC 9293 section 3.10.7, in its order.

Nothing in a segment is believed before the checks above it have passed: that
order is most of what keeps a stranger, who can guess our ports, from ending a
connection or slipping octets into it.  Each check returns whether to go on.
Sections without the number of an RFC are of RFC 9293.
"""

from ..seq import MASK, is_before, unwrap
from ..wire.tcp import ACK, FIN, PSH, RST, SYN, URG
from .receiver import window_shift
from .settings import (
    CHALLENGE_INTERVAL,
    DEFAULT_MSS_V4,
    DEFAULT_MSS_V6,
    MAX_WINDOW_SHIFT,
    MIN_MSS,
    TIME_WAIT,
    TIMESTAMPS_LENGTH,
)
from .states import RECEIVING, Event, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..wire.tcp import Segment
    from .connection import Connection

_OUR_FIN_UNDER_WAY = frozenset({State.FIN_WAIT_1, State.CLOSING, State.LAST_ACK})


def arrive(connection: "Connection", segment: "Segment", now: float) -> None:
    """Take any segment, with all care.  May trim the segment; borrows its payload."""
    if connection.state is State.CLOSED:
        return
    if connection.state is State.SYN_SENT:
        _arrive_in_syn_sent(connection, segment, now)
        return
    seq = unwrap(segment.seq, connection.receiver.nxt)
    if (
        connection.state is State.SYN_RECEIVED
        and not connection.passive
        and segment.flags & (SYN | ACK) == SYN | ACK
        and seq == connection.receiver.nxt - 1
    ):
        # The other half of a simultaneous open: their SYN again, now with an ACK to ours.
        segment.flags &= ~SYN
        seq += 1
        segment.window >>= connection.sender.scale  # which is never scaled in a SYN
    if (
        _check_sequence(connection, segment, seq, now)
        and _check_reset(connection, segment, seq, now)
        and _check_syn(connection, segment, now)
        and _check_ack(connection, segment, seq, now)
    ):
        _check_urgent(connection, segment, seq)
        if connection.state in RECEIVING and segment.payload:
            if connection.sender.orphaned:
                connection.abort()  # SHLD-3: its data get lost, and it is to know
                return
            connection.receiver.take_any(seq, segment.payload, now)
        _check_fin(connection, segment, seq, now)


def _arrive_in_syn_sent(connection: "Connection", segment: "Segment", now: float) -> None:
    """Section 3.10.7.3: only a SYN, or a refusal of ours, means anything yet."""
    sender, flags = connection.sender, segment.flags
    acknowledges = bool(flags & ACK)
    if acknowledges and unwrap(segment.ack, sender.nxt) != sender.nxt:
        if not flags & RST:
            connection.reset(segment.ack)  # of an older connection with the same ports
        return
    if flags & RST:
        if acknowledges:
            connection.end("refused")
        return
    if not flags & SYN:
        return
    connection.heard_at = now
    take_syn(connection, segment, now)
    if acknowledges:
        connection.change(Event.SYN_AND_ACK)
        sender.recovery.opened()
        sender.acknowledge(sender.nxt, now, None)
        connection.receiver.ack_now = True
    else:
        connection.change(Event.SYN)
        sender.syn_flags = SYN | ACK
        sender.flight.lose_all()  # say our SYN again, with an ACK to theirs


def take_syn(connection: "Connection", segment: "Segment", now: float) -> None:
    """Agree on options: what the peer's SYN does not offer is not used (RFC 7323, RFC 2018)."""
    receiver, sender = connection.receiver, connection.sender
    default = DEFAULT_MSS_V4 if len(connection.remote) == 4 else DEFAULT_MSS_V6  # MUST-15
    mss = max(MIN_MSS, min(segment.mss or default, connection.mss))
    receiver.start(segment.seq)
    connection.stamps = segment.timestamp is not None
    if segment.timestamp is not None:
        mss -= TIMESTAMPS_LENGTH  # MUST-16: what is left for data
        receiver.mss -= TIMESTAMPS_LENGTH
        receiver.stamp, receiver.stamp_at = segment.timestamp[0], now
    sender.set_mss(mss, sender.burst_limit)
    sender.recovery.selective = segment.sack_permitted
    if segment.window_scale is not None:
        connection.scaled = True
        sender.scale = min(segment.window_scale, MAX_WINDOW_SHIFT)
        receiver.scale = window_shift(connection.settings.receive_limit)
    sender.update_window(segment.seq, 0, segment.window, now)  # never scaled in a SYN
    if segment.payload:
        receiver.take_any(receiver.nxt, segment.payload, now)


def _check_sequence(connection: "Connection", segment: "Segment", seq: int, now: float) -> bool:
    """First: is it of this connection, and of now?"""
    receiver, stamp = connection.receiver, segment.timestamp
    resets = segment.flags & RST
    if connection.stamps and not resets:
        if stamp is None:  # RFC 7323 section 3.2: once agreed, they are in every segment
            if segment.flags & SYN:
                _challenge(connection, now)  # but its sender may know nothing of this connection
            return False
        if receiver.is_old(stamp[0], now):
            _challenge(connection, now, always=bool(segment.payload))
            return False
    # A reset counts by its number alone (RFC 5961 section 3.2), whatever the window (MUST-66).
    if not receiver.accepts(seq, 0 if resets else segment.length):
        if resets:
            return False
        if stamp is not None and connection.stamps and seq + segment.length == receiver.nxt:
            receiver.note_stamp(stamp[0], seq, now)  # the last one again: our ACK was lost
        if connection.state is State.TIME_WAIT and segment.flags & FIN:
            connection.time_wait_at = now + TIME_WAIT  # our last ACK was lost
        _challenge(connection, now, always=segment.length > 0 and not segment.flags & SYN)
        if seq != receiver.nxt or segment.flags & SYN:
            return False
        segment.payload = b""  # sent into our closed window; its ACK and URG count (MUST-66)
        segment.flags &= ~(FIN | PSH)
    if stamp is not None and connection.stamps and not resets:
        receiver.note_stamp(stamp[0], seq, now)
    return True


def _check_reset(connection: "Connection", segment: "Segment", seq: int, now: float) -> bool:
    """Second: RST.  Only one at exactly the next number is believed (RFC 5961 section 3)."""
    if not segment.flags & RST:
        return True
    if seq != connection.receiver.nxt:
        _challenge(connection, now)
    elif connection.state in (State.CLOSING, State.LAST_ACK, State.TIME_WAIT):
        connection.end(None)  # both sides had closed: nothing is lost
    elif connection.state is State.SYN_RECEIVED and not connection.passive:
        connection.end("refused")
    else:
        connection.end("reset")
    return False


def _check_syn(connection: "Connection", segment: "Segment", now: float) -> bool:
    """Fourth (the third, security, is history): SYN.  Anyone can send one: RFC 5961 section 4."""
    if not segment.flags & SYN:
        return True
    if connection.state is State.SYN_RECEIVED and connection.passive:
        connection.end("reset")  # back to LISTEN, which is the listener's
    else:
        _challenge(connection, now)
    return False


def _check_ack(connection: "Connection", segment: "Segment", seq: int, now: float) -> bool:
    """Fifth: ACK, in every segment but the first."""
    if not segment.flags & ACK:
        return False
    sender = connection.sender
    ack = unwrap(segment.ack, sender.una)
    if connection.state is State.SYN_RECEIVED:
        if not sender.una < ack <= sender.nxt:
            connection.reset(segment.ack)
            return False
        connection.change(Event.SYN_ACKED)
        sender.recovery.opened()
    if not sender.una - sender.max_window <= ack <= sender.nxt:
        _challenge(connection, now)  # blindly guessed (RFC 5961 section 5)
        return False
    connection.heard_at = now
    connection.probes = 0
    _take_ack(connection, segment, seq, ack, now)
    return _after_ack(connection, now)


def _take_ack(connection: "Connection", segment: "Segment", seq: int, ack: int, now: float) -> None:
    sender = connection.sender
    window = segment.window << sender.scale
    if ack > sender.una:
        sender.acknowledge(ack, now, connection.echo_time(segment.timestamp, now))
    elif ack == sender.una and not segment.length and window == sender.window:
        sender.duplicate(now)
    if ack >= sender.una:
        sender.update_window(seq, ack, window, now)
    if segment.sack_blocks and sender.recovery.selective:
        una = sender.una
        sender.select([(unwrap(a, una), unwrap(b, una)) for a, b in segment.sack_blocks], now)


def _after_ack(connection: "Connection", now: float) -> bool:
    """Go where an acknowledged FIN leads."""
    if connection.sender.all_acknowledged and connection.state in _OUR_FIN_UNDER_WAY:
        after = connection.change(Event.FIN_ACKED)
        if after is State.TIME_WAIT:
            connection.time_wait_at = now + TIME_WAIT
        connection.limit_orphan(now)
        return after is not State.CLOSED
    return True


def _check_urgent(connection: "Connection", segment: "Segment", seq: int) -> None:
    """Sixth: urgent data; its end only moves on (MUST-30 to MUST-33, RFC 6093)."""
    if segment.flags & URG and connection.state in RECEIVING:
        receiver = connection.receiver
        receiver.urgent = max(receiver.urgent, seq + segment.urgent)


def _check_fin(connection: "Connection", segment: "Segment", seq: int, now: float) -> None:
    """Eighth: FIN, which counts once all octets before it have come."""
    receiver = connection.receiver
    if segment.flags & FIN and receiver.fin is None:
        receiver.fin = seq + len(segment.payload)
    if connection.state in RECEIVING and receiver.reach_fin():
        after = connection.change(Event.FIN)
        if after is State.TIME_WAIT:
            connection.time_wait_at = now + TIME_WAIT


def may_follow(connection: "Connection", segment: "Segment") -> bool:
    """Whether a segment begins a connection after one in TIME-WAIT: a SYN later than all of it.

    That is known by its timestamp or, where that says nothing, by its number (RFC 6191).
    """
    if segment.flags & (SYN | ACK | RST) != SYN:
        return False
    receiver, stamp = connection.receiver, segment.timestamp
    if stamp is not None and connection.stamps and stamp[0] != receiver.stamp:
        return is_before(receiver.stamp, stamp[0])
    return is_before(receiver.nxt & MASK, segment.seq)


def _challenge(connection: "Connection", now: float, *, always: bool = False) -> None:
    """Answer with where we are (RFC 5961).  `always` for data: its sender lost our ACK.

    The limit is per connection: one for all would let a stranger count our answers to
    others (CVE-2016-5696), and none would let two confused peers answer each other for ever.
    """
    if always or now - connection.challenged_at >= CHALLENGE_INTERVAL:
        connection.challenged_at = now
        connection.receiver.ack_now = True
