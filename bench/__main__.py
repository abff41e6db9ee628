"""python -m bench [MODE] [--rounds N] [--seconds S] [--quick] [--without-container].

A mode is a module <mode>_bench.py with run(Options) -> Section.  Prints tables;
a full run also writes its section of RESULTS.md and its plot.
"""

import argparse
import importlib
import os
import sys

from bench import plot, report
from bench.core import BENCH, BenchError, Options

MODES = ("echo", "forward", "dispatch", "netstack")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("mode", nargs="?", choices=MODES, default="echo")
    parser.add_argument("--rounds", type=int, default=5, help="at least 5 for RESULTS.md")
    parser.add_argument("--seconds", type=float, default=1.5, help="per sample")
    parser.add_argument("--quick", action="store_true", help="one short round; writes nothing")
    parser.add_argument("--without-container", action="store_true", help="needs no podman image")
    return parser.parse_args()


def main() -> int:
    """Run one mode; 0 also when targets are missed: that is a finding, not a failure."""
    args = arguments()
    options = Options(args.rounds, args.seconds, not args.without_container)
    if args.quick:
        options = Options(1, 0.3, not args.without_container)
    load_average = os.getloadavg()[0]
    try:
        section = importlib.import_module(f"bench.{args.mode}_bench").run(options)
    except BenchError as error:
        sys.stderr.write(f"bench: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    report.show(section)
    if options.rounds >= 5 and options.container:
        command = f"python -m bench {args.mode} --rounds {args.rounds} --seconds {args.seconds:g}"
        report.write(section, command, load_average)
        (BENCH / section.plot).write_text(plot.draw(section.rows, section.ours))
    return 0


if __name__ == "__main__":
    sys.exit(main())
