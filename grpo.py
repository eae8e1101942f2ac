"""GRPO: all groups (eq. 1), one clip both ways (eq. 5), KL (eq. 7), completions weigh alike (eq. 8).

A code model learns to obey an API update by comparing its own answers with each other. For every
prompt it writes a group of completions, and reward.py scores them; those better than their group's
mean are made more likely, the others less (GRPO is arXiv 2402.03300, DAPO 2503.14476).
Completion i, token t:

    D      = the next P = 1 prompts' groups, whatever they earned                 (eq. 1)
    R_i    = r_i                                                                  (eq. 2)
    A_i    = (R_i - mean(R)) / (std(R) + 1e-4)      advantage within the group    (eq. 3)
    rho_it = exp(logp_it - old_it)                  now against when sampled      (eq. 4)
    S_it   = min(rho A, clip(rho, 1 - 0.2, 1 + 0.2) A)                            (eq. 5)
    k3_it  = exp(ref - logp) - (ref - logp) - 1     distance from where it began  (eq. 6)
    J_it   = S_it - beta k3_it,  beta = 0.001                                     (eq. 7)
    w_it   = mask_it / |o_i| / N                    mean over tokens, then rows   (eq. 8)
    loss   = - sum w_it J_it,  on each of U = 1 shares of D                       (eq. 9)

Three files, one text; what differs carries the number of its equation:

    python grpo.py, python dapo.py, python sft.py         the embedded toy model, minutes on a CPU
    ... --model Qwen/Qwen2.5-Coder-7B-Instruct            a real one, on a GPU
    ... --help                                            every setting
    diff grpo.py dapo.py                                  the lesson

What to know before reading:
  1. In the first update after a rollout rho is exactly 1, the clip does nothing, and the loss is an
     accident of the normalised advantages, often about 0. Its gradient is what trains.
  2. eq. 8 is computed over the whole update batch, before it is cut into micro-batches, so loss and
     gradient do not depend on --micro-tokens.
  3. A group whose rewards are all equal has the advantage 0: at most the KL term moves it.
"""

import math
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import recode
import training.config
import training.run
from training import dora, parallel


@dataclass
class Config:
    # what is trained, and where the run is kept
    model: str = os.path.relpath(Path(__file__).parent / "tiny")  # checkpoint directory or hub id
    data: str = "zjunlp/ReCode-Train-Data"  # JSONL file or hub id of the migration examples
    heldout: str = ""  # JSONL file or share of the rows measured before and after, "" for none
    output: str = f"runs/{Path(__file__).stem}"  # run directory
    resume: bool = False  # go on from the output's last checkpoint
    seed: int = 42  # of the data order, the adapter, the samples
    # rollout
    steps: int = 5000  # rollouts, each followed by --updates updates
    prompts_per_step: int = 1  # eq. 1, P, the prompts of a rollout
    num_samples: int = 8  # completions per prompt, the group G
    max_prompt_tokens: int = 2048  # longer prompts are dropped
    max_new_tokens: int = 1024  # longer completions are cut
    temperature: float = 1.0  # of sampling, and of the probabilities that are trained
    correctness: str = "es_star"  # second half of the reward: es_star, em_star, es, em or none
    # objective
    clip_low: float = 0.2  # eq. 5, how far rho may fall below 1
    clip_high: float = 0.2  # eq. 5, how far it may rise above 1
    beta: float = 0.001  # eq. 7, weight of the KL term
    updates: int = 1  # eq. 9, U optimizer steps, each on its share of the prompts
    # adapter
    adapter: str = "dora"  # what is trained: dora, lora, or none for all weights
    r: int = 64  # rank of the adapter
    alpha: float = 64.0  # its scale is alpha / r
    dropout: float = 0.01  # on the input of A, in training
    targets: str = "q_proj,v_proj"  # names of the linear layers that get one
    # optimizer
    lr: float = 5e-5  # peak learning rate of AdamW, cosine to 0
    warmup: float = 0.03  # share of the steps in which it rises from 0
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 1.0  # longer gradients are shortened to this
    micro_tokens: int = 8192  # tokens in one forward and backward pass, padding included
    keep_activations: bool = False  # do not compute layers anew in the backward pass: faster, far more memory
    offload: bool = False  # with --adapter none: the fp32 weights and AdamW in CPU memory
    dry_run: bool = False  # only try the largest step there can be: does it fit, how long will it all take
    # the log
    save_every: int = 100  # steps between checkpoints
    show_every: int = 10  # steps between sample completions
    log_to: str = ""  # the figures also go to "tensorboard" or "wandb", "" for neither
    quiet: bool = False  # no rows, samples or bars, only the header and the final table


