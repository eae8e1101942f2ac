"""Compares runs: prints a line for each and draws them in one picture.

    python -m tools.compare runs/grpo runs/dapo runs/sft

Printed: means of the last ten steps, of sampled answers to training tasks; and for a finished run
with --heldout its exact match before training and its metrics after. Drawn: reward and exact match
by step, each point a mean of nine. sft.py does not sample while it trains, so it has held-out
metrics only and no line in the picture. Runs may still be going on.
"""

import html
import json
from pathlib import Path
from statistics import fmean

from training import parallel
from training.config import BadInput, Parser, read_settings
from training.curve import SERIES, known, panel, smooth, svg
from training.files import write

METRICS = ("em", "reward", "stale")
HEADING = f"""{"mean of the last 10":>32}{"held out":>16}
    step   exact  reward   stale  before   exact  reward   stale"""


def read_metrics(run):
    """The rows of a run's metrics.jsonl, oldest first, without a last line half written."""
    path = Path(run) / "metrics.jsonl"
    content = path.read_text() if path.is_file() else ""
    rows = [json.loads(line) for line in content.rpartition("\n")[0].splitlines()]
    if not rows:
        raise BadInput(f"{run}: no step in a metrics.jsonl there; give run directories")
    return rows


def cell(rows, name):
    """The mean of a metric, as text; "-" if no row has it."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return f"{fmean(values):8.3f}" if values else f"{'-':>8}"


def summary(run, rows):
    """The printed line of a run, under HEADING."""
    path = Path(run) / "heldout.json"
    heldout = read_settings(path) if path.is_file() else {"before": {}, "after": {}}
    cells = [cell(rows[-10:], name) for name in METRICS]
    cells.append(cell([heldout["before"]], "em"))
    cells += [cell([heldout["after"]], name) for name in METRICS]
    return f"{rows[-1]['step']:8,}{''.join(cells)}  {run}"


def picture(runs):
    """An SVG of {name: metrics rows}: a panel per metric, a line per run, the names below."""
    span = (min(r[0]["step"] for r in runs.values()), max(r[-1]["step"] for r in runs.values()))
    drawn = {name: rows for name, rows in runs.items() if known(rows, "em")}
    lines = {"reward": [], "em": []}
    parts = []
    for i, (name, rows) in enumerate(drawn.items()):
        style = f'stroke="hsl({137 * i % 360}, 70%, 40%)" stroke-width="2"'  # neighbours differ
        for metric in lines:
            lines[metric].append((smooth(known(rows, metric)), style))
        parts.append(f'<path d="M50 {340 + 20 * i}h40" {style}/>')
        parts.append(f'<text x="100" y="{344 + 20 * i}">{html.escape(name)}</text>')
    for place, (metric, heading, ticks) in enumerate(SERIES[:2]):
        parts += panel(place, heading, span, ticks, lines[metric])
    return svg(2, 345 + 20 * len(drawn), parts)


def main(argv=None):
    """Compare runs: a line each, and a picture. The exit status is 0."""
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, e.g. runs/grpo")
    shown = "picture [figures/compare.svg]"
    parser.add_argument("--output", default="figures/compare.svg", metavar="X", help=shown)
    args = parser.parse_args(argv)
    runs = {str(Path(run)): read_metrics(run) for run in args.runs}
    write(Path(args.output), picture(runs).encode())
    print(HEADING)
    for run, rows in runs.items():
        print(summary(run, rows))
    print(f"done: {args.output}")
    return 0


if __name__ == "__main__":
    parallel.run_main(main)
