"""Accepts connections on one inherited listening socket, within admission's limits.

Never calls listen(): the socket came listening, and SELinux policy grants a
container no listen() on a socket of init's.  Source: accept(2), "Error handling".
"""

import errno
import select
import socket

from .errors import say
from .inherit import Inherited
from .plain import accept

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from .loop import Loop, Timer
    from .metrics import Counters

    class Admission(Protocol):
        """Who decides: an admission.Admission, or several of them as one."""

        @property
        def full(self) -> bool: ...
        def admit(self, source: str | None) -> bool: ...
        def release(self, source: str | None) -> None: ...
        def wait_for_room(self, resume: Callable[[], None]) -> None: ...
        def pause(self) -> None: ...


# Few enough that a burst is shared among workers and that open connections are served in
# between; a queue that is longer is simply reported again.
ACCEPTS_PER_TURN = 16

# accept() fails with these while the connection stays in the queue, so a level-triggered
# wait would report it again at once, for ever.
_EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
_RETRY_SECONDS = 0.25


class Acceptor:
    """Hands each admitted connection to `serve`.  Owns the listening socket; close() ends it."""

    def __init__(
        self,
        loop: "Loop",
        inherited: Inherited,
        admission: "Admission",
        counters: "Counters",
        serve: "Callable[[socket.socket, str | None], None]",
        lost: "Callable[[], None]",
        refused: "Callable[[socket.socket, str | None, str], None] | None" = None,
    ) -> None:
        """serve(connection, source) takes the connection over, or raises OSError.

        lost() is called when nothing can be accepted here any more; refused(connection,
        source, reason) before one is closed that admission did not let in.
        """
        self._loop = loop
        self._socket = inherited.socket
        self._family = inherited.family
        self._type = inherited.type
        self._where = str(inherited)
        self._admission = admission
        self._counters = counters
        self._serve = serve
        self._lost = lost
        self._refused = refused
        self._watching = False
        self._turn = -1  # of the loop: when it last was readable
        self._accepts = 1
        self._closed = False
        self._retry: Timer | None = None
        self._exhausted = False  # and said so
        if inherited.is_internet:
            _disable_nagle(inherited)

    def start(self) -> None:
        """Accept from now on.  Raises OSError when epoll cannot take the socket."""
        if not self._watching and not self._closed:
            # Exclusive: of several workers that wait for this socket one is woken, not all.
            events = select.EPOLLIN | select.EPOLLEXCLUSIVE
            self._loop.watch(self._socket.fileno(), events, self._on_readable)
            self._watching = True

    def look_again(self) -> None:
        """Accept what another worker left in the backlog when it paused.

        An exclusive wait woke that one for it, and wakes nobody else until
        something new comes.  Only a new registration looks at what is there.
        """
        if self._watching:
            self._pause()
            self._resume()

    def _resume(self) -> None:
        try:
            self.start()
        except OSError as error:
            self._wait_for_resources(error)

    def close(self) -> None:
        """Stop accepting.  What waits in the backlog stays there for whoever holds the socket."""
        self._pause()
        self._closed = True
        if self._retry is not None:
            self._retry.cancel()
        self._socket.close()

    def _pause(self) -> None:
        # Not watched at all, rather than ignored: a level-triggered wait would spin.
        if self._watching:
            self._loop.forget(self._socket.fileno())
            self._watching = False

    def _on_readable(self, events: int) -> None:
        if events & select.EPOLLHUP:
            # It stays readable for ever, with nothing to accept.
            self._pause()
            say(f"{self._where}: shut down by somebody who holds it too; not served any more")
            self._lost()
            return
        for _ in range(self._how_many()):
            if self._closed:
                return
            if self._admission.full:
                self._pause()
                self._admission.wait_for_room(self._resume)
                self._admission.pause()
                return
            if not self._accept_one():
                return

    def _how_many(self) -> int:
        """Return how often to accept now: once, and more the longer the queue stays.

        To be told each time that there is no other one costs 2 us.  If there is, the next turn
        reports it.
        """
        turn = self._loop.turn
        stays = turn == self._turn + 1
        self._turn = turn
        self._accepts = min(2 * self._accepts, ACCEPTS_PER_TURN) if stays else 1
        return self._accepts

    def _accept_one(self) -> bool:
        """Accept and serve a connection; False when there is none, or nothing to take it with."""
        try:
            connection, address = accept(self._socket, self._family, self._type)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _EXHAUSTED:
                self._wait_for_resources(error)
                return False
            # The connection itself failed before we came to it (ECONNABORTED, EPERM by a
            # firewall, and the network errors that accept(2) lists).
            self._counters.refuse("aborted")
            return True
        self._exhausted = False
        source = source_of(self._family, address)
        if not self._admission.admit(source):
            self._counters.refuse("source-limit")
            if self._refused is not None:
                self._refused(connection, source, "source-limit")
            connection.close()
            return True
        try:
            self._serve(connection, source)
        except OSError:
            # epoll could not take it (fs.epoll.max_user_watches, ENOMEM).
            self._counters.refuse("resources")
            connection.close()
            self._admission.release(source)
        return True

    def _wait_for_resources(self, error: OSError) -> None:
        self._pause()
        if not self._exhausted:
            self._counters.refuse("resources")
            say(
                f"{self._where}: accepting pauses: {error.strerror}; "
                "raise LimitNOFILE= or lower --max-connections"
            )
            self._exhausted = True
        self._admission.pause()
        # Others' descriptors matter too (ENFILE), so do not only wait for one of ours to close.
        self._retry = self._loop.call_later(_RETRY_SECONDS, self._resume)


def _disable_nagle(inherited: Inherited) -> None:
    """Answer at once.  Set on the listening socket: connections inherit it, for no call each."""
    try:
        inherited.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        # SELinux may refuse it on a socket of init's: NoDelay= in the unit does the same.
        say(f"{inherited}: TCP_NODELAY refused ({error.strerror}); going on without")


def source_of(family: int, address: object) -> str | None:
    """Return what connections are counted by: the peer's IP address or vsock CID."""
    if family == socket.AF_UNIX or not isinstance(address, tuple):
        return None
    # The same IPv4 client counts once, whether it came by an inet or a dual-stack socket.
    return str(address[0]).removeprefix("::ffff:")
