"""What a run measures beside its steps: the held-out tasks, and what an update does to a group."""

import dataclasses
import math
from types import SimpleNamespace

import torch

import rollout
from lib import parallel
from training import screen


def measure_heldout(model, tokenizer, tasks, config):
    """The metrics of held-out `tasks`: of greedy answers, but the reward is of sampled ones.

    Seed 0, so that runs with different seeds are measured on the same random numbers.
    """
    one = SimpleNamespace(**vars(config) | {"num_samples": 1, "seed": 0})
    best = SimpleNamespace(**vars(one) | {"temperature": 0.0})
    size = max(8, config.prompts_per_step * config.num_samples)
    greedy = []
    sampled = []
    batches = [tasks[start : start + size] for start in range(0, len(tasks), size)]
    for batch in screen.progress(batches, "held-out tasks", config.quiet or parallel.RANK > 0):
        start = len(greedy)
        greedy += rollout.sample_groups(model, tokenizer, batch, best, start)
        sampled += rollout.sample_groups(model, tokenizer, batch, one, start)
    return rollout.summarize(greedy) | {"reward": rollout.summarize(sampled)["reward"]}


def token_logps(model, group, config):
    """The log-probability of every token of a Group, a list per answer; None if not finite."""
    copy = dataclasses.replace(group)  # make_batch() sets its advantages
    batch = rollout.make_batch([copy], torch.zeros(1, len(group.completions)), model.device)
    answers = []
    for row, kept in zip(rollout.batch_logps(model, batch, config), batch.mask):
        logps = row[kept].tolist()
        answers.append([round(x, 4) + 0.0 if math.isfinite(x) else None for x in logps])
    return answers
