"""Lends reply sockets to servers in networks of their own: the sidecar's half of lending.py.

Who gets a flow.  The client shows a UDP socket, and is lent the socket of a
flow only if the kernel would give that flow's next datagram to the very socket
that was shown: the program itself is asked (BPF_PROG_TEST_RUN), so binding,
precedence, label, the slot that the flow's hash picks and the ports that are
left to local clients all count as they do for packets.  Neither a label nor a
process is believed, only what is held.  And the flow's other end must not be
steered anywhere itself, or two servers would answer each other for ever.

What is lent stays ours, too: by our copy we can take a socket back, by binding
it to an interface that does not exist, so that its packets go by dispatch
again.  That happens when its flow would be given to another socket now, or it
was connected to somebody else (looked at every CHECK_SECONDS), when a client
has FLOWS and asks for more, and at its end.  A server only has to ask again.
What a hostile holder can do about it is to bind the socket to an interface
first: then it keeps flows that come by that interface, to that address and
port, which were its own when it asked.

Clients may be hostile: whoever may write to our socket can pass us anything.
We wait for none of them, what they send is bounded per turn and per second,
and what is not understood ends their channel.  The kernel may wait for them,
when it closes what they passed: a TCP socket that lingers, a file of FUSE, or
such in the queue of a unix socket.  That costs those who share the sidecar up
to its watchdog's time; hence a unit of its own for each user who may ask.
"""

import array
import errno
import os
import select
import socket

from ..errors import ParseError, SetupError, say
from ..inherit import Inherited
from ..lending import (
    ASK,
    HELLO,
    MESSAGE_LIMIT,
    RETURN,
    SOCKET_NAME,
    pack_flow,
    parse_flow,
)
from ..reply_socket import open_reply_socket
from .explain import Steering
from .register import socket_identity

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..lending import Flow
    from ..loop import Loop

CLIENTS = 64
FLOWS = 1024  # that one client has at a time
PER_SECOND = 1000.0  # asked for by one client, FLOWS at once
CHECK_SECONDS = 2.0

_MESSAGES_PER_TURN = 64
_SO_BINDTOIFINDEX = 62
_NOWHERE = 0x7FFFFFFF  # the index of an interface that never is
_DESCRIPTORS = 2
_INT = array.array("i").itemsize
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC  # the sender may make our end block


def check_lender(sockets: list[Inherited]) -> None:
    """Raise SetupError unless these can be asked for reply sockets."""
    for one in sockets:
        if one.family != socket.AF_UNIX or not one.is_dgram or one.connected:
            raise SetupError(
                f"{one} cannot lend reply sockets: pass a unix datagram socket by that name "
                "(ListenDatagram=/run/..., FileDescriptorName=replies)"
            )


class Lender:
    """One inherited socket named `replies`, and those who ask by it: a Source."""

    def __init__(
        self, loop: "Loop", inherited: Inherited, steering: Steering, capacity: int
    ) -> None:
        """Capacity: how many sockets all clients together may have."""
        self.loop = loop
        self.steering = steering
        self.capacity = capacity
        self.refused: dict[str, int] = {}
        self._socket = inherited.socket
        self._clients: set[_Client] = set()
        self._silent_until = 0.0

    @property
    def lent(self) -> int:
        """How many sockets are lent at this moment."""
        return sum(len(client.flows) for client in self._clients)

    def start(self) -> None:
        """Lend from now on."""
        self.loop.watch(self._socket.fileno(), select.EPOLLIN, self._on_hello)
        self.loop.call_later(CHECK_SECONDS, self._check)

    def look_again(self) -> None:
        """Nothing to do: there is one sidecar."""

    def close(self) -> None:
        """Take everything back."""
        self.loop.discard(self._socket.fileno())
        self._socket.close()
        for client in tuple(self._clients):
            client.close()
        self.steering.close()

    def forget(self, client: "_Client") -> None:
        """A client is gone."""
        self._clients.discard(client)

    def refuse(self, reason: str) -> None:
        """Count a flow whose socket was not lent."""
        self.refused[reason] = self.refused.get(reason, 0) + 1

    def complain(self, words: str) -> None:
        """Say what a client did wrong; not so often that it could fill the log."""
        if self.loop.now >= self._silent_until:
            self._silent_until = self.loop.now + CHECK_SECONDS
            say(f"dispatch: {SOCKET_NAME}: {words}")

    def _on_hello(self, _events: int) -> None:
        for _ in range(_MESSAGES_PER_TURN):
            try:
                words, ancillary, _, _ = self._socket.recvmsg(
                    MESSAGE_LIMIT, socket.CMSG_SPACE(_DESCRIPTORS * _INT), _FLAGS
                )
            except BlockingIOError:
                return
            passed = _sockets_in(ancillary)
            try:
                self._welcome(words, passed)
            except (ParseError, OSError) as error:
                self.complain(f"a client was refused: {error}")
            for sock in passed:
                sock.close()

    def _welcome(self, words: bytes, passed: list[socket.socket]) -> None:
        """Take a client in; takes its channel out of `passed`.  Raises ParseError or OSError."""
        if words != HELLO or len(passed) != _DESCRIPTORS:
            raise ParseError(f"it said {words[:20]!r} with {len(passed)} sockets")
        channel, shown = passed
        if (channel.family, channel.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            raise ParseError("its channel is not a unix SEQPACKET socket")
        if len(self._clients) >= CLIENTS:
            raise ParseError(f"{CLIENTS} clients are here already")
        identity = socket_identity(shown)
        self._clients.add(_Client(self, passed.pop(0), identity))

    def _check(self) -> None:
        for client in tuple(self._clients):
            client.check()
        if self._socket.fileno() >= 0:
            self.loop.call_later(CHECK_SECONDS, self._check)


def _sockets_in(ancillary: "list[tuple[int, int, bytes]]") -> list[socket.socket]:
    """Return the sockets that came; closes what is none."""
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % _INT])
    sockets = []
    for descriptor in found:
        try:
            sockets.append(socket.socket(fileno=descriptor))
        except OSError:
            os.close(descriptor)
    return sockets


