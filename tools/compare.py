"""Several runs side by side.

    python -m tools.compare runs/grpo runs/dapo runs/sft

Prints a line per run, the means of its last ten steps, and writes one SVG: a panel for exact match,
one for reward, a line per run, each point the mean of the nine steps around it. The figures are
those of metrics.jsonl, so they are of sampled answers to training tasks; a run may still go on.
"""

import contextlib
import html
import json
from pathlib import Path
from statistics import fmean as mean

from training import parallel
from training.config import BadInput, Parser
from training.curve import known, polyline, smooth, svg, text
from training.files import write


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


def main(argv=None):
    """Compare runs: a line each, and a picture. The exit status is 0."""
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, runs/grpo say")
    parser.add_argument("--output", default="figures/compare.svg", metavar="X", help="picture [figures/compare.svg]")
    args = parser.parse_args(argv)
    runs = {str(Path(run)): read_metrics(run) for run in args.runs}
    write(Path(args.output), compare(runs).encode())
    print(summary(runs))
    print(f"done: {args.output}")
    return 0


if __name__ == "__main__":
    parallel.run_main(main)
