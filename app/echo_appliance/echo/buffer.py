"""The one buffer that all sockets of the process are read into.

Nothing stays in it between two events.  It is memory straight from the kernel,
of which only the pages that were once written to are real: a bytearray of the
same size would be zeroed, and so cost all of it from the start.
"""

import mmap
import socket

# The longest message there is: a unix datagram or seqpacket message is bounded by its
# sender's SO_SNDBUF, 208 KiB unless a privileged sender raised it; UDP has 65,507 octets.
MESSAGE_LIMIT = 1024 * 1024

# Private, so that workers do not read into each other's.
VIEW = memoryview(mmap.mmap(-1, MESSAGE_LIMIT, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def let_answers_be_long(sock: socket.socket) -> None:
    """Let a unix socket send messages as long as those it may get.

    A message is bounded by its sender's SO_SNDBUF.  The kernel gives us what any
    unprivileged client can have (net.core.wmem_max), which is more than the default.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_LIMIT)
    except OSError:
        pass  # not every policy lets us; then messages above the default are dropped and counted
