"""`echo-appliance netstack connect ADDRESS:PORT`: standard input to a peer, the peer to stdout."""

import os
import select
import signal

from ..errors import ParseError, SetupError
from ..loop import Loop
from ..options import Parser, positive_seconds
from ..text import whole_number
from .addresses import format_endpoint, format_ip, parse_unicast
from .station import Options as LinkOptions
from .station import Station, add_options
from .tcp.states import State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .tcp.connection import Connection

# Two segments of 45 x 1,448 octets, as a tap with an MTU of 1500 cuts them: one that straddles two
# reads costs a copy.  CPU time for 512 MiB: 0.24 s by 64 KiB, 0.22 by 256 KiB, 0.21 by this.
READ_SIZE = 2 * 45 * 1448


class Options(LinkOptions):
    """What the command line says; filled by the parser."""

    peer: list[str]
    send: str | None
    timeout: float


def main(arguments: "Sequence[str]") -> int:
    """Connect, and move octets both ways until both sides have ended; return the exit status."""
    parser = Parser("echo-appliance netstack connect", "Connect to a TCP port.")
    add_options(parser)
    parser.group("the connection")
    parser.add(
        "peer", metavar="ADDRESS:PORT", help="whom to connect to; IPv6 as in [2001:db8::1]:7"
    )
    parser.add("--send", metavar="FILE", help="send FILE instead of standard input")
    parser.add(
        "--timeout", positive_seconds, default=10.0, metavar="S",
        help="give up when nobody has answered for S seconds (default: 10)",
    )  # fmt: skip
    options = parser.parse(arguments, Options())
    if len(options.peer) != 1:
        raise SetupError("one ADDRESS:PORT at a time")
    address, port = parse_peer(options.peer[0])
    source = _open_source(options.send)
    try:
        return Client(options, address, port, source).run()
    finally:
        if source:
            os.close(source)


def parse_peer(text: str) -> tuple[bytes, int]:
    """Read ADDRESS:PORT.  Raises SetupError."""
    host, _, digits = text.rpartition(":")
    port = whole_number(digits)
    if not host or port is None or not 1 <= port <= 65535:
        raise SetupError(f"{text!r} is not ADDRESS:PORT, such as 192.0.2.1:7 or [2001:db8::1]:7")
    try:
        return parse_unicast(host.removeprefix("[").removesuffix("]")), port
    except ParseError as error:
        raise SetupError(str(error)) from None


def _open_source(path: str | None) -> int:
    if path is None:
        return 0
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.read(descriptor, 0)  # a directory can be opened, but not read
    except OSError as error:
        raise SetupError(f"--send: {path} cannot be read ({error.strerror})") from error
    return descriptor


