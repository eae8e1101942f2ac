"""The table of an evaluation: metrics with 95 % intervals, and the comparison of several runs.

    pass@k = 1 - C(n - c, k) / C(n, k)      n samples of a problem, c of them right       (eq. 1)

An interval is eq. 2 (Wilson) if every problem has 0 or 1, with p their mean, else eq. 3 (the
bootstrap). Where all have the same value, eq. 2 for p = 0 bounds the share of problems that differ.

    (p + z^2/2N -+ z sqrt(p (1 - p) / N + z^2/4N^2)) / (1 + z^2/N),  z = 1.96             (eq. 2)
    [q(.025), q(.975)] of 2,000 means over N problems drawn with replacement              (eq. 3)
"""

import math
from collections import Counter
from pathlib import Path
from statistics import fmean as mean

import numpy as np

from lib.config import BadInput, read_settings

SCORES = """
reward es_star em_star stale obeys determined unchanged format no_code cut stray_lines
""".split()  # of an answer, besides whether it is right: shares, but for those in RANGES
# The programs of numpy2 have at most 30 lines.
RANGES = {"reward": (-3, 3), "es_star": (-2, 2), "em_star": (-2, 2), "stray_lines": (0, 30)}
GROUPS = ("change", "no change", "seen", "unseen", "unrelated")  # these have a column each
Z = 1.96


def pass_at_k(n, c, k):
    """The unbiased estimate of pass@k from n samples, c of them right; ValueError for k > n."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} from {n} samples, {c} right: needs 0 <= c <= n, 1 <= k <= n")
    return 1 - math.comb(n - c, k) / math.comb(n, k)  # eq. 1


def metrics(rows, ks):
    """{metric: value} of one problem, from the rows of its samples; None where it has no value."""
    result = {}
    for name, field in (("pass", "passed"), ("UPass", "updated")):
        if field in rows[0]:
            right = sum(row[field] for row in rows)
            result |= {f"{name}@{k}": pass_at_k(len(rows), right, k) for k in ks}
    values = {"pass_if_formed": [row["passed"] for row in rows if row["format"]]}
    values |= {name: [row[name] for row in rows] for name in SCORES if name in rows[0]}
    for name, column in values.items():
        known = [value for value in column if value is not None]
        result[name] = mean(known) if known else None
    return result


def wilson(p, N):
    """Lower and upper end of the interval of a share p of N problems."""
    half = Z * math.sqrt(p * (1 - p) / N + Z**2 / (4 * N**2))
    ends = p + Z**2 / (2 * N) + np.array([-half, half])
    return np.clip(ends / (1 + Z**2 / N), 0, 1)  # eq. 2


def interval(values, low=0.0, high=1.0):
    """(mean, lower end, upper end) for values, one per problem, that lie in [low, high]."""
    x = np.array(values, dtype=float)  # (N,)
    N = len(x)
    if (low, high) == (0, 1) and np.isin(x, (0, 1)).all():
        return x.mean(), *wilson(x.mean(), N)
    if (x == x[0]).all():
        _, share = wilson(0, N)
        return x[0], x[0] - share * (x[0] - low), x[0] + share * (high - x[0])
    draws = np.random.default_rng(0).integers(N, size=(2000, N))
    return x.mean(), *np.quantile(x[draws].mean(1), (0.025, 0.975))  # eq. 3


def tabulate(problems, rows, args):
    """What table.json holds: metrics by group, as [mean, lower end, upper end], and by problem."""
    each = {}
    groups = {}
    for problem in problems:
        samples = [rows[problem.name, j] for j in range(args.num_samples)]
        each[problem.name] = metrics(samples, args.k)
        for group in filter(None, ("all", problem.package, problem.update_type)):
            groups.setdefault(group, []).append(each[problem.name])
    means = {}
    for group, members in groups.items():
        means[group] = {"problems": len(members)}
        for name in members[0]:
            values = [member[name] for member in members if member[name] is not None]
            if values:
                means[group][name] = interval(values, *RANGES.get(name, (0, 1)))
    statuses = Counter(row["status"] for row in rows.values() if "status" in row)
    return {"table": means, "statuses": statuses, "problems": each}


def estimate(name, values, sign=""):
    """(mean, lower end, upper end) of a metric as text, or a mean alone; shares in per cent."""
    form, factor = (".2f", 1) if name in RANGES else (".1f", 100)
    mean, *ends = [f"{factor * value:{sign}{form}}" for value in values]
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def markdown(lines):
    """A Markdown table with aligned columns; the first of the lines is its head."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [lines[0], ["-" * width for width in widths], *lines[1:]]
    rows = [map(str.ljust, line, widths) for line in lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def show(result):
    """table.md: a line per metric, a column per group of GROUPS if there are two, the statuses."""
    table = result["table"]
    groups = [group for group in GROUPS if group in table]
    groups = ["all", *groups] if len(groups) > 1 else ["all"]
    lines = [["mean [95 % interval]"], *([name] for name in table["all"] if name != "problems")]
    for group in groups:
        lines[0].append(f"{group} ({table[group]['problems']})")
        for line in lines[1:]:
            values = table[group].get(line[0])
            line.append(estimate(line[0], values) if values else "-")
    counts = "".join(f", {count} {status}" for status, count in sorted(result["statuses"].items()))
    return f"{markdown(lines)}\n{len(result['problems'])} problems{counts}\n"


def read_tables(run):
    """{"TASK METRIC": {problem: value}} of all tasks of a run; None where there is no value."""
    found = {}
    for path in sorted(Path(run).glob("*/table.json")):
        rows = read_settings(path).get("problems")
        try:
            for name in next(iter(rows.values())):
                values = [None if row[name] is None else float(row[name]) for row in rows.values()]
                found[f"{path.parent.name} {name}"] = dict(zip(rows, values))
        except (AttributeError, KeyError, StopIteration, TypeError, ValueError):
            raise BadInput(f"--compare: {path} is not a table of eval.py; evaluate that run again")
    if not found:
        raise BadInput(f"--compare {run}: no */table.json there; give a finished --output")
    return found


def compare(runs):
    """A Markdown table: a line per metric, a column per run with its change against the first.

    A change is over the problems that have a value in both runs.
    """
    tables = [read_tables(run) for run in runs]
    lines = [["", *runs]]
    for key in dict.fromkeys(key for table in tables for key in table):
        name = key.split()[-1]
        low, high = RANGES.get(name, (0, 1))
        first = tables[0].get(key, {})
        line = [key]
        for run, table in zip(runs, tables):
            now = table.get(key, {})
            if first and now and first.keys() != now.keys():
                raise BadInput(f"--compare {run}: {key} has other problems than in {runs[0]}")
            known = [value for value in now.values() if value is not None]
            line.append(estimate(name, [mean(known)]) if known else "-")
            pairs = [(first[x], now[x]) for x in first if now and table is not tables[0]]
            change = [after - before for before, after in pairs if None not in (before, after)]
            if change:
                line[-1] += " " + estimate(name, interval(change, low - high, high - low), "+")
        lines.append(line)
    return markdown(lines)
