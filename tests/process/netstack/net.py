"""A private network with a tap, the kernel's stack on its one side and ours on the other.

The test's own thread moves there, so what it opens and starts is there, too.  The
appliance gets the tap as a descriptor.  With the thread's return nothing is left: the
namespace goes with its last descriptor.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import socket
import struct
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from echo_appliance.linux import IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, TUNSETIFF
from tests.process.launcher import COMMAND, Launcher, Server

CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h

KERNEL, OURS = "192.0.2.1", "192.0.2.2"
KERNEL6, OURS6 = "2001:db8::1", "2001:db8::2"
KERNELS = (f"{KERNEL}/24", f"{KERNEL6}/64")
PORT, DISCARD = 7, 9
ADDRESSES = ("--address", f"{OURS}/24", "--address", f"{OURS6}/64")
NETSTACK = (*COMMAND, "netstack")


class Net:
    """Where one test lives."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._descriptors: list[int] = []
        self._sockets: list[socket.socket] = []

    # -- links ---------------------------------------------------------------

    def tap(
        self,
        name: str = "tap0",
        *,
        vnet: bool = True,
        mtu: int = 1500,
        addresses: Sequence[str] = KERNELS,
    ) -> int:
        """Make a tap that is up, with the kernel's addresses; return its descriptor."""
        flags = IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if vnet else 0)
        descriptor = os.open("/dev/net/tun", os.O_RDWR)
        self._descriptors.append(descriptor)
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        ip("link", "set", name, "mtu", str(mtu))
        self.up(name, addresses)
        return descriptor

    def up(self, name: str, addresses: Sequence[str] = KERNELS) -> None:
        """Give a link the kernel's addresses, and set it up."""
        for address in addresses:
            ip("address", "add", address, "dev", name, "nodad")
        ip("link", "set", name, "up")

    def persistent_tap(self, name: str = "tap0", *words: str) -> None:
        """Make a tap that nobody is attached to."""
        ip("tuntap", "add", name, "mode", "tap", *words)
        self.up(name)

    def frames(self) -> tuple[socket.socket, socket.socket]:
        """Return the two ends of a link that the kernel's stack is not on: ours, and the other."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sockets += [ours, theirs]
        return ours, theirs

    def page(self) -> socket.socket:
        """Return a listening socket for metrics."""
        page = socket.create_server(("127.0.0.1", 0))
        self._sockets.append(page)
        return page

    # -- the appliance -------------------------------------------------------

    def serve(
        self,
        descriptor: int | socket.socket,
        *options: str,
        passed: Sequence[tuple[str, socket.socket]] = (),
        ports: Sequence[str] = (f"{PORT}", f"{DISCARD}=discard"),
        addresses: Sequence[str] = ADDRESSES,
        **how: Any,
    ) -> Server:
        """Start `netstack serve` on a frame descriptor, and wait until it is ready."""
        words = [word for port in ports for word in ("--port", port)]
        return self._launcher.start(
            [descriptor, *(sock for _, sock in passed)], "--device", "fd:link", *addresses, *words,
            *options, names=["link", *(name for name, _ in passed)],
            command=(*NETSTACK, "serve"), **how,
        )  # fmt: skip

    def run(self, *words: str, seconds: float = 30, **how: Any) -> subprocess.CompletedProcess[str]:
        """Run a netstack verb to its end."""
        return subprocess.run(
            [*NETSTACK, *words], capture_output=True, text=True, timeout=seconds, **how
        )

    def fails(self, *words: str) -> str:
        """Run a verb that must fail, in one line; return the line."""
        done = self.run(*words)
        assert done.returncode in (1, 2), f"{words}: {done.returncode} {done.stdout}{done.stderr}"
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("echo-appliance"), done.stderr
        return done.stderr

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()
        for descriptor in self._descriptors:
            os.close(descriptor)


@contextmanager
def private_network(launcher: Launcher) -> Iterator[Net]:
    """Move this thread to a network of its own, and back."""
    net = Net(launcher)
    with new_network():
        try:
            yield net
        finally:
            net.close()


@contextmanager
def new_network() -> Iterator[None]:
    """Move this thread to a fresh network namespace, and back."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    enter_new_network()
    try:
        yield
    finally:
        _check(ctypes.CDLL(None, use_errno=True).setns(home, 0))
        os.close(home)


def enter_new_network() -> None:
    """Move this thread to a fresh network namespace, for good."""
    _check(ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET))
    ip("link", "set", "lo", "up")


def _check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def ip(*words: str) -> str:
    """Run ip(8)."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


# -- clients -----------------------------------------------------------------


def connect(port: int = PORT, address: str = OURS, *, source_port: int = 0) -> socket.socket:
    """Connect the kernel to our stack."""
    source = ("", source_port) if source_port else None
    return socket.create_connection((address, port), timeout=20, source_address=source)


def echo(data: bytes, sock: socket.socket) -> bytes:
    """Send data and the end of it, and return what comes back before the peer's."""
    received, sent = bytearray(), 0
    view = memoryview(data)
    sock.setblocking(False)
    poll = select.poll()
    give_up = time.monotonic() + 90
    ended = False
    while True:
        poll.register(sock, select.POLLIN | (0 if ended else select.POLLOUT))
        assert poll.poll(20_000), f"stuck: {sent} sent, {len(received)} received"
        assert time.monotonic() < give_up
        if sent < len(data):
            sent += _try(sock.send, view[sent : sent + 262144]) or 0
        elif not ended:
            sock.shutdown(socket.SHUT_WR)
            ended = True
        octets = _try(sock.recv, 262144)
        if octets == b"":
            return bytes(received)
        received += octets or b""


def _try(call: Callable[[Any], Any], argument: Any) -> Any:
    """Return what the call does; None where it would wait."""
    try:
        return call(argument)
    except BlockingIOError:
        return None


def metrics(address: tuple[str, int]) -> dict[str, int]:
    """Return the dropped frames by reason, and all else by its name."""
    with urllib.request.urlopen(f"http://{address[0]}:{address[1]}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    found = {}
    for line in lines:
        if line.startswith("echo_appliance_"):
            name, _, value = line.rpartition(" ")
            metric, _, labels = name.removeprefix("echo_appliance_").partition("{")
            reason = labels.partition('reason="')[2].rstrip('"}')
            found[f"{metric}:{reason}" if reason else metric] = int(value)
    return found
