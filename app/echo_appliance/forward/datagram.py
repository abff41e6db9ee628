"""Forwards datagrams: one session per client, with a socket of its own to the backend.

A session begins with a client's first datagram and ends when nothing moved for
its route's idle timeout.  Its socket is connected, so that answers come from
the backend only, and the kernel reports when the backend refuses (ICMP): that
is counted, and never the end of anything, for UDP backends come and go.
Answers leave from the address that the client wrote to.

What cannot be sent now is dropped and counted, as UDP does.
"""

import errno
import os
import select
import socket
from time import monotonic

from ..answers import ask_for_destination, let_answers_be_long, send_reason
from ..buffer import VIEW
from ..errors import say
from ..inherit import Inherited, format_address
from ..original import ANCILLARY_SIZE, answer_from, destination
from .destination import Backend
from .dial import Dial
from .passage import Entrance
from .route import Route, release

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..loop import Timer
    from ..original import Ancillary
    from .access_log import AccessLog

    # As recvmsg() gives it; None for a unix client that has none.
    Address = tuple[object, ...] | str | bytes | None
    # Who sent it, and where to, as the kernel reports it.
    Key = tuple[Address, bytes]

SESSION_SECONDS = 60.0  # without an idle-timeout of the route
LAST_SECONDS = 0.5  # for a last answer, when the process is to end
SESSIONS = 1024  # without a max-connections of the route
DATAGRAMS_PER_TURN = 64  # then others have their turn
WAITING_LIMIT = 16  # datagrams of a session whose backend is still looked for

_buffers = [VIEW]

# A unix backend that is gone stays gone: what comes next is for a new session.
_GONE = frozenset((errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE))


class Datagrams:
    """One inherited datagram socket and its sessions.  Owns it; close() ends it."""

    def __init__(self, entrance: Entrance, inherited: Inherited) -> None:
        self.entrance = entrance
        self._socket = inherited.socket
        self._where = str(inherited)
        self._is_internet = inherited.is_internet
        self._connected = inherited.connected  # then its one peer needs no address
        self.closed = False
        self.folder_refused = False  # and said so
        self._sessions: dict[Key, Session] = {}
        # From a unix client nothing but octets: the descriptors that it may send along (SCM_RIGHTS)
        # would be ours to close.  Without room for them the kernel does.
        self._ancillary_size = ANCILLARY_SIZE if inherited.is_internet else 0
        if inherited.is_internet:
            ask_for_destination(inherited)
        else:
            let_answers_be_long(inherited.socket)

    def start(self) -> None:
        """Forward from now on."""
        self.entrance.house.loop.watch(self._socket.fileno(), select.EPOLLIN, self._on_event)

    def look_again(self) -> None:
        """Nothing to do: one worker alone has this socket."""

    def close(self) -> None:
        """Take no more; sessions answer until they are over."""
        self.entrance.house.loop.discard(self._socket.fileno())
        self.closed = True
        for session in tuple(self._sessions.values()):
            session.look_for_idleness()
        if not self._sessions:
            self._socket.close()

    def _on_event(self, events: int) -> None:
        if events & select.EPOLLHUP:
            # It stays readable for ever, with nothing to read.
            house = self.entrance.house
            house.loop.forget(self._socket.fileno())
            say(f"{self._where}: shut down by somebody who holds it too; not served any more")
            house.service.source_lost()
        else:
            self._on_readable()

    def _on_readable(self) -> None:
        receive = self._socket.recvmsg_into
        ancillary_size = self._ancillary_size
        sessions = self._sessions
        counters = self.entrance.counters
        self.entrance.house.service.touch()
        for _ in range(DATAGRAMS_PER_TURN):
            try:
                size, ancillary, flags, peer = receive(_buffers, ancillary_size)
            except BlockingIOError:
                return
            except OSError:
                counters.drop("receive-error")  # an ICMP error for an earlier answer
                continue
            counters.datagrams_received += 1
            counters.received += size
            if flags & socket.MSG_TRUNC:
                counters.drop("too-long")
                continue
            # Of what a unit has asked for besides, a time stamp differs each time.
            key = (peer, destination(ancillary))
            session = sessions.get(key) or self._begin(key, ancillary)
            if session is not None:
                session.forward(size)

    def _begin(self, key: "Key", ancillary: "Ancillary") -> "Session | None":
        """Return a new session, or None when the client may not have one; that is counted."""
        entrance, route = self.entrance, self.entrance.gate.route
        answer = answer_from(ancillary)
        source = _source(key[0]) if self._is_internet else None
        reason = ""
        if answer is None:
            reason = "sent-to-group"
        elif not route.permits(source):
            reason = "denied"
        elif entrance.gate.full or len(self._sessions) >= (route.max_connections or SESSIONS):
            reason = "session-limit"
        elif not entrance.gate.admit(source):
            reason = "source-limit"
        if answer is None or reason:
            entrance.counters.drop(reason)
            return None
        session = Session(self, route, key, source, answer)
        self._sessions[key] = session
        session.start()
        return session

    def answer(self, session: "Session", size: int) -> None:
        """Send what is in the buffer to a session's client."""
        counters = self.entrance.counters
        peer = session.key[0]
        if not peer and not self._connected:
            counters.drop("client-without-address")
            return
        try:
            self._socket.sendmsg((VIEW[:size],), session.answer, 0, peer or None)
        except OSError as error:
            counters.drop(send_reason(error))
            return
        counters.datagrams_sent += 1
        counters.sent += size

    def forget(self, session: "Session") -> None:
        """A session is over."""
        del self._sessions[session.key]
        if self.closed and not self._sessions:
            self._socket.close()


