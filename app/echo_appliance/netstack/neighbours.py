"""Who is where on the link: IP address -> hardware address, for ARP and ND alike.

Bounded and expiring: a link may be full of forgers, so nothing is learned that
was not asked for or that does not concern us, who has never answered makes room
for others first, and each entry holds few waiting packets.  Asking itself is the
caller's: this room knows no message formats, and says only who is to be asked.

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
DELAY_SECONDS = 5.0  # section 10, DELAY_FIRST_PROBE_TIME: before asking who spoke unasked
RETRY_SECONDS = 1.0
TRIES = 3
_NEVER = float("-inf")
_NOT_YET = float("inf")


class State(Enum):
    """What we know of a neighbour."""

    INCOMPLETE = "incomplete"  # asked for; nothing known
    STALE = "stale"  # it said so unasked; used, and asked soon after
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
        self.confirmed_at = _NEVER
        self.ask_at = now  # the next time that we have to
        self.tries = 0
        self.waiting: list[Waiting] = []

    @property
    def has_answered(self) -> bool:
        """Whether it is where it says, as far as one can know."""
        return self.confirmed_at > _NEVER


class Neighbours:
    """The entries of one interface."""

    def __init__(self, limit: int = ENTRIES_LIMIT) -> None:
        self._limit = limit
        self._entries: dict[bytes, Neighbour] = {}
        self._asking: dict[bytes, Neighbour] = {}  # those that time has to look at
        self._ask_at = _NOT_YET  # none of them has to be looked at before
        self._waiting = 0  # packets that do, in all

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> "Iterator[Neighbour]":
        return iter(self._entries.values())

    def find(self, address: bytes, now: float) -> Neighbour:
        """Return the entry of an address that is about to be sent to, made if need be.

        Whether it is_to_be_asked() is for the caller to see to.
        """
        entry = self._entries.get(address)
        if entry is not None and self._is_given_up(entry, now):
            self._drop(entry)  # the timer would, soon: a packet for it would wait in vain
            entry = None
        if entry is None:
            self._make_room()
            entry = self._entries[address] = Neighbour(address, now)
            self._ask(entry, now + RETRY_SECONDS)  # the first time is now, and the caller's
        elif entry.state is State.STALE:
            self._probe(entry, now + DELAY_SECONDS)
        elif entry.state is State.REACHABLE and now - entry.confirmed_at > REACHABLE_SECONDS:
            self._probe(entry, now)
        return entry

    def _is_given_up(self, entry: Neighbour, now: float) -> bool:
        return entry.tries >= TRIES and entry.ask_at <= now and entry.address in self._asking

    def _probe(self, entry: Neighbour, at: float) -> None:
        entry.state = State.PROBING
        entry.ask_at, entry.tries = at, 0
        self._ask(entry, at)

    def _ask(self, entry: Neighbour, at: float) -> None:
        self._ask_at = min(self._ask_at, at) if self._asking else at
        self._asking[entry.address] = entry

    def wait(self, entry: Neighbour, packet: "Waiting") -> None:
        """Keep a packet until the neighbour is known; what finds no room is lost."""
        if len(entry.waiting) < WAITING_LIMIT and self._waiting < WAITING_IN_ALL:
            entry.waiting.append(packet)
            self._waiting += 1

    def to_ask(self, now: float) -> list[Neighbour]:
        """Return those to be asked for now; forget those that did not answer."""
        if now < self._ask_at:
            return []
        due = [one for one in self._asking.values() if one.ask_at <= now]
        due = [one for one in due if self.is_to_be_asked(one, now)]
        self._ask_at = min((one.ask_at for one in self._asking.values()), default=_NOT_YET)
        return due

    def is_to_be_asked(self, entry: Neighbour, now: float) -> bool:
        """Whether to ask for this one now, which is then noted; forget one that did not answer."""
        if entry.ask_at > now or entry.address not in self._asking:
            return False
        if entry.tries >= TRIES:
            self._drop(entry)
            return False
        entry.tries += 1
        entry.ask_at = now + RETRY_SECONDS
        return True

    def deadline(self) -> float | None:
        """When to call to_ask() next, or a bit before: no entry is looked at for that."""
        return self._ask_at if self._asking else None

    def heard(
        self,
        address: bytes,
        hardware: bytes,
        now: float,
        *,
        solicited: bool,
        create: bool = False,
        override: bool = True,
    ) -> "list[Waiting]":
        """Take in what a neighbour says of itself; return the packets that waited for it.

        Somebody unknown is learned only on `create`: when it spoke to us, so that
        an answer is near.  An entry is *confirmed* only by an answer to our asking.
        Without `override` a known address stays what it is, and is asked about.
        """
        entry = self._entries.get(address)
        if entry is None:
            if not create:
                return []
            entry = self.find(address, now)
        solicited = solicited and address in self._asking
        if entry.hardware not in (None, hardware) and not override:
            if entry.state is State.REACHABLE:
                entry.state = State.STALE
            return []
        if entry.hardware == hardware and not solicited:
            return []
        entry.hardware = hardware
        entry.state = State.REACHABLE if solicited else State.STALE
        entry.confirmed_at = now if solicited else _NEVER
        self._asking.pop(address, None)
        waiting, entry.waiting = entry.waiting, []
        self._waiting -= len(waiting)
        return waiting

    def suspect(self, address: bytes) -> None:
        """Ask a neighbour anew, who is used on until it does not answer.

        Not forgotten: a peer that acknowledges nothing casts doubt on a gateway that all others
        use, and would have their packets wait, or get lost, as often as it likes.
        """
        entry = self._entries.get(address)
        if entry is not None and entry.hardware is not None and address not in self._asking:
            self._probe(entry, entry.confirmed_at)

    def _make_room(self) -> None:
        if len(self._entries) >= self._limit:
            # A dictionary's first is the one that came first.
            entries = self._entries.values()
            strangers = (entry for entry in entries if not entry.has_answered)
            self._drop(next(strangers, None) or next(iter(entries)))

    def _drop(self, entry: Neighbour) -> None:
        entry.state = State.GONE
        entry.hardware = None
        self._waiting -= len(entry.waiting)
        entry.waiting.clear()
        self._asking.pop(entry.address, None)
        del self._entries[entry.address]
