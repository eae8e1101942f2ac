"""--dry-run: one worst-case step, its memory and its time."""

import resource
import sys
import time

import torch

import recode
import rollout
from lib import fsdp, parallel


def peak_bytes(device):
    """Peak memory so far: what torch has allocated on a GPU, everything of a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def dry_run(model, tasks, optimizer, config, update):
    """Print memory and time of one worst-case step: longest prompt, full completions. Returns 0.

    The model is useless afterwards: it has learned from random rewards.
    """
    if config.adapter == "none":
        fsdp.gather_weights(model)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = peak_bytes(model.device)
    started = time.perf_counter()
    longest = max((prompt for prompt, _ in tasks), key=len)
    P, G, T = config.prompts_per_step, config.num_samples, config.max_new_tokens
    mine = parallel.share([longest] * P)
    tokens, _, _ = recode.sample(model, mine, G, T, [], config.temperature, 0)
    sampled = time.perf_counter()
    # On several ranks only the first prompts were sampled here; every group takes their answers.
    groups = [rollout.Group(longest, None, tokens[:G].tolist()) for _ in range(P)]
    update(model, optimizer, rollout.make_batch(groups, torch.randn(P, G), model.device), config)
    updated = time.perf_counter()
    tries = config.max_tries if G > 1 else 0  # sft.py does not sample
    hours = (tries * (sampled - started) + updated - sampled) * config.steps / 3600
    print(f"dry run   one step of {P} x {G} completions of {T:,} tokens, prompt {len(longest):,}")
    print(f"          {sampled - started:.1f} s to sample, {updated - sampled:.1f} s to update")
    print(f"          {config.steps:,} steps: {hours:.1f} h at most, held-out tasks aside")
    peak = peak_bytes(model.device)
    print(f"          peak {peak / 1e9:.2f} GB; before the step {before / 1e9:.2f} GB")
    if model.device.type == "cuda":
        print(f"          reserved by torch {torch.cuda.max_memory_reserved() / 1e9:.2f} GB")
    return 0
