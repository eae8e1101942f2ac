"""Several processes, one run: every rank knows the whole rollout and does its share of the work.

    torchrun --nproc-per-node 8 grpo.py ...                             the adapter
    torchrun --nproc-per-node 8 dapo.py --adapter none --lr 1e-6 ...    all weights

A rank samples and scores every WORLD-th prompt; then the groups are gathered on every rank, so
advantages and token weights are computed over all of them. In the update a rank takes every
WORLD-th group, and gradients are summed over ranks: loss and gradient are those of one process.

    --adapter dora    Every rank holds the full model; one all-reduce sums the gradients.
    --adapter none    FSDP2 (fully_shard) splits fp32 weights, gradient and AdamW's moments into
                      WORLD shards, in CPU memory with --offload. gather_weights() all-gathers the
                      full weights (in --dtype) once for a rollout and its update.

FSDP2 frees and gathers weights in hooks around forward(), and recode.py's passes bypass these hooks
(a pass in two parts, the output layer called on its own, unequal numbers of micro-batches). So the
weights stay gathered while gradients accumulate, 4 bytes per weight; then one empty pass through
the model lets the hooks reduce them.

Ctrl-C ends all ranks together after the step. torchrun sends it twice, so only one that comes 2
seconds later counts as the second, and kills a rank after 30 seconds: give --shutdown-timeout 600
where steps are long. Only rank 0 writes; with --resume every rank reads the checkpoint.
"""

import contextlib
import functools
import io
import os
import re
import sys
import time
import traceback
from collections import Counter
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor, distribute_tensor

from lib.config import BadInput, first_line

RANK = int(os.environ.get("RANK", "0"))  # torchrun sets these four
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
CUDA = torch.cuda.is_available()
BACKEND = "cpu:gloo,cuda:nccl" if CUDA else "gloo"  # objects and flags stay on the CPU
PATIENCE = timedelta(hours=1)  # a rank may have to wait while others sample or write a checkpoint

# ------------------------------------------------------------------------- start and end


@functools.cache
def store():
    """The key-value store that all ranks share."""
    return next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))[0]


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
    dist.init_process_group(BACKEND, store=store(), rank=RANK, world_size=WORLD, timeout=PATIENCE)


def report(error):
    """Print an error once, even if every rank has met it."""
    if WORLD > 1:
        store().set("failed", "")
        time.sleep(2 if RANK else 0)  # rank 0 goes first if it has the same to report
        if store().compare_set(f"error {error}", "", str(RANK)) != str(RANK).encode():
            return
    print(f"error: {error}" + (f" (rank {RANK})" if RANK else ""), file=sys.stderr, flush=True)


OUT_OF_MEMORY = """
  In this order: a smaller --micro-tokens (e.g. half; changes no result); no --keep-activations;
  fewer --prompts-per-step or --num-samples; shorter --max-new-tokens or --max-prompt-tokens;
  a smaller --r; with --adapter none, --offload or more GPUs. --dry-run tries a worst-case step.
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
    """Run `main` as a program: its result is the exit status, bad input is one line and 2.

    A defect of ours is a traceback and 70, as no program's result is.
    """
    open_streams()
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()  # here, where a closed pipe is handled, and not at exit
        if dist.is_initialized():  # not after an error: it would wait for ranks that never come
            dist.destroy_process_group()
        sys.exit(status)
    except BrokenPipeError:  # the reader of our output, e.g. head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (BadInput, OSError) as error:
        report(first_line(error))
        sys.exit(2)
    except KeyboardInterrupt:
        if RANK == 0:
            print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if out_of_memory(error):
            report(f"{first_line(error)} {OUT_OF_MEMORY}")
            sys.exit(2)
        if WORLD > 1 and store().check(["failed"]):
            sys.exit(2)  # another rank has reported why it gave up
        traceback.print_exc()
        sys.exit(70)


# ------------------------------------------------------------------------- sharing work


def share(items):
    """The items of a list that are this rank's."""
    return items[RANK::WORLD]


