"""Several processes, one run: every rank knows the whole rollout, and each does its share of the work.

    torchrun --nproc-per-node 8 grpo.py ...                             the adapter
    torchrun --nproc-per-node 8 dapo.py --adapter none --lr 1e-6 ...    all weights

A rank samples and scores every WORLD-th prompt; then all exchange their groups, so advantages and token
weights are computed over all of them, on every rank alike. In the update a rank takes every WORLD-th group,
and the gradients of all ranks are added up. Loss and gradient are therefore those of one process.

    --adapter dora    Every rank holds everything. One all-reduce adds gradients and figures, then every
                      rank takes the same step.
    --adapter none    torch's FSDP2 (fully_shard) cuts what is trained into WORLD slices: fp32 weights,
                      gradient and AdamW's two moments, 16 bytes a weight / WORLD, in CPU memory with
                      --offload. gather_weights() puts the whole weights (on a GPU in bf16) on every rank,
                      once for a rollout and its update.

Why the weights stay gathered for the update: FSDP2 frees and gathers them in hooks around forward(). A
pass in two parts (recode.py), the head called by itself, and ranks with unequal numbers of micro-batches
go past those hooks. So nothing moves while the micro-batches add up their gradients, 4 bytes a weight; then
one empty pass through the whole model, an ordinary one, has the hooks sum and slice them.

What to know before running it:
  1. Ctrl-C ends all ranks together after the step. But torchrun kills a rank that takes longer than 30
     seconds to end: --shutdown-timeout 600 where steps are long. It sends every Ctrl-C twice, so only one
     that comes 2 seconds after the first or later counts as the second.
  2. Rank 0 alone writes; with --resume all ranks read, on several machines from a disk that all see.
  3. A checkpoint of all weights passes through rank 0's CPU memory whole, 12 bytes a weight.
"""

import contextlib
import functools
import os
import sys
import time
from collections import Counter
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from training.config import BadInput

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # torchrun sets them
LOCAL_RANK, LOCAL_WORLD = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
BACKEND = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # objects and flags stay on the CPU
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
    dist.init_process_group(BACKEND, store=store(), rank=RANK, world_size=WORLD, timeout=PATIENCE)


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


# ------------------------------------------------------------------------- all weights, in slices


def shard(model, offload):
    """Cut all weights of `model` into fp32 slices, layer by layer so that few are ever there twice."""
    if not dist.is_initialized():  # one process alone has slices too: the whole
        dist.init_process_group(BACKEND, store=dist.HashStore(), rank=0, world_size=1)
    settings = {"reshard_after_forward": False, "mp_policy": MixedPrecisionPolicy(), "offload_policy": OffloadPolicy()}
    if torch.cuda.is_available():  # bf16 alone would round an update of 1e-6 away
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    for module in (*model.base_model.layers, model):
        fully_shard(module.float(), **settings)
        module.set_gradient_divide_factor(1.0)  # a sum, no mean
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    model.set_requires_gradient_sync(False)
    model.set_reshard_after_backward(False)  # nothing moves until reduce()
    with torch.no_grad():  # FSDP2 wants to see the whole model first
        model(torch.zeros(1, 1, dtype=torch.long, device="cuda" if torch.cuda.is_available() else "cpu"))
    free_weights(model)


def slices(model):
    """The modules whose weights come and go, none without fully_shard."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def gather_weights(model):
    """See to it that every rank has the whole weights; they stay until the next reduce()."""
    for module in slices(model):
        module.unshard()


@contextlib.contextmanager
def unhooked(model):
    """Inside, FSDP2 stays out of forward(), as long as weights are gathered: a CUDA graph cannot be recorded
    while its hooks let other streams wait for this one."""
    hooks = [(module, module._forward_pre_hooks, module._forward_hooks) for module in slices(model)]
    for module, before, after in hooks:
        module._forward_pre_hooks, module._forward_hooks = type(before)(), type(after)()
    try:
        yield
    finally:
        for module, before, after in hooks:
            module._forward_pre_hooks, module._forward_hooks = before, after


def free_weights(model):
    """Back to the slices; model.parameters() are these until weights are gathered."""
    for module in slices(model):
        module.reshard()


# ------------------------------------------------------------------------- one step


def reduce(model, sums):
    """Add up gradients and figures over all ranks; the figures, a Counter. A rank without rows adds zeros."""
    parameters = []
    if slices(model):
        model.set_requires_gradient_sync(True)
        (0 * model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False).logits).sum().backward()
        model.set_requires_gradient_sync(False)
        free_weights(model)
    elif WORLD > 1:
        parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    figures = torch.tensor([sums[name] for name in FIGURES], dtype=torch.float32, device=model.device)
    flat = add(torch.cat([*(p.grad.flatten() for p in parameters), figures]))
    *grads, figures = flat.split([*(p.numel() for p in parameters), len(FIGURES)])
    for p, grad in zip(parameters, grads, strict=True):
        p.grad = grad.view_as(p)
    return Counter(dict(zip(FIGURES, figures.tolist())))


def clip(model, max_norm):
    """Shorten the gradient of all ranks to `max_norm`; its norm before that, a float."""
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], max_norm)
    return whole(norm).item()


# ------------------------------------------------------------------------- checkpoints


def whole(x):
    """A tensor, put together from all ranks' slices if it is one of those; all ranks must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def full_state(model, optimizer):
    """What a checkpoint holds of both, whole, however many ranks there are. Of use on rank 0; all must call it."""
    free_weights(model)

    def keep(x):
        found = whole(x.detach())
        return found.cpu() if RANK == 0 else None

    state = optimizer.state_dict()
    state["state"] = {i: {key: keep(x) for key, x in moments.items()} for i, moments in state["state"].items()}
    return {"trained": {name: keep(p) for name, p in model.named_parameters() if p.requires_grad}, "optimizer": state}


@torch.no_grad()
def load_state(model, optimizer, saved):
    """Put what full_state() gave back into model and optimizer, on any number of ranks."""
    free_weights(model)

    def part(x, p):  # the slice of x that belongs to p's
        sliced = isinstance(p, DTensor) and isinstance(x, torch.Tensor) and x.dim()
        return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None) if sliced else x

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        p.copy_(part(saved["trained"][name], p))
    for p, moments in zip(trained.values(), saved["optimizer"]["state"].values()):
        moments |= {key: part(x, p) for key, x in moments.items()}
    optimizer.load_state_dict(saved["optimizer"])


# ------------------------------------------------------------------------- programs

OUT_OF_MEMORY = """
  In this order: a smaller --micro-tokens (half, say; changes no result); no --keep-activations; fewer
  --prompts-per-step or --num-samples; shorter --max-new-tokens or --max-prompt-tokens; with --adapter none,
  --offload or more GPUs. --dry-run tries the largest step first. What was saved goes on with --resume."""


def run_main(main):
    """Run `main` as a program: its result is the exit status, bad input one line and status 2."""
    try:
        status = main(sys.argv[1:])
        end()
        sys.exit(status)
    except BadInput as error:
        say(error)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        first = str(error).strip().split("\n")[0]
        say(f"{first} {OUT_OF_MEMORY}")
        sys.exit(1)
    except RuntimeError:
        if not failed():
            raise
        sys.exit(2)
    except KeyboardInterrupt:
        if RANK == 0:
            print("\nstopped", file=sys.stderr)
        sys.exit(130)
