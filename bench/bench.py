"""Side-by-side measurements, run by hand, on one core:

    python bench/bench.py [--json] [--only WORD] [--growth | --gpu]

Every figure is the median of runs that alternate between ours and the other; only ratios travel
from one machine to another. A row has a name, the ratio, the goal and both medians; where lengths
vary also the mean length on both sides, and a row whose means differ by more than a tenth says that
it does not count.

    memory       peak of log-probabilities against full logits               under a minute
    step         a whole GRPO step against TRL's GRPOTrainer, time and       half an hour
                 memory: 5M and 25M parameters, DoRA with beta 0.001,
                 LoRA with beta 0 (needs trl, peft and datasets)
    levenshtein  against the textbook and rapidfuzz                          seconds
    sandbox      a program against a fresh interpreter                       seconds
    sampling     against transformers' generate                              minutes
    training     grpo.accumulate against one padded row per completion       minutes

What a whole step is (bench_work.py, bench_trl.py): 8 prompts of 180 to 220 tokens x 8 samples of at
most 256 and about 100 tokens; r 64 on q and v; same model, prompts and reward; dropout 0 on both
sides. TRL is at its defaults, which checkpoint activations; a further row turns that off, for on a
CPU it costs TRL time. Memory is the peak above the loaded model in a process of its own. On the CPU
the seconds of step, sampling 5M and 25M, training and --growth are those of work, not of waiting,
so that a machine that is shared with others can be used.
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
    """The medians of what the two functions return, each called `runs` times, by turns."""
    pairs = [(ours(), theirs()) for _ in range(runs)]
    return median(a for a, _ in pairs), median(b for _, b in pairs)


def seconds(function, *args, repeat=1):
    """A function of no arguments: how long one call of function(*args) takes, by the mean of `repeat`."""

    def run():
        start = time.perf_counter()
        for _ in range(repeat):
            function(*args)
        return (time.perf_counter() - start) / repeat

    return run


def row(name, ratio, goal, ours, theirs, unit, **more):
    return {"name": name, "ratio": ratio, "goal": goal, "ours": ours, "theirs": theirs, "unit": unit} | more


def say(text):
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------- sides that take turns


class Side:
    """A process that makes a step, and tells of it as a dict, every time it is called."""

    def __init__(self, script, **spec):
        command = [sys.executable, HERE / script, json.dumps(spec)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.process.args[1]} ended with status {self.process.wait()} before its step was done")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def rounds(name, sides, least, most=12):
    """Let the sides make a step in turn, `least` times after a first one that does not count, and go on until
    their mean lengths are within a tenth of each other: for every side its list of steps."""
    for side in sides:
        side()
    made = [[] for _ in sides]
    while len(made[0]) < least or (len(made[0]) < most and apart(made) > 0.1):
        for side, steps in zip(sides, made, strict=True):
            steps.append(side())
        told = [{key: round(value, 3) for key, value in steps[-1].items()} for steps in made]
        say(f"{name}: round {len(made[0])}: " + " against ".join(map(json.dumps, told)))
    return made


def length(steps):
    return sum(step["tokens"] for step in steps) / sum(step["completions"] for step in steps)


def apart(made):
    """How far the mean lengths of the sides differ, as a share of the least."""
    lengths = [length(steps) for steps in made]
    return max(lengths) / min(lengths) - 1


def per_token(steps, part="seconds"):
    """Milliseconds a completion token: the median over the steps."""
    return median(1000 * step[part] / step["tokens"] for step in steps)


def compared(name, goal, ours, theirs):
    """The row of two sides' seconds a token, with the mean lengths, and a warning where they differ too much."""
    name += "" if apart([ours, theirs]) <= 0.1 else " (DOES NOT COUNT: lengths differ)"
    mine, other = per_token(ours), per_token(theirs)
    lengths = {"length_ours": round(length(ours), 1), "length_theirs": round(length(theirs), 1), "steps": len(ours)}
    say(f"{name}: mean length {lengths['length_ours']} against {lengths['length_theirs']} in {len(ours)} steps")
    return row(name, other / mine, goal, mine, other, "ms a token", **lengths)


