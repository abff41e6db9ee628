"""Dispatch with the real kernel: each test in its own network namespace and bpffs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.process.dispatch.space import Space, private_space


@pytest.fixture
def empty() -> Iterator[Space]:
    """A space with nothing loaded."""
    if os.geteuid() != 0:
        reason = "dispatch needs root for namespaces, a bpffs and BPF: run as root"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with private_space() as space:
        yield space


@pytest.fixture
def space(empty: Space) -> Space:
    """A space with a dispatcher."""
    empty.ok("load")
    return empty
