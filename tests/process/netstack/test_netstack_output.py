"""Where a command's octets cannot go, or come from: one line that says so, and no harm."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.netstack.net import KERNEL, NETSTACK, OURS, OURS6, PORT, Net, connect, echo
from tests.process.netstack.test_netstack_commands import TAP, kernel_echo
from tests.process.peers import pattern

FULL = "No space left on device"


@pytest.fixture
def tap(net: Net) -> Net:
    net.persistent_tap()
    return net


def run(*words: str, seconds: float = 30, **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [*NETSTACK, *words], stderr=subprocess.PIPE, text=True, timeout=seconds, **how
    )


def without(number: int, *words: str, **how: object) -> subprocess.CompletedProcess[str]:
    """Run a verb with one of its standard descriptors closed."""
    closed = ["sh", "-c", f'exec "$@" {number}>&-', "sh"]
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [*closed, *NETSTACK, *words], text=True, timeout=30, **how
    )


def assert_one_line(done: subprocess.CompletedProcess[str], expected: str) -> None:
    assert done.returncode == 1, done
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


@contextlib.contextmanager
def full() -> Iterator[int]:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# -- standard output ---------------------------------------------------------


@pytest.mark.parametrize("verb", ["ping", "dump", "connect"])
def test_output_that_is_full_is_told(tap: Net, verb: str) -> None:
    with full() as output, kernel_echo() as port:
        words = {
            "ping": ["ping", *TAP, "--count", "3", "--interval", "0.05", KERNEL],
            "dump": ["dump", *TAP, "--count", "1"],  # the kernel speaks of IPv6 on a new link
            "connect": ["connect", *TAP, f"{KERNEL}:{port}"],
        }[verb]
        done = run(*words, stdout=output, input="x")
    assert_one_line(done, f"standard output cannot be written: {FULL}")


@pytest.mark.parametrize("verb", ["ping", "connect"])
def test_output_that_is_closed_is_told_and_no_frame_is_taken_for_it(tap: Net, verb: str) -> None:
    """The device must not get the number of standard output: answers would go to the link."""
    with kernel_echo() as port:
        words = {
            "ping": ["ping", *TAP, "--count", "1", KERNEL],
            "connect": ["connect", *TAP, f"{KERNEL}:{port}"],
        }[verb]
        done = without(1, *words, input="x", stderr=subprocess.PIPE)
    assert_one_line(done, "standard output cannot be written: Bad file descriptor")


def test_output_whose_reader_has_gone_ends_quietly(tap: Net) -> None:
    command = [*NETSTACK, "ping", *TAP, "--interval", "0.05", KERNEL]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "icmp_seq=0" in process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_trace_without_standard_error_does_no_harm(net: Net) -> None:
    net.persistent_tap()
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *NETSTACK, "serve", *TAP, "--claim", "0"]
    with subprocess.Popen([*command, "--port", str(PORT), "--trace"]) as process:
        try:
            data = pattern(20_000)
            for _ in range(2):
                with connect_soon() as sock:
                    assert echo(data, sock) == data
            assert process.poll() is None
        finally:
            process.terminate()


def connect_soon() -> socket.socket:
    """Connect once the port is served: this one's server cannot say when."""
    for _ in range(200):
        try:
            return connect()
        except OSError:
            continue
    raise AssertionError("nobody serves")


# -- standard input and --send -----------------------------------------------


def test_input_that_is_closed_is_empty(tap: Net) -> None:
    with kernel_echo() as port:
        done = without(0, "connect", *TAP, f"{KERNEL}:{port}", capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_send_of_a_directory_is_refused(tap: Net, tmp_path: Path) -> None:
    with kernel_echo() as port:
        words = ("--send", str(tmp_path), f"{KERNEL}:{port}")
        assert "Is a directory" in tap.fails("connect", *TAP, *words)


# -- captures ----------------------------------------------------------------


def test_capture_that_is_full_ends_and_the_service_goes_on(net: Net) -> None:
    server = net.serve(net.tap(), "--pcap", "/dev/full")
    data = pattern(300_000)
    for _ in range(2):
        with connect() as sock:
            assert echo(data, sock) == data
    assert server.stop() == 0
    assert server.stderr.count("\n") == 1, server.stderr
    assert f"--pcap: /dev/full: {FULL}" in server.stderr


def test_capture_that_is_full_ends_a_dump_in_words(tap: Net) -> None:
    done = run("dump", *TAP, "--count", "1", "--pcap", "/dev/full", stdout=subprocess.DEVNULL)
    assert_one_line(done, f"--pcap: /dev/full: {FULL}")


# -- peers and gateways that cannot be ---------------------------------------


def test_peer_that_is_no_other_host_is_refused_at_once(tap: Net) -> None:
    for verb, port in (("ping", ""), ("connect", ":7")):
        assert "our own address" in tap.fails(verb, *TAP, f"{OURS}{port}")
        assert "broadcast address" in tap.fails(verb, *TAP, f"192.0.2.255{port}")


@pytest.mark.parametrize("address", [f"{OURS}/24", f"{OURS6}/64"])
def test_address_of_a_second_one_of_ours_on_the_link_is_refused(net: Net, address: str) -> None:
    """They have one hardware address, too, which is made of the --address."""
    one, other = net.frames()
    first = net.serve(one, addresses=("--address", address))
    with pytest.raises(AssertionError, match=f"{address.split('/')[0]} is in use on the link"):
        net.serve(other, "--claim", "2", addresses=("--address", address))
    assert not first.exited


def test_gateway_that_cannot_be_one_is_refused(tap: Net) -> None:
    for words, expected in {
        ("--gateway", OURS): "our own address",
        ("--gateway", "192.0.2.255"): "broadcast address",
        ("--gateway", KERNEL, "--gateway", "192.0.2.3"): "one per version",
        ("--address", f"{OURS}/24"): "given twice",
    }.items():
        assert expected in tap.fails("serve", *TAP, "--port", "7", *words), words
