"""Labels and what belongs to each: its number, its live sockets, its counters."""

from ..errors import SetupError
from . import libbpf
from .layout import COUNTERS, DESTINATIONS, KINDS, SLOTS, U32, U64, VALUE, slot_index
from .state import Dispatcher

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Labels:
    """Label -> number of its destination.  A number is only given again when nothing has it.

    A label that is bound or has a socket keeps its number; one that has neither
    loses it when numbers run out, with its counters.  A label that is written
    and not used (yet) is harmless: nobody sees it.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._rows = dispatcher.destinations()
        self._numbers = {row[0]: number for number, row in self._rows.items()}
        self._given: set[int] = set()
        self._new: list[str] = []

    def plan(self, label: str) -> int:
        """Return a label's number, which write() makes true; raise SetupError if all are used."""
        number = self._numbers.get(label)
        if number is None:
            number = self._free()
            self._numbers[label] = number
            self._new.append(label)
        self._given.add(number)
        return number

    def write(self) -> None:
        """Give the new labels their numbers in the kernel."""
        for label in self._new:
            clear_counters(self._dispatcher, self._numbers[label])
            self._dispatcher.write_destination(self._numbers[label], label, (0,) * KINDS)
        self._new.clear()

    def number(self, label: str) -> int:
        """Return a label's number, also if it is new."""
        number = self.plan(label)
        self.write()
        return number

    def names(self) -> dict[int, str]:
        """Return the label of each number."""
        return {number: label for label, number in self._numbers.items()}

    def _free(self) -> int:
        taken = set(self._numbers.values())
        if len(taken) == DESTINATIONS:
            self._collect()
            taken = set(self._numbers.values())
        free = next((one for one in range(DESTINATIONS) if one not in taken), None)
        if free is None:
            raise SetupError(
                f"all {DESTINATIONS} labels are in use: nothing was changed; "
                "unbind or unregister some"
            )
        return free

    def _collect(self) -> None:
        """Find the labels that nothing uses any more; write() gives their numbers to others."""
        bound = {VALUE.unpack(value)[1] for _, value in self._dispatcher.table()}
        for label, number in tuple(self._numbers.items()):
            if number not in bound | self._given and not self._live(number):
                del self._numbers[label]

    def _live(self, number: int) -> bool:
        slots = self._rows[number][1] if number in self._rows else ()
        return bool(live(self._dispatcher, number, slots))


def live(
    dispatcher: Dispatcher, number: int, slots: "Sequence[int]"
) -> "dict[tuple[int, int], int]":
    """Return the cookies of a destination's sockets that are open, by kind and slot."""
    sockets = dispatcher.descriptor("sockets")
    found = {}
    for kind in range(KINDS):
        for slot in range(min(slots[kind], SLOTS) if slots else 0):
            cookie = libbpf.lookup(sockets, U32.pack(slot_index(number, kind, slot)), 8)
            if cookie is not None:
                [found[kind, slot]] = U64.unpack(cookie)
    return found


def read_counters(dispatcher: Dispatcher, number: int, kind: int) -> tuple[int, ...]:
    """Return lookups, misses and errors of a destination and kind, of all CPUs together."""
    octets = COUNTERS.size * libbpf.possible_cpus()
    key = U32.pack(number * KINDS + kind)
    value = libbpf.lookup(dispatcher.descriptor("counters"), key, octets)
    return tuple(map(sum, zip(*COUNTERS.iter_unpack(value or bytes(octets)), strict=True)))


def clear_counters(dispatcher: Dispatcher, number: int) -> None:
    """Let a destination count from 0."""
    octets = libbpf.possible_cpus() * COUNTERS.size
    for kind in range(KINDS):
        key = U32.pack(number * KINDS + kind)
        libbpf.update(dispatcher.descriptor("counters"), key, bytes(octets), "counters")
