"""Evaluation: does the model obey the update it is shown, and does it still know the rest?

    python eval.py                                      the embedded model on its held-out tasks
    python eval.py --task codeupdatearena --model Qwen/Qwen2.5-Coder-7B-Instruct    on a GPU
    ... --adapter runs/grpo/adapter --output runs/eval-grpo    with what training made of it
    torchrun --nproc-per-node 8 eval.py ...             every GPU takes its share of the prompts
    python eval.py --compare runs/eval runs/eval-grpo   models side by side, all their tasks
    python eval.py --task humaneval --data HumanEval.jsonl.gz --references    is all well here?

Tasks and their data: tasks.py. An --output is one model, and each of its tasks a directory in
it: config.json, samples.jsonl (every completion and its verdict), table.md and table.json. Stopped,
or killed, the same command goes on where it was.

A migration is right when it equals the reference; other answers are run (sandbox.py) and must pass
all tests. The answer is what reward.extract_code finds: the last ```python fence inside <answer>.
A completion without one (another fence, no tag, cut at --max-new-tokens) is wrong, and counted as
"no code".

    pass@k   = 1 - C(n - c, k) / C(n, k)    the chance that of k answers at least one is right, from
               n samples of which c are; unbiased, and undefined for k > n                  (eq. 1)
    UPass@k    the same, but right is what passes with the update and not also without it: the
               answers that needed the new function. "Without" leaves out the one statement that
               applies it
    [a, b]     the middle 95 % of 2,000 means over problems drawn anew, with replacement    (eq. 2)

Figures are per cent; ES* and EM* are the rewards of reward.py. What --compare puts behind a figure
is its change against the first run; an interval that holds 0 says that the problems are too few to
tell. A table too wide for the screen is cut there into several, in table.md it is whole.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import timedelta
from pathlib import Path
from statistics import fmean as mean

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import recode
import reward
import tasks
from training import loading, parallel
from training.config import BadInput, Parser, read_settings
from training.files import write
from training.parallel import LOCAL_RANK, RANK, WORLD

JUDGES = max(1, os.cpu_count() // WORLD)  # at a time

# ------------------------------------------------------------------------- 1. verdicts


def open_sandbox(found, unsafe):
    """The sandbox for answers to these problems, their libraries loaded; nothing where nothing is run."""
    if found[0].example:
        return contextlib.nullcontext()
    import sandbox  # for Linux, which a migration need not know

    code = "\n".join(text for problem in found for text in (problem.setup, problem.reference, *problem.tests))
    libraries = sorted(set(re.findall(r"^\s*(?:import|from) +([\w.]+)", code, re.MULTILINE)))
    # CodeUpdateArena's programs fill memory with arrays, and return what no wire carries, iterators say
    more = {"memory": 4 << 30, "judge": "auto"} if found[0].update else {}
    try:
        box = sandbox.Sandbox(libraries, workers=JUDGES, unsafe=unsafe, **more)
        box.run("", ["def test_nothing(): pass"])  # tells before hours of sampling if nothing can be contained here
        return box
    except sandbox.Unavailable as error:
        raise BadInput(str(error))


def attempt(box, problem, code, update):
    """The sandbox's verdict on `code`, behind the problem's set-up and the statement that applies its update."""
    return box.run(code, problem.tests, setup=f"{problem.setup}\n{update}\n", entry_point=problem.entry_point)


def judge(problem, completion, box):
    """What is to be known of a completion: plain values by name, "passed" among them."""
    code = reward.extract_code(completion)
    verdict = {"format": reward.format_reward(completion) > 0, "no_code": code is None}
    if example := problem.example:
        grade = reward.grade(completion, example)
        verdict |= {"es_star": grade.es_star, "em_star": grade.em_star, "stale": grade.stale}
        return verdict | {"passed": grade.em == 1}
    updated = {"updated": False} if problem.update else {}
    if code is None:
        return verdict | updated | {"passed": False, "status": "no code"}
    result = attempt(box, problem, code, problem.update)
    if result.passed and problem.update:
        updated["updated"] = not attempt(box, problem, code, "").passed
    return verdict | updated | {"passed": result.passed} | vars(result)


def references(found, box):
    """Without a model: every reference must pass, and none without the update, or with an empty body.

    Prints what does otherwise. The exit status is 0 if nothing passes that must not and at least 95 %
    of the references do: another version of a library or a small memory spoils a few.
    """

    def both(problem):
        hollow = (problem.reference, "") if problem.update else ("pass", "")
        return attempt(box, problem, problem.reference, problem.update), attempt(box, problem, *hollow)

    counts, how = Counter(), "without the update" if found[0].update else "with an empty body"
    with ThreadPoolExecutor(JUDGES) as pool:
        results = tqdm(pool.map(both, found), "references", len(found), leave=False, disable=None)
        for problem, (right, wrong) in zip(found, results):
            counts["passed"] += right.passed
            counts["leaked"] += wrong.passed
            counts["joint"] += right.passed and right.judge != "split"
            if not right.passed:
                tqdm.write(f"{problem.name}: {right.status} {right.reason}")
            if wrong.passed:
                tqdm.write(f"{problem.name}: passes {how}")
    print(f"references: {counts['passed']} of {len(found)} pass, {counts['leaked']} {how}", end="")
    print(f"; {counts['joint']} passes were judged in process" if found[0].update else "")
    return 0 if not counts["leaked"] and counts["passed"] >= 0.95 * len(found) else 1


# ------------------------------------------------------------------------- 2. samples


class Log:
    """samples.jsonl: a row for each completion, and later one for its verdict; rank 1 has samples-1.jsonl.

    A row that a kill or a full disk cut short is no JSON; what it told is done anew.
    """

    def __init__(self, directory):
        self.rows, self.lock = {}, threading.Lock()
        self.path = directory / (f"samples-{RANK}.jsonl" if RANK else "samples.jsonl")
        for path in directory.glob("samples*.jsonl"):
            for line in path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError):
                    self.add(json.loads(line))
        if self.path.exists():
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

    def add(self, row):
        self.rows.setdefault((row["problem"], row["sample"]), {}).update(row)

    def append(self, rows):
        try:
            with self.lock, open(self.path, "ab") as file:
                file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        except OSError as error:
            raise BadInput(f"cannot write {self.path}: {error.strerror}; make room, then give the same command again")
        for row in rows:
            self.add(row)


KEPT = "model adapter task data num_samples temperature top_p max_new_tokens seed no_update".split()


def claim(directory, args):
    """Start in `directory`, or go on there if all that decides about the samples is as it was."""
    settings = {name: vars(args)[name] for name in KEPT}
    for name in ("model", "adapter", "data"):  # a path may have got other files since; of a hub id nothing is known
        path = Path(settings[name] or "-")
        files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
        stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        settings[f"files of {name}"] = hashlib.sha256(repr(stamps).encode()).hexdigest()[:12]
    if any(directory.glob("samples*.jsonl")):
        before = read_settings(directory / "config.json")
        for name, value in settings.items():
            if before.get(name) != value:
                change = f"{name} was {before.get(name)!r} in {directory}, now {value!r}"
                raise BadInput(f"--output: {change}; give another --output, or delete that directory")
    elif RANK == 0:
        write(directory / "config.json", json.dumps(settings, indent=2).encode())


def load(args):
    """The model on this rank's device, with its adapter."""
    if torch.cuda.is_available():
        torch.cuda.set_device(LOCAL_RANK)
    return loading.load_policy(args.model, args.adapter)


