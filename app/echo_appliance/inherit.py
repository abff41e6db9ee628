"""Takes the sockets that were passed to us: LISTEN_FDS -> typed Inherited sockets.

Never binds, never listens: a socket is used as it came.  Also takes a socket on
standard input (inetd style, StandardInput=socket), when nothing else was passed.

Source: sd_listen_fds(3), systemd.socket(5), inetd(8).
"""

import fcntl
import os
import socket
import stat

from systemd.daemon import listen_fds_with_names

from .errors import SetupError
from .text import whole_number

FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
INETD_NAME = "stdin"

_LIST_LIMIT = 1024

_HOW_TO = (
    "start me from a systemd .socket unit, or try: "
    "systemd-socket-activate -l 3000 echo-appliance echo"
)
_STREAM_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_VSOCK)
_TYPE_WORDS = {
    socket.SOCK_STREAM: "stream",
    socket.SOCK_DGRAM: "dgram",
    socket.SOCK_SEQPACKET: "seqpacket",
    socket.SOCK_RAW: "raw",
}


class Inherited:
    """A socket that we were handed.  Owns its descriptor; close() once, by whoever serves it."""

    __slots__ = ("connected", "family", "listening", "name", "socket", "type")

    def __init__(self, name: str, sock: socket.socket) -> None:
        self.name = name
        self.socket = sock
        self.family = int(sock.family)
        self.type = int(sock.type)
        self.listening = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        self.connected = _has_peer(sock)

    @property
    def is_dgram(self) -> bool:
        """Whether it is a datagram socket, which has no connections."""
        return self.type == socket.SOCK_DGRAM

    @property
    def is_internet(self) -> bool:
        """Whether its addresses are IPv4 or IPv6 ones."""
        return self.family in (socket.AF_INET, socket.AF_INET6)

    def __str__(self) -> str:
        """In one phrase, as error messages and the log need it."""
        return f"descriptor {self.socket.fileno()} {self.name!r} ({describe(self.socket)})"


class PassedPath:
    """A unix socket's place in the file system, as a descriptor (O_PATH) that we were handed.

    It can be connected to where no path leads to it, and by its inode: a socket
    that takes its place later is another one.  Owns its descriptor.
    """

    __slots__ = ("descriptor", "name")

    def __init__(self, name: str, descriptor: int) -> None:
        self.name = name
        self.descriptor = descriptor

    @property
    def path(self) -> str:
        """What connect() takes to get there."""
        return f"/proc/self/fd/{self.descriptor}"


def take(paths: list[PassedPath] | None = None) -> list[Inherited]:
    """Return every socket that was passed to this process, in descriptor order.

    The sockets become non-blocking and close-on-exec, and LISTEN_* is removed
    from the environment, so that no child takes them for its own.  Places of
    sockets are added to `paths`.

    Raises SetupError when none was passed, or when one cannot be served by any
    mode; without `paths` a place of a socket cannot.
    """
    passed = _passed_descriptors()
    if not passed and _is_socket(0):
        _keep_out_of_the_data()
        passed = [(0, INETD_NAME)]
    if not passed:
        raise SetupError(f"no sockets were passed to me: {_HOW_TO}")
    sockets = []
    for descriptor, name in passed:
        if paths is not None and _is_socket(descriptor) and _is_path(descriptor):
            os.set_inheritable(descriptor, False)
            paths.append(PassedPath(name, descriptor))
        else:
            sockets.append(_inherit(descriptor, name))
    return sockets


def take_apart(name: str) -> tuple[list[int], list[Inherited]]:
    """Return the descriptors of one name, whatever they are, and all others as sockets.

    For modes that serve more than sockets.  Nothing at all need have been passed.
    """
    passed = _passed_descriptors()
    others = [_inherit(descriptor, of) for descriptor, of in passed if of != name]
    return [descriptor for descriptor, of in passed if of == name], others


def _keep_out_of_the_data() -> None:
    """Inetd style, standard output and error are often the connection too: silence them.

    No word of ours may get into the peer's data, and its EOF must not wait for us.
    """
    connection = os.fstat(0).st_ino
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
    except OSError as error:
        raise SetupError(f"{os.devnull} cannot be opened ({error.strerror})") from error
    for descriptor in (1, 2):
        if _is_socket(descriptor) and os.fstat(descriptor).st_ino == connection:
            os.dup2(nowhere, descriptor)
    os.close(nowhere)


def check_metrics(sockets: list[Inherited]) -> None:
    """Raise SetupError unless each of these can serve the metrics page."""
    for inherited in sockets:
        if not (inherited.listening and inherited.type == socket.SOCK_STREAM):
            raise SetupError(
                f"{inherited} cannot serve metrics: pass a listening stream socket by that name"
            )


def describe(sock: socket.socket) -> str:
    """Name a socket's kind and address: 'inet stream 127.0.0.1:3000'."""
    family = (
        sock.family.name[3:].lower()
        if isinstance(sock.family, socket.AddressFamily)
        else (f"family {sock.family}")
    )
    kind = _TYPE_WORDS.get(sock.type, f"type {int(sock.type)}")
    return f"{family} {kind} {format_address(sock.getsockname())}".rstrip()


