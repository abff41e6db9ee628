"""Which network namespace, which bpffs, and the lock: where a dispatcher lives.

A namespace is known by its cookie, which is never given twice; its inode is.
"""

import _socket  # why not socket: see model.py
import errno
import fcntl
import os
import stat
import time

from ..errors import SetupError
from . import libbpf
from .layout import U64

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

NAME = "echo-appliance"
# What counts is not the version: BPF may be left out of a kernel, or be put into an older one.
NEEDED = "dispatch needs a kernel with BPF sk_lookup and SO_NETNS_COOKIE, as Linux has since 5.14"

_SO_NETNS_COOKIE = 71
_SELF_NETNS = "/proc/self/ns/net"


class Place:
    """A network namespace, and the directory under a bpffs where its dispatcher is pinned."""

    __slots__ = ("base", "bpffs", "cookie", "netns", "path")

    def __init__(self, bpffs: str, netns: str | None) -> None:
        """Enter the namespace, if it is another one than ours.  Raises SetupError."""
        self.netns = _enter(netns)
        self.bpffs = bpffs
        self.base = f"{bpffs}/{NAME}"
        self.cookie = netns_cookie()
        self.path = f"{self.base}/{self.cookie}"

    def check_bpffs(self) -> None:
        """Raise SetupError where pins would not be pins."""
        if _filesystem(self.bpffs) != "bpf":
            raise SetupError(
                f"{self.bpffs} is not a bpffs: mount -t bpf -o mode=755 bpf {self.bpffs}, "
                "or give --bpffs PATH"
            )

    def make_base(self) -> None:
        """See that the directory of all dispatchers is there.  Raises SetupError if it is a trap.

        Who owns it owns what is pinned in it (give_to_owner), and so decides where packets go.
        """
        umask = os.umask(0o022)  # or readers of a group would not get through
        try:
            os.mkdir(self.base)
        except FileExistsError:
            owner = os.lstat(self.base).st_uid
            if self.is_open_to_all() and owner not in (0, os.geteuid()):
                raise SetupError(
                    f"{self.base} belongs to user {owner}, and anybody may have made it: remove "
                    f"it, and let only root write to the bpffs (chmod o-w {self.bpffs})"
                ) from None
        finally:
            os.umask(umask)

    def is_open_to_all(self) -> bool:
        """Whether any user may pin in the bpffs, as in one that is mounted without options."""
        return bool(os.stat(self.bpffs).st_mode & stat.S_IWOTH)


def netns_cookie() -> int:
    """Return the cookie of the network namespace that we are in (Linux 5.14)."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    try:
        return socket_cookie(sock)
    finally:
        sock.close()


def socket_cookie(sock: "socket.socket | _socket.socket") -> int:
    """Return the cookie of the network namespace that a socket belongs to."""
    try:
        octets = sock.getsockopt(_socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        raise SetupError(f"{NEEDED}; this is {os.uname().release}") from None
    cookie: int = U64.unpack(octets)[0]
    return cookie


def _enter(path: str | None) -> int:
    try:
        netns = os.open(path or _SELF_NETNS, os.O_RDONLY | os.O_CLOEXEC)
        if path is not None and not os.path.samestat(os.fstat(netns), os.stat(_SELF_NETNS)):
            libbpf.enter_netns(netns)
    except OSError as error:
        if error.errno == errno.EPERM:
            raise SetupError(f"--netns {path}: entering it needs CAP_SYS_ADMIN") from None
        raise SetupError(f"--netns {path}: {error.strerror}") from None
    return netns


def _filesystem(path: str) -> str:
    """Return the type of the file system that a path is on, by /proc/self/mountinfo."""
    path = os.path.realpath(path)
    best, kind = "", ""
    # Some mount may have a name that is no text, or one with spaces.
    with open("/proc/self/mountinfo", errors="surrogateescape") as lines:
        for line in lines:
            words, _, rest = line.partition(" - ")
            mount = _unescape(words.split(" ")[4])
            inside = path == mount or path.startswith(mount.rstrip("/") + "/")
            if inside and len(mount) >= len(best):  # of mounts on each other, the last is seen
                best, kind = mount, rest.split()[0]
    return kind


def _unescape(text: str) -> str:
    """Return a name of /proc/self/mountinfo as it is: white space and backslashes are in octal."""
    first, *rest = text.split("\\")
    return first + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)


class BusyError(SetupError):
    """Another command holds the lock."""


class Lock:
    """Of all dispatch commands on one bpffs, one changes things at a time."""

    def __init__(self, place: Place, wait: float) -> None:
        self._place = place
        self._path = f"{place.base}/lock"
        self._wait = wait
        self._descriptor = -1

    def __enter__(self) -> "Lock":
        self._place.make_base()
        try:
            # Nobody else can open it, so nobody who may only read can make writers wait.
            os.mkdir(self._path, 0o700)
            give_to_owner(self._path)
        except FileExistsError:
            pass
        self._descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        deadline = time.monotonic() + self._wait
        while not self._try():
            if time.monotonic() > deadline:
                os.close(self._descriptor)
                raise BusyError(
                    f"another dispatch command has held {self._path} for {self._wait:g} s: "
                    f"let it end (fuser {self._path} names it), or give --wait SECONDS"
                )
            time.sleep(0.01)
        return self

    def _try(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def give_to_owner(path: str) -> None:
    """Let what root makes belong to whom its directory does: a sidecar that is not root goes on."""
    directory = os.stat(os.path.dirname(path))
    if directory.st_uid != os.geteuid():
        # Never what a link leads to: that owner may have put one in the way.
        os.chown(path, directory.st_uid, directory.st_gid, follow_symlinks=False)
