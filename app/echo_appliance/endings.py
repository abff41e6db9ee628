"""How a stream connection ends other than by EOF: a reset of ours, and the words for an error."""

import errno
import socket
import struct

# struct linger { int l_onoff; int l_linger; }: close() sends a reset, and discards.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)

_REASONS = {
    errno.ECONNRESET: "reset",
    errno.EPIPE: "reset",
    errno.ENOTCONN: "reset",  # by shutdown(), when a reset has come just before
    errno.ETIMEDOUT: "peer-timeout",
}


def reset_on_close(sock: socket.socket) -> None:
    """Let the peer see a reset, not an end, when the socket is closed."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    except OSError:
        pass  # not every policy lets us; then the peer sees an end


def reason_of(error: OSError) -> str:
    """Name why a connection ended, for the counters."""
    number = error.errno or 0
    return _REASONS.get(number, errno.errorcode.get(number, str(number)).lower())
