"""GRPO: teach a code model to obey an API update, by comparing its own answers with each other.

For every prompt the policy writes a group of G completions; reward.py scores each one. A completion
better than its group's mean is made more likely, a worse one less (arXiv 2402.03300):

    A_i     = (r_i - mean(r)) / (std(r) + 1e-4)             advantage within the group      (eq. 1)
    rho_it  = exp(logp_it - old_it)                         now against when it was sampled (eq. 2)
    S_it    = min(rho A, clip(rho, 1 - 0.2, 1 + 0.2) A)     no reward for going too far     (eq. 3)
    k3_it   = exp(ref - logp) - (ref - logp) - 1            distance from the first policy  (eq. 4)
    J_it    = S_it - beta k3_it                             per token                       (eq. 5)
    w_it    = mask_it / |o_i| / N                           mean over tokens, then rows     (eq. 6)
    loss    = - sum w_it J_it                                                               (eq. 7)

    python grpo.py                                             the embedded toy model, minutes on a CPU
    python grpo.py --model Qwen/Qwen2.5-Coder-7B-Instruct      the paper's run, on a GPU
    python grpo.py --help                                      every setting

What to know before reading:
  1. With one update per rollout rho is exactly 1, the clip never acts, and the loss is near 0: its
     value is an accident of the normalised advantages, its gradient is what trains.
  2. eq. 6 is computed over the whole update batch, before it is cut into micro-batches, so loss and
     gradient do not depend on --micro-batch.
  3. A group whose rewards are all equal has no advantage; only the KL term still moves it.
"""

import math
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import dora
import recode
import reward


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
    prompts_per_step: int = 1  # prompts in a rollout
    num_samples: int = 8  # completions per prompt, the group G
    max_prompt_tokens: int = 2048  # longer prompts are dropped
    max_new_tokens: int = 1024  # longer completions are cut
    temperature: float = 1.0  # of sampling, and of the probabilities that are trained
    correctness: str = "es_star"  # second half of the reward: es_star, em_star, es, em or none
    # objective
    clip_low: float = 0.2  # eq. 3, below 1
    clip_high: float = 0.2  # eq. 3, above 1
    beta: float = 0.001  # eq. 5, weight of the KL term
    updates: int = 1  # optimizer steps per rollout, each on its share of the prompts
    # adapter
    r: int = 64  # rank of the DoRA
    alpha: float = 64.0  # its scale is alpha / r
    dropout: float = 0.01  # on the input of A, in training
    targets: str = "q_proj,v_proj"  # names of the linear layers that get one
    # optimizer
    lr: float = 5e-5  # peak learning rate of AdamW, cosine to 0
    warmup: float = 0.03  # share of the steps in which it rises from 0
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 1.0  # longer gradients are shortened to this
    micro_batch: int = 8  # completions in one forward and backward pass
    # the log
    save_every: int = 100  # steps between checkpoints
    show_every: int = 10  # steps between sample completions


