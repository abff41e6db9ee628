"""Where a dispatcher lives: its pins under a bpffs, one directory per network namespace.

    BPFFS/echo-appliance/lock/          0700: a lock that only its owner can take
    BPFFS/echo-appliance/COOKIE/        0750: link program explain bindings trie ...
    BPFFS/echo-appliance/new-COOKIE/    being built; litter, if nobody holds the lock

The kernel's state is the truth: there is no daemon and no other file.  Every
change is one step of the kernel (a rename, a pointer, a key), so whoever is
killed at any point leaves the old or the new.  Between such a step and the
renaming of the pin that belongs to it, a pin's name ends in -new; whoever
takes the lock next finishes that (`_heal`) or undoes it.

Readers take no lock: what they read is replaced whole.
"""

import os

from ..errors import SetupError
from . import libbpf
from .layout import DESTINATION, KEY, KINDS, LAYOUT, SETTINGS, U32, VALUE, count_bindings
from .place import Place, give_to_owner
from .settings import Settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    Row = tuple[str, tuple[int, ...]]

MAPS = ("bindings", "settings", "destinations", "sockets", "counters", "explained")
ZERO = bytes(4)


class NotLoadedError(SetupError):
    """There is no dispatcher."""


class Dispatcher:
    """What is pinned for one namespace.  Owns descriptors of it, opened when they are needed."""

    def __init__(self, place: Place, write: bool) -> None:
        """Open it.  Raises NotLoadedError when there is none, SetupError when we do not know it.

        To write, hold the lock.
        """
        self.place = place
        self._write = write
        self._open: dict[str, int] = {}
        try:
            self._check_loaded()
            self._check_known()
            if write:
                self._heal()
        except BaseException:
            self.close()  # a sidecar tries again, for ever
            raise

    # -- is it there, and is it ours ------------------------------------------------

    def _check_loaded(self) -> None:
        try:
            # Without its link it is a load or unload that was killed: not there (any more).
            loaded = "link" in os.listdir(self.place.path)
        except FileNotFoundError:
            loaded = False
        except PermissionError:
            raise SetupError(
                f"{self.place.path} is closed to this user: run as its owner or in its group"
            ) from None
        if not loaded:
            self.place.check_bpffs()
            raise self._not_loaded()
        try:
            _, netns = libbpf.link_info(self.descriptor("link"))
        except PermissionError:
            return  # a reader of the group, who cannot know
        if not netns:
            raise self._not_loaded()  # detached, by an unload that was killed

    def _not_loaded(self) -> NotLoadedError:
        return NotLoadedError(
            "no dispatcher is loaded in this network namespace "
            f"(under {self.place.base}): run dispatch load"
        )

    def _check_known(self) -> None:
        _, _, octets, _ = libbpf.map_info(self.descriptor("settings"))
        first = libbpf.lookup(self.descriptor("settings"), ZERO, octets) or ZERO
        layout = U32.unpack_from(first)[0]
        if octets != SETTINGS.size or layout != LAYOUT:
            raise SetupError(
                f"the dispatcher in {self.place.path} is of another version (layout {layout}, "
                f"{octets} octets; this is {LAYOUT}, {SETTINGS.size}): use that version, "
                "or unload and load"
            )
        if self._write:
            self._check_program()

    def _check_program(self) -> None:
        ours = [libbpf.program_info(self.descriptor("program"))[0]]
        if self._exists("program-new"):
            ours.append(libbpf.program_info(self.descriptor("program-new"))[0])
        attached, _ = libbpf.link_info(self.descriptor("link"))
        if attached not in ours:
            raise SetupError(
                f"program {attached} is attached in place of the one pinned in {self.place.path}: "
                "someone else replaced it; unload and load"
            )

    # -- pins ---------------------------------------------------------------------------

    def descriptor(self, name: str) -> int:
        """Return the descriptor of a pin (borrowed)."""
        if name not in self._open:
            readonly = not (self._write or name.startswith(("link", "program")))
            path = f"{self.place.path}/{name}"
            self._open[name] = libbpf.open_pin(path, readonly)
        return self._open[name]

    def adopt(self, name: str, descriptor: int) -> None:
        """Pin a new object as NAME-new and keep its descriptor; settle() gives it its name."""
        pin_for_group(
            descriptor, f"{self.place.path}/{name}-new", readable=name in ("trie", "explain")
        )
        self._open[f"{name}-new"] = descriptor

    def settle(self, name: str) -> None:
        """Let NAME-new take the place of NAME: it is in force."""
        os.rename(f"{self.place.path}/{name}-new", f"{self.place.path}/{name}")
        self._forget(name)
        if f"{name}-new" in self._open:
            self._open[name] = self._open.pop(f"{name}-new")

    def drop(self, name: str) -> None:
        """Undo adopt()."""
        os.unlink(f"{self.place.path}/{name}-new")
        self._forget(f"{name}-new")

    def _forget(self, name: str) -> None:
        if name in self._open:
            os.close(self._open.pop(name))

    def _exists(self, name: str) -> bool:
        return os.path.exists(f"{self.place.path}/{name}")

    def _heal(self) -> None:
        """Finish or undo what someone who was killed began."""
        if self._exists("program-new"):
            attached, _ = libbpf.link_info(self.descriptor("link"))
            in_force = attached == libbpf.program_info(self.descriptor("program-new"))[0]
            if not in_force and self._exists("explain-new"):
                self._finish("explain", False)
            self._finish("program", in_force)
        if self._exists("explain-new"):
            self._finish("explain", True)  # its twin got there
        if self._exists("trie-new"):
            new = libbpf.map_info(self.descriptor("trie-new"))[0]
            self._finish("trie", self._trie_id() == new)

    def _finish(self, name: str, in_force: bool) -> None:
        if in_force:
            self.settle(name)
        else:
            self.drop(name)

    def _trie_id(self) -> int:
        octets = libbpf.lookup(self.descriptor("bindings"), ZERO, 4)
        number: int = U32.unpack(octets or ZERO)[0]
        return number

    def trie(self) -> int:
        """Return the descriptor of the trie in force (borrowed; a reader's until it asks again)."""
        if not self._write:
            self._forget("trie")  # which may be another by now
            self._forget("trie-new")
        if not self._write and self._exists("trie-new"):
            # Someone is replacing it, or was killed: which one is it by now?
            try:
                new = libbpf.map_info(self.descriptor("trie-new"))[0]
            except FileNotFoundError:
                return self.descriptor("trie")
            if new == self._trie_id():
                return self.descriptor("trie-new")
        return self.descriptor("trie")

    def close(self) -> None:
        """Close all descriptors.  What is pinned goes on."""
        for name in tuple(self._open):
            self._forget(name)

    def __enter__(self) -> "Dispatcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- contents -----------------------------------------------------------------------

    def settings(self) -> Settings:
        """Read the settings."""
        octets = libbpf.lookup(self.descriptor("settings"), ZERO, SETTINGS.size)
        return Settings(octets or bytes(SETTINGS.size))

    def write_settings(self, settings: Settings) -> None:
        """Write the settings."""
        libbpf.update(self.descriptor("settings"), ZERO, settings.pack(), "settings")

    def table(self) -> "Iterator[tuple[bytes, bytes]]":
        """Yield the keys and values of the trie in force."""
        return libbpf.read_all(self.trie(), KEY.size, VALUE.size, "bindings")

    def count_bindings(self) -> dict[tuple[int, int], int]:
        """Return how many bindings each destination and kind has."""
        table = (self.trie(), KEY.size, VALUE.size, "bindings")
        return count_bindings(libbpf.read_batches(*table))

    def destinations(self) -> "dict[int, Row]":
        """Return label and slots per kind of each destination, by number."""
        found: dict[int, Row] = {}
        table = (self.descriptor("destinations"), 4, DESTINATION.size, "labels")
        for key, value in libbpf.read_all(*table, nonzero=True):  # a label comes first
            label, slots = DESTINATION.unpack(value)
            number = U32.unpack(key)[0]
            found[number] = (label.rstrip(b"\0").decode(), tuple(slots.to_bytes(KINDS, "little")))
        return found

    def write_destination(self, number: int, label: str, slots: "tuple[int, ...]") -> None:
        """Give a destination its label, and how many of its slots are looked at."""
        value = DESTINATION.pack(label.encode(), int.from_bytes(slots, "little"))
        key = U32.pack(number)
        libbpf.update(self.descriptor("destinations"), key, value, f"label {label}")


