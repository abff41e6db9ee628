"""The commands: files, listings, explain, metrics; capabilities; limits."""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from echo_appliance.dispatch import libbpf
from echo_appliance.dispatch.register import socket_identity
from tests.process.dispatch.clients import reached
from tests.process.dispatch.space import Space

OURS = """
[[bindings]]
label = "web"
prefix = "127.1.0.0/16"
port = "1000-2000"
protocol = "tcp"
on-miss = "pass"

[[bindings]]
label = "all"
prefix = "2001:db8::/64"
protocol = "udp"
ephemeral = true
"""


def test_load_bindings_replaces_everything_and_reads_our_toml(space: Space) -> None:
    space.ok("bind", "old", "tcp", "127.9.0.0/16", "80")
    space.ok("load-bindings", "-", stdin=OURS)
    assert [
        {key: value for key, value in row.items() if key != "hits"}
        for row in space.ok("bindings", "--json").json
    ] == [
        {"label": "web", "protocol": "tcp", "prefix": "127.1.0.0/16", "port": "1000-2000",
         "on-miss": "pass"},
        {"label": "all", "protocol": "udp", "prefix": "2001:db8::/64", "port": 0,
         "on-miss": "drop", "ephemeral": True},
    ]  # fmt: skip


def test_load_bindings_reads_tubulars_json_for_both_protocols(space: Space) -> None:
    text = '{"bindings": [{"label": "foo", "prefix": "127.0.0.1/8", "port": 80}]}'
    done = space.ok("load-bindings", "-", stdin=text)
    assert "1 prefixes had host bits" in done.err
    rows = space.ok("bindings", "--json").json
    assert [(row["protocol"], row["prefix"]) for row in rows] == [
        ("tcp", "127.0.0.0/8"),
        ("udp", "127.0.0.0/8"),
    ]


def test_load_bindings_of_its_own_listing_changes_nothing(space: Space) -> None:
    space.ok("load-bindings", "-", stdin=OURS)
    rows = space.ok("bindings", "--json").json
    for row in rows:
        del row["hits"]
    again = json.dumps({"bindings": rows})
    assert space.ok("load-bindings", "--dry-run", "-", stdin=again).out == ""
    space.ok("load-bindings", "-", stdin=again)
    assert "unchanged" in space.ok("load-bindings", "-", stdin=again).err
    # Another change in between is seen.
    space.ok("bind", "more", "tcp", "127.5.0.0/16", "80")
    assert "unchanged" not in space.ok("load-bindings", "-", stdin=again).err
    assert len(space.ok("bindings", "--json").json) == len(rows)


def test_load_bindings_dry_run_prints_the_difference_and_changes_nothing(space: Space) -> None:
    space.ok("bind", "web", "tcp", "127.1.0.0/16", "80")
    space.ok("bind", "wide", "tcp", "127.1.0.0/16", "79-81")
    entries = [
        {"label": "wide", "prefix": "127.1.0.0/16", "port": "79-81", "protocol": "tcp"},
        {"label": "new", "prefix": "127.1.0.0/16", "port": 79, "protocol": "tcp"},
    ]
    text = json.dumps({"bindings": entries})
    before = space.ok("status", "--json").json
    assert space.ok("load-bindings", "--dry-run", "-", stdin=text).out.splitlines() == [
        "- web#tcp:[127.1.0.0/16]:80",
        "+ new#tcp:[127.1.0.0/16]:79",
    ]
    both = space.ok("load-bindings", "--dry-run", "--json", "-", stdin=text).json
    assert [row["label"] for row in both["remove"] + both["add"]] == ["web", "new"]
    assert space.ok("status", "--json").json == before


def test_load_bindings_of_many_is_read_back_whole(space: Space, tmp_path: Path) -> None:
    count = 60_000  # more than a batch, and enough for the second thread
    entries = [
        {"label": f"l{number % 7}", "prefix": f"10.0.{number >> 8}.{number & 255}",
         "port": number % 3, "protocol": "tcp"}
        for number in range(count)
    ]  # fmt: skip
    (tmp_path / "many.json").write_text(json.dumps({"bindings": entries}))
    space.ok("load-bindings", str(tmp_path / "many.json"))
    rows = space.ok("bindings", "--json").json
    assert {(row["label"], row["prefix"], row["port"]) for row in rows} == {
        (one["label"], f"{one['prefix']}/32", one["port"]) for one in entries
    }


