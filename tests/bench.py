"""Side-by-side measurements, run by hand, about three minutes on one core:

    python tests/bench.py

Every figure is the median of runs that alternate between ours and the other; only ratios travel
from one machine to another. Memory is the peak above a small model, each run in its own process.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))
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
    yield "levenshtein, 1000 characters, against plain DP", theirs / mine, ">= 150", mine, theirs, "s"
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        return
    mine, theirs = alternate(15, ours, seconds(Levenshtein.distance, a, b, repeat=500))
    yield "levenshtein, 1000 characters, slower than rapidfuzz", mine / theirs, "<= 40", mine, theirs, "s"


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
        yield f"sampling 64 rows, 200 + 128 tokens, {name}, against generate", theirs / mine, goal, mine, theirs, "s"


def log_probabilities(kind):
    """In a fresh process: print how far the peak rises above the model in one forward and backward pass, MiB."""
    import torch
    from conftest import random_model

    import dora
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
    yield name, theirs / mine, ">= 10", mine, theirs, "MiB"


def bench_sandbox():
    """One program with one test on one worker that has torch loaded, against a fresh interpreter with torch."""
    import sandbox

    code, test = "def successor(n):\n    return n + 1\n", "def test():\n    assert successor(1) == 2\n"
    with sandbox.Sandbox(("torch",), workers=1) as box:
        assert box.run(code, [test]).passed
        command = [sys.executable, "-c", f"import torch\n{code}{test}test()"]
        mine, theirs = alternate(9, seconds(box.run, code, [test]), seconds(subprocess.run, command))
    yield (
        "a program in the sandbox, torch loaded, against a fresh interpreter",
        theirs / mine,
        ">= 100",
        mine,
        theirs,
        "s",
    )


def main():
    form = lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--json", action="store_true", help="one JSON object per figure [off]")
    parser.add_argument("--memory", choices=("ours", "naive"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        return log_probabilities(arguments.memory)
    names = ("name", "ratio", "goal", "ours", "theirs", "unit")
    for bench in (bench_memory, bench_levenshtein, bench_sandbox, bench_sampling):
        for row in bench():
            name, ratio, goal, mine, theirs, unit = row
            text = f"{name}\n{ratio:12.1f}x   goal {goal:<8}{mine:12.4g} {unit} against {theirs:.4g} {unit}"
            print(json.dumps(dict(zip(names, row))) if arguments.json else text, flush=True)


if __name__ == "__main__":
    main()
