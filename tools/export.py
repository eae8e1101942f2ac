"""Merges a run's adapter into its base model: an ordinary checkpoint, for vLLM and others.

    python -m tools.export runs/grpo --output merged
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import dora
from lib import loading, parallel
from lib.config import BadInput, Parser, open_policy


@torch.no_grad()
def main(argv=None):
    """Export a run; prints how much of its update is lost by rounding to W's dtype. Returns 0."""
    parser = Parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="run directory, e.g. runs/grpo")
    parser.add_argument("--output", required=True, metavar="X", help="new directory (required)")
    args = parser.parse_args(argv)
    output = Path(args.output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise BadInput(f"--output {output}: exists and is not empty; give a new directory")
    base, adapter, _ = open_policy(args.run)
    if not adapter:
        raise BadInput(f"{args.run}: no adapter there; give a run directory, e.g. runs/grpo")
    tokenizer = loading.load_tokenizer(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    dora.load_adapter(model, adapter)
    update = 0.0  # sums of squares
    lost = 0.0
    for name, layer in dora.dora_layers(model).items():
        W = layer.base.weight.float()
        exact = W + layer.scale * layer.lora_B @ layer.lora_A
        if layer.magnitude is not None:
            exact *= (layer.magnitude / layer.norm())[:, None]  # eq. 1 of dora.py
        layer.base.weight.copy_(exact)
        update += (exact - W).square().sum().item()
        lost += (exact - layer.base.weight.float()).square().sum().item()
        model.set_submodule(name, layer.base)
    loading.write_model(model, tokenizer, output)
    share = (lost / max(update, 1e-30)) ** 0.5
    print(f"merged into {output} as {model.dtype}: rounding loses {share:.2%} of the update")
    return 0


if __name__ == "__main__":
    parallel.run_main(main)
