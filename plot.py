"""What a run looks like: curves for the browser, tables that fit a screen.

    python plot.py runs/grpo runs/dapo runs/sft        exact match and reward of several runs

Prints a line per run, the means of its last ten steps, and writes one SVG: a panel for exact match,
one for reward, a line per run, each point the mean of the nine steps around it. The figures are
those of metrics.jsonl, so they are of sampled answers to training tasks; a run may still go on.
"""

import contextlib
import html
import json
from pathlib import Path
from statistics import fmean as mean

from data import BadInput

LEFT, RIGHT, TOP, BOTTOM = 60, 700, 40, 370  # of the plot, in an SVG of 760 x 420
SERIES = (("reward", -3, 3, "#1f5fbf"), ("em", 0, 1, "#2a8a3e"), ("stale", 0, 1, "#c2452d"))  # figure, axis, colour


def text(x, y, content, more=""):
    return f'<text x="{x:.0f}" y="{y:.0f}" {more}>{content}</text>'


def svg(height, parts):
    """A picture, 760 wide, on white."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" font-family="sans-serif" font-size="13">'
    )
    return "\n".join([head, f'<rect width="760" height="{height}" fill="white"/>', *parts, "</svg>"])


def polyline(steps, values, box, first, last, low, high, style):
    """A line through the points; `box` is the left, right, top and bottom of what its axes span."""
    left, right, top, bottom = box
    points = []
    for step, value in zip(steps, values, strict=True):
        x = left + (right - left) * (step - first) / max(1, last - first)
        points.append(f"{x:.1f},{bottom - (bottom - top) * (value - low) / (high - low):.1f}")
    return f'<polyline points="{" ".join(points)}" fill="none" {style}/>'


def smooth(values):
    """The mean of the nine values around each, of fewer at the ends."""
    near = [values[max(0, i - 4) : i + 5] for i in range(len(values))]
    return [sum(n) / len(n) for n in near]


def known(rows, name):
    """The steps in which a figure is there, and its values; a step that was not finite has none."""
    pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


# ------------------------------------------------------------------------- one run


def frame(first, last):
    """Axes and grid: reward on the left, shares on the right, steps `first` to `last` below."""
    parts = []
    for tick in range(-3, 4):
        y = BOTTOM - (BOTTOM - TOP) * (tick + 3) / 6
        parts.append(f'<path d="M{LEFT} {y:.0f}H{RIGHT}" stroke="#ddd"/>')
        parts.append(text(LEFT - 8, y + 4, tick, 'text-anchor="end"'))
    for tick in range(0, 101, 25):
        parts.append(text(RIGHT + 8, BOTTOM - (BOTTOM - TOP) * tick / 100 + 4, f"{tick}%"))
    for fifth in range(6):
        x = LEFT + (RIGHT - LEFT) * fifth / 5
        parts.append(text(x, BOTTOM + 20, first + (last - first) * fifth // 5, 'text-anchor="middle"'))
    return [*parts, text((LEFT + RIGHT) / 2, BOTTOM + 40, "step", 'text-anchor="middle"')]


def curve(rows):
    """An SVG picture of metrics rows: thin lines are the steps, thick ones the mean of nine around each."""
    first, last = (rows[0]["step"], rows[-1]["step"]) if rows else (0, 0)
    parts, box = frame(first, last), (LEFT, RIGHT, TOP, BOTTOM)
    for place, (name, low, high, colour) in enumerate(SERIES):
        steps, values = known(rows, name)
        for line, style in ((values, 'opacity="0.3"'), (smooth(values), 'stroke-width="2.5"')):
            parts.append(polyline(steps, line, box, first, last, low, high, f'stroke="{colour}" {style}'))
        label = {"reward": "reward (left)", "em": "exact match", "stale": "stale"}[name]
        parts.append(text(LEFT + 20 + 150 * place, TOP - 15, label, f'fill="{colour}" font-weight="bold"'))
    return svg(420, parts)


# ------------------------------------------------------------------------- several runs

COLOURS = "#1f5fbf #c2452d #2a8a3e #8a4fbf #d08a1f #2a8f99 #b03a7a #555555".split()
DASHES = ("", 'stroke-dasharray="6 3"', 'stroke-dasharray="2 2"')  # for the ninth run, the seventeenth, ...
PANELS = (("exact match", "em", (0, 0.25, 0.5, 0.75, 1), 50), ("reward", "reward", range(-3, 4), 430))  # ..., ticks, x


def read_metrics(run):
    """The rows of a run's metrics.jsonl, oldest first; a last line that is only half written is left out."""
    path, rows = Path(run) / "metrics.jsonl", []
    if not path.is_file():
        raise BadInput(f"{run}: no metrics.jsonl there; give run directories, runs/grpo say")
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    if not rows:
        raise BadInput(f"{run}: no step in its metrics.jsonl yet; leave it out or wait for the first")
    return rows