def test_replaces_and_upgrades_under_traffic_lose_no_connection(
    space: Space, tmp_path: Path
) -> None:
    listener, other = space.tcp(backlog=1024), space.tcp()
    assert space.register(("web", listener), ("x", other)).status == 0
    files = []
    for number in range(2):
        common = {"label": "web", "prefix": "127.1.0.0/16", "port": 0, "protocol": "tcp"}
        more = {"label": "x", "prefix": f"127.1.2.{number}", "port": 80, "protocol": "tcp"}
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps({"bindings": [common, more]}))
    space.ok("load-bindings", str(files[0]))
    changes = [["load-bindings", str(files[number % 2])] for number in range(1, 101)]
    for number in range(20):
        changes.insert(6 * number, ["upgrade"])
    connected = 0
    for words in changes:
        with subprocess.Popen(space.command(*words), stderr=subprocess.PIPE) as process:
            while not ends_within(0.002, process):  # in which it gets on
                connected += 1
                assert reached([listener, other], "127.1.0.1", 1 + connected % 65535) == 0
            assert process.communicate()[1].count(b"\n") == 1
            assert process.returncode == 0
    assert connected > 1000


def ends_within(seconds: float, process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def test_bindings_lists_what_overlaps(space: Space) -> None:
    for label, prefix, port in (("a", "127.1.0.0/16", "80"), ("b", "127.1.2.0/24", "1000-2000"),
                                ("c", "127.2.0.0/16", "0")):  # fmt: skip
        space.ok("bind", label, "tcp", prefix, port)

    def labels(*words: str) -> list[str]:
        return [row["label"] for row in space.ok("bindings", "--json", *words).json]

    assert labels() == ["b", "a", "c"]
    assert labels("udp") == []
    assert labels("any", "127.1.2.3") == ["b", "a"]
    assert labels("tcp", "127.0.0.0/8", "1500") == ["b", "c"]
    text = space.ok("bindings", "tcp", "127.2.0.0/16").out.splitlines()
    assert text[0].split() == ["protocol", "prefix", "port", "label", "hits", "on-miss"]
    assert text[1].split() == ["tcp", "127.2.0.0/16", "0", "c", "0", "drop"]


def test_explain_names_winner_losers_reasons_and_socket(space: Space) -> None:
    listener = space.tcp()
    space.ok("bind", "wide", "tcp", "127.1.0.0/16", "0")
    space.ok("bind", "few", "tcp", "127.1.0.0/16", "1000-2000")
    space.ok("bind", "one", "tcp", "127.1.0.0/16", "1500")
    assert space.register(("one", listener)).status == 0
    lines = space.ok("explain", "tcp", "127.1.2.3", "1500").out.splitlines()
    assert lines[0] == "one#tcp:[127.1.0.0/16]:1500 wins"
    assert lines[1:3] == [
        "  over few#tcp:[127.1.0.0/16]:1000-2000: 1 port is narrower than 1001",
        "  over wide#tcp:[127.1.0.0/16]:0: 1 port is narrower than 65536",
    ]
    data = space.ok("explain", "tcp", "127.1.2.3", "1500", "--json").json
    [row] = [one for one in space.ok("status", "--json").json["destinations"] if one["sockets"]]
    assert data["socket"] == row["sockets"][0]
    assert lines[3] == f"socket {data['socket']}"
    assert row["lookups"] == 0, "asking counts nothing"
    assert space.ok("explain", "udp", "127.1.2.3", "1500").out.startswith("no binding")
    assert "dropped" in space.ok("explain", "tcp", "127.1.2.3", "1501").out


def test_explain_names_the_socket_that_a_flow_of_this_source_meets(space: Space) -> None:
    listeners = [space.tcp() for _ in range(4)]
    space.ok("bind", "web", "tcp", "127.1.0.0/16", "0")
    assert space.register(*(("web", one) for one in listeners)).status == 0
    identities = [f"sk:{socket_identity(one):x}" for one in listeners]
    met = set()
    for _ in range(12):
        with socket.create_connection(("127.1.0.1", 80)) as connection:
            address, port = connection.getsockname()
            words = ("explain", "--json", "--source", f"{address},{port}")
            said = space.ok(*words, "tcp", "127.1.0.1", "80").json["socket"]
            ready, _, _ = select.select(listeners, [], [], 3)
            assert [identities[listeners.index(one)] for one in ready] == [said]
            ready[0].accept()[0].close()
            met.add(said)
    assert len(met) > 1
    for source in ("127.0.0.1", "::1,80", "127.0.0.1,x", "x,1"):
        space.fails("explain", "--source", source, "tcp", "127.1.0.1", "80")


def test_hits_of_what_stays_are_kept_when_all_is_replaced(space: Space) -> None:
    listener = space.tcp()
    assert space.register(("web", listener), label="web").status == 0
    stays = [("127.1.0.0/16", 80), ("127.1.0.0/16", "1000-2000"), ("127.2.0.0/16", 0)]
    gone, new = ("127.3.0.0/16", 80), ("127.1.0.0/16", "1500-1501")

    def load(rows: list[tuple[str, object]]) -> None:
        entries = [
            {"label": "web", "prefix": prefix, "port": port, "protocol": "tcp"}
            for prefix, port in rows
        ]
        space.ok("load-bindings", "-", stdin=json.dumps({"bindings": entries}))

    def hits() -> dict[tuple[str, object], int]:
        rows = space.ok("bindings", "--json").json
        return {(row["prefix"], row["port"]): row["hits"] for row in rows}

    load([*stays, gone])
    for address, ports in (("127.1.0.1", (80, 1000, 1500, 1999)), ("127.2.0.1", (1, 2)),
                           ("127.3.0.1", (80,))):  # fmt: skip
        for port in ports:
            assert reached([listener], address, port) == 0
    before = hits()
    assert before == {stays[0]: 1, stays[1]: 3, stays[2]: 2, gone: 1}
    load([*stays, new])
    assert hits() == {**{one: before[one] for one in stays}, new: 0}
    # Also by bind and unbind of ranges, which replace all, too; and they count on.
    assert reached([listener], "127.1.0.1", 1000) == 0
    space.ok("bind", "web", "tcp", "127.1.0.0/16", "1002-1005")
    space.ok("unbind", "web", "tcp", "127.1.0.0/16", "1500-1501")
    assert hits()[stays[1]] == 4
    # What comes back after it was gone begins again.
    load([gone])
    assert hits() == {gone: 0}


def test_metrics_are_prometheus_text(space: Space) -> None:
    listener = space.tcp()
    space.ok("bind", 'we"b', "tcp", "127.1.0.0/16", "0")
    assert space.register(('we"b', listener)).status == 0
    assert reached([listener], "127.1.0.1", 80) == 0
    lines = space.ok("metrics").out.splitlines()
    labels = r'{label="we\"b",domain="ipv4",protocol="tcp"}'
    for name, value in (("lookups_total", 1), ("misses_total", 0), ("bindings", 1), ("sockets", 1)):
        assert f"echo_appliance_dispatch_{name}{labels} {value}" in lines
    assert space.ok("metrics", "--json").json == space.ok("status", "--json").json["destinations"]


def test_metrics_of_many_bindings_take_no_memory_for_each(space: Space) -> None:
    # The sidecar's page, too: 500 MB for a million, and 8 s in which it did nothing else.
    few = most_memory(space, "metrics")
    entries = [
        {"label": "a", "prefix": f"10.{number >> 8}.{number & 255}.0/24", "protocol": "udp"}
        for number in range(50_000)
    ]
    entries.append({"label": "b", "prefix": "10.0.0.0/8", "protocol": "udp", "port": "1000-2000"})
    space.ok("load-bindings", "-", stdin=json.dumps({"bindings": entries}))
    assert most_memory(space, "metrics") - few < 4 << 20
    lines = space.ok("metrics").out.splitlines()
    for label, count in (("a", 50_000), ("b", 1)):
        where = f'{{label="{label}",domain="ipv4",protocol="udp"}}'
        assert f"echo_appliance_dispatch_bindings{where} {count}" in lines


# Not by getrusage(2): what that says of a child begins with its parent's.
MEASURED = """
import sys
from echo_appliance.__main__ import main
status = main(sys.argv[1:])
with open("/proc/self/status") as lines:
    sys.stderr.write(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
sys.exit(status)
"""


def most_memory(space: Space, *words: str) -> int:
    """Return the octets that a command had in use at the most."""
    command = [sys.executable, "-c", MEASURED, *space.command(*words)[3:]]
    done = subprocess.run(command, capture_output=True, check=True)
    return int(done.stderr) * 1024


@pytest.mark.parametrize("words", [["bindings"], ["status", "--json"], ["metrics"]])
def test_a_listing_that_cannot_be_written_is_told_in_one_line(
    space: Space, words: list[str]
) -> None:
    command = space.command(*words)
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    line = "echo-appliance: standard output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, line)


def test_unregister_and_unload_give_the_addresses_back(space: Space) -> None:
    listener, normal = space.tcp(), space.tcp("127.1.0.1", 80)
    space.ok("bind", "web", "tcp", "127.1.0.0/16", "0")
    assert space.register(("web", listener)).status == 0
    assert reached([listener, normal], "127.1.0.1", 80) == 0
    space.ok("unregister", "web", "ipv4", "tcp")
    assert reached([listener, normal], "127.1.0.1", 80) is None
    space.ok("unload")
    assert reached([listener, normal], "127.1.0.1", 80) == 1


def test_register_pid_takes_all_sockets_that_rules_name(space: Space) -> None:
    stream, datagram, six = space.tcp(), space.udp(), space.tcp("::1")
    space.keep(socket.create_connection(stream.getsockname()))
    rule = f"six=tcp:[::1]:{six.getsockname()[1]},web=tcp:127.0.0.1:*,dns=udp"
    done = space.ok("register-pid", str(os.getpid()), "--label", rule)
    assert done.err.count("registered") == 3
    rows = space.ok("status", "--json").json["destinations"]
    columns = ("label", "domain", "protocol")
    assert [(*(row[name] for name in columns), len(row["sockets"])) for row in rows] == [
        ("dns", "ipv4", "udp", 1), ("six", "ipv6", "tcp", 1), ("web", "ipv4", "tcp", 1),
    ]  # fmt: skip
    del datagram


def test_register_refuses_what_cannot_be_steered_to(space: Space) -> None:
    bound = space.keep(socket.socket())
    bound.bind(("127.0.0.1", 0))
    listener = space.tcp()
    connection = space.keep(socket.create_connection(listener.getsockname()))
    device = space.tcp()
    device.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
    unix = space.keep(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    for sock, words in (
        (connection, "it is connected"),
        (device, "bound to the device lo"),
        (unix, "only IPv4 and IPv6"),
    ):
        done = space.register(("web", sock))
        assert done.status == 1
        assert words in done.err
    assert "does not listen" in space.fails(
        "register-pid", str(os.getpid()), "web", "tcp", "127.0.0.1", str(bound.getsockname()[1])
    )
    assert "has no socket for tcp 127.0.0.1 1" in space.fails(
        "register-pid", str(os.getpid()), "web", "tcp", "127.0.0.1", "1"
    )


def test_register_refuses_a_socket_of_another_namespace(space: Space) -> None:
    program = (
        "import socket, sys\n"
        "listener = socket.socket(); listener.bind(('127.0.0.1', 777)); listener.listen()\n"
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        ["unshare", "--net", "/usr/bin/python3", "-c", program],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        other.stdout.readline()
        line = space.fails("register-pid", str(other.pid), "web", "tcp", "127.0.0.1", "777")
        assert "another network namespace" in line
        # Given the namespace, it is the right one.
        netns = ["--netns", f"/proc/{other.pid}/ns/net"]
        space.ok(*netns, "load")
        space.ok(*netns, "register-pid", str(other.pid), "web", "tcp", "127.0.0.1", "777")
        other.communicate()


def test_the_same_binding_twice_is_fine(space: Space) -> None:
    for ports in ("80", "1000-2000"):
        space.ok("bind", "web", "tcp", "127.1.0.0/16", ports)
        assert "is bound already" in space.ok("bind", "web", "tcp", "127.1.0.0/16", ports).err
    assert "different options" in space.fails(
        "bind", "--on-miss", "pass", "web", "tcp", "127.1.0.0/16", "80"
    )


def test_bindings_that_swallow_everything_are_warned_of(space: Space) -> None:
    assert "takes every address" in space.ok("bind", "all", "tcp", "0.0.0.0/0", "0").err
    assert "local UDP clients" in space.ok("bind", "all", "udp", "127.1.0.0/16", "0").err
    assert "host bits: taken as 127.2.0.0/16" in space.ok(
        "bind", "a", "tcp", "127.2.3.4/16", "1"
    ).err  # fmt: skip


def test_a_full_table_is_one_line_and_nothing_half_applied(empty: Space) -> None:
    empty.ok("load", "--capacity", "4")
    for number in range(4):
        empty.ok("bind", "web", "tcp", f"127.1.0.{number}", "80")
    before = empty.ok("bindings", "--json").json
    assert "is full (4 keys)" in empty.fails("bind", "web", "tcp", "127.2.0.1", "80")
    assert "is full (4 keys)" in empty.fails("bind", "web", "tcp", "127.2.0.1", "1-1000")
    entries = [{"label": "x", "prefix": f"127.3.0.{one}", "port": 1} for one in range(3)]
    text = json.dumps({"bindings": entries})
    assert "is full (4 keys)" in empty.fails("load-bindings", "-", stdin=text)
    assert empty.ok("bindings", "--json").json == before


IMPORTS = """
import sys
from echo_appliance.__main__ import main
status = main(sys.argv[1:])
print(*sys.modules)
sys.exit(status)
"""
# What costs milliseconds, and what only other commands need.
UNWANTED = {"socket", "selectors", "typing", "argparse", "dataclasses", "json", "tomllib"}


def test_bind_imports_no_more_than_it_needs(space: Space) -> None:
    words = space.command("bind", "web", "tcp", "127.1.0.0/16", "80")[3:]
    command = [sys.executable, "-c", IMPORTS, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not UNWANTED & set(done.stdout.split())


def test_the_33rd_socket_of_a_destination_is_refused_with_the_rest(space: Space) -> None:
    sockets = [("web", space.tcp()) for _ in range(33)]
    done = space.register(*sockets)
    assert done.status == 1
    assert "which is all that fit: nothing was registered" in done.err
    assert space.ok("status", "--json").json["destinations"] == []
    assert space.register(*sockets[:32]).status == 0


def test_without_a_dispatcher_or_a_bpffs_it_says_so(empty: Space, tmp_path: Path) -> None:
    for words in (["status"], ["unload"], ["bind", "a", "tcp", "::1", "1"], ["upgrade"]):
        assert "run dispatch load" in empty.fails(*words)
    plain = Space(tmp_path)
    for words in (["load"], ["status"]):
        assert f"{tmp_path} is not a bpffs: mount -t bpf" in plain.fails(*words)
    assert list(tmp_path.iterdir()) == []


def test_a_bpffs_with_an_odd_name_is_known_as_one(empty: Space, tmp_path: Path) -> None:
    # /proc/self/mountinfo has spaces, backslashes and line ends in octal.
    folder = tmp_path / "my bpf's\\040 \xe9\n"
    other = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))  # another mount, in no encoding
    for path in (folder, other):
        path.mkdir()
        empty.run_tool("mount", "-t", "bpf", "bpf", str(path))
    there = Space(folder)
    there.ok("load")
    there.ok("bind", "web", "tcp", "127.1.0.0/16", "80")
    assert there.ok("status", "--json").json["path"].startswith(str(folder))
    there.ok("unload")


def test_another_version_of_the_state_is_left_alone(space: Space) -> None:
    with space.dispatcher() as dispatcher:
        settings = dispatcher.settings()
        settings.layout = 99
        dispatcher.write_settings(settings)
    for words in (["bind", "a", "tcp", "::1", "1"], ["status"], ["upgrade"]):
        assert "of another version (layout 99" in space.fails(*words)
    space.ok("unload")


def test_the_state_of_an_older_layout_is_refused_by_its_number(space: Space) -> None:
    # Settings as layout 2 had them: an array of one value of 60 octets.
    [path] = space.pinned()
    older = libbpf._lib.bpf_map_create(2, b"settings", 4, 60, 1, None)
    libbpf.update(older, bytes(4), struct.pack("=I4IHH32sI", 2, 1, 0, 0, 0, 1, 2, b"", 99), "it")
    (path / "settings").unlink()
    libbpf.pin(older, str(path / "settings"))
    os.close(older)
    for words in (["bind", "a", "tcp", "::1", "1"], ["status"], ["upgrade"], ["run", "--once"]):
        line = space.fails(*words)
        assert "of another version (layout 2, 60 octets; this is 3," in line
        assert "or unload and load" in line
    space.ok("unload")
    space.ok("load")


def test_a_program_that_someone_else_put_there_is_not_touched(space: Space) -> None:
    [path] = space.pinned()
    # Another program in our link's place: as if by another tool.
    link = libbpf.open_pin(str(path / "link"))
    twin = libbpf.open_pin(str(path / "explain"))
    libbpf.update_link(link, twin)
    for descriptor in (link, twin):
        os.close(descriptor)
    assert "someone else replaced it" in space.fails("bind", "a", "tcp", "::1", "1")
    space.ok("unload")


# Who may do what: root is every other test here.
AS = {
    "capable": ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
                "--inh-caps=-all,+bpf,+net_admin", "--ambient-caps=-all,+bpf,+net_admin"],
    "reader": ["setpriv", "--reuid=65534", "--regid=4242", "--clear-groups", "--inh-caps=-all"],
    "nobody": ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"],
}  # fmt: skip


def run_as(
    space: Space, who: str, *words: str, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*AS[who], *space.command(*words)], input=stdin, capture_output=True, text=True,
        timeout=20, check=False,
    )  # fmt: skip


