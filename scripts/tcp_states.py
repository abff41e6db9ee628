#!/usr/bin/env python3
"""Draw the states of TCP: `tcp_states.py` writes app/echo_appliance/netstack/tcp/states.svg.

Every arrow is an entry of the table in states.py; only where a state stands is
said here.  A test compares the file with what this draws.
"""

import sys
from math import hypot
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "app"))

from echo_appliance.netstack.tcp.states import TRANSITIONS, Event, State  # noqa: E402

PICTURE = ROOT / "app/echo_appliance/netstack/tcp/states.svg"
WIDTH, HEIGHT = 980, 800
BOX = (130, 34)

# The centre of each state.  CLOSED is drawn twice: where connections begin, and where they end.
PLACES = {
    State.LISTEN: (230, 150),
    State.SYN_SENT: (780, 150),
    State.SYN_RECEIVED: (230, 270),
    State.ESTABLISHED: (490, 380),
    State.FIN_WAIT_1: (230, 490),
    State.CLOSE_WAIT: (750, 490),
    State.FIN_WAIT_2: (90, 620),
    State.CLOSING: (430, 620),
    State.LAST_ACK: (750, 620),
    State.TIME_WAIT: (260, 750),
}
BEGIN, END = (490, 40), (750, 750)
BESIDE = 12  # how far an arrow is moved to its right, so that it does not hide the opposite one

HEAD = f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">
<title>The states of a TCP connection, drawn from the table in states.py</title>
<style>
rect {{ fill: #eef3fa; stroke: #345; rx: 6px }}
path {{ stroke: #345; fill: none }}
text {{ text-anchor: middle; dominant-baseline: central; font-size: 13px; fill: #123 }}
.event {{ font-size: 11px; fill: #456; paint-order: stroke; stroke: #fff; stroke-width: 4px }}
</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8"
 orient="auto"><path d="M0,0 L8,4 L0,8 z" style="fill: #345"/></marker></defs>
<rect width="{WIDTH}" height="{HEIGHT}" style="fill: #fff; stroke: none"/>
"""


def draw() -> str:
    """Return the picture."""
    arrows = [arrow(before, event, after) for (before, event), after in TRANSITIONS.items()]
    boxes = [box(state.value, place) for state, place in PLACES.items()]
    boxes += [box(State.CLOSED.value, place) for place in (BEGIN, END)]
    lines = [line for line, _ in arrows]
    words = [word for _, word in arrows]  # above all lines
    return HEAD + "\n".join([*lines, *boxes, *words]) + "\n</svg>\n"


def box(name: str, place: tuple[int, int]) -> str:
    """Return a state."""
    (x, y), (width, height) = place, BOX
    return (
        f'<rect x="{x - width // 2}" y="{y - height // 2}" width="{width}" height="{height}"/>'
        f'<text x="{x}" y="{y}">{name}</text>'
    )


def arrow(before: State, event: Event, after: State) -> tuple[str, str]:
    """Return an arrow and the words on it."""
    start = BEGIN if before is State.CLOSED else PLACES[before]
    closed = BEGIN if before is State.SYN_SENT else END
    stop = closed if after is State.CLOSED else PLACES[after]
    (x1, y1), (x2, y2) = beside(start, stop)
    x1, y1 = at_border(start, (x1, y1), (x2, y2))
    x2, y2 = at_border(stop, (x2, y2), (x1, y1))
    line = f'<path d="M{x1:.0f},{y1:.0f} L{x2:.0f},{y2:.0f}" marker-end="url(#tip)"/>'
    x, y = x1 + (x2 - x1) * 0.45, y1 + (y2 - y1) * 0.45
    return line, f'<text class="event" x="{x:.0f}" y="{y:.0f}">{event.value}</text>'


Point = tuple[float, float]


def beside(start: Point, stop: Point) -> tuple[Point, Point]:
    """Return the line from start to stop, moved to its right."""
    along, down = stop[0] - start[0], stop[1] - start[1]
    length = hypot(along, down)
    right = (-down / length * BESIDE, along / length * BESIDE)
    return (start[0] + right[0], start[1] + right[1]), (stop[0] + right[0], stop[1] + right[1])


def at_border(centre: Point, inside: Point, outside: Point) -> Point:
    """Return where the line from inside to outside leaves the box around the centre."""
    along, down = outside[0] - inside[0], outside[1] - inside[1]
    shares = []
    for step, middle, here, half in (
        (along, centre[0], inside[0], BOX[0] / 2),
        (down, centre[1], inside[1], BOX[1] / 2),
    ):
        if step:
            border = middle + (half if step > 0 else -half)
            shares.append((border - here) / step)
    share = min(shares)
    return inside[0] + along * share, inside[1] + down * share


if __name__ == "__main__":
    PICTURE.write_text(draw())
