"""A bad setup: exactly one line that says what to do, no READY=1, and an exit status that tells."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
from pathlib import Path

import pytest

from tests.process.conftest import InNamespace, lacking
from tests.process.launcher import COMMAND, Launcher, Passed
from tests.process.peers import Sockets, round_trip

# -- LISTEN_* ----------------------------------------------------------------


def test_inherit_no_listen_fds_says_how_to_start(launch: Launcher) -> None:
    line = launch.fail([], environment={"LISTEN_FDS": None})
    assert "no sockets were passed" in line
    assert "systemd-socket-activate" in line


def test_inherit_no_descriptors_says_how_to_start(launch: Launcher) -> None:
    assert "no sockets were passed" in launch.fail([])


def test_inherit_listen_pid_of_another_process_is_told(launch: Launcher, sockets: Sockets) -> None:
    line = launch.fail([sockets.listen()], environment={"LISTEN_PID": "1"})
    assert "LISTEN_PID is 1, but this is process" in line


def test_inherit_listen_pid_that_is_missing_is_told(launch: Launcher, sockets: Sockets) -> None:
    line = launch.fail([sockets.listen()], environment={"LISTEN_PID": None})
    assert "LISTEN_PID is not set" in line


@pytest.mark.parametrize("names", [["one"], ["one", "two", "three"]], ids=["fewer", "more"])
def test_inherit_names_that_do_not_match_the_descriptors_are_told(
    launch: Launcher, sockets: Sockets, names: list[str]
) -> None:
    line = launch.fail([sockets.listen(), sockets.listen()], names=names)
    assert f"{len(names)} names for 2 descriptors" in line


@pytest.mark.parametrize("name", ["\udcff", "a\nb", "trailing\\"], ids=["octets", "line", "slash"])
def test_inherit_names_that_are_no_names_are_told(
    launch: Launcher, sockets: Sockets, name: str
) -> None:
    assert "LISTEN_FDNAMES" in launch.fail([sockets.listen()], names=[name])


@pytest.mark.parametrize("count", ["x", "", "-1", "1.5", "0x1", " 1"])
def test_inherit_listen_fds_that_is_not_a_number_is_told(
    launch: Launcher, sockets: Sockets, count: str
) -> None:
    line = launch.fail([sockets.listen()], environment={"LISTEN_FDS": count})
    assert f"LISTEN_FDS={count!r} is not a number" in line


@pytest.mark.parametrize("count", ["2", "1000000"])
def test_inherit_listen_fds_that_promises_too_much_is_told(
    launch: Launcher, sockets: Sockets, count: str
) -> None:
    line = launch.fail([sockets.listen()], environment={"LISTEN_FDS": count})
    assert "descriptor 4 is closed" in line
    assert f"LISTEN_FDS={count}" in line


@pytest.mark.parametrize("digits", [20, 5000])
def test_inherit_listen_fds_with_many_digits_is_told(
    launch: Launcher, sockets: Sockets, digits: int
) -> None:
    line = launch.fail([sockets.listen()], environment={"LISTEN_FDS": "9" * digits})
    assert "LISTEN_FDS=" in line


def test_inherit_without_names_is_served(launch: Launcher, sockets: Sockets) -> None:
    server = sockets.listen()
    launch.start([server], names=None)
    round_trip(sockets.connect(server))


def test_inherit_sockets_that_share_a_name_are_all_served(
    launch: Launcher, sockets: Sockets
) -> None:
    servers = [sockets.listen() for _ in range(3)]
    launch.start(servers, names=["same"] * 3)
    for server in servers:
        round_trip(sockets.connect(server))


# -- descriptors -------------------------------------------------------------


def test_inherit_closed_descriptor_is_named(launch: Launcher, sockets: Sockets) -> None:
    line = launch.fail([sockets.listen(), None, sockets.listen()])
    assert "descriptor 4 is closed" in line


def test_inherit_file_pipe_directory_and_device_are_named(
    launch: Launcher, sockets: Sockets
) -> None:
    reader, writer = os.pipe()
    opened = {
        "a file": os.open(__file__, os.O_RDONLY),
        "a pipe": reader,
        "a directory": os.open("/", os.O_RDONLY),
        "a character device": os.open("/dev/null", os.O_RDONLY),
    }
    try:
        for words, descriptor in opened.items():
            line = launch.fail([sockets.listen(), descriptor], names=["echo", "odd"])
            assert f"descriptor 4 'odd' is {words}, not a socket" in line
    finally:
        for descriptor in (writer, *opened.values()):
            os.close(descriptor)


def test_inherit_path_descriptor_is_named(launch: Launcher, sockets: Sockets) -> None:
    descriptor = os.open(sockets.listen(socket.AF_UNIX).getsockname(), os.O_PATH)
    try:
        line = launch.fail([sockets.listen(), descriptor], names=["echo", "odd"])
    finally:
        os.close(descriptor)
    assert "descriptor 4 'odd' is a path (O_PATH)" in line


def test_inherit_netlink_socket_is_named(launch: Launcher, sockets: Sockets) -> None:
    odd = sockets.keep(socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM))
    line = launch.fail([odd], names=["odd"])
    assert "descriptor 3 'odd' (netlink dgram" in line
    assert "cannot be served" in line


@pytest.mark.parametrize(
    ("family", "protocol", "words"),
    [
        (socket.AF_INET, socket.IPPROTO_ICMP, "inet raw"),
        (socket.AF_INET6, socket.IPPROTO_ICMPV6, "inet6 raw"),
        (socket.AF_PACKET, 0, "packet raw"),
    ],
)
def test_inherit_raw_socket_is_named(
    launch: Launcher, sockets: Sockets, family: int, protocol: int, words: str
) -> None:
    try:
        odd = sockets.keep(socket.socket(family, socket.SOCK_RAW, protocol))
    except PermissionError:
        lacking("a raw socket needs CAP_NET_RAW: run as root")
    line = launch.fail([odd], names=["odd"])
    assert f"descriptor 3 'odd' ({words}" in line
    assert "cannot be served" in line


def test_inherit_ping_socket_is_named(
    launch: Launcher, sockets: Sockets, in_namespace: InNamespace
) -> None:
    def ping() -> socket.socket:
        Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 0")
        return sockets.keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP))

    assert "cannot be served" in launch.fail([in_namespace(ping)])


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
def test_inherit_stream_that_does_not_listen_is_named(
    launch: Launcher, sockets: Sockets, family: int
) -> None:
    line = launch.fail([sockets.bind(family, kind=socket.SOCK_STREAM)], names=["deaf"])
    assert "descriptor 3 'deaf'" in line
    assert "neither listening nor connected" in line


# -- roles -------------------------------------------------------------------


def test_inherit_metrics_on_udp_are_refused(launch: Launcher, sockets: Sockets) -> None:
    line = launch.fail([sockets.listen(), sockets.bind()], names=["echo", "metrics"])
    assert "descriptor 4 'metrics' (inet dgram" in line
    assert "cannot serve metrics" in line


def test_inherit_metrics_on_a_connection_are_refused(launch: Launcher, sockets: Sockets) -> None:
    _, theirs = sockets.pair()
    line = launch.fail([sockets.listen(), theirs], names=["echo", "metrics"])
    assert "cannot serve metrics" in line


def test_inherit_metrics_alone_are_refused(launch: Launcher, sockets: Sockets) -> None:
    said = launch.fail([sockets.listen()], names=["metrics"])
    assert "only sockets named 'metrics' or 'replies'" in said


@pytest.mark.parametrize("kind", ["pair", "tcp"])
def test_inherit_connection_with_workers_is_refused(
    launch: Launcher, sockets: Sockets, kind: str
) -> None:
    _, theirs = sockets.pair()
    if kind == "tcp":
        server = sockets.listen()
        sockets.connect(server)
        theirs = sockets.keep(server.accept()[0])
    line = launch.fail([sockets.listen(), theirs], "--workers", "2")
    assert "workers cannot share" in line


# -- command line ------------------------------------------------------------

SECONDS = ("--idle-timeout", "--exit-idle", "--drain", "--start-sleep")
COUNTS = ("--max-connections", "--max-connections-per-source", "--workers")


@pytest.mark.parametrize("option", SECONDS)
def test_options_seconds_that_are_none_are_told(
    launch: Launcher, sockets: Sockets, option: str
) -> None:
    for text in ("x", "nan", "inf", "-1", "1s"):
        line = launch.fail([sockets.listen()], f"{option}={text}")
        assert option in line
        assert f"{text!r} is not a number of seconds" in line


@pytest.mark.parametrize("option", COUNTS)
def test_options_counts_that_are_none_are_told(
    launch: Launcher, sockets: Sockets, option: str
) -> None:
    for text in ("x", "inf", "-1", "", "\u0663"):
        line = launch.fail([sockets.listen()], f"{option}={text}")
        assert option in line
        assert f"{text!r} is not a whole number" in line


@pytest.mark.parametrize("option", COUNTS)
def test_options_count_with_thousands_of_digits_is_told(
    launch: Launcher, sockets: Sockets, option: str
) -> None:
    assert option in launch.fail([sockets.listen()], option, "9" * 5000)


def test_options_fewer_connections_than_workers_are_told(
    launch: Launcher, sockets: Sockets
) -> None:
    line = launch.fail([sockets.listen()], "--workers", "3", "--max-connections", "2")
    assert "--max-connections 2 is less than --workers 3" in line


def test_options_no_workers_at_all_is_told(launch: Launcher, sockets: Sockets) -> None:
    assert "1 or more" in launch.fail([sockets.listen()], "--workers", "0")


@pytest.mark.parametrize(
    "options", [["--unknown"], ["--max-conn", "3"], ["left-over"], ["--drain"], ["--debug=1"]]
)
def test_options_that_are_unknown_or_cut_short_are_told(
    launch: Launcher, sockets: Sockets, options: list[str]
) -> None:
    assert "--help" in launch.fail([sockets.listen()], *options)


@pytest.mark.parametrize("mode", [[], ["sing"], ["--debug"]])
def test_options_mode_that_is_none_is_told(
    launch: Launcher, sockets: Sockets, mode: list[str]
) -> None:
    line = launch.fail([sockets.listen()], command=(*COMMAND, *mode))
    assert "use echo, forward, probe, dispatch or netstack" in line


@pytest.mark.parametrize(
    "arguments", [["--help"], ["echo", "--help"], ["forward", "--help"], ["probe", "--help"]]
)
def test_options_help_is_printed(arguments: list[str]) -> None:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=10)
    assert done.returncode == 0
    assert "usage: echo-appliance" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["--help"], ["forward", "--help"]])
def test_options_help_that_cannot_be_written_is_told(arguments: list[str]) -> None:
    command = shlex.join([*COMMAND, *arguments])
    done = subprocess.run(["sh", "-c", f"{command} >/dev/full"], capture_output=True, text=True)
    assert done.returncode != 0
    assert (
        done.stderr
        == "echo-appliance: standard output cannot be written: No space left on device\n"
    )
    done = subprocess.run(["sh", "-c", f"{command} >&-"], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr == "echo-appliance: standard output cannot be written: Bad file descriptor\n"


def test_inherit_bad_setup_leaves_no_socket_broken(launch: Launcher, sockets: Sockets) -> None:
    server = sockets.listen()
    passed: list[Passed] = [server, None]
    launch.fail(passed)
    launch.start([server])
    round_trip(sockets.connect(server))
