"""ARP for IPv4 over Ethernet.  Source: RFC 826; probes and announcements: RFC 5227."""

import struct

from ...errors import ParseError

REQUEST = 1
REPLY = 2

_MESSAGE = struct.Struct("!HHBBH6s4s6s4s")
_ETHERNET_IPV4 = (1, 0x0800, 6, 4)
UNKNOWN_HARDWARE = bytes(6)
UNKNOWN_PROTOCOL = bytes(4)


class Message:
    """A request or a reply.  A probe is a request whose sender has no protocol address yet."""

    __slots__ = (
        "operation", "sender_hardware", "sender_protocol", "target_hardware", "target_protocol",
    )  # fmt: skip

    def __init__(
        self,
        operation: int,
        sender_hardware: bytes,
        sender_protocol: bytes,
        target_hardware: bytes,
        target_protocol: bytes,
    ) -> None:
        self.operation = operation
        self.sender_hardware = sender_hardware
        self.sender_protocol = sender_protocol
        self.target_hardware = target_hardware
        self.target_protocol = target_protocol


def parse(octets: memoryview) -> Message:
    """Return the message, whatever padding follows it.  Raises ParseError."""
    if len(octets) < _MESSAGE.size:
        raise ParseError("arp-truncated")
    *kind, operation, sender, sender_ip, target, target_ip = _MESSAGE.unpack_from(octets)
    if tuple(kind) != _ETHERNET_IPV4 or operation not in (REQUEST, REPLY):
        raise ParseError("arp-unknown-kind")
    if sender[0] & 1:  # it would make us send to everybody
        raise ParseError("arp-group-sender")
    return Message(operation, sender, sender_ip, target, target_ip)


def serialize(message: Message) -> bytes:
    """Return the message's 28 octets."""
    return _MESSAGE.pack(
        *_ETHERNET_IPV4,
        message.operation,
        message.sender_hardware,
        message.sender_protocol,
        message.target_hardware,
        message.target_protocol,
    )
