"""Compares runs: prints a line for each and draws them in one picture.

    python -m tools.compare runs/grpo runs/dapo runs/sft

A line holds means of the last ten steps, of sampled answers to training tasks, and the held-out
result of a finished run: exact match before training, metrics after. The picture shows reward,
exact match and stale rate by step, each a mean of nine. sft.py samples nothing, so has no line.
"""

import html
from pathlib import Path
from statistics import fmean

from lib import parallel
from lib.config import BadInput, Parser, read_settings
from lib.files import json_rows, write
from training.curve import SERIES, known, panel, smooth, svg


def read_metrics(run):
    """The rows of a run's metrics.jsonl, oldest first, without a last line half written."""
    path = Path(run) / "metrics.jsonl"
    content = path.read_bytes() if path.is_file() else b""
    rows = [row for _, row in json_rows(path, content.rpartition(b"\n")[0]) if "step" in row]
    if not rows:
        raise BadInput(f"{run}: no metrics.jsonl with a step there; give run directories")
    return rows


def summary(run, rows):
    """The printed line of a run; "-" where it has no such metric."""
    path = Path(run) / "heldout.json"
    heldout = read_settings(path) if path.is_file() else {"before": {}, "after": {}}
    metrics = ("em", "reward", "stale")
    line = f"{rows[-1]['step']:8,}"
    parts = ((rows[-10:], metrics), ([heldout["before"]], ("em",)), ([heldout["after"]], metrics))
    for part, names in parts:
        for name in names:
            values = [row[name] for row in part if row.get(name) is not None]
            line += f"{fmean(values):8.3f}" if values else f"{'-':>8}"
    return f"{line}  {run}"


def picture(runs):
    """An SVG of {name: metrics rows}: a panel per metric, a line per run, the names below."""
    span = (min(r[0]["step"] for r in runs.values()), max(r[-1]["step"] for r in runs.values()))
    drawn = {name: rows for name, rows in runs.items() if known(rows, "em")}
    styles, parts = [], []
    for i, name in enumerate(drawn):
        style = f'stroke="hsl({137 * i % 360}, 70%, 40%)" stroke-width="2"'
        styles.append(style)
        parts.append(f'<path d="M50 {340 + 20 * i}h40" {style}/>')
        parts.append(f'<text x="100" y="{344 + 20 * i}">{html.escape(name)}</text>')
    for place, (metric, heading, ticks) in enumerate(SERIES):
        points = [smooth(known(rows, metric)) for rows in drawn.values()]
        parts += panel(place, heading, span, ticks, zip(points, styles, strict=True))
    return svg(len(SERIES), 345 + 20 * len(drawn), parts)


def main(argv=None):
    """Compare runs: a line each, and a picture. The exit status is 0."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run directory, e.g. runs/grpo")
    add("--output", default="figures/compare.svg", metavar="X", help="the picture [%(default)s]")
    args = parser.parse_args(argv)
    runs = {str(Path(run)): read_metrics(run) for run in args.runs}
    write(Path(args.output), picture(runs).encode())
    print(f"{'mean of the last 10':>32}{'held-out tasks':>32}")
    print(f"    step{'   exact  reward   stale'}  before{'   exact  reward   stale'}")
    for run, rows in runs.items():
        print(summary(run, rows))
    print(f"done: {args.output}")
    return 0


if __name__ == "__main__":
    parallel.run_main(main)
