"""Says which binding a packet belongs to, why, and which socket takes it.

Asks twice: the Python model, which knows the reasons, and the program in the
kernel, which decides; or rather its twin that counts nothing, for a run by
BPF_PROG_TEST_RUN.  They must agree; a test sees to it, and so does every answer.
"""

import os
import struct
from socket import AF_INET, AF_INET6

from ..errors import SetupError
from . import libbpf
from .control import entries
from .layout import EXPLAINED, VALUE, Entry
from .model import Binding, covering, parse_address
from .place import Place
from .state import ZERO, Dispatcher

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..lending import Address

# struct bpf_sk_lookup: cookie, family, protocol, remote IPv4, IPv6, port (big-endian), local
# IPv4, IPv6, port (host order)
_CONTEXT = struct.Struct("=QII4s16s2s2x4s16sI8x")
_PROTOCOLS = (6, 17)
_UDP = 2  # of a kind
_PASS = 1  # SK_PASS
_NO_ADDRESS = bytes(16)
_TRIES, _QUESTIONS = 5, 40


class Packet:
    """What decides: protocol, family, where it goes; and where it comes from, for the flow."""

    __slots__ = ("address", "kind", "port", "remote", "remote_port")

    def __init__(self, kind: int, address: bytes, port: int) -> None:
        self.kind = kind
        self.address = address
        self.port = port
        self.remote = bytes(len(address))
        self.remote_port = 0

    def context(self) -> bytes:
        """Return it as the program sees it."""
        remote = self.remote.ljust(16, b"\0")
        local = self.address.ljust(16, b"\0")
        six = bool(self.kind & 1)
        return _CONTEXT.pack(
            0,
            AF_INET6 if six else AF_INET,
            _PROTOCOLS[self.kind >> 1],
            _NO_ADDRESS[:4] if six else remote[:4],
            remote if six else _NO_ADDRESS,
            self.remote_port.to_bytes(2, "big"),
            _NO_ADDRESS[:4] if six else local[:4],
            local if six else _NO_ADDRESS,
            self.port,
        )


class Steering:
    """Asks the program which socket would get a datagram; knows when it is another program.

    Owns the descriptor of the program it asks.
    """

    def __init__(self, place: "Place") -> None:
        self._path = f"{place.path}/explain"
        self._pin: tuple[int, int] | None = None
        self._program = -1

    def taker(self, local: "Address", peer: "Address") -> int:
        """Return the cookie of the socket that a datagram from peer to local is given to.

        0: none; it is dropped, or the normal lookup decides, or nothing is loaded.
        """
        family = int(len(local) == 4)
        packet = Packet(_UDP | family, *_octets(local))
        packet.remote, packet.remote_port = _octets(peer)
        try:
            self._look()
            _, after, _ = libbpf.run_program(self._program, packet.context())
        except OSError:
            return 0
        return int(_CONTEXT.unpack(after)[0])

    def _look(self) -> None:
        """Open the program, if it is not the one that is open."""
        found = os.stat(self._path)
        pin = (found.st_ino, found.st_ctime_ns)
        if pin != self._pin:
            self.close()
            self._program = libbpf.open_pin(self._path)
            self._pin = pin

    def close(self) -> None:
        """Close the program."""
        if self._program >= 0:
            os.close(self._program)
        self._program, self._pin = -1, None


def _octets(address: "Address") -> tuple[bytes, int]:
    _, octets = parse_address(address[0].partition("%")[0])
    return octets, address[1]


class Decision:
    """What the program in the kernel did with a packet."""

    __slots__ = ("cookie", "passed", "winner")

    def __init__(self, passed: bool, cookie: int, winner: "tuple[int, ...] | None") -> None:
        self.passed = passed
        self.cookie = cookie  # of the socket; 0: none, the normal lookup goes on (or it is dropped)
        self.winner = winner  # prefix, low, high, destination


def ask_kernel(dispatcher: Dispatcher, packet: Packet) -> Decision:
    """Run the program on a packet that nobody sent."""
    program = dispatcher.descriptor("explain")
    verdict, after, _ = libbpf.run_program(program, packet.context())
    report = libbpf.lookup(dispatcher.descriptor("explained"), ZERO, EXPLAINED.size)
    value, found, _ = EXPLAINED.unpack(report or bytes(EXPLAINED.size))
    winner = None
    if found:
        _, destination, low, high, prefix, _ = VALUE.unpack(value)
        winner = (prefix, low, high, destination)
    return Decision(verdict == _PASS, _CONTEXT.unpack(after)[0], winner)


