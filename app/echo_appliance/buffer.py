"""The one buffer that all sockets of the process are read into.

Nothing stays in it between two events.  It is memory straight from the kernel,
of which only the pages that were once written to are real: a bytearray of the
same size would be zeroed, and so cost all of it from the start.
"""

import mmap

# The longest message there is: a unix datagram or seqpacket message is bounded by its
# sender's SO_SNDBUF, 208 KiB unless a privileged sender raised it; UDP has 65,507 octets.
MESSAGE_LIMIT = 1024 * 1024

# Private, so that workers do not read into each other's.
VIEW = memoryview(mmap.mmap(-1, MESSAGE_LIMIT, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
