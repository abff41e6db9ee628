"""The address a datagram was sent to, and how an answer is made to leave from it.

The kernel reports it as a control message when IP_RECVORIGDSTADDR (or the IPv6
one) is set; the answer carries it back in IP_PKTINFO.  Unlike IP_PKTINFO on
the way in, this also names the right address when the packet was steered to a
socket that is bound elsewhere (TPROXY, BPF sk_lookup).

Octets in, octets out: knows no I/O.  Source: ip(7), ipv6(7), RFC 3542 section 6.1,
and the kernel's ip_cmsg_recv_dstaddr() and ip6_datagram_recv_specific_ctl().
"""

import socket
import struct

from .linux import IP_ORIGDSTADDR, IP_PKTINFO, IPV6_ORIGDSTADDR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    Ancillary = list[tuple[int, int, bytes]]

# struct sockaddr_in: family (host order), port, address, padding
_SOCKADDR_IN = struct.Struct("=H2s4s8x")
# struct sockaddr_in6: family (host order), port, flow label, address, scope (host order)
_SOCKADDR_IN6 = struct.Struct("=H2s4s16sI")
# struct in_pktinfo: interface (0: by the route), the source to use, ignored when sending
_IN_PKTINFO = struct.Struct("=i4s4s")
# struct in6_pktinfo: the source to use, interface
_IN6_PKTINFO = struct.Struct("=16sI")

# Room for what we ask for, and for what a .socket unit may have asked for besides
# (PassPacketInfo=, Timestamping=): what does not fit would be cut off.
ANCILLARY_SIZE = 512

_REPORTS = ((socket.IPPROTO_IP, IP_ORIGDSTADDR), (socket.IPPROTO_IPV6, IPV6_ORIGDSTADDR))

_BROADCAST = b"\xff\xff\xff\xff"


def answer_from(ancillary: "Sequence[tuple[int, int, bytes]]") -> "Ancillary | None":
    """Return the control messages that make an answer leave from where the datagram arrived.

    None when the datagram was sent to a group (multicast or limited broadcast):
    one packet must not be answered by everybody who is in it.  An empty list
    when the kernel reported no destination: then it chooses the address.
    """
    return answer_to(destination(ancillary))


def answer_to(data: bytes) -> "Ancillary | None":
    """The same for what destination() returned."""
    if len(data) == _SOCKADDR_IN.size:
        return _answer_from_inet(data)
    if len(data) == _SOCKADDR_IN6.size:
        return _answer_from_inet6(data)
    return []


def destination(ancillary: "Sequence[tuple[int, int, bytes]]") -> bytes:
    """Return the octets of the address that a datagram was sent to; none if it is not reported."""
    for level, kind, data in ancillary:
        if (level, kind) in _REPORTS:
            return data
    return b""


def local_address(data: bytes) -> "tuple[str, int] | tuple[str, int, int, int] | None":
    """Return what destination() reported as bind() takes it; None for a group or nothing."""
    if len(data) == _SOCKADDR_IN.size and _answer_from_inet(data) is not None:
        _, port, address = _SOCKADDR_IN.unpack(data)
        return socket.inet_ntoa(address), int.from_bytes(port, "big")
    if len(data) == _SOCKADDR_IN6.size and _answer_from_inet6(data) is not None:
        _, port, _, address, scope = _SOCKADDR_IN6.unpack(data)
        return socket.inet_ntop(socket.AF_INET6, address), int.from_bytes(port, "big"), 0, scope
    return None


def _answer_from_inet(data: bytes) -> "Ancillary | None":
    _, _, address = _SOCKADDR_IN.unpack_from(data)
    if 224 <= address[0] < 240 or address == _BROADCAST:
        return None
    return [(socket.IPPROTO_IP, IP_PKTINFO, _IN_PKTINFO.pack(0, address, bytes(4)))]


def _answer_from_inet6(data: bytes) -> "Ancillary | None":
    _, _, _, address, scope = _SOCKADDR_IN6.unpack_from(data)
    if address[0] == 0xFF:
        return None
    # A link-local address means something on its own link only; for others scope is 0.
    return [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, _IN6_PKTINFO.pack(address, scope))]
