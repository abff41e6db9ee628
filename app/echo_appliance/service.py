"""The life of a serving process: starting, serving, draining, done.

Every mode gives its listening sockets, datagram sockets and connections to one
Service; it decides when the process is idle, when it stops, and what the
service manager is told.

Why no connection is lost when we exit idle: a connection counts from accept()
on, and exit is decided only while none is open.  One that is not accepted yet
waits in the backlog of a socket that systemd holds too; systemd sees it there
when we are gone and starts us again.  The same is true of datagrams.
"""

import signal
from enum import Enum

from .errors import say
from .metrics import total

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Protocol

    from .loop import Loop
    from .metrics import Snapshot

    class Manager(Protocol):
        """Who is told how we are: notify.ServiceManager, or the supervisor of workers."""

        def ready(self, serves: str) -> None:
            """Serving from now on."""

        def report(self, serves: str, snapshot: Snapshot) -> None:
            """Work came lately, and these are the counts."""

        def stopping(self, why: str) -> None:
            """Finishing what is open."""

        def full(self) -> None:
            """No more connections now; whoever shares the sockets should look."""

        def alive(self) -> None:
            """The loop turns."""

        @property
        def cannot_ask(self) -> bool:
            """Whether it must be told while connections are open what these do."""

        @property
        def alive_interval(self) -> float | None:
            """Seconds between two alive() calls; None when nobody waits for them."""

    class Counts(Protocol):
        """Who knows the numbers: a metrics.Registry, or the sum of several."""

        def snapshot(self) -> Snapshot:
            """The values of this moment."""

        def page(self) -> str:
            """All of it, as Prometheus text."""

    class Source(Protocol):
        """Where new work comes from: a listening or a datagram socket."""

        def start(self) -> None:
            """Begin to take work."""

        def close(self) -> None:
            """Take no more, and close the socket."""

        def look_again(self) -> None:
            """Take what another process that shares the socket left there."""

    class Connection(Protocol):
        """Work that has been taken and is not done yet."""

        def abort(self, reason: str) -> None:
            """End it now, and say so by closed()."""


STATUS_SECONDS = 1.0  # the status line is at most this old


