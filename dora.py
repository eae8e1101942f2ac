"""DoRA: a small trained part beside the frozen weights of a linear layer (arXiv 2402.09353).

    y = m * (W x + s B A x) / ||W + s B A||,   s = alpha / r                                (eq. 1)

m (one magnitude per row), A and B are trained; the norm of every row is a constant for the
gradient, as in the paper. Without m and norm it is LoRA (--adapter lora). With the adapter
disabled the model is the reference policy again, so no second model is needed; a run that began
with an adapter puts that one back instead. Adapter files are PEFT's, in both directions.

Differences from PEFT:
  1. BA is never formed: the rows of
     ||W + sBA||^2 = ||W||^2 + 2s <W, BA> + s^2 ||BA||^2   need small products only         (eq. 2)
  2. The norm is computed once per optimizer step, not at every token.
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
from torch.optim.optimizer import register_optimizer_step_post_hook

from lib import parallel
from lib.config import BadInput, read_settings
from lib.files import write

steps = 0  # of all optimizers so far


def count_step(optimizer, args, kwargs):
    """Fused optimizers do not raise a tensor's _version, so cached norms need this count, too."""
    global steps
    steps += 1


register_optimizer_step_post_hook(count_step)


class DoRALinear(nn.Module):
    """A frozen nn.Linear W with trained direction and magnitude (eq. 1). Equals PEFT's use_dora.

    lora_A (r, in), lora_B (out, r) and magnitude (out,), None for LoRA, are fp32 whatever W is.
    """

    def __init__(self, base, r, alpha, dropout, magnitude=True):
        super().__init__()
        self.base = base
        self.scale = alpha / r
        self.dropout = nn.Dropout(dropout)
        self.enabled = True
        self.first = []  # A, B and m as they were loaded
        kwargs = {"dtype": torch.float32, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **kwargs))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **kwargs))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.magnitude = None
        if magnitude:
            squares = base.weight.detach().float().square().sum(1)  # (out,)
            self.register_buffer("squares", squares, persistent=False)
            self.magnitude = nn.Parameter(squares.sqrt())  # with B = 0 the layer is exactly W
        self.cached_norm = self.cached_parts = None, None  # (state of A, B, m; what belongs to it)

    @torch.no_grad()
    def norm(self):
        """||W + sBA|| of every row, (out,), recomputed only when A or B have changed."""
        A, B, s = self.lora_A, self.lora_B, self.scale
        version = steps, A._version, B._version
        if self.cached_norm[0] != version:
            cross = (B * (self.base.weight.float() @ A.T)).sum(1)  # <W, BA> of every row
            gram = (B @ (A @ A.T) * B).sum(1)  # ||BA||^2 of every row
            norm = (self.squares + 2 * s * cross + s * s * gram).sqrt()  # eq. 2
            self.cached_norm = version, norm
        return self.cached_norm[1]

    def parts(self, dtype):
        """A, B transposed and gain - 1 in `dtype`; a decoding step has no time to cast them."""
        state = steps, dtype, *(p._version for p in self.parameters(recurse=False))
        frozen = not torch.is_grad_enabled()
        if frozen and self.cached_parts[0] == state:
            return self.cached_parts[1]
        gain = None
        if self.magnitude is not None:
            gain = (self.magnitude / self.norm() - 1).to(dtype)  # gain - 1: bf16 is coarse near 1
        parts = self.lora_A.to(dtype), self.lora_B.to(dtype).T, gain
        if frozen:
            self.cached_parts = state, parts
        return parts

    def forward(self, x):
        y = self.base(x)  # W x + bias
        if not self.enabled:
            return y
        A, B, gain = self.parts(x.dtype)  # (r, in), (r, out), (out,)
        low = F.linear(self.dropout(x), A)  # (..., r)
        rows = torch.addmm(y.flatten(0, -2), low.flatten(0, -2), B, alpha=self.scale)
        y = rows.view_as(y)  # W x + s B A x + bias
        if gain is None:
            return y
        direction = y if self.base.bias is None else y - self.base.bias
        return torch.addcmul(y, direction, gain)  # eq. 1


def modules_of(model, kind):
    """{name: module} of a type, in the model's order, without the output layer."""
    head = model.get_output_embeddings()
    modules = model.named_modules()
    return {name: m for name, m in modules if isinstance(m, kind) and m is not head}


def dora_layers(model):
    """{name: DoRALinear}, in the model's order."""
    return modules_of(model, DoRALinear)


