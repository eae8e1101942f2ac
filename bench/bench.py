"""Benchmarks, run by hand: whole training steps of grpo.py against TRL's GRPOTrainer.

    python bench/bench.py                                a random model of 5M parameters, one thread
    python bench/bench.py --shape 25M                    one of 25M parameters
    python bench/bench.py --checkpoint DIR --data FILE   a real model, all cores of an idle machine
    python bench/bench.py --gpu                          random models of 0.5B and 7B on one GPU

    --settings="--adapter lora --beta 0"    flags of grpo.py; TRL gets what it has of them
    --parent DIR                            another checkout takes part, e.g. of an older commit

In a round every side runs once, in a process of its own: it loads the model, takes one step to warm
up, then two that count. The round is the seed. The table has medians, in brackets divided by ours:
seconds per step; milliseconds per completion token, in all, in sampling and scoring (rollout), and
in the rest (update); milliseconds of the rollout per token of the longest completion; tokens per
completion; peak memory above the libraries and the frozen weights.

TRL is at its defaults, and again with activations kept: its gradient checkpointing costs time and
saves memory. Dropout is 0 and the learning rate 1e-6 on all sides. Random models are timed in CPU
seconds of one thread, so other work on the machine does not matter; all else in wall time. --gpu
adds our side without CUDA graphs. --parent also compares the gradients of both checkouts on the
same completions. Where completions end by themselves, each side samples its own; the table says
INVALID if their mean lengths differ by over 10 %. Compare ratios across machines, not seconds.
"""

import dataclasses
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from lib.config import BadInput, Parser

SAME = "--heldout= --dropout 0 --lr 1e-6 --quiet".split()  # for all sides


@dataclasses.dataclass
class Workload:
    """A model and its tasks, and the sizes of a step, as flags of grpo.py."""

    name: str
    sizes: str
    shape: str = ""  # of a random model, see random_model.py
    end: float = 1 / 110  # its probability of EOS at every token; 0: full length
    longest: int = 220  # its prompts have this many tokens, or up to a fifth less
    checkpoint: str = ""  # a real model in its place
    data: str = ""


STEP = "--prompts-per-step 8 --max-new-tokens 256"
REAL = "--prompts-per-step 1 --max-new-tokens 160 --max-prompt-tokens 512"
PAPER = "--prompts-per-step 1 --max-new-tokens 1024"  # grpo.py's defaults
WIDE = "--prompts-per-step 8 --max-new-tokens 512"
SHRUNK = "--prompts-per-step 2 --num-samples 4 --max-new-tokens 8"
GPU = (
    Workload("0.5B, 8 rows", PAPER, "0.5B", 0, 500),
    Workload("7B, 8 rows, the paper's size", PAPER, "7B", 0, 2048),
    Workload("7B, 64 rows, lengths that vary", WIDE, "7B", 1 / 220, 500),
)


def say(text):
    print(text, file=sys.stderr, flush=True)


def run(script, spec, root=ROOT, threads=1):
    """Run a file of bench/ with the modules of a checkout; its answer, an object, or None."""
    command = [sys.executable, str(ROOT / "bench" / script), json.dumps(spec)]
    settings = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=settings)
    if done.returncode:
        raise BadInput(f"status {done.returncode} of {script} '{command[2]}', see above")
    return json.loads(done.stdout) if done.stdout else None


def sides(arguments, flags, cpu_time):
    """{name: (spec of sides.py, checkout)}; the first is what the others are compared to."""
    spec = {"side": "ours", "flags": flags, "cpu_time": cpu_time}
    found = {"ours": (spec, ROOT)}
    if arguments.parent:
        found["parent"] = spec, arguments.parent
    if arguments.gpu:
        found["ours, no CUDA graphs"] = spec | {"graphs": False}, ROOT
    if all(importlib.util.find_spec(name) for name in ("trl", "peft", "datasets")):
        spec = {"side": "trl", "cpu_time": cpu_time}
        found["TRL"] = spec, ROOT
        found["TRL, activations kept"] = spec | {"checkpointing": False}, ROOT
    else:
        say("TRL is left out: it needs trl, peft and datasets")
    return found


def rounds(arguments, flags, cpu_time, threads):
    """{name: its answers, one per round} of all sides."""
    results = {}
    for number in range(1, arguments.rounds + 1):
        for name, (spec, root) in sides(arguments, flags, cpu_time).items():
            if spec["side"] == "ours":
                spec = spec | {"flags": [*flags, "--seed", str(number)]}
            else:  # the same settings as ours in this round
                ours = results["ours"][-1]
                spec = spec | {"config": ours["config"], "dtype": ours["dtype"]}
            answer = run("sides.py", spec, root, threads)
            results.setdefault(name, []).append(answer)
            times = [round(step["rollout"] + step["update"], 2) for step in answer["steps"]]
            say(f"round {number}, {name}: {times} s, peak {answer['peak']:.0f} MiB")
    return results


def compare_gradients(flags, parent, dtype, threads, folder):
    """A line on the gradients of both checkouts, in fp32 and in the dtype of the runs."""
    for short in ("fp32",) if dtype == "float32" else ("fp32", "bf16"):
        more = ["--dtype", short, "--max-grad-norm", "1e9"]  # not clipped
        spec = {"side": "gradients", "flags": flags + more, "file": f"{folder}/{short}.pt"}
        run("sides.py", spec, parent, threads)
        found = run("sides.py", spec, ROOT, threads)
        text = "The gradients differ by {error:.1e} in {}, at most by {worst:.1e}: {name}."
        yield text.format(short, **found)


