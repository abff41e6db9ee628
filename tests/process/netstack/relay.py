"""A bad network between two frame descriptors: loss, delay, reorder, duplicates, corruption.

`python -m tests.process.netstack.relay FD FD SEED`, until it is ended.  The same
seed spoils the same frames in the same way.  Delay is 5 ms for each frame, and
25 % of them overtake others by being held back less.
"""

from __future__ import annotations

import os
import random
import select
import sys
import time
from heapq import heappop, heappush

LOSS, DUPLICATES, CORRUPT, REORDER = 0.05, 0.01, 0.001, 0.25
DELAY = 0.005  # seconds


class Relay:
    """Moves frames both ways, and keeps those that are on their way."""

    def __init__(self, one: int, other: int, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - chance that can be repeated
        self._other = {one: other, other: one}
        self._late: list[tuple[float, int, int, bytes]] = []
        self._count = 0
        self._poll = select.poll()
        for descriptor in self._other:
            os.set_blocking(descriptor, False)
            self._poll.register(descriptor, select.POLLIN)

    def run(self) -> None:
        """Relay for ever."""
        while True:
            wait = 1000.0
            if self._late:
                wait = max(0.0, (self._late[0][0] - time.monotonic()) * 1000)
            for descriptor, _ in self._poll.poll(wait):
                self._take(descriptor)
            now = time.monotonic()
            while self._late and self._late[0][0] <= now:
                _, _, descriptor, frame = heappop(self._late)
                self._give(descriptor, frame)

    def _take(self, descriptor: int) -> None:
        for _ in range(64):
            try:
                frame = os.read(descriptor, 65536)
            except BlockingIOError:
                return
            if not frame:
                sys.exit(0)  # the other end of a pair is gone
            chance = self._random.random
            if chance() < LOSS:
                continue
            self._hold(descriptor, frame)
            if chance() < DUPLICATES:
                self._hold(descriptor, frame)

    def _hold(self, descriptor: int, frame: bytes) -> None:
        chance = self._random.random
        if chance() < CORRUPT:
            spoiled = bytearray(frame)
            spoiled[int(chance() * len(spoiled))] ^= 1 << int(chance() * 8)
            frame = bytes(spoiled)
        delay = 0.0 if chance() < REORDER else DELAY
        self._count += 1
        heappush(
            self._late, (time.monotonic() + delay, self._count, self._other[descriptor], frame)
        )

    @staticmethod
    def _give(descriptor: int, frame: bytes) -> None:
        try:
            os.write(descriptor, frame)
        except OSError:
            pass  # a queue is full, or a link down: lost, as in life


if __name__ == "__main__":
    Relay(*map(int, sys.argv[1:4])).run()
