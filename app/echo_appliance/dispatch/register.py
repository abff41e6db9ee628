"""Registers sockets: puts them into the slots of their label's destinations.

A destination is a label, a protocol and a family; it has SLOTS slots, among
which flows are spread.  A dual-stack socket counts for both families.  The
kernel empties the slot of a socket that is closed; the next registration
fills it.

Several sockets in one call are registered all, or none.
"""

import errno
import os
import socket
import stat

from ..errors import SetupError
from ..inherit import FIRST_DESCRIPTOR, Inherited, describe, take
from ..text import whole_number
from . import libbpf
from .labels import Labels, live
from .layout import SLOTS, U32, slot_index
from .model import kind_name
from .place import socket_cookie
from .state import Dispatcher

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SO_COOKIE = 57
_IPV6_V6ONLY = 26
_PID_LIMIT = 1 << 22  # the kernel's PID_MAX_LIMIT
_PID_FILE_OCTETS = 64


def kinds(sock: socket.socket) -> list[int]:
    """Return the kinds of packets that a socket can take.  Raises SetupError when none.

    Needs a TCP socket that listens, or a UDP one that is not connected.
    """
    why = _unfit(sock)
    if why:
        raise SetupError(f"{describe(sock)} cannot be registered: {why}")
    protocol = 1 if sock.type == socket.SOCK_DGRAM else 0
    if sock.family == socket.AF_INET:
        return [protocol << 1]
    dual = not sock.getsockopt(socket.IPPROTO_IPV6, _IPV6_V6ONLY)
    return [protocol << 1 | 1] + ([protocol << 1] if dual else [])


def _unfit(sock: socket.socket) -> str | None:
    """Say why packets cannot be steered to a socket."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return "only IPv4 and IPv6 packets are dispatched"
    protocol = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL)
    if protocol not in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
        return "only TCP and UDP are dispatched"
    if _connected(sock):
        return "it is connected, so it has one peer already"
    if sock.type == socket.SOCK_STREAM:
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return "it does not listen (yet)"
    elif sock.getsockname()[1] == 0:
        return "it is not bound (yet)"
    device = sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0")
    if device:
        return f"it is bound to the device {device.decode()}, and packets may come by others"
    return None


def _connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def borrow() -> list[Inherited]:
    """Return the inherited sockets, as they are for those who serve them.

    Whether a socket blocks belongs to the socket, not to us: take() changes it
    for its own purposes, and a server that waits in accept() would stop doing so.
    Raises SetupError when there are none.
    """
    count = os.environ.get("LISTEN_FDS", "")
    numbers = range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(count)) if count.isdigit() else ()
    blocking = {number: _blocks(number) for number in numbers}
    try:
        inherited = take()
    except SetupError:
        if count:
            raise
        raise SetupError(
            "no sockets were passed to me: start me from a service with Sockets= "
            "(as dispatch-sockets@.service has it), or use register-pid"
        ) from None
    for one in inherited:
        os.set_blocking(one.socket.fileno(), blocking.get(one.socket.fileno(), True))
    return inherited


def _blocks(number: int) -> bool:
    try:
        return os.get_blocking(number)
    except OSError:
        return True  # it is closed, which take() says better


def register(dispatcher: Dispatcher, chosen: "Sequence[tuple[str, socket.socket]]") -> list[str]:
    """Register sockets under their labels; return a line for each.  All, or none.

    Borrows the sockets.  Raises SetupError for the first one that cannot be registered.
    """
    wanted = []
    for label, sock in chosen:
        if socket_cookie(sock) != dispatcher.place.cookie:
            raise SetupError(
                f"{describe(sock)} belongs to another network namespace than this dispatcher: "
                "use --netns, or open it here"
            )
        wanted += [(label, kind, sock) for kind in kinds(sock)]
    labels = Labels(dispatcher)
    numbers = {label: labels.number(label) for label, _, _ in wanted}
    plan = _Plan(dispatcher)
    try:
        for label, kind, sock in wanted:
            plan.add(numbers[label], label, kind, sock)
    except BaseException:
        plan.undo()
        raise
    return plan.commit()


class _Plan:
    """Fills slots.  Those beyond a destination's count are not looked at until commit()."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._sockets = dispatcher.descriptor("sockets")
        self._rows = dispatcher.destinations()
        self._counts = {number: list(row[1]) for number, row in self._rows.items()}
        self._live: dict[int, dict[tuple[int, int], int]] = {}
        self._filled: list[bytes] = []
        self._lines: list[str] = []

    def add(self, number: int, label: str, kind: int, sock: socket.socket) -> None:
        """Put a socket into a free slot, unless it is in one already."""
        if number not in self._live:
            self._live[number] = live(self._dispatcher, number, self._rows[number][1])
        present = self._live[number]
        cookie = socket_identity(sock)
        domain, protocol = kind_name(kind)
        where = f"{label} {domain} {protocol} sk:{cookie:x} ({describe(sock)})"
        if any(of == kind and one == cookie for (of, _), one in present.items()):
            self._lines.append(f"{where} is registered already")
            return
        slot = next((one for one in range(SLOTS) if (kind, one) not in present), None)
        if slot is None:
            raise SetupError(
                f"{label} has {SLOTS} {domain} {protocol} sockets, which is all that fit: "
                "nothing was registered; unregister it first, or use another label"
            )
        key = U32.pack(slot_index(number, kind, slot))
        self._insert(key, sock)
        present[kind, slot] = cookie
        self._counts[number][kind] = max(self._counts[number][kind], slot + 1)
        self._lines.append(f"registered {where}")

    def _insert(self, key: bytes, sock: socket.socket) -> None:
        value = sock.fileno().to_bytes(8, "little")
        try:
            libbpf.update(self._sockets, key, value, describe(sock))
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.EBUSY):
                raise SetupError(f"{describe(sock)} cannot be registered: {error}") from None
            raise
        self._filled.append(key)

    def undo(self) -> None:
        """Empty again what was filled."""
        for key in self._filled:
            libbpf.delete(self._sockets, key, "slot")

    def commit(self) -> list[str]:
        """Let packets meet the new sockets; return what there is to say."""
        for number, counts in self._counts.items():
            label, before = self._rows[number]
            if tuple(counts) != before:
                self._dispatcher.write_destination(number, label, tuple(counts))
        return self._lines


