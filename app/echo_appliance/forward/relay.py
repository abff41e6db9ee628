"""Relays octets between two connected stream sockets, of any families.

Backpressure is not reading: what one side sent and the other has not taken yet
waits here, and until it is gone nothing more is read from the first.  So each
direction costs at most READ_SIZE octets of ours, and nothing while it keeps up.

A direction ends by itself: when a side is at EOF and all it sent was passed
on, the other side is shut down for writing, and goes on sending.  A reset of
one side becomes a reset of the other.

What epoll(7) makes of this.  EPOLLERR and EPOLLHUP are reported whether asked
for or not, again and again.  An error ends the relay.  EPOLLHUP alone comes
from a side that neither sends nor takes any more, while what it sent still
waits for the other: such a side is taken out of epoll until it is to be read
again, or the loop would spin.

Why there is no splice(2) here.  It was built and measured: relay on one core,
client and sink on the other, four streams over the loopback, kernel 6.18, in
MB/s.  recv/send by buffer: 64 KiB 1,110-2,030, 256 KiB 1,700-2,640, 384 KiB
2,170-2,730; splice by pipe: 64 KiB 1,600-1,670, 256 KiB 1,990-2,280, 1 MiB
1,770-2,210.  All on one core, which shows the cost on all sides together:
384 KiB 1,610-1,800, splice at best 1,650.  A large buffer that stays in the
processor's cache makes up for the copy; splice spares this process two thirds
of its time, but leaves the receiver octets that are cold.
"""

import errno
import select
import socket

from ..buffer import VIEW
from ..endings import reason_of
from ..loop import LITTLE
from ..plain import PlainSocket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from ..loop import Loop

    class Owner(Protocol):
        """Who is told that a relay is over; the sockets are the owner's to close."""

        def relay_ended(self, reason: str, reset: bool) -> None: ...


# One large read does what several small ones would (see above).  Still larger ones leave the
# cache, and this is what each stalled direction of a connection may cost.
READ_SIZE = 384 * 1024

_view = VIEW[:READ_SIZE]

# Of a side that is gone: more than the kernel keeps for it.
_LAST_READS = 16

_UNWATCHED = -1


