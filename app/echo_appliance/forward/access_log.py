"""A line per connection, on standard output, as text or as JSON."""

import os
import sys

from .client import name_in
from .lines import Lines

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .proxy_protocol import Header

    Fields = Mapping[str, str | int | float]


class AccessLog:
    """Writes what is known about a connection when it is over."""

    def __init__(self, form: str) -> None:
        self._lines = Lines(sys.stdout.fileno() if sys.stdout is not None else -1)
        if form == "json":
            import json

            self._format: Callable[[Fields], str] = json.dumps
        else:
            self._format = _as_text

    def passage(
        self,
        route: str,
        client: str,
        header: "Header | None",
        *,
        target: str = "",
        octets: tuple[int, int] = (0, 0),
        seconds: float = 0.0,
        server_name: str | None = None,
        end: str,
    ) -> None:
        """Write about a stream's client: of the header's name if it has one.

        `octets` are those from it and those to it.
        """
        if header is not None:
            client = name_in(header) or client
        named = {} if server_name is None else {"server_name": server_name}
        self.write(route, client, target, octets, seconds, end, named)

    def write(
        self,
        route: str,
        client: str,
        target: str,
        octets: tuple[int, int],
        seconds: float,
        end: str,
        more: "Mapping[str, str] | None" = None,
    ) -> None:
        """Write a line, or count one that nobody takes: that is no reason to stop serving."""
        fields: Fields = {
            "route": route,
            "client": client,
            "target": os.fsencode(target).decode(errors="backslashreplace"),
            "received": octets[0],
            "sent": octets[1],
            "seconds": round(seconds, 3),
            "end": end,
            **(more or {}),
        }
        self._lines.put(self._format(fields).encode() + b"\n")

    @property
    def dropped(self) -> int:
        """How many lines nobody took."""
        return self._lines.dropped

    def close(self) -> None:
        """Write what is left; wait for that, but not for long."""
        self._lines.close()


def _as_text(fields: "Fields") -> str:
    return " ".join(f"{key}={_quoted(value)}" for key, value in fields.items())


def _quoted(value: str | float) -> str:
    """Return a value as one word: what came from outside must not look like other fields."""
    text = str(value)
    if text and text.isascii() and text.isprintable() and not set(text) & set(' "=\\'):
        return text
    return '"' + text.encode("unicode_escape").decode().replace('"', r"\"") + '"'
