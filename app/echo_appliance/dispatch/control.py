"""Changes a dispatcher: load, unload, upgrade, bind, unbind, replace.

Each is one atomic step, made under the lock.  Source of the state: state.py.
"""

import errno
import os
import time

from ..errors import SetupError, say
from . import libbpf
from .layout import (
    COUNTERS,
    DESTINATIONS,
    FIXED_BITS,
    KEY,
    KINDS,
    RECORDS_IN_USE,
    SLOTS,
    U32,
    U64,
    VALUE,
    Entry,
    Table,
    add_all,
    keys,
    pack_key,
    pack_value,
    size_bit,
    sizes,
    slot_index,
    unpack,
)
from .model import Binding, conflict, warnings
from .state import (
    MAPS,
    ZERO,
    Dispatcher,
    Place,
    Settings,
    new_settings,
    pin_for_group,
    remove,
    sweep,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

OBJECT = os.path.join(os.path.dirname(__file__), "dispatch.bpf.o")
PROGRAM = "echo_dispatch"
EXPLAIN = "echo_explain"  # the same, but counts nothing and tells what it found
CAPACITY = 4_194_304  # keys in a trie; memory is taken as it fills: about 100 octets each
_CHUNK = 16384


# -- the program -----------------------------------------------------------------------


def load(place: Place, capacity: int, group: int | None, beside: bool) -> None:
    """Load the program and attach it to the namespace, with nothing bound.  Needs the lock."""
    place.check_bpffs()
    sweep(place.base)
    if os.path.exists(place.path):
        raise SetupError(
            f"a dispatcher is loaded in this network namespace ({place.path}): "
            "use it, upgrade it or unload it"
        )
    others = [] if beside else _attached(place)
    if others:
        raise SetupError(
            f"sk_lookup program {', '.join(map(str, others))} is attached to this network "
            "namespace, by another bpffs or another tool: unload that, or give --beside"
        )
    new = f"{place.base}/new-{place.cookie}"
    os.mkdir(new, 0o750)
    try:
        _make_private(new, group)
        _build(place, new, new_settings(capacity))
        os.rename(new, place.path)
    except BaseException:
        remove(new)
        raise


def _attached(place: Place) -> list[int]:
    """Return what is attached, and stays: a link whose last holder died goes a little later."""
    deadline = time.monotonic() + 1
    while (found := libbpf.attached(place.netns)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def _make_private(path: str, group: int | None) -> None:
    if group is not None:
        os.chown(path, -1, group)
    os.chmod(path, 0o2750)  # noqa: S103 - what is pinned in it later gets its group, too


def _build(place: Place, path: str, settings: Settings) -> None:
    loaded = load_object({})
    try:
        trie = new_trie(settings.capacity)
        try:
            libbpf.update(loaded.map("bindings"), ZERO, U32.pack(trie), "bindings")
            pin_for_group(trie, f"{path}/trie", readable=True)
        finally:
            os.close(trie)
        libbpf.update(loaded.map("settings"), ZERO, settings.pack(), "settings")
        for name in MAPS:
            pin_for_group(loaded.map(name), f"{path}/{name}", readable=True)
        pin_for_group(loaded.program(PROGRAM), f"{path}/program", readable=False)
        pin_for_group(loaded.program(EXPLAIN), f"{path}/explain", readable=False)
        link = libbpf.attach(loaded.program(PROGRAM), place.netns)
        try:
            # From here on packets meet it, which changes nothing: no bindings, no verdict.
            pin_for_group(link, f"{path}/link", readable=False)
        finally:
            os.close(link)
    finally:
        loaded.close()


def load_object(reuse: dict[str, int]) -> libbpf.Loaded:
    """Load the compiled program into the kernel, with maps that are there already."""
    if not os.path.exists(OBJECT):
        raise SetupError(
            "the BPF program is not compiled: install clang and libbpf's headers "
            "(libbpf-dev, libbpf-devel), then run make bpf, or pip install again"
        )
    return libbpf.Loaded(OBJECT, reuse)


def new_trie(capacity: int) -> int:
    """Return the descriptor of an empty trie."""
    return libbpf.create_trie("trie", KEY.size, VALUE.size, capacity)


def unload(place: Place) -> None:
    """Detach and forget everything.  Needs the lock."""
    if not os.path.exists(f"{place.path}/link"):
        Dispatcher(place, write=False)  # which says why not
    remove(place.path)
    sweep(place.base)


def upgrade(dispatcher: Dispatcher) -> tuple[int, int]:
    """Replace the program by ours, maps and bindings kept; return both programs' ids."""
    loaded = load_object({name: dispatcher.descriptor(name) for name in MAPS})
    try:
        program, explain = os.dup(loaded.program(PROGRAM)), os.dup(loaded.program(EXPLAIN))
    finally:
        loaded.close()
    old, _ = libbpf.link_info(dispatcher.descriptor("link"))
    dispatcher.adopt("program", program)
    dispatcher.adopt("explain", explain)
    libbpf.update_link(dispatcher.descriptor("link"), program)
    dispatcher.settle("program")
    dispatcher.settle("explain")
    return old, libbpf.program_info(program)[0]


# -- bindings --------------------------------------------------------------------------


def entries(dispatcher: Dispatcher) -> list[Entry]:
    """Return all bindings, in no order."""
    labels = {number: row[0] for number, row in dispatcher.destinations().items()}
    return list(unpack(dispatcher.table(), labels))


def bind(dispatcher: Dispatcher, binding: Binding) -> bool:
    """Add a binding; False when it was there already.  Raises SetupError when it contradicts."""
    settings = dispatcher.settings()
    for line in warnings(binding, settings.local_ports):
        say(f"dispatch: warning: {line}")
    simple = len(keys(binding)) == 1
    if simple and not settings.sizes[binding.kind] & RECORDS_IN_USE:
        return _bind_in_place(dispatcher, settings, binding)
    present = entries(dispatcher)
    for entry in present:
        if entry.binding.place == binding.place:
            _refuse(conflict(entry.binding, binding))
            return False
    replace(dispatcher, [*(entry.binding for entry in present), binding])
    return True


def _refuse(why: str | None) -> None:
    if why:
        raise SetupError(why)


def _bind_in_place(dispatcher: Dispatcher, settings: Settings, binding: Binding) -> bool:
    """Write the only key of a binding that shares it with no other."""
    key = pack_key(binding, binding.low, binding.high)
    present = lookup_exact(dispatcher, key)
    if present is not None:
        labels = {number: row[0] for number, row in dispatcher.destinations().items()}
        [entry] = unpack([(key, present)], labels)
        _refuse(conflict(entry.binding, binding))
        return False
    number = Labels(dispatcher).number(binding.label)
    forget_source(dispatcher, settings)
    # First the size, then the key: a size too many costs time, one too few a binding.
    settings.sizes[binding.kind] |= size_bit(binding.low, binding.high)
    dispatcher.write_settings(settings)
    try:
        libbpf.update(dispatcher.trie(), key, pack_value(binding, number), str(binding))
    except OSError as error:
        raise full(settings) if error.errno == errno.ENOSPC else error from None
    return True


def full(settings: Settings) -> SetupError:
    return SetupError(
        f"the table of bindings is full ({settings.capacity} keys): nothing was changed; "
        "unbind some, or unload and load --capacity more"
    )


def lookup_exact(dispatcher: Dispatcher, key: bytes) -> bytes | None:
    """Return the value of this very key: the kernel answers with the longest prefix."""
    value = libbpf.lookup(dispatcher.trie(), key, VALUE.size)
    if value is None or VALUE.unpack(value)[4] != KEY.unpack(key)[0] - FIXED_BITS:
        return None
    return value


def unbind(dispatcher: Dispatcher, binding: Binding) -> None:
    """Take a binding away; its options do not matter.  Raises SetupError if it is not there."""
    settings = dispatcher.settings()
    if len(keys(binding)) == 1 and not settings.sizes[binding.kind] & RECORDS_IN_USE:
        key = pack_key(binding, binding.low, binding.high)
        value = lookup_exact(dispatcher, key)
        labels = {number: row[0] for number, row in dispatcher.destinations().items()}
        if value is None or labels.get(VALUE.unpack(value)[1]) != binding.label:
            raise _not_bound(binding)
        forget_source(dispatcher, settings)
        libbpf.delete(dispatcher.trie(), key, str(binding))
        return
    present = [entry.binding for entry in entries(dispatcher)]
    rest = [one for one in present if one.place != binding.place or one.label != binding.label]
    if len(rest) == len(present):
        raise _not_bound(binding)
    replace(dispatcher, rest)


def _not_bound(binding: Binding) -> SetupError:
    return SetupError(f"{binding} is not bound: dispatch bindings lists what is")


def forget_source(dispatcher: Dispatcher, settings: Settings) -> None:
    """Note that no file describes what is in force."""
    if any(settings.source):
        settings.source = bytes(32)
        dispatcher.write_settings(settings)


def replace(dispatcher: Dispatcher, bindings: "Iterable[Binding]") -> None:
    """Put these bindings in force in place of all others, in one step; hits start from 0."""
    labels = Labels(dispatcher)
    table: Table = {}
    add_all(table, ((one, pack_value(one, labels.plan(one.label))) for one in bindings))
    settings = dispatcher.settings()
    if len(table) > settings.capacity:
        raise full(settings)
    trie = new_trie(settings.capacity)
    try:
        fill(trie, table)
        labels.write()
    except OSError:
        os.close(trie)
        raise
    put_in_force(dispatcher, trie, sizes(table), bytes(32))


def fill(trie: int, table: Table) -> None:
    """Write all keys into a trie that nobody looks at yet."""
    all_keys, all_values = list(table), list(table.values())
    for start in range(0, len(all_keys), _CHUNK):
        chunk = all_keys[start : start + _CHUNK]
        values = b"".join(all_values[start : start + _CHUNK])
        libbpf.update_many(trie, b"".join(chunk), values, len(chunk), "bindings")


def put_in_force(dispatcher: Dispatcher, trie: int, used: list[int], source: bytes) -> None:
    """Let packets meet this trie from now on.  Takes the descriptor."""
    settings = dispatcher.settings()
    settings.source = bytes(32)
    settings.sizes = [old | new for old, new in zip(settings.sizes, used, strict=True)]
    dispatcher.write_settings(settings)
    dispatcher.adopt("trie", trie)
    pointer = U32.pack(trie)
    libbpf.update(dispatcher.descriptor("bindings"), ZERO, pointer, "bindings")
    dispatcher.settle("trie")
    settings.sizes = used
    settings.source = source
    dispatcher.write_settings(settings)


# -- labels ----------------------------------------------------------------------------


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


def clear_counters(dispatcher: Dispatcher, number: int) -> None:
    """Let a destination count from 0."""
    octets = libbpf.possible_cpus() * COUNTERS.size
    for kind in range(KINDS):
        key = U32.pack(number * KINDS + kind)
        libbpf.update(dispatcher.descriptor("counters"), key, bytes(octets), "counters")
