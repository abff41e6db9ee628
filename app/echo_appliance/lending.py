"""What a server and the sidecar say to each other about reply sockets.

A server behind a wildcard UDP port answers each client by a socket of its own,
bound to where the client sent and connected to the client (echo/replies.py).
In a container with --network=none it can make none that reaches anybody; the
sidecar of dispatch, which is where the packets are, makes and lends them.

1. Each has a socket named `replies`: the sidecar's is a bound unix datagram
   socket, the server's one that is connected to it.  Both are inherited.
2. The server sends HELLO there with two descriptors: one end of a SEQPACKET
   pair, on which all else is said, and the UDP socket that it serves.
3. ASK + flow: lend me the socket of this flow.  The answer is flow + reason;
   an empty reason comes with the socket.
4. RETURN + flow: I have closed it.  There is no answer.

Either end of the pair going away ends all of it.  A sidecar that is started
anew hears HELLO again, since its `replies` socket is its unit's, not its own.

Octets in, octets out.  Knows no I/O.
"""

import struct
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton

from .errors import ParseError

TYPE_CHECKING = False
if TYPE_CHECKING:
    # As bind() and connect() take them: IPv4, or IPv6 with flow label and scope.
    Address = tuple[str, int] | tuple[str, int, int, int]
    Flow = tuple[Address, Address]  # our end, the client's end

SOCKET_NAME = "replies"
HELLO = b"replies 1"
ASK, RETURN = b"?", b"-"
MESSAGE_LIMIT = 128  # octets; no message is longer

# family (4 or 6), our address, our port, the client's address and port, scope
_FLOW = struct.Struct("!B16sH16sHI")
FLOW_OCTETS = _FLOW.size


def pack_flow(local: "Address", peer: "Address") -> bytes:
    """Return a flow in FLOW_OCTETS octets."""
    six = len(local) == 4
    family = AF_INET6 if six else AF_INET
    addresses = [inet_pton(family, one[0].partition("%")[0]) for one in (local, peer)]
    scope = max(one[3] for one in (local, peer) if len(one) == 4) if six else 0
    return _FLOW.pack(6 if six else 4, addresses[0], local[1], addresses[1], peer[1], scope)


def parse_flow(octets: bytes) -> "Flow":
    """Read what pack_flow() wrote.  Raises ParseError."""
    if len(octets) != FLOW_OCTETS:
        raise ParseError(f"a flow has {FLOW_OCTETS} octets, not {len(octets)}")
    version, ours, our_port, theirs, their_port, scope = _FLOW.unpack(octets)
    if not (our_port and their_port):
        raise ParseError("port 0 is no port of a flow")
    if version == 6:
        return (
            (inet_ntop(AF_INET6, ours), our_port, 0, scope),
            (inet_ntop(AF_INET6, theirs), their_port, 0, scope),
        )
    if version != 4 or scope or any(ours[4:]) or any(theirs[4:]):
        raise ParseError("neither an IPv4 nor an IPv6 flow")
    return (inet_ntop(AF_INET, ours[:4]), our_port), (inet_ntop(AF_INET, theirs[:4]), their_port)
