"""Run this folder's tests in the guest and report each of them here, by name.

Pytest on the machine collects; for the first test it boots the guest and starts a second pytest
inside, which runs all the chosen tests and writes its reports to a pipe, one JSON object per line.
The tests therefore see the guest as a user would: its files, its sockets, its systemd.

Both pytests may be of different versions, so reports cross as plain fields, not as objects.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.machine.guest import REPOSITORY, Guest, GuestError, why_not
from vm.once import CACHE

REPORT_FD = "ECHO_MACHINE_REPORT_FD"
"""Set inside the guest: the descriptor that reports are written to."""

IN_GUEST = REPORT_FD in os.environ
MOUNTED = "/srv/echo-appliance"
ARCHIVE_PATH = "build/echo-appliance.oci.tar"
# One test may cost this much; then the guest hangs, and the rest of the run with it.
SECONDS_PER_TEST = 100.0


class Reporter:
    """In the guest: sends every report to the machine's pytest."""

    def __init__(self) -> None:
        self._out = os.fdopen(int(os.environ[REPORT_FD]), "w", buffering=1)

    def _send(self, **fields: object) -> None:
        self._out.write(json.dumps(fields) + "\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        self._send(
            nodeid=report.nodeid,
            when=report.when,
            outcome=report.outcome,
            reason=reason,
            duration=report.duration,
            sections=report.sections,
        )

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._send(nodeid=nodeid, when="finish")


class GuestRun:
    """On the machine: the guest and the pytest in it.  Owns both; close() ends them."""

    def __init__(self, nodeids: list[str]) -> None:
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            undo.callback(self._stack.close)
            # A CI runner stops a job with SIGTERM; without this Python would end with the guest up.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            self._stack.enter_context(the_only_run())
            self._guest = self._stack.enter_context(Guest())
            self._start(nodeids)
            undo.pop_all()

    def _start(self, nodeids: list[str]) -> None:
        reading, writing = os.pipe()
        self._reports = reading
        self._stack.callback(os.close, reading)
        self._pending = b""
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the stack)
        self._stack.callback(self._output.close)
        # No configuration file: its settings are for the plugins of the machine's pytest.
        options = ["-c", "/dev/null", f"--rootdir={MOUNTED}", "--import-mode=importlib", "-v"]
        options += ["-p", "no:cacheprovider", f"--confcutdir={MOUNTED}/tests/machine"]
        env = {REPORT_FD: str(writing), "PYTHONPATH": MOUNTED, "PYTHONDONTWRITEBYTECODE": "1"}
        pytest_in_guest = ["python3", "-m", "pytest", *options, *nodeids]
        self._process = subprocess.Popen(
            self._guest.command(pytest_in_guest, env=env, folder=MOUNTED),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            pass_fds=[writing],
        )
        os.close(writing)
        self._stack.callback(self._process.wait)
        self._stack.callback(self._process.kill)

    def reports(self, nodeid: str) -> Iterator[dict[str, Any]]:
        """Yields the reports of one test, up to its end; raises GuestError when there are none."""
        deadline = time.monotonic() + SECONDS_PER_TEST
        while True:
            report = json.loads(self._line(deadline))
            if report["nodeid"] != nodeid:
                raise GuestError(f"the guest reported {report['nodeid']}, not {nodeid}")
            if report["when"] == "finish":
                return
            yield report

    def _line(self, deadline: float) -> bytes:
        while b"\n" not in self._pending:
            left = max(0, deadline - time.monotonic())
            ready, _, _ = select.select([self._reports], [], [], left)
            if not ready:
                self._process.kill()  # the next read then finds the end
                raise GuestError(f"no report within {SECONDS_PER_TEST:.0f} s")
            chunk = os.read(self._reports, 65536)
            if not chunk:
                raise GuestError(f"the guest's pytest ended early{self._tail()}")
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _tail(self) -> str:
        """Returns the end of what the guest's pytest printed; nothing when asked again."""
        if self._output.closed:
            return ": see the first such error"
        with self._output as output:
            output.seek(0)
            return "; its output ends with:\n" + output.read().decode(errors="replace")[-3000:]

    def close(self) -> None:
        """Ends the guest's pytest and the guest; nothing of them stays."""
        self._stack.close()


@contextlib.contextmanager
def the_only_run() -> Iterator[None]:
    """Waits until no other run is under way: a vsock port is bound for the whole machine."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "machine.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if vsock_port_taken():
            raise GuestError("vsock port 3000 is taken: systemctl --user stop echo@demo.socket")
        yield


def vsock_port_taken() -> bool:
    try:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as probe:
            probe.bind((socket.VMADDR_CID_ANY, 3000))
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


def cannot_run() -> tuple[str, str] | None:
    """Returns (outcome, reason) when the tier cannot run here: a skip, but a failure under CI."""
    if not (REPOSITORY / ARCHIVE_PATH).exists():
        return "failed", f"{ARCHIVE_PATH} is missing: run make image first"
    if (reason := why_not()) is not None:
        return ("failed" if os.environ.get("CI") == "true" else "skipped"), reason
    return None


def to_report(item: pytest.Item, fields: dict[str, Any]) -> pytest.TestReport:
    """Returns the report that this pytest would have made had it run the item itself."""
    longrepr: Any = fields["reason"] or None
    if fields["outcome"] == "skipped":
        longrepr = (str(item.path), item.location[1] or 0, fields["reason"])
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome=fields["outcome"],
        longrepr=longrepr,
        when=fields["when"],
        sections=[(title, text) for title, text in fields.get("sections", ())],
        duration=fields.get("duration", 0.0),
    )