def add_dora(model, r, alpha, dropout, targets, magnitude=True):
    """Freeze `model` and wrap each linear layer whose name ends with one in `targets`.

    targets: e.g. "q_proj,v_proj". Without `magnitude` the adapter is LoRA. Raises BadInput for a
    target that the model lacks.
    """
    model.requires_grad_(False)
    linear = modules_of(model, nn.Linear)
    missing = set(targets.split(","))
    for name, module in linear.items():
        matches = [target for target in targets.split(",") if f".{name}".endswith(f".{target}")]
        if matches:
            model.set_submodule(name, DoRALinear(module, r, alpha, dropout, magnitude))
            missing.difference_update(matches)
    if missing:
        missing = ", ".join(sorted(missing))
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise BadInput(f"--targets: no linear layer {missing}; there are {known}")
    return model


@torch.no_grad()
def exchange(model):
    """Make `model` the policy that training started from; the next call undoes it."""
    for layer in dora_layers(model).values():
        if not layer.first:
            layer.enabled = not layer.enabled
        for p, first in zip(layer.parameters(recurse=False), layer.first):
            now = p.clone()
            p.copy_(first)
            first.copy_(now)


@contextlib.contextmanager
def reference(model):
    """Inside, `model` is the policy that training started from."""
    exchange(model)
    yield
    exchange(model)


PREFIX = "base_model.model."  # of the names in PEFT's files


def peft_parameters(model):
    """{name in PEFT's file: parameter} of all adapted layers."""
    found = {}
    for name, layer in dora_layers(model).items():
        found[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
        found[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B
        if layer.magnitude is not None:
            found[f"{PREFIX}{name}.lora_magnitude_vector"] = layer.magnitude
    return found


def save_adapter(model, config, directory):
    """Write the adapter as PEFT does: PeftModel.from_pretrained(base, directory) loads it."""
    if parallel.RANK > 0:
        return
    parameters = peft_parameters(model).items()
    tensors = {name: p.detach().cpu().contiguous() for name, p in parameters}
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True,
        "use_dora": config.adapter == "dora", "r": config.r, "lora_alpha": config.alpha,
        "lora_dropout": config.dropout, "target_modules": config.targets.split(","),
        "base_model_name_or_path": model.config.name_or_path,
    }  # fmt: skip
    write(Path(directory) / "adapter_model.safetensors", safetensors.torch.save(tensors))
    write(Path(directory) / "adapter_config.json", json.dumps(settings, indent=2).encode())


# What PEFT may write down without computing something else. A list of what it may not would be out
# of date with PEFT's next version.
HARMLESS = (
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version",
    "inference_mode", "r", "lora_alpha", "lora_dropout", "use_dora", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core",
    "qalora_group_size",
)  # fmt: skip
INITIAL = (True, False, None, "gaussian", "orthogonal")  # the others change the base, as PiSSA does


def load_adapter(model, directory, dropout=0.0):
    """Load the DoRA or LoRA adapter in `directory` (ours or PEFT's) into `model`.

    The names in its file say which layers it adapts, whatever form target_modules has. Raises
    BadInput for an adapter that is of another kind, is damaged, or does not fit the model.
    """
    place = f"adapter {str(directory)!r}"
    settings = read_settings(Path(directory) / "adapter_config.json")
    other = [key for key, x in settings.items() if key not in HARMLESS and x and x != "none"]
    if settings.get("init_lora_weights") not in INITIAL:
        other.append("init_lora_weights")
    if settings.get("peft_type") != "LORA" or other:
        why = f"is not a plain DoRA or LoRA adapter {other}"
        raise BadInput(f"{place} {why}; merge it into its base with PEFT, then give that model")
    r, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(r, int) or not isinstance(alpha, int | float) or not min(r, alpha) > 0:
        raise BadInput(f"{place}: r {r!r}, lora_alpha {alpha!r}: must be numbers above 0")
    try:
        tensors = safetensors.torch.load_file(Path(directory) / "adapter_model.safetensors")
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"{place}: weights missing or damaged ({error})")
    names = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors}
    if lost := sorted(names - modules_of(model, nn.Linear).keys()):
        raise BadInput(f"{place} does not fit the model, which has no linear layer {lost[0]!r}")
    add_dora(model, r, alpha, dropout, ",".join(names), bool(settings.get("use_dora")))
    parameters = peft_parameters(model)
    wanted = {name: list(parameter.shape) for name, parameter in parameters.items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted | found):
        shape, must = found.get(name), wanted.get(name)
        if shape != must:
            raise BadInput(f"{place} does not fit the model: {name} is {shape}, must be {must}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    for layer in dora_layers(model).values():
        layer.first = [p.detach().clone() for p in layer.parameters(recurse=False)]
    return model
