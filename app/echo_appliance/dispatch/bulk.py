"""`load-bindings`: replaces all bindings by those of a file, in one step.

The new trie is made aside, while the old one is in force, and a second thread
fills it while this one still reads; then one pointer is swapped.  Whatever
fails before that changes nothing.
"""

import sys
from itertools import islice

from ..errors import ParseError, SetupError, say
from . import libbpf
from .config import Compiled, parse
from .control import CHUNK, carry_hits, fill, full, put_in_force
from .labels import Labels
from .layout import FIXED_BITS, LAYOUT, RECORD, U32, Table, block_size, own_key, unpack
from .model import Binding, difference, warnings
from .program import new_trie
from .settings import Settings
from .state import Dispatcher

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_THREAD_FROM = 50_000  # entries; below, starting a thread costs more than it saves
_WARNINGS = 10


def read_source(path: str) -> bytes:
    """Return the octets of a file, or of standard input for "-".  Raises SetupError."""
    try:
        if path == "-":
            return sys.stdin.buffer.read()
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise SetupError(f"{path}: {error.strerror}") from None


def load_bindings(dispatcher: Dispatcher, path: str, octets: bytes) -> int | None:
    """Put the bindings of a file in force; return how many keys, None when nothing changed.

    Raises SetupError.
    """
    source = digest(octets)
    settings = dispatcher.settings()
    if settings.source == source:
        return None
    labels = Labels(dispatcher)
    trie = new_trie(settings.capacity)
    try:
        compiled = _compile(path, octets, labels.plan, trie, settings)
        labels.write()
        _warn(compiled, labels, settings)
        carry_hits(dispatcher, trie, compiled.table)
    except BaseException:
        libbpf.close(trie)
        raise
    put_in_force(dispatcher, trie, compiled.sizes, source)
    return len(compiled.table)


def digest(octets: bytes) -> bytes:
    """Return what tells two files apart; it is kept in the kernel, beside what they led to."""
    from hashlib import blake2b

    return blake2b(octets, digest_size=32, person=b"layout %d" % LAYOUT).digest()


def preview(
    dispatcher: Dispatcher, path: str, octets: bytes
) -> tuple[list[Binding], list[Binding]]:
    """Return what a load would take away and add.  Changes nothing."""
    labels = Labels(dispatcher)
    settings = dispatcher.settings()
    compiled = _compile(path, octets, labels.plan, None, settings)
    _warn(compiled, labels, settings)
    old = _identities(dict(dispatcher.table()))
    new = _identities(compiled.table)
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}

    def names(table: Table) -> list[Binding]:
        chosen = ((key, bytes(8) + table[key]) for key in changed if key in table)
        return [entry.binding for entry in unpack(chosen, labels.names())]

    return difference(names(old), names(new))


def _identities(table: Table) -> Table:
    """Return the one key of each binding that is its own whatever others there are: of a range
    of many blocks the record.  Without hits.
    """
    return {key: value[8:] for key, value in table.items() if own_key(key, value) == key}


def _compile(
    path: str, octets: bytes, number: "Callable[[str], int]", trie: int | None, settings: Settings
) -> Compiled:
    compiled = Compiled(number)
    try:
        entries = parse(octets.decode())
        filler = _Filler(trie, settings, threaded=len(entries) >= _THREAD_FROM)
        try:
            compiled.compile_entries(entries, filler.take, CHUNK)
        finally:
            filler.finish()
        filler.check()
    except UnicodeDecodeError as error:
        raise SetupError(f"{path}: not UTF-8 at octet {error.start}") from None
    except ParseError as error:
        raise SetupError(f"{path}: {error}; nothing was changed") from None
    return compiled


class _Filler:
    """Writes keys into a trie, by a thread of its own if that is worth it."""

    def __init__(self, trie: int | None, settings: Settings, threaded: bool) -> None:
        self._trie = trie
        self._settings = settings
        self._count = 0
        self._error: OSError | None = None
        self._thread = None
        if threaded and trie is not None:
            from queue import SimpleQueue
            from threading import Thread

            self._queue: SimpleQueue[tuple[list[bytes], list[bytes]] | None] = SimpleQueue()
            self._thread = Thread(target=self._serve)
            self._thread.start()

    def take(self, keys: list[bytes], values: list[bytes]) -> None:
        """Write these, now or soon.  Raises SetupError where they do not fit."""
        self._count += len(keys)
        if self._count > self._settings.capacity:
            raise full(self._settings)
        if self._trie is None:
            return
        if self._thread is not None:
            self._queue.put((keys, values))
        else:
            fill(self._trie, keys, values)

    def _serve(self) -> None:
        assert self._trie is not None  # noqa: S101
        while (chunk := self._queue.get()) is not None:
            if self._error is None:
                try:
                    fill(self._trie, *chunk)
                except OSError as error:
                    self._error = error

    def finish(self) -> None:
        """Wait until all is written."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def check(self) -> None:
        """Raise what the thread met."""
        if self._error is not None:
            raise self._error


def _warn(compiled: Compiled, labels: Labels, settings: Settings) -> None:
    """Say what people may not have meant; of many such bindings, only the first few."""
    if compiled.masked:
        say(f"dispatch: note: {compiled.masked} prefixes had host bits, which were masked")
    # Only these can draw one: all addresses (no bits of them), or UDP to more than one port.
    everything = U32.pack(FIXED_BITS)
    suspects = (
        (key, value)
        for key, value in compiled.table.items()
        if (key[4] & 2 and (key[4] & RECORD or block_size(key) > 1)) or key.startswith(everything)
    )
    some = unpack(islice(suspects, 40 * _WARNINGS), labels.names())  # a range has up to 31 keys
    lines = (line for entry in some for line in warnings(entry.binding, settings.local_ports))
    for line in islice(lines, _WARNINGS):
        say(f"dispatch: warning: {line}")
    if next(lines, None) is not None:
        say("dispatch: warning: and more of these")
