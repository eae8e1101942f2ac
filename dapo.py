"""DAPO: groups with spread (eq. 1), clip-higher (eq. 5), no KL (eq. 7), token mean (eq. 8).

A code model learns to obey an API update by comparing its own answers. For every prompt it samples
a group of completions, and reward.py scores them; those better than their group's mean become more
likely, the others less likely (GRPO: arXiv 2402.03300, DAPO: arXiv 2503.14476). The equation
numbers are this project's own. For completion i and its token t:

    D      = the next P = 8 groups with rewards that differ, in at most 10 tries          (eq. 1)
    R_i    = r_i - max(0, |o_i| - L_max + L_cache) / L_cache,  penalty off by default     (eq. 2)
    A_i    = (R_i - mean(R)) / (std(R) + 1e-4)     advantage within the group             (eq. 3)
    rho_it = exp(logp_it - old_it)                 ratio to the policy that sampled       (eq. 4)
    S_it   = max(min(rho A, clip(rho, 1 - 0.2, 1 + 0.28) A), -10 |A|)                     (eq. 5)
    k3_it  = exp(ref - logp) - (ref - logp) - 1    KL estimate to the first policy        (eq. 6)
    J_it   = S_it - beta k3_it,  beta = 0                                                 (eq. 7)
    w_it   = mask_it / sum |o_i|                   mean over all tokens                   (eq. 8)
    loss   = - sum w_it J_it,  for each of U = 2 parts of D                               (eq. 9)

Three scripts share this text and these commands; each hunk of the diff names its equation.

    python grpo.py                                            embedded toy, minutes on a CPU
    python grpo.py --model Qwen/Qwen2.5-Coder-7B-Instruct     1 GPU
    torchrun --nproc-per-node 8 grpo.py --prompts-per-step 8  N GPUs, with --model as above
    diff grpo.py dapo.py                                      what DAPO changes

Before you read:
  1. In the first update after a rollout rho is 1 (dropout aside) and the clip never acts. The loss
     value is then near 0 in GRPO and arbitrary in DAPO; only its gradient matters.
  2. eq. 8 is computed over the whole update batch, before it is split into micro-batches, so loss
     and gradient do not depend on --micro-tokens or the number of GPUs.
  3. A group whose rewards are all equal has advantage 0 and gives no policy gradient.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import dora
import lib.config
import recode
import rollout
import training.run
from lib import fsdp, parallel
from training import dry_run, setup


@dataclass
class Config(lib.config.Settings):
    # rollout
    output: str = f"runs/{Path(__file__).stem}"  # run directory
    steps: int = 5000  # rollouts, each followed by --updates optimizer steps
    prompts_per_step: int = 8  # eq. 1, P, prompts per rollout
    max_tries: int = 10  # eq. 1, most draws per rollout; then it goes on with the groups it has
    num_samples: int = 8  # completions per prompt, the group size G
    max_new_tokens: int = 1024  # longer completions are cut
    temperature: float = 1.0  # of sampling and of the log-probabilities
    overlong_cache: int = 0  # eq. 2, L_cache, tokens before the limit that cost reward; 0 is off
    correctness: str = "es_star"  # the code's reward: es_star, gain, strict, em_star, es, em, none
    # objective
    clip_low: float = 0.2  # eq. 5, how far rho may fall below 1
    clip_high: float = 0.28  # eq. 5, how far rho may rise above 1
    beta: float = 0.0  # eq. 7, weight of the KL penalty
    updates: int = 2  # eq. 9, U, optimizer steps per rollout, each on its part of the groups
    lr: float = 5e-5  # peak learning rate of AdamW, cosine to 0


def advantages(rewards):
    """How much better each completion is than its group. rewards, result: (groups, num_samples)."""
    mean = rewards.mean(1, keepdim=True)  # (groups, 1)
    # A rounded mean of equal rewards may differ from them, and then they would have an advantage.
    mean = mean.clamp(rewards.amin(1, keepdim=True), rewards.amax(1, keepdim=True))
    std = rewards.std(1, keepdim=True)
    return (rewards - mean) / (std + 1e-4)  # eq. 3


def objective_terms(logps, old_logps, ref_logps, advantages, config):
    """The objective of every token, its KL estimate, whether its clip is active: (B, T) each.

    logps, old_logps, ref_logps: (B, T) log-probabilities of the sampled tokens now, when they were
    sampled, and under the first policy (None if beta is 0). advantages: (B,), one per completion.
    """
    A = advantages.view(-1, 1)  # (B, 1)
    ratio = torch.exp(logps - old_logps)  # eq. 4
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)  # eq. 5
    S = torch.min(ratio * A, clipped * A)  # eq. 5
    S = torch.max(S, -10 * A.abs())  # eq. 5, dual clip: acts where A < 0 and rho > 10
    active = S != ratio * A
    if config.beta == 0:
        return S, torch.zeros_like(S), active
    k3 = torch.exp(ref_logps - logps) - (ref_logps - logps) - 1  # eq. 6, never negative
    return S - config.beta * k3, k3, active  # eq. 7


def objective(logps, old_logps, ref_logps, advantages, config):
    """What to maximise, per token, (B, T); the arguments are those of objective_terms()."""
    return objective_terms(logps, old_logps, ref_logps, advantages, config)[0]


def token_weights(mask, config):
    """The weight of every token in the loss, (B, T), from the mask (B, T) of an update batch."""
    mask = mask.double()  # in fp32 the weights of a large batch would not sum to exactly 1
    return mask / mask.sum()  # eq. 8


def collect(model, tokenizer, tasks, position, config):
    """Sample a rollout at `position` of the stream: (batch, metrics, all groups, new position)."""
    kept = []
    sampled = []
    tries = 0
    # GRPO keeps every group, so one turn is enough; DAPO draws again for the groups it drops.
    while len(kept) < config.prompts_per_step and tries < config.max_tries:  # eq. 1
        drawn = data.draw(tasks, position, config.prompts_per_step - len(kept), config.seed)
        groups = rollout.sample_groups(model, tokenizer, drawn, config, position)
        # eq. 1; != lets NaN rewards pass, so that a run whose weights have overflowed stops
        kept += [group for group in groups if max(group.rewards) != min(group.rewards)]
        sampled += groups
        position += len(drawn)
        tries += 1
    metrics = rollout.describe(sampled) | {"tries": tries, "groups": len(kept)}
    rewards = torch.tensor([group.rewards for group in kept])  # eq. 2, (groups, num_samples)
    if kept and config.overlong_cache:  # eq. 2
        lengths = [[len(ids) for ids in group.completions] for group in kept]
        excess = torch.tensor(lengths) - (config.max_new_tokens - config.overlong_cache)
        rewards -= excess.clamp(min=0) / config.overlong_cache  # eq. 2
    A = advantages(rewards) if kept else rewards.view(0, config.num_samples)  # eq. 3
    return rollout.make_batch(kept, A, model.device), metrics, sampled, position


def accumulate(model, batch, config):
    """Accumulate the gradient of the loss on `batch`; returns the sums of this rank's metrics."""
    weights = token_weights(batch.mask, config)  # (B, T)
    count = batch.mask.sum().item()
    sums = Counter(kl=0.0, clip_fraction=0.0)
    model.train()
    if config.adapter == "none":
        fsdp.gather_weights(model)  # all ranks take part, also one without a prompt
    for i in parallel.share(range(len(batch.prompts))):
        with recode.shared_prompt(model, batch.prompts[i]) as prompt:  # its backward runs on exit
            for part in rollout.passes(batch, i, config.micro_tokens):
                logps = recode.completion_logps(model, prompt, part, config.temperature)  # (B, T)
                old = logps.detach() if part.old_logps is None else part.old_logps
                J, kl, active = objective_terms(logps, old, part.ref_logps, part.advantages, config)
                loss = -(weights[part.rows] * J).sum()  # eq. 9
                loss.backward()
                sums["loss"] += loss.item()
                sums["kl"] += (kl * part.mask).sum().item() / count
                sums["clip_fraction"] += (active & part.mask).sum().item() / count
    return sums


