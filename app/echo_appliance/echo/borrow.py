"""Borrows reply sockets from the sidecar of dispatch: the server's half of lending.py.

Never waits: while a flow's socket is on its way its datagrams are kept, up to
HELD_OCTETS for all flows together, and answered when it comes.
"""

import array
import select
import socket

from ..lending import ASK, FLOW_OCTETS, HELLO, MESSAGE_LIMIT, RETURN, pack_flow

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..lending import Flow
    from .connection import Endpoint

HELD_OCTETS = 256 * 1024
RETRY_SECONDS = 1.0  # between two attempts to reach a sidecar
_ANSWERS_PER_TURN = 64
_DESCRIPTOR = array.array("i").itemsize
_DONT_WAIT = socket.MSG_DONTWAIT


class Borrower:
    """Asks for the reply sockets of one UDP socket.  Owns its channel, borrows both sockets."""

    def __init__(
        self,
        endpoint: "Endpoint",
        rendezvous: socket.socket,
        shown: socket.socket,
        lent: "Callable[[Flow, socket.socket, list[bytes]], None]",
    ) -> None:
        """lent(flow, socket, datagrams) takes a socket over, and answers what was kept."""
        self._endpoint = endpoint
        self._rendezvous = rendezvous
        self._shown = shown
        self._lent = lent
        self._channel: socket.socket | None = None
        self._retry_at = 0.0
        self._waiting: dict[bytes, tuple[Flow, list[bytes]]] = {}
        self._held = 0

    def ask(self, flow: "Flow", datagram: bytes) -> None:
        """Have a datagram answered as soon as its flow has a socket."""
        words = pack_flow(*flow)
        full = self._held + len(datagram) > HELD_OCTETS
        if full or not (words in self._waiting or self._say(ASK + words)):
            self._endpoint.counters.drop("reply-socket-late")
            return
        self._held += len(datagram)
        self._waiting.setdefault(words, (flow, []))[1].append(datagram)

    def give_back(self, flow: "Flow") -> None:
        """Tell the lender that a flow's socket is closed here."""
        if self._channel is not None and not self._say(RETURN + pack_flow(*flow)):
            self.close()  # or it would keep its copy, and the flow's datagrams in it

    def close(self) -> None:
        """End the channel; the lender takes back all that it lent on it."""
        if self._channel is None:
            return
        self._endpoint.loop.forget(self._channel.fileno())
        self._channel.close()
        self._channel = None
        for _, kept in self._waiting.values():
            for _ in kept:
                self._endpoint.counters.drop("reply-socket-late")
        self._waiting.clear()
        self._held = 0

    def _say(self, message: bytes) -> bool:
        channel = self._channel or self._greet()
        try:
            if channel is not None:
                channel.send(message, _DONT_WAIT)
                return True
        except OSError:
            pass  # full, or gone: that shows as an event
        return False

    def _greet(self) -> socket.socket | None:
        """Send HELLO; None where no sidecar takes it, or none did a moment ago."""
        loop = self._endpoint.loop
        if loop.now < self._retry_at:
            return None
        self._retry_at = loop.now + RETRY_SECONDS
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                # Not by socket.send_fds(), which takes flags and drops them (Python 3.11).
                shown = array.array("i", [theirs.fileno(), self._shown.fileno()])
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, shown)
                self._rendezvous.sendmsg([HELLO], [rights], _DONT_WAIT)
                loop.watch(ours.fileno(), select.EPOLLIN, self._on_event)
            except OSError:
                ours.close()
                return None
        self._channel = ours
        return ours

    def _on_event(self, _events: int) -> None:
        for _ in range(_ANSWERS_PER_TURN):
            channel = self._channel
            if channel is None:
                return
            try:
                message, ancillary, _, _ = channel.recvmsg(
                    MESSAGE_LIMIT, socket.CMSG_SPACE(_DESCRIPTOR), _DONT_WAIT
                )
            except BlockingIOError:
                return
            except OSError:
                message, ancillary = b"", []
            if not message:
                self.close()
                return
            self._on_answer(message[:FLOW_OCTETS], _socket_in(ancillary))

    def _on_answer(self, words: bytes, lent: socket.socket | None) -> None:
        flow, kept = self._waiting.pop(words, (None, []))
        self._held -= sum(map(len, kept))
        if flow is not None and lent is not None:
            self._lent(flow, lent, kept)
            return
        if lent is not None:
            lent.close()  # nobody asked for it
        for _ in kept:
            self._endpoint.counters.drop("reply-socket-refused")


def _socket_in(ancillary: "list[tuple[int, int, bytes]]") -> socket.socket | None:
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and len(data) >= _DESCRIPTOR:
            return socket.socket(fileno=array.array("i", data[:_DESCRIPTOR])[0])
    return None
