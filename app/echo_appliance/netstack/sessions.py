"""What is done with a connection or a datagram: echo it, discard it, or relay it to a target.

Backpressure is not reading: what cannot be written stays in the connection's
receive buffer, its window closes, and the peer waits.
"""

import errno
import os
import select
import socket

from ..echo.datagram import REFUSED_PORTS
from ..errors import say
from ..forward.target import address_of
from .addresses import format_endpoint, format_ip
from .tcp.states import State
from .wire import udp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..admission import Admission
    from ..metrics import Counters
    from ..service import Service
    from ..target import Target
    from .driver import Driver
    from .interface import Interface
    from .tcp.connection import Connection

# A segment that straddles two reads costs a copy: 64 KiB 3.5 Gbit/s, 256 KiB 6.4, 512 KiB 6.4.
READ_SIZE = 256 * 1024
_OVER = (State.CLOSED, State.TIME_WAIT)


class Port:
    """What all sessions of one port have in common."""

    def __init__(
        self,
        service: "Service",
        admission: "Admission",
        counters: "Counters",
        driver: "Driver",
        *,
        idle_timeout: float = 0.0,
        debug: bool = False,
    ) -> None:
        self.service = service
        self.admission = admission
        self.counters = counters
        self.driver = driver
        self.idle_timeout = idle_timeout
        self.debug = debug


class Session:
    """One connection that was accepted; its application.  What happens to it ends it alone."""

    def __init__(self, port: Port, connection: "Connection") -> None:
        self._port = port
        self._connection = connection
        self._source = format_ip(connection.remote)
        self._touched_at = port.service.loop.now
        self._over = False
        connection.application = self.progress
        port.counters.accepted += 1
        port.counters.open += 1
        port.service.opened(self)
        port.service.touch()
        self._timer = None
        if port.idle_timeout:
            self._timer = port.service.loop.call_later(port.idle_timeout, self._check_idleness)

    def progress(self, connection: "Connection") -> None:
        """Do what can be done now: something has come, or something could be sent."""
        raise NotImplementedError

    def abort(self, reason: str) -> None:
        """End it now, by a reset, so that its peer sees that data may be missing."""
        self._connection.abort()
        self._port.driver.touch(self._connection)
        self._end(reason)

    def _end(self, reason: str | None) -> None:
        """Be over; `reason` when that is not by both sides' leave."""
        if self._over:
            return
        self._over = True
        port = self._port
        self._connection.application = None
        if self._timer is not None:
            self._timer.cancel()
        if reason is not None:
            port.counters.end(reason.replace(" ", "-"))
        port.counters.open -= 1
        port.service.touch()
        port.admission.release(self._source)
        port.service.closed(self)

    def _note(self, received: int, sent: int) -> None:
        port = self._port
        port.counters.received += received
        port.counters.sent += sent
        self._touched_at = port.service.loop.now
        if port.debug:
            peer = format_endpoint(self._connection.remote, self._connection.remote_port)
            say(f"debug: received {received} octets, sent {sent} octets, {peer}")

    def _check_idleness(self) -> None:
        port = self._port
        rest = self._touched_at + port.idle_timeout - port.service.loop.now
        if rest > 0:
            self._timer = port.service.loop.call_later(rest, self._check_idleness)
        else:
            self._timer = None
            self.abort("idle-timeout")


class Echo(Session):
    """Sends back what arrives."""

    def progress(self, connection: "Connection") -> None:
        """Move what fits from one direction to the other, without a copy."""
        moved = 0
        if connection.readable:
            for piece in connection.peek():
                taken = connection.write(piece)
                moved += taken
                if taken < len(piece):
                    break
            if moved:
                connection.consume(moved)
                self._note(moved, moved)
        if connection.at_eof:
            connection.close()
        if connection.state in _OVER:
            self._end(connection.error)


class Discard(Session):
    """Takes what arrives, and sends nothing back."""

    def progress(self, connection: "Connection") -> None:
        """Forget what has come."""
        size = connection.readable
        if size:
            connection.consume(size)
            self._note(size, 0)
        if connection.at_eof:
            connection.close()
        if connection.state in _OVER:
            self._end(connection.error)


