"""Compares runs: prints a table of them and puts all of them on one page.

    python -m tools.compare runs/grpo runs/dapo runs/sft

The table holds means of the last ten steps, of sampled answers to training tasks, and the held-out
result of a finished run: exact match before training, metrics after. The page is that of a run
(page.html), with a curve for each; it needs no network. sft.py samples nothing, so has no means.
"""

from pathlib import Path
from statistics import fmean

from lib import parallel
from lib.config import BadInput, Parser, read_settings
from lib.files import write
from tasks.table import markdown
from training.page import page, read_rows

METRICS = ("em", "reward", "stale")
HEAD = ("", "step", "exact", "reward", "stale", "held out: before", "exact", "reward", "stale")


def summary(run):
    """The cells of a run's line in the table; "-" where it has no such metric."""
    rows = list(read_rows(Path(run) / "metrics.jsonl"))
    if not rows:
        raise BadInput(f"{run}: no metrics.jsonl with a step there; give run directories")
    path = Path(run) / "heldout.json"
    heldout = read_settings(path) if path.is_file() else {"before": {}, "after": {}}
    cells = [run, f"{rows[-1]['step']:,}"]
    parts = ((rows[-10:], METRICS), ([heldout["before"]], ("em",)), ([heldout["after"]], METRICS))
    for part, names in parts:
        for name in names:
            values = [row[name] for row in part if row.get(name) is not None]
            cells.append(f"{fmean(values):.3f}" if values else "-")
    return cells


def main(argv=None):
    """Compare runs: a table, and a page. The exit status is 0."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run directory, e.g. runs/grpo")
    add("--output", default="runs/compare.html", metavar="X", help="the page [%(default)s]")
    args = parser.parse_args(argv)
    lines = [HEAD, *map(summary, args.runs)]
    write(Path(args.output), page(args.runs))
    print(f"{markdown(lines)}done: {args.output}")
    return 0


if __name__ == "__main__":
    parallel.run_main(main)
