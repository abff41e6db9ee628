"""What is made once and kept (vm/once.py), by processes that use it, die, and meet each other."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.process.conftest import lacking
from tests.process.launcher import eventually

ROOT = Path(__file__).parents[2]

# Makes or gets KIND KEY, says so, and uses it until its input ends.
USER = """
import sys
from pathlib import Path
from vm.once import made
def build(folder):
    print("building", flush=True)
    sys.stdin.readline()
    (folder / "file").write_text(sys.argv[2])
folder = made(sys.argv[1], sys.argv[2], build)
print(folder, flush=True)
sys.stdin.read()
"""


class User:
    """A process that uses a folder."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def line(self) -> str:
        """Return the next thing it says: "building", or the folder."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> User:
        """Let it finish its build."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self

    def end(self, number: int = 0) -> None:
        """End it, by a signal or in peace."""
        assert self.process.stdin is not None
        if number:
            self.process.send_signal(number)
        self.process.stdin.close()
        self.process.wait(15)


@pytest.fixture
def user(tmp_path: Path) -> Iterator[Callable[..., User]]:
    """Start users, whose cache is below tmp_path."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    with contextlib.ExitStack() as stack:

        def start(kind: str, key: str) -> User:
            process = subprocess.Popen(
                [sys.executable, "-c", USER, kind, key],
                env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            stack.enter_context(process)
            stack.callback(process.kill)
            return User(process)

        yield start


def folders(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "echo-appliance").iterdir() if p.is_dir())


Start = Callable[[str, str], User]


def make(user: Start, kind: str, key: str) -> User:
    """Return a user whose folder was built for it."""
    one = user(kind, key)
    assert one.line() == "building"
    assert one.go_on().line().endswith(f"{kind}-{key}")
    return one


def test_made_folder_is_built_once_for_those_who_want_it_at_once(
    user: Start, tmp_path: Path
) -> None:
    first = user("guest", "a")
    assert first.line() == "building"
    second = user("guest", "a")
    lock = f"/proc/{second.process.pid}/wchan"
    eventually(lambda: "lock" in Path(lock).read_text(), "the second one to wait")
    folder = first.go_on().line()
    assert second.line() == folder == str(tmp_path / "echo-appliance" / "guest-a")
    assert folders(tmp_path) == ["guest-a"]


def test_made_folder_that_nobody_uses_goes_when_a_new_one_of_its_kind_is_made(
    user: Start, tmp_path: Path
) -> None:
    make(user, "guest", "a").end()
    make(user, "guest-device", "a").end()
    make(user, "guest", "b")
    assert folders(tmp_path) == ["guest-b", "guest-device-a"]


def test_made_folder_that_is_used_stays(user: Start, tmp_path: Path) -> None:
    old = make(user, "guest", "a")
    reader = user("guest", "a")
    assert reader.line().endswith("guest-a")
    old.end()
    make(user, "guest", "b").end()
    assert folders(tmp_path) == ["guest-a", "guest-b"]
    reader.end(signal.SIGKILL)
    make(user, "guest", "c")
    assert folders(tmp_path) == ["guest-c"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_made_folder_whose_maker_ends_is_made_by_the_next(
    user: Start, tmp_path: Path, number: int
) -> None:
    maker = user("guest", "a")
    assert maker.line() == "building"
    maker.end(number)
    left = 0 if number == signal.SIGINT else 1
    eventually(lambda: len(folders(tmp_path)) == left, lambda: str(folders(tmp_path)))
    make(user, "guest", "a")
    assert folders(tmp_path) == ["guest-a"], "what was killed is swept"


def test_contained_command_ends_with_its_parent_and_all_its_children() -> None:
    if os.geteuid() != 0:
        lacking("only root is given namespaces: run as root")
    mark = f"86{os.getpid()}"
    program = ["sh", "-c", f"sleep {mark} & sleep {mark}"]
    imports = "from subprocess import run; from vm.once import contained"
    script = f"{imports}; run([*contained(), *{program}])"
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) as parent:
        eventually(lambda: running(f"sleep {mark}") == 2, "both to run")
        parent.kill()
    eventually(lambda: running(f"sleep {mark}") == 0, "their end")


def running(command: str) -> int:
    """Return how many processes have this command line."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            found += path.read_bytes().replace(b"\0", b" ").strip() == command.encode()
    return found