class Relay(Session):
    """Moves octets between a connection and a socket of the kernel's, in both directions."""

    def __init__(self, port: Port, connection: "Connection", target: "Target") -> None:
        self._events: int | None = select.EPOLLOUT  # None: not watched
        self._dialling = True
        self._target_ended = False  # it has sent all that it will
        self._peer_ended = False  # our peer has sent all that it will, which the target knows
        self._unsent = b""  # read from the target, and not yet taken by TCP
        self._has_socket = False
        super().__init__(port, connection)
        family, address = address_of(target)
        try:
            self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:  # EMFILE, mostly: one client less, not all
            self._fail(error)
            return
        self._has_socket = True
        code = self._socket.connect_ex(address)
        if code not in (0, errno.EINPROGRESS):
            say(f"target {target.text}: {os.strerror(code)}")
            self.abort("target-unreachable")
            return
        port.service.loop.watch(self._socket.fileno(), select.EPOLLOUT, self._on_event)

    def progress(self, connection: "Connection") -> None:
        """TCP has something for the target, or room for what the target sent."""
        if not self._dialling:
            try:
                self._to_target(connection)
                self._to_peer(connection)
            except OSError as error:
                self._fail(error)
                return
            self._rewatch(connection)
        # What the peer sent before it closed may still wait for a target that reads slowly.
        if connection.state in _OVER and (connection.error is not None or self._peer_ended):
            self._end(connection.error)

    def _on_event(self, events: int) -> None:
        if self._dialling:
            self._dialling = False
            code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                self._fail(OSError(code, os.strerror(code)))
                return
        if events & (select.EPOLLHUP | select.EPOLLERR) and not self._events:
            self._hang_up()
        self.progress(self._connection)
        self._port.driver.touch(self._connection)

    def _hang_up(self) -> None:
        """The target has closed both directions, while nothing was to be done with it.

        Not to be told of that again and again, it is not watched any more; it is when there is
        room again for what it sent.  If it has sent all, nobody will read what the peer sends.
        """
        self._port.service.loop.discard(self._socket.fileno())
        self._events = None
        if self._target_ended:
            self._connection.release(self._port.service.loop.now)

    def _to_target(self, connection: "Connection") -> None:
        sent = 0
        if connection.readable:
            for piece in connection.peek():
                try:
                    taken = self._socket.send(piece)
                except BlockingIOError:
                    taken = 0
                sent += taken
                if taken < len(piece):
                    break
            connection.consume(sent)
            self._note(sent, 0)
        if connection.at_eof and not self._peer_ended:
            self._peer_ended = True
            self._socket.shutdown(socket.SHUT_WR)

    def _to_peer(self, connection: "Connection") -> None:
        while not self._target_ended or self._unsent:
            if not self._unsent:
                if connection.writable < READ_SIZE:
                    return
                try:
                    self._unsent = self._socket.recv(READ_SIZE)
                except BlockingIOError:
                    return
                if not self._unsent:
                    self._target_ended = True
                    connection.close()
                    return
            taken = connection.write(self._unsent)
            self._unsent = self._unsent[taken:]
            self._note(0, taken)
            if self._unsent:
                return

    def _rewatch(self, connection: "Connection") -> None:
        """Wait for the socket only where there is something to do with it."""
        events = 0  # of a hang-up, we are told in any case
        if connection.readable:
            events |= select.EPOLLOUT
        if not self._target_ended and connection.writable >= READ_SIZE:
            events |= select.EPOLLIN
        if events == self._events or (self._events is None and not events):
            return
        loop, descriptor = self._port.service.loop, self._socket.fileno()
        if self._events is None:
            loop.watch(descriptor, events, self._on_event)
        else:
            loop.rewatch(descriptor, events)
        self._events = events

    def _fail(self, error: OSError) -> None:
        code = errno.errorcode.get(error.errno or 0, "error")
        self.abort(f"target-{code.lower()}")

    def _end(self, reason: str | None) -> None:
        if not self._over and self._has_socket:
            self._port.service.loop.discard(self._socket.fileno())
            self._socket.close()
        super()._end(reason)


class DatagramEcho:
    """Sends datagrams back, but for those that could set two servers upon each other."""

    def __init__(
        self, interface: "Interface", service: "Service", counters: "Counters", port: int
    ) -> None:
        self._interface = interface
        self._service = service
        self._counters = counters
        self._refused = REFUSED_PORTS | {port}

    def serve(self, local: bytes, remote: bytes, datagram: udp.Datagram, now: float) -> None:
        """Answer one."""
        counters = self._counters
        counters.datagrams_received += 1
        counters.received += len(datagram.payload)
        self._service.touch()
        if datagram.source_port in self._refused:
            counters.drop("refused-port")
            return
        answer = udp.Datagram(datagram.destination_port, datagram.source_port, datagram.payload)
        if self._interface.datagrams.send(local, remote, answer, now):
            counters.datagrams_sent += 1
            counters.sent += len(datagram.payload)


class DatagramDiscard:
    """Takes datagrams, and answers none."""

    def __init__(self, service: "Service", counters: "Counters") -> None:
        self._service = service
        self._counters = counters

    def serve(self, _local: bytes, _remote: bytes, datagram: udp.Datagram, _now: float) -> None:
        """Forget one."""
        self._counters.datagrams_received += 1
        self._counters.received += len(datagram.payload)
        self._service.touch()
