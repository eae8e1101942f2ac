"""Loading and saving through transformers: a checkpoint directory, a hub id or a run directory."""

import math
from pathlib import Path

import huggingface_hub
import safetensors.torch
import torch
import transformers
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
from training import dora, parallel
from training.config import BadInput, read_settings
from training.files import write

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # files, one of which is needed
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError)


def first_line(error):
    """The first line of an exception's text, or its type where it has none."""
    text = str(error).strip()
    return text.split("\n")[0] if text else type(error).__name__


def load_tokenizer(model):
    """The tokenizer of a checkpoint directory or hub id; BadInput without one, or without EOS."""
    path = Path(model)
    if path.is_dir():
        if not any((path / name).is_file() for name in TOKENIZERS):
            raise BadInput(f"model: no tokenizer in {model!r}; save one: tokenizer.save_pretrained")
    elif path.exists() or not data.HUB_ID.fullmatch(model):
        raise BadInput(f"model: no directory {model!r}; give a checkpoint directory or a hub id")
    huggingface_hub.logging.set_verbosity_error()  # silences retries; the error is reported below
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        why = first_line(error)
        raise BadInput(f"model: no tokenizer for {model!r}: {why}; give a checkpoint directory")
    if tokenizer.eos_token_id is None:
        raise BadInput(f"model: the tokenizer of {model!r} has no EOS token; set eos_token, save it")
    return tokenizer


def load_model(model):
    """The causal language model of a directory or hub id, in eval mode: fp32 on a CPU, bf16 on a GPU.

    A model below two million parameters gets one thread: more threads gain little on idle cores,
    and on a shared machine waiting for each other costs ten times the work.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation="sdpa"
        )
    except LOAD_ERRORS as error:
        raise BadInput(f"model: cannot load {model!r}: {first_line(error)}")
    if device == "cpu" and loaded.num_parameters() < 2_000_000:
        torch.set_num_threads(1)
    return loaded.to(device).eval()


def eos_ids(model, tokenizer):
    """The ids that end a completion, list[int]: generate's and the tokenizer's own."""
    listed = model.generation_config.eos_token_id  # an int, a list of ints, or None
    if not isinstance(listed, list):
        listed = [] if listed is None else [listed]
    return sorted({tokenizer.eos_token_id, *listed})


def open_policy(name):
    """What --model names, as (base model, adapter directory or "", the settings that it brings).

    A run directory stands for its adapter over the model it began with, or for its model/.
    """
    path = Path(name)
    if (path / "model" / "config.json").is_file():
        return str(path / "model"), "", read_settings(path / "config.json")
    if not (path / "adapter" / "adapter_config.json").is_file():
        beside = path / "defaults.json"
        return name, "", read_settings(beside) if beside.is_file() else {}
    settings = read_settings(path / "config.json")
    base = str(settings.get("model", ""))
    output = str(Path(settings.get("output", "")))
    began = Path(str(path.resolve()).removesuffix(output))  # its paths are relative to this
    for place in (began, Path(), Path(__file__).parent.parent):
        if base and (place / base).is_dir():
            base = str(place / base)
            break
    return base, str(path / "adapter"), settings


def load_policy(base, adapter):
    """The model in eval mode, with its adapter if there is one; BadInput if they do not fit."""
    model = load_model(base)
    if not adapter:
        return model
    try:
        return dora.load_adapter(model, adapter)
    except (KeyError, RuntimeError, safetensors.SafetensorError) as error:
        why = first_line(error)
        raise BadInput(f"--model: {adapter} does not fit {base}, or is damaged: {why}")


SHARD = "5GB"  # weights per file
CARD = """---
base_model: {base}
tags: [recode, code-migration]
---
{what}

It was trained to follow the update notes in its prompt (ReCode, arXiv 2506.20495). Prompt and
answer have the form of data.py: a system message, the notes in <doc>, the old code, then a thought
and <answer>.
"""


def write_model(model, tokenizer, directory, what):
    """Save an ordinary checkpoint directory: config, tokenizer, model card, weights.

    Sharded weights are gathered one by one on rank 0, in bf16 if they were used in it.
    """
    state = {}
    for name, p in model.named_parameters():
        full = parallel.full_tensor(p.detach())
        if isinstance(p, DTensor) and full.is_cuda:
            full = full.bfloat16()
        state[name] = full.cpu() if parallel.RANK == 0 else None
    if parallel.RANK > 0:
        return
    base = model.config.name_or_path
    try:
        model.save_pretrained(directory, state_dict=state, max_shard_size=SHARD)
        tokenizer.save_pretrained(directory)
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"cannot write {directory}: {first_line(error)}; make room, then --resume")
    write(Path(directory) / "README.md", CARD.format(base=base, what=what).encode())


@torch.no_grad()
def export(model, adapter, output):
    """Merge an adapter into its model and save an ordinary checkpoint directory, in W's dtype.

    Prints how much of the update is lost by rounding to that dtype. vLLM and others load it.
    """
    tokenizer = load_tokenizer(model)
    merged = dora.load_adapter(AutoModelForCausalLM.from_pretrained(model, dtype="auto"), adapter)
    update = 0.0  # sums of squares
    lost = 0.0
    for name, layer in dora.dora_layers(merged).items():
        W = layer.base.weight.float()
        exact = W + layer.scale * layer.lora_B @ layer.lora_A
        if layer.magnitude is not None:
            exact *= (layer.magnitude / layer.norm())[:, None]  # eq. 1 of training/dora.py
        layer.base.weight.copy_(exact)
        update += (exact - W).square().sum().item()
        lost += (exact - layer.base.weight.float()).square().sum().item()
        parent, _, leaf = name.rpartition(".")
        setattr(merged.get_submodule(parent), leaf, layer.base)
    write_model(merged, tokenizer, output, f"{model} with the adapter {adapter} merged into it.")
    share = math.sqrt(lost / max(update, 1e-30))
    print(f"merged into {output} as {merged.dtype}: rounding loses {share:.2%} of the update")