def _flow_of(sock: socket.socket) -> object:
    """Return what a socket is bound and connected to by now; None where it is connected no more."""
    try:
        return sock.getsockname(), sock.getpeername()
    except OSError:
        return None


class _Client:
    """One channel, and what is lent on it.  Owns its end, and our copies of the sockets."""

    def __init__(self, lender: Lender, channel: socket.socket, shown: int) -> None:
        self.flows: dict[Flow, socket.socket] = {}
        self._lender = lender
        self._channel = channel
        self._shown = shown
        self._allowance = float(FLOWS)
        self._allowed_at = lender.loop.now
        try:
            lender.loop.watch(channel.fileno(), select.EPOLLIN, self._on_event)
        except OSError:
            channel.close()
            raise

    def check(self) -> None:
        """Take back what would be steered elsewhere by now, or is not what was asked for."""
        for flow, sock in tuple(self.flows.items()):
            if self._refusal(flow) or _flow_of(sock) != flow:
                self._take_back(flow)

    def close(self) -> None:
        """Take back everything."""
        for flow in tuple(self.flows):
            self._take_back(flow)
        self._lender.loop.forget(self._channel.fileno())
        self._channel.close()
        self._lender.forget(self)

    def _take_back(self, flow: "Flow") -> None:
        sock = self.flows.pop(flow)
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, _NOWHERE)
        except OSError:
            pass  # its holder bound it to an interface: see above
        sock.close()

    def _on_event(self, _events: int) -> None:
        for _ in range(_MESSAGES_PER_TURN):
            try:
                message = self._channel.recv(MESSAGE_LIMIT, _FLAGS)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            if not (message and self._on_message(message[:1], message[1:])):
                self.close()
                return

    def _on_message(self, verb: bytes, words: bytes) -> bool:
        """Do what it asks; False when there is no use in hearing more."""
        try:
            flow = parse_flow(words)
            if verb == RETURN:
                if flow in self.flows:
                    self.flows.pop(flow).close()
            elif verb == ASK:
                self._answer(flow)
            else:
                raise ParseError(f"it said {verb!r}")
        except ParseError as error:
            self._lender.complain(f"a client was ended: {error}")
            return False
        except OSError:
            return False  # it is gone, or does not take our answers
        return True

    def _answer(self, flow: "Flow") -> None:
        reason = self._spend() or self._refusal(flow)
        if not reason and self._lender.lent >= self._lender.capacity:
            reason = "full"  # the sidecar needs descriptors for its other work, too
        lent = None
        if not reason:
            try:
                lent = open_reply_socket(*flow)
            except OSError as error:
                reason = errno.errorcode.get(error.errno or 0, "error").lower()
        words = pack_flow(*flow) + reason.encode()
        if lent is None:
            self._lender.refuse(reason)
            self._channel.send(words, _FLAGS)
            return
        self._keep(flow, lent)
        # Not by socket.send_fds(), which takes flags and drops them (Python 3.11).
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [lent.fileno()]))
        self._channel.sendmsg([words], [rights], _FLAGS)

    def _keep(self, flow: "Flow", sock: socket.socket) -> None:
        if flow in self.flows:
            self._take_back(flow)  # it lost the other one
        elif len(self.flows) >= FLOWS:
            self._take_back(next(iter(self.flows)))  # the oldest
        self.flows[flow] = sock

    def _spend(self) -> str:
        """Return why this client must not ask now: it asks too often."""
        now = self._lender.loop.now
        earned = (now - self._allowed_at) * PER_SECOND
        self._allowance = min(float(FLOWS), self._allowance + earned)
        self._allowed_at = now
        if self._allowance < 1:
            return "too-often"
        self._allowance -= 1
        return ""

    def _refusal(self, flow: "Flow") -> str:
        """Return why this client must not have a flow's socket."""
        local, peer = flow
        steering = self._lender.steering
        if steering.taker(local, peer) != self._shown:
            return "not-yours"
        return "would-loop" if steering.taker(peer, local) else ""
