"""The one place that waits: epoll, timers and signals, with plain callbacks.

A handler is called with the epoll events of its descriptor.  Two facts about
epoll shape every handler here (see epoll(7), "Questions and answers"):

* Events are a hint, not a promise.  A handler may close a descriptor whose
  event is still in the batch being served, and an accept() in the same batch
  may be given the same number: the stale event then reaches the new owner.
  So handlers always try the (non-blocking) call and take EAGAIN for an
  answer; none trusts EPOLLHUP alone.
* Registration belongs to the open file description, not to the number.  The
  owner of a descriptor calls forget() first and close() after, or a copy of
  it in another process would keep reporting events that nobody can remove.
  Where there is no copy close() removes it, and drop() spares a system call.

Level-triggered throughout: an event that is not served comes again, so that a
bound on the work done per turn costs nothing but another turn.
"""

import os
import select
import signal
from heapq import heapify, heappop, heappush
from time import monotonic

TYPE_CHECKING = False  # importing typing costs 3 ms of the first client's wait
if TYPE_CHECKING:
    from collections.abc import Callable

LINGER = 50e-6  # seconds: about what it takes to be put to sleep and woken
# Octets: whoever was sent no more may answer at once.  Who was sent more has work to do first, and
# may do it the faster for a processor that is not kept busy: lingering cost streams a tenth.
LITTLE = 4096
# Events come one by one while turns have so few, and that many of them in a row.  With more, a loop
# that sleeps wakes to several at once, which costs it and those that it serves less for each.
FEW, CALM = 2, 32
SKIPPED_MOST = 1023  # of what linger() is asked, where looking was in vain time and again
EVENTS_PER_TURN = 64  # select.epoll allocates room for these at every turn


