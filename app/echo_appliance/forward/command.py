"""`echo-appliance forward`: what the command line says, and what it leads to."""

from ..errors import ParseError, SetupError, tell
from ..inherit import take
from ..options import (
    ArgumentError,
    Parser,
    SharingOptions,
    add_service_options,
    add_workers,
    count,
    seconds,
)
from . import config
from .forwarder import Forwarder
from .route import EVERY_NAME

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..inherit import PassedPath
    from .forwarder import Routes


class Options(SharingOptions):
    """What the command line says; filled by the parser."""

    to: list[str]
    config: str | None
    check: bool
    connect_timeout: float | None
    connect_retry: float | None
    balance: str | None
    proxy_protocol: str | None
    keepalive: int | None
    access_log: str | None


def main(arguments: "Sequence[str]") -> int:
    """Run the mode; return the exit status.  Raises SetupError, in words for the user."""
    options = _parse(arguments)
    try:
        routes = load(options)
    except ParseError as error:
        raise SetupError(str(error)) from error
    if options.check:
        tell(config.describe(routes))
        return 0
    paths: list[PassedPath] = []
    sockets = take(paths)
    return Forwarder(options, lambda: load(options), routes, sockets, paths).run()


def _parse(arguments: "Sequence[str]") -> Options:
    parser = Parser(
        "echo-appliance forward", "Relay every inherited socket to a target, in both directions."
    )
    parser.group("where to (one of the two)")
    parser.add(
        "--to", _each(), default=[], metavar="TARGET",
        help="where all sockets lead, as tcp:HOST:PORT, unix:/path, unix:@name, vsock:CID:PORT,"
        " udp:HOST:PORT, unix-dgram:/path or fd:NAME; given again: others that do the same",
    )  # fmt: skip
    parser.add("--config", metavar="FILE", help="routes by descriptor name, as TOML")
    parser.add("--check", default=False, help="say what the configuration means, and exit")
    _add_ways(parser)
    add_service_options(parser)
    add_workers(parser)
    options = parser.parse(arguments, Options())
    if bool(options.to) == (options.config is not None):
        parser.error("say where to: either --to TARGET or --config FILE")
    return options


def _add_ways(parser: Parser) -> None:
    parser.group("ways, where the configuration says nothing else")
    parser.add(
        "--connect-timeout", seconds, metavar="S",
        help="give a backend S seconds to answer (default: 5)",
    )  # fmt: skip
    parser.add(
        "--connect-retry", seconds, metavar="S",
        help="while no backend answers, let the client wait, and ask again for S seconds",
    )  # fmt: skip
    parser.add(
        "--balance", metavar="HOW",
        help="which of several targets is asked first: first-alive (default) or round-robin",
    )  # fmt: skip
    parser.add(
        "--proxy-protocol", metavar="VERSION",
        help="tell backends the client's address in a PROXY header: v1, v2 or none (default)",
    )  # fmt: skip
    parser.add(
        "--keepalive", count, metavar="S",
        help="let TCP ask after S silent seconds whether a peer is there (default: never)",
    )  # fmt: skip
    parser.group("log")
    parser.add(
        "--access-log", _log_form, metavar="FORM",
        help="write a line per connection to standard output, as text or json",
    )  # fmt: skip


def _each() -> "Callable[[str], list[str]]":
    """Read an option that may be given several times."""
    values: list[str] = []

    def read(text: str) -> list[str]:
        values.append(text)
        return values

    return read


def _log_form(text: str) -> str:
    if text not in ("text", "json"):
        raise ArgumentError(f"{text!r} is neither text nor json")
    return text


def load(options: Options) -> "Routes":
    """Return the routes.  Raises ParseError."""
    given: dict[str, object] = {
        "connect-timeout": options.connect_timeout,
        "connect-retry": options.connect_retry,
        "balance": options.balance,
        "proxy-protocol": options.proxy_protocol,
        "keepalive": options.keepalive,
        "idle-timeout": options.idle_timeout or None,
    }
    defaults = {key: value for key, value in given.items() if value is not None}
    if options.config is not None:
        return config.load(options.config, defaults)
    return config.parse({"route": {EVERY_NAME: {"to": options.to}}}, defaults)
