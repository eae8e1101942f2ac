"""The paper's tables in miniature: every algorithm and reward on the toy model, three seeds each.

    python -m tools.experiments      30 runs, about an hour on one core

A run is grpo.py, dapo.py or sft.py at its defaults, measured on three files of unseen tasks:

    heldout      one note about what the code does      exact match, stale, format, sampled reward
    retention    one note about what it does not use    exact match: leave the code alone
    two_updates  two notes, two calls to change         exact match: training had one note a task

The control is GRPO with a random reward. After Ctrl-C or kill -9 the same command continues.
"""

import json
import random
import sys
from pathlib import Path
from statistics import mean, stdev

import dapo
import data
import dora
import grpo
import reward
import sft
import training.run
from lib import loading, parallel
from lib.config import ROOT, TINY, BadInput, Parser, read_settings
from lib.files import write
from tasks.table import markdown
from tools.compare import read_metrics

SEEDS = (42, 1, 2)
RUNS = {  # directory: row of the table, script, flags
    "base": ("base", None, ""),
    "sft": ("SFT", sft, ""),
    "sft-lr-3e-3": ("SFT, lr 3e-3", sft, "--lr 3e-3"),
    "grpo-es-star": ("GRPO (ES\\*)", grpo, ""),
    "dapo-es-star": ("DAPO (ES\\*)", dapo, ""),
    "grpo-format-only": ("GRPO, format only", grpo, "--correctness none"),
    "grpo-em": ("GRPO, EM", grpo, "--correctness em"),
    "grpo-es": ("GRPO, ES", grpo, "--correctness es"),
    "grpo-em-star": ("GRPO, EM\\*", grpo, "--correctness em_star"),
    "grpo-gain": ("GRPO, gain", grpo, "--correctness gain"),
    "grpo-random-reward": ("GRPO, random reward", grpo, "--correctness random"),
}
SPLITS = (  # file, {metric: column of the table}
    ("heldout", {"em": "exact match", "stale": "stale", "format": "format",
                 "reward": "sampled reward"}),
    ("retention", {"em": "retention"}),
    ("two_updates", {"em": "two updates"}),
)  # fmt: skip


def measure(model):
    """{column: value} of a model, on the files of SPLITS."""
    tokenizer = loading.load_tokenizer(TINY)
    config = grpo.Config(prompts_per_step=8, max_new_tokens=96)  # two calls are longer than one
    result = {}
    for split, columns in SPLITS:
        examples = data.load_examples(f"{TINY}/{split}.jsonl")
        tasks = data.encode_tasks(examples, tokenizer, config.max_prompt_tokens, {})
        metrics, _ = training.run.measure_heldout(model, tokenizer, tasks, config)
        result |= {column: metrics[name] for name, column in columns.items()}
    return result


def train(path, steps):
    """Train the run of a directory NAME-SEED, or resume it. Returns the exit status."""
    name, _, seed = path.name.rpartition("-")
    _, script, flags = RUNS[name]
    rng = random.Random(int(seed))

    def at_random(grade, example):
        return rng.uniform(-3, 3) - grade.format

    reward.CORRECTNESS["random"] = at_random
    argv = ["--steps", str(steps), "--seed", seed, "--output", str(path), "--heldout=", "--quiet"]
    if (path / "config.json").is_file():
        argv.append("--resume")
    sys.argv = [f"{script.__name__}.py", *argv, *flags.split()]  # named if the run is stopped
    return script.main(sys.argv[1:])


def train_and_measure(path, steps):
    """Train the run of a directory, measure it, write its result.json. Returns the exit status."""
    model = loading.load_model(TINY)
    rows = []
    if path.name != "base-0":
        status = train(path, steps)
        if status:
            return status
        model = dora.load_adapter(model, path / "adapter")
        rows = read_metrics(path)
    seconds = sum(row[key] for row in rows for key in row if key.startswith("seconds"))
    write(path / "result.json", json.dumps(measure(model) | {"seconds": seconds}).encode())
    return 0


def results_table(results):
    """{row: [result per seed]} as Markdown: mean and, over several seeds, standard deviation."""
    columns = list(results["base"][0])
    lines = [["", *columns]]
    for name, seeds in results.items():
        cells = [name]
        for column in columns:
            values = [result[column] for result in seeds]
            digits = 0 if column == "seconds" else 3
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.{digits}f}{spread}")
        lines.append(cells)
    return markdown(lines)


def main(argv=None):
    """Do the runs that are missing, then write and print the table. Returns the exit status."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--output", default="runs/experiments", metavar="X", help="directory [runs/experiments]")
    steps = read_settings(ROOT / "tiny" / "defaults.json")["steps"]
    add("--steps", default=steps, type=int, metavar="X", help="of each run [%(default)s]")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: must be at least 1")
    output = Path(args.output)
    settings = output / "config.json"
    if settings.is_file() and read_settings(settings) != {"steps": args.steps}:
        raise BadInput(f"--output {output}: has runs of other --steps; give another directory")
    write(settings, json.dumps({"steps": args.steps}).encode())
    results = {}
    for name, (row, *_) in RUNS.items():
        for seed in [0] if name == "base" else SEEDS:
            path = output / f"{name}-{seed}"
            if not (path / "result.json").is_file():
                status = train_and_measure(path, args.steps)
                if status:
                    return status
            results.setdefault(row, []).append(read_settings(path / "result.json"))
    text = results_table(results)
    write(output / "table.md", text.encode())
    print(f"{text}\ndone: {output}/ holds the runs and table.md")
    return 0


if __name__ == "__main__":
    parallel.run_main(main)
