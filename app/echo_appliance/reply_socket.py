"""The socket of one flow of datagrams: bound to where the client sent, connected to the client.

The kernel gives the flow's later datagrams to it, past dispatch, and no others:
it is bound with SO_REUSEADDR beside those of other flows, and a connected
socket takes its peer's datagrams only.
"""

import socket

from .linux import IP_FREEBIND, IPV6_FREEBIND

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .lending import Address


def open_reply_socket(local: "Address", peer: "Address") -> socket.socket:
    """Return the flow's socket, non-blocking, in our network namespace; the caller owns it.

    Raises OSError; below port 1024 without CAP_NET_BIND_SERVICE, for one.
    """
    family = socket.AF_INET6 if len(local) == 4 else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        # On all of them, or the second flow to one address could not bind.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # A prefix is steered here whether or not its addresses are the machine's own.
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        sock.bind(local)
        sock.connect(peer)
    except BaseException:
        sock.close()
        raise
    return sock
