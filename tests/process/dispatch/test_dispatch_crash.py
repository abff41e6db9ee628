"""kill -9 at every step of every changing command: the old or the new, never half, no litter."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from echo_appliance.dispatch import control, libbpf
from echo_appliance.dispatch.model import Binding
from tests.process.dispatch.clients import reached
from tests.process.dispatch.space import Space

PINS = {"bindings", "counters", "destinations", "explain", "explained", "link", "program",
        "settings", "sockets", "trie"}  # fmt: skip

Bindings = set[tuple[str, str, str, str]]


def bound(space: Space) -> Bindings:
    rows = space.ok("bindings", "--json").json
    return {(row["label"], row["protocol"], row["prefix"], str(row["port"])) for row in rows}


def sweep(space: Space, words: tuple[str, ...], check: Callable[[], None]) -> int:
    """Kill the command after one step, after two, ... until it comes to its end."""
    for steps in range(1, 200):
        with space.killed_after(steps, *words) as killed:
            check()
        if not killed:
            return steps
    pytest.fail("it never came to its end")


def assert_tidy(space: Space) -> None:
    """After one more command that changes something there is nothing but what there should be."""
    with space.dispatcher():
        pass  # opened to write: that is when what was left is finished, or undone
    [path] = space.pinned()
    assert {pin.name for pin in path.iterdir()} == PINS


def test_killed_load_is_all_or_nothing(empty: Space) -> None:
    def check() -> None:
        status = empty.run("status")
        if status.status:
            assert "run dispatch load" in status.err
            # What was left is in nobody's way.
            empty.ok("load")
        assert_tidy(empty)
        empty.ok("unload")
        assert empty.pinned() == []

    assert sweep(empty, ("load",), check) > 15


@pytest.mark.parametrize(
    "new",
    [
        pytest.param(("new", "tcp", "127.2.0.0/16", "80"), id="in-place"),
        pytest.param(("new", "tcp", "127.1.0.0/16", "999-2001"), id="range"),
    ],
)
def test_killed_bind_is_all_or_nothing(space: Space, new: tuple[str, str, str, str]) -> None:
    old = {("old", "tcp", "127.1.0.0/16", "1000-2000"), ("old", "udp", "127.1.0.0/16", "53")}
    if new[3] == "80":
        old = {("old", "udp", "127.1.0.0/16", "53")}
    for one in sorted(old):
        space.ok("bind", *one)

    def check() -> None:
        assert bound(space) in (old, old | {new})
        assert_tidy(space)
        space.run("unbind", *new)
        assert bound(space) == old

    assert sweep(space, ("bind", *new), check) > 6


def test_killed_load_bindings_is_all_or_nothing(space: Space, tmp_path: Path) -> None:
    listener = space.tcp()
    assert space.register(("web", listener)).status == 0
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    for number, file in enumerate(files):
        entries = [
            {"label": "web", "prefix": f"127.1.{number}.0/24", "port": port, "protocol": "tcp"}
            for port in (80, "1000-2000", 0)
        ]
        file.write_text(json.dumps({"bindings": entries}))
    states = []
    for file in files:
        space.ok("load-bindings", str(file))
        states.append(bound(space))
    space.ok("load-bindings", str(files[0]))

    def check() -> None:
        before = bound(space)
        assert before in states
        # Packets see the same as readers do.
        number = states.index(before)
        assert reached([listener], f"127.1.{number}.9", 1500) == 0
        assert reached([listener], f"127.1.{1 - number}.9", 1500) is None
        assert_tidy(space)
        assert bound(space) == before
        space.ok("load-bindings", str(files[0]))

    assert sweep(space, ("load-bindings", str(files[1])), check) > 6


def test_killed_upgrade_is_all_or_nothing(space: Space) -> None:
    listener = space.tcp()
    space.ok("bind", "web", "tcp", "127.1.0.0/16", "0")
    assert space.register(("web", listener)).status == 0

    def check() -> None:
        assert reached([listener], "127.1.0.1", 80) == 0
        space.ok("explain", "tcp", "127.1.0.1", "80")
        assert_tidy(space)
        space.ok("explain", "tcp", "127.1.0.1", "80")

    assert sweep(space, ("upgrade",), check) > 10


def test_killed_register_is_all_or_nothing(space: Space) -> None:
    listeners = [space.tcp() for _ in range(3)]
    space.ok("bind", "web", "tcp", "127.1.0.0/16", "0")
    words = ("register-pid", str(os.getpid()), "--label", "web=tcp:127.0.0.1:*")

    def check() -> None:
        [row] = space.ok("status", "--json").json["destinations"]
        assert len(row["sockets"]) in (0, 3)
        met = reached(listeners, "127.1.0.1", 80)
        assert (met is None) == (not row["sockets"])
        assert_tidy(space)
        if row["sockets"]:
            space.ok("unregister", "web", "ipv4", "tcp")

    assert sweep(space, words, check) > 6


def test_killed_unload_is_all_or_nothing(empty: Space) -> None:
    def check() -> None:
        if empty.run("status").status:
            empty.ok("load")
        assert_tidy(empty)

    empty.ok("load")
    assert sweep(empty, ("unload",), check) > 10


def test_packets_that_know_the_old_sizes_only_are_waited_for(
    space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packet reads which sizes are in use, then the pointer to the trie: never old and new.

    Any writing of the pointer, be it to the same trie, waits for packets that are on their way.
    """
    host = Binding("web", "tcp", (0, bytes([127, 1, 0, 1]), 32))
    other = Binding("web", "tcp", (0, bytes([127, 1, 0, 2]), 32))
    network = Binding("web", "tcp", (0, bytes([127, 1, 0, 0]), 24), (80, 80))
    written: list[str] = []
    update = libbpf.update

    def note(descriptor: int, key: bytes, value: bytes, of: str, flags: int = 0) -> None:
        written.append(of)
        update(descriptor, key, value, of, flags)

    def replaced_by(binding: Binding) -> list[str]:
        written.clear()
        control.replace(dispatcher, [binding])
        return [of for of in written if of in ("settings", "bindings")]

    with space.dispatcher() as dispatcher:
        control.replace(dispatcher, [host])
        monkeypatch.setattr(libbpf, "update", note)
        assert replaced_by(other) == ["settings", "bindings", "settings"]
        assert replaced_by(network) == ["settings", "bindings", "bindings", "settings"]