def advantages(rewards):
    """How much better each completion is than its group. rewards and result (groups, num_samples)."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)  # eq. 3


def k3(logps, ref_logps):
    """The KL estimator of every token, never negative, (B, T)."""
    return torch.exp(ref_logps - logps) - (ref_logps - logps) - 1  # eq. 6


def objective(logps, old_logps, ref_logps, advantages, clip_low=0.2, clip_high=0.2, beta=0.001):  # eq. 5, 7
    """What to maximise, per token, (B, T).

    logps, old_logps, ref_logps: (B, T) log-probabilities of the sampled tokens now, when they were
    sampled, and under the first policy (None if beta is 0). advantages: (B,), one a completion.
    """
    advantages = advantages.view(-1, 1)  # (B, 1)
    ratio = torch.exp(logps - old_logps)  # eq. 4
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)  # eq. 5
    return surrogate - beta * k3(logps, ref_logps) if beta else surrogate  # eq. 7


def token_weights(mask):
    """The weight of every token in the loss, (B, T), from the mask of a whole update batch."""
    return mask.double() / mask.sum(1, keepdim=True) / len(mask)  # eq. 8


def collect(model, tokenizer, tasks, position, config):
    """Sample and score a rollout from `position` of the stream: (batch, figures, all groups, new position)."""
    groups, sampled, seconds, tries = [], [], Counter(), 0
    while len(groups) < config.prompts_per_step:  # eq. 1
        drawn = data.draw(tasks, position, config.prompts_per_step - len(groups), config.seed)
        seed = config.seed * 1_000_003 + position
        fresh, spent = recode.rollout(model, tokenizer, drawn, config, config.num_samples, config.temperature, seed)
        groups += fresh  # eq. 1
        sampled, position, tries = sampled + fresh, position + len(drawn), tries + 1
        seconds.update(spent)
    rewards = torch.tensor([group.rewards for group in groups])  # eq. 2, (groups, num_samples)
    batch = recode.make_batch(groups, advantages(rewards), model.device)
    return batch, recode.describe(sampled) | {"tries": tries, "groups": len(groups), **seconds}, sampled, position


def accumulate(model, batch, config):
    """Add the gradient of the loss on `batch` to the parameters; its loss, kl and clip_fraction.

    One micro-batch at a time; the weights are those of the whole batch, so the sum is exact.
    """
    weights, count, sums = token_weights(batch.mask), batch.mask.sum().item(), Counter()  # (B, T)
    model.train()
    for part, logps in recode.passes(model, batch, config):
        old_logps = logps.detach() if part.old_logps is None else part.old_logps
        clip, A = (config.clip_low, config.clip_high), part.advantages
        J = objective(logps, old_logps, part.ref_logps, A, *clip, config.beta)
        loss = -(weights[part.rows] * J).sum()  # eq. 9
        loss.backward()
        with torch.no_grad():
            bounded = objective(logps, old_logps, None, A, *clip, beta=0) != torch.exp(logps - old_logps) * A[:, None]
            sums["clip_fraction"] += (bounded & part.mask).sum().item() / count
            if config.beta:
                sums["kl"] += (k3(logps, part.ref_logps) * part.mask).sum().item() / count
            sums["loss"] += loss.item()
    return sums


def update(model, optimizer, batch, config):
    """--updates optimizer steps, each on its share of the rollout; a step that is not finite is skipped."""
    started, sums = time.perf_counter(), Counter(skipped=0)
    if config.updates > 1:  # else the policy has not moved since it sampled, and accumulate() knows
        batch.old_logps = recode.batch_logps(model, batch, config)
    if config.beta:
        with dora.reference(model):
            batch.ref_logps = recode.batch_logps(model, batch, config)
    shares = batch.shares(config.prompts_per_step // config.updates)
    for share in shares:  # eq. 9
        part = parallel.reduce(model, accumulate(model, share, config))
        sums.update(part)
        norm = parallel.clip(model, config.max_grad_norm)
        sums["grad_norm"] += norm
        if math.isfinite(norm + part["loss"]):
            optimizer.step()
        else:
            sums["skipped"] += 1
        optimizer.zero_grad()
    names = ("loss", "kl", "clip_fraction", "grad_norm", "skipped")
    figures = {name: sums[name] / max(1, len(shares)) for name in names}
    return figures | {"seconds_update": time.perf_counter() - started}


def main(argv=None):
    """Train. The exit status: 0 when done, 1 when the loss was lost, 130 when stopped by a signal."""
    config = training.config.parse_config(Config, argv, __doc__)
    run, model, tokenizer, tasks, heldout = training.run.set_up(config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    if config.dry_run:
        return training.run.dry_run(model, tasks, optimizer, config, update)
    if config.resume:
        state = run.load(model, optimizer)
    else:
        before = recode.evaluate(model, tokenizer, heldout, config) if heldout else {}
        state = {"step": 0, "position": 0, "lost": 0, "before": before}
        training.run.save(run, model, optimizer, state)  # from here on there is always something to go on from
    with run.progress(state["step"]) as stop:
        while state["step"] < config.steps and state["lost"] < training.run.LOST and not parallel.together(stop.asked):
            torch.manual_seed((config.seed * 1_000_003 + state["step"]) * parallel.WORLD + parallel.RANK)  # dropout
            batch, figures, groups, state["position"] = collect(model, tokenizer, tasks, state["position"], config)
            figures["lr"] = optimizer.param_groups[0]["lr"] = training.run.learning_rate(state["step"], config)
            figures |= update(model, optimizer, batch, config)
            state["step"] += 1
            state["lost"] = state["lost"] + 1 if figures["skipped"] else 0
            run.log({"step": state["step"], **figures}, groups)
            if state["step"] % config.save_every == 0 and not state["lost"]:
                training.run.save(run, model, optimizer, state)
    return training.run.finish(run, model, tokenizer, optimizer, heldout, state)


if __name__ == "__main__":
    parallel.run_main(main)
