"""Writes lines to a descriptor that may block, without making the loop wait.

Whoever reads a log may stop reading, and a write to its full pipe then waits.  To
make the descriptor non-blocking is no way out: that belongs to the open file, which
is shared with stderr, a shell, other processes.  So a thread writes, a bounded
number of lines waits for it, and what comes on top is dropped and counted.
"""

import _thread  # what threading adds is of no use here, and takes time to import
import os
import select
from collections import deque

# Of some 150 octets each; of 3 KiB at the most, when names are long and all escapes.
LINES_LIMIT = 1024

LAST_SECONDS = 0.5  # for what is left, when the process is to end


class Lines:
    """Lines on their way to one descriptor.  Borrows it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._waiting: deque[bytes] = deque()
        self._refused = 0  # the loop's count
        self._failed = 0  # and the thread's: "+= 1" is not atomic
        # Locked: the thread has nothing to do.  The loop alone unlocks it, the thread alone locks.
        self._work = _thread.allocate_lock()
        self._work.acquire()
        self._ended = _thread.allocate_lock()
        self._started = False
        self._closing = False

    @property
    def dropped(self) -> int:
        """How many lines were not written."""
        return self._refused + self._failed

    def put(self, line: bytes) -> None:
        """Let a line be written, if there is room for it.

        Of up to PIPE_BUF (4,096) octets it is not torn by what other processes write to a pipe.
        """
        if len(self._waiting) >= LINES_LIMIT or not self._start():
            self._refused += 1
            return
        self._waiting.append(line)
        self._wake()

    def close(self) -> None:
        """Wait until all is written, or LAST_SECONDS have passed."""
        if self._started:
            self._closing = True
            self._wake()
            self._ended.acquire(timeout=LAST_SECONDS)

    def _start(self) -> bool:
        if not self._started:
            self._ended.acquire()
            try:
                _thread.start_new_thread(self._write_all, ())
            except RuntimeError:  # no thread is left (TasksMax=): the next line tries again
                self._ended.release()
                return False
            self._started = True
        return True

    def _wake(self) -> None:
        if self._work.locked():
            self._work.release()

    # -- in the thread ---------------------------------------------------------

    def _write_all(self) -> None:
        while not self._closing or self._waiting:
            self._work.acquire()
            while self._waiting:
                self._write(self._waiting.popleft())
        self._ended.release()

    def _write(self, line: bytes) -> None:
        while line:
            try:
                line = line[os.write(self._descriptor, line) :]
            except BlockingIOError:  # somebody it is shared with made it so
                _wait_for_room(self._descriptor)
            except OSError:  # nobody reads it any more, a full disk
                self._failed += 1
                return


def _wait_for_room(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    poll.poll()
