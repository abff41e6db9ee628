"""The peers that are Python: an echo as asyncio protocols, on asyncio's loop or uvloop's.

Run as `peers.py asyncio|uvloop` with LISTEN_FDS.  Written the way its users
are told to write it for speed (protocols, not streams), and with flow control:
a client that does not read is not read from.
"""

import asyncio
import os
import socket
import sys
from typing import cast

FIRST = 3  # SD_LISTEN_FDS_START


class Stream(asyncio.Protocol):
    """Writes back what arrives; stops reading while the transport's buffer is full."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


class Datagrams(asyncio.DatagramProtocol):
    """Sends datagrams back.  The transport offers no way to choose the address to answer from."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.transport.sendto(data, addr)


async def serve() -> None:
    """Echo on all inherited sockets, for ever."""
    loop = asyncio.get_running_loop()
    for descriptor in range(FIRST, FIRST + int(os.environ["LISTEN_FDS"])):
        sock = socket.socket(fileno=descriptor)
        sock.setblocking(False)
        if sock.type == socket.SOCK_STREAM:
            # It calls listen() again: without its own backlog it would shrink the inherited one.
            await loop.create_server(Stream, sock=sock, backlog=4096)
        else:
            await loop.create_datagram_endpoint(Datagrams, sock=sock)
    await asyncio.Event().wait()


if __name__ == "__main__":
    if sys.argv[1] == "uvloop":
        import uvloop

        uvloop.run(serve())
    else:
        asyncio.run(serve())
