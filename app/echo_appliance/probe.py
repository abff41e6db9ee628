"""`echo-appliance probe`: tests echo servers from outside, on every socket family.

Sends a payload, checks every octet that comes back, measures each round trip.
A plain client with blocking waits: one target after the other, one payload at a
time.  A payload larger than the sockets' buffers is written and read in turns.
"""

import errno
import os
import select
import socket
import struct
from time import monotonic

from .errors import ParseError, tell
from .options import Parser, positive, positive_seconds
from .target import Target, parse_target

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

DATAGRAM_LIMIT = 65507
SIZE_LIMIT = 1 << 30
READ_SIZE = 256 * 1024
GREETING_LIMIT = 64  # octets of "OK 1073741824" and its newline, with much to spare

_WORDS = {
    errno.ECONNREFUSED: "refused: nobody listens there",
    errno.ECONNRESET: "reset by the peer",
    errno.EPIPE: "closed by the peer",
    errno.ENOENT: "no such socket",
    errno.EACCES: "permission denied",
    errno.ENODEV: "no such CID, or no vsock transport on this kernel",
    errno.EADDRNOTAVAIL: "address not available",
    errno.EMSGSIZE: "the payload is too long for one message",
}


class ProbeError(Exception):
    """The target did not echo.  The reason, in words."""


class Options:
    """What the command line says; filled by the parser."""

    targets: list[str]
    size: int
    count: int
    timeout: float
    json: bool


class Result:
    """What one target did: round trips in seconds, and why it failed, if it did."""

    __slots__ = ("error", "round_trips", "target")

    def __init__(self, target: str, round_trips: list[float], error: str | None) -> None:
        self.target = target
        self.round_trips = round_trips
        self.error = error

    def as_text(self, size: int) -> str:
        """One line for people."""
        if self.error is not None:
            return f"{self.target} failed: {self.error}"
        low, middle, high = (f"{1000 * value:.3f}" for value in self._spread())
        return (
            f"{self.target} ok: {len(self.round_trips)} x {size} octets, "
            f"round trip min {low} median {middle} max {high} ms"
        )

    def as_json(self, size: int) -> dict[str, object]:
        """The same for programs; round trips in seconds."""
        low, middle, high = self._spread() if self.round_trips else (None, None, None)
        return {
            "target": self.target,
            "ok": self.error is None,
            "error": self.error,
            "octets": size,
            "echoed": len(self.round_trips),
            "round_trip": {"min": low, "median": middle, "max": high},
        }

    def _spread(self) -> tuple[float, float, float]:
        trips = sorted(self.round_trips)
        return trips[0], trips[len(trips) // 2], trips[-1]


def main(arguments: "Sequence[str]") -> int:
    """Probe all targets; return 0 if every one of them echoed every octet, else 1."""
    options = _parse(arguments)
    results = []
    for text in options.targets:
        result = probe(parse_target(text), options.size, options.count, options.timeout)
        results.append(result)
        if not options.json:
            tell(result.as_text(options.size) + "\n")
    if options.json:
        import json

        tell(json.dumps([result.as_json(options.size) for result in results], indent=2) + "\n")
    return int(any(result.error is not None for result in results))


def _parse(arguments: "Sequence[str]") -> Options:
    parser = Parser("echo-appliance probe", "Send a payload to echo servers, and check the answer.")
    parser.add(
        "targets", metavar="TARGET",
        help="tcp:HOST:PORT, udp:HOST:PORT, with [::1] for IPv6; vsock:CID:PORT,\n"
        "        vsock-seqpacket:CID:PORT; unix:PATH, unix-dgram:PATH, unix-seqpacket:PATH,\n"
        "        with @NAME for an abstract name; vsock-uds:PATH:PORT",
    )  # fmt: skip
    parser.add("--size", positive, default=64, metavar="N", help="octets to send (64)")
    parser.add("--count", positive, default=1, metavar="N", help="round trips (1)")
    parser.add(
        "--timeout", positive_seconds, default=10.0, metavar="S",
        help="give up after S seconds without the whole answer (10)",
    )  # fmt: skip
    parser.add("--json", default=False, help="print one JSON array")
    options = parser.parse(arguments, Options())
    for text in options.targets:
        try:
            target = parse_target(text)
        except ParseError as error:
            parser.error(str(error))
        if options.size > SIZE_LIMIT:
            parser.error(f"--size: {options.size} octets are too many: at most {SIZE_LIMIT}")
        if target.type == socket.SOCK_DGRAM and options.size > DATAGRAM_LIMIT:
            parser.error(f"{text}: a datagram has at most {DATAGRAM_LIMIT} octets")
    return options


def probe(target: Target, size: int, count: int, timeout: float) -> Result:
    """Make `count` round trips of `size` octets; each may take `timeout` seconds."""
    round_trips: list[float] = []
    try:
        with connect(target, timeout) as sock:
            for _ in range(count):
                payload = os.urandom(size)  # another one each time, so that no answer counts twice
                started = monotonic()
                _round_trip(sock, payload, started + timeout, timeout)
                round_trips.append(monotonic() - started)
            if _wait(sock, False, monotonic()):
                _expect_nothing(sock)
    except ProbeError as error:
        return Result(target.text, round_trips, str(error))
    except OSError as error:
        return Result(target.text, round_trips, _in_words(error, timeout))
    return Result(target.text, round_trips, None)


def connect(target: Target, timeout: float) -> socket.socket:
    """Return a socket that is connected to the target, the caller's to close.

    Raises OSError, TimeoutError after that many seconds, ProbeError where errno says too little.
    """
    if target.family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNSPEC):
        return _connect_internet(target, timeout)
    sock = socket.socket(target.family, target.type)
    try:
        if target.family == socket.AF_VSOCK:
            sock.settimeout(timeout)
            sock.connect((int(target.host), target.port))
        else:
            _connect_unix(sock, target, timeout)
        if target.is_hybrid:
            sock.settimeout(timeout)
            _ask_for_port(sock, target.port)
    except BaseException:
        sock.close()
        raise
    return sock


