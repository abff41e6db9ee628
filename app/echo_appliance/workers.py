"""Several processes that share the inherited sockets, and the one that watches over them.

The supervisor serves nothing but metrics: it forks the workers, starts another
when one dies, adds up their counts, and speaks with the service manager.  Each
worker is an ordinary Service whose manager is its Link: one end of a SEQPACKET
pair.  On it the worker reports its counts, at most once per second and only
while there is news; the supervisor tells it to drain, to look at the backlogs,
or to read its configuration again.  The end of the supervisor is the end of
the link, and so of the worker.
"""

import json
import os
import select
import signal
import socket
import traceback
from time import monotonic

from .errors import SetupError, say
from .loop import Loop
from .metrics import merge, render, without_gauges
from .notify import ServiceManager
from .service import Lifetimes, Service

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .inherit import Inherited
    from .metrics import Snapshot

    # Makes the Service of worker number n, from 0, on the worker's own Loop.
    Build = Callable[[Loop, "Link", int], Service]

REPORT_LIMIT = 128 * 1024
RESTART_SECONDS = 1.0  # a worker that dies younger than this is not replaced at once
READY_SECONDS = 10.0

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_WORD_LIMIT = 16
_DRAIN = b"drain"  # finish what is open within the time of --drain
_IDLE = b"idle"  # the same, without a limit
_LOOK = b"look"  # take what another worker left in a backlog
_RELOAD = b"reload"  # read the configuration again, which the supervisor has found good


class Link:
    """The worker's end: the service manager of the worker's Service.  Owns its socket."""

    cannot_ask = True  # a supervisor's metrics are what it has been told

    def __init__(self, sock: socket.socket, alive_interval: float | None) -> None:
        self.socket = sock
        self.alive_interval = alive_interval

    def ready(self, _serves: str) -> None:
        """The sockets are served by this worker too."""
        self._send({})

    def report(self, _serves: str, snapshot: "Snapshot") -> None:
        """Work came lately, and these are the counts."""
        self._send({"idle": False, "counts": [[*key, value] for key, value in snapshot.items()]})

    def full(self) -> None:
        """What waits in the backlogs is for the others."""
        self._send({"full": True})

    def stopping(self, _why: str) -> None:
        """Nothing to tell: the supervisor asked for it."""

    def alive(self) -> None:
        """The worker's loop turns."""
        self._send({})

    def idle(self) -> None:
        """Nothing is open, and nothing came for the time of --exit-idle."""
        self._send({"idle": True})

    def _send(self, report: dict[str, object]) -> None:
        try:
            self.socket.send(json.dumps(report).encode(), socket.MSG_DONTWAIT)
        except OSError:
            pass  # a supervisor that is gone is noticed by EOF; one that is slow misses old news


class Worker:
    """The supervisor's view of one worker.  Owns its end of the link."""

    def __init__(self, number: int, pid: int, sock: socket.socket) -> None:
        self.number = number
        self.pid = pid
        self.socket = sock
        self.started_at = self.heard_at = monotonic()
        self.idle = False
        self.full = False  # its last word was that it leaves the backlogs to others
        self.counts: Snapshot = {}

    def wait_ready(self) -> None:
        """Block until the worker serves, or died, which its SIGCHLD will tell."""
        self.socket.settimeout(READY_SECONDS)
        try:
            self.hear()
        except TimeoutError:
            say(f"worker {self.pid} is not ready after {READY_SECONDS:.0f} s; going on without")
        self.socket.setblocking(False)

    def hear(self) -> bool:
        """Take in one report; False at the end of the link."""
        report = self.socket.recv(REPORT_LIMIT)
        if not report:
            return False
        self.heard_at = monotonic()
        fields = json.loads(report)
        self.idle = fields.get("idle", self.idle)
        self.full = fields.get("full", False)
        for metric, name, reason, value in fields.get("counts", ()):
            self.counts[(metric, name, reason)] = value
        return True

    def tell(self, word: bytes) -> None:
        """Say _DRAIN, _IDLE, _LOOK or _RELOAD."""
        try:
            self.socket.send(word)
        except OSError:
            pass  # it is dead already

    def abort(self, _reason: str) -> None:
        """End it without asking; its end comes back as SIGCHLD."""
        os.kill(self.pid, signal.SIGKILL)


