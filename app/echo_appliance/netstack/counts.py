"""What happened on a device: the counts of its connections, and of frames, by reason."""

from ..metrics import Counters, Registry, render

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..metrics import Snapshot
    from .device import Device


class Counts:
    """The counters of one device; rooms of the stack call drop()."""

    def __init__(self, device: "Device") -> None:
        self.device = device
        self.dropped: dict[str, int] = {}
        self.of_tcp: Mapping[str, int] = {}  # its endpoint's
        self._registry = Registry()
        self.counters: Counters = self._registry.counters(device.name)

    def drop(self, reason: str) -> None:
        """Count a frame, packet or segment that got no further."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def snapshot(self) -> "Snapshot":
        """Return the values of this moment."""
        name = self.device.name
        values = self._registry.snapshot()
        values[("received_frames_total", name, "")] = self.device.received_frames
        values[("sent_frames_total", name, "")] = self.device.sent_frames
        for prefix, reasons in (("", self.dropped), ("", self.device.lost), ("tcp-", self.of_tcp)):
            for reason, count in reasons.items():
                words = reason.replace(": ", "-").replace(" ", "-")
                values[("dropped_frames_total", name, prefix + words)] = count
        return values

    def page(self) -> str:
        """Return what is served on the socket named metrics."""
        return render(self.snapshot())
