"""Loading and saving through transformers: a checkpoint directory, a hub id or a run directory."""

from pathlib import Path

import safetensors.torch
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import dora
from lib import parallel, speed
from lib.config import BadInput, first_line
from lib.files import HUB_ID

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # files, one of which is needed
OURS = ("runs", "tiny", "tests", "..", ".")  # no owners on the hub


def check_name(model):
    """Raise BadInput unless `model` is a directory with a tokenizer, or may be a hub id."""
    path = Path(model)
    mistyped = model.split("/")[0] in OURS  # another directory may have the name of a hub's owner
    if path.is_dir():
        if not any((path / name).is_file() for name in TOKENIZERS):
            raise BadInput(f"model: no tokenizer in {model!r}; save one: tokenizer.save_pretrained")
    elif path.exists() or not HUB_ID.fullmatch(model) or mistyped:
        raise BadInput(f"model: no directory {model!r}; give a run, a checkpoint or a hub id")


def load_tokenizer(model):
    """The tokenizer of a checkpoint directory or hub id; BadInput without one, or without EOS."""
    check_name(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # transformers raises all kinds for what it cannot load
        why = first_line(error)
        raise BadInput(f"model: no tokenizer for {model!r}: {why}; give a checkpoint directory")
    if tokenizer.eos_token_id is None:
        raise BadInput(f"model: the tokenizer of {model!r} has no EOS token; set one")
    return tokenizer


LARGE = 100_000_000  # parameters of a model whose speed on a CPU is worth the rounding of bf16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def native_bf16():
    """Whether this CPU multiplies in bf16; where it does not, bf16 is slower than fp32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def load_model(model, dtype="auto"):
    """The causal language model of a directory or hub id, in eval mode, on the GPU if there is one.

    dtype: fp32, bf16 or auto: bf16 on a GPU, and for a large model on a CPU with native bf16.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transformers.utils.logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):  # shapes only
            size = AutoModelForCausalLM.from_config(config).num_parameters()
        if dtype == "auto":
            fast = device == "cuda" or (size > LARGE and native_bf16())
            dtype = "bf16" if fast else "fp32"
        settings = {"dtype": DTYPES[dtype], "attn_implementation": "sdpa", "config": config}
        settings["output_loading_info"] = True
        loaded, info = AutoModelForCausalLM.from_pretrained(model, **settings)
    except Exception as error:
        raise BadInput(f"model: cannot load {model!r}: {first_line(error)}")
    if invented := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
        raise BadInput(f"model: {model!r}: weights missing or mismatched, e.g. {invented[0]}")
    for name, p in loaded.named_parameters():
        if not p.isfinite().all():
            raise BadInput(f"model: {model!r}: weights that are not finite, in {name}")
    # cuDNN's attention gives NaN gradients for some lengths and masks (pytorch#196678), and builds
    # a plan, 0.4 s, for every new shape; lengths differ in every step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    speed.prepare(loaded.to(device).eval())
    return loaded


def load_policy(base, adapter, dtype="auto"):
    """The model in eval mode, with its adapter if there is one."""
    model = load_model(base, dtype)
    return dora.load_adapter(model, adapter) if adapter else model


SHARD = "5GB"  # weights per file


def write_model(model, tokenizer, directory):
    """Save a checkpoint directory: config, tokenizer, weights in their first dtype."""
    dtype = model.config.dtype  # as loaded; shards are fp32
    state = {name: parallel.on_rank_0(p, dtype) for name, p in model.named_parameters()}
    if parallel.RANK > 0:
        return
    try:
        model.save_pretrained(directory, state_dict=state, max_shard_size=SHARD)
        tokenizer.save_pretrained(directory)
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"cannot write {directory}: {first_line(error)}; free some space first")
