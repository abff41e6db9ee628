"""python -m bench [MODE] [--rounds N] [--seconds S] [--quick] [--without-container].

A mode is a module <mode>_bench.py with run(Options) -> Section.  Prints tables;
a full run also writes its section of RESULTS.md and its plot, and leaves those
of other modes as they are.  Without a mode, all are measured in turn.
"""

import argparse
import importlib
import os
import subprocess
import sys
import time

from bench import plot, report
from bench.core import BENCH, ROOT, BenchError, Options

MODES = ("echo", "forward", "dispatch", "netstack", "vm")
INTERRUPTED = 130


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("mode", nargs="?", choices=MODES, help="all of them in turn, if none")
    parser.add_argument("--rounds", type=int, default=5, help="at least 5 for RESULTS.md")
    parser.add_argument("--seconds", type=float, default=1.5, help="per sample")
    parser.add_argument("--quick", action="store_true", help="one short round; writes nothing")
    parser.add_argument("--without-container", action="store_true", help="needs no podman image")
    return parser.parse_args()


def main() -> int:
    """Run; 0 also when targets are missed: that is a finding, not a failure."""
    args = arguments()
    if args.mode is None:
        return measure_all(sys.argv[1:])
    try:
        measure(args)
    except BenchError as error:
        sys.stderr.write(f"bench: {error}\n")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def measure_all(words: list[str]) -> int:
    """Run a process per mode: each begins unpinned, and goes on when another cannot run."""
    began, failed = time.monotonic(), []
    for mode in MODES:
        sys.stdout.write(f"\n{mode}\n\n")
        sys.stdout.flush()
        command = [sys.executable, "-m", "bench", mode, *words]
        try:
            status = subprocess.run(command, cwd=ROOT).returncode
        except KeyboardInterrupt:  # the signal went to both
            return INTERRUPTED
        if status != 0:
            failed.append(mode)
    took = report.duration(time.monotonic() - began)
    sys.stdout.write(f"\n{len(MODES) - len(failed)} of {len(MODES)} modes measured in {took}\n")
    return 1 if failed else 0


def measure(args: argparse.Namespace) -> None:
    """Run one mode, and write down what it found if it was a full run."""
    options = Options(args.rounds, args.seconds, not args.without_container)
    if args.quick:
        options = Options(1, 0.3, not args.without_container)
    load_average, began = os.getloadavg()[0], time.monotonic()
    section = importlib.import_module(f"bench.{args.mode}_bench").run(options)
    report.show(section)
    if options.rounds >= 5 and options.container:
        command = f"python -m bench {args.mode} --rounds {args.rounds} --seconds {args.seconds:g}"
        report.write(section, command, load_average, time.monotonic() - began)
        (BENCH / section.plot).write_text(plot.draw(section.rows, section.ours))


if __name__ == "__main__":
    sys.exit(main())
