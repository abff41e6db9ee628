"""Lines on real pipes, whose other end takes them or does not."""

import _thread
import os
from collections.abc import Iterator

import pytest

from echo_appliance.forward.lines import LINES_LIMIT, Lines


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for end in (reader, writer):
        os.close(end)


def test_lines_are_written_in_order_before_the_end(pipe: tuple[int, int]) -> None:
    lines = Lines(pipe[1])
    for number in range(100):
        lines.put(b"%d\n" % number)
    lines.close()
    assert os.read(pipe[0], 4096) == b"".join(b"%d\n" % number for number in range(100))
    assert lines.dropped == 0


def test_lines_wait_also_when_somebody_made_the_pipe_non_blocking(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.set_blocking(writer, False)
    lines, each = Lines(writer), b"x" * 4095 + b"\n"
    for _ in range(40):  # a pipe takes 16
        lines.put(each)
    with os.fdopen(os.dup(reader), "rb") as log:
        assert log.read(40 * len(each)) == 40 * each
    assert lines.dropped == 0
    lines.close()


def test_lines_beyond_the_limit_are_dropped_and_counted(pipe: tuple[int, int]) -> None:
    lines, each = Lines(pipe[1]), b"x" * 4095 + b"\n"
    for _ in range(LINES_LIMIT + 100):
        lines.put(each)
    assert 100 - 17 <= lines.dropped <= 100, "a pipe takes 16, and one is on its way"
    with os.fdopen(os.dup(pipe[0]), "rb") as log:
        left = LINES_LIMIT + 100 - lines.dropped
        assert log.read(left * len(each)) == left * each
    lines.close()


def test_lines_to_nobody_are_counted() -> None:
    lines = Lines(-1)
    lines.put(b"lost\n")
    lines.close()
    assert lines.dropped == 1


def test_lines_without_a_thread_are_counted_until_there_is_one(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    lines = Lines(pipe[1])
    with monkeypatch.context() as patched:
        patched.setattr(_thread, "start_new_thread", refuse)
        lines.put(b"lost\n")
        lines.close()
    assert lines.dropped == 1
    lines.put(b"written\n")
    lines.close()
    assert os.read(pipe[0], 100) == b"written\n"
