"""What TCP is told about a connection: to send at once, and to ask whether the peer is there."""

import socket

INTERNET = (socket.AF_INET, socket.AF_INET6)


def tune(sock: socket.socket, keepalive: int) -> None:
    """Set what the first octets to a backend need not wait for."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if keepalive:
            set_keepalive(sock, keepalive)
    except OSError:
        pass  # not every policy lets us, on a connection that was passed


def set_keepalive(sock: socket.socket, seconds: int) -> None:
    """Let TCP ask a silent peer after so many seconds, and give it up after three times that.

    0: let it ask no more.
    """
    if sock.family not in INTERNET:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, bool(seconds))
    if seconds:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, seconds // 2))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
