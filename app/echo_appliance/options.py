"""Command lines: a small parser, and the options that all serving modes have in common.

It reads like argparse, of which it is the part that we need.  argparse itself
would be 2 of the 17 ms that the first client waits for us, and 0.9 of our
12 MB for as long as we run.
"""

import sys

from .errors import tell
from .text import whole_number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn, TypeVar

    Options = TypeVar("Options")


WORKERS_LIMIT = 256


class ArgumentError(ValueError):
    """An argument does not mean anything.  The reason, in words."""


class _Argument:
    """One option, or (by a name without dashes) the list of what is not one."""

    __slots__ = ("default", "help", "metavar", "name", "read", "title")

    def __init__(
        self,
        name: str,
        read: "Callable[[str], object]",
        default: object,
        metavar: str,
        words: str,
        title: str,
    ) -> None:
        self.name = name
        self.read = read
        self.default = default
        self.metavar = metavar  # empty for a flag, which takes no value
        self.help = words
        self.title = title

    @property
    def attribute(self) -> str:
        """What the value is called in the namespace."""
        return self.name.lstrip("-").replace("-", "_")


class Parser:
    """Reads arguments into a namespace; complains in one line, like all our messages."""

    def __init__(self, prog: str, description: str) -> None:
        self.prog = prog
        self._description = description
        self._title = "options"
        self._arguments: dict[str, _Argument] = {}
        self._rest: _Argument | None = None

    def group(self, title: str) -> None:
        """Put the arguments that are added from now on under this title in --help."""
        self._title = title

    def add(
        self,
        name: str,
        read: "Callable[[str], object]" = str,
        *,
        default: object = None,
        metavar: str = "",
        help: str = "",  # noqa: A002 - argparse's word
    ) -> None:
        """Add --name METAVAR, or a flag where there is no metavar, or the positional list.

        The positional list may be empty where it has a default.
        """
        argument = _Argument(name, read, default, metavar, help, self._title)
        if name.startswith("--"):
            self._arguments[name] = argument
        else:
            self._rest = argument

    def parse(self, arguments: "Sequence[str]", namespace: "Options") -> "Options":
        """Set the namespace's attributes; end the process on --help and on what makes no sense."""
        for argument in self._arguments.values():
            setattr(namespace, argument.attribute, argument.default)
        rest = []
        words = iter(arguments)
        for word in words:
            name, equals, value = word.partition("=")
            if word in ("-h", "--help"):
                self._help()
            elif not word.startswith("-") or word == "-":
                rest.append(word)
            elif name not in self._arguments:
                self.error(f"unknown option {name}")
            elif not self._arguments[name].metavar:
                if equals:
                    self.error(f"{name} takes no value")
                setattr(namespace, self._arguments[name].attribute, True)
            else:
                given = value if equals else next(words, None)
                self._set(namespace, self._arguments[name], given)
        self._set_rest(namespace, rest)
        return namespace

    def error(self, message: str) -> "NoReturn":
        """Say what is wrong and where to look; exit with status 2."""
        sys.stderr.write(f"{self.prog}: {message}; see {self.prog} --help\n")
        sys.exit(2)

    def _set(self, namespace: object, argument: _Argument, given: str | None) -> None:
        if given is None:
            self.error(f"{argument.name} needs a value, {argument.metavar}")
        try:
            setattr(namespace, argument.attribute, argument.read(given))
        except ArgumentError as error:
            self.error(f"{argument.name}: {error}")

    def _set_rest(self, namespace: object, rest: list[str]) -> None:
        if self._rest is not None:
            if not rest and self._rest.default is None:
                self.error(f"name at least one {self._rest.metavar}")
            setattr(namespace, self._rest.attribute, rest)
        elif rest:
            self.error(f"{rest[0]!r} is not an option")

    def _help(self) -> "NoReturn":
        rest = f" {self._rest.metavar} ..." if self._rest else ""
        lines = [f"usage: {self.prog} [option ...]{rest}", "", self._description]
        if self._rest:
            lines += ["", f"  {self._rest.metavar}", f"        {self._rest.help}"]
        title = ""
        for argument in self._arguments.values():
            if argument.title != title:
                title = argument.title
                lines += ["", f"{title}:"]
            lines += [f"  {argument.name} {argument.metavar}".rstrip(), f"        {argument.help}"]
        tell("\n".join(lines) + "\n")
        sys.exit(0)


def count(text: str) -> int:
    """Read a limit: a whole number, 0 or more."""
    number = whole_number(text)
    if number is None:
        raise ArgumentError(f"{text!r} is not a whole number, 0 or more")
    return number


def positive(text: str) -> int:
    """Read a whole number, 1 or more."""
    number = whole_number(text)
    if not number:
        raise ArgumentError(f"{text!r} is not a whole number, 1 or more")
    return number


def workers(text: str) -> int:
    """Read a number of processes, within reason."""
    number = positive(text)
    if number > WORKERS_LIMIT:
        raise ArgumentError(f"{number} processes are too many: take {WORKERS_LIMIT} at the most")
    return number


def seconds(text: str) -> float:
    """Read a time span in seconds, 0 or more; at most a year, which epoll still counts right."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 366 * 86400:
        raise ArgumentError(f"{text!r} is not a number of seconds, 0 or more")
    return value


def positive_seconds(text: str) -> float:
    """Read a time span in seconds, more than 0."""
    value = seconds(text)
    if not value:
        raise ArgumentError(f"{text!r} is not a number of seconds above 0")
    return value


class ServiceOptions:
    """What every serving mode's command line says; filled by the parser."""

    max_connections: int | None
    max_connections_per_source: int
    idle_timeout: float
    exit_idle: float
    drain: float
    start_sleep: float
    debug: bool


class SharingOptions(ServiceOptions):
    """The same, of a mode whose sockets several processes can share."""

    workers: int


def add_service_options(parser: Parser) -> None:
    """Add what every serving mode understands."""
    parser.group("admission")
    parser.add(
        "--max-connections", count, metavar="N",
        help="accept no more at a time (default: what the descriptor limit leaves, up to 16384)",
    )  # fmt: skip
    parser.add(
        "--max-connections-per-source", count, default=0, metavar="N",
        help="close what one IP address or vsock CID opens beyond this (default: no limit)",
    )  # fmt: skip
    parser.add(
        "--idle-timeout", seconds, default=0.0, metavar="S",
        help="end a connection on which nothing moved for S seconds (default: never)",
    )  # fmt: skip
    parser.group("life")
    parser.add(
        "--exit-idle", seconds, default=0.0, metavar="S",
        help="exit with 0 when nothing is open and nothing came for S seconds (default: never)",
    )  # fmt: skip
    parser.add(
        "--drain", seconds, default=5.0, metavar="S",
        help="after SIGTERM, finish open connections for up to S seconds (default: 5)",
    )  # fmt: skip
    parser.add(
        "--start-sleep", seconds, default=0.0, metavar="S",
        help="wait S seconds before serving, to see what clients make of a slow start",
    )  # fmt: skip
    parser.add(
        "--debug", default=False,
        help="log octets received and sent, with the descriptor's name",
    )  # fmt: skip


def add_workers(parser: Parser) -> None:
    """Add what modes understand whose sockets several processes can share."""
    parser.add(
        "--workers", workers, default=1, metavar="N",
        help="serve in N processes that share the sockets (default: 1)",
    )  # fmt: skip
