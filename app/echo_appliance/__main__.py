"""argv -> mode.  Only the mode that runs is imported: the first client waits for imports."""

import os
import signal
import sys

from .errors import SetupError, say, tell

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

USAGE = """\
usage: echo-appliance MODE [option ...]

modes:
  echo      send back what arrives on every inherited socket
  forward   relay every inherited socket to a target, on any socket family
  dispatch  steer whole prefixes and port ranges to sockets, in the kernel
  netstack  a TCP/IP stack of our own, on an inherited tap
  probe     test an echo server from outside, on any socket family

echo-appliance MODE --help lists a mode's options.
"""

MODES = "echo, forward, probe, dispatch or netstack"


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Run the mode that the first argument names; return the exit status."""
    mode, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    try:
        if mode == "echo":
            # PID 1 of a container ignores a signal that it does not handle; nothing is
            # accepted yet, so there is nothing to finish.  The Service takes over.
            signal.signal(signal.SIGTERM, lambda _number, _frame: os._exit(0))
            from .echo.command import main as run
        elif mode == "forward":
            from .forward.command import main as run
        elif mode == "probe":
            from .probe import main as run
        elif mode == "dispatch":
            from .dispatch.command import main as run
        elif mode == "netstack":
            from .netstack.command import main as run
        elif mode in ("-h", "--help", "help"):
            tell(USAGE)
            return 0
        else:
            raise SetupError(f"{mode!r} is not a mode: use {MODES}" if mode else
                             f"no mode given: use {MODES}")  # fmt: skip
        return run(rest)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the flush at exit would fail again
        return 1
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as a shell reports it
    except SetupError as error:
        say(str(error))
        return 2 if mode not in ("echo", "forward", "probe", "dispatch", "netstack") else 1


if __name__ == "__main__":
    sys.exit(main())