class Side:
    """One of the two sockets, and what was read from it.  Borrows the socket."""

    __slots__ = ("_eof", "_loop", "_owner", "_pass_on", "_peer", "_recv_into", "_socket",
                 "_unsent", "_watched", "octets")  # fmt: skip

    _peer: "Side"

    def __init__(self, loop: "Loop", owner: "Owner", sock: socket.socket) -> None:
        self._loop = loop
        self._owner = owner
        self._socket = sock
        self._recv_into = sock.recv_into
        self._unsent: memoryview | None = None  # there only while the peer is slow to take it
        self._eof = False
        self._watched = _UNWATCHED
        self.octets = 0  # read from here

    def join(self, peer: "Side") -> None:
        """Pass on to this side what is read here."""
        self._peer = peer
        self._pass_on = peer._socket.send

    # The hot path: one read, one write, no call of our own in between.
    def on_event(self, events: int) -> None:
        """Read here, send there; anything but plain input is rare."""
        if events != select.EPOLLIN or self._unsent is not None:
            self._on_rare(events)
            return
        try:
            received = self._recv_into(_view)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)
            return
        if not received:
            self._on_eof()
            return
        self.octets += received
        try:
            sent = self._pass_on(_view[:received])
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._undeliverable(error)
            return
        if sent < received:
            self._stall(bytes(_view[sent:received]))
        elif self._loop.brisk and received <= LITTLE:
            self._loop.linger()

    def give(self, octets: bytes) -> None:
        """Send to the peer what was read from here before the relay began."""
        try:
            sent = self._pass_on(octets)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._undeliverable(error)
            return
        if sent < len(octets):
            self._unsent = memoryview(octets)[sent:]

    def begin(self) -> None:
        """Wait here from now on, if only for errors."""
        if self._watched != _UNWATCHED:
            return  # we do: the peer had said more than was taken here at once
        wanted = self._wanted()
        self._loop.watch(self._socket.fileno(), wanted, self.on_event)
        self._watched = wanted

    def _wanted(self) -> int:
        wanted = 0 if self._eof or self._unsent is not None else select.EPOLLIN
        return wanted if self._peer._unsent is None else wanted | select.EPOLLOUT

    def watch(self) -> None:
        """Wait for what there is to do here, as far as that has changed."""
        wanted = self._wanted()
        if wanted == self._watched:
            return
        if self._watched != _UNWATCHED:
            self._loop.rewatch(self._socket.fileno(), wanted)
        elif wanted:
            self._loop.watch(self._socket.fileno(), wanted, self.on_event)
        else:
            return
        self._watched = wanted

    def leave(self) -> None:
        """Wait for nothing here any more: the socket is closed next.

        And let go of the others: in a circle, all of a connection would be left to the garbage
        collector, which made each one cost 5 % more.
        """
        del self._peer, self._owner
        if self._watched == _UNWATCHED:
            return
        self._watched = _UNWATCHED
        if type(self._socket) is PlainSocket:  # made here, so that nobody has a copy
            self._loop.drop(self._socket.fileno())
        else:
            self._loop.forget(self._socket.fileno())

    @property
    def unsent(self) -> int:
        """How many octets were read here and are not with the peer yet."""
        return len(self._unsent) if self._unsent is not None else 0

    def _on_rare(self, events: int) -> None:
        reading = self._unsent is None and not self._eof
        if events & select.EPOLLERR and not reading:
            number = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:
                self._fail(OSError(number, ""))
                return
        elif events & select.EPOLLOUT and self._peer._unsent is not None:
            self._peer._flush(self._peer._unsent)
            if self._watched == _UNWATCHED:
                return  # that was the end
        if not reading:
            if events & select.EPOLLHUP:
                self._loop.forget(self._socket.fileno())
                self._watched = _UNWATCHED
        elif events & ~select.EPOLLOUT:
            # Also on an error: what came before a reset is read first, and the error after it.
            self.on_event(select.EPOLLIN)

    def _stall(self, unsent: bytes) -> None:
        self._unsent = memoryview(unsent)
        self.watch()
        self._peer.watch()

    def _flush(self, unsent: memoryview) -> None:
        try:
            sent = self._pass_on(unsent)
        except BlockingIOError:
            return
        except OSError as error:
            self._undeliverable(error)
            return
        if sent < len(unsent):
            self._unsent = unsent[sent:]
            return
        self._unsent = None
        self.watch()
        self._peer.watch()

    def _on_eof(self) -> None:
        """Pass the end on: what came before it is gone, or this side would not have been read."""
        self._eof = True
        if self._loop.brisk:
            self._loop.linger()  # who closes a connection may well open the next
        peer = self._peer
        if peer._eof:
            self._owner.relay_ended("eof", False)
            return
        try:
            peer._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._fail(error)
            return
        self.watch()

    def _undeliverable(self, error: OSError) -> None:
        """End, since the peer takes no more; but what it said before it went is for this side.

        As when a server answers in the middle of a request, and closes: without us, too, the
        answer is there before the error.
        """
        peer = self._peer
        ended = peer._eof
        try:
            for _ in range(_LAST_READS if peer._unsent is None and not ended else 0):
                received = peer._recv_into(_view)
                peer.octets += received
                ended = not received
                if ended or peer._pass_on(_view[:received]) < received:
                    break
        except OSError:
            pass  # that was all
        # EPIPE after an end: our octets came too late, which is no reset.
        self._owner.relay_ended(reason_of(error), not ended or error.errno != errno.EPIPE)

    def _fail(self, error: OSError) -> None:
        self._owner.relay_ended(reason_of(error), True)


class Relay:
    """A client and its backend, joined.  Borrows both sockets; end() before they are closed."""

    __slots__ = ("_over", "backend", "client")

    def __init__(
        self, loop: "Loop", owner: "Owner", client: socket.socket, backend: socket.socket
    ) -> None:
        self._over = False
        self.client = Side(loop, owner, client)
        self.backend = Side(loop, owner, backend)
        self.client.join(self.backend)
        self.backend.join(self.client)

    def start(self, head: bytes = b"") -> None:
        """Relay from now on; the backend gets `head` first.  Raises OSError if it cannot."""
        if head:
            self.client.give(head)
            if self._over:
                return
        # While we connected the client has mostly spoken: that saves it a turn of the loop, and
        # the backend is at work already while the rest is done here.
        self.client.on_event(select.EPOLLIN)
        if not self._over:
            self.client.begin()
            self.backend.begin()

    @property
    def unsent(self) -> int:
        """How many octets are on their way."""
        return self.client.unsent + self.backend.unsent

    def end(self) -> None:
        """Wait for neither side any more."""
        self._over = True
        self.client.leave()
        self.backend.leave()
