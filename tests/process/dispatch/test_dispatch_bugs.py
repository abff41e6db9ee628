"""Tubular's twelve bugs, as they were reproduced, each a test of ours."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from echo_appliance.dispatch.labels import Labels
from echo_appliance.dispatch.layout import DESTINATIONS
from tests.process.dispatch.clients import QUIET, reached, received
from tests.process.dispatch.space import Space


def test_bug_1_a_label_never_gets_the_traffic_of_one_that_died(space: Space) -> None:
    first, second = space.tcp(), space.tcp()
    assert space.register(("a", first)).status == 0
    first.close()
    assert space.register(("b", second)).status == 0
    space.ok("bind", "a", "tcp", "127.1.0.0/16", "0")
    assert reached([second], "127.1.0.1", 80) is None


def test_bug_2_an_ipv6_binding_catches_no_ipv4(space: Space) -> None:
    listener, normal = space.tcp("::", dualstack_ipv6=True), space.tcp("127.0.0.1", 8080)
    space.ok("bind", "web", "tcp", "::/0", "8080")
    assert space.register(("web", listener)).status == 0
    assert reached([listener, normal], "127.0.0.1", 8080) == 1
    assert reached([listener, normal], "::1", 8080) == 0


def test_bug_3_stale_labels_do_not_fill_the_table(space: Space) -> None:
    with space.dispatcher() as dispatcher:
        labels = Labels(dispatcher)
        for number in range(DESTINATIONS):
            labels.number(f"stale-{number}")
    assert space.ok("status", "--json").json["destinations"] == []
    listener = space.tcp()
    space.ok("bind", "fresh", "tcp", "127.1.0.0/16", "80")
    assert space.register(("fresh", listener)).status == 0
    assert reached([listener], "127.1.0.1", 80) == 0


def test_bug_3_labels_in_use_are_never_collected(space: Space) -> None:
    listener = space.tcp()
    assert space.register(("socket", listener)).status == 0
    entries = [
        {"label": f"l{number}", "prefix": f"127.2.{number >> 8}.{number & 255}", "port": 80}
        for number in range(DESTINATIONS - 1)
    ]
    space.ok("load-bindings", "-", stdin=json.dumps({"bindings": entries}))
    before = space.ok("status", "--json").json
    assert f"all {DESTINATIONS} labels are in use" in space.fails(
        "bind", "more", "tcp", "127.1.0.0/16", "80"
    )
    assert space.ok("status", "--json").json == before
    space.ok("unbind", "l7", "tcp", "127.2.0.7", "80")
    space.ok("unbind", "l7", "udp", "127.2.0.7", "80")
    space.ok("bind", "more", "tcp", "127.1.0.0/16", "80")
    assert reached([listener], "127.1.0.1", 80) is None


def test_bug_4_a_reuseport_group_outlives_its_registered_member(space: Space) -> None:
    first = space.tcp("127.0.0.1", 0, reuse_port=True)
    others = [space.tcp("127.0.0.1", first.getsockname()[1], reuse_port=True) for _ in range(2)]
    space.ok("bind", "web", "tcp", "127.1.0.0/16", "0")
    # The whole group, by one address: as the processes of a server have it.
    pid, port = str(os.getpid()), str(first.getsockname()[1])
    space.ok("register-pid", pid, "web", "tcp", "127.0.0.1", port)
    [row] = space.ok("status", "--json").json["destinations"]
    assert len(row["sockets"]) == 3
    first.close()
    hits = [reached(others, "127.1.0.1", number) for number in range(1, 41)]
    assert set(hits) == {0, 1}


def test_bug_5_a_namespace_is_known_by_what_is_never_given_twice(empty: Space) -> None:
    empty.ok("load")
    with empty.dispatcher() as dispatcher:
        cookie, inode = dispatcher.place.cookie, os.fstat(dispatcher.place.netns).st_ino
    assert cookie != inode
    assert [path.name for path in empty.pinned()] == [str(cookie)]


def test_bug_5_what_is_left_of_a_dead_namespace_is_swept(empty: Space) -> None:
    # A dispatcher of a namespace that ends with the process that lives in it.
    load = empty.command("load")
    subprocess.run(["unshare", "--net", *load], check=True, capture_output=True)
    assert len(empty.pinned()) == 1
    empty.wait_until_dead()
    empty.ok("load")
    with empty.dispatcher() as dispatcher:
        assert [path.name for path in empty.pinned()] == [str(dispatcher.place.cookie)]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"label": "", "prefix": "127.3.0.0/16", "port": 80}, "bindings[1]: a label must not be"),
        ({"label": "x", "prefix": "::ffff:127.0.0.1/128", "port": 80}, "write 127.0.0.1/32"),
        ({"label": "x", "prefix": "127.1.0.0/16", "port": 80}, "contradicts web#tcp"),
    ],
)
def test_bug_6_a_file_is_loaded_whole_or_not_at_all(
    space: Space, broken: dict[str, object], words: str
) -> None:
    space.ok("bind", "web", "tcp", "127.9.0.0/16", "80")
    before = space.ok("bindings", "--json").json
    good = {"label": "web", "prefix": "127.1.0.0/16", "port": 80}
    line = space.fails("load-bindings", "-", stdin=json.dumps({"bindings": [good, broken]}))
    assert words in line
    assert "nothing was changed" in line
    assert space.ok("bindings", "--json").json == before


def test_bug_7_a_killed_load_leaves_no_directories(empty: Space) -> None:
    (empty.bpffs / "echo-appliance").mkdir()
    with empty.killed_after(12, "load"):
        [path] = empty.pinned()
        assert path.name.startswith("new-")
    empty.ok("load")
    [path] = empty.pinned()
    assert path.name.isdigit()


def test_bug_8_a_second_dispatcher_by_another_bpffs_is_noticed(space: Space) -> None:
    with tempfile.TemporaryDirectory() as other:
        space.run_tool("mount", "-t", "bpf", "bpf", other)
        try:
            elsewhere = Space(Path(other))
            assert "is attached to this network namespace" in elsewhere.fails("load")
            assert elsewhere.pinned() == []
            elsewhere.ok("load", "--beside")
            assert "another sk_lookup program" in space.ok("status").err
        finally:
            space.run_tool("umount", other)


def test_bug_9_a_udp_socket_that_was_connected_later_is_passed_over(space: Space) -> None:
    turncoat, loyal = space.udp(), space.udp()
    space.ok("bind", "dns", "udp", "127.1.0.0/16", "53")
    assert space.register(("dns", turncoat), ("dns", loyal)).status == 0
    turncoat.connect(("127.0.0.1", 9))
    for _ in range(16):  # as many flows, so that some meet the connected one first
        assert received([loyal], "127.1.0.1", 53) == 0
    [row] = space.ok("status", "--json").json["destinations"]
    assert row["misses"] == 0
    assert row["errors"] > 0


def test_bug_10_several_sockets_are_registered_all_or_none(space: Space) -> None:
    good, connected = space.udp(), space.udp()
    connected.connect(("127.0.0.1", 9))
    space.ok("bind", "dns", "udp", "127.1.0.0/16", "53")
    done = space.register(("dns", good), ("dns", connected))
    assert done.status == 1
    assert "it is connected" in done.err
    [row] = space.ok("status", "--json").json["destinations"]
    assert row["sockets"] == []
    assert received([good], "127.1.0.1", 53) is None


def test_bug_11_a_reader_cannot_make_writers_wait(empty: Space) -> None:
    empty.ok("load", "--group", "65534")
    empty.bpffs.chmod(0o755)
    script = (
        "import fcntl, os, sys\n"
        "held = []\n"
        "for top, folders, files in os.walk(sys.argv[1]):\n"
        "    for path in [top, *(os.path.join(top, name) for name in folders)]:\n"
        "        try:\n"
        "            held.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY))\n"
        "            fcntl.flock(held[-1], fcntl.LOCK_SH)\n"
        "        except PermissionError:\n"
        "            pass\n"
        "print(len(held), flush=True)\n"
        "sys.stdin.read()\n"
    )
    reader = subprocess.Popen(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all",
         "/usr/bin/python3", "-c", script, str(empty.bpffs)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert reader.stdout is not None
        assert int(reader.stdout.readline()) >= 2, "it holds what it may"
        empty.ok("--wait", "0.5", "bind", "web", "tcp", "127.1.0.0/16", "80")
    finally:
        reader.communicate()


def test_bug_11_a_lock_that_is_held_is_waited_for_no_longer_than_said(space: Space) -> None:
    held = os.open(space.bpffs / "echo-appliance" / "lock", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        words = ("bind", "web", "tcp", "127.1.0.0/16", "80")
        assert "has held" in space.fails("--wait", "0.2", *words)
    finally:
        os.close(held)


@pytest.mark.parametrize("wanted", ["", "--ephemeral"])
def test_bug_12_answers_to_local_udp_clients_stay_theirs(space: Space, wanted: str) -> None:
    server, steered = space.udp("127.0.0.1", 9953), space.udp()
    words = ["bind", *([wanted] if wanted else []), "all", "udp", "127.1.0.0/16", "0"]
    space.ok(*words)
    assert space.register(("all", steered)).status == 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.bind(("127.1.0.7", 0))
        client.sendto(b"question", ("127.0.0.1", 9953))
        server.sendto(b"answer", server.recvfrom(100)[1])
        client.settimeout(QUIET)
        if wanted:
            with pytest.raises(TimeoutError):
                client.recv(100)
            assert steered.recv(100) == b"answer"
        else:
            assert client.recv(100) == b"answer"
    assert received([steered], "127.1.0.7", 9953) == 0
