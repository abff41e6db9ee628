"""Answers to datagrams that were sent to another port than the one we are bound to.

Behind dispatch one socket gets the datagrams of whole ranges of ports.  An
answer must leave from the port that the client knows, and no control message
can say a port.  So each such flow gets a socket of its own, bound to where the
datagram went and connected to where it came from, and kept for a while:

* later datagrams of the flow go to that socket, past dispatch, so it is read;
* others' datagrams do not: the kernel asks dispatch before it looks at sockets
  that are not connected, and a connected one takes its peer's only.  What
  slipped in between bind() and connect() is answered as any other.

The socket must be in the network namespace of the inherited one.  Where we are
too, we make it; in a container with --network=none the sidecar of dispatch
lends it (borrow.py), if a socket named `replies` was passed to us.  Without
that, the answer leaves from the inherited socket's port, as if this were not here.
"""

import mmap
import select
import socket

from ..buffer import VIEW
from ..reply_socket import open_reply_socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..lending import Address, Flow
    from .connection import Endpoint

FLOWS = 1024  # one descriptor each
IDLE_SECONDS = 30.0
_DATAGRAMS_PER_TURN = 64

# The flows of this process and of the workers that are forked from it, each by a hash, so that
# any of them knows an answer of ours when it comes back: see Replies.is_own().  A place is
# overwritten when two flows meet there, which only costs the older one that protection.
_PLACES = 65536
_flows_of_all = memoryview(mmap.mmap(-1, 8 * _PLACES)).cast("q")


class Replies:
    """The flows of one inherited socket.  Owns their sockets; close() ends them."""

    def __init__(
        self, endpoint: "Endpoint", inherited: socket.socket, lender: socket.socket | None
    ) -> None:
        """With a lender (the socket named `replies`, borrowed), it makes the sockets."""
        self.endpoint = endpoint
        self._flows: dict[Flow, _Flow] = {}
        self._sweeping = False
        self._borrower = None
        if lender is not None:
            from .borrow import Borrower

            self._borrower = Borrower(endpoint, lender, inherited, self._begin_lent)

    def answer(self, local: "Address", peer: "Address", size: int) -> bool:
        """Send the first `size` octets of the buffer from local to peer; False if we cannot."""
        flow = self._flows.get((local, peer))
        if flow is not None and flow.send(VIEW[:size]):
            return True
        # Flows that are closed below answer what they have queued, which goes by the buffer.
        datagram = bytes(VIEW[:size])
        if self._borrower is not None:
            if flow is not None:
                flow.close()  # it was taken back, as when bindings change
            self._borrower.ask((local, peer), datagram)
            return True
        if flow is not None:
            return False
        try:
            return self._begin((local, peer), open_reply_socket(local, peer)).send(datagram)
        except OSError:
            VIEW[:size] = datagram
            return False

    def _begin_lent(self, flow: "Flow", sock: socket.socket, datagrams: list[bytes]) -> None:
        """Take over a socket that was lent, and answer what waited for it."""
        try:
            begun = self._begin(flow, sock)
        except OSError:
            self.returned(flow)
            return
        for datagram in datagrams:
            begun.send(datagram)

    def _begin(self, flow: "Flow", sock: socket.socket) -> "_Flow":
        """Keep a flow's socket, which is ours from here on."""
        if len(self._flows) >= FLOWS:
            next(iter(self._flows.values())).close()  # the oldest
        begun = _Flow(self, flow, sock)
        self._flows[flow] = begun
        number = hash(flow)
        _flows_of_all[number % _PLACES] = number
        self._sweep_later()
        return begun

    def is_own(self, local: "Address", peer: "Address") -> bool:
        """Whether the datagram is an answer of ours: to answer it would never end.

        It comes from a flow's address, to that flow's client, which is not there (any
        more) and has one of the ports that are steered to us: one forged datagram does it.
        The flow may be another worker's, or begin at another of our sockets.
        """
        number = hash((peer, local))
        return _flows_of_all[number % _PLACES] == number

    def forget(self, flow: "Flow") -> None:
        """A flow is over."""
        del self._flows[flow]
        number = hash(flow)
        if _flows_of_all[number % _PLACES] == number:
            _flows_of_all[number % _PLACES] = 0

    def returned(self, flow: "Flow") -> None:
        """A flow's socket is closed: who lent it must not keep it open either."""
        if self._borrower is not None:
            self._borrower.give_back(flow)

    def close(self) -> None:
        """End all flows.  Their next datagrams come by the inherited socket again."""
        for flow in tuple(self._flows.values()):
            flow.close()
        if self._borrower is not None:
            self._borrower.close()

    def _sweep_later(self) -> None:
        if not self._sweeping and self._flows:
            self._sweeping = True
            self.endpoint.loop.call_later(IDLE_SECONDS / 4, self._sweep)

    def _sweep(self) -> None:
        self._sweeping = False
        oldest = self.endpoint.loop.now - IDLE_SECONDS
        for flow in [flow for flow in self._flows.values() if flow.used_at < oldest]:
            flow.close()
        self._sweep_later()


class _Flow:
    """One client that talks to one of our addresses and ports.  Owns its socket."""

    __slots__ = ("_flow", "_replies", "_socket", "used_at")

    def __init__(self, replies: Replies, flow: "Flow", sock: socket.socket) -> None:
        self._replies = replies
        self._flow = flow
        self.used_at = replies.endpoint.loop.now
        self._socket = sock
        try:
            replies.endpoint.loop.watch(sock.fileno(), select.EPOLLIN, self._on_event)
        except OSError:
            sock.close()
            raise

    def send(self, datagram: "bytes | memoryview") -> bool:
        """Answer, and count it; False where the network says no."""
        endpoint = self._replies.endpoint
        self.used_at = endpoint.loop.now
        try:
            self._socket.send(datagram)
        except OSError:
            return False
        endpoint.counters.datagrams_sent += 1
        endpoint.counters.sent += len(datagram)
        return True

    # Hot: as the socket that the flow began with, but with nothing to find out any more.
    def _on_event(self, _events: int) -> None:
        endpoint = self._replies.endpoint
        counters = endpoint.counters
        receive, (local, peer) = self._socket.recvfrom_into, self._flow
        endpoint.service.touch()
        for _ in range(_DATAGRAMS_PER_TURN):
            try:
                size, source = receive(VIEW)
            except BlockingIOError:
                return
            except OSError:
                counters.drop("receive-error")  # such as: the client is gone
                return
            counters.datagrams_received += 1
            counters.received += size
            if source == peer:
                answered = self.send(VIEW[:size])
            elif self._replies.is_own(local, source):
                answered = False
            else:
                answered = self._replies.answer(local, source, size)
            if not answered:
                counters.drop("reply-failed")

    def close(self) -> None:
        """End it; answer what is queued first."""
        self._replies.forget(self._flow)
        self._on_event(0)
        self._replies.endpoint.loop.forget(self._socket.fileno())
        self._socket.close()
        self._replies.returned(self._flow)
