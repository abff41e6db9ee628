"""Peers of the kernel's stack for the netstack benchmark, as plain as Python allows.

stream.py sink   ADDRESS PORT           take all of each connection, and close it
stream.py source ADDRESS PORT FILE      send a file, and wait for the peer's end
"""

import socket
import sys

SIZE = 256 * 1024
# What Linux sends with unless told otherwise, and our stack, too.  A machine that is told otherwise
# would show that: BBR's pacing halves what goes over a veth.
CONGESTION = b"cubic"


def sink(address: str, port: int) -> None:
    """Serve one connection after the other, for ever."""
    buffer = bytearray(SIZE)
    with socket.create_server((address, port)) as server:
        while True:
            with server.accept()[0] as client:
                while client.recv_into(buffer):
                    pass


def source(address: str, port: int, path: str) -> None:
    """Send a file as `netstack connect --send` does: read, then write."""
    with socket.create_connection((address, port)) as sock, open(path, "rb", 0) as file:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, CONGESTION)
        while octets := file.read(SIZE):
            sock.sendall(octets)
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)


if __name__ == "__main__":
    if sys.argv[1] == "sink":
        sink(sys.argv[2], int(sys.argv[3]))
    else:
        source(sys.argv[2], int(sys.argv[3]), sys.argv[4])
