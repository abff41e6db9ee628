"""Command lines: one parser class, and the options that all serving modes have in common."""

import argparse
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line, like all our messages."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> "NoReturn":
        """Say what is wrong and where to look; exit with status 2."""
        sys.stderr.write(f"{self.prog}: {message}; see {self.prog} --help\n")
        sys.exit(2)


def count(text: str) -> int:
    """Read a limit: a whole number, 0 or more."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def positive(text: str) -> int:
    """Read a whole number, 1 or more."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def seconds(text: str) -> float:
    """Read a time span in seconds, 0 or more; at most a year, which epoll still counts right."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 366 * 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")
    return value


def add_service_options(parser: Parser) -> None:
    """Add what every serving mode understands."""
    limits = parser.add_argument_group("admission")
    limits.add_argument(
        "--max-connections", type=count, metavar="N",
        help="accept no more at a time; others wait in the kernel's backlog"
        " (default: what the descriptor limit leaves, at most 16384)",
    )  # fmt: skip
    limits.add_argument(
        "--max-connections-per-source", type=count, default=0, metavar="N",
        help="close what one IP address or vsock CID opens beyond this (default: no limit)",
    )  # fmt: skip
    limits.add_argument(
        "--idle-timeout", type=seconds, default=0.0, metavar="S",
        help="end a connection on which nothing moved for S seconds (default: never)",
    )  # fmt: skip
    life = parser.add_argument_group("life")
    life.add_argument(
        "--exit-idle", type=seconds, default=0.0, metavar="S",
        help="exit with 0 when nothing is open and nothing came for S seconds (default: never)",
    )  # fmt: skip
    life.add_argument(
        "--drain", type=seconds, default=5.0, metavar="S",
        help="after SIGTERM, finish open connections for up to S seconds (default: 5)",
    )  # fmt: skip
    life.add_argument(
        "--start-sleep", type=seconds, default=0.0, metavar="S",
        help="wait S seconds before serving, to see what clients make of a slow start",
    )  # fmt: skip
    life.add_argument(
        "--workers", type=positive, default=1, metavar="N",
        help="serve in N processes that share the sockets (default: 1)",
    )  # fmt: skip
    life.add_argument(
        "--debug", action="store_true",
        help="log octets received and sent, with the descriptor's name",
    )  # fmt: skip