class State(Enum):
    """Where a Service is in its life; it only ever goes down this list."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    DONE = "done"


class Lifetimes:
    """Seconds: to finish in after a signal, to be idle for (0: for ever), to wait at the start."""

    __slots__ = ("drain", "exit_idle", "start_sleep")

    def __init__(self, drain: float = 5.0, exit_idle: float = 0.0, start_sleep: float = 0.0):
        self.drain = drain
        self.exit_idle = exit_idle
        self.start_sleep = start_sleep


class Service:
    """One process's life.  run() returns the exit status."""

    def __init__(
        self,
        loop: "Loop",
        manager: "Manager",
        counts: "Counts",
        lifetimes: Lifetimes,
        serves: str,
        debug: bool = False,
    ) -> None:
        self.loop = loop
        self.lifetimes = lifetimes
        self.active_at = loop.now  # when work last came, by the loop's clock
        self.on_idle: Callable[[], None] = lambda: self.drain("idle")
        self._manager = manager
        self._counts = counts
        self._serves = serves
        self._debug = debug
        self._sources: list[Source] = []
        self._working = 0  # how many of them give work
        self._starters: list[Callable[[], None]] = []
        self._passed: list[Callable[[], None]] = []
        self.on_limit: Callable[[], None] = _nothing
        self.on_reload: Callable[[], None] = _nothing  # in a worker, when its supervisor says so
        self.on_end: Callable[[], None] = _nothing  # when all is over
        self._connections: set[Connection] = set()
        self._state = State.STARTING
        self._exit_status = 0
        self._signalled = False
        self._told_idle = False
        self._idle_watched = False
        self._status_pending = False
        self._reported: Snapshot = {}  # what the manager knows

    # -- what is served ------------------------------------------------------

    def add_source(self, source: "Source", *, is_work: bool = True) -> None:
        """Take work from a source as soon as we serve.  The Service closes it.

        Without any source of real work (metrics are none) the process ends when
        what it has is done.
        """
        self._sources.append(source)
        self._working += is_work
        self._starters.append(source.start)

    def at_start(self, start: "Callable[[], None]") -> None:
        """Call start() as soon as we serve: for connections that were passed as such."""
        self._starters.append(start)
        self._passed.append(start)

    def look_again(self) -> None:
        """Take what other workers left in the sockets that we share."""
        for source in self._sources:
            source.look_again()

    def source_lost(self) -> None:
        """Note that a source can give no work any more."""
        self._working -= 1
        if not self._working:
            self.drain("every socket was shut down", self.lifetimes.drain)

    def opened(self, connection: "Connection") -> None:
        """Wait for this connection before the process ends."""
        self._connections.add(connection)

    def closed(self, connection: "Connection") -> None:
        """Wait for it no longer: it is over, and its descriptor closed."""
        self._connections.discard(connection)
        if not self._connections:
            self._last_closed()

    def touch(self) -> None:
        """Note that work came: we are not idle, and the status line is out of date."""
        self.active_at = self.loop.now
        if self._told_idle:
            # At once: whoever was told may be about to end us for it.
            self._told_idle = False
            self._manager.report(self._serves, self._counts.snapshot())
        if not self._status_pending:
            self._status_pending = True
            self.loop.call_later(STATUS_SECONDS, self._send_status)

    @property
    def connections(self) -> "Iterable[Connection]":
        """Those that are waited for."""
        return self._connections

    @property
    def open(self) -> int:
        """How many connections are waited for."""
        return len(self._connections)

    # -- life ----------------------------------------------------------------

    def obey_signals(self) -> None:
        """Drain on SIGTERM and SIGINT from now on."""
        self.loop.on_signal(signal.SIGTERM, lambda: self._on_signal(signal.SIGTERM))
        self.loop.on_signal(signal.SIGINT, lambda: self._on_signal(signal.SIGINT))

    def run(self) -> int:
        """Serve until drained; return the exit status."""
        if self.lifetimes.start_sleep:
            self.loop.call_later(self.lifetimes.start_sleep, self._start)
        else:
            self._start()
        self.loop.run()
        self.on_end()
        return self._exit_status

    def drain(self, reason: str, limit: float | None = None) -> None:
        """Take nothing new, finish what is open, then end.

        What is still open after `limit` seconds is aborted.  Without a limit it is
        waited for: who connects in the moment of an idle exit is served in full.
        """
        if self._state in (State.STARTING, State.SERVING):
            self._begin_drain(reason)
        if limit is not None and self._state is State.DRAINING:
            self.on_limit()
            self.loop.call_later(limit, self._abort_rest)

    def _begin_drain(self, reason: str) -> None:
        if self._state is State.STARTING:
            for start in self._passed:
                start()  # nobody else will ever serve a connection that was passed to us
        self._set_state(State.DRAINING)
        open_now = total(self._counts.snapshot(), "connections")
        self._manager.stopping(f"{reason}: finishing {open_now} connections")
        for source in self._sources:
            source.close()
        if not self._connections:
            self._finish()

    def _start(self) -> None:
        if self._state is not State.STARTING:
            return  # a signal came during --start-sleep
        self._set_state(State.SERVING)
        for start in self._starters:
            start()
        self._manager.ready(self._serves)
        self.active_at = self.loop.now
        self._feed_watchdog()
        self._watch_idleness()
        if not self._working and not self._connections:
            self._finish()

    def _finish(self) -> None:
        self._set_state(State.DONE)
        self.loop.stop()

    def _set_state(self, state: State) -> None:
        if self._debug:
            say(f"debug: {self._state.value} -> {state.value}")
        self._state = state

    def _abort_rest(self) -> None:
        for connection in tuple(self._connections):
            connection.abort("drain-timeout")

    def _on_signal(self, number: signal.Signals) -> None:
        if self._signalled:
            # Asked twice: whoever asks does not want to wait for what is open.
            self._exit_status = 128 + number
            self._finish()
        else:
            self._signalled = True
            self.drain(number.name, self.lifetimes.drain)

    def _last_closed(self) -> None:
        if self._state is State.DRAINING:
            self._finish()
        elif self._state is State.SERVING and not self._working:
            # We were handed connections only (Accept=yes), and they are served.
            self.drain("all served")
        else:
            self._watch_idleness()

    # -- idleness --------------------------------------------------------------

    def _watch_idleness(self) -> None:
        """Look again when we may have been idle for long enough; one such look at a time."""
        if self.lifetimes.exit_idle and not self._idle_watched:
            self._idle_watched = True
            rest = self.active_at + self.lifetimes.exit_idle - self.loop.now
            self.loop.call_later(max(rest, 0.0), self._check_idleness)

    def _check_idleness(self) -> None:
        self._idle_watched = False
        if self._state is not State.SERVING or self._connections:
            return  # the close of the last connection starts the watch again
        if self.loop.now - self.active_at >= self.lifetimes.exit_idle:
            self._told_idle = True
            self.on_idle()
            if self._state is not State.SERVING:
                return
            self.active_at = self.loop.now
        self._watch_idleness()

    # -- what the service manager is told --------------------------------------

    def _feed_watchdog(self) -> None:
        interval = self._manager.alive_interval
        if interval is not None:
            # From the loop itself, so that a loop that hangs starves it.
            self._manager.alive()
            self.loop.call_later(interval, self._feed_watchdog)

    def _send_status(self) -> None:
        self._status_pending = False
        if self._state is not State.SERVING:
            return
        snapshot = self._counts.snapshot()
        if not self._manager.cannot_ask:
            self._manager.report(self._serves, snapshot)
            return
        if snapshot != self._reported:
            self._reported = snapshot
            self._manager.report(self._serves, snapshot)
        if self._connections:
            self._status_pending = True
            self.loop.call_later(STATUS_SECONDS, self._send_status)


def _nothing() -> None:
    """Nobody wants to know."""