def pin_for_group(descriptor: int, path: str, readable: bool) -> None:
    """Pin an object; a group may read maps and ask programs, and gets in by the directory's."""
    libbpf.pin(descriptor, path)
    give_to_owner(path)
    os.chmod(path, 0o640 if readable else 0o600)


def remove(path: str) -> None:
    """Remove a dispatcher's directory.  Its link goes first: from there on it is not there."""
    try:
        link = libbpf.open_pin(f"{path}/link")
    except FileNotFoundError:
        pass
    else:
        # Removing the pin would do the same, but a little later, from a work queue.
        libbpf.detach(link)
        os.close(link)
    for name in sorted(os.listdir(path), key=lambda name: name != "link"):
        os.unlink(f"{path}/{name}")
    os.rmdir(path)


def sweep(base: str) -> None:
    """Remove what killed commands left, and dispatchers of namespaces that are gone.

    To be called with the lock: so whatever is not whole has no owner.
    """
    for name in os.listdir(base):
        path = f"{base}/{name}"
        if name != "lock" and (name.startswith("new-") or _is_dead(path)):
            remove(path)


def _is_dead(path: str) -> bool:
    try:
        link = libbpf.open_pin(f"{path}/link")
    except FileNotFoundError:
        return True
    try:
        return libbpf.link_info(link)[1] == 0
    finally:
        os.close(link)