class Client:
    """One connection, and the descriptors that its octets come from and go to."""

    def __init__(self, options: Options, address: bytes, port: int, source: int) -> None:
        self._options = options
        self._address = address
        self._port = port
        self._source = source
        self._source_ended = False
        self._source_watched = False
        self._output_watched = False
        self._failure: str | None = None
        self._connection: Connection | None = None
        self._loop = Loop()
        self._station = Station(self._loop, options, self._lost)
        self._station.check_peer(address)

    def run(self) -> int:
        """Be connected until both sides have ended; return the exit status.  Raises SetupError."""
        routes = self._station.interface.routes
        local = routes.source_for(self._address)
        if local is None or routes.next_hop(self._address) is None:
            raise SetupError(
                f"no route to {format_ip(self._address)}: give an --address on its link, "
                "or a --gateway"
            )
        self._local = local
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.on_signal(number, self._interrupted)
        blocking = [os.get_blocking(number) for number in (0, 1)]
        os.set_blocking(1, False)
        self._station.start(self._connect, lambda error: self._fail(str(error)))
        try:
            self._loop.run()
        finally:
            for descriptor, was in enumerate(blocking):  # they may be the terminal's
                os.set_blocking(descriptor, was)
            self._station.close()
            self._loop.close()
        if self._failure is not None:
            raise SetupError(self._failure)
        return 0

    def _connect(self) -> None:
        loop = self._loop
        self._connection = self._station.endpoint.connect(
            self._local, self._address, self._port, loop.now
        )
        self._connection.application = self._progress
        loop.call_later(self._options.timeout, self._check_connected)
        self._station.driver.touch(self._connection)

    def _check_connected(self) -> None:
        connection = self._connection
        if connection is not None and connection.state is State.SYN_SENT:
            why = connection.soft_error or "nobody answers"
            connection.abort()
            self._fail(f"{format_endpoint(self._address, self._port)}: {why}")

    def _interrupted(self) -> None:
        """Reset the connection, so that the peer does not wait for more, and end."""
        if self._connection is not None:
            self._connection.abort()
            self._station.driver.touch(self._connection)
        self._failure = self._failure or "interrupted"
        self._loop.call_later(0.0, self._loop.stop)

    def _lost(self, why: str) -> None:
        self._fail(f"{self._station.device.name}: no more frames: {why}")

    def _fail(self, why: str) -> None:
        self._failure = self._failure or why  # the first is the cause of the others
        self._loop.stop()

    # -- octets --------------------------------------------------------------

    def _progress(self, connection: "Connection") -> None:
        self._write_output(connection)
        if connection.state is State.CLOSED:
            if connection.error is not None:
                peer = format_endpoint(self._address, self._port)
                self._fail(f"{peer}: {connection.error}")
            elif not connection.readable:
                self._loop.stop()
            return
        if connection.state is not State.SYN_SENT:
            self._read_source(connection)
        if connection.state is State.TIME_WAIT and not connection.readable:
            # Whoever closed first is to stay for a minute; a command does not.
            self._loop.call_later(0.0, self._loop.stop)

    def _read_source(self, connection: "Connection") -> None:
        """Give TCP what it has room for, by whole reads: it keeps what it is given in pieces."""
        while not self._source_ended and connection.writable >= READ_SIZE:
            if self._source == 0 and not self._source_watched and not self._watch_source():
                return
            try:
                octets = os.read(self._source, READ_SIZE)
            except BlockingIOError:
                return
            except OSError as error:
                connection.abort()  # a FIN would say that this was all
                self._fail(f"cannot read: {error.strerror}")
                return
            if octets:
                connection.write(octets)
            else:
                self._source_ended = True
                self._unwatch_source()
                connection.close()
        if self._source_watched and connection.writable < READ_SIZE:
            self._unwatch_source()

    def _watch_source(self) -> bool:
        """Be told of standard input; True where it never waits, as files do not."""
        os.set_blocking(0, False)
        try:
            self._loop.watch(0, select.EPOLLIN, self._on_source)
        except PermissionError:  # a file
            return True
        self._source_watched = True
        return True

    def _unwatch_source(self) -> None:
        if self._source_watched:
            self._loop.forget(0)
            self._source_watched = False

    def _on_source(self, _events: int) -> None:
        if self._connection is not None:
            self._read_source(self._connection)
            self._station.driver.touch(self._connection)

    def _write_output(self, connection: "Connection") -> None:
        """Write what has come; what standard output does not take waits in the window."""
        written = 0
        try:
            for piece in connection.peek() if connection.readable else ():
                taken = os.write(1, piece)
                written += taken
                if taken < len(piece):
                    break
        except BlockingIOError:
            pass
        except OSError as error:
            connection.abort()
            self._fail(f"standard output cannot be written: {error.strerror}")
            return
        if written:
            connection.consume(written)
        self._watch_output(connection.readable > 0)

    def _watch_output(self, wanted: bool) -> None:
        if wanted == self._output_watched:
            return
        self._output_watched = wanted
        if wanted:
            self._loop.watch(1, select.EPOLLOUT, self._on_output)
        else:
            self._loop.forget(1)

    def _on_output(self, _events: int) -> None:
        if self._connection is not None:
            self._progress(self._connection)
            self._station.driver.touch(self._connection)