def complete(model, tokenizer, batch, seeds, args):
    """Sample `num_samples` completions of every (problem, prompt) of a batch: rows for the log."""
    prompts, n = [prompt for _, prompt in batch], args.num_samples
    answers = recode.sample_answers(
        model, tokenizer, prompts, n, args.max_new_tokens, args.temperature, seeds, args.top_p
    )
    return [
        {"problem": batch[i // n][0].name, "sample": i % n, "tokens": len(ids), "cut": cut, "completion": text}
        for i, (ids, text, cut, _) in enumerate(answers)
    ]


def evaluate(found, directory, box, args):
    """Sample and judge what the log does not hold yet; judges work while the next batch is sampled."""
    log, tokenizer, model = Log(directory), loading.load_tokenizer(args.model), None
    prompts = [(problem, tasks.encode(problem, tokenizer, args.no_update)) for problem in found]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i][1]))  # longest first: too big shows at once
    batches = [order[i : i + args.batch] for i in range(0, len(order), args.batch)][RANK::WORLD]
    jobs, tokens, started = [], 0, time.perf_counter()

    def settle(problem, j):
        verdict = judge(problem, log.rows[problem.name, j]["completion"], box)
        log.append([{"problem": problem.name, "sample": j} | verdict])
        return verdict["passed"]

    with ThreadPoolExecutor(JUDGES) as pool, tqdm(batches, unit="batch", disable=RANK > 0 or None) as bar:
        try:
            for batch in bar:
                keys = [(found[i], j) for i in batch for j in range(args.num_samples)]
                known = {key for key, row in log.rows.items() if "completion" in row}
                if missing := {(problem.name, j) for problem, j in keys} - known:
                    model = model or load(args)
                    seeds = [args.seed * 1_000_003 + i for i in batch]  # a problem's own, whoever samples it
                    rows = complete(model, tokenizer, [prompts[i] for i in batch], seeds, args)
                    log.append([row for row in rows if (row["problem"], row["sample"]) in missing])
                    tokens += sum(row["tokens"] for row in rows)
                jobs += [pool.submit(settle, *key) for key in keys if "passed" not in log.rows[key[0].name, key[1]]]
                right = [job.result() for job in jobs if job.done()]  # or the exception that a judge met
                speed = tokens / (time.perf_counter() - started)
                bar.set_postfix_str(f"{speed:,.0f} tokens/s, {sum(right)} of {len(right)} right", refresh=False)
            for job in tqdm(as_completed(jobs), "judging", len(jobs), leave=False, disable=RANK > 0 or None):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# ------------------------------------------------------------------------- 3. figures


