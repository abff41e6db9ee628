"""`dispatch run`: keeps a file's bindings in force and its inherited sockets registered.

The kernel does the steering; this process may end, and be started again, without
a packet noticing.  It is there to apply the file (again on SIGHUP), to register
sockets before the first packet comes, to keep them registered, and for metrics.

Its inherited sockets are its unit's: it never accepts or reads from them, so
whoever launched it and has them too can start the server when something arrives.
systemd does so only once we have ended: to it, who has the sockets serves them.
Hence `--once`, for a unit that registers and ends beside one that stays.
"""

import os
import signal
import time

from ..errors import SetupError, say
from ..inherit import Inherited, check_metrics
from ..lending import SOCKET_NAME as REPLIES
from ..limits import connection_limit
from ..loop import Loop
from ..metrics import SOCKET_NAME as METRICS
from ..metrics_http import serve_metrics
from ..notify import ServiceManager
from ..service import Lifetimes, Service
from . import program
from .bulk import load_bindings, read_source
from .explain import Steering
from .lender import Lender, check_lender
from .model import parse_label
from .place import BusyError, Lock, Place
from .register import borrow, register
from .state import Dispatcher, NotLoadedError
from .status import metrics_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..metrics import Snapshot

CHECK_SECONDS = 2.0
# Counting a million bindings takes 2 s, in which nothing else is done, and anybody may ask who can
# reach the socket: so what took longer than SLOW seconds stands for so many times as long.
SLOW = 0.1
STANDS = 20


class Sidecar:
    """What is to be in force: a file's bindings, and sockets by their names."""

    def __init__(
        self,
        place: Place,
        config: str | None,
        sockets: list[Inherited],
        lenders: list[Lender],
    ) -> None:
        self._place = place
        self._config = config
        self._lenders = lenders
        self._stale = False  # asked to read the file again, which had to wait
        self._said = ""
        self._counted = ""
        self._counted_until = 0.0
        # A unit's unix and vsock sockets come along; nothing can be steered to those.
        self._sockets = [(parse_label(one.name), one.socket) for one in sockets if one.is_internet]

    def start(self, wait: float) -> None:
        """Load if need be, bind, register.  Raises SetupError: then nothing is announced."""
        self._place.check_bpffs()
        with Lock(self._place, wait):
            try:
                Dispatcher(self._place, write=False).close()
            except NotLoadedError:
                program.load(self._place, program.CAPACITY, None, beside=False)
                say(f"dispatch: loaded into {self._place.path}")
        # Sockets first: a binding without one refuses what comes.
        self.register(wait)
        self.apply(wait)

    def apply(self, wait: float) -> None:
        """Put the file's bindings in force."""
        if self._config is None:
            return
        octets = read_source(self._config)
        with Lock(self._place, wait), Dispatcher(self._place, write=True) as dispatcher:
            count = load_bindings(dispatcher, self._config, octets)
        words = "unchanged" if count is None else f"{count} keys in force"
        say(f"dispatch: {self._config}: {words}")

    def register(self, wait: float) -> None:
        """See that every socket is registered; say what was not."""
        if not self._sockets:
            return
        with Lock(self._place, wait), Dispatcher(self._place, write=True) as dispatcher:
            for line in register(dispatcher, self._sockets):
                if not line.endswith("already"):
                    say(f"dispatch: {line}")

    def reload(self) -> None:
        """On SIGHUP: the file again.  What it says wrong is said, and the old stays in force."""
        try:
            self.apply(0.0)
            self.register(0.0)
            self._stale = False
        except BusyError:
            # Not waited for, since we serve meanwhile: check() comes back to it.
            if not self._stale:
                say("dispatch: something else is changed now; the file is read again after that")
            self._stale = True
        except (SetupError, OSError) as error:
            self._stale = False
            say(f"dispatch: not reloaded: {error}")

    def check(self) -> None:
        """Every few seconds: do what had to wait, and register what someone took out, or a new
        dispatcher lacks.

        Raises SetupError when someone unloaded it, and the sockets are not ours: bindings alone
        would refuse everything, and whoever starts us again has them registered first.
        """
        loaded = os.path.exists(f"{self._place.path}/link")
        if not (loaded or self._sockets):
            raise SetupError("someone unloaded dispatch, and the sockets are not ours to register")
        if self._stale:
            self.reload()
        said, self._said = self._said, ""
        try:
            if loaded:
                self.register(0.0)
            else:
                self.start(0.0)
        except BusyError:
            self._said = said  # something is changed now: look again, serve meanwhile
        except (SetupError, OSError) as error:
            self._said = str(error)
            if self._said != said:  # once, not every CHECK_SECONDS
                say(f"dispatch: {error}")

    def page(self) -> str:
        """Return the page of the socket named metrics: what the kernel counted."""
        began = time.monotonic()
        if began >= self._counted_until:
            self._counted = self._count()
            took = time.monotonic() - began
            self._counted_until = began + STANDS * took if took > SLOW else 0.0
        return self._counted + self._lending_text()

    def _count(self) -> str:
        try:
            with Dispatcher(self._place, write=False) as dispatcher:
                return metrics_text(dispatcher)
        except (SetupError, OSError) as error:
            return f"# {error}\n"  # until check() has seen to it

    def _lending_text(self) -> str:
        """The part of the page that only we know."""
        name = "echo_appliance_dispatch_reply_sockets"
        lent = sum(lender.lent for lender in self._lenders)
        lines = [f"# HELP {name} Sockets that are lent.", f"# TYPE {name} gauge", f"{name} {lent}"]
        refused: dict[str, int] = {}
        for lender in self._lenders:
            for reason, count in lender.refused.items():
                refused[reason] = refused.get(reason, 0) + count
        name += "_refused_total"
        lines += [f"# HELP {name} Sockets that were not lent.", f"# TYPE {name} counter"]
        lines += [f'{name}{{reason="{why}"}} {count}' for why, count in sorted(refused.items())]
        return "\n".join(lines) + "\n"

    def snapshot(self) -> "Snapshot":
        """No connections of our own to count."""
        return {}


