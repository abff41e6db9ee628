"""The program of a dispatcher: load, unload, upgrade.

Each is one atomic step, made under the lock.  Source of the state: state.py.
"""

import os
import time

from ..errors import SetupError
from . import libbpf
from .layout import KEY, U32, VALUE
from .place import Place, give_to_owner
from .settings import Settings, new_settings
from .state import MAPS, ZERO, Dispatcher, pin_for_group, remove, sweep

OBJECT = os.path.join(os.path.dirname(__file__), "dispatch.bpf.o")
PROGRAM = "echo_dispatch"
EXPLAIN = "echo_explain"  # the same, but counts nothing and tells what it found
CAPACITY = 4_194_304  # keys in a trie; memory is taken as it fills: about 100 octets each


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
    give_to_owner(path)
    if group is None:
        return  # a service with RestrictSUIDSGID= may not even try
    os.chown(path, -1, group, follow_symlinks=False)
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
        pin_for_group(loaded.program(EXPLAIN), f"{path}/explain", readable=True)
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
