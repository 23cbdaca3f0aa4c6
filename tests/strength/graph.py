#!/usr/bin/env python3
"""Draws a soak's table as SVG: tests/strength/graph.py soak.csv > docs/soak.svg"""

import csv
import sys

WIDTH, HEIGHT, LEFT, TOP, GAP = 760, 130, 70, 30, 44
PANELS = [
    ("memory, MiB", lambda row: float(row["resident_kib"]) / 1024),
    ("descriptors", lambda row: float(row["descriptors"])),
    ("tasks", lambda row: float(row["tasks"])),
]
STYLE = """
  text { font: 12px sans-serif; fill: #444 }
  .title { font-weight: bold }
  .axis { stroke: #bbb }
  polyline { fill: none; stroke: #1f6fb2; stroke-width: 1.2 }
"""


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with open(sys.argv[1], newline="") as table:
        rows = list(csv.DictReader(table))
    if len(rows) < 2:
        sys.exit("the table has too few rows to be drawn")
    print(draw(rows))


def draw(rows):
    height = TOP + len(PANELS) * (HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 20} {height}" role="img">',
        f"<title>A soak: {int(rows[-1]['requests']):,} requests in {minutes(rows[-1]):.0f} minutes</title>",
        f"<style>{STYLE}</style>",
    ]
    for number, (title, value) in enumerate(PANELS):
        parts += panel(TOP + number * (HEIGHT + GAP), title, [(minutes(row), value(row)) for row in rows])
    return "\n".join(parts + ["</svg>"])


def minutes(row):
    return float(row["seconds"]) / 60


def panel(top, title, points):
    """One chart, its values from 0 to a round number above the highest."""
    last, highest = points[-1][0], ceiling(max(value for _, value in points))
    bottom, right = top + HEIGHT, LEFT + WIDTH
    x = lambda minute: LEFT + WIDTH * minute / last
    y = lambda value: bottom - HEIGHT * value / highest
    line = " ".join(f"{x(minute):.1f},{y(value):.1f}" for minute, value in points)
    return [
        f'<text class="title" x="{LEFT}" y="{top - 8}">{title}</text>',
        f'<text x="{LEFT - 8}" y="{top + 10}" text-anchor="end">{highest:g}</text>',
        f'<text x="{LEFT - 8}" y="{bottom}" text-anchor="end">0</text>',
        f'<text x="{right}" y="{bottom + 16}" text-anchor="end">{last:.0f} min</text>',
        f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>',
        f'<line class="axis" x1="{LEFT}" y1="{top}" x2="{LEFT}" y2="{bottom}"/>',
        f'<polyline points="{line}"/>',
    ]


def ceiling(value):
    """A round number that is not lower."""
    step = 1
    while step * 10 < value:
        step *= 10
    return next(step * factor for factor in (1, 2, 5, 10) if step * factor >= value)


if __name__ == "__main__":
    main()
