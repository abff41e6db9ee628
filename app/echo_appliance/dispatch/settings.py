"""The settings of a dispatcher: the one value of its settings map."""

from .layout import LAYOUT, SETTINGS

_IPV4 = 0xFFFFFFFF  # its half of a protocol's sizes; the upper is IPv6's


class Settings:
    """The value of the settings map."""

    __slots__ = ("capacity", "layout", "local_ports", "sizes", "source")

    def __init__(self, octets: bytes) -> None:
        layout, low, high, tcp, udp, source, capacity = SETTINGS.unpack(octets)
        self.layout = layout
        self.sizes = [tcp & _IPV4, tcp >> 32, udp & _IPV4, udp >> 32]  # of each kind
        self.local_ports = (low, high)
        self.source = source  # digest of the file in force; zeroes: unknown
        self.capacity = capacity

    def pack(self) -> bytes:
        """Return it as the kernel has it."""
        tcp4, tcp6, udp4, udp6 = self.sizes
        sizes = (tcp4 | tcp6 << 32, udp4 | udp6 << 32)
        return SETTINGS.pack(self.layout, *self.local_ports, *sizes, self.source, self.capacity)


def new_settings(capacity: int) -> Settings:
    """Return the settings of an empty dispatcher in this network namespace."""
    fresh = Settings(bytes(SETTINGS.size))
    fresh.layout = LAYOUT
    fresh.local_ports = read_local_ports()
    fresh.capacity = capacity
    return fresh


def read_local_ports() -> tuple[int, int]:
    """Return the first and last port that this namespace gives to clients."""
    with open("/proc/sys/net/ipv4/ip_local_port_range") as text:
        low, high = text.read().split()
    return int(low), int(high)
