"""The memory that a run needs, by formula: a table for Qwen2.5-Coder on GPUs.

    python -m tools.plan
    python grpo.py --model Qwen/Qwen2.5-Coder-7B-Instruct --dry-run

A row of the table is grpo.py at its defaults, with a prompt of 2,048 tokens. --dry-run measures
such a step on your machine; its peak includes the process itself, which eq. 6 leaves out.

The model has W weights, n layers, width d, MLP width f, query and key widths q and k, V words; its
adapter has A weights. A number takes b bytes: 2 in bf16 (GPU), 4 in fp32 (CPU). Each of N GPUs
samples p prompts of L tokens, and G completions of T tokens for each. It trains on one prompt at a
time, in passes of r completions, c = r T tokens, at most M of them (--micro-tokens).

    weights    b W                                                                       (eq. 1)
    trained    16 A with an adapter; else 4 W + 12 W / N: the fp32 gradient, and as      (eq. 2)
               shards the fp32 weights and AdamW's moments
    sampling   b (2 n + 1) k p G (L + T) + 16 p G V    keys and values, one of them      (eq. 3)
               twice while it grows; logits
    layer      a = b ((11 d + 3 f) c + 2 k r (L + T))   what it keeps                    (eq. 4)
               w = b (2 d + 3 f) c                 what its backward pass adds
    training   b n (d (L + c) + 4 k L) + a + w     layers recomputed                     (eq. 5)
               b n (11 d + 3 f) L + n a + w        --keep-activations
    peak       weights + trained + max(sampling, training + 16 MAX_LOGITS)               (eq. 6)
"""

from types import SimpleNamespace

import grpo
import recode
from lib import parallel
from lib.config import Parser
from tasks.table import markdown

HELD_D, HELD_F = 11, 3  # eq. 4, counted in the layers of Qwen2 in bf16, see tests/test_plan.py
BACK_D, BACK_F = 2, 3
SIZES = {  # Qwen2.5-Coder: d, n, f, q, k, V, whether input and output layer share their weights
    "0.5B": (896, 24, 4864, 896, 128, 151_936, True),
    "1.5B": (1536, 28, 8960, 1536, 256, 151_936, True),
    "7B": (3584, 28, 18_944, 3584, 512, 152_064, False),
    "14B": (5120, 48, 13_824, 5120, 1024, 152_064, False),
    "32B": (5120, 64, 27_648, 5120, 1024, 152_064, False),
}


def shape(d, n, f, q, k, V, tied, rank=64):
    """A model's letters in the equations, with a DoRA on q_proj and v_proj."""
    W = n * (2 * d * q + 2 * d * k + 3 * d * f) + V * d * (1 if tied else 2)
    A = n * (rank * (2 * d + q + k) + q + k)
    return SimpleNamespace(d=d, n=n, f=f, k=k, V=V, W=W, A=A)


def memory(x, config, L, p, N=1, b=2, logits=recode.MAX_LOGITS_GPU):
    """{part: bytes} of a shape() and a script's Config; eq. 1 to 6."""
    G, T = config.num_samples, config.max_new_tokens
    r = min(G, max(config.micro_tokens // T, 1))
    c = r * T
    weights = b * x.W  # eq. 1
    trained = 4 * x.W + 12 * x.W / N if config.adapter == "none" else 16 * x.A  # eq. 2
    sampling = b * (2 * x.n + 1) * x.k * p * G * (L + T) + 16 * p * G * x.V  # eq. 3
    held = b * (HELD_D * x.d + HELD_F * x.f)
    a = held * c + b * 2 * x.k * r * (L + T)  # eq. 4
    w = b * (BACK_D * x.d + BACK_F * x.f) * c
    training = b * x.n * (x.d * (L + c) + 4 * x.k * L) + a + w  # eq. 5
    if config.keep_activations:
        training = x.n * (held * L + a) + w
    training += 16 * logits
    peak = weights + trained + max(sampling, training)  # eq. 6
    parts = {"weights": weights, "trained": trained, "sampling": sampling, "training": training}
    return parts | {"peak": peak}


def main(argv=None):
    """Print the peak memory per GPU of the largest step, one prompt per GPU. Returns 0."""
    Parser(__doc__).parse_args(argv)
    full = grpo.Config(adapter="none", beta=0.0)
    lines = [["", "DoRA, any number of GPUs", "full, 1 GPU", "full, 2 GPUs", "full, 8 GPUs"]]
    for name, size in SIZES.items():
        cells = [name]
        for config, N in ((grpo.Config(), 1), (full, 1), (full, 2), (full, 8)):
            peak = memory(shape(*size), config, config.max_prompt_tokens, 1, N)["peak"]
            cells.append(f"{peak / 1e9:.0f} GB")
        lines.append(cells)
    print("prompt of 2,048 tokens, 8 answers of 1,024, bf16: peak memory per GPU\n")
    print(markdown(lines), end="")
    return 0


if __name__ == "__main__":
    parallel.run_main(main)