def pass_at_k(n, c, k):
    """The unbiased estimate of pass@k from n samples, c of which are right; ValueError where there is none."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} from {n} samples, {c} of them right: needs 0 <= c <= n and 1 <= k <= n")
    return 1 - math.comb(n - c, k) / math.comb(n, k)  # eq. 1


HEADINGS = {  # of the figures other than pass@k and UPass@k
    "es_star": "ES\\*", "em_star": "EM\\*", "stale": "stale", "format": "format", "no_code": "no code", "cut": "cut",
}  # fmt: skip


def figures(rows, ks):
    """What the samples of one problem say, {figure: value}."""
    result = {}
    for name, field in (("pass", "passed"), ("UPass", "updated")):
        if field in rows[0]:
            result |= {f"{name}@{k}": pass_at_k(len(rows), sum(row[field] for row in rows), k) for k in ks}
    return result | {name: mean(row[name] for row in rows) for name in HEADINGS if name in rows[0]}


def interval(values):
    """Means over problems, and the ends of their intervals; values (problems, figures), result (3, figures)."""
    draws = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    means = np.stack([values[drawn].mean(0) for drawn in draws])  # eq. 2, (2000, figures)
    return np.stack([values.mean(0), *np.quantile(means, (0.025, 0.975), axis=0)])


def tabulate(found, rows, args):
    """What table.json holds: figures by group of problems, as [mean, lower, upper end], and by problem."""
    each = {p.name: figures([rows[p.name, j] for j in range(args.num_samples)], args.k) for p in found}
    groups = {"all": found}
    for kind in ("package", "update_type"):
        names = sorted({getattr(problem, kind) for problem in found})
        if 1 < len(names) <= 20:  # a library for every other task is no table
            groups |= {name: [problem for problem in found if getattr(problem, kind) == name] for name in names}
    table = {}
    for group, members in groups.items():
        values = np.array([list(each[problem.name].values()) for problem in members])
        table[group] = dict(zip(each[members[0].name], interval(values).T.tolist())) | {"problems": len(members)}
    statuses = Counter(row["status"] for row in rows.values() if "status" in row)
    joint = sum(row["passed"] and row.get("judge", "split") != "split" for row in rows.values())
    return {"table": table, "statuses": statuses, "judged in process": joint, "problems": each}


def cell(name, values, sign=""):
    """A figure, and its interval if `values` are three, as text: per cent, but for the rewards."""
    factor, form = (1, sign + ".2f") if name.endswith("_star") else (100, sign + ".1f")
    shown = [f"{factor * value:{form}}" for value in values]
    return shown[0] if len(shown) == 1 else f"{shown[0]} [{shown[1]}, {shown[2]}]"


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


def markdown(*lines):
    """A Markdown table whose columns are straight on the screen too; the first line is its head."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = ["| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |\n" for line in lines]
    return "".join([rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|\n", *rows[1:]])


def show(result):
    """table.md: all problems and every group of them, with intervals for what is right."""
    names, lines = [name for name in result["table"]["all"] if name != "problems"], []
    for group, row in result["table"].items():
        ends = {name: row[name] if "@" in name or name.endswith("_star") else row[name][:1] for name in names}
        lines.append([group, str(row["problems"]), *(cell(name, ends[name]) for name in names)])
    text = markdown(["", "problems", *(HEADINGS.get(name, name) for name in names)], *lines)
    if result["statuses"]:
        counts = ", ".join(f"{count} {status}" for status, count in sorted(result["statuses"].items()))
        text += f"\n{counts}; {result['judged in process']} of the passes could only be judged in process\n"
    return text


def compare(runs):
    """A Markdown table: a row a run, and behind a figure its change against the first run, paired by problem."""
    tables = {run: {path.parent.name: read_settings(path) for path in Path(run).glob("*/table.json")} for run in runs}
    if missing := [run for run in runs if not tables[run]]:
        raise BadInput(f"--compare {missing[0]}: no */table.json there; give the --output of a finished evaluation")

    def values(run, task, name):
        rows = tables[run].get(task, {"problems": {}})["problems"]
        return {problem: row[name] for problem, row in rows.items() if name in row}

    every = [row for run in runs for table in tables[run].values() for row in table["problems"].values()]
    names = [
        name
        for name in dict.fromkeys(name for row in every for name in row)
        if name not in ("format", "no_code", "cut")
    ]
    columns = [
        (task, name) for task in tasks.TASKS for name in names if any(values(run, task, name) for run in runs)
    ]
    lines = [["", *(f"{task} {HEADINGS.get(name, name)}" for task, name in columns)]]
    for run in runs:
        lines.append([run])
        for task, name in columns:
            first, now = values(runs[0], task, name), values(run, task, name)
            text = cell(name, [mean(now.values())]) if now else "-"
            if first and now and run != runs[0]:
                if first.keys() != now.keys():
                    raise BadInput(f"--compare {run}: its {task} has other problems than that of {runs[0]}")
                change = np.array([[now[problem] - first[problem]] for problem in first])
                text += f", {cell(name, interval(change)[:, 0], '+')}"
            lines[-1].append(text)
    return markdown(*lines)


# ------------------------------------------------------------------------- 4. the command line


def parse(argv):
    """The checked arguments; data and length that are not given come from the checkpoint's defaults.json."""
    parser, tiny = Parser(__doc__), os.path.relpath(Path(__file__).parent / "tiny")
    add = parser.add_argument_group("what is evaluated, and where that is kept").add_argument
    add("--model", default=tiny, metavar="X", help="checkpoint directory or hub id [tiny]")
    add("--adapter", default="", metavar="X", help="adapter directory over it, runs/grpo/adapter say [none]")
    add("--task", default="migration", choices=tasks.TASKS, help="what is asked [migration]")
    text = "JSONL file or hub id of the problems [the task's, or the checkpoint's]"
    add("--data", default="", metavar="X", help=text)
    add("--output", default="runs/eval", metavar="X", help="directory of this model's evaluations [runs/eval]")
    add("--no-update", action="store_true", help="leave the update note out of the prompt [off]")
    add = parser.add_argument_group("samples").add_argument
    add("--num-samples", default=5, type=int, metavar="X", help="completions per problem [5]")
    add("--temperature", default=0.8, type=float, metavar="X", help="0 is greedy [0.8]")
    add("--top-p", default=0.7, type=float, metavar="X", help="only the likeliest tokens that sum up to it [0.7]")
    add("--k", type=int, nargs="+", metavar="X", help="of pass@k [1 and 5, if there are 5 samples]")
    add("--max-new-tokens", type=int, metavar="X", help="longer completions are cut [the checkpoint's, or 1024]")
    add("--batch", default=8, type=int, metavar="X", help="prompts in one call of the sampler [8]")
    add("--seed", default=42, type=int, metavar="X", help="of the samples [42]")
    add("--unsafe", action="store_true", help="run answers even where the sandbox cannot contain them [off]")
    add = parser.add_argument_group("instead").add_argument
    add("--references", action="store_true", help="judge the references, and no model [off]")
    add("--compare", nargs="+", metavar="RUN", help="put finished evaluations side by side [none]")
    args = parser.parse_args(argv)
    beside = Path(args.model) / "defaults.json"
    defaults = read_settings(beside) if beside.is_file() else {}
    args.max_new_tokens = defaults.get("max_new_tokens", 1024) if args.max_new_tokens is None else args.max_new_tokens
    args.k = args.k or [k for k in (1, 5) if k <= args.num_samples]
    if args.task == "migration" and defaults.get("heldout"):
        args.data = args.data or str(beside.with_name(defaults["heldout"]))
    args.data = args.data or tasks.SOURCES.get(args.task, "")
    return check(args)


def check(args):
    """`args` itself, if they make sense; else BadInput naming the flag."""
    for name in ("num_samples", "max_new_tokens", "batch"):
        if vars(args)[name] < 1:
            raise BadInput(f"--{name.replace('_', '-')} {vars(args)[name]}: must be at least 1")
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1 or not 0 <= args.seed < 2**32:
        raise BadInput("--temperature must be at least 0, --top-p above 0 and at most 1, --seed in [0, 2**32)")
    if wrong := [k for k in args.k if not 1 <= k <= args.num_samples]:
        raise BadInput(f"--k {wrong[0]}: pass@k needs 1 <= k <= --num-samples {args.num_samples}")
    if args.references and args.task == "migration":
        raise BadInput("--references: a migration has no tests to run; give --task codeupdatearena, say")
    if args.no_update and args.task.startswith("humaneval"):
        raise BadInput(f"--no-update: {args.task} has no update notes")
    if not args.data and not args.compare:
        raise BadInput(f"--data: give the file of {args.task}; for humaneval, HumanEval.jsonl.gz of openai/human-eval")
    return args


def main(argv=None):
    """Evaluate, check the references, or compare. The exit status is 0, or 1 where references fail."""
    args = parse(argv)
    if args.compare:
        print(fit(compare(args.compare)), end="")
        return 0
    found, directory = tasks.load(args.task, args.data), Path(args.output) / args.task
    if args.references:
        with open_sandbox(found, args.unsafe) as box:
            return references(found, box)
    if WORLD > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=30))  # the first to finish waits for the last
    claim(directory, args)
    if RANK == 0:
        print(f"{args.task}: {len(found):,} problems of {args.data}, {args.num_samples} samples each", flush=True)
    with open_sandbox(found, args.unsafe) as box:
        evaluate(found, directory, box, args)
    if WORLD > 1:
        dist.barrier()
        dist.destroy_process_group()
    if RANK == 0:
        result = tabulate(found, Log(directory).rows, args)
        write(directory / "table.json", json.dumps(result, indent=1).encode())
        write(directory / "table.md", show(result).encode())
        print(fit(show(result)), f"done: {directory}/ holds samples.jsonl, table.md and table.json", sep="\n")
    return 0


if __name__ == "__main__":
    parallel.run_main(main)
