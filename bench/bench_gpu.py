"""bench.py --gpu: one GPU, the shapes of Qwen2.5-7B with random bf16 weights. 20 minutes with TRL.

    decode    one decoding step at batch 8 and 64, context about 500: milliseconds, against generate
              and against the time to read the weights and the KV cache, at the bandwidth of a large
              copy
    sampling  recode.sample against generate, tokens per second: equal lengths, varying lengths
    paper     a whole step of the paper's size, 1 prompt of 2048 tokens x 8 completions of exactly
              1024, DoRA r 64 on q and v, beta 0.001: seconds, peak memory above the model, hours
              for 5000 steps; against TRL if it is installed

The time of a decoding step is the difference in time of two runs of different length, divided by
the difference in length, so it excludes prefill, warm-up and graph capture; the other numbers
include them. The adapter is always on. --shrink runs the same code on small shapes on the CPU, to
check that it works.
"""

import functools
import importlib.util
import sys
from dataclasses import dataclass
from statistics import median

import bench_work as work
import torch

from bench import Side, compared, rounds, row, say


@dataclass(frozen=True)
class Scale:
    """The sizes of all benchmarks."""

    device: str = "cuda"
    shape: str = "7B"
    copied: int = 2**32  # bytes of the copy that measures the bandwidth
    context: int = 500
    short: int = 64  # new tokens of the two runs whose times are subtracted
    long: int = 192
    new_tokens: int = 512
    end: float = 1 / 220
    paper_prompt: int = 2048
    paper_tokens: int = 1024


SHRUNK = Scale("cpu", "shrunk 7B", 2**24, 40, 4, 12, 16, 1 / 8, 64, 32)


def bandwidth(scale):
    """Bytes per second that a large copy reads and writes, the best of ten."""
    clock, x = (
        work.clock_of(scale.device),
        torch.ones(scale.copied, dtype=torch.uint8, device=scale.device),
    )
    y, times = torch.empty_like(x), []
    for _ in range(10):
        started = clock()
        y.copy_(x)
        times.append(clock() - started)
    return 2 * scale.copied / min(times)


def bytes_read(model, rows, context):
    """What a decoding step must read: all weights but the embedding, and every row's KV cache."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.hidden_size
    per_token = per_token // config.num_attention_heads * embedding.element_size()
    return weights - embedding.numel() * embedding.element_size() + rows * context * per_token


@functools.cache
def adapted(scale):
    """The model with our adapter, built once."""
    spec = work.Spec(scale.shape, device=scale.device, end=0)
    return work.adapt(work.build(spec), spec, work.our_config(spec))


def samplers(scale, prompts, length, new_tokens):
    """work.samplers for `prompts` random prompts of `length` tokens, 8 completions each."""
    model = adapted(scale)
    spec = work.Spec(scale.shape, device=scale.device, prompts=prompts, new_tokens=new_tokens)
    torch.manual_seed(1)
    return work.samplers(
        model, torch.randint(3, model.config.vocab_size, (prompts, length)).tolist(), spec
    )


def bench_decode(scale):
    model, speed = adapted(scale), bandwidth(scale)
    work.set_eos_probability(model, 0)
    say(f"bandwidth of a copy: {speed / 1e12:.2f} TB/s")
    for prompts in (1, 8):
        name = f"decoding step, batch {8 * prompts}, context {scale.context}"
        prompt = scale.context - (scale.short + scale.long) // 2
        short, long = (samplers(scale, prompts, prompt, n) for n in (scale.short, scale.long))
        results = rounds(name, (*short, *long), 3, 3)  # ours and generate short, then long
        short_ours, short_theirs, long_ours, long_theirs = (
            median(s["seconds"] for s in steps) for steps in results
        )
        mine = 1000 * (long_ours - short_ours) / (scale.long - scale.short)
        theirs = 1000 * (long_theirs - short_theirs) / (scale.long - scale.short)
        limit = 1000 * bytes_read(model, 8 * prompts, scale.context) / speed
        yield row(
            f"{name}: times the bandwidth limit",
            mine / limit,
            "-",
            mine,
            limit,
            "ms",
            bytes_per_second=speed,
        )
        yield row(
            f"{name}: generate, times the bandwidth limit", theirs / limit, "-", theirs, limit, "ms"
        )
        yield row(f"{name}: against generate", theirs / mine, "-", mine, theirs, "ms")


def bench_sampling(scale):
    for end, kind in ((0, "of equal length"), (scale.end, "of varying length")):
        work.set_eos_probability(adapted(scale), end)
        name = f"sampling {scale.shape}, 64 completions {kind}, tokens per second, against generate"
        results = rounds(name, samplers(scale, 8, scale.context, scale.new_tokens), 3)
        for who, steps in zip(("ours", "generate"), results, strict=True):
            speed = median(step["tokens"] / step["seconds"] for step in steps)
            say(f"{name}: {who} {speed:,.0f} tokens per second")
        yield compared(name, "-", *results)


def bench_paper(scale):
    """Each side runs in its own process, after this process has freed its model."""
    adapted.cache_clear()
    if scale.device != "cpu":
        torch.cuda.empty_cache()
    spec = {
        "shape": scale.shape,
        "device": scale.device,
        "end": 0,
        "prompts": 1,
        "new_tokens": scale.paper_tokens,
    }
    spec |= {"shortest": scale.paper_prompt, "longest": scale.paper_prompt}
    scripts = ["bench_work.py"]
    if all(importlib.util.find_spec(name) for name in ("trl", "peft", "datasets")):
        scripts.append("bench_trl.py")
    name, results = f"a step of the paper's size, {scale.shape}", []
    for script in scripts:  # one after the other: each side has the GPU to itself
        with Side(script, **spec) as side:
            side()  # warm-up
            results.append([side(), side()])
    for who, steps in zip(("ours", "TRL"), results):
        parts = {
            part: round(median(s[part] for s in steps), 3)
            for part in ("rollout", "reference", "update")
        }
        say(f"{name}: seconds, {who}: {parts}")
    times = [median(step["seconds"] for step in steps) for steps in results]
    peaks = [max(step["peak"] for step in steps) for steps in results]
    yield against(name, times, "s")
    yield against(f"{name}: peak memory above the model", peaks, "MiB")
    yield against(f"{name}: 5000 steps", [5000 * seconds / 3600 for seconds in times], "h")


def against(name, values, unit):
    """A row with our value only, or with both sides' values."""
    ours, theirs = (*values, None)[:2]
    return row(name, theirs and theirs / ours, "-", ours, theirs, unit)


def benches(shrink):
    if not shrink and not torch.cuda.is_available():
        sys.exit(
            "--gpu: torch sees no CUDA device here; run it where torch.cuda.is_available() is true"
        )
    scale = SHRUNK if shrink else Scale()
    return {
        "decode": functools.partial(bench_decode, scale),
        "sampling": functools.partial(bench_sampling, scale),
        "paper": functools.partial(bench_paper, scale),
    }
