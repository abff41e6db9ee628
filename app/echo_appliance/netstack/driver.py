"""Between the loop and the interface: reads frames, lets TCP send, keeps its time.

The only part of the stack that does I/O as it serves.
"""

import select

from ..loop import LITTLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..loop import Loop, Timer
    from .device import Device
    from .interface import Interface
    from .tcp.connection import Connection

# So many frames are taken in before TCP may answer: its acknowledgements are fewer, then, and
# applications read more at a time.  More would only make round trips longer.
FRAMES_PER_TURN = 32
# To find that there is no second frame takes a system call and an exception, 2 us in which the
# first waits for its answer.  So frames are read one by one while they come one by one: until so
# many turns have found what they were to find, and there may be more.
_FULL_TURNS = 4


class Driver:
    """Drives one interface by the frames of one device.  Owns the device."""

    def __init__(
        self,
        loop: "Loop",
        device: "Device",
        interface: "Interface",
        lost: "Callable[[str], None]",
    ) -> None:
        """lost(why) is called when the device gives no more frames."""
        self._loop = loop
        self._device = device
        self._interface = interface
        self._lost = lost
        self._timer: Timer | None = None
        self._due = 0.0
        self._kicked = False
        self._most = 1  # frames per turn
        self._full_turns = 0  # since there was but one frame to read

    def start(self) -> None:
        """Take frames in from now on."""
        self._loop.watch(self._device.descriptor, select.EPOLLIN, self._on_readable)

    def close(self) -> None:
        """Stop, and close the device."""
        self._loop.discard(self._device.descriptor)
        if self._timer is not None:
            self._timer.cancel()
        self._device.close()

    def touch(self, connection: "Connection") -> None:
        """Note that an application did something with it outside of a callback; sent this turn."""
        self._interface.streams.endpoint.touch(connection)
        self.kick()

    def kick(self) -> None:
        """Send, at the end of this turn, what is due since somebody did something.

        Not at once: that somebody may be in the midst of a callback of TCP's.
        """
        if not self._kicked:
            self._kicked = True
            self._loop.call_later(0.0, self._flush)

    def _flush(self) -> None:
        self._kicked = False
        self._interface.flush(self._loop.now)
        self._arm()

    # The hot path: a frame costs one read, one call of receive(), and its share of a flush.
    def _on_readable(self, _events: int) -> None:
        now = self._loop.now
        receive = self._interface.receive
        read = self._device.read
        for count in range(self._most):
            try:  # around this only: an OSError of an application's is not the device's
                taken = read()
            except BlockingIOError:
                if count <= 1:
                    self._most, self._full_turns = 1, 0
                break
            except OSError as error:
                self._fail(str(error.strerror))
                return
            if taken is None:
                self._fail("its other end was closed")
                return
            frame, verified = taken
            receive(frame, now, verified=verified)
        else:
            self._full_turns += 1
            if self._full_turns > _FULL_TURNS:
                self._most = FRAMES_PER_TURN
        self._interface.flush(now)
        self._arm()
        if self._most == 1 and self._loop.brisk and self._device.last_sent <= LITTLE:
            self._loop.linger()

    def _fail(self, why: str) -> None:
        self._loop.discard(self._device.descriptor)
        self._lost(why)

    def _arm(self) -> None:
        """Be woken at the next deadline, or before: a timer that is early looks again."""
        due = self._interface.deadline()
        if due is None:
            return
        if self._timer is not None:
            if self._due <= due:
                return
            self._timer.cancel()
        self._due = due
        self._timer = self._loop.call_later(due - self._loop.now, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        due = self._interface.deadline()
        if due is not None and due <= self._loop.now:
            self._interface.on_deadline(self._loop.now)
        self._arm()