class Session:
    """One client's datagrams.  Owns the socket to the backend."""

    __slots__ = ("_asked", "_backend", "_datagrams", "_dial", "_octets", "_over", "_path",
                 "_started_at", "_timer", "_touched_at", "_waiting",
                 "answer", "key", "route", "source")  # fmt: skip

    def __init__(
        self,
        datagrams: Datagrams,
        route: Route,
        key: "Key",
        source: str | None,
        answer: "Ancillary",
    ) -> None:
        self._datagrams = datagrams
        self.route = route
        self.key = key
        self.answer = answer  # the control messages that an answer is sent with
        self.source = source
        self._backend: socket.socket | None = None
        self._dial: Dial | None = None
        self._waiting: list[bytes] = []
        self._asked: Backend | None = None  # whose socket that is
        self._path = ""  # of the socket to the backend, if it has one in the file system
        self._octets = [0, 0]  # received from the client, sent to it
        self._over = False
        self._started_at = monotonic()
        house = datagrams.entrance.house
        self._touched_at = house.loop.now
        self._timer: Timer = house.loop.call_later(self._idle_timeout, self.look_for_idleness)

    @property
    def _idle_timeout(self) -> float:
        timeout = self.route.idle_timeout or SESSION_SECONDS
        return min(timeout, LAST_SECONDS) if self._datagrams.closed else timeout

    def start(self) -> None:
        """Look for a backend."""
        entrance, destination = self._datagrams.entrance, self.route.destination
        house = entrance.house
        entrance.counters.accepted += 1
        entrance.counters.open += 1
        house.service.opened(self)
        if destination is not None:
            kind = socket.SOCK_DGRAM
            dial = Dial(house.loop, house.resolver, house.standby, destination, self, kind)
            self._dial = dial
            dial.start()

    def abort(self, reason: str) -> None:
        """End it now."""
        self._end(reason)

    def connected(self, sock: socket.socket, backend: Backend) -> None:
        """A backend is there, as far as one can know."""
        self._dial = None
        self._asked = backend
        if sock.family == socket.AF_UNIX and not self._take_address(sock):
            sock.close()
            self._end("no-address-for-answers")
            return
        loop = self._datagrams.entrance.house.loop
        try:
            loop.watch(sock.fileno(), select.EPOLLIN, self._on_readable)
        except OSError:
            sock.close()
            self._end("resources")  # epoll takes no more
            return
        self._backend = sock
        waiting, self._waiting = self._waiting, []
        for octets in waiting:
            self._send(octets)

    def _take_address(self, sock: socket.socket) -> bool:
        """Give a unix socket an address that its backend can answer to; False when that failed."""
        folder = self.route.answers_in
        # Random, for in containers all processes have one number.  Abstract without a folder.
        path = f"{folder}/{os.urandom(8).hex()}" if folder else ""
        try:
            sock.bind(path)
            if path:
                self._path = path
                # The folder's mode says who comes here at all; and of those, connected as it is,
                # only the backend is heard.
                os.chmod(path, 0o666)  # noqa: S103
        except OSError as error:
            if not self._datagrams.folder_refused:  # once, or strangers could fill the journal
                where = folder or "abstract"
                say(f"route.{self.route.name}: no socket in {where}: {error.strerror}")
            self._datagrams.folder_refused = True
            return False
        self._datagrams.folder_refused = False
        let_answers_be_long(sock)
        return True

    def not_connected(self, reason: str) -> None:
        """No backend: what waits is lost, and what comes later begins a new session."""
        self._dial = None
        self._end(reason)

    def forward(self, size: int) -> None:
        """Send what is in the buffer to the backend."""
        self._octets[0] += size
        self._touched_at = self._datagrams.entrance.house.loop.now
        if self._backend is not None:
            self._send(VIEW[:size])
        elif len(self._waiting) < WAITING_LIMIT and not self._over:
            self._waiting.append(bytes(VIEW[:size]))
        else:
            self._datagrams.entrance.counters.drop("no-backend-yet")

    def _send(self, octets: "bytes | memoryview") -> None:
        if self._backend is None:
            return
        try:
            self._backend.send(octets)
        except OSError as error:
            self._failed(error)

    def _on_readable(self, _events: int) -> None:
        datagrams = self._datagrams
        self._touched_at = datagrams.entrance.house.loop.now
        for _ in range(DATAGRAMS_PER_TURN):
            if self._backend is None:
                return
            try:
                size = self._backend.recv_into(VIEW)
            except BlockingIOError:
                return
            except OSError as error:
                self._failed(error)
                continue
            self._octets[1] += size
            datagrams.answer(self, size)

    def _failed(self, error: OSError) -> None:
        refused = error.errno == errno.ECONNREFUSED
        counters = self._datagrams.entrance.counters
        counters.drop("backend-refused" if refused else send_reason(error))
        if self._backend is None or error.errno not in _GONE:
            return
        if self._backend.family == socket.AF_UNIX:
            self._end("backend-gone")
        elif refused and self._asked is not None:
            address = self._backend.family, self._backend.getpeername()
            self._asked.refused(address, self._datagrams.entrance.house.loop.now)
            if self._has_alternative(self._asked):
                self._end("backend-refused")  # what comes next is for a new session, elsewhere

    def _has_alternative(self, asked: Backend) -> bool:
        destination, target = self.route.destination, asked.target
        if destination is not None and len(destination.backends) > 1:
            return True
        resolver = self._datagrams.entrance.house.resolver
        return len(resolver.known(target.host, target.port, socket.SOCK_DGRAM) or ()) > 1

    def look_for_idleness(self) -> None:
        """End if nothing moved for too long; else look again when that may be so."""
        self._timer.cancel()
        loop = self._datagrams.entrance.house.loop
        rest = self._touched_at + self._idle_timeout - loop.now
        if rest > 0:
            self._timer = loop.call_later(rest, self.look_for_idleness)
        else:
            self._end("eof")  # how a session should end

    def _end(self, reason: str) -> None:
        if self._over:
            return
        self._over = True
        entrance = self._datagrams.entrance
        house = entrance.house
        self._timer.cancel()
        if self._dial is not None:
            self._dial.cancel()
        if self._backend is not None:
            house.loop.forget(self._backend.fileno())
            self._backend.close()
            self._backend = None
        if self._path:
            self._remove_address()
        for _ in self._waiting:
            entrance.counters.drop(reason)
        if house.access_log is not None:
            self._log(house.access_log, reason)
        if reason != "eof":
            entrance.counters.end(reason)
        entrance.counters.open -= 1
        release(house.admission, self.route, self.source)
        self._datagrams.forget(self)
        house.service.closed(self)

    def _remove_address(self) -> None:
        try:
            os.unlink(self._path)
        except OSError:
            pass  # somebody has cleaned up

    def _log(self, log: "AccessLog", reason: str) -> None:
        log.write(
            self.route.name,
            format_address(self.key[0]) or "unix",
            self._asked.target.text if self._asked is not None else "",
            (self._octets[0], self._octets[1]),
            monotonic() - self._started_at,
            "idle" if reason == "eof" else reason,
        )


def _source(peer: object) -> str | None:
    """Return what sessions are counted by: the client's IP address."""
    return str(peer[0]).removeprefix("::ffff:") if isinstance(peer, tuple) else None
