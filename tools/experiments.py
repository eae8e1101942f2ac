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
from pathlib import Path
from statistics import mean, stdev

import dapo
import data
import dora
import grpo
import reward
import sft
import training.measure
from lib import loading, parallel
from lib.config import TINY, Parser, read_settings
from lib.files import write
from tasks.table import markdown
from training.page import read_rows

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


def at_random(grade, example):
    """A reward that is random, whatever the format: uniform from -3 to 3 in total."""
    return random.uniform(-3, 3) - grade.format


def measure(model):
    """{column: value} of a model, on the files of SPLITS."""
    tokenizer = loading.load_tokenizer(TINY)
    config = grpo.Config(prompts_per_step=8, max_new_tokens=96)  # two calls are longer than one
    result = {}
    for split, columns in SPLITS:
        examples = data.load_examples(f"{TINY}/{split}.jsonl")
        tasks = data.encode_tasks(examples, tokenizer, config.max_prompt_tokens)
        metrics = training.measure.measure_heldout(model, tokenizer, tasks, config)
        result |= {column: metrics[name] for name, column in columns.items()}
    return result


def train_and_measure(path, script, flags):
    """Train or resume a run, unless `script` is None, and measure it. Returns the exit status."""
    model = loading.load_model(TINY)
    seconds = 0.0
    if script:
        resume = ["--resume"] if (path / "config.json").is_file() else []
        random.seed(path.name)
        status = script.main(["--output", str(path), "--heldout=", "--quiet", *flags, *resume])
        if status:
            return status
        model = dora.load_adapter(model, path / "adapter")
        for row in read_rows(path / "metrics.jsonl"):
            seconds += row["seconds_sample"] + row["seconds_update"]
    write(path / "result.json", json.dumps(measure(model) | {"seconds": seconds}).encode())
    return 0


def results_table(results):
    """{row: [result per seed]} as Markdown: mean and, over several seeds, standard deviation."""
    lines = [["", *results["base"][0]]]
    for name, seeds in results.items():
        lines.append([name])
        for column in seeds[0]:
            values = [result[column] for result in seeds]
            digits = 0 if column == "seconds" else 3
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            lines[-1].append(f"{mean(values):.{digits}f}{spread}")
    return markdown(lines)


def main(argv=None):
    """Do the runs that are missing, then write and print the table. Returns the exit status."""
    parser = Parser(__doc__)
    text = "directory [%(default)s]"
    parser.add_argument("--output", default="runs/experiments", metavar="X", help=text)
    output = Path(parser.parse_args(argv).output)
    reward.CORRECTNESS["random"] = at_random
    results = {}
    for name, (label, script, flags) in RUNS.items():
        results[label] = []
        for seed in SEEDS if script else [0]:
            path = output / f"{name}-{seed}"
            if not (path / "result.json").is_file():
                status = train_and_measure(path, script, ["--seed", str(seed), *flags.split()])
                if status:
                    return status
            results[label].append(read_settings(path / "result.json"))
    text = results_table(results)
    write(output / "table.md", text.encode())
    print(f"{text}\ndone: {output}/ holds the runs and table.md")
    return 0


if __name__ == "__main__":
    parallel.run_main(main)
