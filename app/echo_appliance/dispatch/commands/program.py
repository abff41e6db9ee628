"""load, unload, upgrade, run: the commands about the program itself."""

import os

from ...errors import SetupError, say
from ...options import ArgumentError, positive
from ...text import whole_number
from .. import program
from ..state import Dispatcher
from .asked import lock, parse, parser_of, place_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..command import Options

MOST = (1 << 32) - 1  # of the kernel's numbers of keys, and of groups


def load(options: "Options") -> int:
    """Put the dispatcher into the network namespace."""
    parser = parser_of(options, "Load the program and attach it to the network namespace.")
    parser.add("--group", metavar="NAME", help="a group (name or number) that may read the state")
    parser.add(
        "--capacity", _capacity, default=program.CAPACITY, metavar="N",
        help=f"most keys: one per binding, up to 31 per range (default: {program.CAPACITY})",
    )  # fmt: skip
    parser.add("--beside", default=False, help="even if other sk_lookup programs are attached")
    asked = parse(parser, options)
    place = place_of(options)
    group = None if asked.group is None else _group(asked.group)
    with lock(options, place):
        program.load(place, asked.capacity, group, asked.beside)
    if group is not None and place.is_open_to_all():
        say(
            f"dispatch: warning: any user may pin in {place.bpffs}, so who may read can pin what "
            f"they read once more, to write it: chmod o-w {place.bpffs}"
        )
    say(f"dispatch: loaded into {place.path}")
    return 0


def _capacity(text: str) -> int:
    number = positive(text)
    if number > MOST:
        raise ArgumentError(f"{number} keys are too many: take {MOST} at the most")
    return number


def _group(text: str) -> int:
    number = whole_number(text)
    if number is not None and number < MOST:  # which stands for no group at all
        return number
    import grp

    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise SetupError(f"there is no group {text!r}") from None


def unload(options: "Options") -> int:
    """Take the dispatcher out."""
    parse(parser_of(options, "Detach the program; forget bindings and sockets."), options)
    place = place_of(options)
    with lock(options, place):
        program.unload(place)
    say(f"dispatch: unloaded {place.path}")
    return 0


def upgrade(options: "Options") -> int:
    """Replace the program under traffic."""
    parse(parser_of(options, "Replace the program, keeping all state."), options)
    place = place_of(options)
    with lock(options, place), Dispatcher(place, write=True) as dispatcher:
        old, new = program.upgrade(dispatcher)
    say(f"dispatch: replaced program {old} by {new}")
    return 0


def run(options: "Options") -> int:
    """Be the sidecar."""
    from ..sidecar import run as serve

    parser = parser_of(options, "Keep a file's bindings in force and inherited sockets registered.")
    parser.add("--config", metavar="FILE", help="bindings, as for load-bindings; SIGHUP rereads it")
    parser.add("--once", default=False, help="set up and end; the kernel keeps it")
    asked = parse(parser, options)
    if not (asked.config or asked.once or "LISTEN_FDS" in os.environ):
        raise SetupError("there is nothing to keep: give --config FILE, or pass me sockets")
    return serve(place_of(options), options.wait, asked.config, asked.once)