def unregister(dispatcher: Dispatcher, label: str, kind: int) -> int:
    """Empty all slots of a destination; return how many had a live socket."""
    rows = dispatcher.destinations()
    number = {row[0]: number for number, row in rows.items()}.get(label)
    alive = {} if number is None else live(dispatcher, number, rows[number][1])
    slots = [slot for of, slot in alive if of == kind]
    if number is None or not slots:
        raise SetupError(f"{label} has no {' '.join(kind_name(kind))} socket: see dispatch status")
    counts = list(rows[number][1])
    counts[kind] = 0
    dispatcher.write_destination(number, label, tuple(counts))  # the one step that counts
    for slot in slots:
        key = U32.pack(slot_index(number, kind, slot))
        libbpf.delete(dispatcher.descriptor("sockets"), key, f"slot of {label}")
    return len(slots)


def socket_identity(sock: socket.socket) -> int:
    """Return the number by which the kernel tells sockets apart, for as long as it runs."""
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), "little")


# -- another process's sockets ---------------------------------------------------------


class Rule:
    """Which of a process's sockets get which label.  No address: any; no port: any."""

    __slots__ = ("address", "label", "port", "protocol")

    def __init__(self, label: str, protocol: str, address: str | None, port: int | None) -> None:
        self.label = label
        self.protocol = protocol
        self.address = address
        self.port = port

    def matches(self, sock: socket.socket) -> bool:
        """Whether a socket is meant."""
        kind = socket.SOCK_DGRAM if self.protocol == "udp" else socket.SOCK_STREAM
        if sock.type != kind or sock.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        host, port = sock.getsockname()[:2]
        return self.address in (None, host) and self.port in (None, port)

    def __str__(self) -> str:
        return f"{self.protocol} {self.address or '*'} {self.port or '*'}"


def take_from(pid: int, rules: "Sequence[Rule]") -> list[tuple[str, socket.socket]]:
    """Return copies of the sockets of a process that the rules name, each with its label.

    A socket that several of its descriptors share comes once.  Connections of a
    server are passed over: they have their listener's address.  The caller
    closes what is returned.  Raises SetupError when a rule finds nothing.
    """
    chosen: list[tuple[str, socket.socket]] = []
    missing = set(rules)
    known: set[int] = set()
    for sock in _sockets_of(pid):
        rule = next((one for one in rules if one.matches(sock)), None)
        if rule is None or _connected(sock) or socket_identity(sock) in known:
            sock.close()
            continue
        known.add(socket_identity(sock))
        missing.discard(rule)
        chosen.append((rule.label, sock))
    if missing:
        for _, sock in chosen:
            sock.close()
        raise SetupError(
            f"process {pid} has no socket for {', '.join(sorted(map(str, missing)))}: "
            "is it bound yet? (Type=notify tells when)"
        )
    return chosen


def _sockets_of(pid: int) -> "Iterator[socket.socket]":
    """Yield copies of a process's sockets.

    Tries every number: listing /proc/PID/fd of another user takes CAP_DAC_READ_SEARCH,
    copying only CAP_SYS_PTRACE.
    """
    try:
        pidfd = os.pidfd_open(pid)
        numbers = range(_table_size(pid))
    except OSError as error:
        raise SetupError(f"process {pid}: {error.strerror}") from None
    try:
        for number in numbers:
            try:
                descriptor = libbpf.take_descriptor(pidfd, number)
            except OSError as error:
                if error.errno != errno.EBADF:
                    raise
                continue  # not open
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                yield socket.socket(fileno=descriptor)
            else:
                os.close(descriptor)
    finally:
        os.close(pidfd)


def _table_size(pid: int) -> int:
    """Return a number that is above every descriptor of a process."""
    with open(f"/proc/{pid}/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("FDSize:"))


def read_pid(text: str) -> int:
    """Return a process id: a number, or the path of a file that has it."""
    number = text
    if not number.isdecimal():
        try:
            with open(text, "rb") as file:
                number = file.read(_PID_FILE_OCTETS).decode("ascii", "replace").strip()
        except OSError as error:
            raise SetupError(
                f"{text!r} is not a process id, nor a pid file: {error.strerror}"
            ) from None
    pid = whole_number(number)
    if pid is None or pid > _PID_LIMIT:
        where = "" if number == text else f"{text}: "
        raise SetupError(f"{where}{number[:20]!r} is not a process id")
    return pid
