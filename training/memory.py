"""The memory that a run needs, by formula, and whether activations fit into it.

The model has W weights, n layers, width d, MLP width f, key width k, V words; its adapter has A
weights. A number takes b bytes: 2 in bf16 (GPU), 4 in fp32 (CPU). Each of N GPUs samples p prompts
of L tokens, and G completions of T tokens for each. It trains on one prompt at a time, in passes of
c = min(G T, max(M, T)) completion tokens (M: --micro-tokens).

    weights    b W                                                                       (eq. 1)
    trained    16 A with an adapter; else 4 W + 12 W / N: the fp32 gradient, and as      (eq. 2)
               shards the fp32 weights and AdamW's moments
    sampling   b (2 n + 1) k p G (L + T) + 16 p G V    keys and values, one of them      (eq. 3)
               twice while it grows; logits
    layer      h = b (11 d + 3 f + m)           what it keeps per token; m: in + 2 out   (eq. 4)
               of more targets than q_proj and v_proj; f where all weights are trained
               a = h c + 2 b k (G L + c)        what it keeps per pass
               w = b (2 d + 3 f) c              what its backward pass adds
    training   b n (d (L + c) + 4 k L) + a + w  layers recomputed                        (eq. 5)
               n (h L + a) + w                  --keep-activations
    peak       weights + trained + max(sampling, training + 16 MAX_LOGITS)               (eq. 6)
"""

import dataclasses
import os
import re
from pathlib import Path
from types import SimpleNamespace

import torch

import data
import dora
import recode
from lib import parallel

COUNTED = ("llama", "qwen2", "qwen3")  # models whose layers eq. 4 describes
USABLE = 0.7  # share of the free memory; the formula leaves out fragments and other programs


def shape_of(model):
    """A loaded model's letters in the equations."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    A = sum(p.numel() for p in model.parameters() if p.requires_grad)
    more = 0
    for name, layer in dora.dora_layers(model).items():
        if not name.endswith(("q_proj", "v_proj")):
            more += 2 * layer.base.in_features + layer.base.out_features
    return SimpleNamespace(
        d=config.hidden_size, n=config.num_hidden_layers, f=config.intermediate_size,
        k=head * config.num_key_value_heads, V=config.vocab_size, W=model.num_parameters(), A=A,
        m=more / config.num_hidden_layers,
    )  # fmt: skip


def memory(x, config, L, p, N=1, b=2, logits=recode.MAX_LOGITS_GPU):
    """{part: bytes} of a model's letters and a script's Config; eq. 1 to 6."""
    G, T = config.num_samples, config.max_new_tokens
    c = min(G * T, max(config.micro_tokens, T))
    full = config.adapter == "none"
    # eq. 4, counted in the layers of Qwen2 in bf16 by tests/test_plan.py
    h = b * (11 * x.d + 3 * x.f + (x.f if full else x.m))
    a = h * c + 2 * b * x.k * (G * L + c)
    w = b * (2 * x.d + 3 * x.f) * c
    training = b * x.n * (x.d * (L + c) + 4 * x.k * L) + a + w  # eq. 5
    if config.keep_activations:
        training = x.n * (h * L + a) + w
    parts = {
        "weights": b * x.W,  # eq. 1
        "trained": 4 * x.W + 12 * x.W / N if full else 16 * x.A,  # eq. 2
        "sampling": b * (2 * x.n + 1) * x.k * p * G * (L + T) + 16 * p * G * x.V,  # eq. 3
        "training": training + 16 * logits,
    }
    larger = max(parts["sampling"], parts["training"])
    return parts | {"peak": parts["weights"] + parts["trained"] + larger}  # eq. 6


def free_memory(device):
    """The bytes that this rank may still allocate; on macOS half of the memory counts as free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    info = Path("/proc/meminfo")
    if info.exists():
        free = 1024 * int(re.search(r"MemAvailable: *(\d+)", info.read_text())[1])
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.exists() and limit.read_text().strip().isdigit():
        used = int(limit.with_name("memory.current").read_text())
        free = min(free, int(limit.read_text()) - used)
    return free / parallel.LOCAL_WORLD


def keep_activations(model, tokenizer, tasks, config):
    """Whether activations are kept: as the flag says, else if they fit on all ranks.

    Prints a header line. Call it after the weights are loaded and before they are sharded.
    """
    keep = config.keep_activations
    why = "as the flag says"
    if keep is None and model.config.model_type not in COUNTED:
        keep = False
        why = f"no formula for {model.config.model_type}"
    if keep is None:
        T = config.max_new_tokens
        if config.num_samples == 1:  # sft.py trains on references of any length
            T = max(len(data.encode_target(example, tokenizer)) for _, example in tasks)
        most = dataclasses.replace(config, max_new_tokens=T, keep_activations=True)
        L = max(len(prompt) for prompt, _ in tasks)
        logits = recode.MAX_LOGITS_GPU if parallel.CUDA else recode.MAX_LOGITS
        x = shape_of(model)
        parts = memory(x, most, L, 1, parallel.WORLD, model.dtype.itemsize, logits)
        needed = parts["trained"] + parts["training"]
        free = free_memory(model.device)
        keep = not parallel.any_rank(needed > USABLE * free)
        why = f"need {needed / 1e9:.1f} GB, at most {USABLE:.0%} of the {free / 1e9:.1f} GB free"
    print(f"          activations {'kept' if keep else 'recomputed'}: {why}")
    return keep
