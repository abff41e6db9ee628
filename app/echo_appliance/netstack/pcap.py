"""Writes frames to a file that tcpdump and Wireshark read.

Source: draft-ietf-opsawg-pcap, "PCAP Capture File Format", with microseconds.
"""

import struct
from time import time

from ..errors import SetupError, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

_FILE_HEADER = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 0x40000, 1)  # 1: Ethernet
_RECORD = struct.Struct("<IIII")


class Capture:
    """A capture file.  Owns it.

    Where it cannot be written any more it says so, once, and takes no more: that is no reason
    for connections to end.
    """

    def __init__(self, file: "BinaryIO", path: str) -> None:
        self.failed = False
        self._file = file
        self._path = path
        file.write(_FILE_HEADER)

    def add(self, frame: "bytes | bytearray | memoryview") -> None:
        """Append a frame that has just passed."""
        if self.failed:
            return
        seconds, fraction = divmod(time(), 1.0)
        size = len(frame)
        try:
            self._file.write(_RECORD.pack(int(seconds), int(fraction * 1e6), size, size))
            self._file.write(frame)
        except OSError as error:
            self._fail(error)

    def flush(self) -> None:
        """Let others see what has been added."""
        try:
            self._file.flush()
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """Write what is left, and close the file."""
        try:
            self._file.close()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self.failed:
            self.failed = True
            say(f"--pcap: {self._path}: {error.strerror}: the capture ends here")


def open_capture(path: str) -> Capture:
    """Begin a capture file anew.  Raises SetupError."""
    try:
        return Capture(open(path, "wb"), path)
    except OSError as error:
        raise SetupError(f"--pcap: {path} cannot be written ({error.strerror})") from error
