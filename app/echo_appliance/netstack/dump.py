"""`echo-appliance netstack dump`: one line per frame.  Looks, and answers nothing."""

import select
import signal
import time

from ..errors import tell
from ..loop import Loop
from ..options import Parser, count
from .describe import describe
from .driver import FRAMES_PER_TURN
from .pcap import Capture, open_capture
from .station import Options as LinkOptions
from .station import add_options, open_device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .device import Device


class Options(LinkOptions):
    """What the command line says; filled by the parser."""

    count: int


def main(arguments: "Sequence[str]") -> int:
    """Show frames until a signal, or until there were enough."""
    parser = Parser("echo-appliance netstack dump", "Show each frame in a line.")
    add_options(parser)
    parser.group("dump")
    parser.add("--count", count, default=0, metavar="N", help="end after N frames")
    options = parser.parse(arguments, Options())
    device, _ = open_device(options, [])
    capture = open_capture(options.pcap) if options.pcap is not None else None
    loop = Loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.on_signal(number, loop.stop)
    dumper = Dumper(loop, device, capture, options.count)
    try:
        loop.watch(device.descriptor, select.EPOLLIN, dumper.on_readable)
        loop.run()
    finally:
        if capture is not None:
            capture.close()
        device.close()
        loop.close()
    return 1 if capture is not None and capture.failed else 0


class Dumper:
    """Shows a device's frames.  Borrows device and capture."""

    def __init__(self, loop: Loop, device: "Device", capture: Capture | None, limit: int) -> None:
        self._loop = loop
        self._device = device
        self._capture = capture
        self._left = limit or -1

    def on_readable(self, _events: int) -> None:
        """Show what is there."""
        for _ in range(FRAMES_PER_TURN):
            try:
                taken = self._device.read()
            except BlockingIOError:
                break
            except OSError:
                taken = None
            if taken is None or not self._left:
                self._loop.stop()
                break
            self._show(taken[0])
        tell("")

    def _show(self, frame: memoryview) -> None:
        """Show a frame; with the last one wanted, end."""
        now = time.time()
        if self._capture is not None:
            self._capture.add(frame)
            self._capture.flush()
        clock = time.strftime("%H:%M:%S", time.localtime(now))
        tell(f"{clock}.{int(now % 1 * 1e6):06} {describe(frame)}\n", flush=False)
        self._left -= 1
        if not self._left:
            self._loop.stop()
