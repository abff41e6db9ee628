"""Where a route leads: one backend or several, which of them is asked first, and how.

Knows no I/O; the time is an argument.
"""

from enum import Enum

from .target import address_of, needs_resolving

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..target import Target

# How long a backend that failed is asked after all others.
SKIP_SECONDS = 10.0


class Balance(Enum):
    """Which of several backends is asked first."""

    ROUND_ROBIN = "round-robin"
    FIRST_ALIVE = "first-alive"


class ProxyVersion(Enum):
    """The PROXY protocol header that a backend is sent."""

    NONE = "none"
    V1 = "v1"
    V2 = "v2"


class Backend:
    """One target, and whether it answered last time."""

    __slots__ = ("address", "good_address", "refused_address", "skipped_until", "target")

    def __init__(self, target: "Target") -> None:
        self.target = target
        self.address = None if needs_resolving(target) else address_of(target)
        self.skipped_until = 0.0
        self.good_address: object = None  # of a name's several addresses, the one that answered
        self.refused_address: object = None  # and the one where nobody took our datagrams

    def failed(self, now: float) -> None:
        """Let others be asked first for a while."""
        self.skipped_until = now + SKIP_SECONDS

    def answered(self, address: object) -> None:
        """It is alive, at this address."""
        self.skipped_until = 0.0
        self.good_address = address

    def refused(self, address: object, now: float) -> None:
        """Nobody is there, though datagrams could be "connected", which asks nobody."""
        self.failed(now)
        self.refused_address = address
        if self.good_address == address:
            self.good_address = None


class Destination:
    """Backends that do the same, and how they are reached."""

    __slots__ = ("_turn", "backends", "balance", "connect_retry", "connect_timeout",
                 "proxy_protocol")  # fmt: skip

    def __init__(
        self,
        targets: "list[Target]",
        *,
        balance: Balance = Balance.FIRST_ALIVE,
        connect_timeout: float = 5.0,
        connect_retry: float = 0.0,
        proxy_protocol: ProxyVersion = ProxyVersion.NONE,
    ) -> None:
        self.backends = [Backend(target) for target in targets]
        self.balance = balance
        self.connect_timeout = connect_timeout  # seconds for each backend
        self.connect_retry = connect_retry  # seconds during which all are asked again and again
        self.proxy_protocol = proxy_protocol
        self._turn = 0

    @property
    def sole(self) -> Backend | None:
        """The backend, if there is but one."""
        return self.backends[0] if len(self.backends) == 1 else None

    def order(self, now: float) -> list[Backend]:
        """Return all backends in the order to ask them; those that failed lately come last."""
        backends = self.backends
        if len(backends) == 1:
            return backends
        if self.balance is Balance.ROUND_ROBIN:
            turn = self._turn
            self._turn = (turn + 1) % len(backends)
            backends = backends[turn:] + backends[:turn]
        return sorted(backends, key=lambda backend: backend.skipped_until > now)

    def __str__(self) -> str:
        return ", ".join(backend.target.text for backend in self.backends)
