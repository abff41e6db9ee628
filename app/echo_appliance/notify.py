"""Tells the service manager how we are: READY, STATUS, STOPPING, WATCHDOG.

All of it does nothing where nobody listens (no NOTIFY_SOCKET).  From inside a
container conmon passes on these four and drops the rest, so nothing else is
used.  Source: sd_notify(3), sd_watchdog_enabled(3).
"""

import os
import socket

from systemd.daemon import notify

from .errors import say
from .metrics import summary
from .text import whole_number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .metrics import Snapshot


class ServiceManager:
    """systemd, or whoever stands in for it (conmon, podman)."""

    def __init__(self) -> None:
        self._socket = _connect()

    def ready(self, serves: str) -> None:
        """The sockets are served from now on."""
        _send(f"READY=1\nSTATUS=serving {serves}")

    def report(self, serves: str, snapshot: "Snapshot") -> None:
        """One line that `systemctl status` shows."""
        self._send_now(f"STATUS=serving {serves}; {summary(snapshot)}")

    def stopping(self, why: str) -> None:
        """No new work is taken; what is open is being finished."""
        _send(f"STOPPING=1\nSTATUS={why}")

    def full(self) -> None:
        """Nothing to tell: what waits in the backlog waits for us."""

    @property
    def cannot_ask(self) -> bool:
        """No: a status line may be as old as the last connection; metrics are asked for."""
        return False

    def alive(self) -> None:
        """Feed the watchdog."""
        self._send_now("WATCHDOG=1")

    @property
    def alive_interval(self) -> float | None:
        """Seconds between two alive() calls, half of WATCHDOG_USEC; None without a watchdog.

        WATCHDOG_PID of another process means that the watchdog is not for us.  In
        a container it is not set: a pid of another namespace would say nothing.
        """
        text = os.environ.get("WATCHDOG_USEC", "")
        if not text:
            return None
        microseconds = whole_number(text)
        if not microseconds:
            say(f"WATCHDOG_USEC={text!r} is not a number of microseconds: no watchdog")
            return None
        if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
            return None
        return microseconds / 2e6

    def _send_now(self, message: str) -> None:
        """Send news that the next news makes old: never wait, nor need a new descriptor."""
        if self._socket is None:
            _send(message)
            return
        try:
            self._socket.send(message.encode())
        except OSError:
            pass  # a manager that does not read (a stopped conmon) must not stop us


def _connect() -> socket.socket | None:
    """Return a socket to the manager; None where libsystemd has to do it, or nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect("\0" + address[1:] if address[0] == "@" else address)
    except OSError:
        sock.close()
        return None
    return sock


def _send(message: str) -> None:
    """Send what must arrive, by libsystemd, waiting if need be."""
    try:
        notify(message)
    except OSError as error:
        # The manager went away, or its socket is not visible here: no reason to stop serving.
        say(f"cannot notify the service manager: {error.strerror}")
