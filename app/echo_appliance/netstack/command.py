"""`echo-appliance netstack VERB`: only the verb that runs is imported."""

from ..errors import SetupError, tell
from . import standard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_VERBS = "serve, connect, ping or dump"
_HELP = """\
usage: echo-appliance netstack VERB --device DEV --address A/P [option ...]

A TCP/IP stack of our own, on a frame descriptor: a tap, a macvtap or a packet socket.

verbs:
  serve    answer TCP and UDP on ports: echo, discard, or relay to a target
  connect  TCP client: standard input to a peer, the peer to standard output
  ping     ask for ICMP echoes
  dump     show each frame in a line

echo-appliance netstack VERB --help lists a verb's options.
"""


def main(arguments: "Sequence[str]") -> int:
    """Run one verb; return the exit status.  Raises SetupError, in words for the user."""
    standard.occupy()
    verb, *rest = arguments or [""]
    if verb == "serve":
        from .serve import main as run
    elif verb == "connect":
        from .connect import main as run
    elif verb == "ping":
        from .ping import main as run
    elif verb == "dump":
        from .dump import main as run
    elif verb in ("-h", "--help", "help"):
        tell(_HELP)
        return 0
    else:
        raise SetupError(f"{verb!r} is not a netstack verb: use {_VERBS}" if verb else
                         f"no netstack verb given: use {_VERBS}")  # fmt: skip
    return run(rest)
