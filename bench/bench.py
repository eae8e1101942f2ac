"""Benchmarks, run by hand: whole training steps of grpo.py against TRL's GRPOTrainer.

    python bench/bench.py                                a random model of 5M parameters, one thread
    python bench/bench.py --shape 25M                    one of 25M parameters
    python bench/bench.py --checkpoint DIR --data FILE   a real model, all cores of an idle machine
    python bench/bench.py --gpu                          random models of 0.5B and 7B on one GPU

    --settings="--adapter lora --beta 0"    flags of grpo.py; TRL gets what it has of them
    --parent DIR                            another checkout of this project as a further side, e.g.
                                            from git worktree add DIR COMMIT

In a round every side runs once, in a process of its own: it loads the model, takes one step to warm
up, then two that count. Rounds differ in their seed, which gives the prompts and their order. The
table has medians over all rounds: seconds per step, milliseconds per completion token, and that
divided by our own; the same for sampling (rollout) and all else (update); rollout divided by the
tokens of the longest completion; peak memory above the libraries and the frozen weights.

TRL is at its defaults, and again with activations kept: its gradient checkpointing costs time and
saves memory. Dropout is 0 on all sides, the learning rate 1e-6. Random models are timed in CPU
seconds of one thread, so other work on the machine does not matter; all else in wall time. On a GPU
there is also our side without CUDA graphs.

With --parent, both checkouts also compute the gradient of one update on the same completions, in
fp32 and in the dtype of the runs.

Ratios are comparable across machines, seconds are not. Where completions end by themselves, the
sides sample different ones; the table says INVALID if their mean lengths differ by over 10 %.
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

SAME = "--dropout 0 --lr 1e-6 --quiet".split()  # for all sides


@dataclasses.dataclass
class Workload:
    """A model and its tasks, and the sizes of a step, as flags of grpo.py."""

    name: str
    sizes: str
    shape: str = ""  # of a random model, see random_model.py
    end: float = 1 / 110  # its probability of EOS at every token; 0: full length
    shortest: int = 180  # its prompts, in tokens
    longest: int = 220
    checkpoint: str = ""  # a real model in its place
    data: str = ""


STEP = "--prompts-per-step 8 --num-samples 8 --max-new-tokens 256"
REAL = "--prompts-per-step 1 --num-samples 8 --max-new-tokens 160 --max-prompt-tokens 512"
PAPER = "--prompts-per-step 1 --num-samples 8 --max-new-tokens 1024"  # grpo.py's defaults
WIDE = "--prompts-per-step 8 --num-samples 8 --max-new-tokens 512"
GPU = (
    Workload("0.5B, 8 rows", PAPER, "0.5B", 0, 500, 500),
    Workload("7B, 8 rows, the paper's size", PAPER, "7B", 0, 2048, 2048),
    Workload("7B, 64 rows, lengths that vary", WIDE, "7B", 1 / 220, 400, 500),
)
SHRUNK = "--prompts-per-step 2 --num-samples 2 --max-new-tokens 8 --micro-tokens 32"


def say(text):
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------- running the sides


def run(script, spec, root=ROOT, threads=1):
    """Run a file of bench/ with the modules of a checkout; its answer, an object, or None."""
    threads = {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(ROOT / "bench" / script), json.dumps(spec)]
    environment = os.environ | threads | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise BadInput(f"{script} ended with status {done.returncode}, see above; {command[2]}")
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
    for each in dict.fromkeys(("float32", dtype)):
        short = {"float32": "fp32", "bfloat16": "bf16"}[each]
        more = ["--dtype", short, "--max-grad-norm", "1e9"]  # not clipped
        spec = {"side": "gradients", "flags": flags + more, "file": f"{folder}/{short}.pt"}
        run("sides.py", spec, parent, threads)
        found = run("sides.py", spec, ROOT, threads)
        yield "gradient, {}: differs by {error:.1e}, at most {worst:.1e} in {name}".format(
            short, **found
        )


# ------------------------------------------------------------------------- the table


def tokens(step):
    return sum(step["lengths"])


def mean_length(steps):
    return fmean(length for step in steps for length in step["lengths"])


def cells(steps, peak):
    """The numbers of a side's row."""
    seconds = [step["rollout"] + step["update"] for step in steps]
    decode = median(step["rollout"] / max(step["lengths"]) for step in steps)
    per_token = {
        "step": median(s / tokens(step) for s, step in zip(seconds, steps, strict=True)),
        "rollout": median(step["rollout"] / tokens(step) for step in steps),
        "update": median(step["update"] / tokens(step) for step in steps),
    }
    return {
        "seconds": median(seconds), "decode": 1000 * decode, "peak": peak,
        "length": mean_length(steps),
    } | {name: 1000 * value for name, value in per_token.items()}  # fmt: skip


