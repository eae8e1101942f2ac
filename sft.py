"""SFT: every completion is a reference (eq. 1, 3), no ratio and no KL (eq. 7), token mean (eq. 8).

A code model learns to obey an API update by copying the right answer, token by token. It is the
policy gradient of grpo.py with one completion per group, always the best one. The equation numbers
are those of grpo.py. For completion i and its token t:

    D      = the references of the next P = 1 prompts, each after an empty thought        (eq. 1)
    A_i    = 1                                     every reference has the same weight    (eq. 3)
    J_it   = A_i logp_it                           log-likelihood                         (eq. 7)
    w_it   = mask_it / sum |o_i|                   mean over all tokens                   (eq. 8)
    loss   = - sum w_it J_it,  for each of U = 1 parts of D                               (eq. 9)

Three scripts share this text and these commands; sft.py leaves out what only sampling needs.

    python sft.py                                             embedded toy, minutes on a CPU
    python sft.py --model Qwen/Qwen2.5-Coder-7B-Instruct      1 GPU
    torchrun --nproc-per-node 8 sft.py --prompts-per-step 8   N GPUs, with --model as above
    diff grpo.py sft.py                                       what is left of an RL step

Before you read:
  1. The prompt has no loss, and a target ends with its EOS. data.encode_target builds it: the
     reference in the form that the reward asks for, after an empty thought, as the data has none.
  2. eq. 8 is computed over the whole update batch, before it is split into micro-batches, so loss
     and gradient do not depend on --micro-tokens or the number of GPUs.
  3. Nothing is sampled during training; --heldout measures the model before and after.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import data
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
    steps: int = 5000  # eq. 1, draws of references, each followed by --updates optimizer steps
    prompts_per_step: int = 1  # eq. 1, P, references per step
    max_new_tokens: int = 1024  # longer held-out answers are cut; references never are
    temperature: float = 1.0  # of sampling and of the log-probabilities
    correctness: str = "es_star"  # the code's reward: es_star, gain, strict, em_star, es, em, none
    # objective
    updates: int = 1  # eq. 9, U, optimizer steps per draw, each on its part of the references
    lr: float = 5e-5  # peak learning rate of AdamW, cosine to 0


def advantages(rewards):
    """Nothing is compared: every reference has the same weight. rewards, result: (groups, 1)."""
    return torch.ones_like(rewards)  # eq. 3


def objective(logps, advantages):
    """What to maximise, per token, (B, T): the log-likelihood of the reference.

    logps: (B, T) log-probabilities of the reference's tokens. advantages: (B,), one per reference.
    """
    A = advantages.view(-1, 1)  # (B, 1)
    return A * logps  # eq. 7


def token_weights(mask, config):
    """The weight of every token in the loss, (B, T), from the mask (B, T) of an update batch."""
    mask = mask.double()  # in fp32 the weights of a large batch would not sum to exactly 1
    return mask / mask.sum()  # eq. 8


def collect(model, tokenizer, tasks, position, config):
    """The references at `position` of the stream: (batch, metrics, groups, new position)."""
    drawn = data.draw(tasks, position, config.prompts_per_step, config.seed)
    groups = []
    for prompt, example in drawn:
        target = data.encode_target(example, tokenizer)
        groups.append(rollout.Group(prompt, example, [target]))  # eq. 1
    lengths = [len(group.completions[0]) for group in groups]
    metrics = {"completion_length": sum(lengths) / len(lengths)}
    A = advantages(torch.zeros(len(groups), 1))  # eq. 3, (groups, 1)
    return rollout.make_batch(groups, A, model.device), metrics, groups, position + len(drawn)


def accumulate(model, batch, config):
    """Accumulate the gradient of the loss on `batch`; returns the sums of this rank's metrics."""
    weights = token_weights(batch.mask, config)  # (B, T)
    sums = Counter()
    model.train()
    if config.adapter == "none":
        fsdp.gather_weights(model)  # all ranks take part, also one without a prompt
    for i in parallel.share(range(len(batch.prompts))):
        with recode.shared_prompt(model, batch.prompts[i]) as prompt:  # its backward runs on exit
            for part in rollout.passes(batch, i, config.micro_tokens):
                logps = recode.completion_logps(model, prompt, part, config.temperature)  # (B, T)
                J = objective(logps, part.advantages)
                loss = -(weights[part.rows] * J).sum()  # eq. 9
                loss.backward()
                sums["loss"] += loss.item()
    return sums


def update(model, optimizer, batch, config):
    """--updates optimizer steps, each on its part of D; a non-finite one is skipped."""
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