# ------------------------------------------------------------------------- the rows


def dynamic_programme(a, b):
    """The textbook edit distance, one row at a time."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def bench_levenshtein():
    """Two texts of 1000 characters that share neither beginning nor end, a fifth of the characters changed."""
    chance = random.Random(0)
    a = chance.choices("abcdefghijklmnopqrstuvwxyz_.()= \n", k=1000)
    b = [chance.choice("abcdefgh") if chance.random() < 0.2 else x for x in a]
    a, b = "<" + "".join(a[1:-1]) + ">", "[" + "".join(b[1:-1]) + "]"
    assert reward.levenshtein(a, b) == dynamic_programme(a, b)
    ours = seconds(reward.levenshtein, a, b, repeat=50)
    mine, theirs = alternate(5, ours, seconds(dynamic_programme, a, b))
    yield row("levenshtein, 1000 characters, against plain DP", theirs / mine, ">= 150", mine, theirs, "s")
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        return
    mine, theirs = alternate(15, ours, seconds(Levenshtein.distance, a, b, repeat=500))
    yield row("levenshtein, 1000 characters, slower than rapidfuzz", mine / theirs, "<= 40", mine, theirs, "s")


def bench_sampling():
    """64 rows, 8 prompts x 8, against generate on left-padded rows: all 128 tokens, and lengths that vary."""
    import torch
    from conftest import random_model
    from transformers.utils import logging

    import recode

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "initializer_range": 0.02}
    model = random_model("qwen2", 2000, **sizes)
    model.generation_config.eos_token_id = None
    torch.manual_seed(0)
    prompts = [torch.randint(4, 2000, (n,)).tolist() for n in range(190, 214, 3)]
    ids = torch.tensor([[0] * (211 - len(prompt)) + prompt for prompt in prompts])
    settings = {"do_sample": True, "top_k": 0, "num_return_sequences": 8, "max_new_tokens": 128, "pad_token_id": 0}
    for name, eos, goal in (("equal lengths", [-1], ">= 1.5"), ("lengths that vary", list(range(4, 64)), ">= 2")):
        ours = seconds(recode.sample, model, prompts, 8, 128, eos)
        generate = lambda: model.generate(ids, attention_mask=(ids > 0).long(), eos_token_id=eos, **settings)
        mine, theirs = alternate(3, ours, seconds(generate))
        name = f"sampling 64 rows, 200 + 128 tokens, {name}, against generate"
        yield row(name, theirs / mine, goal, mine, theirs, "s")


def log_probabilities(kind):
    """In a fresh process: print how far the peak rises above the model in one forward and backward pass, MiB."""
    import torch
    from conftest import random_model

    from training import dora
    import recode

    torch.set_num_threads(1)
    model = dora.add_dora(random_model("qwen2", VOCAB, tie_word_embeddings=True), 8, 8.0, 0.0, "q_proj,v_proj")

    def naive(prompts, tokens, mask):
        ids = torch.cat([torch.tensor(prompts), tokens], 1)
        logps = model(ids).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return logps[:, -tokens.shape[1] :] * mask

    def ours(prompts, tokens, mask):
        return recode.token_logps(model, prompts, tokens, mask)

    def peak(P, T):
        tokens = torch.randint(4, VOCAB, (4, T))
        {"ours": ours, "naive": naive}[kind]([list(range(4, 4 + P))] * 4, tokens, tokens > 0).sum().backward()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

    before = peak(2, 1)
    print(peak(128, 128) - before)


def bench_memory():
    """Log-probabilities of 4 rows, 128 + 128 tokens. Comes first: a process starts with the peak of its parent."""
    run = lambda kind: lambda: float(subprocess.check_output([sys.executable, __file__, "--memory", kind], text=True))
    mine, theirs = alternate(3, run("ours"), run("naive"))
    name = "peak memory of log-probabilities, 512 positions, vocabulary 151,936, against full logits"
    yield row(name, theirs / mine, ">= 10", mine, theirs, "MiB")


def bench_sandbox():
    """One program with one test on one worker that has torch loaded, against a fresh interpreter with torch."""
    import sandbox

    code, test = "def successor(n):\n    return n + 1\n", "def test():\n    assert successor(1) == 2\n"
    with sandbox.Sandbox(("torch",), workers=1) as box:
        assert box.run(code, [test]).passed
        command = [sys.executable, "-c", f"import torch\n{code}{test}test()"]
        mine, theirs = alternate(9, seconds(box.run, code, [test]), seconds(subprocess.run, command))
    name = "a program in the sandbox, torch loaded, against a fresh interpreter"
    yield row(name, theirs / mine, ">= 100", mine, theirs, "s")


def bench_step(shape, adapter, beta, goal, least, lean=False):
    """A whole GRPO step against TRL, in two processes by turns, and the peaks of both; with `lean` TRL also
    without its checkpointing. Before anything has loaded torch here: a process starts with its parent's peak."""
    if not all(importlib.util.find_spec(name) for name in ("trl", "peft", "datasets")):
        return say("step: needs trl, peft and datasets; left out")
    name = f"step {shape} {adapter}, beta {beta}, against TRL"
    spec = {"shape": shape, "adapter": adapter, "beta": beta}
    with contextlib.ExitStack() as stack:
        names = ["bench_work.py", "bench_trl.py"] + ["bench_trl.py"] * lean
        settings = [spec, spec, spec | {"checkpointing": False}]
        sides = [stack.enter_context(Side(script, **s)) for script, s in zip(names, settings)]
        made = rounds(name, sides, least)
    parts = ("rollout", "reference", "update")
    shares = [{part: round(per_token(steps, part), 3) for part in parts} for steps in made]
    for who, side in zip(("ours", "TRL", "TRL without checkpointing"), shares):
        say(f"{name}: ms a token, {who}: {side}")
    yield compared(name, goal, made[0], made[1]) | {"parts_ours": shares[0], "parts_theirs": shares[1]}
    peaks = [max(step["peak"] for step in steps) for steps in made]
    yield row(f"{name}: peak memory", peaks[1] / peaks[0], ">= 1.67" if beta else "-", *peaks[:2], "MiB")
    if lean:
        yield compared(f"{name} without checkpointing", "-", made[0], made[2])
        yield row(f"{name} without checkpointing: peak memory", peaks[2] / peaks[0], "-", peaks[0], peaks[2], "MiB")