def table(results):
    """Yield the lines of a Markdown table of {name: answers}, and what must be known of it."""
    rows = {}
    for name, answers in results.items():
        steps = [step for answer in answers for step in answer["steps"]]
        rows[name] = cells(steps, max(answer["peak"] for answer in answers))
    ours = rows["ours"]
    heads = "s per step", "ms per token", "rollout", "update", "ms per decoding step", "peak MiB"
    yield f"| | {' | '.join(heads)} | length |"
    yield "|---" * (len(heads) + 2) + "|"
    for name, row in rows.items():
        parts = [f"{row['seconds']:.2f}"]
        for part in ("step", "rollout", "update"):
            parts.append(f"{row[part]:.3g} ({row[part] / ours[part]:.2f})")
        parts += [f"{row['decode']:.3g}", f"{row['peak']:,.0f}", f"{row['length']:.1f}"]
        yield f"| {name} | {' | '.join(parts)} |"
    reading = 1000 * median(answer["reading"] for answer in results["ours"])
    yield f"\nreading the weights once takes {reading:.3g} ms"
    lengths = [row["length"] for row in rows.values()]
    if max(lengths) > 1.1 * min(lengths):
        yield "INVALID: the mean lengths differ by over 10 %"


# ------------------------------------------------------------------------- main


def bench(work, arguments, folder):
    """Run a workload and print its table."""
    checkpoint, source = work.checkpoint, work.data
    if work.shape:
        spec = {"directory": folder, "shape": work.shape, "end": work.end}
        run("random_model.py", spec | {"shortest": work.shortest, "longest": work.longest})
        checkpoint, source = folder, f"{folder}/data.jsonl"
    flags = ["--model", checkpoint, "--data", source, "--heldout", "", "--output", f"{folder}/run"]
    flags += SAME + shlex.split(work.sizes) + shlex.split(arguments.settings)
    one_thread = bool(work.shape) and not arguments.gpu
    threads = 1 if one_thread else os.cpu_count()
    results = rounds(arguments, flags, one_thread, threads)
    print(f"\n{work.name}; {work.sizes} {arguments.settings}; {arguments.rounds} rounds\n")
    for line in table(results):
        print(line)
    if arguments.parent:
        dtype = results["ours"][0]["dtype"]
        for line in compare_gradients(flags, arguments.parent, dtype, threads, folder):
            print(line, flush=True)


def workloads(arguments):
    """The workloads that the command line asks for; with --shrink as small as can be."""
    if arguments.gpu:
        found = GPU
    elif arguments.checkpoint:
        real = {"checkpoint": arguments.checkpoint, "data": arguments.data}
        found = [Workload(Path(arguments.checkpoint).name, REAL, **real)]
    else:
        found = [Workload(f"random, {arguments.shape}", STEP, arguments.shape)]
    if not arguments.shrink:
        return found
    small = []
    for work in found:
        shape = "shrunk" if work.shape else ""
        end = 1 / 8 if work.end else 0
        changes = {"shape": shape, "end": end, "shortest": 90, "longest": 99, "sizes": SHRUNK}
        small.append(dataclasses.replace(work, **changes))
    return small


def parse(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--shape", default="5M", help="of a random model, see random_model.py [5M]")
    add("--checkpoint", default="", metavar="DIR", help="a real model in its place [none]")
    add("--data", default="", metavar="FILE", help="its tasks, JSONL [none]")
    add("--gpu", action="store_true", help="random models of 0.5B and 7B on one GPU [off]")
    add("--settings", default="", metavar="FLAGS", help="flags of grpo.py, as one word [none]")
    add("--parent", default="", metavar="DIR", help="an older checkout, a further side [none]")
    add("--rounds", type=int, default=3, metavar="N", help="turns of every side [3]")
    add("--shrink", action="store_true", help="try the same code on tiny sizes, anywhere [off]")
    arguments = parser.parse_args(argv)
    for path, name in ((arguments.checkpoint, "config.json"), (arguments.parent, "grpo.py")):
        if path and not (Path(path) / name).is_file():
            raise BadInput(f"{path}: a directory without {name}; give another one")
    if bool(arguments.checkpoint) != bool(arguments.data):
        raise BadInput("--checkpoint and --data: give both")
    return arguments


def main(argv=None):
    try:
        arguments = parse(argv)
        for work in workloads(arguments):
            with tempfile.TemporaryDirectory() as folder:
                bench(work, arguments, folder)
    except BadInput as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
