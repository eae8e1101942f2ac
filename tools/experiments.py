"""The paper's tables in miniature: the embedded model by every algorithm and reward, three seeds each.

    python -m tools.experiments               trains what is missing, then writes table and picture
    python -m tools.experiments --jobs 4      four runs at a time, each on one thread

Every run is one call of grpo.py, dapo.py or sft.py with its default settings, on the same tasks in
the same order. What comes out is measured by the same code on three files that no run has seen:

    heldout      one note about what the code does      exact match, stale, format, sampled reward
    retention    one note about what it does not use    exact match: leave the code alone
    two_updates  two notes, two calls to change         exact match: training had one note a task

The control is GRPO with a random number for a reward. Stopped, or killed, it goes on where it was.
"""

import contextlib
import json
import os
import random
import signal
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from unittest import mock

from tqdm import tqdm

import dapo
import data
import grpo
import recode
import reward
import sft
import training.run
from eval import fit
from training import loading, parallel
from training import dora
from training.config import Parser, read_settings
from training.curve import svg, text
from training.files import write

HERE = Path(__file__).parent.parent
SEEDS = (42, 1, 2)
SCRIPTS = {"grpo": grpo, "dapo": dapo, "sft": sft}
RUNS = {  # what it is called, the script, its flags
    "SFT": ("sft", []),
    "SFT, lr 3e-3": ("sft", ["--lr", "3e-3"]),
    "GRPO (ES\\*)": ("grpo", []),
    "DAPO (ES\\*)": ("dapo", []),
    "GRPO, format only": ("grpo", ["--correctness", "none"]),
    "GRPO, EM": ("grpo", ["--correctness", "em"]),
    "GRPO, ES": ("grpo", ["--correctness", "es"]),
    "GRPO, EM\\*": ("grpo", ["--correctness", "em_star"]),
    "GRPO, random reward": ("grpo", []),
}
SPLITS = ("heldout", "retention", "two_updates")
COLUMNS = (  # heading, split, figure
    ("exact match", "heldout", "em"), ("stale", "heldout", "stale"), ("format", "heldout", "format"),
    ("sampled reward", "heldout", "reward"), ("retention", "retention", "em"), ("two updates", "two_updates", "em"),
)  # fmt: skip


def measure(model):
    """{split: figures} of a model on the held-out files of the embedded default, by training.run.evaluate."""
    tokenizer = loading.load_tokenizer(str(HERE / "tiny"))
    config = grpo.Config(prompts_per_step=8, max_new_tokens=96)  # two calls are longer than one
    result = {}
    for split in SPLITS:
        examples = data.load_examples(str(HERE / "tiny" / f"{split}.jsonl"))
        tasks = data.encode_tasks(examples, tokenizer, config.max_prompt_tokens, {})
        result[split], _ = training.run.evaluate(model, tokenizer, tasks, config)
    return result


def train(name, seed, path, flags):
    """One run: train, or go on, in the directory `path`; measure; leave result.json there and return it."""
    script, more = RUNS[name]
    resume = ["--resume"] if (path / "checkpoint" / "state.pt").is_file() else []
    chance = random.Random(seed)
    scored = mock.patch.object(reward, "total", lambda *_: chance.uniform(-3, 3))
    with scored if name == "GRPO, random reward" else contextlib.nullcontext():
        status = SCRIPTS[script].main(
            ["--seed", str(seed), "--output", str(path), "--heldout", "", *more, *flags, *resume]
        )
    if status:
        raise data.BadInput(f"{name}, seed {seed}, ended with status {status}; see {path}.log, then start again")
    model = dora.load_adapter(loading.load_model(str(HERE / "tiny")), path / "adapter")
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return measure(model) | {"seconds": sum(v for row in rows for k, v in row.items() if k.startswith("seconds"))}


