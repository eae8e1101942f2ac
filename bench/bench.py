"""Side-by-side benchmarks, run by hand on one core:

    python bench/bench.py [--json] [--only WORD] [--growth | --gpu | --checkpoint DIR --data FILE]

Every number is a median over runs that alternate between our side and the other. Ratios are
comparable across machines, seconds are not. A row has a name, the ratio, the goal and both medians.
Where completion lengths vary, it also has the mean length of each side, and says that it is invalid
if these differ by more than 10 %.

    memory       peak of log-probabilities against full logits               under a minute
    step         a whole GRPO step against TRL's GRPOTrainer, time and       half an hour
                 memory: 5M and 25M parameters, DoRA with beta 0.001,
                 LoRA with beta 0 (needs trl, peft and datasets)
    levenshtein  against the textbook algorithm and rapidfuzz                seconds
    sandbox      a program against a fresh interpreter                       seconds
    sampling     against transformers' generate                              minutes
    training     grpo.accumulate against one padded row per completion       minutes

A whole step (bench_work.py, bench_trl.py) has 8 prompts of 180 to 220 tokens x 8 completions of at
most 256 tokens, about 100 on average; r 64 on q and v; the same model, prompts and reward; dropout
0 on both sides. TRL is at its defaults, which use gradient checkpointing. That costs it time on a
CPU, so a second row turns it off. Memory is the peak above the loaded model, with one process per
side. On the CPU, the seconds of step, sampling 5M and 25M, training and --growth are CPU time, not
wall time, so other work on the machine does not matter.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"
import reward

VOCAB = 151_936  # Qwen2.5's


def alternate(runs, ours, theirs):
    """Call the two functions in turn, `runs` times each; returns the median result of each."""
    pairs = [(ours(), theirs()) for _ in range(runs)]
    return median(a for a, _ in pairs), median(b for _, b in pairs)


def seconds(function, *args, repeat=1):
    """A function that returns the seconds of function(*args), the mean of `repeat` calls."""

    def run():
        start = time.perf_counter()
        for _ in range(repeat):
            function(*args)
        return (time.perf_counter() - start) / repeat

    return run


def row(name, ratio, goal, ours, theirs, unit, **more):
    return {
        "name": name,
        "ratio": ratio,
        "goal": goal,
        "ours": ours,
        "theirs": theirs,
        "unit": unit,
    } | more


def say(text):
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------- processes that alternate


class Side:
    """A process that runs one step per call and returns its measurements as a dict."""

    def __init__(self, script, **spec):
        command = [sys.executable, HERE / script, json.dumps(spec)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            sys.exit(f"{self.process.args[1]} exited with status {status} before its step was done")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def rounds(name, sides, min_rounds, max_rounds=12):
    """Run the sides in turn and return the list of steps of each.

    The first step of each is warm-up. After `min_rounds` rounds more follow, up to `max_rounds`,
    until the mean lengths of the sides are within 10 % of each other.
    """
    for side in sides:
        side()
    results = [[] for _ in sides]
    while len(results[0]) < min_rounds or (
        len(results[0]) < max_rounds and length_gap(results) > 0.1
    ):
        for side, steps in zip(sides, results, strict=True):
            steps.append(side())
        latest = [{key: round(value, 3) for key, value in steps[-1].items()} for steps in results]
        say(f"{name}: round {len(results[0])}: " + " against ".join(map(json.dumps, latest)))
    return results


def mean_length(steps):
    return sum(step["tokens"] for step in steps) / sum(step["completions"] for step in steps)


def length_gap(results):
    """By what fraction the longest mean length of the sides exceeds the shortest."""
    lengths = [mean_length(steps) for steps in results]
    return max(lengths) / min(lengths) - 1


def per_token(steps, part="seconds"):
    """Milliseconds per completion token, the median over the steps."""
    return median(1000 * step[part] / step["tokens"] for step in steps)


def compared(name, goal, ours, theirs):
    """The row that compares two sides by time per token.

    It has their mean lengths, and a warning if these differ too much.
    """
    name += "" if length_gap([ours, theirs]) <= 0.1 else " (INVALID: lengths differ)"
    mine, other = per_token(ours), per_token(theirs)
    lengths = {
        "length_ours": round(mean_length(ours), 1),
        "length_theirs": round(mean_length(theirs), 1),
        "steps": len(ours),
    }
    both = f"{lengths['length_ours']} against {lengths['length_theirs']}"
    say(f"{name}: mean length {both} in {len(ours)} steps")
    return row(name, other / mine, goal, mine, other, "ms per token", **lengths)


# ------------------------------------------------------------------------- the rows


def dynamic_programming(a, b):
    """The textbook edit distance, one row at a time."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def bench_levenshtein():
    """Two texts of 1000 characters that differ at both ends and in a fifth of the characters."""
    rng = random.Random(0)
    a = rng.choices("abcdefghijklmnopqrstuvwxyz_.()= \n", k=1000)
    b = [rng.choice("abcdefgh") if rng.random() < 0.2 else x for x in a]
    a, b = "<" + "".join(a[1:-1]) + ">", "[" + "".join(b[1:-1]) + "]"
    assert reward.levenshtein(a, b) == dynamic_programming(a, b)
    ours = seconds(reward.levenshtein, a, b, repeat=50)
    mine, theirs = alternate(5, ours, seconds(dynamic_programming, a, b))
    yield row(
        "levenshtein, 1000 characters, against plain DP", theirs / mine, ">= 150", mine, theirs, "s"
    )
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        return
    mine, theirs = alternate(15, ours, seconds(Levenshtein.distance, a, b, repeat=500))
    yield row(
        "levenshtein, 1000 characters, slower than rapidfuzz",
        mine / theirs,
        "<= 40",
        mine,
        theirs,
        "s",
    )


