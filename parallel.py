"""Several processes, one run: every rank knows the whole rollout, and each does its share of the work.

    torchrun --nproc-per-node 8 grpo.py ...                             the adapter
    torchrun --nproc-per-node 8 dapo.py --adapter none --lr 1e-6 ...    all weights

A rank samples and scores every WORLD-th prompt; then all exchange their groups, so advantages and token
weights are computed over all of them, on every rank alike. In an update a rank takes every WORLD-th group,
and the gradients of all ranks are added up. Loss and gradient are therefore those of one process.

    --adapter dora    Every rank holds everything. One all-reduce adds gradients and figures, then every
                      rank takes the same step.
    --adapter none    Every rank holds the weights in bf16 and their gradient in fp32 (6 bytes a weight). The
                      fp32 weights that are trained and AdamW's two moments are cut into WORLD slices (12
                      bytes a weight / WORLD, in CPU memory with --offload). A step is a reduce-scatter of the
                      gradient, AdamW on one's own slice, and an all-gather of the new weights.

Why not torch's fully_shard (FSDP2)? It gathers and frees weights in hooks around forward(). A pass in two
parts (a prompt's keys and values, then its completions), a head called by itself, and unequal numbers of
micro-batches go past those hooks: backward meets freed weights. What works is to keep all gathered from
rollout to step, with hooks that do nothing; that takes the memory of what is here, and more to understand.

What to know before running it:
  1. Ctrl-C ends all ranks together after the step. But torchrun kills a rank that takes longer than 30
     seconds to end: --shutdown-timeout 600 where steps are long. It sends every Ctrl-C twice, so only one
     that comes 2 seconds after the first or later counts as the second.
  2. Rank 0 alone writes; with --resume all ranks read, on several machines from a disk that all see.
"""

import functools
import os
import sys
import time
from collections import Counter
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from data import BadInput

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # torchrun sets them
LOCAL_RANK, LOCAL_WORLD = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
PATIENCE = timedelta(hours=1)  # of a rank that waits for others: they may still sample, or write a checkpoint
FIGURES = ("loss", "kl", "clip_fraction")  # of an update, sums over rows

# ------------------------------------------------------------------------- beginning and end


@functools.cache
def store():
    """The key-value store that all ranks reach."""
    return next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))[0]


def start():
    """Join the other ranks, if there are any. From here on only rank 0 prints."""
    if WORLD == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        if LOCAL_RANK >= torch.cuda.device_count():
            raise BadInput(f"torchrun --nproc-per-node {LOCAL_WORLD}: there are {torch.cuda.device_count()} GPUs here")
        torch.cuda.set_device(LOCAL_RANK)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # objects and flags stay on the CPU
    dist.init_process_group(backend, store=store(), rank=RANK, world_size=WORLD, timeout=PATIENCE)


def end():
    """Part from the other ranks. Not after an error: it would wait for ranks that never come."""
    if dist.is_initialized():
        dist.destroy_process_group()


def say(error):
    """Print an error, once, though every rank may have met it."""
    if WORLD > 1:
        store().set("failed", "")
        time.sleep(2 if RANK else 0)  # rank 0 goes first, if it has the same to say
        if store().compare_set(f"error {error}", "", str(RANK)) != str(RANK).encode():
            return
    print(f"error: {error}" + (f" (rank {RANK})" if RANK else ""), file=sys.stderr, flush=True)


def failed():
    """Whether a rank has said why it gave up, so that the broken connection to it is no news."""
    return WORLD > 1 and store().check(["failed"])


# ------------------------------------------------------------------------- sharing work


def share(items):
    """Those of a list's items that are this rank's."""
    return items[RANK::WORLD]