def update(model, optimizer, batch, config):
    """--updates optimizer steps, each on its part of D; a non-finite one is skipped."""
    if config.updates > 1:  # with one update the policy has not moved: old_logps is logps
        batch.old_logps = rollout.batch_logps(model, batch, config)
    if config.beta:
        with dora.reference(model):
            batch.ref_logps = rollout.batch_logps(model, batch, config)
    totals = Counter(skipped=0)
    parts = batch.split(config.prompts_per_step // config.updates)
    for part in parts:  # eq. 9
        sums = parallel.sum_metrics(accumulate(model, part, config))
        parallel.reduce_gradients(model)
        sums["grad_norm"] = parallel.clip_grad_norm(model, config.max_grad_norm)
        if math.isfinite(sums["loss"] + sums["grad_norm"]):
            optimizer.step()
        else:
            sums["skipped"] = 1
        optimizer.zero_grad()
        totals.update(sums)
    return {name: total / max(1, len(parts)) for name, total in totals.items()}


def main(argv=None):
    """Train. Returns the exit status: 0 done, 1 after three non-finite steps, 130 if stopped."""
    config = lib.config.parse_config(Config, argv, __doc__)
    run, model, tokenizer, tasks, heldout = setup.set_up(config)
    optimizer = setup.make_optimizer(model, config)
    if config.dry_run:
        return dry_run.dry_run(model, tasks, optimizer, config, update)
    step, position, nonfinite = run.begin(optimizer, heldout)
    with run.loop(step) as stop:
        while step < config.steps and nonfinite < training.run.MAX_NONFINITE:
            if parallel.any_rank(stop.asked):
                break
            parallel.seed_dropout(config.seed, step)
            started = time.perf_counter()
            batch, metrics, groups, position = collect(model, tokenizer, tasks, position, config)
            metrics["seconds_sample"] = time.perf_counter() - started
            run.watch(step + 1, groups)
            metrics["lr"] = training.run.learning_rate(step, config)
            optimizer.param_groups[0]["lr"] = metrics["lr"]
            started = time.perf_counter()
            metrics |= update(model, optimizer, batch, config)
            metrics["seconds_update"] = time.perf_counter() - started
            step += 1
            nonfinite = nonfinite + 1 if metrics["skipped"] else 0
            run.log(step, metrics, groups)
            if step % config.save_every == 0 and nonfinite == 0:
                run.save(optimizer, step, position, nonfinite)
    return run.finish(optimizer, heldout, step, position, nonfinite)


if __name__ == "__main__":
    parallel.run_main(main)