def bench_sampling_calibrated(shape):
    """8 prompts x 8 of at most 256 tokens, ended by EOS at about 1/110 everywhere, against generate."""
    import bench_work as work

    spec = work.Spec(shape)
    model = work.build(spec)
    prompts = [prompt for prompt, _ in work.make_tasks(spec, model.config.vocab_size)[: spec.prompts]]
    name = f"sampling {shape}, tokens a second, against generate"
    yield compared(name, ">= 2.5", *rounds(name, work.samplers(model, prompts, spec), 5))


def bench_training(shape):
    """grpo.accumulate over one rollout and padded_gradient, whose gradients must agree."""
    import bench_work as work

    name, error = f"training pass {shape}, against padded rows", work.gradient_error(shape)
    say(f"{name}: gradients differ by {error:.1e} of the largest")
    assert error <= 1e-5, f"{name}: the gradients differ by {error:.1e} of the largest"
    spec = work.Spec(shape, beta=0.0)
    config = work.our_config(spec)
    model = work.adapt(work.build(spec), spec, config)
    batch = work.rollout_batch(model, spec, config)
    clock, counts = work.clock_of("cpu"), {"tokens": int(batch.mask.sum()), "completions": len(batch.mask)}

    def timed(run, *arguments):
        started = clock()
        run(model, batch, *arguments)
        return {"seconds": clock() - started} | counts

    sides = functools.partial(timed, work.grpo.accumulate, config), functools.partial(timed, work.padded_gradient)
    made = rounds(name, sides, 3 if shape == "25M" else 5)
    yield compared(name, ">= 2.5", *made) | {"gradient_error": error}


