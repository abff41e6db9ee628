"""`echo-appliance netstack serve`: ports of our own on the link, in a Service like all modes'."""

from functools import partial

from ..admission import Admission
from ..errors import ParseError, SetupError
from ..forward.target import is_passed
from ..forward.target import parse as parse_target
from ..inherit import check_metrics
from ..limits import connection_limit
from ..loop import Loop
from ..metrics import SOCKET_NAME as METRICS
from ..notify import ServiceManager
from ..options import ArgumentError, Parser, ServiceOptions, add_service_options
from ..service import Lifetimes, Service
from ..text import whole_number
from .addresses import format_ip
from .sessions import DatagramDiscard, DatagramEcho, Discard, Echo, Port, Relay
from .station import Options as LinkOptions
from .station import Several, Station, add_options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..target import Target
    from .tcp.connection import Connection
    from .tcp.listener import Listener

    Job = tuple[int, "str | Target"]


class Options(LinkOptions, ServiceOptions):
    """What the command line says; filled by the parser."""

    port: "list[Job] | None"


def main(arguments: "Sequence[str]") -> int:
    """Serve until drained; return the exit status.  Raises SetupError, in words for the user."""
    options = _parse(arguments)
    if not options.port:
        raise SetupError("no --port: give one to serve, as in --port 7")
    numbers = [number for number, _ in options.port]
    if len(set(numbers)) < len(numbers):
        raise SetupError("a --port is given twice: each does one thing")
    return Server(options).run()


def _parse(arguments: "Sequence[str]") -> Options:
    parser = Parser("echo-appliance netstack serve", "Answer TCP and UDP on ports of our own.")
    add_options(parser)
    parser.group("ports")
    parser.add(
        "--port", Several(_read_job), metavar="N[=DO]",
        help="serve port N: echo (default), discard, or relay TCP to a target, such as unix:/path",
    )  # fmt: skip
    add_service_options(parser)
    return parser.parse(arguments, Options())


def _read_job(text: str) -> "Job":
    digits, _, what = text.partition("=")
    port = whole_number(digits)
    if port is None or not 1 <= port <= 65535:
        raise ArgumentError(f"{digits!r} is not a port, 1 to 65535")
    if what in ("", "echo", "discard"):
        return port, what or "echo"
    try:
        target = parse_target(what)
    except ParseError as error:
        raise ArgumentError(f"{error}, or echo, or discard") from None
    if is_passed(target) or not target.family:
        raise ArgumentError(f"{what}: give a target by its address")
    if target.is_hybrid:
        raise ArgumentError(f"{what}: a VM is relayed to by vsock:CID:PORT")
    return port, target


class Server:
    """All that `serve` runs."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._failure: SetupError | None = None
        self._loop = Loop()
        self._station = Station(self._loop, options, self._lost)
        counts = self._station.counts
        # The link has the time of --claim to object to our addresses, before READY=1.
        wait = max(options.start_sleep, options.claim)
        lifetimes = Lifetimes(options.drain, options.exit_idle, wait)
        words = ", ".join(format_ip(one.address) for one in options.address or [])
        self._service = Service(
            self._loop, ServiceManager(), counts, lifetimes, f"{words} on {counts.device.name}",
            options.debug,
        )  # fmt: skip
        self._admission = Admission(
            connection_limit(options.max_connections), options.max_connections_per_source
        )
        self._serve_metrics()
        for number, what in options.port or []:
            self._service.add_source(self._listening(number, what))

    def run(self) -> int:
        """Serve until drained; return the exit status.  Raises SetupError."""
        self._service.obey_signals()
        self._station.start(lambda: None, self._fail)
        status = self._service.run()
        self._station.close()
        self._loop.close()
        if self._failure is not None:
            raise self._failure
        return status

    def _fail(self, error: SetupError) -> None:
        self._failure = error
        self._loop.stop()

    def _lost(self, why: str) -> None:
        self._failure = SetupError(f"{self._station.device.name}: no more frames: {why}")
        self._service.drain("the device gives no more frames", 0.0)

    def _serve_metrics(self) -> None:
        sockets = self._station.sockets
        others = [one for one in sockets if one.name != METRICS]
        if others:
            raise SetupError(
                f"{others[0]} is of no use here: pass the device, and a socket named {METRICS!r}"
            )
        check_metrics(sockets)
        if sockets:
            from ..metrics_http import serve_metrics

            for inherited in sockets:
                serve_metrics(self._service, inherited, self._station.counts)

    def _listening(self, number: int, what: "str | Target") -> "Listening":
        options, service, counts = self._options, self._service, self._station.counts
        port = Port(
            service, self._admission, counts.counters, self._station.driver,
            idle_timeout=options.idle_timeout, debug=options.debug,
        )  # fmt: skip
        if not isinstance(what, str):
            return Listening(self._station, number, port, partial(Relay, port, target=what), None)
        if what == "echo":
            echo = DatagramEcho(self._station.interface, service, counts.counters, number)
            return Listening(self._station, number, port, partial(Echo, port), echo.serve)
        discard = DatagramDiscard(service, counts.counters)
        return Listening(self._station, number, port, partial(Discard, port), discard.serve)


class Listening:
    """One port, as a source of the Service's."""

    def __init__(
        self,
        station: Station,
        number: int,
        port: Port,
        open_session: "Callable[[Connection], object]",
        serve_datagram: "Callable[..., None] | None",
    ) -> None:
        self._station = station
        self._number = number
        self._port = port
        self._open_session = open_session
        self._serve_datagram = serve_datagram
        self._listener: Listener | None = None

    def start(self) -> None:
        """Listen from now on."""
        self._listener = self._station.endpoint.listen(self._number, self._admit)
        if self._serve_datagram is not None:
            self._station.interface.datagrams.listen(self._number, self._serve_datagram)

    def close(self) -> None:
        """Take nothing new; connections go on."""
        if self._listener is not None:
            self._station.endpoint.unlisten(self._listener)
            self._station.interface.datagrams.close(self._number)

    def look_again(self) -> None:
        """Nothing to do: no other process shares the port."""

    def _admit(self, connection: "Connection") -> None:
        admission = self._port.admission
        source = format_ip(connection.remote)
        # A reset, not a pause: what waits would have to wait in our own memory.
        if admission.full:
            self._port.counters.refuse("limit")
            connection.abort()
        elif not admission.admit(source):
            self._port.counters.refuse("source-limit")
            connection.abort()
        else:
            self._open_session(connection)
