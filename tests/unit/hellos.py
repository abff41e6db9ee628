"""ClientHellos: some that openssl 3.0 sent, and a maker of others by the RFC's layout."""

from __future__ import annotations

import struct
from collections.abc import Sequence

# openssl s_client -servername www.example.org -alpn h2,http/1.1
TLS13 = bytes.fromhex(
    "160301014e0100014a0303eeca62cc382b43fc2dc9c3191f20a6a29da37fc4bcffa57a16f5492c6bcd95a620a908"
    "c0bce7002a3d82a0de69cb6c83df4236911be09afa14ce6b59ccd72ff5cc003e130213031301c02cc030009fcca9"
    "cca8ccaac02bc02f009ec024c028006bc023c0270067c00ac0140039c009c0130033009d009c003d003c0035002f"
    "00ff010000c300000014001200000f7777772e6578616d706c652e6f7267000b000403000102000a00160014001d"
    "0017001e0019001801000101010201030104002300000010000e000c02683208687474702f312e31001600000017"
    "0000000d002a0028040305030603080708080809080a080b08040805080604010501060103030301030204020502"
    "0602002b0009080304030303020301002d00020101003300260024001d0020155e1ff7c03f93d3a092af0a6d5330"
    "c94bd037eac280ecf1829fe1e448e95314"
)
# openssl s_client -tls1_2 -noservername
TLS12_WITHOUT_NAME = bytes.fromhex(
    "16030100b7010000b303035c9ccdcab59d41f03dc2e8e9332259d8418b03e00931a9bc1993b22e1dc98acd000038"
    "c02cc030009fcca9cca8ccaac02bc02f009ec024c028006bc023c0270067c00ac0140039c009c0130033009d009c"
    "003d003c0035002f00ff01000052000b000403000102000a000c000a001d0017001e001900180023000000160000"
    "00170000000d002a0028040305030603080708080809080a080b0804080508060401050106010303030103020402"
    "05020602"
)
# openssl s_client -tls1 -servername old.example -cipher ALL:@SECLEVEL=0
TLS10 = bytes.fromhex(
    "16030100930100008f0301ce2a3ae3ff71832bb11f3bdb0fce2b585a3fab91dc6c3a9d5d2070678745247d00002e"
    "c00ac0140039003800880087c019003a0089c009c0130033003200450044c0180034004600350084002f004100ff"
    "0100003800000010000e00000b6f6c642e6578616d706c65000b000403000102000a000c000a001d0017001e0019"
    "001800230000001600000017"
    "0000"
)

SERVER_NAME, ALPN, ECH, GREASE = 0x0000, 0x0010, 0xFE0D, 0x0A0A


def vector(size: int, octets: bytes) -> bytes:
    """Return octets with their length in front."""
    return len(octets).to_bytes(size, "big") + octets


def server_name(name: bytes) -> tuple[int, bytes]:
    """Return the extension (RFC 6066 section 3)."""
    return SERVER_NAME, vector(2, b"\0" + vector(2, name))


def alpn(*names: bytes) -> tuple[int, bytes]:
    """Return the extension (RFC 7301 section 3.1)."""
    return ALPN, vector(2, b"".join(vector(1, name) for name in names))


def hello(*extensions: tuple[int, bytes], session: bytes = b"") -> bytes:
    """Return a ClientHello message, its handshake header included."""
    octets = b"".join(struct.pack("!H", kind) + vector(2, data) for kind, data in extensions)
    body = b"\3\3" + bytes(32) + vector(1, session) + vector(2, b"\x13\1") + vector(1, b"\0")
    return b"\1" + vector(3, body + vector(2, octets))


def records(message: bytes, sizes: Sequence[int] = (1 << 14,)) -> bytes:
    """Cut a message into records of these sizes; the last one is used on."""
    out, at, number = b"", 0, 0
    while at < len(message):
        size = sizes[min(number, len(sizes) - 1)]
        out += b"\x16\3\1" + vector(2, message[at : at + size])
        at, number = at + size, number + 1
    return out