class Timer:
    """One call in the future; cancel() is allowed at any time, also from the call itself."""

    __slots__ = ("_callback", "_loop", "_when")

    def __init__(self, loop: "Loop", when: float, callback: "Callable[[], None]") -> None:
        self._loop = loop
        self._when = when
        self._callback: Callable[[], None] | None = callback

    def __lt__(self, other: "Timer") -> bool:
        return self._when < other._when

    def cancel(self) -> None:
        """Make sure that the call does not happen (any more)."""
        if self._callback is not None:
            self._callback = None
            self._loop._timer_cancelled()

    def _fire(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()


class Loop:
    """Waits for descriptors, timers and signals, and calls their handlers, until stop()."""

    def __init__(self) -> None:
        self.now = monotonic()  # seconds, read once per turn: what handlers measure time by
        self.turn = 0  # how often the loop has waited
        self.brisk = False  # whether events come one by one, and this turn's came within LINGER
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._timers: list[Timer] = []
        self._cancelled = 0
        self._signals: dict[int, Callable[[], object]] = {}
        self._stopped = False
        self._crowded = 0  # the last turn that had more than FEW events
        self._lingers = False
        self._skipped = 0  # the next so many linger() count for nothing
        self._vain = 0  # how many did, after the last look that was in vain

    # -- descriptors ---------------------------------------------------------

    def watch(self, descriptor: int, events: int, handler: "Callable[[int], None]") -> None:
        """Call handler(events) whenever the descriptor is ready.  Borrows the descriptor."""
        self._epoll.register(descriptor, events)
        self._handlers[descriptor] = handler

    def rewatch(self, descriptor: int, events: int) -> None:
        """Change what a watched descriptor is watched for (not with EPOLLEXCLUSIVE)."""
        self._epoll.modify(descriptor, events)

    def forget(self, descriptor: int) -> None:
        """Undo watch().  To be called before the descriptor is closed."""
        del self._handlers[descriptor]
        self._epoll.unregister(descriptor)

    def drop(self, descriptor: int) -> None:
        """Undo watch() of a descriptor that has no copy anywhere, and is closed next."""
        del self._handlers[descriptor]

    def discard(self, descriptor: int) -> None:
        """Undo watch() if that has not been done yet."""
        if descriptor in self._handlers:
            self.forget(descriptor)

    # -- timers --------------------------------------------------------------

    def call_later(self, delay: float, callback: "Callable[[], None]") -> Timer:
        """Call callback() once, delay seconds after this turn's `now`."""
        timer = Timer(self, self.now + delay, callback)
        heappush(self._timers, timer)
        return timer

    def _timer_cancelled(self) -> None:
        # A cancelled timer stays in the heap until its time comes.  With a long idle timeout
        # and short connections those would pile up: sweep when they are the greater part.
        self._cancelled += 1
        if self._cancelled > 64 and self._cancelled * 2 > len(self._timers):
            self._timers = [timer for timer in self._timers if timer._callback is not None]
            heapify(self._timers)
            self._cancelled = 0

    def _fire_timers(self) -> None:
        timers = self._timers
        while timers and timers[0]._when <= self.now:
            timer = heappop(timers)
            if timer._callback is None:
                self._cancelled -= 1
            timer._fire()
            timers = self._timers  # a cancel() inside may have swept the heap

    def _timeout(self) -> float:
        """Seconds until the next timer; -1 for ever."""
        while self._timers and self._timers[0]._callback is None:
            heappop(self._timers)
            self._cancelled -= 1
        if not self._timers:
            return -1
        rest = self._timers[0]._when - monotonic()
        return rest if rest > 0.0 else 0.0

    # -- signals -------------------------------------------------------------

    def on_signal(self, number: int, handler: "Callable[[], object]") -> None:
        """Call handler() in the loop when the signal arrives.

        Python runs signal handlers between bytecodes of whatever is running; the
        descriptor of set_wakeup_fd() brings them to our one place instead.
        """
        if not self._signals:
            self._wake_on_signals()
        self._signals[number] = handler
        signal.signal(number, _nothing)

    def _wake_on_signals(self) -> None:
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._wakeup = (reader, writer)
        self.watch(reader, select.EPOLLIN, self._signals_arrived)

    def _signals_arrived(self, _events: int) -> None:
        for number in os.read(self._wakeup[0], 256):
            self._signals[number]()

    # -- the loop ------------------------------------------------------------

    def stop(self) -> None:
        """Let run() return after this turn."""
        self._stopped = True

    def run(self) -> None:
        """Serve events until stop() is called."""
        poll = self._epoll.poll
        handlers = self._handlers
        while not self._stopped:
            since = monotonic()
            ready = (self._lingers and self._look()) or poll(self._timeout(), EVENTS_PER_TURN)
            self.now = monotonic()
            self.turn += 1
            if len(ready) > FEW:
                self._crowded = self.turn
            self.brisk = self.now - since < LINGER and self.turn - self._crowded > CALM
            for descriptor, events in ready:
                try:
                    handler = handlers[descriptor]
                except KeyError:
                    continue  # forgotten in this very turn by an earlier handler
                handler(events)
            if self._timers and self._timers[0]._when <= self.now:
                self._fire_timers()

    def linger(self) -> None:
        """Stay awake for LINGER before the next wait: a handler expects an event by then.

        Each look that was in vain doubles how often nothing comes of this: whoever shares the
        processor with us has no time to answer before we sleep.
        """
        if self._skipped:
            self._skipped -= 1
        else:
            self._lingers = True

    def _look(self) -> list[tuple[int, int]]:
        """Return the events that are there within LINGER; none if there are none."""
        self._lingers = False
        poll = self._epoll.poll
        until = monotonic() + LINGER
        if ready := poll(0, EVENTS_PER_TURN):
            return ready  # it was there: that says nothing of looking for the next
        while not (ready := poll(0, EVENTS_PER_TURN)) and monotonic() < until:
            pass
        self._vain = 0 if ready else min(2 * self._vain + 1, SKIPPED_MOST)
        self._skipped = self._vain
        return ready

    def abandon(self) -> None:
        """In a forked child: let go of all that the parent's loop watches.

        Closes the child's copies.  Nothing is unregistered: parent and child
        have the epoll instance in common, and it is the parent's.
        """
        signal.set_wakeup_fd(-1)
        for number in self._signals:
            signal.signal(number, signal.SIG_DFL)
        for descriptor in self._handlers:
            os.close(descriptor)
        if self._signals:
            os.close(self._wakeup[1])  # its other end is watched, so closed above
        self._epoll.close()

    def close(self) -> None:
        """Give back the loop's own descriptors; the watched ones are their owners' to close."""
        if self._signals:
            signal.set_wakeup_fd(-1)
            for number in self._signals:
                signal.signal(number, signal.SIG_DFL)
            for descriptor in self._wakeup:
                os.close(descriptor)
        self._epoll.close()


def _nothing(_number: int, _frame: object) -> None:
    """Make Python take the signal, so that it reaches the wakeup descriptor."""
