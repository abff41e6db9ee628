"""What answering datagrams needs in every mode: where from, how long, and why it failed."""

import errno
import socket

from .buffer import MESSAGE_LIMIT
from .errors import say
from .inherit import Inherited
from .linux import IP_RECVORIGDSTADDR, IPV6_FREEBIND, IPV6_RECVORIGDSTADDR

_SEND_REASONS = {
    errno.EAGAIN: "send-buffer-full",
    errno.ENOBUFS: "send-buffer-full",
    errno.ENOENT: "client-address-not-reachable",  # a path of another mount namespace
    errno.ECONNREFUSED: "client-gone",
    errno.EACCES: "not-permitted",
    errno.EPERM: "not-permitted",
    errno.ENETUNREACH: "no-way-back",  # also from a directed broadcast, which is no source
}


def ask_for_destination(inherited: Inherited) -> None:
    """Let the kernel report where each datagram was sent to, and let answers leave from there."""
    options = [
        # A dual-stack socket reports IPv4 destinations by the IPv4 option.
        (socket.IPPROTO_IP, IP_RECVORIGDSTADDR, "IP_RECVORIGDSTADDR"),
    ]
    if inherited.family == socket.AF_INET6:
        options += [
            (socket.IPPROTO_IPV6, IPV6_RECVORIGDSTADDR, "IPV6_RECVORIGDSTADDR"),
            (socket.IPPROTO_IPV6, IPV6_FREEBIND, "IPV6_FREEBIND"),
        ]
    for level, option, name in options:
        try:
            inherited.socket.setsockopt(level, option, 1)
        except OSError as error:
            say(f"{inherited}: {name} refused ({error.strerror}); the kernel picks the address")


def send_reason(error: OSError) -> str:
    """Name why a datagram could not be sent, for the counters."""
    number = error.errno or 0
    return _SEND_REASONS.get(number, errno.errorcode.get(number, str(number)).lower())


def let_answers_be_long(sock: socket.socket) -> None:
    """Let a unix socket send messages as long as those it may get.

    A message is bounded by its sender's SO_SNDBUF.  The kernel gives us what any
    unprivileged client can have (net.core.wmem_max), which is more than the default.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_LIMIT)
    except OSError:
        pass  # not every policy lets us; then messages above the default are dropped and counted
