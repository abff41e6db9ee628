"""What a run found: the table on stdout, a section of RESULTS.md, and the data of the plot."""

import datetime
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench.core import BENCH, Series

RESULTS = BENCH / "RESULTS.md"
TITLE = "# Results\n\nWritten by `make bench`; one section per mode.\n"


@dataclass(frozen=True, slots=True)
class Row:
    """One workload: a series per contestant."""

    title: str
    unit: str
    series: dict[str, Series]
    less_is_better: bool = False
    plotted: bool = True


@dataclass(frozen=True, slots=True)
class Target:
    """A figure, usually a ratio, and what it must reach."""

    title: str
    figure: float
    limit: float
    unit: str = ""
    at_most: bool = False

    @property
    def reached(self) -> bool:
        """Whether the figure is on the right side of the limit."""
        return self.figure <= self.limit if self.at_most else self.figure >= self.limit

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """What, limit, figure, verdict; a ratio has two decimals, a quantity its unit."""
        sign = "≤" if self.at_most else "≥"
        figure = f"{self.figure:.1f} {self.unit}" if self.unit else f"{self.figure:.2f}"
        limit = f"{sign} {self.limit:g} {self.unit}".rstrip()
        return self.title, limit, figure, "reached" if self.reached else "**missed**"


@dataclass(frozen=True, slots=True)
class Section:
    """Everything that one mode's benchmark found."""

    mode: str
    ours: str  # the contestant that the targets are about
    plot: str  # file name of its SVG, beside RESULTS.md
    rows: Sequence[Row]
    targets: Sequence[Target]
    tools: Sequence[str] = ()  # names in ASKED: what has a version that matters here


def number(value: float, unit: str) -> str:
    """Three digits that matter: 209 k/s, 33.1 µs, 1,390 MB/s."""
    if unit == "/s" and value >= 1000:
        return f"{value / 1000:,.0f} k/s"
    return f"{value:,.1f} {unit}" if value < 100 else f"{value:,.0f} {unit}"


def cell(series: Series, unit: str) -> str:
    """The median, and from where to where the rounds went."""
    low, high = (number(edge(series.values), unit).split()[0] for edge in (min, max))
    return f"{number(series.median, unit)} ({low}-{high})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is as readable as text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    padded = (
        [word.ljust(width) for word, width in zip(line, widths, strict=True)]
        for line in (header, ["-" * width for width in widths], *rows)
    )
    return "\n".join(f"| {' | '.join(words)} |" for words in padded)


def tables(section: Section) -> str:
    """The figures and the targets, as two Markdown tables."""
    names = list(dict.fromkeys(name for row in section.rows for name in row.series))
    figures = [
        [row.title, *(cell(row.series[n], row.unit) if n in row.series else "" for n in names)]
        for row in section.rows
    ]
    targets = [list(target.cells) for target in section.targets]
    return "\n\n".join((
        table(["median (lowest-highest round)", *names], figures),
        table(["target", "must be", "is", ""], targets),
    ))  # fmt: skip


def write(section: Section, command: str, load_average: float, seconds: float) -> None:
    """Put the section into RESULTS.md, in the place of an older one of the same mode."""
    text = RESULTS.read_text() if RESULTS.exists() else TITLE
    RESULTS.write_text(
        replaced(text, section.mode, "\n\n".join((
            f"![{section.mode}]({section.plot})",
            conditions(section, command, load_average, seconds),
            tables(section),
        )))
    )  # fmt: skip


def replaced(text: str, mode: str, body: str) -> str:
    """Return the page with this body under the mode's heading; at the end if it had none."""
    own = re.compile(rf"^## {re.escape(mode)}$.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    section = f"## {mode}\n\n{body}\n\n"
    if own.search(text) is None:
        text = text.rstrip() + "\n\n"
        return text + section.rstrip() + "\n"
    return own.sub(lambda _: section, text).rstrip() + "\n"


def duration(seconds: float) -> str:
    """What one says of minutes: 45 s, 3 min 5 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def conditions(section: Section, command: str, load_average: float, seconds: float) -> str:
    """What one must know to repeat the run.  Nothing that names the machine."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    cpu = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    versions = [f"Python {platform.python_version()}", *map(_version, section.tools)]
    return "\n".join((
        f"- `{command}`, {today}, took {duration(seconds)}, "
        f"load average before the run {load_average:.2f}",
        f"- {cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, "
        f"kernel {platform.release().split('-')[0]}",
        "- " + ", ".join(versions),
        "- ratios and differences are medians of those within each round",
    ))  # fmt: skip


# How a tool is asked for its version; "uvloop" is a package of this Python.
ASKED = {
    "gcc": ("gcc", "-dumpfullversion"),
    "clang": ("clang", "--version"),
    "haproxy": ("haproxy", "-v"),
    "iperf3": ("iperf3", "--version"),
    "podman": ("podman", "--version"),
    "redis": ("redis-server", "--version"),
    "socat": ("socat", "-V"),
    "systemd": ("systemd-socket-activate", "--version"),
}


def _version(tool: str) -> str:
    if tool in ASKED:
        return f"{tool} {_version_in(ASKED[tool])}"
    try:
        return f"{tool} {version(tool)}"
    except PackageNotFoundError:
        return f"{tool} ?"


def _version_in(command: Sequence[str]) -> str:
    try:
        said = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:
        return "?"
    match = re.search(r"\d+(\.\d+)*", said)
    return match[0] if match else "?"


def show(section: Section) -> None:
    """Print the tables."""
    sys.stdout.write(tables(section).replace("**", "") + "\n")