def bench_growth():
    """Seconds a step and peak memory of ours as one thing grows at a time, in a fresh process each; no EOS."""
    base = {"shape": "5M", "end": 0, "prompts": 4, "new_tokens": 128, "shortest": 200, "longest": 200}
    yield "| what grows | | s a step | to the one before | peak MiB | to the one before |\n|---|---|---|---|---|---|"
    ways = {"num_samples": (4, 8, 16, 32), "new_tokens": (64, 128, 256, 512, 1024), "vocab": (1000, 152_000)}
    for name, sizes in ways.items():
        before = None
        for size in sizes:
            with Side("bench_work.py", **base | {name: size}) as side:
                steps = [side() for _ in range(3)]
            now = median(step["seconds"] for step in steps[1:]), steps[-1]["peak"]
            time_ratio, peak_ratio = (f"{a / b:.2f}" for a, b in zip(now, before)) if before else ("", "")
            yield f"| {name} | {size:,} | {now[0]:.2f} | {time_ratio} | {now[1]:.0f} | {peak_ratio} |"
            before = now


# ------------------------------------------------------------------------- main

STEPS = {
    f"step {shape} {adapter}": (shape, adapter, beta, goal, least, shape == "5M")
    for shape, least in (("5M", 5), ("25M", 3))
    for adapter, beta, goal in (("dora", 0.001, ">= 4"), ("lora", 0.0, ">= 3"))
}


def benches():
    """{name: function of no arguments that yields rows}, those first that must find a small process."""
    chosen = {"memory": bench_memory}
    chosen |= {name: functools.partial(bench_step, *arguments) for name, arguments in STEPS.items()}
    chosen |= {"levenshtein": bench_levenshtein, "sandbox": bench_sandbox, "sampling": bench_sampling}
    for bench in (bench_sampling_calibrated, bench_training):
        name = "sampling" if bench is bench_sampling_calibrated else "training"
        chosen |= {f"{name} {shape}": functools.partial(bench, shape) for shape in ("5M", "25M")}
    return chosen


def show(figure, as_json):
    numbers = ("-" if figure[name] is None else f"{figure[name]:.4g}" for name in ("ratio", "ours", "theirs"))
    text = "{:<90}{:>8}x   goal {:<8}{} {unit} against {} {unit}"
    ratio, ours, theirs = numbers
    text = text.format(figure["name"], ratio, figure["goal"], ours, theirs, unit=figure["unit"])
    print(json.dumps(figure) if as_json else text, flush=True)


def main():
    form = lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--json", action="store_true", help="one JSON object per figure [off]")
    parser.add_argument("--only", default="", metavar="WORD", help="only what has this word in its name [all]")
    parser.add_argument("--growth", action="store_true", help="a table of our cost as the work grows [off]")
    parser.add_argument("--gpu", action="store_true", help="measure on a GPU, with the shapes of a 7B model, bench_gpu.py [off]")
    parser.add_argument("--shrink", action="store_true", help=argparse.SUPPRESS)  # --gpu's code, small, on the CPU
    parser.add_argument("--memory", choices=("ours", "naive"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        return log_probabilities(arguments.memory)
    if arguments.growth:
        for line in bench_growth():
            print(line, flush=True)
        return None
    if arguments.gpu or arguments.shrink:
        import bench_gpu

        chosen = bench_gpu.benches(arguments.shrink)
    else:
        chosen = benches()
    for name, bench in chosen.items():
        if arguments.only in name:
            say(f"--- {name}")
            for figure in bench():
                show(figure, arguments.json)


if __name__ == "__main__":
    main()
