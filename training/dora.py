"""DoRA: a small trainable part beside the frozen weights of a linear layer (arXiv 2402.09353).

    y = m * (W x + s B A x) / ||W + s B A||,   s = alpha / r                                  (eq. 1)

m (a magnitude for every row), A and B are trained; the norm, row by row, is held constant in the
gradient, as in the paper. Without m and norm it is LoRA (--adapter lora). With the part switched off the
model is the reference policy again, so no second model is needed. Files are PEFT's, in both directions.

Differences from PEFT:
  1. BA is never formed: ||W + sBA||^2 = ||W||^2 + 2s <W, BA> + s^2 ||BA||^2 needs small products only    (eq. 2)
  2. The norm is computed once for every change of A and B, not at every token.
  3. Dropout acts on the input of A alone; PEFT also drops inputs of W where m differs from the norm.
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
    """A frozen nn.Linear W and its trained direction and magnitude (eq. 1). Equals PEFT's use_dora.

    lora_A (r, in), lora_B (out, r) and magnitude (out,), None for LoRA, are fp32 whatever the dtype of W.
    """

    def __init__(self, base, r, alpha, dropout, magnitude=True):
        super().__init__()
        self.base, self.scale, self.dropout, self.enabled = base, alpha / r, nn.Dropout(dropout), True
        kwargs = {"dtype": torch.float32, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **kwargs))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **kwargs))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.magnitude = None
        if magnitude:
            self.register_buffer("squares", base.weight.detach().float().square().sum(1), persistent=False)
            self.magnitude = nn.Parameter(self.squares.sqrt())  # with B = 0 the layer is exactly W
        self.cached = None, None  # versions of A and B, and the norm that belongs to them

    @torch.no_grad()
    def norm(self):
        """||W + sBA|| of every row, (out,), computed anew only when A or B have changed."""
        versions = self.lora_A._version, self.lora_B._version
        if self.cached[0] != versions:
            A, B, s = self.lora_A, self.lora_B, self.scale
            cross = (B * (self.base.weight.float() @ A.T)).sum(1)  # <W, BA> of every row
            gram = (B @ (A @ A.T) * B).sum(1)  # ||BA||^2 of every row
            self.cached = versions, (self.squares + 2 * s * cross + s * s * gram).sqrt()  # eq. 2
        return self.cached[1]

    def forward(self, x):
        y, bias = self.base(x), self.base.bias
        if not self.enabled:
            return y
        low = F.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (..., r)
        up = self.lora_B.to(x.dtype).T  # (r, out)
        y = torch.addmm(y.flatten(0, -2), low.flatten(0, -2), up, alpha=self.scale).view_as(y)  # W x + s B A x
        if self.magnitude is None:
            return y
        gain = (self.magnitude / self.norm() - 1).to(x.dtype)  # beyond 1, for in bf16 there is little room next to 1
        return torch.addcmul(y, y if bias is None else y - bias, gain)  # eq. 1


def add_dora(model, r, alpha, dropout, targets, magnitude=True):
    """Freeze `model` and put a DoRALinear over each linear layer named in `targets`, "q_proj,v_proj" say.

    Without `magnitude` the adapter is LoRA. Raises BadInput for a target that is no linear layer of the model.
    """
    model.requires_grad_(False)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    known = {name.rpartition(".")[2] for name in linear}
    if missing := set(targets.split(",")) - known:
        raise BadInput(f"--targets: no linear layer {', '.join(sorted(missing))}; there are {', '.join(sorted(known))}")
    for name, module in linear.items():
        parent, _, leaf = name.rpartition(".")
        if leaf in targets.split(","):
            setattr(model.get_submodule(parent), leaf, DoRALinear(module, r, alpha, dropout, magnitude))
    return model


def dora_layers(model):
    """{name: DoRALinear}, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DoRALinear)}


@contextlib.contextmanager
def reference(model):
    """Inside, the adapter is off: `model` is the policy that training started from."""
    layers = dora_layers(model).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer in layers:
            layer.enabled = True


def save_adapter(model, config, directory):
    """Write the adapter as PEFT does, so that PeftModel.from_pretrained(base, directory) loads it."""
    if parallel.RANK > 0:
        return
    tensors = {}
    for name, layer in dora_layers(model).items():
        prefix = f"base_model.model.{name}.lora_"
        tensors[prefix + "A.weight"], tensors[prefix + "B.weight"] = layer.lora_A, layer.lora_B
        if layer.magnitude is not None:
            tensors[prefix + "magnitude_vector"] = layer.magnitude
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "use_dora": config.adapter == "dora", "bias": "none", "inference_mode": True,
        "r": config.r, "lora_alpha": config.alpha, "lora_dropout": config.dropout,
        "target_modules": config.targets.split(","), "base_model_name_or_path": config.model,
    }  # fmt: skip
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write(Path(directory) / "adapter_model.safetensors", safetensors.torch.save(tensors))
    write(Path(directory) / "adapter_config.json", json.dumps(settings, indent=2).encode())


def load_adapter(model, directory):
    """Put the DoRA or LoRA adapter of `directory` (ours or PEFT's) over `model`, dropout off, and return it."""
    settings = read_settings(Path(directory) / "adapter_config.json")
    try:
        tensors = safetensors.torch.load_file(Path(directory) / "adapter_model.safetensors")
    except OSError as error:
        raise BadInput(f"adapter: no weights in {directory!r} ({error})")
    unknown = [key for key in ("use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save") if settings.get(key)]
    if settings.get("peft_type") != "LORA" or unknown:
        raise BadInput(f"adapter: {directory!r} is no plain DoRA or LoRA adapter {unknown or ''}")
    targets = ",".join(settings["target_modules"])
    add_dora(model, settings["r"], settings["lora_alpha"], 0.0, targets, bool(settings.get("use_dora")))
    with torch.no_grad():
        for name, layer in dora_layers(model).items():
            prefix = f"base_model.model.{name}.lora_"
            layer.lora_A.copy_(tensors[prefix + "A.weight"])
            layer.lora_B.copy_(tensors[prefix + "B.weight"])
            if layer.magnitude is not None:
                layer.magnitude.copy_(tensors[prefix + "magnitude_vector"])
    return model
