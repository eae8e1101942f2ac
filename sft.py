"""SFT: no rewards, a prompt's one completion is its reference (eq. 1, 3, 5), tokens alike (eq. 8).

A code model learns to obey an API update by copying the right answer, token by token. It is the
policy gradient of grpo.py with one completion a group, always the best one. Completion i, token t:

    D      = the next P = 1 prompts' references, each behind an empty thought     (eq. 1)
    A_i    = 1                                                                    (eq. 3)
    S_it   = A logp                                 the log-likelihood            (eq. 5)
    k3_it  = exp(ref - logp) - (ref - logp) - 1     distance from where it began  (eq. 6)
    J_it   = S_it - beta k3_it,  beta = 0                                         (eq. 7)
    w_it   = mask_it / sum |o_i|                    mean over all tokens          (eq. 8)
    loss   = - sum w_it J_it,  on each of U = 1 shares of D                       (eq. 9)

Three files, one text; what differs carries the number of its equation:

    python grpo.py, python dapo.py, python sft.py         the embedded toy model, minutes on a CPU
    ... --model Qwen/Qwen2.5-Coder-7B-Instruct            a real one, on a GPU
    ... --help                                            every setting
    diff grpo.py dapo.py                                  the lesson

What to know before reading:
  1. The prompt carries no loss, and a target ends in its EOS. It is data.encode_target: the
     reference in the form that the reward asks for, behind an empty thought, as the data has none.
  2. eq. 8 is computed over the whole update batch, before it is cut into micro-batches, so loss and
     gradient do not depend on --micro-tokens.
  3. The policy still answers every prompt before it is shown the target: the figures of a step are
     those of its own answers, as in grpo.py, and nothing is learnt from them.
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
    steps: int = 5000  # draws of prompts, each followed by --updates updates
    prompts_per_step: int = 1  # eq. 1, P, the prompts of a step
    num_samples: int = 1  # answers per prompt, only to be looked at
    max_prompt_tokens: int = 2048  # longer prompts are dropped
    max_new_tokens: int = 1024  # longer completions are cut
    temperature: float = 1.0  # of sampling, and of the probabilities that are trained
    correctness: str = "es_star"  # second half of the reward: es_star, em_star, es, em or none
    # objective
    beta: float = 0.0  # eq. 7, weight of the KL term
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
    """Nothing is compared: every target counts alike. rewards and result (groups, 1)."""
    return torch.ones_like(rewards)  # eq. 3


def k3(logps, ref_logps):
    """The KL estimator of every token, never negative, (B, T)."""
    return torch.exp(ref_logps - logps) - (ref_logps - logps) - 1  # eq. 6


def objective(logps, ref_logps, advantages, beta=0.0):  # eq. 5, 7
    """What to maximise, per token, (B, T).

    logps, ref_logps: (B, T) log-probabilities of the target's tokens now and under the first policy
    (None if beta is 0). advantages: (B,), one a target.
    """
    advantages = advantages.view(-1, 1)  # (B, 1)
    surrogate = logps * advantages  # eq. 5
    return surrogate - beta * k3(logps, ref_logps) if beta else surrogate  # eq. 7


def token_weights(mask):
    """The weight of every token in the loss, (B, T), from the mask of a whole update batch."""
    return mask.double() / mask.sum()  # eq. 8


def collect(model, tokenizer, tasks, position, config):
    """Answer prompts from `position` of the stream, look up their targets: (batch, figures, answers, new position)."""
    drawn = data.draw(tasks, position, config.prompts_per_step, config.seed)
    seed = config.seed * 1_000_003 + position
    sampled, seconds = recode.rollout(model, tokenizer, drawn, config, config.num_samples, config.temperature, seed)
    groups = [recode.Group(*task, [data.encode_target(task[1], tokenizer)]) for task in drawn]  # eq. 1
    batch = recode.make_batch(groups, advantages(torch.zeros(len(groups), 1)), model.device)
    return batch, recode.describe(sampled) | seconds, sampled, position + len(drawn)


def accumulate(model, batch, config):
    """Add the gradient of the loss on `batch` to the parameters; its loss and kl.

    One micro-batch at a time; the weights are those of the whole batch, so the sum is exact.
    """
    weights, count, sums = token_weights(batch.mask), batch.mask.sum().item(), Counter()  # (B, T)
    model.train()
    for part, logps in recode.passes(model, batch, config):
        J = objective(logps, part.ref_logps, part.advantages, config.beta)
        loss = -(weights[part.rows] * J).sum()  # eq. 9
        loss.backward()
        with torch.no_grad():
            if config.beta:
                sums["kl"] += (k3(logps, part.ref_logps) * part.mask).sum().item() / count
            sums["loss"] += loss.item()
    return sums


def update(model, optimizer, batch, config):
    """--updates optimizer steps, each on its share of the targets; a step that is not finite is skipped."""
    started, sums = time.perf_counter(), Counter(skipped=0)
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