def describe_all(served: list[Inherited]) -> str:
    """Name what is served: 'demo (inet stream 127.0.0.1:3000), ...'.

    Not all of it when that is much: a notification above 4,096 octets is ignored
    whole by systemd, READY=1 included.
    """
    words = [f"{one.name} ({describe(one.socket)})" for one in served]
    listed = len(words)
    while len(", ".join(words[:listed]).encode()) > _LIST_LIMIT:
        listed -= 1
    more = [f"{len(words) - listed} more"] if listed < len(words) else []
    return ", ".join(words[:listed] + more)


def format_address(address: object) -> str:
    """Return an address as people write it: 127.0.0.1:80, [::1]:80, /path, @abstract, CID:port."""
    if isinstance(address, tuple):
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    if isinstance(address, bytes):
        return "@" + _printable(address[1:])
    return _printable(os.fsencode(str(address or "")))


def _printable(octets: bytes) -> str:
    """Paths are octets, and their owner's choice: no line feed of theirs may end a line of ours."""
    text = octets.decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _passed_descriptors() -> list[tuple[int, str]]:
    """LISTEN_FDS and LISTEN_FDNAMES by libsystemd, with our words for what it refuses.

    It answers each mistake with 0 or a bare errno; a person needs to know which it was.
    """
    text = os.environ.get("LISTEN_FDS")
    if text is None:
        return []
    _check_pid()
    count = whole_number(text)
    if count is None:
        raise SetupError(f"LISTEN_FDS={text!r} is not a number: {_HOW_TO}")
    if count == 0:
        return []
    _check_names(count)
    for descriptor in range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + count):
        _check_open(descriptor, count)
    try:
        return list(listen_fds_with_names(unset_environment=True).items())
    except OSError as error:
        raise SetupError(
            f"LISTEN_FDS and LISTEN_FDNAMES cannot be read ({error.strerror}): {_HOW_TO}"
        ) from error


def _check_pid() -> None:
    pid = os.environ.get("LISTEN_PID", "")
    if pid != str(os.getpid()):
        raise SetupError(
            f"LISTEN_PID is {pid or 'not set'}, but this is process {os.getpid()}: "
            "the sockets were passed to another process; let systemd execute me directly, "
            "without a shell in between"
        )


def _check_names(count: int) -> None:
    text = os.environ.get("LISTEN_FDNAMES")
    if text is None:
        return
    if not (text.isascii() and text.isprintable()):
        raise SetupError(f"LISTEN_FDNAMES={text!a} must be printable ASCII, as systemd's names are")
    names = text.split(":")
    if len(names) != count:
        raise SetupError(
            f"LISTEN_FDNAMES={text!r} has {len(names)} names for {count} descriptors: "
            "give each descriptor one name, with colons between"
        )


def _check_open(descriptor: int, count: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        raise SetupError(
            f"descriptor {descriptor} is closed, though LISTEN_FDS={count} promises it: "
            "whatever started me must leave it open"
        ) from None


def _inherit(descriptor: int, name: str) -> Inherited:
    where = f"descriptor {descriptor} {name!r}"
    if _is_path(descriptor):
        raise SetupError(
            f"{where} is a path (O_PATH), not an open socket: only forward's targets fd:NAME "
            "can be that, and of unix sockets"
        )
    if not _is_socket(descriptor):
        raise SetupError(
            f"{where} is {_file_kind(descriptor)}, not a socket: "
            "pass sockets only (ListenStream=, ListenDatagram=, ListenSequentialPacket=)"
        )
    sock = socket.socket(fileno=descriptor)
    sock.setblocking(False)
    os.set_inheritable(descriptor, False)
    inherited = Inherited(name, sock)
    _check_servable(inherited)
    return inherited


def _check_servable(inherited: Inherited) -> None:
    """Refuse what no mode can serve, before READY=1, in words."""
    sock = inherited.socket
    if inherited.type == socket.SOCK_STREAM and inherited.family in _STREAM_FAMILIES:
        known = True
    elif inherited.type == socket.SOCK_SEQPACKET:
        known = inherited.family in (socket.AF_UNIX, socket.AF_VSOCK)
    elif inherited.type == socket.SOCK_DGRAM:
        known = inherited.family == socket.AF_UNIX or (
            inherited.is_internet and sock.proto in (socket.IPPROTO_UDP, socket.IPPROTO_UDPLITE)
        )
    else:
        known = False
    if not known:
        raise SetupError(
            f"{inherited} cannot be served: pass stream, seqpacket or dgram sockets of "
            "unix, inet, inet6 or vsock"
        )
    if not (inherited.is_dgram or inherited.listening or inherited.connected):
        raise SetupError(
            f"{inherited} is neither listening nor connected: call listen() before passing it "
            "(systemd does for ListenStream=)"
        )


def _has_peer(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        # ENOTCONN; also EINVAL from a connection that was reset before we came, which
        # is still to be served: reading it will say so.
        return sock.type == socket.SOCK_STREAM and _was_connected(sock)
    return True


def _was_connected(sock: socket.socket) -> bool:
    """Tell a stream whose peer is gone already from one that was never connected.

    Only TCP and vsock lose the peer's name; there, recv() on a socket that never
    had a peer fails with ENOTCONN, on one that had it does not.
    """
    try:
        sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except ConnectionError:
        return True
    except OSError:
        return False
    return True


def _is_socket(descriptor: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError:
        return False


def _is_path(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_PATH)


def _file_kind(descriptor: int) -> str:
    mode = os.fstat(descriptor).st_mode
    kinds = (
        (stat.S_ISREG, "a file"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    )
    return next((words for test, words in kinds if test(mode)), "an anonymous kernel object")
