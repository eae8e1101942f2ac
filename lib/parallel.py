"""Several processes, one run (torchrun): every rank knows the whole rollout and does its share.

A rank samples and scores every WORLD-th prompt; then the groups are gathered on every rank, so
advantages and token weights are computed over all of them. In the update a rank takes every
WORLD-th group, and gradients are summed over ranks: loss and gradient are those of one process.
Ctrl-C ends all ranks together after the step. Only rank 0 writes; with --resume every rank reads
the checkpoint.
"""

import io
import os
import re
import sys
import traceback
from collections import Counter
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from lib import fsdp
from lib.config import BadInput, first_line

RANK = int(os.environ.get("RANK", "0"))  # torchrun sets these four
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
CUDA = torch.cuda.is_available()
BACKEND = "cpu:gloo,cuda:nccl" if CUDA else "gloo"  # objects and flags stay on the CPU


def start():
    """Join the other ranks, if there are any. From here on only rank 0 prints."""
    if WORLD == 1 or dist.is_initialized():
        return
    if CUDA:
        count = torch.cuda.device_count()
        if LOCAL_RANK >= count:
            raise BadInput(f"torchrun --nproc-per-node {LOCAL_WORLD}: there are {count} GPUs here")
        torch.cuda.set_device(LOCAL_RANK)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w", errors="replace")
    dist.init_process_group(BACKEND, timeout=timedelta(hours=1))  # while others sample or write


OUT_OF_MEMORY = """
  In this order: a smaller --micro-tokens (e.g. half; changes no result); --no-keep-activations;
  fewer --prompts-per-step or --num-samples; shorter --max-new-tokens or --max-prompt-tokens;
  a smaller --r; with --adapter none, more GPUs. --dry-run tries a worst-case step.
  --resume continues from the last checkpoint."""


def out_of_memory(error):
    """Whether an exception says that no memory is left; often it is a plain RuntimeError."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    said = "out of memory|can't allocate memory|not enough memory|ALLOC_FAILED"
    return isinstance(error, kinds) or re.search(said, str(error)) is not None


def open_streams():
    """Make all output possible: where a stream is closed, and where its encoding is too small."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: >&-
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does


def run_main(main):
    """Run `main` as a program: its result is the exit status; bad input is one line and 2."""
    open_streams()
    text = ""
    status = 2
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()  # here, where a closed pipe is handled, and not at exit
        if dist.is_initialized():  # not after an error: it would wait for ranks that never come
            dist.destroy_process_group()
    except BrokenPipeError:  # the reader of our output, e.g. head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except KeyboardInterrupt:
        text = "stopped"
        status = 130
    except (BadInput, OSError) as error:
        text = f"error: {first_line(error)}"
    except Exception as error:
        if out_of_memory(error):
            text = f"error: {first_line(error)} {OUT_OF_MEMORY}"
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            text = "error: lost another rank, which says why"
        else:
            text = traceback.format_exc()
            status = 70  # a defect of ours; no program's result is 70
    if text:
        where = f" (rank {RANK})" if WORLD > 1 else ""
        print(text + where, file=sys.stderr, flush=True)
    sys.exit(status)


def share(items):
    """This rank's items of a list."""
    return items[RANK::WORLD]


def gather(items):
    """All ranks' items in one list, in the order in which share() dealt them. They must pickle."""
    if WORLD == 1:
        return items
    shares = [None] * WORLD
    dist.all_gather_object(shares, items)
    total = sum(len(each) for each in shares)
    return [shares[i % WORLD][i // WORLD] for i in range(total)]


def any_rank(flag):
    """Whether the flag of any rank is set; the same answer on all ranks."""
    return any(gather([flag]))


def sum_ranks(tensor):
    """Sum a tensor over all ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier():
    """Wait until all ranks are here."""
    sum_ranks(torch.zeros(1))  # on the CPU, through gloo


def seed_dropout(seed, step):
    """Seed torch's generator so that every step of every rank has dropout masks of its own."""
    torch.manual_seed((seed * 1_000_003 + step) * WORLD + RANK)  # seeds are 1,000,003 steps apart


def sum_metrics(sums):
    """The sums over all ranks, a Counter, of {name: float}; a rank without rows may lack names."""
    total = Counter()
    for each in gather([sums]):
        total.update(each)
    return total


def reduce_gradients(model):
    """Sum the gradients over all ranks."""
    if isinstance(model, FSDPModule):
        fsdp.reduce_gradients(model)
    elif WORLD > 1:
        for p in [p for p in model.parameters() if p.requires_grad]:
            if p.grad is None:  # a rank without rows
                p.grad = torch.zeros_like(p)
            sum_ranks(p.grad)


def clip_grad_norm(model, max_norm):
    """Clip the gradient of all ranks to `max_norm`; returns its norm before that, a float."""
    return full_tensor(nn.utils.clip_grad_norm_(model.parameters(), max_norm)).item()


def full_tensor(x):
    """A tensor, all-gathered if it is sharded."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(x, p):
    """The shard of a full tensor that belongs to parameter p; x itself if p is not sharded."""
    if isinstance(p, DTensor) and isinstance(x, torch.Tensor) and x.dim():
        return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)
    return x


def on_rank_0(x, dtype=None):
    """A full tensor, on the CPU, on rank 0; None on the others. All ranks must call it."""
    full = full_tensor(x.detach())
    return full.to("cpu", dtype) if RANK == 0 else None


def full_state(model, optimizer):
    """The full trained weights and optimizer state, on rank 0, for any number of ranks."""
    fsdp.free_weights(model)
    trained = {name: on_rank_0(p) for name, p in model.named_parameters() if p.requires_grad}
    state = optimizer.state_dict()
    for i, moments in state["state"].items():
        state["state"][i] = {key: on_rank_0(x) for key, x in moments.items()}
    return {"trained": trained, "optimizer": state}


@torch.no_grad()
def load_state(model, optimizer, saved):
    """Load what full_state() returned into model and optimizer, on any number of ranks."""
    fsdp.free_weights(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        p.copy_(shard_like(saved["trained"][name], p))
    for p, moments in zip(trained.values(), saved["optimizer"]["state"].values()):
        for key, x in moments.items():
            moments[key] = shard_like(x, p)
    optimizer.load_state_dict(saved["optimizer"])