class Pool:
    """All workers: what the supervisor's Service starts, closes and waits for, and its counts."""

    def __init__(self, size: int, build: "Build", exit_idle: bool) -> None:
        self._size = size
        self._build = build
        self._exit_idle = exit_idle
        self._workers: list[Worker] = []
        self._gone: Snapshot = {}  # what workers had counted that are no more
        self._closing = False
        self._service: Service | None = None
        self._alive_interval: float | None = None
        self.manager = _Manager(self)

    def snapshot(self) -> "Snapshot":
        """Return the sum of the workers' counts, at most a second old."""
        return merge([self._gone, *(worker.counts for worker in self._workers)])

    def page(self) -> str:
        """Return the metrics page of them all."""
        return render(self.snapshot())

    def serve_in(self, service: Service) -> None:
        """Make the supervisor's Service ours."""
        self._service = service
        service.add_source(self)
        service.on_limit = lambda: self._tell_all(_DRAIN)

    @property
    def service(self) -> Service:
        """The supervisor's Service."""
        if self._service is None:
            raise RuntimeError("serve_in() comes first")
        return self._service

    def start(self) -> None:
        """Fork the workers; return when each of them serves."""
        # Asked here, since WATCHDOG_PID names the supervisor.
        self._alive_interval = self.manager.alive_interval
        self.service.loop.on_signal(signal.SIGCHLD, self._reap)
        for number in range(self._size):
            try:
                self._fork(number)
            except OSError as error:
                what = f"worker {number + 1} of {self._size}"
                raise SetupError(f"{what} cannot be started: {error.strerror}") from error
        for worker in self._workers:
            worker.wait_ready()

    def look_again(self) -> None:
        """Nothing to do: the workers are the ones who share."""

    def close(self) -> None:
        """Ask the workers to finish what they have open, and then to end."""
        self._closing = True
        self._tell_all(_IDLE)

    def reload(self) -> None:
        """Let the workers read their configuration again."""
        self._tell_all(_RELOAD)

    def _tell_all(self, word: bytes) -> None:
        for worker in self._workers:
            worker.tell(word)

    def all_heard(self, seconds: float) -> bool:
        """Whether each worker has said something in the last so many seconds."""
        return all(worker.heard_at > monotonic() - seconds for worker in self._workers)

    # -- one worker's life ---------------------------------------------------

    def _replace(self, number: int) -> None:
        if self._closing:
            return
        try:
            self._fork(number)
        except OSError as error:  # no descriptor or no process (TasksMax=) is left
            say(f"a worker cannot be started: {error.strerror}; trying again")
            self.service.loop.call_later(RESTART_SECONDS, lambda: self._replace(number))

    def _fork(self, number: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Until the child has let go of the parent's wakeup pipe, a signal to it would count
        # for the parent.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            raise
        if pid == 0:
            ours.close()  # or the link would never end
            os._exit(self._work(number, theirs))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        theirs.close()
        ours.setblocking(False)
        worker = Worker(number, pid, ours)
        self._workers.append(worker)
        self.service.opened(worker)
        self.service.loop.watch(ours.fileno(), select.EPOLLIN, lambda _: self._hear(worker))

    def _work(self, number: int, theirs: socket.socket) -> int:
        """Be a worker, in the forked process; return its exit status."""
        try:
            self.service.loop.abandon()
            # systemd and terminals signal every process; only the supervisor decides on it.
            for ignored in _SIGNALS:
                signal.signal(ignored, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            loop = Loop()
            link = Link(theirs, self._alive_interval)
            service = self._build(loop, link, number)
            service.on_idle = link.idle

            def on_link(_events: int) -> None:
                try:
                    word = theirs.recv(_WORD_LIMIT)
                except ConnectionResetError:  # it died with a report unread
                    word = b""
                if word == _DRAIN:
                    service.drain("asked to", service.lifetimes.drain)
                elif word == _IDLE:
                    service.drain("idle")
                elif word == _LOOK:
                    service.look_again()
                elif word == _RELOAD:
                    service.on_reload()
                else:
                    loop.stop()  # the supervisor is gone: nobody waits for what is open

            loop.watch(theirs.fileno(), select.EPOLLIN, on_link)
            return service.run()
        except BaseException:  # noqa: BLE001 - a fork must never return into the supervisor's stack
            traceback.print_exc()
            return 1

    def _hear(self, worker: Worker) -> None:
        try:
            heard = worker.hear()
        except BlockingIOError:
            return
        except OSError:
            heard = False
        if not heard:
            self.service.loop.forget(worker.socket.fileno())
            return
        if worker.full:
            for other in self._workers:
                if other is not worker:
                    other.tell(_LOOK)
        if not worker.idle:
            self.service.touch()
        elif self._exit_idle and all(one.idle for one in self._workers):
            self.service.drain("idle")

    def _reap(self) -> None:
        for worker in tuple(self._workers):
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if pid:
                self._bury(worker, os.waitstatus_to_exitcode(status))

    def _bury(self, worker: Worker, exit_code: int) -> None:
        loop = self.service.loop
        self._workers.remove(worker)
        self._gone = merge([self._gone, without_gauges(worker.counts)])
        loop.discard(worker.socket.fileno())
        worker.socket.close()
        if not self._closing:
            how = f"signal {-exit_code}" if exit_code < 0 else f"exit status {exit_code}"
            say(f"worker {worker.pid} ended by {how}; starting another")
            age = monotonic() - worker.started_at
            delay = 0.0 if age > RESTART_SECONDS else RESTART_SECONDS
            loop.call_later(delay, lambda: self._replace(worker.number))
        self.service.closed(worker)


class _Manager(ServiceManager):
    """Feeds the watchdog only while every worker turns, for a hung one serves nobody."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self._pool = pool

    def alive(self) -> None:
        if self._pool.all_heard(2 * (self.alive_interval or 0.0)):
            super().alive()
        else:
            say("a worker does not answer: the watchdog is not fed")


def supervise(
    size: int,
    build: "Build",
    lifetimes: Lifetimes,
    serves: str,
    metrics: "Sequence[Inherited]",
    reload: "Callable[[], bool] | None" = None,
) -> int:
    """Serve in `size` workers until drained; return the exit status.

    build() is called in each worker, with sockets that all of them share;
    reload() here on SIGHUP, and if that was good, on_reload() in each worker.
    """
    pool = Pool(size, build, exit_idle=lifetimes.exit_idle > 0)
    # A second more than the workers, which abort what is open when their own time is up.
    patience = Lifetimes(drain=lifetimes.drain + 1.0, start_sleep=lifetimes.start_sleep)
    loop = Loop()
    service = Service(loop, pool.manager, pool, patience, f"{serves} in {size} workers")
    if metrics:  # first, so that workers know what to let go of
        from .metrics_http import serve_metrics

        for inherited in metrics:
            serve_metrics(service, inherited, pool)
    pool.serve_in(service)
    service.obey_signals()
    if reload is not None:
        check = reload

        def on_hangup() -> None:
            if check():
                pool.reload()

        loop.on_signal(signal.SIGHUP, on_hangup)
    return service.run()
