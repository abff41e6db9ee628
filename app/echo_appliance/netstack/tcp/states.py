"""The states of a connection and the events that change them (RFC 9293 section 3.3.2).

The table is the whole truth: connection.py changes its state through change()
only, and the diagram in ARCHITECTURE.md is drawn from the same table.
"""

from enum import Enum


class State(Enum):
    """The eleven states, in the RFC's order and by the RFC's names."""

    __hash__ = object.__hash__  # there is one of each; Enum's own hashes the name, in Python

    LISTEN = "LISTEN"
    SYN_SENT = "SYN-SENT"
    SYN_RECEIVED = "SYN-RECEIVED"
    ESTABLISHED = "ESTABLISHED"
    FIN_WAIT_1 = "FIN-WAIT-1"
    FIN_WAIT_2 = "FIN-WAIT-2"
    CLOSE_WAIT = "CLOSE-WAIT"
    CLOSING = "CLOSING"
    LAST_ACK = "LAST-ACK"
    TIME_WAIT = "TIME-WAIT"
    CLOSED = "CLOSED"


class Event(Enum):
    """What changes a state: a call of the application, a segment, or time."""

    __hash__ = object.__hash__  # there is one of each; Enum's own hashes the name, in Python

    PASSIVE_OPEN = "listen"
    ACTIVE_OPEN = "connect: send SYN"
    SYN = "SYN came: send SYN,ACK"
    SYN_AND_ACK = "SYN,ACK came: send ACK"
    SYN_ACKED = "our SYN was acknowledged"
    CLOSE = "close"
    FIN = "FIN came: send ACK"
    FIN_ACKED = "our FIN was acknowledged"
    TIMEOUT = "2 MSL passed"
    END = "close, reset or time-out"


TRANSITIONS = {
    (State.CLOSED, Event.PASSIVE_OPEN): State.LISTEN,
    (State.CLOSED, Event.ACTIVE_OPEN): State.SYN_SENT,
    (State.LISTEN, Event.SYN): State.SYN_RECEIVED,
    (State.SYN_SENT, Event.SYN): State.SYN_RECEIVED,  # simultaneous open
    (State.SYN_SENT, Event.SYN_AND_ACK): State.ESTABLISHED,
    (State.SYN_SENT, Event.CLOSE): State.CLOSED,
    (State.SYN_RECEIVED, Event.SYN_ACKED): State.ESTABLISHED,
    (State.SYN_RECEIVED, Event.CLOSE): State.FIN_WAIT_1,
    (State.ESTABLISHED, Event.CLOSE): State.FIN_WAIT_1,
    (State.ESTABLISHED, Event.FIN): State.CLOSE_WAIT,
    (State.FIN_WAIT_1, Event.FIN_ACKED): State.FIN_WAIT_2,
    (State.FIN_WAIT_1, Event.FIN): State.CLOSING,  # simultaneous close
    (State.FIN_WAIT_2, Event.FIN): State.TIME_WAIT,
    (State.CLOSING, Event.FIN_ACKED): State.TIME_WAIT,
    (State.CLOSE_WAIT, Event.CLOSE): State.LAST_ACK,
    (State.LAST_ACK, Event.FIN_ACKED): State.CLOSED,
    (State.TIME_WAIT, Event.TIMEOUT): State.CLOSED,
}


def change(state: State, event: Event) -> State:
    """Return the state that follows.  One that the table does not know is a mistake of ours."""
    if event is Event.END:  # a reset, a time-out or an abort ends any state
        return State.CLOSED
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise RuntimeError(f"no way out of {state.value} by: {event.value}") from None


# States in which the peer may still send data to us, and in which we may to it.
RECEIVING = frozenset({State.ESTABLISHED, State.FIN_WAIT_1, State.FIN_WAIT_2})
WRITING = frozenset({State.SYN_SENT, State.SYN_RECEIVED, State.ESTABLISHED, State.CLOSE_WAIT})