def advantages(rewards):
    """How much better each completion is than its group. rewards and result (groups, num_samples)."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)  # eq. 1


def k3(logps, ref_logps):
    """The KL estimator of every token, never negative, (B, T)."""
    return torch.exp(ref_logps - logps) - (ref_logps - logps) - 1  # eq. 4


def objective(logps, old_logps, ref_logps, advantages, clip_low=0.2, clip_high=0.2, beta=0.001):
    """What to maximise, per token, (B, T).

    logps, old_logps, ref_logps: (B, T) log-probabilities of the sampled tokens now, when they were
    sampled, and under the first policy (None if beta is 0). advantages: (B,), one a completion.
    """
    advantages = advantages.view(-1, 1)  # (B, 1)
    ratio = torch.exp(logps - old_logps)  # eq. 2
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)  # eq. 3
    return surrogate - beta * k3(logps, ref_logps) if beta else surrogate  # eq. 5


def token_weights(mask):
    """The weight of every token in the loss, (B, T), from the mask of a whole update batch."""
    return mask.double() / mask.sum(1, keepdim=True) / len(mask)  # eq. 6


def collect(model, tokenizer, tasks, position, config, seed):
    """Sample and score one rollout from `position` of the stream: (batch, figures, samples, position)."""
    eos, started = recode.eos_ids(model, tokenizer), time.perf_counter()
    drawn = data.draw(tasks, position, config.prompts_per_step, config.seed)
    prompts = [prompt for prompt, _ in drawn]
    tokens, mask, _ = recode.sample(
        model, prompts, config.num_samples, config.max_new_tokens, eos, config.temperature, seed
    )
    sampled = time.perf_counter()
    texts = recode.completions(tokenizer, tokens, mask, eos)
    rows = [task for task in drawn for _ in range(config.num_samples)]  # groups by position, never by content
    examples = [example for _, example in rows]
    scores = [reward.score(text, ex.new_code, config.correctness) for text, ex in zip(texts, examples)]
    rewards = torch.tensor(scores).view(-1, config.num_samples)  # (groups, num_samples)
    batch = recode.Batch([prompt for prompt, _ in rows], tokens, mask, advantages(rewards).flatten().to(model.device))
    ended = (torch.isin(tokens, torch.tensor(eos, device=model.device)) & mask).any(1)  # (B,)
    figures = {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(1).mean().item(),
        "no_spread": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),
        **recode.judge(texts, examples),
        "completion_length": mask.sum().item() / len(mask),
        "truncated": 1 - ended.float().mean().item(),
        "seconds_sample": sampled - started,
        "seconds_score": time.perf_counter() - sampled,
    }
    samples = [
        {"update_info": ex.update_info, "completion": t, "reward": r} for t, ex, r in zip(texts, examples, scores)
    ]
    return batch, figures, samples, position + len(drawn)


def accumulate(model, batch, config):
    """Add the gradient of the loss on `batch` to the parameters; its loss, kl and clip_fraction.

    One micro-batch at a time; the weights are those of the whole batch, so the sum is exact.
    """
    weights, count, sums = token_weights(batch.mask), batch.mask.sum().item(), Counter()  # (B, T)
    model.train()
    for rows in batch.micro(config.micro_batch):
        part = batch.select(rows)
        logps = recode.token_logps(model, part.prompts, part.tokens, part.mask, config.temperature)
        old_logps = logps.detach() if part.old_logps is None else part.old_logps
        J = objective(logps, old_logps, part.ref_logps, part.advantages, config.clip_low, config.clip_high, config.beta)
        loss = -(weights[rows] * J).sum()  # eq. 7
        loss.backward()
        with torch.no_grad():
            far = torch.where(part.advantages.view(-1, 1) > 0, config.clip_high, config.clip_low)  # (b, 1)
            drift = torch.exp(logps - old_logps).sub(1) * part.advantages.sign().view(-1, 1)  # > 0 where A pushes on
            sums["clip_fraction"] += ((drift > far) & part.mask).sum().item() / count
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
    parameters = optimizer.param_groups[0]["params"]
    for rows in torch.arange(len(batch.mask), device=model.device).chunk(config.updates):  # whole groups
        part = accumulate(model, batch.select(rows), config)
        sums.update(part)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
        sums["grad_norm"] += norm
        if math.isfinite(norm + part["loss"]):
            optimizer.step()
        else:
            sums["skipped"] += 1
        optimizer.zero_grad()
    figures = {name: sums[name] / config.updates for name in ("loss", "kl", "clip_fraction", "grad_norm", "skipped")}
    return figures | {"seconds_update": time.perf_counter() - started}


def main(argv=None):
    """Train. The exit status: 0 when done, 1 when the loss was lost, 130 when stopped by a signal."""
    config = recode.parse_config(Config, argv, __doc__)
    run, model, tokenizer, tasks, heldout = recode.set_up(config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    if config.resume:
        state = run.load(model, optimizer)
    else:
        before = recode.evaluate(model, tokenizer, heldout, config) if heldout else {}
        state = {"step": 0, "position": 0, "lost": 0, "before": before}
        recode.save(run, model, optimizer, state)  # from here on there is always something to go on from
    with run.progress(state["step"]) as stop:
        while state["step"] < config.steps and state["lost"] < recode.LOST and not stop.asked:
            seed = config.seed * 1_000_003 + state["step"]  # all chance in a step hangs on this alone
            torch.manual_seed(seed)
            batch, figures, samples, state["position"] = collect(
                model, tokenizer, tasks, state["position"], config, seed
            )
            figures["lr"] = optimizer.param_groups[0]["lr"] = recode.learning_rate(state["step"], config)
            figures |= update(model, optimizer, batch, config)
            state["step"] += 1
            state["lost"] = state["lost"] + 1 if figures["skipped"] else 0
            run.log({"step": state["step"], **figures}, samples)
            if state["step"] % config.save_every == 0 and not state["lost"]:
                recode.save(run, model, optimizer, state)
    return recode.finish(run, model, tokenizer, optimizer, heldout, state)


if __name__ == "__main__":
    recode.guard(main)
