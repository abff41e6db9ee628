"""Changes what is bound: bind, unbind, and the replacement of all bindings.

Each is one atomic step, made under the lock.  Source of the state: state.py.
"""

import errno
import os

from ..errors import SetupError, say
from . import libbpf
from .labels import Labels, read_counters
from .layout import (
    KEY,
    KINDS,
    RECORDS_IN_USE,
    U32,
    VALUE,
    Entry,
    Table,
    add_all,
    carried_hits,
    keys,
    pack_key,
    pack_value,
    sizes,
    unpack,
)
from .model import Binding, conflict, warnings
from .program import new_trie
from .settings import Settings, read_local_ports
from .state import ZERO, Dispatcher

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CHUNK = 16384  # keys: 0.7 MB for the kernel at a time


def entries(dispatcher: Dispatcher) -> list[Entry]:
    """Return all bindings, in no order."""
    labels = {number: row[0] for number, row in dispatcher.destinations().items()}
    return list(unpack(dispatcher.table(), labels))


def bind(dispatcher: Dispatcher, binding: Binding) -> bool:
    """Add a binding; False when it was there already.  Raises SetupError when it contradicts."""
    settings = dispatcher.settings()
    settings.local_ports = read_local_ports()  # which may be others by now
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
    present = _lookup(dispatcher, key, binding)
    if present is not None:
        labels = {number: row[0] for number, row in dispatcher.destinations().items()}
        [entry] = unpack([(key, present)], labels)
        _refuse(conflict(entry.binding, binding))
        return False
    number = Labels(dispatcher).number(binding.label)
    forget_source(dispatcher, settings)
    # First the size, then the key: a size too many costs time, one too few a binding.
    settings.sizes[binding.kind] |= sizes([key])[binding.kind]
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


def _lookup(dispatcher: Dispatcher, key: bytes, binding: Binding) -> bytes | None:
    """Return the value of a binding's only key: the kernel answers with the longest prefix."""
    value = libbpf.lookup(dispatcher.trie(), key, VALUE.size)
    place = (binding.low, binding.high, binding.prefix)
    return None if value is None or VALUE.unpack(value)[2:5] != place else value


def unbind(dispatcher: Dispatcher, binding: Binding) -> None:
    """Take a binding away; its options do not matter.  Raises SetupError if it is not there."""
    settings = dispatcher.settings()
    if len(keys(binding)) == 1 and not settings.sizes[binding.kind] & RECORDS_IN_USE:
        key = pack_key(binding, binding.low, binding.high)
        value = _lookup(dispatcher, key, binding)
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
    """Put these bindings in force in place of all others, in one step."""
    labels = Labels(dispatcher)
    table: Table = {}
    add_all(table, ((one, pack_value(one, labels.plan(one.label))) for one in bindings))
    settings = dispatcher.settings()
    if len(table) > settings.capacity:
        raise full(settings)
    trie = new_trie(settings.capacity)
    try:
        fill(trie, list(table), list(table.values()))
        labels.write()
        carry_hits(dispatcher, trie, table)
    except OSError:
        os.close(trie)
        raise
    put_in_force(dispatcher, trie, sizes(table), bytes(32))


def carry_hits(dispatcher: Dispatcher, trie: int, table: Table) -> None:
    """Let bindings that stay count on: write their hits into the trie that is to be in force.

    Last of all, since what is counted between this and put_in_force() is lost.
    """
    if not any(lookups(dispatcher)):
        return  # nothing was ever hit; reading a million keys takes its time
    old = libbpf.read_all(dispatcher.trie(), KEY.size, VALUE.size, "bindings", nonzero=True)
    carried = carried_hits(old, table)
    fill(trie, list(carried), list(carried.values()))


def lookups(dispatcher: Dispatcher) -> "Iterator[int]":
    """Yield how many packets each destination won, in no order."""
    for number in dispatcher.destinations():
        for kind in range(KINDS):
            yield read_counters(dispatcher, number, kind)[0]


def fill(trie: int, all_keys: list[bytes], all_values: list[bytes]) -> None:
    """Write keys into a trie that nobody looks at yet."""
    for start in range(0, len(all_keys), CHUNK):
        chunk = all_keys[start : start + CHUNK]
        values = b"".join(all_values[start : start + CHUNK])
        libbpf.update_many(trie, b"".join(chunk), values, len(chunk), "bindings")


def put_in_force(dispatcher: Dispatcher, trie: int, used: list[int], source: bytes) -> None:
    """Let packets meet this trie from now on.  Takes the descriptor."""
    settings = dispatcher.settings()
    settings.source = bytes(32)
    before = settings.sizes
    settings.sizes = [old | new for old, new in zip(before, used, strict=True)]
    settings.local_ports = read_local_ports()  # which may be others by now
    dispatcher.write_settings(settings)
    if any(old not in (0, new) for old, new in zip(before, settings.sizes, strict=True)):
        # A packet that has read the old sizes, and the pointer not yet, must not meet the new trie.
        # Writing the pointer, here to the same trie, waits for those on their way (Linux 5.0).
        _point_to(dispatcher, dispatcher.trie())
    dispatcher.adopt("trie", trie)
    _point_to(dispatcher, trie)
    dispatcher.settle("trie")
    settings.sizes = used
    settings.source = source
    dispatcher.write_settings(settings)


def _point_to(dispatcher: Dispatcher, trie: int) -> None:
    libbpf.update(dispatcher.descriptor("bindings"), ZERO, U32.pack(trie), "bindings")
