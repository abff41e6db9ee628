"""RESULTS.md is written by one mode at a time: none may harm what the others have found."""

import pytest

from bench.report import duration, replaced

PAGE = (
    "# Results\n\nOnce.\n\n## echo\n\nfast\n\n## forward\n\nfaster\n\n## dispatch\n\nin no time\n"
)


@pytest.mark.parametrize("mode", ["echo", "forward", "dispatch"])
def test_section_written_again_keeps_its_place_and_the_others(mode: str) -> None:
    words = {"echo": "fast", "forward": "faster", "dispatch": "in no time"}[mode]
    assert replaced(PAGE, mode, words) == PAGE
    changed = replaced(PAGE, mode, r"a \1 body")
    assert changed == PAGE.replace(f"\n{words}\n", "\na \\1 body\n")


def test_section_written_first_comes_last() -> None:
    assert replaced("# Results\n", "echo", "fast") == "# Results\n\n## echo\n\nfast\n"
    page = PAGE.partition("## dispatch")[0]
    assert replaced(page, "dispatch", "in no time") == PAGE


def test_section_of_a_longer_name_is_another() -> None:
    page = "# Results\n\n## forward-tls\n\nslow\n"
    assert replaced(page, "forward", "fast") == page + "\n## forward\n\nfast\n"


def test_duration_says_minutes_and_seconds() -> None:
    assert [duration(seconds) for seconds in (4.6, 60, 185)] == ["5 s", "1 min 0 s", "3 min 5 s"]