class Explanation:
    """The answer, for people and for programs."""

    __slots__ = ("decision", "losers", "packet", "spared", "winner")

    def __init__(
        self, packet: Packet, candidates: "Sequence[Entry]", decision: Decision, spared: bool
    ) -> None:
        self.packet = packet
        self.winner = candidates[0] if candidates else None
        self.losers = candidates[1:]
        self.decision = decision
        self.spared = spared  # it goes to a port that the winner leaves to local clients

    @property
    def outcome(self) -> str:
        """What becomes of the packet."""
        if self.winner is None:
            return "no binding: the normal lookup decides"
        if self.spared:
            return "a port of local clients: the normal lookup decides (bind --ephemeral takes it)"
        if self.decision.cookie:
            return f"socket sk:{self.decision.cookie:x}"
        if self.decision.passed:
            return "no live socket: the normal lookup decides (on-miss pass)"
        return "no live socket: dropped (on-miss drop)"

    def as_text(self) -> str:
        """Some lines for people."""
        if self.winner is None:
            return f"{self.outcome}\n"
        won = self.winner.binding
        lines = [f"{won} wins", *(f"  over {_why(won, one.binding)}" for one in self.losers)]
        return "\n".join([*lines, self.outcome]) + "\n"

    def as_json(self) -> dict[str, object]:
        """The same for programs."""
        from .status import entry_data

        return {
            "winner": entry_data(self.winner) if self.winner else None,
            "over": [
                {**entry_data(one), "because": _reason(self.winner.binding, one.binding)}
                for one in self.losers
                if self.winner
            ],
            "verdict": "pass" if self.decision.passed else "drop",
            "socket": f"sk:{self.decision.cookie:x}" if self.decision.cookie else None,
            "outcome": self.outcome,
        }


def _why(winner: Binding, loser: Binding) -> str:
    return f"{loser}: {_reason(winner, loser)}"


def _reason(winner: Binding, loser: Binding) -> str:
    if winner.prefix != loser.prefix:
        return f"/{winner.prefix} is longer than /{loser.prefix}"
    width, other = winner.high - winner.low + 1, loser.high - loser.low + 1
    if width != other:
        return f"{width} port{'s' * (width > 1)} is narrower than {other}"
    return f"both have {width} ports, and {winner.low} is higher than {loser.low}"


def explain(dispatcher: Dispatcher, packet: Packet) -> Explanation:
    """Return who takes the packet and why.  Raises SetupError when model and kernel disagree.

    For a moment they may: bindings change, so that the model has to look again; or somebody else
    asks, as the sidecar does for each reply socket, and the kernel has room for one report only.
    Then it is asked again at once, which costs little, where the model reads all bindings.
    """
    for turn in range(_TRIES * _QUESTIONS):
        if turn % _QUESTIONS == 0:
            candidates, expected = _ask_model(dispatcher, packet)
        decision = ask_kernel(dispatcher, packet)
        if decision.winner == expected:
            break
    else:
        raise SetupError(
            f"the kernel chose {decision.winner}, the model {expected}: bindings changed in "
            "between (ask again), or this is a bug to report"
        )
    low, high = dispatcher.settings().local_ports
    spared = bool(candidates) and candidates[0].binding.spares_local and low <= packet.port <= high
    return Explanation(packet, candidates, decision, spared)


def _ask_model(
    dispatcher: Dispatcher, packet: Packet
) -> "tuple[list[Entry], tuple[int, ...] | None]":
    """Return all that cover the packet, the winner first, and how the kernel would name it."""
    bound = {entry.binding: entry for entry in entries(dispatcher)}
    found = covering(bound, packet.kind, packet.address, packet.port)
    candidates = [bound[one] for one in sorted(found, key=Binding.rank, reverse=True)]
    if not candidates:
        return candidates, None
    won = candidates[0].binding
    return candidates, (won.prefix, won.low, won.high, candidates[0].destination)
