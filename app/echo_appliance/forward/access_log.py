"""A line per connection, on standard output, as text or as JSON."""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Fields = Mapping[str, str | int | float]


class AccessLog:
    """Writes what is known about a connection when it is over."""

    def __init__(self, form: str) -> None:
        if form == "json":
            import json

            self._format: Callable[[Fields], str] = json.dumps
        else:
            self._format = _as_text

    def write(self, fields: "Fields") -> None:
        """Write a line.  A log that nobody takes any more is no reason to stop serving."""
        try:
            sys.stdout.write(self._format(fields) + "\n")
            sys.stdout.flush()
        except (OSError, AttributeError):
            pass


def _as_text(fields: "Fields") -> str:
    return " ".join(f"{key}={_quoted(value)}" for key, value in fields.items())


def _quoted(value: str | float) -> str:
    """Return a value as one word: what came from outside must not look like other fields."""
    text = str(value)
    if text and text.isascii() and text.isprintable() and not set(text) & set(' "=\\'):
        return text
    return '"' + text.encode("unicode_escape").decode().replace('"', r"\"") + '"'
