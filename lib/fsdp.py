"""--adapter none trains all weights, in one shard per rank. Nothing else needs this file.

FSDP2 (fully_shard) splits fp32 weights, gradient and AdamW's moments into WORLD shards. Its hooks
around forward() gather and free weights, but recode.py's passes bypass them. So gather_weights()
all-gathers the full weights, in --dtype, once for a rollout and its update; gradients accumulate,
4 bytes per weight; then one empty pass through the model lets the hooks reduce them.

All ranks must call these functions, also a rank without a prompt. Without shards they do nothing.
"""

import contextlib

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def shard(model):
    """Split all weights of `model` into fp32 shards, layer by layer to keep the peak low."""
    if not dist.is_initialized():  # one process has one shard: everything
        backend = "nccl" if model.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    # fp32 shards under bf16 weights: bf16 alone would round an update of 1e-6 away
    policy = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32)
    for module in (*layers, model):
        fully_shard(module.float(), mp_policy=policy, reshard_after_forward=False)
        module.set_gradient_divide_factor(1.0)  # a sum, not a mean
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    model.set_requires_gradient_sync(False)
    model.set_reshard_after_backward(False)  # nothing is freed until reduce_gradients()
    with torch.no_grad():  # FSDP2 has to see the whole model first
        model(torch.zeros(1, 1, dtype=torch.long, device=model.device))
    free_weights(model)


def sharded_modules(model):
    """The modules whose weights come and go; none without shard()."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def gather_weights(model):
    """All-gather the full weights on every rank; they stay until reduce_gradients()."""
    for module in sharded_modules(model):
        module.unshard()


def free_weights(model):
    """Keep the shards only; model.parameters() are the shards until weights are gathered."""
    for module in sharded_modules(model):
        module.reshard()


def reduce_gradients(model):
    """Sum the gradients over all ranks, each rank its shard, and free the weights."""
    model.set_requires_gradient_sync(True)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    (0 * model(token, use_cache=False).logits).sum().backward()
    model.set_requires_gradient_sync(False)
    free_weights(model)


@contextlib.contextmanager
def unhooked(model):
    """Disable FSDP2's forward hooks: they make streams wait, which no CUDA graph can capture."""
    with contextlib.ExitStack() as stack:
        for module in sharded_modules(model):
            for name in ("_forward_pre_hooks", "_forward_hooks"):
                hooks = getattr(module, name)
                setattr(module, name, type(hooks)())
                stack.callback(setattr, module, name, hooks)
        yield
