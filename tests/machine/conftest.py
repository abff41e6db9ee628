"""Sends the tests of this folder into the guest (remote.py); there, gives them their fixtures."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import testinfra.backend.local
import testinfra.host

from tests.machine import remote
from tests.machine.guest import GuestError, become_user

EXPOSURE_LIMIT = 1.5  # what `systemd-analyze security` may say of a native unit

RUN: pytest.StashKey[remote.GuestRun | None] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "on_machine: runs outside the guest, beside its harness")
    if remote.IN_GUEST:
        config.pluginmanager.register(remote.Reporter())


def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """On the machine: takes the place of running the item here."""
    if remote.IN_GUEST or item.get_closest_marker("on_machine"):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for fields in reports(item):
        item.ihook.pytest_runtest_logreport(report=remote.to_report(item, fields))
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def reports(item: pytest.Item) -> Iterator[dict[str, Any]]:
    """Yields the reports of an item from the guest, or the one that says why there are none."""
    if (obstacle := remote.cannot_run()) is not None:
        yield {"when": "setup", "outcome": obstacle[0], "reason": obstacle[1]}
        return
    try:
        yield from guest_run(item.session).reports(item.nodeid)
    except GuestError as error:
        yield {"when": "setup", "outcome": "failed", "reason": str(error)}


def guest_run(session: pytest.Session) -> remote.GuestRun:
    """Returns the session's guest; boots it, with all its tests, for the first of them."""
    if RUN not in session.stash:
        session.stash[RUN] = None  # a boot that failed is not tried again for every test
        chosen = [item for item in session.items if is_remote(item)]
        run = remote.GuestRun([item.nodeid for item in chosen])
        session.config.add_cleanup(run.close)
        session.stash[RUN] = run
    run_or_none = session.stash[RUN]
    if run_or_none is None:
        raise GuestError("the guest did not boot: see the first test")
    return run_or_none


def is_remote(item: pytest.Item) -> bool:
    here = Path(__file__).parent
    return item.path.is_relative_to(here) and not item.get_closest_marker("on_machine")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """In the guest: a failure brings along what the journal says since the test began."""
    report = yield
    if remote.IN_GUEST and report.failed:
        since = f"--since=@{call.start - 1:.0f}"
        lines = testinfra.get_host("local://").run(
            "journalctl --no-pager --lines=80 --output=short-precise %s", since
        )
        report.sections.append(("journal of the guest", lines.stdout))
    return report


class UserBackend(testinfra.backend.local.LocalBackend):  # type: ignore[misc]
    """testinfra as the lingering user; its service module then asks the user's manager."""

    def get_command(self, command: str, *args: str) -> str:
        line: str = super().get_command(command, *args)
        if line.startswith("systemctl ") and not line.startswith("systemctl --user"):
            line = line.replace("systemctl", "systemctl --user", 1)
        return shlex.join([*become_user(), "sh", "-c", line])


@pytest.fixture(scope="session")
def root() -> testinfra.host.Host:
    """The guest, seen as root."""
    return testinfra.get_host("local://")


@pytest.fixture(scope="session")
def user() -> testinfra.host.Host:
    """The guest, seen as its lingering user, with the image in the user's store."""
    host = testinfra.host.Host(UserBackend())
    archive = f"{remote.MOUNTED}/{remote.ARCHIVE_PATH}"
    host.check_output("podman load --quiet --input %s", archive)
    return host


@pytest.fixture
def demo(user: testinfra.host.Host) -> Iterator[testinfra.host.Host]:
    """The user, after the README's commands: echo@demo.socket listens, nothing runs yet."""
    user.check_output("mkdir -p ~/.config/systemd/user")
    user.check_output("cp -r /srv/echo-appliance/systemd/echo* ~/.config/systemd/user")
    user.check_output("systemctl --user daemon-reload")
    user.check_output("systemctl --user start echo@demo.socket")
    yield user
    clean(user)


def clean(user: testinfra.host.Host) -> None:
    """Stops and removes every unit of ours, so that each test starts from nothing."""
    user.run("systemctl --user stop 'echo*.socket' 'echo*.service'")
    user.check_output("rm -rf ~/.config/systemd/user/* ~/.config/containers/systemd/*")
    user.check_output("systemctl --user daemon-reload")
    user.run("systemctl --user reset-failed")


@pytest.fixture
def drop_in(demo: testinfra.host.Host) -> Callable[..., None]:
    """Returns a function that sets the [Service] lines of a drop-in of echo@demo.service."""

    def edit(*lines: str) -> None:
        text = "\n".join(["[Service]", *lines, ""])
        folder = "~/.config/systemd/user/echo@demo.service.d"
        demo.check_output(f"mkdir -p {folder} && printf %s %s > {folder}/test.conf", "%s", text)
        demo.check_output("systemctl --user daemon-reload")

    return edit


def wait_until(true: Callable[[], object], what: str, seconds: float = 15) -> None:
    """Returns once true() is so; fails, naming what was waited for, when it does not become so."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {seconds:g} s")
        time.sleep(0.02)


def status_of(pid: str) -> dict[str, str]:
    """Returns the lines of /proc/PID/status by their names."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def exposure(host: testinfra.host.Host, scope: str, unit: str) -> float:
    """Returns the figure that systemd-analyze security ends with."""
    report = host.check_output("systemd-analyze security %s --no-pager %s", scope, unit)
    verdict = str(report).strip().splitlines()[-1]
    assert "Overall exposure level" in verdict
    return float(verdict.split(":")[1].split()[0])
