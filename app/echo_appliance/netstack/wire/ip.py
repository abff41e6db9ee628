"""What IPv4 and IPv6 addresses have in common, by their length: 4 or 16 octets."""

from . import ipv4, ipv6


def is_group(address: bytes) -> bool:
    """Whether it is multicast or limited broadcast.  A link's broadcast, the interface knows."""
    return ipv4.is_group(address) if len(address) == 4 else ipv6.is_group(address)