def run(place: Place, wait: float, config: str | None, once: bool) -> int:
    """Be the sidecar until SIGTERM; what is in force stays.  Returns the exit status.

    With sockets, with a file, or both.  Once: only set up, and end.
    """
    inherited = borrow() if "LISTEN_FDS" in os.environ else []
    metrics = [one for one in inherited if one.name == METRICS]
    asked = [one for one in inherited if one.name == REPLIES]
    steered = [one for one in inherited if one.name not in (METRICS, REPLIES)]
    check_metrics(metrics)
    check_lender(asked)
    loop = Loop()
    capacity = connection_limit(None) // len(asked) if asked else 0
    lenders = [Lender(loop, one, Steering(place), capacity) for one in asked]
    sidecar = Sidecar(place, config, steered, lenders)
    sidecar.start(wait)
    if once:
        return 0
    names = ", ".join(sorted({one.name for one in steered})) or config or "nothing yet"
    service = Service(loop, ServiceManager(), sidecar, Lifetimes(), f"dispatch to {names}")
    service.obey_signals()
    loop.on_signal(signal.SIGHUP, sidecar.reload)
    for one in metrics:
        one.socket.setblocking(False)  # this one we serve ourselves
        serve_metrics(service, one, sidecar)
    for lender in lenders:
        service.add_source(lender, is_work=False)
    service.add_source(_Watch(loop, sidecar))
    return service.run()


class _Watch:
    """Calls check() now and then: a Source, since it is what the service serves."""

    def __init__(self, loop: Loop, sidecar: Sidecar) -> None:
        self._loop = loop
        self._sidecar = sidecar
        self._closed = False

    def start(self) -> None:
        """Begin."""
        if not self._closed:
            self._loop.call_later(CHECK_SECONDS, self._check)

    def look_again(self) -> None:
        """Nothing to do: there is one sidecar."""

    def close(self) -> None:
        """End."""
        self._closed = True

    def _check(self) -> None:
        if not self._closed:
            self._sidecar.check()
            self.start()
