"""Netstack against the kernel: each test in a network namespace of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.conftest import lacking
from tests.process.launcher import Launcher
from tests.process.netstack.net import Net, private_network


@pytest.fixture
def net(launch: Launcher) -> Iterator[Net]:
    """A private network."""
    if os.geteuid() != 0:
        lacking("netstack needs root for a network namespace and a tap: run as root")
    if not Path("/dev/net/tun").exists():
        lacking("there is no /dev/net/tun: modprobe tun")
    with private_network(launch) as network:
        yield network
