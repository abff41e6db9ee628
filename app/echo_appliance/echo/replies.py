"""Answers to datagrams that were sent to another port than the one we are bound to.

Behind dispatch one socket gets the datagrams of whole ranges of ports.  An
answer must leave from the port that the client knows, and no control message
can say a port.  So each such flow gets a socket of its own, bound to where the
datagram went and connected to where it came from, and kept for a while:

* later datagrams of the flow go to that socket, past dispatch, so it is read;
* others' datagrams do not: the kernel asks dispatch before it looks at sockets
  that are not connected, and a connected one takes its peer's only.  What
  slipped in between bind() and connect() is answered as any other;
* all have SO_REUSEADDR, or the second flow to one address could not bind.

Needs to be in the network namespace of the inherited socket.  Elsewhere (a
container with --network=none) no such socket can reach the client, and the
answer leaves from the inherited socket's port, as if this were not here.
"""

import select
import socket

from ..buffer import VIEW
from ..linux import IP_FREEBIND, IPV6_FREEBIND

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .connection import Endpoint

    Peer = tuple[str, int] | tuple[str, int, int, int]

FLOWS = 1024  # one descriptor each
IDLE_SECONDS = 30.0
_DATAGRAMS_PER_TURN = 64


class Replies:
    """The flows of one inherited socket.  Owns their sockets; close() ends them."""

    def __init__(self, endpoint: "Endpoint") -> None:
        self.endpoint = endpoint
        self._flows: dict[tuple[Peer, Peer], _Flow] = {}
        self._sweeping = False

    def answer(self, local: "Peer", peer: "Peer", size: int) -> bool:
        """Send the first `size` octets of the buffer from local to peer; False if we cannot."""
        flow = self._flows.get((local, peer))
        if flow is None:
            if len(self._flows) >= FLOWS:
                next(iter(self._flows.values())).close()  # the oldest
            try:
                flow = _Flow(self, local, peer)
            except OSError:
                return False
            self._flows[local, peer] = flow
            self._sweep_later()
        return flow.send(size)

    def is_own(self, local: "Peer", peer: "Peer") -> bool:
        """Whether the datagram is an answer of ours: to answer it would never end.

        It comes from a flow's address, to that flow's client, which is not there (any
        more) and has one of the ports that are steered to us: one forged datagram does it.
        """
        return (peer, local) in self._flows

    def forget(self, local: "Peer", peer: "Peer") -> None:
        """A flow is over."""
        del self._flows[local, peer]

    def close(self) -> None:
        """End all flows.  Their next datagrams come by the inherited socket again."""
        for flow in tuple(self._flows.values()):
            flow.close()

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

    __slots__ = ("_local", "_peer", "_replies", "_socket", "used_at")

    def __init__(self, replies: Replies, local: "Peer", peer: "Peer") -> None:
        self._replies = replies
        self._local = local
        self._peer = peer
        self.used_at = replies.endpoint.loop.now
        self._socket = _connected(local, peer)
        replies.endpoint.loop.watch(self._socket.fileno(), select.EPOLLIN, self._on_event)

    def send(self, size: int) -> bool:
        """Answer; False where the network says no."""
        self.used_at = self._replies.endpoint.loop.now
        try:
            self._socket.send(VIEW[:size])
        except OSError:
            return False
        return True

    # Hot: as the socket that the flow began with, but with nothing to find out any more.
    def _on_event(self, _events: int) -> None:
        endpoint = self._replies.endpoint
        counters = endpoint.counters
        receive, peer = self._socket.recvfrom_into, self._peer
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
                answered = self.send(size)
            elif self._replies.is_own(self._local, source):
                answered = False
            else:
                answered = self._replies.answer(self._local, source, size)
            if answered:
                counters.datagrams_sent += 1
                counters.sent += size
            else:
                counters.drop("reply-failed")

    def close(self) -> None:
        """End it; answer what is queued first."""
        self._replies.forget(self._local, self._peer)
        self._on_event(0)
        self._replies.endpoint.loop.forget(self._socket.fileno())
        self._socket.close()


def _connected(local: "Peer", peer: "Peer") -> socket.socket:
    family = socket.AF_INET6 if len(local) == 4 else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        sock.bind(local)
        sock.connect(peer)
    except BaseException:
        sock.close()
        raise
    return sock