def bench_sampling():
    """64 rows, 8 prompts x 8, against generate on left-padded rows: equal and varying lengths."""
    import torch
    from conftest import random_model
    from transformers.utils import logging

    import recode

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "initializer_range": 0.02,
    }
    model = random_model("qwen2", 2000, **sizes)
    model.generation_config.eos_token_id = None
    torch.manual_seed(0)
    prompts = [torch.randint(4, 2000, (n,)).tolist() for n in range(190, 214, 3)]
    ids = torch.tensor([[0] * (211 - len(prompt)) + prompt for prompt in prompts])
    settings = {
        "do_sample": True,
        "top_k": 0,
        "num_return_sequences": 8,
        "max_new_tokens": 128,
        "pad_token_id": 0,
    }
    for name, eos, goal in (
        ("equal lengths", [-1], ">= 1.5"),
        ("varying lengths", list(range(4, 64)), ">= 2"),
    ):
        ours = seconds(recode.sample, model, prompts, 8, 128, eos)
        generate = lambda: model.generate(
            ids, attention_mask=(ids > 0).long(), eos_token_id=eos, **settings
        )
        mine, theirs = alternate(3, ours, seconds(generate))
        name = f"sampling 64 rows, 200 + 128 tokens, {name}, against generate"
        yield row(name, theirs / mine, goal, mine, theirs, "s")


def log_probabilities(kind):
    """In a fresh process: print by how many MiB one forward and backward raises the peak."""
    import torch
    from conftest import random_model

    import dora
    import recode

    torch.set_num_threads(1)
    model = dora.add_dora(
        random_model("qwen2", VOCAB, tie_word_embeddings=True), 8, 8.0, 0.0, "q_proj,v_proj"
    )

    def naive(prompts, tokens, mask):
        ids = torch.cat([torch.tensor(prompts), tokens], 1)
        logps = (
            model(ids).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        )
        return logps[:, -tokens.shape[1] :] * mask

    def ours(prompts, tokens, mask):
        return recode.token_logps(model, prompts, tokens, mask)

    def peak(P, T):
        tokens = torch.randint(4, VOCAB, (4, T))
        {"ours": ours, "naive": naive}[kind](
            [list(range(4, 4 + P))] * 4, tokens, tokens > 0
        ).sum().backward()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            2**20 if sys.platform == "darwin" else 2**10
        )

    before = peak(2, 1)
    print(peak(128, 128) - before)


def bench_memory():
    """Log-probabilities of 4 rows of 128 + 128 tokens.

    Runs first, because a process starts with the peak memory of its parent.
    """
    run = lambda kind: (
        lambda: float(
            subprocess.check_output([sys.executable, __file__, "--memory", kind], text=True)
        )
    )
    mine, theirs = alternate(3, run("ours"), run("naive"))
    name = (
        "peak memory of log-probabilities, 512 positions, vocabulary 151,936, against full logits"
    )
    yield row(name, theirs / mine, ">= 10", mine, theirs, "MiB")


def bench_sandbox():
    """A program with one test in a worker that has torch, against a fresh interpreter."""
    import sandbox

    code, test = (
        "def successor(n):\n    return n + 1\n",
        "def test():\n    assert successor(1) == 2\n",
    )
    with sandbox.Sandbox(("torch",), workers=1) as box:
        assert box.run(code, [test]).passed
        command = [sys.executable, "-c", f"import torch\n{code}{test}test()"]
        mine, theirs = alternate(
            9, seconds(box.run, code, [test]), seconds(subprocess.run, command)
        )
    name = "a program in the sandbox, torch loaded, against a fresh interpreter"
    yield row(name, theirs / mine, ">= 100", mine, theirs, "s")


