"""Who is where on the link: IP address -> hardware address, for ARP and ND alike.

Bounded and expiring: a link may be full of forgers, so nothing is learned that
was not asked for or that does not concern us, the oldest entry makes room, and
each entry holds few waiting packets.  Asking itself is the caller's: this room
knows no message formats, and says only who is to be asked.

Source: RFC 4861 section 7 (of its states, those that matter to a host with few
neighbours), RFC 826, RFC 1122 section 2.3.2.
"""

from enum import Enum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    Waiting = tuple[bytes, bytes]  # a frame around the destination, which is not known yet

ENTRIES_LIMIT = 1024
WAITING_LIMIT = 64  # packets per neighbour that is being asked for: a datagram's fragments
WAITING_IN_ALL = 512
REACHABLE_SECONDS = 30.0  # RFC 4861 section 10; confirmed again after that, while in use
RETRY_SECONDS = 1.0
TRIES = 3


class State(Enum):
    """What we know of a neighbour."""

    INCOMPLETE = "incomplete"  # asked for; nothing known
    REACHABLE = "reachable"
    PROBING = "probing"  # known, confirmed too long ago, asked again while it is used on
    GONE = "gone"  # nobody answered, or made room for others


class Neighbour:
    """One entry.  Holders look at `hardware` before each use: None means, ask the cache anew."""

    __slots__ = ("address", "ask_at", "confirmed_at", "hardware", "state", "tries", "waiting")

    def __init__(self, address: bytes, now: float) -> None:
        self.address = address
        self.hardware: bytes | None = None
        self.state = State.INCOMPLETE
        self.confirmed_at = now
        self.ask_at = now  # the next time that we have to
        self.tries = 0
        self.waiting: list[Waiting] = []


class Neighbours:
    """The entries of one interface."""

    def __init__(self, limit: int = ENTRIES_LIMIT) -> None:
        self._limit = limit
        self._entries: dict[bytes, Neighbour] = {}
        self._asking: dict[bytes, Neighbour] = {}  # those that time has to look at
        self._waiting = 0  # packets that do, in all

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> "Iterator[Neighbour]":
        return iter(self._entries.values())

    def find(self, address: bytes, now: float) -> Neighbour:
        """Return the entry of an address that is about to be sent to, made if need be."""
        entry = self._entries.get(address)
        if entry is None:
            self._make_room()
            entry = self._entries[address] = Neighbour(address, now)
            self._asking[address] = entry
        elif entry.state is State.REACHABLE and now - entry.confirmed_at > REACHABLE_SECONDS:
            entry.state = State.PROBING
            entry.ask_at, entry.tries = now, 0
            self._asking[address] = entry
        return entry

    def wait(self, entry: Neighbour, packet: "Waiting") -> None:
        """Keep a packet until the neighbour is known; what finds no room is lost."""
        if len(entry.waiting) < WAITING_LIMIT and self._waiting < WAITING_IN_ALL:
            entry.waiting.append(packet)
            self._waiting += 1

    def to_ask(self, now: float) -> list[Neighbour]:
        """Return those to be asked for now; forget those that did not answer."""
        due = []
        for entry in [one for one in self._asking.values() if one.ask_at <= now]:
            if entry.tries >= TRIES:
                self._drop(entry)
                continue
            entry.tries += 1
            entry.ask_at = now + RETRY_SECONDS
            due.append(entry)
        return due

    def deadline(self) -> float | None:
        """When to call to_ask() next."""
        return min((entry.ask_at for entry in self._asking.values()), default=None)

    def heard(
        self, address: bytes, hardware: bytes, now: float, *, solicited: bool, create: bool = False
    ) -> "list[Waiting]":
        """Take in what a neighbour says of itself; return the packets that waited for it.

        Somebody unknown is learned only on `create`: when it spoke to us, so that
        an answer is near.  An entry is *confirmed* only by an answer to our asking.
        """
        entry = self._entries.get(address)
        if entry is None:
            if not create:
                return []
            entry = self.find(address, now)
        if entry.hardware == hardware and not solicited:
            return []
        entry.hardware = hardware
        entry.confirmed_at = now
        entry.state = State.REACHABLE
        self._asking.pop(address, None)
        waiting, entry.waiting = entry.waiting, []
        self._waiting -= len(waiting)
        return waiting

    def forget(self, address: bytes) -> None:
        """Know nothing of an address any more."""
        entry = self._entries.get(address)
        if entry is not None:
            self._drop(entry)

    def _make_room(self) -> None:
        if len(self._entries) >= self._limit:
            # In use or not: a dictionary's first is the one that came first.
            self._drop(next(iter(self._entries.values())))

    def _drop(self, entry: Neighbour) -> None:
        entry.state = State.GONE
        entry.hardware = None
        self._waiting -= len(entry.waiting)
        entry.waiting.clear()
        self._asking.pop(entry.address, None)
        del self._entries[entry.address]