def numbers(step):
    """A step in the units of the table's columns."""
    tokens = sum(step["lengths"])
    seconds = step["rollout"] + step["update"]
    return {
        "s per step": seconds,
        "ms per token": 1000 * seconds / tokens,
        "rollout": 1000 * step["rollout"] / tokens,
        "update": 1000 * step["update"] / tokens,
        "ms per decoding step": 1000 * step["rollout"] / max(step["lengths"]),
        "length": tokens / len(step["lengths"]),
    }


def table(results):
    """Yield the lines of a Markdown table of {name: answers}, and what must be known of it."""
    rows = {}
    for name, answers in results.items():
        steps = [numbers(step) for answer in answers for step in answer["steps"]]
        rows[name] = {key: median(step[key] for step in steps) for key in steps[0]}
        rows[name]["length"] = fmean(step["length"] for step in steps)
        rows[name]["peak MiB"] = max(answer["peak"] for answer in answers)
    ours = rows["ours"]
    yield "| | " + " | ".join(ours) + " |"
    yield "|---" * (len(ours) + 1) + "|"
    for name, row in rows.items():
        cells = [f"{value:.4g} ({value / ours[key]:.2f})" for key, value in row.items()]
        yield f"| {name} | {' | '.join(cells)} |"
    lengths = [row["length"] for row in rows.values()]
    if max(lengths) > 1.1 * min(lengths):
        yield "\nINVALID: the mean lengths differ by over 10 %."


def bench(work, arguments, folder):
    """Run a workload and print its table."""
    checkpoint, source = work.checkpoint, work.data
    if work.shape:
        spec = {"shape": work.shape, "end": work.end, "longest": work.longest}
        spec |= {"directory": folder, "gpu": arguments.gpu and not arguments.shrink}
        run("random_model.py", spec)
        checkpoint, source = folder, f"{folder}/data.jsonl"
    flags = ["--model", checkpoint, "--data", source, *SAME]
    flags += shlex.split(work.sizes) + shlex.split(arguments.settings)
    one_thread = bool(work.shape) and not arguments.gpu
    threads = 1 if one_thread else os.cpu_count()
    results = rounds(arguments, flags, one_thread, threads)
    print(f"\n{work.name}: {work.sizes} {arguments.settings}, {arguments.rounds} rounds\n")
    for line in table(results):
        print(line)
    if arguments.parent:
        dtype = results["ours"][0]["dtype"]
        for line in compare_gradients(flags, arguments.parent, dtype, threads, folder):
            print(line, flush=True)


def workloads(arguments):
    """The workloads that the command line asks for; with --shrink as small as can be."""
    if arguments.gpu:
        found = list(GPU)
    elif arguments.checkpoint:
        real = {"checkpoint": arguments.checkpoint, "data": arguments.data}
        found = [Workload(Path(arguments.checkpoint).name, REAL, **real)]
    else:
        found = [Workload(f"random, {arguments.shape}", STEP, arguments.shape)]
    if arguments.shrink:
        small = {"end": 1 / 8, "longest": 120, "sizes": SHRUNK}
        for i, work in enumerate(found):
            shape = "shrunk" if work.shape else ""
            found[i] = dataclasses.replace(work, name=f"{work.name}, shrunk", shape=shape, **small)
    return found


def parse(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    shapes = "5M", "25M", "0.5B", "7B"
    add("--shape", default="5M", choices=shapes, help="size of the random model [5M]")
    add("--checkpoint", default="", metavar="DIR", help="a real model in its place [none]")
    add("--data", default="", metavar="FILE", help="its tasks, JSONL [none]")
    add("--gpu", action="store_true", help="random models of 0.5B and 7B on one GPU [off]")
    add("--settings", default="", metavar="FLAGS", help="flags of grpo.py, as one word [none]")
    add("--parent", default="", metavar="DIR", help="an older checkout, a further side [none]")
    add("--rounds", type=int, default=3, metavar="N", help="turns of every side [3]")
    add("--shrink", action="store_true", help="try the same code on tiny sizes, anywhere [off]")
    return parser.parse_args(argv)


def check(arguments):
    """Raise BadInput where the paths or numbers of the command line make no sense."""
    for path, name in ((arguments.checkpoint, "config.json"), (arguments.parent, "grpo.py")):
        if path and not (Path(path) / name).is_file():
            raise BadInput(f"{path}: a directory without {name}; give another one")
    if bool(arguments.checkpoint) != bool(arguments.data):
        raise BadInput("--checkpoint and --data: give both")
    if arguments.rounds < 1:
        raise BadInput(f"--rounds {arguments.rounds}: must be at least 1")


def main(argv=None):
    try:
        arguments = parse(argv)
        check(arguments)
        for work in workloads(arguments):
            with tempfile.TemporaryDirectory() as folder:
                bench(work, arguments, folder)
    except BadInput as error:
        say(f"error: {error}")
        sys.exit(2)


if __name__ == "__main__":
    main()