def _connect_unix(sock: socket.socket, target: Target, timeout: float) -> None:
    if target.type == socket.SOCK_DGRAM:
        # An autobound, abstract name: the server reaches it without seeing our files.
        sock.bind("")
    # Waits for room in the server's backlog, which a non-blocking unix socket does not: it
    # fails at once with EAGAIN.  So no settimeout(), but the kernel's own (unix(7), EAGAIN).
    whole, part = divmod(timeout, 1)
    span = struct.pack("ll", int(whole), max(1, int(part * 1_000_000)))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, span)
    try:
        sock.connect(target.path)
    except BlockingIOError:
        raise TimeoutError from None


def _ask_for_port(sock: socket.socket, port: int) -> None:
    """Have a user-space vsock device connect us to a port of its guest.

    What follows the answer's line is the guest's, so nothing beyond it may be read here.
    Source: Firecracker, docs/vsock.md; vhost-device-vsock, README.
    """
    answer = b""
    try:
        sock.sendall(b"CONNECT %d\n" % port)
        while not answer.endswith(b"\n") and len(answer) < GREETING_LIMIT:
            octet = sock.recv(1)
            if not octet:
                break
            answer += octet
    except ConnectionError:
        pass  # a reset is what devices say instead of "no"
    if not answer:
        raise ProbeError(f"no guest is up there, or nobody listens on its port {port}")
    if not (answer.startswith(b"OK ") and answer.endswith(b"\n")):
        raise ProbeError(f"not a vsock device: it answered {answer!r}")


def _connect_internet(target: Target, timeout: float) -> socket.socket:
    """Try each address of a name in turn; the last failure is the one that is told."""
    try:
        found = socket.getaddrinfo(target.host, target.port, target.family, target.type)
    except UnicodeError:  # of the IDNA codec
        raise ProbeError("the name cannot be resolved: it is not a host name") from None
    for family, kind, protocol, _, address in found[:-1]:
        try:
            return _connect_one(family, kind, protocol, address, timeout)
        except OSError:
            continue
    family, kind, protocol, _, address = found[-1]
    return _connect_one(family, kind, protocol, address, timeout)


def _connect_one(
    family: int, kind: int, protocol: int, address: "tuple[object, ...]", timeout: float
) -> socket.socket:
    sock = socket.socket(family, kind, protocol)
    try:
        sock.settimeout(timeout)
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def _round_trip(sock: socket.socket, payload: bytes, deadline: float, timeout: float) -> None:
    """Send the payload and receive it back, both at once; raise ProbeError if it differs."""
    whole = sock.type != socket.SOCK_STREAM  # one message is one answer
    unsent = memoryview(payload)
    answer = bytearray()
    sock.setblocking(False)
    while len(answer) < len(payload):
        ready = _wait(sock, bool(unsent), deadline)
        if not ready:
            raise ProbeError(f"timed out after {timeout:g} s, {len(answer)} octets came back")
        if ready & select.POLLOUT and unsent:
            unsent = unsent[_send(sock, unsent) :]
        if ready & ~select.POLLOUT:
            _receive(sock, payload, answer, whole)


def _expect_nothing(sock: socket.socket) -> None:
    octets = sock.recv(READ_SIZE)
    if octets:
        raise ProbeError(f"{len(octets)} octets more came back than were sent")


def _wait(sock: socket.socket, sending: bool, deadline: float) -> int:
    poll = select.poll()
    poll.register(sock, select.POLLIN | (select.POLLOUT if sending else 0))
    events = poll.poll(max(0.0, deadline - monotonic()) * 1000)
    return events[0][1] if events else 0


def _send(sock: socket.socket, octets: memoryview) -> int:
    try:
        return sock.send(octets)
    except BlockingIOError:
        return 0


def _receive(sock: socket.socket, payload: bytes, answer: bytearray, whole: bool) -> None:
    try:
        octets = sock.recv(READ_SIZE if not whole else 2 * len(payload) + READ_SIZE)
    except BlockingIOError:
        return
    if not octets:
        raise ProbeError(f"EOF after {len(answer)} octets")
    start = len(answer)
    answer += octets
    if whole and len(octets) != len(payload):
        raise ProbeError(f"a message of {len(payload)} octets came back with {len(octets)}")
    expected = payload[start : start + len(octets)]
    if len(expected) < len(octets) and octets.startswith(expected):
        raise ProbeError(f"{len(octets) - len(expected)} octets more came back than were sent")
    if octets != expected:
        pairs = zip(octets, expected, strict=False)
        same = next((i for i, (got, sent) in enumerate(pairs) if got != sent), len(expected))
        raise ProbeError(f"octet {start + same} came back changed")


def _in_words(error: OSError, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"timed out after {timeout:g} s"
    if isinstance(error, socket.gaierror):
        return f"the name cannot be resolved: {error.strerror}"
    return _WORDS.get(error.errno or 0, error.strerror or str(error))
