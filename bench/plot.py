"""Draws a section as one SVG: a panel of bars per workload, two panels in a row.

Written by hand: the plot is rectangles and words, follows the reader's light
or dark colour scheme, and needs no plotting library to be installed.
"""

from collections.abc import Sequence
from xml.sax.saxutils import escape

from bench.report import Row, number

WIDTH, MARGIN, GUTTER = 860, 20, 40
BAR, GAP, HEADER, BELOW = 18, 6, 46, 22
NAME_WIDTH, VALUE_WIDTH = 122, 76
COLUMN = (WIDTH - 2 * MARGIN - GUTTER) // 2

STYLE = """
  text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #1f2328 }
  .title { font-weight: 600; font-size: 13px }
  .note { fill: #656d76; font-size: 11px }
  .value { font-variant-numeric: tabular-nums }
  .bar { fill: #afb8c1 }
  .ours { fill: #2f6feb }
  .spread { stroke: #1f2328; stroke-opacity: .45 }
  text.own { font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .note { fill: #8d96a0 }
    .bar { fill: #57606a }
    .ours { fill: #4f8cff }
    .spread { stroke: #e6edf3 }
  }
"""


def panel_height(row: Row) -> int:
    """Pixels that the panel takes."""
    return HEADER + len(row.series) * (BAR + GAP) + BELOW


def draw(rows: Sequence[Row], ours: str) -> str:
    """Return the SVG."""
    rows = [row for row in rows if row.plotted]
    parts: list[str] = []
    top = MARGIN
    for first in range(0, len(rows), 2):
        pair = rows[first : first + 2]
        for column, row in enumerate(pair):
            parts += _panel(row, ours, MARGIN + column * (COLUMN + GUTTER), top)
        top += max(map(panel_height, pair))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" '
        f'width="{WIDTH}" height="{top}" role="img">\n'
        f"<title>{escape(ours)} and its peers, measured side by side</title>\n"
        f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(row: Row, ours: str, left: int, top: int) -> list[str]:
    note = "less is better" if row.less_is_better else "more is better"
    room = COLUMN - NAME_WIDTH - VALUE_WIDTH
    scale = room / max(max(series.values) for series in row.series.values())
    parts = [
        _text(left, top + 14, row.title, "title"),
        _text(left, top + 31, f"{note}; the line spans all rounds", "note"),
    ]
    for place, (name, series) in enumerate(row.series.items()):
        y = top + HEADER + place * (BAR + GAP)
        own = " own" if name == ours else ""
        width = max(1.0, series.median * scale)
        start = left + NAME_WIDTH
        parts += [
            _text(start - 8, y + 13, name, "name" + own, anchor="end"),
            f'<rect class="bar{" ours" if own else ""}" x="{start}" y="{y}" '
            f'width="{width:.1f}" height="{BAR}" rx="2"/>',
            _spread(start + min(series.values) * scale, start + max(series.values) * scale, y),
            _text(start + max(series.values) * scale + 6, y + 13,
                  number(series.median, row.unit), "value" + own),
        ]  # fmt: skip
    return parts


def _spread(low: float, high: float, y: int) -> str:
    middle = y + BAR / 2
    return f'<line class="spread" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>'


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(words)}</text>'
