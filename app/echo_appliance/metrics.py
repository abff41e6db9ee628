"""Counters, and their Prometheus text.  Serving them over HTTP is metrics_http's part.

One Counters object per descriptor name (several sockets may share a name).
Handlers add to its attributes directly: that is the cheapest thing Python has.
A snapshot is flat, so that several workers' snapshots merge by addition.

Source: the Prometheus text exposition format, version 0.0.4.
"""

from time import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    # (metric, descriptor name or "", reason or "") -> value
    Snapshot = dict[tuple[str, str, str], int]

SOCKET_NAME = "metrics"  # the descriptor of this name serves the page
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_PROCESS_START = time()

# Metric -> its type and help, in the order of the page.
_METRICS = {
    "connections_total": ("counter", "Connections taken."),
    "connections": ("gauge", "Connections open now."),
    "connections_refused_total": (
        "counter",
        "Connections not taken, and pauses in taking them, by reason.",
    ),
    "connections_ended_total": ("counter", "Connections that ended other than by EOF, by reason."),
    "received_octets_total": ("counter", "Octets received."),
    "sent_octets_total": ("counter", "Octets sent."),
    "received_datagrams_total": ("counter", "Datagrams received."),
    "sent_datagrams_total": ("counter", "Datagrams sent."),
    "dropped_datagrams_total": ("counter", "Datagrams not answered, by reason."),
    "dropped_log_lines_total": ("counter", "Lines of the access log that nobody took (forward)."),
    "received_frames_total": ("counter", "Frames received (netstack)."),
    "sent_frames_total": ("counter", "Frames sent (netstack)."),
    "dropped_frames_total": (
        "counter",
        "Frames, packets and segments that got no further, by reason (netstack).",
    ),
}


class Counters:
    """What happened on the sockets of one name."""

    __slots__ = (
        "accepted", "datagrams_received", "datagrams_sent", "dropped", "ended", "open",
        "received", "refused", "sent",
    )  # fmt: skip

    def __init__(self) -> None:
        self.accepted = 0
        self.open = 0  # a gauge: connections open now
        self.received = 0
        self.sent = 0
        self.datagrams_received = 0
        self.datagrams_sent = 0
        self.refused: dict[str, int] = {}
        self.ended: dict[str, int] = {}
        self.dropped: dict[str, int] = {}

    def refuse(self, reason: str) -> None:
        """Count a connection that was not taken."""
        self.refused[reason] = self.refused.get(reason, 0) + 1

    def end(self, reason: str) -> None:
        """Count a connection that ended before its time."""
        self.ended[reason] = self.ended.get(reason, 0) + 1

    def drop(self, reason: str) -> None:
        """Count a datagram that was not answered."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


class Registry:
    """The counters of one process, by descriptor name."""

    def __init__(self) -> None:
        self._counters: dict[str, Counters] = {}

    def counters(self, name: str) -> Counters:
        """Return the counters of a descriptor name; the same object each time."""
        return self._counters.setdefault(name, Counters())

    def snapshot(self) -> "Snapshot":
        """Return the values of this moment."""
        values: Snapshot = {}
        for name, counters in self._counters.items():
            values[("connections_total", name, "")] = counters.accepted
            values[("connections", name, "")] = counters.open
            values[("received_octets_total", name, "")] = counters.received
            values[("sent_octets_total", name, "")] = counters.sent
            values[("received_datagrams_total", name, "")] = counters.datagrams_received
            values[("sent_datagrams_total", name, "")] = counters.datagrams_sent
            for metric, by_reason in (
                ("connections_refused_total", counters.refused),
                ("connections_ended_total", counters.ended),
                ("dropped_datagrams_total", counters.dropped),
            ):
                values.update({(metric, name, why): count for why, count in by_reason.items()})
        return values

    def page(self) -> str:
        """Return what is served on the socket named metrics."""
        return render(self.snapshot())


def merge(snapshots: "Iterable[Snapshot]") -> "Snapshot":
    """Add up what several processes counted."""
    total: Snapshot = {}
    for snapshot in snapshots:
        for key, value in snapshot.items():
            total[key] = total.get(key, 0) + value
    return total


def without_gauges(snapshot: "Snapshot") -> "Snapshot":
    """Return what stays true of a process after its end: counters do, gauges do not."""
    return {key: value for key, value in snapshot.items() if _METRICS[key[0]][0] == "counter"}


def total(snapshot: "Snapshot", metric: str) -> int:
    """Return a metric's sum over all names and reasons."""
    return sum(value for key, value in snapshot.items() if key[0] == metric)


def summary(snapshot: "Snapshot") -> str:
    """Return the counts that fit a status line."""
    return (
        f"{total(snapshot, 'connections')} connections open, "
        f"{total(snapshot, 'connections_total')} taken, "
        f"{total(snapshot, 'received_datagrams_total')} datagrams, "
        f"{total(snapshot, 'received_octets_total')} octets received"
    )


def render(snapshot: "Snapshot") -> str:
    """Return the text that a Prometheus server scrapes."""
    start = "process_start_time_seconds"
    lines = [f"# TYPE {start} gauge", f"{start} {_PROCESS_START:.3f}"]
    for metric, (kind, words) in _METRICS.items():
        full = f"echo_appliance_{metric}"
        lines += [f"# HELP {full} {words}", f"# TYPE {full} {kind}"]
        for (of, name, reason), value in sorted(snapshot.items()):
            if of == metric:
                lines.append(f"{full}{_labels(name, reason)} {value}")
    return "\n".join(lines) + "\n"


def _labels(name: str, reason: str) -> str:
    if not name:
        return ""  # it is about the process
    by_reason = f',reason="{_escape(reason)}"' if reason else ""
    return f'{{name="{_escape(name)}"{by_reason}}}'


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