def compare(runs):
    """An SVG of several runs, {name: metrics rows}: a panel a figure, a line a run, the names below."""
    first = min(rows[0]["step"] for rows in runs.values())
    last = max(rows[-1]["step"] for rows in runs.values())
    styles = [
        f'stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="2" {DASHES[i // len(COLOURS) % len(DASHES)]}'
        for i in range(len(runs))
    ]
    parts = []
    for heading, name, ticks, x in PANELS:
        box, low, high = (x, x + 300, 40, 290), ticks[0], ticks[-1]
        parts.append(text(x, 22, heading, 'font-weight="bold"'))
        for tick in ticks:
            y = 290 - 250 * (tick - low) / (high - low)
            parts.append(f'<path d="M{x} {y:.0f}h300" stroke="#ddd"/>')
            parts.append(text(x - 8, y + 4, tick, 'text-anchor="end"'))
        for place in (0, 0.5, 1):
            parts.append(text(x + 300 * place, 310, round(first + (last - first) * place), 'text-anchor="middle"'))
        for rows, style in zip(runs.values(), styles):
            steps, values = known(rows, name)
            parts.append(polyline(steps, smooth(values), box, first, last, low, high, style))
    for i, (name, style) in enumerate(zip(runs, styles)):
        parts.append(f'<path d="M50 {340 + 20 * i}h40" {style}/>')
        parts.append(text(100, 344 + 20 * i, html.escape(name)))
    return svg(345 + 20 * len(runs), parts)


def summary(runs):
    """A line per run, {name: metrics rows}: the last step, and the means of the last ten."""
    width = max(map(len, runs))
    lines = [f"{'mean of the last 10 steps':<{max(width, 25)}}{'step':>8}{'exact':>8}{'reward':>8}{'stale':>8}"]
    for name, rows in runs.items():
        means = [known(rows[-10:], figure)[1] for figure in ("em", "reward", "stale")]
        cells = [f"{mean(values):8.3f}" if values else f"{'-':>8}" for values in means]
        lines.append(f"{name:<{max(width, 25)}}{rows[-1]['step']:8,}{''.join(cells)}")
    return "\n".join(lines)


# ------------------------------------------------------------------------- tables


def fit(markdown, width=100):
    """Markdown tables for a screen: columns straight, asterisks bare, a table wider than `width` cut into several.

    Every part begins with the first column. Lines that belong to no table stay as they are.
    """
    result, table = [], []
    for line in [*markdown.split("\n"), ""]:
        if line.startswith("|"):
            table.append([cell.strip().replace("\\*", "*") for cell in line.strip("|").split("|")])
            continue
        widths = [max(map(len, column)) for column in zip(*(row for row in table if set("".join(row)) - set("-")))]
        start = 1
        while start < len(widths):
            end = start + 1
            while end < len(widths) and widths[0] + sum(widths[start : end + 1]) + 3 * (end + 2 - start) + 1 <= width:
                end += 1
            columns = [0, *range(start, end)]
            for i, row in enumerate(table):
                cells = [("-" * widths[c] if i == 1 else row[c]).ljust(widths[c]) for c in columns]
                result.append(f"| {' | '.join(cells)} |")
            start = end
            result += [""] * (start < len(widths))
        table = []
        result.append(line)
    return "\n".join(result[:-1])


def main(argv=None):
    """Compare runs: a line each, and a picture. The exit status is 0."""
    import recode  # which imports this file
    from run import write

    parser = recode.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, runs/grpo say")
    parser.add_argument("--output", default="figures/compare.svg", metavar="X", help="picture [figures/compare.svg]")
    args = parser.parse_args(argv)
    runs = {str(Path(run)): read_metrics(run) for run in args.runs}
    write(Path(args.output), compare(runs).encode())
    print(summary(runs))
    print(f"done: {args.output}")
    return 0


if __name__ == "__main__":
    import recode

    recode.guard(main)
