"""The Internet checksum: the ones' complement sum of 16-bit words.  Source: RFC 1071.

A ones' complement sum of 16-bit words is the number that the octets are, modulo
65,535: 65,536 leaves the rest 1, so that each word counts once wherever it
stands.  One big division is what Python does fastest: 3.0 us for 1,480 octets,
where summing a memoryview that is cast to words takes twice that.

Sums of parts can be added, as long as each part but the last has an even length.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    Octets = bytes | bytearray | memoryview


def partial_sum(octets: "Octets") -> int:
    """Return the sum of the words, not complemented and below 65,535; an odd end is padded."""
    number = int.from_bytes(octets, "big")
    return (number << 8 if len(octets) & 1 else number) % 65535


def checksum(octets: "Octets", so_far: int = 0) -> int:
    """Return what to put into the checksum field, which must be zero in `octets`."""
    return -(partial_sum(octets) + so_far) % 65535


def is_valid(octets: "Octets", so_far: int = 0) -> bool:
    """Whether octets that contain their checksum sum up to nothing."""
    return (partial_sum(octets) + so_far) % 65535 == 0


def pseudo_header_sum(addresses: "Octets", protocol: int, length: int) -> int:
    """Return the sum of the pseudo-header: both addresses, the protocol and the length.

    The same for both versions, since zeros add nothing: RFC 9293 section 3.1, RFC 8200
    section 8.1.  `addresses` is source and destination in a row.
    """
    return (int.from_bytes(addresses, "big") + protocol + length) % 65535
