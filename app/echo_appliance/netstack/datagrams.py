"""UDP on an interface: gives datagrams to whoever serves their port.  Knows no I/O.

Source: RFC 768, RFC 1122 section 4.1.
"""

from ..errors import ParseError
from .wire import udp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .interface import Interface, Packet

    # (local, remote, datagram, now)
    Serve = Callable[[bytes, bytes, udp.Datagram, float], None]


class Datagrams:
    """UDP's part of an interface."""

    def __init__(self, interface: "Interface") -> None:
        self._interface = interface
        self._services: dict[int, Serve] = {}

    def listen(self, port: int, serve: "Serve") -> None:
        """Give what comes to this port to serve(), whose datagram is a view for the moment."""
        self._services[port] = serve

    def close(self, port: int) -> None:
        """Serve it no more."""
        self._services.pop(port, None)

    def receive(self, packet: "Packet", now: float, verified: bool) -> None:
        """Take in a packet's datagram.  Raises ParseError."""
        datagram = udp.parse(packet.payload, packet.addresses, verified=verified)
        serve = self._services.get(datagram.destination_port)
        if serve is None:
            self._interface.control.send_port_unreachable(packet, now)
            raise ParseError("udp-closed-port")
        serve(packet.destination, packet.source, datagram, now)

    def send(self, local: bytes, remote: bytes, datagram: udp.Datagram, now: float) -> bool:
        """Send a datagram; False when there is no route."""
        octets = udp.serialize(datagram, local + remote)
        return self._interface.send(local, remote, udp.PROTOCOL, octets, now)
