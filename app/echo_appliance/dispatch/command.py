"""`echo-appliance dispatch COMMAND`: from the command line to one call each.

Data goes to stdout, messages to stderr.  Only what the command needs is
imported: people run many of these, one after the other.
"""

import errno

from ..errors import ParseError, SetupError
from ..options import Parser, seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_DESCRIPTION = "Steer whole prefixes and ranges of ports to sockets, by BPF in the kernel."
_COMMANDS = """
  load                                  put the dispatcher into the network namespace
  unload                                take it out, with all bindings and registrations
  upgrade                               replace its program by this version's, under traffic
  bind LABEL tcp|udp PREFIX PORT        steer packets to a label; PORT is one, FIRST-LAST, or 0: all
  unbind LABEL tcp|udp PREFIX PORT      undo bind
  bindings [tcp|udp|any [PREFIX [PORT]]]  list those that overlap with this
  load-bindings FILE                    replace all bindings at once by a file's (-: standard input)
  register [LABEL]                      register inherited sockets (default label: descriptor name)
  register-pid PID LABEL tcp|udp ADDR PORT  register sockets of a running process
  unregister LABEL ipv4|ipv6 tcp|udp    forget a destination's sockets
  status, list                          bindings, destinations and counters
  explain tcp|udp ADDR PORT             which binding wins, why, and which socket takes it
  metrics                               the counters as Prometheus text
  run --config FILE                     load, register LISTEN_FDS, bind, and keep it so (or --once)

COMMAND --help tells more."""

# Command -> its function.
_NAMES = {name: name.replace("-", "_") for name in (
    "load", "unload", "upgrade", "bind", "unbind", "bindings", "load-bindings", "register",
    "register-pid", "unregister", "status", "explain", "metrics", "run",
)} | {"list": "status"}  # fmt: skip

_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21, "CAP_BPF": 39}


class Options:
    """What all commands have in common; filled by the parser."""

    netns: str | None
    bpffs: str
    wait: float
    command: str
    rest: list[str]


def main(arguments: "Sequence[str]") -> int:
    """Run one command; return the exit status.  Raises SetupError, in words for the user."""
    parser = Parser("echo-appliance dispatch", f"{_DESCRIPTION}\n\ncommands:{_COMMANDS}")
    parser.add("--netns", metavar="PATH", help="the network namespace (default: ours)")
    parser.add("--bpffs", default="/sys/fs/bpf", metavar="PATH", help="where the state is pinned")
    parser.add(
        "--wait", seconds, default=10.0, metavar="S",
        help="how long to wait for another command to end (default: 10)",
    )  # fmt: skip
    end = _end_of_options(arguments)
    options = parser.parse(arguments[:end], Options())
    if end == len(arguments):
        parser.error("name a command")
    options.command = arguments[end]
    options.rest = list(arguments[end + 1 :])
    return _run(options)


def _end_of_options(arguments: "Sequence[str]") -> int:
    """Return where the command's name is: our own options come before it, each with a value."""
    end = 0
    while end < len(arguments) and arguments[end].startswith("-"):
        lone = "=" in arguments[end] or arguments[end] in ("-h", "--help")
        end += 1 if lone else 2
    return min(end, len(arguments))


def _run(options: Options) -> int:
    if options.command not in _NAMES:
        raise SetupError(f"{options.command!r} is not a dispatch command; see dispatch --help")
    try:
        return _command(options.command)(options)
    except ParseError as error:
        raise SetupError(str(error)) from None
    except BrokenPipeError:
        return 1  # whoever read our data has enough of it
    except OSError as error:
        raise SetupError(_words(error, options.command)) from None


def _command(name: str) -> "Callable[[Options], int]":
    """Import the room of a command, and no other; return the command."""
    room: object
    if name in ("load", "unload", "upgrade", "run"):
        from .commands import program

        room = program
    elif name in ("bind", "unbind", "bindings", "load-bindings"):
        from .commands import bindings

        room = bindings
    elif name in ("register", "register-pid", "unregister"):
        from .commands import sockets

        room = sockets
    else:
        from .commands import reading

        room = reading
    found: Callable[[Options], int] = getattr(room, _NAMES[name])
    return found


def _words(error: OSError, command: str) -> str:
    """Say what the kernel's no means, in one line."""
    text = f"{error.strerror} ({error.filename})" if error.filename else str(error.strerror)
    if error.errno in (errno.ENOSYS, errno.EINVAL):
        from .libbpf import has_sk_lookup
        from .place import NEEDED

        if not has_sk_lookup():
            return f"{NEEDED}: {text}"
    if error.errno not in (errno.EPERM, errno.EACCES):
        return text
    needed = ["CAP_BPF", "CAP_NET_ADMIN"]
    if command == "register-pid":
        needed.append("CAP_SYS_PTRACE")
    missing = [name for name in needed if not _capable(name)]
    if missing:
        return f"{text}: {command} needs {' and '.join(needed)}; missing: {', '.join(missing)}"
    return text


def _capable(name: str) -> bool:
    with open("/proc/self/status") as lines:
        effective = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff"))
    has = effective >> _CAPABILITIES[name] & 1
    # CAP_SYS_ADMIN is all that CAP_BPF was split from.
    return bool(has or (name == "CAP_BPF" and effective >> _CAPABILITIES["CAP_SYS_ADMIN"] & 1))
