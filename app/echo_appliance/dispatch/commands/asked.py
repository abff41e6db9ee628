"""What the commands have in common: their parser, their words, the place and its lock."""

from ...errors import ParseError, tell
from ...options import ArgumentError, Parser
from ..place import Lock, Place
from ..state import Dispatcher

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..command import Options


class Asked:
    """What a command's own arguments say; filled by the parser."""

    words: list[str]
    json: bool
    on_miss: str
    ephemeral: bool
    group: str | None
    capacity: int
    beside: bool
    label: str | None
    dry_run: bool
    source: str | None
    config: str | None
    once: bool


def parser_of(options: "Options", description: str, usage: str = "") -> Parser:
    """Return a command's parser; in its usage, what may be left out is in brackets."""
    parser = Parser(f"echo-appliance dispatch {options.command}", description)
    if usage:
        parser.add("words", default=[], metavar=usage, help="see dispatch --help")
    return parser


def parse(parser: Parser, options: "Options", fewest: int = 0, most: int = 0) -> Asked:
    """Parse, and see that there are as many words as the command takes."""
    asked = parser.parse(options.rest, Asked())
    words = asked.words if most else []
    if not fewest <= len(words) <= most:
        wanted = str(fewest) if fewest == most else f"{fewest} to {most}"
        parser.error(f"{len(words)} arguments given, {wanted} wanted")
    return asked


def choice(*words: str) -> "Callable[[str], str]":
    """Return an option's reader that takes one of these words."""

    def read(text: str) -> str:
        if text not in words:
            raise ArgumentError(f"{text!r} is not one of {', '.join(words)}")
        return text

    return read


def one_of(text: str, words: "Sequence[str]", what: str) -> str:
    """Return the text, if it is one of these words.  Raises ParseError."""
    if text not in words:
        raise ParseError(f"{text!r} is not {what}: use {' or '.join(words)}")
    return text


def place_of(options: "Options") -> Place:
    """Enter the namespace that --netns names, and return it."""
    return Place(options.bpffs.rstrip("/"), options.netns)


def lock(options: "Options", place: Place) -> Lock:
    """Return the lock that whoever changes something holds.  Raises SetupError without a bpffs."""
    place.check_bpffs()
    return Lock(place, options.wait)


def open_to_read(options: "Options") -> Dispatcher:
    """Return the dispatcher, for a command that only looks.  Raises SetupError if there is none."""
    return Dispatcher(place_of(options), write=False)


def write_json(data: object) -> None:
    """Write data for programs to standard output."""
    import json

    tell(json.dumps(data, indent=1) + "\n")