def bench_checkpoint(checkpoint, data):
    """A whole GRPO step of a real model, against TRL at its defaults and against ourselves.

    1 prompt x 8 completions of at most 160 tokens, DoRA r 64, beta 0.001; wall time, all cores.
    As in grpo.py, glibc keeps freed memory for us, and weights are packed for sampling. TRL has the
    first only with "memory kept".
    """
    spec = {"checkpoint": checkpoint, "data": data, "prompts": 1, "new_tokens": 160, "longest": 512}
    others = (  # who, script, spec, goal
        ("TRL", "bench_trl.py", spec | {"keep_memory": False}, ">= 3"),
        ("ours, weights not packed", "bench_work.py", spec | {"pack": False}, "-"),
        ("TRL, memory kept", "bench_trl.py", spec, "-"),
        ("ours, memory not kept", "bench_work.py", spec | {"keep_memory": False}, "-"),
    )
    for who, script, settings, goal in others:  # two models at a time: memory
        name = f"step {Path(checkpoint).name} dora, beta 0.001, against {who}"
        with Side("bench_work.py", **spec) as ours, Side(script, **settings) as theirs:
            results = rounds(name, [ours, theirs], 2)
        yield compared(name, goal, *results)
        peaks = [max(step["peak"] for step in steps) for steps in results]
        yield row(f"{name}: peak memory", peaks[1] / peaks[0], "-", *peaks, "MiB")


def bench_step(shape, adapter, beta, goal, min_rounds, no_checkpointing=False):
    """A whole GRPO step against TRL, in two alternating processes: time and peak memory.

    With no_checkpointing there is also TRL without gradient checkpointing. Must run before anything
    imports torch here, because a process starts with the peak memory of its parent.
    """
    if not all(importlib.util.find_spec(name) for name in ("trl", "peft", "datasets")):
        return say("step: skipped, needs trl, peft and datasets")
    name = f"step {shape} {adapter}, beta {beta}, against TRL"
    spec = {"shape": shape, "adapter": adapter, "beta": beta}
    with contextlib.ExitStack() as stack:
        names = ["bench_work.py", "bench_trl.py"] + ["bench_trl.py"] * no_checkpointing
        settings = [spec, spec, spec | {"checkpointing": False}]
        sides = [stack.enter_context(Side(script, **s)) for script, s in zip(names, settings)]
        results = rounds(name, sides, min_rounds)
    parts = ("rollout", "reference", "update")
    shares = [{part: round(per_token(steps, part), 3) for part in parts} for steps in results]
    for who, side in zip(("ours", "TRL", "TRL without checkpointing"), shares):
        say(f"{name}: ms per token, {who}: {side}")
    yield compared(name, goal, results[0], results[1]) | {
        "parts_ours": shares[0],
        "parts_theirs": shares[1],
    }
    peaks = [max(step["peak"] for step in steps) for steps in results]
    yield row(
        f"{name}: peak memory", peaks[1] / peaks[0], ">= 1.67" if beta else "-", *peaks[:2], "MiB"
    )
    if no_checkpointing:
        yield compared(f"{name} without checkpointing", "-", results[0], results[2])
        yield row(
            f"{name} without checkpointing: peak memory",
            peaks[2] / peaks[0],
            "-",
            peaks[0],
            peaks[2],
            "MiB",
        )


def bench_sampling_calibrated(shape):
    """8 prompts x 8, at most 256 tokens, EOS at about 1/110 everywhere, against generate."""
    import bench_work as work

    spec = work.Spec(shape)
    model = work.build(spec)
    prompts = [
        prompt for prompt, _ in work.make_tasks(spec, model.config.vocab_size)[: spec.prompts]
    ]
    name = f"sampling {shape}, tokens per second, against generate"
    yield compared(name, ">= 2.5", *rounds(name, work.samplers(model, prompts, spec), 5))


def bench_training(shape):
    """grpo.accumulate against padded_gradient on one rollout; their gradients must agree."""
    import bench_work as work

    name, error = f"training pass {shape}, against padded rows", work.gradient_error(shape)
    say(f"{name}: gradients differ by {error:.1e} of the largest")
    assert error <= 1e-5, f"{name}: the gradients differ by {error:.1e} of the largest"
    spec = work.Spec(shape, beta=0.0)
    config = work.our_config(spec)
    model = work.adapt(work.build(spec), spec, config)
    batch = work.rollout_batch(model, spec, config)
    clock, counts = (
        work.clock_of("cpu"),
        {"tokens": int(batch.mask.sum()), "completions": len(batch.mask)},
    )

    def timed(run, *arguments):
        started = clock()
        run(model, batch, *arguments)
        return {"seconds": clock() - started} | counts

    sides = (
        functools.partial(timed, work.grpo.accumulate, config),
        functools.partial(timed, work.padded_gradient),
    )
    results = rounds(name, sides, 3 if shape == "25M" else 5)
    yield compared(name, ">= 2.5", *results) | {"gradient_error": error}


