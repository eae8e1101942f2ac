"""DoRA: a small trained part beside the frozen weights of a linear layer (arXiv 2402.09353).

    y = m * (W x + s B A x) / ||W + s B A||,   s = alpha / r                                (eq. 1)

m (one magnitude per row), A and B are trained; the norm of every row is a constant for the
gradient, as in the paper. Without m and norm it is LoRA (--adapter lora). With the adapter
disabled the model is the reference policy again, so no second model is needed. Adapter files are
PEFT's, in both directions.

Differences from PEFT:
  1. BA is never formed: the rows of
     ||W + sBA||^2 = ||W||^2 + 2s <W, BA> + s^2 ||BA||^2   need small products only         (eq. 2)
  2. The norm is computed once per change of A and B, not at every token.
  3. Dropout acts on the input of A only; in PEFT also on inputs of W where m is not the norm.
"""

import contextlib
import json
import math
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from training import parallel
from training.config import BadInput, read_settings
from training.files import write


class DoRALinear(nn.Module):
    """A frozen nn.Linear W with its trained direction and magnitude (eq. 1). Equals PEFT's use_dora.

    lora_A (r, in), lora_B (out, r) and magnitude (out,), None for LoRA, are fp32 whatever W is.
    """

    def __init__(self, base, r, alpha, dropout, magnitude=True):
        super().__init__()
        self.base = base
        self.scale = alpha / r
        self.dropout = nn.Dropout(dropout)
        self.enabled = True
        kwargs = {"dtype": torch.float32, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **kwargs))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **kwargs))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.magnitude = None
        if magnitude:
            squares = base.weight.detach().float().square().sum(1)  # (out,)
            self.register_buffer("squares", squares, persistent=False)
            self.magnitude = nn.Parameter(squares.sqrt())  # with B = 0 the layer is exactly W
        self.cached = None, None  # versions of A and B, and the norm that belongs to them

    @torch.no_grad()
    def norm(self):
        """||W + sBA|| of every row, (out,), recomputed only when A or B have changed."""
        versions = self.lora_A._version, self.lora_B._version
        if self.cached[0] != versions:
            A, B, s = self.lora_A, self.lora_B, self.scale
            cross = (B * (self.base.weight.float() @ A.T)).sum(1)  # <W, BA> of every row
            gram = (B @ (A @ A.T) * B).sum(1)  # ||BA||^2 of every row
            norm = (self.squares + 2 * s * cross + s * s * gram).sqrt()  # eq. 2
            self.cached = versions, norm
        return self.cached[1]

    def forward(self, x):
        y = self.base(x)  # W x + bias
        if not self.enabled:
            return y
        low = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (..., r)
        up = self.lora_B.to(x.dtype).T  # (r, out)
        rows = torch.addmm(y.flatten(0, -2), low.flatten(0, -2), up, alpha=self.scale)
        y = rows.view_as(y)  # W x + s B A x + bias
        if self.magnitude is None:
            return y
        gain = (self.magnitude / self.norm() - 1).to(x.dtype)  # gain - 1: bf16 is coarse near 1
        direction = y if self.base.bias is None else y - self.base.bias
        return torch.addcmul(y, direction, gain)  # eq. 1


def add_dora(model, r, alpha, dropout, targets, magnitude=True):
    """Freeze `model` and wrap each linear layer named in `targets`, e.g. "q_proj,v_proj".

    Without `magnitude` the adapter is LoRA. Raises BadInput for a target that the model lacks.
    """
    model.requires_grad_(False)
    targets = targets.split(",")
    modules = model.named_modules()
    linear = {name: module for name, module in modules if isinstance(module, nn.Linear)}
    known = {name.rpartition(".")[2] for name in linear}
    if missing := set(targets) - known:
        missing, known = ", ".join(sorted(missing)), ", ".join(sorted(known))
        raise BadInput(f"--targets: no linear layer {missing}; there are {known}")
    for name, module in linear.items():
        parent, _, leaf = name.rpartition(".")
        if leaf in targets:
            adapted = DoRALinear(module, r, alpha, dropout, magnitude)
            setattr(model.get_submodule(parent), leaf, adapted)
    return model


def dora_layers(model):
    """{name: DoRALinear}, in the model's order."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, DoRALinear)}


@contextlib.contextmanager
def reference(model):
    """Disable the adapter inside: `model` is then the policy that training started from."""
    layers = dora_layers(model).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer in layers:
            layer.enabled = True


def peft_names(name, layer):
    """{key in PEFT's file: parameter} of one layer."""
    prefix = f"base_model.model.{name}.lora_"
    found = {prefix + "A.weight": layer.lora_A, prefix + "B.weight": layer.lora_B}
    if layer.magnitude is not None:
        found[prefix + "magnitude_vector"] = layer.magnitude
    return found


def save_adapter(model, config, directory):
    """Write the adapter as PEFT does: PeftModel.from_pretrained(base, directory) loads it."""
    if parallel.RANK > 0:
        return
    tensors = {}
    for name, layer in dora_layers(model).items():
        for key, parameter in peft_names(name, layer).items():
            tensors[key] = parameter.detach().cpu().contiguous()
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True,
        "use_dora": config.adapter == "dora", "r": config.r, "lora_alpha": config.alpha,
        "lora_dropout": config.dropout, "target_modules": config.targets.split(","),
        "base_model_name_or_path": config.model,
    }  # fmt: skip
    write(Path(directory) / "adapter_model.safetensors", safetensors.torch.save(tensors))
    write(Path(directory) / "adapter_config.json", json.dumps(settings, indent=2).encode())


UNSUPPORTED = ("use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")  # of PEFT


def load_adapter(model, directory):
    """Load the DoRA or LoRA adapter in `directory` (ours or PEFT's) into `model`, dropout off."""
    settings = read_settings(Path(directory) / "adapter_config.json")
    try:
        tensors = safetensors.torch.load_file(Path(directory) / "adapter_model.safetensors")
    except OSError as error:
        raise BadInput(f"adapter: no weights in {directory!r} ({error})")
    unknown = [key for key in UNSUPPORTED if settings.get(key)]
    if settings.get("peft_type") != "LORA" or unknown:
        raise BadInput(f"adapter: {directory!r} is not a plain DoRA or LoRA adapter {unknown}")
    targets = ",".join(settings["target_modules"])
    magnitude = bool(settings.get("use_dora"))
    add_dora(model, settings["r"], settings["lora_alpha"], 0.0, targets, magnitude)
    with torch.no_grad():
        for name, layer in dora_layers(model).items():
            for key, parameter in peft_names(name, layer).items():
                parameter.copy_(tensors[key])
    return model
