"""A long conversation in both directions that notices each octet: ssh, over a relay of ours.

The kernel's ssh and scp speak to our stack, which relays to an sshd on the loopback
interface.  ssh's MACs end the connection at the first octet that is not right.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.process.netstack.net import OURS, OURS6, Net
from tests.process.netstack.test_netstack_bad_link import relay
from tests.process.peers import pattern
from tests.process.programs import find, free_port, running, wait_for

PRIVILEGE_SEPARATION = Path("/run/sshd")  # which sshd wants to be there, and empty
SIZE = 48_000_000  # several times what has to be before new keys are made, below


@pytest.fixture
def sshd(net: Net, tmp_path: Path) -> Iterator[int]:
    """An sshd on 127.0.0.1 that knows one key; give its port."""
    keygen = find("ssh-keygen", "openssh-client")
    for name in ("host", "user"):
        command = [keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(command, check=True)
    port = free_port()
    (tmp_path / "config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {tmp_path / 'host'}\nPidFile none\n"
        f"AuthorizedKeysFile {tmp_path / 'user.pub'}\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin yes\nSubsystem sftp internal-sftp\n"
    )
    with privilege_separation_directory():
        log = tmp_path / "sshd.log"
        command = [find("sshd", "openssh-server"), "-D", "-e", "-f", str(tmp_path / "config")]
        with running(command, log):
            wait_for(("127.0.0.1", port), log)
            yield port


@contextlib.contextmanager
def privilege_separation_directory() -> Iterator[None]:
    made = not PRIVILEGE_SEPARATION.exists()
    if made:
        PRIVILEGE_SEPARATION.mkdir(mode=0o755)
    try:
        yield
    finally:
        if made:
            PRIVILEGE_SEPARATION.rmdir()


def options(directory: Path) -> list[str]:
    """Return what ssh and scp are to be told; new keys every few megabytes."""
    words = {
        "IdentityFile": directory / "user", "IdentitiesOnly": "yes", "BatchMode": "yes",
        "StrictHostKeyChecking": "no", "UserKnownHostsFile": os.devnull, "LogLevel": "ERROR",
        "RekeyLimit": "8M",
    }  # fmt: skip
    return ["-F", os.devnull, *(f"-o{name}={value}" for name, value in words.items())]


def run(command: Sequence[str], **how: object) -> bytes:
    done = subprocess.run(command, capture_output=True, timeout=100, **how)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr.decode()
    output: bytes = done.stdout
    return output


@pytest.mark.parametrize("address", [OURS, OURS6])
def test_scp_goes_both_ways(net: Net, sshd: int, tmp_path: Path, address: str) -> None:
    net.serve(net.tap(), ports=[f"22=tcp:127.0.0.1:{sshd}"])
    scp = [find("scp", "openssh-client"), *options(tmp_path)]
    there, back = tmp_path / "there", tmp_path / "back"
    data = pattern(SIZE)
    (tmp_path / "data").write_bytes(data)
    host = f"root@[{address}]"
    run([*scp, str(tmp_path / "data"), f"{host}:{there}"])
    run([*scp, f"{host}:{there}", str(back)])
    expected = hashlib.sha256(data).digest()
    assert hashlib.sha256(there.read_bytes()).digest() == expected
    assert hashlib.sha256(back.read_bytes()).digest() == expected


def test_ssh_moves_both_directions_at_once_and_ends_with_the_commands_status(
    net: Net, sshd: int, tmp_path: Path
) -> None:
    net.serve(net.tap(), ports=[f"22=tcp:127.0.0.1:{sshd}"])
    ssh = [find("ssh", "openssh-client"), *options(tmp_path), f"root@{OURS}"]
    data = pattern(SIZE // 2)
    assert run([*ssh, "cat"], input=data) == data
    done = subprocess.run([*ssh, "exit 7"], capture_output=True, timeout=30)
    assert done.returncode == 7, done.stderr


def test_ssh_by_way_of_a_bad_link_is_right_to_the_last_octet(
    net: Net, sshd: int, tmp_path: Path
) -> None:
    """5 % lost, 25 % out of order, some twice, some spoiled: TCP's to mend, and ssh's to notice."""
    ours, theirs = net.frames()
    ssh = [find("ssh", "openssh-client"), *options(tmp_path), f"root@{OURS}"]
    data = pattern(2_000_000)
    with relay(net.tap(vnet=False), theirs, 7):
        net.serve(ours, "--claim", "0", ports=[f"22=tcp:127.0.0.1:{sshd}"])
        assert run([*ssh, "cat"], input=data) == data


def test_ssh_stays_open_while_others_come_and_go(net: Net, sshd: int, tmp_path: Path) -> None:
    net.serve(net.tap(), ports=[f"22=tcp:127.0.0.1:{sshd}"])
    ssh = [find("ssh", "openssh-client"), *options(tmp_path), f"root@{OURS}"]
    with subprocess.Popen([*ssh, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as shell:
        assert shell.stdin is not None
        assert shell.stdout is not None
        for number in range(5):
            line = b"line %d\n" % number
            shell.stdin.write(line)
            shell.stdin.flush()
            assert shell.stdout.readline() == line
            with socket.create_connection((OURS, 22), timeout=20) as rude:
                assert rude.recv(4) == b"SSH-"
        shell.stdin.close()
        assert shell.stdout.read() == b""
    assert shell.returncode == 0