def bench_growth():
    """Yield table rows: seconds per step and peak memory as one size grows at a time.

    Each row has a fresh process; no completion ends early.
    """
    base = {
        "shape": "5M",
        "end": 0,
        "prompts": 4,
        "new_tokens": 128,
        "shortest": 200,
        "longest": 200,
    }
    yield "| what grows | | s per step | to the row before | peak MiB | to the row before |"
    yield "|---|---|---|---|---|---|"
    sweeps = {
        "num_samples": (4, 8, 16, 32),
        "new_tokens": (64, 128, 256, 512, 1024),
        "vocab": (1000, 152_000),
    }
    for name, sizes in sweeps.items():
        before = None
        for size in sizes:
            with Side("bench_work.py", **base | {name: size}) as side:
                steps = [side() for _ in range(3)]
            now = median(step["seconds"] for step in steps[1:]), steps[-1]["peak"]
            time_ratio, peak_ratio = (
                (f"{a / b:.2f}" for a, b in zip(now, before)) if before else ("", "")
            )
            time_cells = f"{now[0]:.2f} | {time_ratio}"
            yield f"| {name} | {size:,} | {time_cells} | {now[1]:.0f} | {peak_ratio} |"
            before = now


# ------------------------------------------------------------------------- main

STEPS = {
    f"step {shape} {adapter}": (shape, adapter, beta, goal, min_rounds, shape == "5M")
    for shape, min_rounds in (("5M", 5), ("25M", 3))
    for adapter, beta, goal in (("dora", 0.001, ">= 4"), ("lora", 0.0, ">= 3"))
}


def benches():
    """{name: function that yields rows}; those that must start in a small process come first."""
    chosen = {"memory": bench_memory}
    chosen |= {name: functools.partial(bench_step, *arguments) for name, arguments in STEPS.items()}
    chosen |= {
        "levenshtein": bench_levenshtein,
        "sandbox": bench_sandbox,
        "sampling": bench_sampling,
    }
    for bench in (bench_sampling_calibrated, bench_training):
        name = "sampling" if bench is bench_sampling_calibrated else "training"
        chosen |= {f"{name} {shape}": functools.partial(bench, shape) for shape in ("5M", "25M")}
    return chosen


def show(result, as_json):
    numbers = (
        "-" if result[name] is None else f"{result[name]:.4g}"
        for name in ("ratio", "ours", "theirs")
    )
    text = "{:<90}{:>8}x   goal {:<8}{} {unit} against {} {unit}"
    ratio, ours, theirs = numbers
    text = text.format(result["name"], ratio, result["goal"], ours, theirs, unit=result["unit"])
    print(json.dumps(result) if as_json else text, flush=True)


def main():
    form = lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--json", action="store_true", help="one JSON object per row [off]")
    parser.add_argument(
        "--only", default="", metavar="WORD", help="run those with WORD in their name [all]"
    )
    parser.add_argument(
        "--growth", action="store_true", help="how time and memory grow with the work [off]"
    )
    parser.add_argument("--gpu", action="store_true", help="7B shapes on a GPU: bench_gpu.py [off]")
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="a step of this model against TRL, on an idle machine [none]",
    )
    parser.add_argument("--data", metavar="FILE", help="its tasks, JSONL file or hub id [none]")
    parser.add_argument(
        "--shrink", action="store_true", help=argparse.SUPPRESS
    )  # --gpu's code, small, on the CPU
    parser.add_argument("--memory", choices=("ours", "naive"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        return log_probabilities(arguments.memory)
    if arguments.growth:
        for line in bench_growth():
            print(line, flush=True)
        return None
    if arguments.checkpoint:
        bench = functools.partial(bench_checkpoint, arguments.checkpoint, arguments.data)
        chosen = {"checkpoint": bench}
    elif arguments.gpu or arguments.shrink:
        import bench_gpu

        chosen = bench_gpu.benches(arguments.shrink)
    else:
        chosen = benches()
    for name, bench in chosen.items():
        if arguments.only in name:
            say(f"--- {name}")
            for result in bench():
                show(result, arguments.json)


if __name__ == "__main__":
    main()
