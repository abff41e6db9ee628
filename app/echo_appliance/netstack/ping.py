"""`echo-appliance netstack ping ADDRESS`: asks for ICMP echoes, and shows them as they come."""

import os
import signal
from time import monotonic

from ..errors import ParseError, SetupError, tell
from ..loop import Loop
from ..options import ArgumentError, Parser, count, positive_seconds
from .addresses import format_ip, parse_unicast
from .station import Options as LinkOptions
from .station import Station, add_options
from .wire import icmp, icmpv6

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

SIZE_LIMIT = 65507


class Options(LinkOptions):
    """What the command line says; filled by the parser."""

    destination: list[str]
    count: int
    interval: float
    size: int
    timeout: float


def main(arguments: "Sequence[str]") -> int:
    """Ping; return 0 if any reply came, else 1."""
    options = _parse(arguments)
    if len(options.destination) != 1:
        raise SetupError("one ADDRESS at a time")
    try:
        destination = parse_unicast(options.destination[0])
    except ParseError as error:
        raise SetupError(str(error)) from None
    return Pinger(options, destination).run()


def _parse(arguments: "Sequence[str]") -> Options:
    parser = Parser("echo-appliance netstack ping", "Ask for ICMP echoes.")
    add_options(parser)
    parser.group("ping")
    parser.add("destination", metavar="ADDRESS", help="whom to ask")
    parser.add("--count", count, default=0, metavar="N", help="end after N (default: never)")
    parser.add(
        "--interval", positive_seconds, default=1.0, metavar="S",
        help="time between two (default: 1)",
    )  # fmt: skip
    parser.add("--size", _size, default=56, metavar="N", help="octets in each (default: 56)")
    parser.add(
        "--timeout", positive_seconds, default=2.0, metavar="S",
        help="how long to wait for the last reply (default: 2)",
    )  # fmt: skip
    return parser.parse(arguments, Options())


def _size(text: str) -> int:
    size = count(text)
    if size > SIZE_LIMIT:
        raise ArgumentError(f"{size} octets do not fit a packet: {SIZE_LIMIT} at the most")
    return size


class Pinger:
    """Sends requests, and matches replies to them."""

    def __init__(self, options: Options, destination: bytes) -> None:
        self._options = options
        self._destination = destination
        self._identifier = os.getpid() & 0xFFFF
        self._sent_at: dict[int, float] = {}  # those without a reply, by sequence number
        self._sent = 0
        self._payload = (bytes(range(256)) * (options.size // 256 + 1))[: options.size]
        self._received = 0
        self._shortest, self._longest, self._total = float("inf"), 0.0, 0.0  # round trips, seconds
        self._failure: SetupError | None = None
        self._loop = Loop()
        self._station = Station(self._loop, options, self._lost)
        self._station.check_peer(destination)

    def run(self) -> int:
        """Ping until all is done, or a signal; return the exit status."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.on_signal(number, self._loop.stop)
        control = self._station.interface.control
        control.on_echo_reply = self._on_reply
        control.on_error = self._on_error
        source = self._station.interface.routes.source_for(self._destination)
        if source is None:
            raise SetupError(
                f"no --address of the version of {format_ip(self._destination)}: give one"
            )
        if self._station.interface.routes.next_hop(self._destination) is None:
            raise SetupError(
                f"no route to {format_ip(self._destination)}: it is not on the link, so give "
                "a --gateway"
            )
        self._source = source
        self._station.start(self._send, self._fail)
        self._loop.run()
        self._station.close()
        self._loop.close()
        if self._failure is not None:
            raise self._failure
        self._summarize()
        return 0 if self._received else 1

    def _lost(self, why: str) -> None:
        self._fail(SetupError(f"{self._station.device.name}: no more frames: {why}"))

    def _fail(self, error: SetupError) -> None:
        self._failure = error
        self._loop.stop()

    def _send(self) -> None:
        now = monotonic()
        kind = icmp.ECHO_REQUEST if len(self._destination) == 4 else icmpv6.ECHO_REQUEST
        sequence = self._sent & 0xFFFF
        rest = self._identifier << 16 | sequence
        message = icmp.Message(kind, 0, rest, self._payload)
        self._sent_at[sequence] = now
        self._sent += 1
        self._station.interface.control.send(self._source, self._destination, message, now)
        self._station.driver.kick()
        if self._sent == self._options.count:
            self._loop.call_later(self._options.timeout, self._loop.stop)
        else:
            self._loop.call_later(self._options.interval, self._send)

    def _on_reply(self, source: bytes, message: icmp.Message, hops: int, _now: float) -> None:
        sent_at = self._sent_at.get(message.sequence)
        if message.identifier != self._identifier or sent_at is None:
            raise ParseError("icmp-unasked-reply")
        del self._sent_at[message.sequence]
        round_trip = monotonic() - sent_at
        self._received += 1
        self._shortest = min(self._shortest, round_trip)
        self._longest = max(self._longest, round_trip)
        self._total += round_trip
        _write(
            f"{len(message.payload) + icmp.HEADER_SIZE} octets from {format_ip(source)}: "
            f"icmp_seq={message.sequence} ttl={hops} time={1000 * round_trip:.3f} ms"
        )
        if self._sent == self._options.count and not self._sent_at:
            self._loop.stop()

    def _on_error(self, source: bytes, words: str) -> None:
        _write(f"from {format_ip(source)}: {words}")

    def _summarize(self) -> None:
        received = self._received
        lost = 100 * (self._sent - received) / self._sent if self._sent else 0
        _write(f"{self._sent} sent, {received} received, {lost:.0f} % lost")
        if received:
            mean = self._total / received
            _write(f"round trip min {1000 * self._shortest:.3f} mean {1000 * mean:.3f} "
                   f"max {1000 * self._longest:.3f} ms")  # fmt: skip


def _write(line: str) -> None:
    tell(line + "\n")