def test_cap_bpf_and_cap_net_admin_are_enough_for_everything(empty: Space) -> None:
    os.chown(empty.bpffs, 65534, 65534)
    with own_server(empty) as pid:
        for words in (
            ["load"],
            ["load-bindings", "-"],
            ["bind", "more", "tcp", "127.8.0.0/16", "1000-2000"],
            ["register-pid", pid, "web", "tcp", "127.0.0.1", "777"],
            ["upgrade"],
            *([name] for name in ("status", "list", "bindings", "metrics")),
            ["explain", "tcp", "127.1.0.1", "1500"],
            ["unregister", "web", "ipv4", "tcp"],
            ["unbind", "more", "tcp", "127.8.0.0/16", "1000-2000"],
            ["unload"],
        ):
            done = run_as(empty, "capable", *words, stdin=OURS)
            assert done.returncode == 0, f"{words}: {done.stderr}"


@contextmanager
def own_server(space: Space) -> Iterator[str]:
    """Yield the id of a process of uid 65534 that listens on 127.0.0.1:777."""
    program = (
        "import os, socket, sys\n"
        "listener = socket.create_server(('127.0.0.1', 777))\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "import ctypes; ctypes.CDLL(None).prctl(4, 1)  # dumpable: as if it had been executed so\n"
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        ["/usr/bin/python3", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield str(process.pid)
        process.communicate()


def test_a_reader_of_the_group_needs_no_capability(empty: Space) -> None:
    empty.ok("load", "--group", "4242")
    empty.bpffs.chmod(0o755)
    empty.ok("bind", "web", "tcp", "127.1.0.0/16", "1000-2000")
    empty.ok("upgrade")
    for words in (["status", "--json"], ["bindings"], ["metrics"], ["list"]):
        done = run_as(empty, "reader", *words)
        assert (done.returncode, done.stderr) == (0, ""), words
        assert "web" in done.stdout
    done = run_as(empty, "reader", "explain", "tcp", "127.1.0.1", "1500")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("web#tcp:[127.1.0.0/16]:1000-2000 wins\n")
    for words in (["bind", "x", "tcp", "::1", "1"], ["unload"], ["upgrade"]):
        done = run_as(empty, "reader", *words)
        assert done.returncode == 1
        assert "missing: CAP_BPF, CAP_NET_ADMIN" in done.stderr
        assert done.stderr.count("\n") == 1


def test_nobody_is_told_what_is_missing(empty: Space) -> None:
    empty.ok("load")
    empty.ok("bind", "web", "tcp", "127.1.0.0/16", "80")
    before = empty.ok("bindings", "--json").json
    empty.bpffs.chmod(0o755)
    readers = [["status"], ["list"], ["bindings"], ["metrics"], ["explain", "tcp", "::1", "1"]]
    binding = ["x", "tcp", "::1", "1"]
    writers = [["load"], ["unload"], ["upgrade"], ["bind", *binding], ["unbind", *binding],
               ["load-bindings", "/dev/null"], ["unregister", "web", "ipv4", "tcp"]]  # fmt: skip
    for words in (*readers, *writers):
        done = run_as(empty, "nobody", *words)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), (words, done.stderr)
        if words in readers:
            assert "run as its owner or in its group" in done.stderr
        else:
            assert "missing: CAP_BPF, CAP_NET_ADMIN" in done.stderr, words
    done = run_as(empty, "nobody", "register-pid", str(os.getpid()), *binding)
    assert "missing: CAP_BPF, CAP_NET_ADMIN, CAP_SYS_PTRACE" in done.stderr
    assert empty.ok("bindings", "--json").json == before
