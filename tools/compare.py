"""Compares runs: prints a line for each and puts all of them on one page.

    python -m tools.compare runs/grpo runs/dapo runs/sft

A line holds means of the last ten steps, of sampled answers to training tasks, and the held-out
result of a finished run: exact match before training, metrics after. The page is that of a run
(page.html), with a curve for each; it needs no network. sft.py samples nothing, so has no means.
"""

from pathlib import Path
from statistics import fmean

from lib import parallel
from lib.config import BadInput, Parser, read_settings
from lib.files import write
from training.page import page, read_rows


def read_metrics(run):
    """The rows of a run's metrics.jsonl, oldest first; BadInput if it has none."""
    rows = list(read_rows(Path(run) / "metrics.jsonl"))
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


def main(argv=None):
    """Compare runs: a line each, and a page. The exit status is 0."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run directory, e.g. runs/grpo")
    add("--output", default="runs/compare.html", metavar="X", help="the page [%(default)s]")
    args = parser.parse_args(argv)
    runs = {str(Path(run)): read_metrics(run) for run in args.runs}
    write(Path(args.output), page(list(runs)))
    print(f"{'mean of the last 10':>32}{'held-out tasks':>32}")
    print(f"    step{'   exact  reward   stale'}  before{'   exact  reward   stale'}")
    for run, rows in runs.items():
        print(summary(run, rows))
    print(f"done: {args.output}")
    return 0


if __name__ == "__main__":
    parallel.run_main(main)
