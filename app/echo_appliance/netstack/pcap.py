"""Writes frames to a file that tcpdump and Wireshark read.

Source: draft-ietf-opsawg-pcap, "PCAP Capture File Format", with microseconds.
"""

import struct
from time import time

from ..errors import SetupError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

_FILE_HEADER = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 0x40000, 1)  # 1: Ethernet
_RECORD = struct.Struct("<IIII")


class Capture:
    """A capture file.  Owns it."""

    def __init__(self, file: "BinaryIO") -> None:
        self._file = file
        file.write(_FILE_HEADER)

    def add(self, frame: "bytes | bytearray | memoryview") -> None:
        """Append a frame that has just passed."""
        seconds, fraction = divmod(time(), 1.0)
        size = len(frame)
        self._file.write(_RECORD.pack(int(seconds), int(fraction * 1e6), size, size))
        self._file.write(frame)

    def flush(self) -> None:
        """Let others see what has been added."""
        self._file.flush()

    def close(self) -> None:
        """Write what is left, and close the file."""
        self._file.close()


def open_capture(path: str) -> Capture:
    """Begin a capture file anew.  Raises SetupError."""
    try:
        return Capture(open(path, "wb"))
    except OSError as error:
        raise SetupError(f"--pcap: {path} cannot be written ({error.strerror})") from error
