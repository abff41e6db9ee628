"""The README's own commands, read from it and run as its reader would: as a user, in order."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from testinfra.host import Host

from tests.machine import clients
from tests.machine.conftest import clean
from tests.machine.guest import become_user
from tests.machine.remote import MOUNTED

BY_SYSTEMD = "With systemd, as a user"
BY_ACTIVATE = "With systemd-socket-activate"
NATIVE = "Without podman"
LIMITS = "What it cannot do"
HEALTH = "Health"


def blocks(title: str) -> list[str]:
    """Returns the fenced blocks of a section of the README."""
    readme = (Path(MOUNTED) / "README.md").read_text()
    found = re.search(
        rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", readme, re.DOTALL | re.MULTILINE
    )
    assert found, f"README.md has no section {title!r}: follow it here"
    return re.findall(r"^```\w*\n(.*?)^```$", found[1], re.DOTALL | re.MULTILINE)


def lines(script: str) -> list[str]:
    """Returns the commands of a block, one for each line that does not go on."""
    return [line for line in script.replace("\\\n", " ").splitlines() if line.strip()]


def bash(user: Host, script: str) -> str:
    """Runs a script in the repository; fails with all its output if any command of it does."""
    done = user.run("cd %s && bash -eu -c %s", MOUNTED, script)
    assert done.rc == 0, f"{script}\n{done.stdout}{done.stderr}"
    return str(done.stdout)


def probe_all(user: Host, script: str) -> list[str]:
    """Runs the probe commands of a block and returns their targets."""
    probes = [line for line in lines(script) if line.startswith("echo-appliance probe ")]
    targets = [target for line in probes for target in line.split()[2:]]
    for line in probes:
        if "vsock:1:" not in line or clients.vsock_loopback():
            bash(user, line)
    return targets


@contextlib.contextmanager
def activated(script: str) -> Iterator[None]:
    """Runs a systemd-socket-activate command of the user for as long as the block lasts."""
    sockets = len(re.findall(r" -l ", script))
    with subprocess.Popen(
        [*become_user(), "bash", "-c", f"exec {script}"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for _ in range(sockets):
            assert "Listening on" in process.stderr.readline()
        try:
            yield
        finally:
            process.terminate()


@pytest.fixture
def installed(user: Host) -> Iterator[Host]:
    """The user, after the first block of commands; the guest's image is loaded already."""
    first = blocks(BY_SYSTEMD)[0]
    bash(user, "\n".join(line for line in lines(first) if not line.startswith("make ")))
    yield user
    clean(user)


def test_readme_systemd_units_echo_on_every_family(installed: Host) -> None:
    targets = probe_all(installed, blocks(BY_SYSTEMD)[1])
    kinds = {target.rpartition(":")[0].partition("$")[0] for target in targets}
    assert kinds >= {"tcp:127.0.0.1", "tcp:[::1]", "udp:127.0.0.1", "udp:[::1]", "vsock:1"}
    assert {"unix", "unix-seqpacket", "unix-dgram"} <= {target.split(":")[0] for target in targets}


def test_readme_options_reach_the_appliance(installed: Host) -> None:
    command, *text = blocks(BY_SYSTEMD)[2].splitlines()
    stdin = "\n".join(line.strip() for line in text)
    bash(installed, f"{command} --stdin <<'END'\n{stdin}\nEND")
    assert clients.echo(clients.TCP) == b"hello\n"
    options = re.search(r"ECHO_OPTIONS=(.*)\"", stdin)
    assert options
    arguments = installed.check_output("podman inspect --format '{{.Args}}' echo-demo")
    assert options[1] in arguments


def test_readme_metrics_commands_give_prometheus_text(installed: Host) -> None:
    (script,) = [block for block in blocks(HEALTH) if "curl" in block]
    start, *scrapes = lines(script)
    bash(installed, start)
    for scrape in scrapes:
        assert "# TYPE" in bash(installed, scrape)


def test_readme_examples_of_what_the_container_cannot_do_fail_as_printed(installed: Host) -> None:
    assert clients.echo(clients.TCP) == b"hello\n"
    (script,) = blocks(LIMITS)
    examples = re.findall(r"^\$ (.*)\n(.*)$", script, re.MULTILINE)
    assert len(examples) == 2
    for command, printed in examples:
        done = installed.run(command)
        assert done.rc != 0
        assert printed in done.stdout + done.stderr


@pytest.mark.parametrize("number", [0, 2], ids=["stream", "datagram"])
def test_readme_socket_activate_commands_echo_from_a_container(user: Host, number: int) -> None:
    serve, probe = blocks(BY_ACTIVATE)[number : number + 2]
    with activated(serve):
        assert probe_all(user, probe)
        name = re.search(r"--name (\S+)", serve)
        assert name
        user.check_output("podman stop %s", name[1])
    user.check_output("rm -f /tmp/stream.sock")


def test_readme_commands_without_podman_echo(user: Host) -> None:
    commands = lines(blocks(NATIVE)[1])  # the first is the installation, which rootfs.sh stands for
    assert len(commands) == 3
    for command in commands:
        with activated(command):
            assert clients.echo(clients.TCP) == b"hello\n"