def gather(items):
    """All ranks' items in one list, in the order in which share() found them. They must pickle."""
    shares = [items]
    if WORLD > 1:
        shares = [None] * WORLD
        dist.all_gather_object(shares, items)
    return [shares[i % WORLD][i // WORLD] for i in range(sum(map(len, shares)))]


def own(prompts):
    """Which rows of a batch are this rank's, (B,) bool: whole groups, that is, runs of one prompt."""
    starts = torch.tensor([i == 0 or prompt != prompts[i - 1] for i, prompt in enumerate(prompts)])
    return (starts.cumsum(0) - 1) % WORLD == RANK


def together(flag):
    """Whether any rank's flag is set; the same answer on all. Also a barrier."""
    if WORLD == 1:
        return bool(flag)
    raised = torch.tensor(int(flag))
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised)


def add(tensor):
    """Add up a tensor over all ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


# ------------------------------------------------------------------------- one step


def part(tensor):
    """This rank's slice of a tensor: flat, of equal length on all ranks, the last one padded with zeros."""
    return F.pad(tensor.flatten(), (0, -tensor.numel() % WORLD)).view(WORLD, -1)[RANK]


def whole(mine, shape):
    """The tensor of which every rank holds the slice `mine`."""
    flat = mine if WORLD == 1 else mine.new_empty(WORLD * len(mine))
    if WORLD > 1:
        dist.all_gather_single(flat, mine)
    return flat[: shape.numel()].view(shape)


class ShardedAdamW(torch.optim.AdamW):
    """AdamW whose parameters are this rank's fp32 slices of all `weights`, which it writes back after a step."""

    def __init__(self, weights, offload, **settings):
        self.weights = weights
        for p in weights:
            p.grad_dtype = torch.float32  # micro-batches add up in it, whatever the dtype of p
        device = "cpu" if offload else weights[0].device
        slices = [nn.Parameter(part(p.detach()).to(device, torch.float32, copy=True)) for p in weights]
        super().__init__(slices, fused=True, **settings)

    def pairs(self):
        return list(zip(self.weights, self.param_groups[0]["params"], strict=True))

    def reduce(self):
        """Move the gradients of the weights, added up over all ranks, to the slices."""
        for p, mine in self.pairs():
            grad = torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad
            p.grad, total = None, part(grad)
            if WORLD > 1:
                total = torch.empty_like(total)
                dist.reduce_scatter_single(total, F.pad(grad.flatten(), (0, -grad.numel() % WORLD)))
            mine.grad = total.to(mine.device)

    def step(self):
        super().step()
        self.publish()

    @torch.no_grad()
    def publish(self):
        """Put all ranks' slices into the weights."""
        for p, mine in self.pairs():
            p.copy_(whole(mine.to(p.device, p.dtype), p.shape))


def optimizer(model, config):
    """AdamW over all parameters of `model` that require a gradient."""
    weights = [p for p in model.parameters() if p.requires_grad]
    settings = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.adapter == "none":
        return ShardedAdamW(weights, config.offload, **settings)
    return torch.optim.AdamW(weights, **settings)


def reduce(optimizer, sums):
    """Add up gradients and figures over all ranks; the figures, a Counter. A rank without rows adds zeros."""
    sharded = isinstance(optimizer, ShardedAdamW)
    if sharded:
        optimizer.reduce()
    if WORLD == 1:
        return sums
    parameters = [] if sharded else optimizer.param_groups[0]["params"]
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    device = parameters[0].device if parameters else "cpu"
    figures = torch.tensor([sums[name] for name in FIGURES], dtype=torch.float32, device=device)
    flat = add(torch.cat([*(p.grad.flatten() for p in parameters), figures]))
    *grads, figures = flat.split([*(p.numel() for p in parameters), len(FIGURES)])
    for p, grad in zip(parameters, grads, strict=True):
        p.grad = grad.view_as(p)
    return Counter(dict(zip(FIGURES, figures.tolist())))


def clip(optimizer, max_norm):
    """Shorten the gradient of all ranks to `max_norm`; its norm before that, a float."""
    parameters = optimizer.param_groups[0]["params"]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(optimizer, ShardedAdamW):
        norm = add(norm.square()).sqrt()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.item()


# ------------------------------------------------------------------------- checkpoints


def full_state(model, optimizer):
    """What a checkpoint holds of both, whole, however many ranks there are. Of use on rank 0; all must call it."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = optimizer.state_dict()
    if not isinstance(optimizer, ShardedAdamW):
        return {"trained": trained, "optimizer": state}
    for i, (name, (p, mine)) in enumerate(zip(trained, optimizer.pairs(), strict=True)):
        tensors = {**state["state"].get(i, {}), "": mine.detach()}
        for key, x in tensors.items():
            x = whole(x.to(p.device), p.shape).cpu() if x.dim() else x
            tensors[key] = x if RANK == 0 else None  # elsewhere it is gone before the next one is gathered
        trained[name] = tensors.pop("")
        state["state"][i] = tensors
    return {"trained": trained, "optimizer": state}


@torch.no_grad()
def load_state(model, optimizer, saved):
    """Put what full_state() gave back into model and optimizer, on any number of ranks."""
    if isinstance(optimizer, ShardedAdamW):
        for x, (_, mine) in zip(saved["trained"].values(), optimizer.pairs(), strict=True):
            mine.copy_(part(x))
        for moments in saved["optimizer"]["state"].values():
            moments |= {key: part(x).clone() if x.dim() else x for key, x in moments.items()}
        optimizer.publish()
    else:
        model.load_state_dict(saved["trained"], strict=False)
    optimizer.load_state_dict(saved["optimizer"])