def job(name, seed, path, flags):
    """What a worker process does: train(), or measure() for the base, with all output in a log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.log", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        base = lambda: measure(loading.load_model(str(HERE / "tiny"))) | {"seconds": 0.0}
        result = base() if name == "base" else train(name, seed, path, flags)
    write(path / "result.json", json.dumps(result, indent=2).encode())
    return result


def directory(output, name, seed):
    """Where a run lives: runs/experiments/grpo-em-star-42, say."""
    words = name.lower().replace("\\*", " star").replace("(", "").replace(")", "").replace(",", "").split()
    return Path(output) / "-".join([*words, str(seed)])


def results(runs, output, jobs, flags):
    """{name: [result per seed]}; those that exist are read, the others computed, `jobs` at a time."""
    done = {}
    ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, and a training loop's, which saves
    with ProcessPoolExecutor(jobs, get_context("spawn"), signal.signal, ignore) as pool:
        waiting = {}
        for name, seed in runs:
            path = directory(output, name, seed)
            if (path / "result.json").is_file():
                done[name, seed] = read_settings(path / "result.json")
            else:
                waiting[pool.submit(job, name, seed, path, flags)] = name, seed
        try:
            for future in tqdm(as_completed(waiting), "runs", total=len(waiting), unit="run", disable=None):
                name, seed = waiting[future]
                done[name, seed] = future.result()
                em, seconds = done[name, seed]["heldout"]["em"], done[name, seed]["seconds"]
                tqdm.write(f"{name:24} seed {seed:<4} exact match {em:.3f}  {seconds:4.0f} s")
        finally:
            pool.shutdown(cancel_futures=True)
    return {name: [done[name, seed] for n, seed in runs if n == name] for name, _ in runs}


def table(by_name):
    """A Markdown table: mean and, over several seeds, standard deviation."""
    show = lambda values, form: f"{mean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")
    lines = ["| | " + " | ".join(heading for heading, _, _ in COLUMNS) + " | seconds |", "|---|" + "---|" * 7]
    for name, runs in by_name.items():
        cells = [show([run[split][figure] for run in runs], ".3f") for _, split, figure in COLUMNS]
        lines.append(" | ".join([f"| {name}", *cells, show([run["seconds"] for run in runs], ".0f")]) + " |")
    return "\n".join(lines) + "\n"


def picture(by_name):
    """An SVG: for every run a row, for every seed a dot, for their mean a bar; three figures side by side."""
    panels = (("exact match", "heldout"), ("retention", "retention"), ("two updates", "two_updates"))
    height, left, width = 60 + 28 * len(by_name), 170, 180
    parts = []
    for row, name in enumerate(by_name):
        parts.append(text(left - 12, 58 + 28 * row, name.replace("\\", ""), 'text-anchor="end"'))
    for place, (heading, split) in enumerate(panels):
        x = left + place * (width + 15)
        parts.append(text(x, 20, heading, 'font-weight="bold"'))
        for tick in (0, 0.5, 1):
            parts.append(f'<path d="M{x + width * tick:.0f} 40V{height - 15}" stroke="#ddd"/>')
            parts.append(text(x + width * tick, 35, tick, 'text-anchor="middle" font-size="10" fill="#777"'))
        for row, runs in enumerate(by_name.values()):
            values, y = [run[split]["em"] for run in runs], 54 + 28 * row
            parts.append(f'<rect x="{x}" y="{y - 7}" width="{width * mean(values):.1f}" height="14" fill="#bcd4f0"/>')
            parts += [f'<circle cx="{x + width * v:.1f}" cy="{y}" r="3" fill="#1f5fbf"/>' for v in values]
    return svg(height, parts)


def main(argv=None):
    """Run what is missing, write the table and the picture. The exit status is 0."""
    parser = Parser(__doc__)
    add = parser.add_argument_group("where things are kept").add_argument
    add("--output", default="runs/experiments", metavar="X", help="directory of the runs [runs/experiments]")
    add("--figures", default=HERE / "figures", type=Path, metavar="X", help="of table and picture [figures]")
    add = parser.add_argument_group("the runs").add_argument
    add("--jobs", default=os.cpu_count(), type=int, metavar="X", help="at a time [one per core: %(default)s]")
    add("--steps", type=int, metavar="X", help="rollouts of each [as in tiny/defaults.json]")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be at least 1")
    flags = ["--steps", str(args.steps)] if args.steps else []
    runs = [("base", 0), *((name, seed) for name in RUNS for seed in SEEDS)]
    by_name = results(runs, args.output, args.jobs, flags)
    write(args.figures / "experiments.md", table(by_name).encode())
    write(args.figures / "experiments.svg", picture(by_name).encode())
    print(fit(table(by_name)))
    print(f"done: {args.figures}/ holds experiments.md and experiments.svg, {args.output}/ the runs")
    return 0


if __name__ == "__main__":
    parallel.run_main(main)