def gather(items):
    """All ranks' items in one list, in the order in which share() dealt them. They must pickle."""
    shares = [items]
    if WORLD > 1:
        shares = [None] * WORLD
        dist.all_gather_object(shares, items)
    total = sum(len(each) for each in shares)
    return [shares[i % WORLD][i // WORLD] for i in range(total)]


def any_rank(flag):
    """Whether the flag of any rank is set; the same answer on all ranks."""
    if WORLD == 1:
        return bool(flag)
    raised = torch.tensor(int(bool(flag)))
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised)


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


# ------------------------------------------------------------------------- all weights, sharded


def shard(model, offload):
    """Split all weights of `model` into fp32 shards, layer by layer to keep the peak low."""
    if not dist.is_initialized():  # one process has one shard: everything
        dist.init_process_group(BACKEND, store=dist.HashStore(), rank=0, world_size=1)
    # fp32 shards under bf16 weights: bf16 alone would round an update of 1e-6 away
    types = {"param_dtype": model.dtype, "reduce_dtype": torch.float32}
    settings = {"mp_policy": fsdp.MixedPrecisionPolicy(**types), "reshard_after_forward": False}
    if offload:
        settings["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=CUDA)
    layers = getattr(model.base_model, "layers", None)
    if layers is None:
        raise BadInput(f"--adapter none: {model.config.model_type} has no list of layers to shard")
    for module in (*layers, model):
        fsdp.fully_shard(module.float(), **settings)
        module.set_gradient_divide_factor(1.0)  # a sum, not a mean
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    model.set_requires_gradient_sync(False)
    model.set_reshard_after_backward(False)  # nothing is freed until reduce_gradients()
    with torch.no_grad():  # FSDP2 has to see the whole model first
        model(torch.zeros(1, 1, dtype=torch.long, device="cuda" if CUDA else "cpu"))
    free_weights(model)


def sharded_modules(model):
    """The modules whose weights come and go; none without shard()."""
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def gather_weights(model):
    """All-gather the full weights on every rank; they stay until reduce_gradients()."""
    for module in sharded_modules(model):
        module.unshard()


def free_weights(model):
    """Keep the shards only; model.parameters() are the shards until weights are gathered."""
    for module in sharded_modules(model):
        module.reshard()


@contextlib.contextmanager
def unhooked(model):
    """Disable FSDP2's forward hooks inside, while weights are gathered.

    The hooks make other streams wait, which a CUDA graph cannot capture.
    """
    with contextlib.ExitStack() as stack:
        for module in sharded_modules(model):
            for name in ("_forward_pre_hooks", "_forward_hooks"):
                hooks = getattr(module, name)
                setattr(module, name, type(hooks)())
                stack.callback(setattr, module, name, hooks)
        yield


# ------------------------------------------------------------------------- one update


def sum_metrics(sums):
    """The sums over all ranks, a Counter, of {name: float}; a rank without rows may lack names."""
    total = Counter()
    for each in gather([sums]):
        total.update(each)
    return total


def reduce_gradients(model):
    """Sum the gradients over all ranks."""
    if sharded_modules(model):
        model.set_requires_gradient_sync(True)
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        (0 * model(token, use_cache=False).logits).sum().backward()
        model.set_requires_gradient_sync(False)
        free_weights(model)
    elif WORLD > 1:
        parameters = [p for p in model.parameters() if p.requires_grad]
        for p in parameters:
            if p.grad is None:  # a rank without rows
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in parameters]
        flat = sum_ranks(nn.utils.parameters_to_vector(grads))  # one message for all
        nn.utils.vector_to_parameters(flat, grads)


def clip_grad_norm(model, max_norm):
    """Clip the gradient of all ranks to `max_norm`; returns its norm before that, a float."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return full_tensor(nn.utils.clip_grad_norm_(parameters, max_norm)).item()


# ------------------------------------------------------------------------- checkpoints


def full_tensor(x):
    """A tensor, all-gathered if it is sharded; then all ranks must call this."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def full_state(model, optimizer):
    """The full trained weights and optimizer state, which any number of ranks can load.

    All ranks must call it; the tensors are on rank 0 only.
    """
    free_weights(model)

    def keep(x):
        full = full_tensor(x.detach())
        return full.cpu() if RANK == 0 else None

    state = optimizer.state_dict()
    for i, moments in state["state"].items():
        state["state"][i] = {key: keep(x) for key, x in moments.items()}
    trained = {name: keep(p) for name, p in model.named_parameters() if p.requires_grad}
    return {"trained": trained, "optimizer": state}


@torch.no_grad()
def load_state(model, optimizer, saved):
    """Load what full_state() returned into model and optimizer, on any number of ranks."""
    free_weights(model)

    def shard_like(x, p):
        if isinstance(p, DTensor) and isinstance(x, torch.Tensor) and x.dim():
            shard = distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)
            return shard.to(p.device)  # with --offload back to the CPU, one tensor at a time
        return x

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        p.copy_(shard_like(saved["trained"][name], p))
    for p, moments in zip(trained.values(), saved["optimizer"]["state"].values()):
        for key, x in moments.items():
            moments[key] = shard_like(x, p)
    optimizer.load_state_dict(saved["optimizer"])
