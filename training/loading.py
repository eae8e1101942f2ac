"""Loading, through transformers, and export: a checkpoint directory, a hub id, or a run directory."""

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


def load_tokenizer(model):
    """The tokenizer of a checkpoint directory or hub id. BadInput without one, or without an EOS."""
    path = Path(model)
    if path.is_dir() and not any(
        (path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        raise BadInput(f"model: no tokenizer in {model!r}; save one there with tokenizer.save_pretrained")
    if not path.is_dir() and (path.exists() or not data.HUB_ID.fullmatch(model)):
        raise BadInput(f"model: no directory {model!r}; give a checkpoint directory or a hub id")
    huggingface_hub.logging.set_verbosity_error()  # its retries are no news; their outcome is
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"model: no tokenizer for {model!r}: {first_line(error)}; give a checkpoint directory")
    if tokenizer.eos_token_id is None:
        raise BadInput(f"model: the tokenizer of {model!r} has no EOS token; set tokenizer.eos_token and save it")
    return tokenizer


def load_model(model):
    """The causal language model of a directory or hub id: fp32 on the CPU, bf16 on a GPU, eval mode.

    For a toy of under two million parameters torch is set to one thread: several win little where the
    cores are free, and where they are not (a shared machine) waiting for each other costs ten times the work.
    """
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    transformers.utils.logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise BadInput(f"model: cannot load {model!r}: {first_line(error)}")
    if device == "cpu" and loaded.num_parameters() < 2_000_000:
        torch.set_num_threads(1)
    return loaded.to(device).eval()


def eos_ids(model, tokenizer):
    """The ids that end a completion, list[int]: what `generate` would stop at, and the tokenizer's own."""
    listed = model.generation_config.eos_token_id  # an int, a list of them, or None
    listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
    return sorted({tokenizer.eos_token_id, *listed})


def first_line(error):
    return str(error).strip().split("\n")[0] or type(error).__name__


def open_policy(name):
    """What --model names, as (base model, adapter directory or "", settings that it brings).

    A run directory stands for its adapter over the model that it began with, or for its model/.
    """
    path, beside = Path(name), Path(name) / "defaults.json"
    if (path / "model" / "config.json").is_file():
        return str(path / "model"), "", read_settings(path / "config.json")
    if not (path / "adapter" / "adapter_config.json").is_file():
        return name, "", read_settings(beside) if beside.is_file() else {}
    settings = read_settings(path / "config.json")
    base, output = str(settings.get("model", "")), str(Path(settings.get("output", "")))
    began = Path(str(path.resolve()).removesuffix(output))  # where the run was started; its paths are relative to it
    places = [place / base for place in (began, Path(), Path(__file__).parent.parent) if (place / base).is_dir()]
    return str(places[0]) if base and places else base, str(path / "adapter"), settings


def load_policy(base, adapter):
    """The model in eval mode, with its adapter if there is one. BadInput if the two do not fit."""
    model = load_model(base)
    try:
        return dora.load_adapter(model, adapter) if adapter else model
    except (KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise BadInput(f"--model: {adapter} does not fit {base}, or is damaged: {first_line(error)}")


@torch.no_grad()
def export(model, adapter, output):
    """Merge an adapter into its model and save it as an ordinary checkpoint directory, in W's dtype.

    Prints how much of the update survives the rounding to that dtype. vLLM and others load the result.
    """
    tokenizer = load_tokenizer(model)
    merged = dora.load_adapter(AutoModelForCausalLM.from_pretrained(model, dtype="auto"), adapter)
    wanted = lost = 0.0
    for name, layer in dora.dora_layers(merged).items():
        W = layer.base.weight.float()
        exact = W + layer.scale * layer.lora_B @ layer.lora_A
        if layer.magnitude is not None:
            exact *= (layer.magnitude / layer.norm())[:, None]  # eq. 1 of training/dora.py
        layer.base.weight.copy_(exact)
        wanted += (exact - W).square().sum().item()
        lost += (exact - layer.base.weight.float()).square().sum().item()
        parent, _, leaf = name.rpartition(".")
        setattr(merged.get_submodule(parent), leaf, layer.base)
    write_model(merged, tokenizer, output, f"{model} with the adapter {adapter} merged into it.")
    share = math.sqrt(lost / max(wanted, 1e-30))
    print(f"merged into {output} as {merged.dtype}: rounding loses {share:.2%} of the update")


SHARD = "5GB"  # of weights in a file
CARD = """---
base_model: {base}
tags: [recode, code-migration]
---
{what}

It was trained to follow the update notes that a prompt shows (ReCode, arXiv 2506.20495). Prompt and answer have
the form of data.py: a system message, the notes in <doc>, the old code, then a thought and <answer>.
"""


def write_model(model, tokenizer, directory, what):
    """Save an ordinary checkpoint directory: config, tokenizer, model card, weights in files of SHARD at most.

    Trained slices are put together one by one on rank 0, in bf16 if they were used in it.
    """
    state, base = {}, model.config.name_or_path
    for name, p in model.named_parameters():
        x = parallel.whole(p.detach())
        x = x.bfloat16() if isinstance(p, DTensor) and x.is_cuda else x
        state[name] = x.cpu() if parallel.RANK == 0 else None
    if parallel.RANK > 0:
        return
    try:
        model.save_pretrained(directory, state_dict=state, max_shard_size=SHARD)
        tokenizer.save_pretrained(directory)
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"cannot write {directory}: {first_line(error)}; make room, then --resume")
    write(Path(directory) / "README.md", CARD.format(base=base, what=what).encode())
