"""Where packets go next, and from which of our addresses.  Knows no I/O.

A host's routing: what is on a link of ours goes there, all else to the gateway
of its version.  A Way is what a destination's packets have in common, kept so
that none of it is worked out for each.
"""

from .checksum import partial_sum
from .wire import ipv6

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .addresses import Network
    from .neighbours import Neighbour

WAYS_LIMIT = 4096
PATH_MTU_SECONDS = 600.0  # RFC 1191 section 6.3: after that, a larger one is tried again
# Linux's bound (net.ipv4.route.min_pmtu): a forged ICMP must not cut us down to nothing.
PATH_MTU_FLOOR = 552


class Way:
    """From one of our addresses to one remote one."""

    __slots__ = (
        "_link_mtu", "_path_mtu", "_path_mtu_until", "addresses", "identification", "local",
        "neighbour", "next_hop", "remote", "sum",
    )  # fmt: skip

    def __init__(self, local: bytes, remote: bytes, next_hop: bytes, link_mtu: int) -> None:
        self.local = local
        self.remote = remote
        self.addresses = local + remote
        self.sum = partial_sum(self.addresses)  # what each packet's checksums begin with
        self.next_hop = next_hop
        self.identification: int | None = None  # of the last packet that was cut
        self.neighbour: Neighbour | None = None
        self._link_mtu = link_mtu
        self._path_mtu = link_mtu
        self._path_mtu_until = 0.0

    @property
    def is_ipv4(self) -> bool:
        """Which version it is for."""
        return len(self.remote) == 4

    def mtu(self, now: float) -> int:
        """Return the largest packet that gets through, as far as we know."""
        if self._path_mtu < self._link_mtu and now > self._path_mtu_until:
            self._path_mtu = self._link_mtu
        return self._path_mtu

    def narrow(self, mtu: int, now: float) -> bool:
        """Take in that a router on the way carries no more than `mtu`; False if that is no news."""
        mtu = max(mtu, PATH_MTU_FLOOR if self.is_ipv4 else ipv6.MINIMUM_MTU)
        if mtu >= self.mtu(now):
            return False
        self._path_mtu = mtu
        self._path_mtu_until = now + PATH_MTU_SECONDS
        return True


class Routes:
    """Our addresses, and the gateways beyond them."""

    def __init__(
        self, networks: "Sequence[Network]", gateways: "Sequence[bytes]", link_mtu: int
    ) -> None:
        self._networks = networks
        self._gateways = {len(gateway): gateway for gateway in gateways}
        self._link_mtu = link_mtu
        self._ways: dict[bytes, Way] = {}

    def next_hop(self, destination: bytes) -> bytes | None:
        """Return who on the link takes packets for the destination; None without a route."""
        if any(destination in network for network in self._networks):
            return destination
        if len(destination) == 16 and ipv6.is_link_local(destination):
            return destination
        return self._gateways.get(len(destination))

    def source_for(self, destination: bytes) -> bytes | None:
        """Return our address to speak from; None when we have none of that version."""
        ours = [one for one in self._networks if len(one.address) == len(destination)]
        near = [one.address for one in ours if destination in one]
        return next(iter(near or [one.address for one in ours]), None)

    def way(self, local: bytes, remote: bytes) -> Way | None:
        """Return how to get there, the same object each time; None without a route."""
        key = local + remote
        way = self._ways.get(key)
        if way is None:
            next_hop = self.next_hop(remote)
            if next_hop is None:
                return None
            if len(self._ways) >= WAYS_LIMIT:
                del self._ways[next(iter(self._ways))]
            way = self._ways[key] = Way(local, remote, next_hop, self._link_mtu)
        return way

    def ways_to(self, remote: bytes) -> "list[Way]":
        """Return those that are in use to a remote address."""
        sources = [one.address for one in self._networks if len(one.address) == len(remote)]
        ways = [self._ways.get(source + remote) for source in sources]
        return [way for way in ways if way is not None]
