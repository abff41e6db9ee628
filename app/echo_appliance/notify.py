"""Tells the service manager how we are: READY, STATUS, STOPPING, WATCHDOG.

All of it does nothing where nobody listens (no NOTIFY_SOCKET).  From inside a
container conmon passes on these four and drops the rest, so nothing else is
used.  Source: sd_notify(3), sd_watchdog_enabled(3).
"""

import os

from systemd.daemon import notify

from .errors import say
from .metrics import summary
from .text import whole_number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .metrics import Snapshot


class ServiceManager:
    """systemd, or whoever stands in for it (conmon, podman)."""

    def ready(self, serves: str) -> None:
        """The sockets are served from now on."""
        _send(f"READY=1\nSTATUS=serving {serves}")

    def report(self, serves: str, snapshot: "Snapshot") -> None:
        """One line that `systemctl status` shows."""
        _send(f"STATUS=serving {serves}; {summary(snapshot)}")

    def stopping(self, why: str) -> None:
        """No new work is taken; what is open is being finished."""
        _send(f"STOPPING=1\nSTATUS={why}")

    def alive(self) -> None:
        """Feed the watchdog."""
        _send("WATCHDOG=1")

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


def _send(message: str) -> None:
    try:
        notify(message)
    except OSError as error:
        # The manager went away, or its socket is not visible here: no reason to stop serving.
        say(f"cannot notify the service manager: {error.strerror}")
