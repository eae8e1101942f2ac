"""page.html: the curves of runs, their held-out metrics and their steps, in one file.

It opens from disk and loads nothing. training/page.html is its style and script; page() adds JSON
with "<" escaped, of which the script makes text nodes. So no text of a model is ever run.
"""

import difflib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import reward
from lib.config import read_settings
from lib.files import json_rows
from training.screen import heldout_table

TEMPLATE = Path(__file__).with_suffix(".html").read_text()
METRICS = ("reward", "em", "stale", "obeys", "format", "completion_length", "kl", "lr", "loss")
MAX_CURVES = 500_000  # bytes of all runs together
MAX_STEPS = 2_200_000


def read_rows(path):
    """Yield the rows of a .jsonl file, but not a last line half written; none without a file."""
    content = path.read_bytes() if path.is_file() else b""
    for _, row in json_rows(path, content.rpartition(b"\n")[0]):
        if "step" in row:
            yield row


def dump(value):
    """JSON that can stand in a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def fit(items, most):
    """All items, or every 2nd, 4th, ... and the last: at most `most` bytes of JSON."""
    while len(items) > 2 and len(dump(items)) > most:
        items = items[:-1:2] + items[-1:]
    return items


def point(row):
    """The step and its METRICS; None where one is unknown."""
    values = [row.get(name) for name in METRICS]
    return [row["step"], *(x if x is None else float(f"{x:.4g}") for x in values)]


def diff(old, new):
    """All lines of two programs, each after "-" (only in old), "+" (only in new) or a blank."""
    old, new = old.split("\n"), new.split("\n")
    lines = difflib.unified_diff(old, new, n=len(old) + len(new), lineterm="")
    return list(lines)[3:] or [f" {line}" for line in old]


def reasons(row, code, needed):
    """Why an answer has its reward, and whether it follows the note: lines of text."""
    if row.get("format") is None or row["reward"] is None:  # an older run, or weights of NaN
        return []
    form = "well-formed" if row["format"] > 0 else "cut at the limit" if row["cut"] else "broken"
    why = f"similarity {row['es']:.3f}"
    if row["em"]:
        why = "exact"
    elif row["stale"]:
        why = "a copy of the old code"
    elif not row["parses"]:
        why = "no code" if code is None else "does not parse"
    correctness = row["reward"] - row["format"]
    lines = [f"format {row['format']:+.2f}, {form}", f"code {correctness:+.2f}, {why}"]
    if needed:
        missing = sorted(needed - reward.words(reward.strip_comments(code or "")))
        lines.append(f"lacks {', '.join(missing)}" if missing else "uses the note's names")
    return lines


def answer(row, needed):
    """What the page shows of a completion; an older run has less."""
    shown = {name: row[name] for name in ("step", "reward", "advantage") if name in row}
    code = reward.extract_code(row["completion"])
    shown["why"] = reasons(row, code, needed)
    shown["code"] = [] if code is None else diff(row.get("old_code", code), code)
    tokens = row.get("tokens")
    if not tokens or any(None in token for token in tokens):  # not watched, or not finite
        return shown | {"tokens": [(row["completion"], None, None)]}
    before, after = (sum(token[i] for token in tokens) for i in (1, 2))
    shown["why"].append(f"log-probability {before:.2f}, then {after:.2f}")
    short = [(text, round(100 * a), round(10_000 * (b - a))) for text, a, b in tokens]  # integers
    return shown | {"tokens": short}


def tasks(path):
    """The tasks of all logged steps, each with its answers, best first; by samples.jsonl."""
    shown = []
    rows = (row for row in read_rows(path) if "heldout" not in row)  # an older run has such rows
    for _, group in itertools.groupby(rows, lambda row: row["step"]):
        best_first = sorted(group, key=lambda row: -(row["reward"] or 0))  # null if overflowed
        row = {"old_code": "", "new_code": ""} | best_first[0]  # not in an older run
        needed = reward.needed(SimpleNamespace(**row))
        fields = {"note": f" {row['update_info']}", "needed": sorted(needed)}
        fields["diff"] = diff(row["old_code"], row["new_code"])
        shown.append(fields | {"answers": [answer(row, needed) for row in best_first]})
    return shown


def page(runs):
    """The page of some run directories, as bytes."""
    shown = []
    for run in map(Path, runs):
        steps = tasks(run / "samples.jsonl")
        path = run / "heldout.json"
        points = [point(row) for row in read_rows(run / "metrics.jsonl")]
        fields = {"name": str(run), "logged": len(steps)}
        fields["heldout"] = heldout_table(**read_settings(path)) if path.is_file() else ""
        fields["curves"] = fit(points, MAX_CURVES / len(runs))
        fields["steps"] = fit(steps, MAX_STEPS / len(runs))
        shown.append(fields)
    return TEMPLATE.replace("DATA", dump(shown), 1).encode()
